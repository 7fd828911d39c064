"""Restore pictures: one step of a distilled student at any t (Eq. 13), or the flow itself, integrated.

    python sample.py --t 0.5 img.png                            # restored/img_x4.png, 4 times larger
    python sample.py --t 0,0.25,0.5,0.75,1 img.png              # the whole dial: ..._t0.png to ..._t1.png
    python sample.py -r photos/ -o larger/                      # a folder and those below it
    python sample.py --solver midpoint --steps 8 --ckpt out/photos_flow/ckpt.pt img.png
    python sample.py --solver rk45 --ckpt weights/photos_x4_flow.safetensors img.png
    python sample.py --generate 16 --ckpt out/ffhq_uncond_flow/ckpt.pt -o drawn/    # pictures out of nothing
    python sample.py --prior out/ffhq_uncond_flow/ckpt.pt --method ddnm img.png     # with such a flow (priors.py)
    python sample.py --model real img.jpg                       # takes blur, noise and compression away, too; --model auto: where the picture asks for it
    python sample.py --denoise 0.5 img.jpg                      # half of that
    python sample.py --t_map mask.png img.png                   # each pixel its own t: black 0, white 1
    python sample.py --export model.onnx                        # the student as a file for other programs (export.py)
    torchrun --nproc_per_node 2 -- sample.py -r photos/         # the processes share the pictures

t = 0 is the most faithful picture, t = 1 the most realistic; a flow has this dial too, at the price of its steps.
From Python: `from sample import upscale; big = upscale(image, t=0.5)`.
"""
import argparse
import functools
import math
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

# Before torch is loaded: OpenMP threads that sleep while they wait for each other cost a tenth on an idle machine, and
# are 3 to 10 times faster than spinning ones where other programs run too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

# PyTorch takes seconds to load. Where it is needed it is imported inside the functions, so that --help and a mistyped
# flag are answered at once.
from batch import STRIP, find_inputs, is_file_name, origin, plan
from colour import BAND, from_planes, resized, split_alpha, to_planes
from console import VERSION, InputError, Parser, Progress, check_file, check_folder, in_range
from pictures import MAX_PIXELS, as_picture, losses, open_writer, read_picture, write_picture

WEIGHTS = Path(__file__).parent / "weights" / "photos_x4.safetensors"
REAL = WEIGHTS.with_name("photos_real_x4.safetensors")  # the same network, for pictures that are blurred, noisy and compressed
MODELS = ("auto", "clean", "real")
SOLVERS = ("euler", "midpoint", "ralston", "heun", "rk45", "ancestral")  # the last is a ResShift's own
STEPS = 8  # of a solver, unless told
METHODS = {"ddnm": 100, "ddrm": 20, "dps": 1000, "diffpir": 100}  # that restore with an unconditional flow (priors.py), and their evaluations, unless told: the paper's


# --- the network and one picture ---


@functools.lru_cache(maxsize=3)
def _load(path, device, preset, mtime):  # mtime: a file that has changed is another file
    from data import saved_task
    from model import load_model
    net, meta = load_model(path, device, preset)
    return net, meta["stage"], saved_task(meta["task"], path) if meta["task"] else None


def load(ckpt=None, device="auto", preset=None):
    """The network of a checkpoint (default: the shipped student): (UNet, stage, Task or None). Kept between calls."""
    from machine import pick_device
    path = Path(ckpt or WEIGHTS)
    return _load(str(path), pick_device(device), preset, path.stat().st_mtime if path.is_file() else None)


@functools.lru_cache(maxsize=2)
def _blend(denoise, device, *mtimes):
    from dial import blend
    return blend(load(WEIGHTS, device), load(REAL, device), denoise)


def shipped(denoise, device="auto"):
    """The shipped student for a place of the second dial, as `load` gives it: 0 takes no blur, noise and compression away, 1 all it can. Raises InputError."""
    if denoise == 0:
        return load(WEIGHTS, device)
    if not REAL.is_file():
        raise InputError(f"no weights at {REAL}, which take blur, noise and compression away: without them there is --model clean alone")
    if denoise == 1:
        return load(REAL, device)
    return _blend(denoise, device, *(path.stat().st_mtime if path.is_file() else None for path in (WEIGHTS, REAL)))


def pick_denoise(picture, model=None, denoise=None):
    """Where the second dial stands for a Picture: (denoise, why in words). `auto`, the default, asks the picture; without one, or without REAL, it means clean."""
    if denoise is not None:
        return denoise, f"denoise {denoise:g}"
    if model in ("clean", "real"):
        return float(model == "real"), model
    if picture is None or not REAL.is_file():
        return 0.0, f"clean, as there is no {REAL.name}" if model else ""
    from damage import judge
    denoise, why = judge(picture)
    return denoise, f"{'real' if denoise == 1 else 'clean' if denoise == 0 else f'denoise {denoise:g}'}: {why}"


def weights_note(denoise):
    """What a note says of the shipped student at a place of the second dial."""
    names = [path.name for path, used in ((WEIGHTS, denoise < 1), (REAL, denoise > 0)) if used]
    return dict(weights="+".join(names), **(dict(denoise=denoise) if denoise else {}))


def network_for(picture, model, denoise, device):
    """The shipped student for a Picture: (UNet, Task, what a note says of it, why in words)."""
    denoise, why = pick_denoise(picture, model, denoise)
    net, _, task = shipped(denoise, device)
    return net, task, weights_note(denoise), why


def choose(stage, task, t, solver, steps):
    """What a checkpoint of that stage and task is asked for: (ts, None) of a student, (ts, solver) of a flow. Raises InputError if it cannot."""
    if not task.condition:
        raise InputError("this checkpoint is unconditional: it draws pictures of its own, and restores none")
    if stage == "distill" and (solver or steps):
        raise InputError("this checkpoint is a one-step student: it takes --t, not --solver or --steps")
    if stage is None and not solver and (steps or not t):
        raise InputError("this checkpoint does not say what it is: give --t alone if it is a distilled student, --solver if it is a stage-1 flow")
    if solver == "rk45" and steps:
        raise InputError("rk45 chooses its steps itself, by --rtol and --atol: it goes without --steps")
    return (t or [1.0], solver or "midpoint") if stage == "flow" or solver else (t or [0.5], None)


def check_unconditional(net, stage, task, flag):
    """Raises InputError unless a checkpoint is a flow that draws pictures out of noise alone."""
    if getattr(net, "condition", True) or task and task.sigma_p != 1 or stage == "distill":
        raise InputError(f"{flag} takes an unconditional stage-1 flow from pure noise (train_flow.py --dataset ffhq_uncond makes one): this checkpoint is none")


def load_prior(args):
    """The unconditional flow of --prior, and what was measured: its own task's H, scale and noise, or those of --dataset: (UNet, Task). Raises InputError."""
    from data import TASKS
    net, stage, task = load(args.prior, args.device, args.preset)
    check_unconditional(net, stage, task, "--prior")
    task = TASKS[args.dataset] if args.dataset else task or TASKS["ffhq_uncond"]
    if task.degradation == "real":
        raise InputError(f"--dataset {task.name}: its H is not linear, and --method {args.method} restores what bicubic or avgpool reduced")
    return net, task


def enlarge(net, task, picture, t, seed, size=None, tile="auto", dtype=None, progress=None, consistent=False, **how):
    """A Picture restored at t, from the top down: yields (rows (n, width, C) of its own dtype and channels, evaluations so far).

    size: (height, width) of the result, resampled to where it is not the network's. Colour goes through the network in
    float, from and to whatever the picture has; alpha is enlarged beside it. consistent: H takes the result to the picture
    again (dial.consistent), which wants all of it in memory. how: see tiles.restore_rows. Raises InputError where the
    network gives what is not finite.
    """
    from tiles import lr_window, pick_tile, resampled, restore_rows
    colour, alpha = split_alpha(picture.pixels)
    own = tuple(side * task.scale for side in colour.shape[:2])
    size, done, nfe = size or own, 0, 0

    def planes():
        nonlocal nfe
        window, side = lr_window(colour, task), pick_tile(tile, net, *own, dtype, how.get("tile_pad", 32))
        for rows, nfe in restore_rows(net, window, *own, task.sigma_p, seed, t, tile=side, dtype=dtype, progress=progress, **how):
            if not rows.isfinite().all():
                raise InputError(f"at t = {t:g} the network gave a value that is not finite")
            yield rows.numpy()

    def projected():
        import torch

        import dial
        whole = torch.from_numpy(np.concatenate(list(planes()), axis=1))
        yield dial.consistent(whole[None], torch.from_numpy(to_planes(colour))[None], task.degradation, task.scale)[0].numpy()

    def from_prior():
        nonlocal nfe
        import torch

        import priors
        y = torch.from_numpy(to_planes(colour))[None]
        x_1, nfe = priors.restore(net, task, y, seed, how["solver"], how["steps"], dtype, progress)
        if not x_1.isfinite().all():
            raise InputError("the prior gave a value that is not finite")
        yield x_1[0].cpu().numpy()

    bands = from_prior() if how.get("solver") in METHODS else projected() if consistent else planes()
    step = max(1, BAND // size[1])  # rows at a time: what follows makes several copies
    for band in bands if size == own else resampled(bands, *own, *size):
        for y in range(0, band.shape[1], step):
            rows = from_planes(band[:, y : y + step], colour.shape[2], colour.dtype)
            if alpha is not None:
                rows = np.concatenate([rows, resized(alpha, *size, done, done + len(rows))], axis=-1)
            done += len(rows)
            yield rows, nfe


def upscale(image, t=None, seed=0, ckpt=None, device="auto", dtype="auto", tile="auto", solver=None, steps=None, outscale=None,
            t_map=None, consistent=False, progress=None, model=None, denoise=None, **how):
    """A picture, larger by the scale the network was trained for (4 for the shipped one), or by outscale.

    image: the path of a picture file, a PIL picture of any mode, or an array (H, W), (H, W, C) of uint8 or uint16, C = 1
    (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGB and alpha). t in [0, 1] (default 0.5): 0 the most faithful, 1 the most
    realistic; solver and steps for a stage-1 flow (whose t is 1 by default). t_map: in place of t, a path or a gray picture laid
    over the whole, each pixel's own t; consistent: a result that H takes to image again. Of the shipped networks model takes
    "clean", "real" (which takes blur, noise and compression away) or "auto" (the default: by the picture), or denoise in [0, 1] all
    between the first two. progress(share) is called with each tile's share
    of the work. `how` goes to `tiles.restore_rows` (rtol, atol, tile_pad). Returns a PIL picture for a PIL picture, else an
    array like the input's, or (H, W, C) for a file; a list of these for a list of pictures. Raises InputError.
    """
    from PIL import Image

    from data import TASKS
    from dial import read_map
    from machine import pick_device, pick_dtype
    if isinstance(image, (list, tuple)):  # each as if it were alone: the same noise, whatever its place
        share_of_all = progress and (lambda share: progress(share / len(image)))
        return [upscale(one, t, seed, ckpt, device, dtype, tile, solver, steps, outscale, t_map, consistent, share_of_all, model, denoise, **how) for one in image]
    check_network(ckpt, None, model, denoise, consistent)
    picture = as_picture(image)
    net, stage, task = load(ckpt, device) if ckpt else shipped(pick_denoise(picture, "clean" if consistent else model, denoise)[0], device)
    task = task or TASKS["photos"]
    if t is not None and not 0 <= t <= 1:
        raise InputError(f"t goes from 0 (fidelity) to 1 (realism), not {t}")
    ts, solver = choose(stage, task, None if t is None else [t], solver, steps)
    height, width = picture.pixels.shape[:2]
    size = outscale and (max(1, round(height * outscale)), max(1, round(width * outscale)))
    if consistent and (task.sigma_n or outscale):
        raise InputError("consistent is for pictures without noise, and the network's own enlargement")
    how.update(t_map=None if t_map is None else read_map(t_map), consistent=consistent, solver=solver, steps=steps or STEPS, dtype=pick_dtype(dtype, pick_device(device)), tile=tile,
               progress=progress)
    big = np.concatenate([rows for rows, _ in enlarge(net, task, picture, ts[0], seed, size or None, **how)])
    if isinstance(image, Image.Image):
        return Image.fromarray(big[..., 0] if big.shape[2] == 1 else big)
    return big[..., 0] if not isinstance(image, (str, os.PathLike)) and np.ndim(image) == 2 else big


# --- the command line ---


def parse_args(argv):
    p = Parser(description=__doc__, usage="%(prog)s PICTURE [PICTURE ...] [flags]")
    p.add_argument("--version", action="version", version=f"oftsr {VERSION}")
    g = p.add_argument_group("pictures", "python sample.py -r photos/ -o larger/")
    g.add_argument("inputs", nargs="*", metavar="PICTURE", help="files, folders, patterns")
    g.add_argument("-i", "--input", nargs="+", default=[], metavar="PICTURE", help="the same")
    g.add_argument("-r", "--recursive", action="store_true", help="look into folders below folders, and mirror them")
    g.add_argument("--max_pixels", type=in_range(float, 1), default=MAX_PIXELS, help=f"refuse pictures of more (default: {MAX_PIXELS / 1e6:g} million)")
    g = p.add_argument_group("results", "python sample.py img.png -o larger/ --suffix _big --ext jpg --quality 90")
    g.add_argument("-o", "--output", default="restored", help="folder to write to, or a file when there is one picture (default: restored/)")
    g.add_argument("--suffix", help="put after each name (default: the enlargement, as _x4)")
    g.add_argument("--ext", choices=("auto", "png", "jpg", "webp", "tif", "avif"), default="auto", help="format; auto: the input's, png if it is none of these")
    g.add_argument("--quality", type=in_range(int, 1, 100), default=95, help="of jpg, webp and avif (default: 95)")
    g.add_argument("--skip_existing", action="store_true", help="leave alone what is already written: goes on where a run was stopped")
    g.add_argument("--overwrite", action="store_true", help="replace what is there, even what was not made from the same picture; never an input")
    g.add_argument("--no_metadata", action="store_true", help="leave out EXIF, XMP and dpi, and what was done")
    g.add_argument("--strip", action="store_true", help="also write the input (repeated pixels) and all results side by side, ..._strip.png")
    g = p.add_argument_group("the dial", "python sample.py img.png --t 0,0.5,1")
    g.add_argument("--t", type=dial, help="0 fidelity to 1 realism, one number or a sweep as 0,0.5,1 (default: 0.5; of a stage-1 flow 1)")
    g.add_argument("--t_map", metavar="FILE", help="in place of --t a gray picture, laid over the whole: each pixel's own t, black 0 to white 1")
    g.add_argument("--consistent", action="store_true", help="a result that, reduced again, is the input, as far as 8 bits show")
    g.add_argument("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of the noise in x_0, the same for every picture (default: 0)")
    g = p.add_argument_group("size", "python sample.py img.png --width 3840")
    g.add_argument("-s", "--outscale", type=in_range(float, 0.1, 64), help="enlargement, by resampling what the network gives (default: the network's)")
    g.add_argument("--width", type=in_range(int, 1), help="of the result in pixels; the height follows")
    g.add_argument("--height", type=in_range(int, 1), help="of the result in pixels; the width follows; with --width: as large as fits into both")
    g = p.add_argument_group("network", "python sample.py img.png --ckpt out/photos_flow/ckpt.pt --solver midpoint --steps 8")
    g.add_argument("--ckpt", help="weights: a ckpt.pt, a .safetensors or a published file (default: the shipped student)")
    g.add_argument("--model", metavar="{auto,clean,real}", help="which shipped network: clean, for pictures that are small and nothing else; real, which takes blur, noise "
                   "and compression away; auto: by the picture, and says why (default). Any other name is that of --preset")
    g.add_argument("--denoise", type=in_range(float, 0, 1), help="the second dial, in place of --model: how much blur, noise and compression is taken away, 0 (clean) to 1 (real)")
    g.add_argument("--preset", help="network preset, for a published file, which does not say")
    g.add_argument("--dataset", help="task, for a file that does not say (default: photos)")
    g.add_argument("--generate", type=in_range(int, 1), metavar="N", help="draw N pictures with an unconditional flow, restore none; and a grid of the first 64")
    g.add_argument("--prior", metavar="FILE", help="restore with an unconditional flow, by --method; --dataset says whose H and noise it was (default: its own task's, bicubic)")
    g.add_argument("--method", choices=METHODS, help="how, of 1 picture in one piece (evaluations: " + ", ".join(f"{name} {n}" for name, n in METHODS.items()) + "; --steps says others)")
    g.add_argument("--export", metavar="FILE", help="write the student as one ONNX file, with --t and --seed as its defaults, and restore nothing")
    g.add_argument("--solver", choices=SOLVERS, help="integrate a stage-1 flow instead (default for a stage-1 checkpoint: midpoint)")
    g.add_argument("--steps", type=in_range(int, 1), help=f"steps of the solver (default: {STEPS})")
    g.add_argument("--rtol", type=in_range(float, 1e-6), help="relative tolerance of rk45 (default: 1e-3)")
    g.add_argument("--atol", type=in_range(float, 1e-6), help="absolute tolerance of rk45 (default: 1e-3)")
    g = p.add_argument_group("machine", "python sample.py img.png --device cpu --dtype float32 --tile 512")
    g.add_argument("--device", type=device_name, default="auto", help="auto, cuda, mps or cpu (default: auto, the first of these that is there)")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    g.add_argument("--tile", type=tile_size, default="auto", help="side of the tiles in output pixels; 0: never tile; official: the published "
                   "protocol for DIV2K; auto: by size and memory (default)")
    g.add_argument("--tile_pad", type=in_range(int, 1), default=32, help="half the width over which tiles blend (default: 32)")
    args = p.parse_args(argv)
    args.inputs += args.input
    if args.model not in (None, *MODELS):
        args.preset, args.model = args.preset or args.model, None
    try:
        check_args(args)
    except InputError as e:
        p.error(str(e))
    return args


def check_network(ckpt, preset, model, denoise, consistent):
    """Raises InputError where what says which network it is does not go together."""
    if model not in (None, *MODELS):
        raise InputError(f"no model {model!r}: there are {', '.join(MODELS)}")
    if denoise is not None and not 0 <= denoise <= 1:
        raise InputError(f"denoise goes from 0 (nothing taken away) to 1, not {denoise}")
    if model and denoise is not None:
        raise InputError("--model and --denoise both say what is taken away: give one")
    if consistent and (model == "real" or denoise):
        raise InputError("--consistent would bring back the blur, noise and compression that are taken away: it is for --model clean")
    if (ckpt or preset) and (model or denoise is not None):
        raise InputError(f"--{'model ' + model if model else 'denoise'} is of the shipped networks: it goes without {'--ckpt' if ckpt else '--preset'}")


def check_args(args):
    """Raises InputError where the arguments do not go together."""
    check_network(args.ckpt, args.preset, args.model, args.denoise, args.consistent)
    if not (args.inputs or args.export or args.generate):
        raise InputError("name a picture, a folder or a pattern")
    if bool(args.prior) != bool(args.method):
        raise InputError("--method goes with --prior FILE, an unconditional flow" if args.method else f"--prior goes with --method {{{','.join(METHODS)}}}")
    if args.prior and (idle := [f for f in ("ckpt", "t", "t_map", "consistent", "solver", "generate", "export", "model", "denoise") if getattr(args, f) is not None and getattr(args, f) is not False]):
        raise InputError(f"--prior goes without --{idle[0]}")
    if args.prior and args.tile not in ("auto", 0):
        raise InputError("--prior restores a picture in one piece: it goes without --tile")
    if args.export and args.model == "auto":
        raise InputError("--export writes one network, which no picture has chosen: --model clean or real")
    if args.export and (args.inputs or args.t_map or args.consistent or args.t and len(args.t) > 1):
        raise InputError("--export writes a model: it takes no pictures, no --t_map, no --consistent and one --t")
    if args.t and args.t_map:
        raise InputError("--t and --t_map both say where the dial stands: give one")
    if args.consistent and (args.outscale or args.width or args.height):
        raise InputError("--consistent is for the network's own enlargement: it goes without -s, --width and --height")
    if args.generate and (idle := [f for f in ("inputs", "t", "t_map", "consistent", "export", "strip", "outscale", "width", "height", "model", "denoise") if getattr(args, f)]):
        raise InputError(f"--generate draws pictures out of nothing: it goes without {'pictures' if idle[0] == 'inputs' else f'--{idle[0]}'}")
    if args.generate and args.steps and args.solver in (None, "rk45"):
        raise InputError("rk45, the default of --generate, chooses its steps itself: --steps goes with another --solver")
    if args.generate and is_file_name(args.output):
        raise InputError(f"--generate writes several files: -o names a folder, not {args.output}")
    if args.outscale and (args.width or args.height):
        raise InputError("-s and --width or --height both say how large: give one")
    if (args.rtol or args.atol) and args.solver != "rk45":
        raise InputError("--rtol and --atol are for --solver rk45")
    if args.skip_existing and args.overwrite:
        raise InputError("--skip_existing and --overwrite contradict each other")
    if args.suffix and Path(args.suffix).name != args.suffix:
        raise InputError(f"--suffix {args.suffix} goes into a file's name, and names no folder: that is -o")
    if is_file_name(args.output) and args.ext != "auto":
        raise InputError(f"-o {args.output} names the format already: it goes without --ext")
    if isinstance(args.tile, int) and 0 < args.tile <= 2 * args.tile_pad:
        raise InputError(f"--tile {args.tile} must be larger than twice --tile_pad ({2 * args.tile_pad})")


def dial(text):
    try:
        ts = [float(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or numbers with commas between") from None
    if not all(0 <= t <= 1 for t in ts):
        raise argparse.ArgumentTypeError(f"{text}: t goes from 0 (fidelity) to 1 (realism)")
    return list(dict.fromkeys(ts))


def tile_size(text):
    return text if text in ("auto", "official") else in_range(int, 0)(text)


def device_name(text):
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"no device {text!r}: there are auto, cuda, mps and cpu")
    return text


def stand(args, t):
    """Where the dial stands, for a note."""
    return {**({"t_map": Path(args.t_map).name} if args.t_map else {"t": t}), **({"consistent": True} if args.consistent else {})}


def restore_file(net, task, picture, job, t, tile, args, dtype, note, progress, **how):
    """Restore one picture at one t and write it, if it is to be written: (its pixels, if they are to go into a strip, else None; evaluations)."""
    out, strip = job.outs.get(t), STRIP in job.outs
    megapixels = job.size[0] * job.size[1] / 1e6
    rows = enlarge(net, task, picture, t, args.seed, job.size, tile, dtype, lambda share: progress.add(share * megapixels), **how)
    note = {**note, **stand(args, t), "tile": tile}
    if how["solver"]:  # how many evaluations a solver made is known, and goes into the file, when it has made them
        rows = list(rows)
        note.update(solver=how["solver"], nfe=rows[-1][1])
    kept, nfe, shape = [], 1, (*job.size, picture.pixels.shape[2])
    if out is None:
        kept, nfe = zip(*rows)
        return np.concatenate(kept), nfe[-1]
    with open_writer(out, *shape, picture.pixels.dtype, picture, args.quality, not args.no_metadata, None if args.no_metadata else note) as writer:
        for part, nfe in rows:
            writer.write(part)
            if strip:
                kept.append(part)
    return np.concatenate(kept) if strip else None, nfe


def restore_job(network, job, ts, args, dtype, note, progress, **how):
    """All that is to be written for one picture. Raises InputError, OSError, ArithmeticError, MemoryError."""
    from machine import out_of_memory
    from tiles import pick_tile, smaller_tile
    picture = read_picture(job.path, args.max_pixels, not args.no_metadata)
    for line in [*picture.notes, *{line for out in job.outs.values() for line in losses(out, picture.pixels.shape[2], picture.pixels.dtype)}]:
        progress.say(f"{job.path}: {line}", sys.stderr)
    net, task, said, why = network(picture)
    height, width = (side * task.scale for side in picture.pixels.shape[:2])
    tile, bigs, note = 0 if args.prior else pick_tile(args.tile, net, height, width, dtype, args.tile_pad), [], {**note, **said, **origin(job.path)}
    for t in [t for t in ts if t in job.outs or STRIP in job.outs]:
        start, before = time.perf_counter(), progress.done
        while True:
            try:
                big, nfe = restore_file(net, task, picture, job, t, tile, args, dtype, note, progress, **how)
                break
            except (MemoryError, RuntimeError) as e:
                smaller = smaller_tile(tile, height, width, args.tile_pad) if out_of_memory(e) and not args.prior else None
                if smaller is None:
                    raise
            progress.say(f"{job.path}: not enough memory for {f'tiles of {tile}' if tile else 'one piece'}, going on with tiles of {smaller}", sys.stderr)
            tile = smaller
            progress.to(before)
        bigs.append(big)
        if t in job.outs:
            what = (f"{why}, " if why else "") + (f"{how['solver']}, {nfe} evaluations, " if how["solver"] else "")
            progress.say(f"{job.path} {job.width}x{job.height} -> {job.outs[t]} {job.size[1]}x{job.size[0]}, t {args.t_map or f'{t:g}'}, {what}{time.perf_counter() - start:.1f} s")
    if STRIP in job.outs:
        small = resized_repeating(picture.pixels, *job.size)
        write_picture(job.outs[STRIP], np.hstack([small, *bigs]), note=None if args.no_metadata else {**note, **stand(args, ts)})


def resized_repeating(pixels, height, width):
    """The picture at that size by repeating its pixels."""
    y, x = (np.arange(new) * old // new for new, old in zip((height, width), pixels.shape))
    return pixels[y][:, x]


def run(jobs, network, ts, args, tally, progress, **how):
    """Restore the jobs [(number of all, how many there are, job)] one after the other, and count in tally. What one picture lacks is not the others' loss."""
    from machine import out_of_memory
    for number, count, job in jobs:
        goal = progress.done + work(job, ts)
        progress.start(f"{number} of {count}: {job.path.name}")
        try:
            restore_job(network, job, ts, args, progress=progress, **how)
            tally["done"] += 1
        except (InputError, OSError, ArithmeticError, MemoryError, RuntimeError) as e:  # rk45 that fails; a picture too large
            short = out_of_memory(e)
            if isinstance(e, RuntimeError) and not short:
                raise
            why = "not enough memory" if short else (str(e) or type(e).__name__).splitlines()[0]
            progress.say(f"skipped: {why if str(job.path) in why else f'{job.path}: {why}'}", sys.stderr)
            tally["skipped"] += 1
        progress.to(goal)


def work(job, ts):
    """Megapixels to restore for a job."""
    return job.size[0] * job.size[1] / 1e6 * sum(t in job.outs or STRIP in job.outs for t in ts)


def prepare(args):
    """What is asked of which network: (Picture -> network_for's answer, Task, [t], what every restoring is given, what every note says). Raises InputError."""
    from data import TASKS
    from dial import read_map
    from kernels import extension_devices
    from machine import keep_freed_memory, pick_device, pick_dtype
    from model import PRESETS
    for flag, names in (("preset", PRESETS), ("dataset", TASKS)):
        if (name := getattr(args, flag)) and name not in names:
            raise InputError(f"no --{flag} {name}: there are {', '.join(names)}" + (f"; of --model also {', '.join(MODELS)}" if flag == "preset" else ""))
    keep_freed_memory()
    dtype = pick_dtype(args.dtype, pick_device(args.device))
    first = args.denoise if args.denoise is not None else float(args.model == "real")  # auto asks each picture
    if args.prior:
        (net, task), ts, solver = load_prior(args), [1.0], args.method
    else:
        net, stage, task = load(args.ckpt, args.device, args.preset) if args.ckpt else shipped(first, args.device)
        if task and args.dataset:
            raise InputError(f"this checkpoint says its task ({task.name}): --dataset is for files that do not")
        task = task or TASKS[args.dataset or "photos"]
        ts, solver = choose(stage, task, [1.0] if args.t_map else args.t, args.solver, args.steps)
    if args.consistent and task.sigma_n:
        raise InputError("--consistent would bring the noise back, which this checkpoint takes away")
    extension_devices()  # chosen here: what is wrong with the kernels is not a picture's fault
    how = dict(dtype=dtype, solver=solver, steps=args.steps or METHODS.get(solver, STEPS), rtol=args.rtol or 1e-3, atol=args.atol or 1e-3, tile_pad=args.tile_pad,
               t_map=read_map(args.t_map) if args.t_map else None, consistent=args.consistent)
    if args.ckpt or args.prior:
        network = lambda picture: (net, task, dict(weights=Path(args.ckpt or args.prior).name), "")
    else:
        network = functools.partial(network_for, model="clean" if args.consistent else args.model, denoise=args.denoise, device=args.device)
    note = dict(seed=args.seed, dtype=str(dtype).removeprefix("torch."))
    return network, task, ts, how, note


def generate(args):
    """Draw args.generate pictures from noise alone with an unconditional flow (Appendix F): 0000.png ... in args.output, and a grid beside that folder. Raises InputError."""
    import torch
    from data import TASKS, image_seeds
    from flow import integrate
    from kernels import noise_augment, to_uint8
    from machine import pick_device, pick_dtype
    net, stage, task = load(args.ckpt, args.device, args.preset)
    check_unconditional(net, stage, task, "--generate")
    task, device, out = task or TASKS[args.dataset or "photos"], pick_device(args.device), Path(args.output)
    if not args.overwrite and any((out / f"{i:04d}.png").exists() for i in range(args.generate)):
        raise InputError(f"{out} holds drawn pictures already: --overwrite replaces them")
    for folder in (out, out.absolute().parent):
        check_folder(folder)
    dtype, drawn, total = pick_dtype(args.dtype, device), [], 0
    for i in range(args.generate):
        nothing = torch.zeros(1, 3, task.image_size, task.image_size, device=device)
        x_in = noise_augment(nothing, 1.0, image_seeds(args.seed, torch.tensor([i])).to(device))
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x, nfe = integrate(net, x_in, args.solver or "rk45", args.steps or STEPS, args.rtol or 1e-3, args.atol or 1e-3)
        if not x.isfinite().all():
            raise InputError(f"the network gave a value that is not finite in picture {i}")
        pixels, total = to_uint8(x)[0].cpu().numpy(), total + nfe
        write_picture(out / f"{i:04d}.png", pixels)
        drawn += [pixels][: 64 - len(drawn)]
    side = math.ceil(len(drawn) ** 0.5)
    rows = [np.hstack(drawn[k : k + side]) for k in range(0, len(drawn), side)]
    rows[-1] = np.pad(rows[-1], ((0, 0), (0, rows[0].shape[1] - rows[-1].shape[1]), (0, 0)))
    grid = out.absolute().with_name(f"{out.absolute().name}_grid.png")  # not in the folder: an FID counts what is there
    write_picture(grid, np.vstack(rows))
    print(f"{args.generate} pictures drawn in {out}, {total / args.generate:.4g} evaluations each; {grid.name} beside it shows {len(drawn)}")
    return 0


def export_model(args):
    """Write the student as a file for other programs."""
    check_file(args.export)
    from export import export_onnx
    args.device = "cpu"
    network, task, (t,), how, _ = prepare(args)
    if how["solver"]:
        raise InputError("--export is for a one-step student, and this is a flow: distill.py makes one of it")
    net, *_ = network(None)
    print(export_onnx(args.export, net, task, t, args.seed))


def main(argv=None):
    args = parse_args(argv)
    if args.generate:
        return generate(args)
    if args.export:
        return export_model(args)
    found, skipped = find_inputs(args.inputs, args.recursive)

    # --- what to do; under torchrun the processes share one list, and leave together ---
    import torch
    import torch.distributed as dist
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    network, task, ts, how, note = prepare(args)
    if args.suffix is None:
        sides = "".join(f"_{letter}{side}" for letter, side in (("w", args.width), ("h", args.height)) if side)
        args.suffix = sides or f"_x{args.outscale or task.scale:g}"
    jobs, more, told = plan(found, ts, task.scale, args)
    skipped += more
    if world > 1:
        from machine import join_processes
        join_processes(timeout=timedelta(days=7))
        shared = [jobs]
        dist.broadcast_object_list(shared)
        jobs = shared[0]
    todo = [job for job in jobs if job.outs]
    if rank == 0:
        for line in [*told, *(f"skipped: {why}" for why in skipped)]:
            print(line, file=sys.stderr)

    # --- do it ---
    mine = [(number, len(todo), job) for number, job in enumerate(todo, 1)][rank::world]
    total, tally = sum(work(job, ts) for *_, job in mine), dict(done=0, skipped=0)
    progress = Progress(total, "megapixels", rank if world > 1 else None)
    begin = time.perf_counter()
    try:
        run(mine, network, ts, args, tally, note=note, progress=progress, **how)
    except KeyboardInterrupt:
        progress.close()
        print(f"stopped: {tally['done']} of {len(mine)} done, what is written is whole; the same command with --skip_existing goes on", file=sys.stderr)
        return 130
    progress.close()
    seconds = time.perf_counter() - begin

    # --- say what was done ---
    counts = torch.tensor([tally["done"], tally["skipped"], total], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(counts)
        dist.destroy_process_group()
    done, failed, total = counts.tolist()
    failed += len(skipped)
    if rank == 0:
        there = f", {len(jobs) - len(todo)} there already" if len(todo) < len(jobs) else ""
        print(f"{total:.1f} megapixels in {seconds:.1f} s, {total / max(seconds, 1e-9):.2f} a second: {done:.0f} done, {failed:.0f} skipped{there}",
              file=sys.stderr if failed else sys.stdout)
    return 1 if failed else 0


def program():
    """The command `oftsr`, and `python sample.py`."""
    try:
        return main()
    except (InputError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")
    except MemoryError:
        sys.exit(f"{Path(sys.argv[0]).name}: there is not enough memory for PyTorch and the network")
    except KeyboardInterrupt:
        print("stopped before any picture", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(program())
