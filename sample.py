"""Restore pictures: one step of a distilled student at any t (Eq. 13), or the flow itself, integrated.

    python sample.py --t 0.5 img.png                            # restored/img_x4.png, 4 times larger
    python sample.py --t 0,0.25,0.5,0.75,1 img.png              # the whole dial: ..._t0.png to ..._t1.png
    python sample.py -r photos/ -o larger/                      # a folder and those below it
    python sample.py --solver midpoint --steps 8 --ckpt out/photos_flow/ckpt.pt img.png
    python sample.py --solver rk45 --ckpt weights/photos_x4_flow.safetensors img.png

t = 0 is the most faithful picture, t = 1 the most realistic; a flow has this dial too, at the price of its steps.
From Python: `from sample import upscale; big = upscale(image, t=0.5)`.
"""
import argparse
import functools
import glob
import math
import os
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

# Before torch is loaded: OpenMP threads that sleep while they wait for each other cost a tenth on an idle machine, and
# are 3 to 10 times faster than spinning ones where other programs run too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import data
from console import InputError, in_range
from degradations import H_T, to_float
from kernels import dopri5_error, dopri5_stage_, euler_step_, extension_devices, noise_augment, rk2_stage_, to_uint8
from kernels.reference import DOPRI5_C
from model import PRESETS, keep_freed_memory, load_model, pick_device, pick_dtype
from pictures import check_fits, from_pil, is_picture, list_images, picture_format, read_image, rgb8, write_picture

WEIGHTS = Path(__file__).parent / "weights" / "photos_x4.safetensors"
RK2_NODES = {"midpoint": 1 / 2, "ralston": 2 / 3, "heun": 1.0}
SOLVERS = ("euler", *RK2_NODES, "rk45")
WHOLE = 1280 * 1280  # output pixels up to which a picture is restored in one piece (--tile auto)
STEPS = 8  # of a solver, unless told
TILE = 768  # side of the tiles above that


# --- the ODE dx/dt = v(x, x_lr, t) ---


def _times(x_in, t):
    return torch.full((x_in.shape[0],), float(t), device=x_in.device)


def one_step(model, x_in, t):
    """Eq. (13), x_1^t = x_0 + v_phi(x_0, x_lr, t): concat(x_0, x_lr) (B, 6, H, W), t in [0, 1] -> (B, 3, H, W)."""
    return x_in[:, :3] + model(x_in, _times(x_in, t)).float()


def mean_slope(model, x_in, v1, t, dt, solver):
    """The slope (x_s - x_t) / dt of one solver step from t to s = t + dt: v1, the velocity at t, for Euler; else second order.

    x_in = concat(x_t, x_lr) (B, 6, H, W), unchanged; v1 (B, 3, H, W); t, dt (B,); solver euler, midpoint, ralston, heun.
    """
    if solver == "euler":
        return v1
    alpha = RK2_NODES[solver]
    v2 = model(euler_step_(x_in.clone(), v1, alpha * dt), t + alpha * dt)
    return v1 + (v2 - v1) / (2 * alpha)


def integrate(model, x_in, solver="midpoint", steps=8, rtol=1e-3, atol=1e-3, t=1.0):
    """The flow from time 0 to t in [0, 1], in place in channels 0 to 2 of x_in = concat(x_0, x_lr) (B, 6, H, W).

    solver "euler", or second-order "midpoint", "ralston", "heun", in equal steps, `steps` of which would lead to 1;
    or the adaptive "rk45" with rtol and atol. Before 1 it is carried on by its mean velocity so far,
    x_1^t = x_0 + (x_t - x_0) / t, which is what a student that fulfils Eq. (7) says at t. Returns
    (x_1^t (B, 3, H, W), the number of function evaluations: calls of model).
    """
    if t < 1e-3:  # the mean velocity is the first one; dividing by t would magnify roundings
        return one_step(model, x_in, 0.0), 1
    nfe, x_0 = 0, x_in[:, :3].clone() if t < 1 else None

    def v(t):
        nonlocal nfe
        nfe += 1
        return model(x_in, _times(x_in, t))

    if solver == "rk45":
        _rk45(v, x_in, rtol, atol, t)
    else:
        steps = math.ceil(round(steps * t, 6))
        alpha, dt = RK2_NODES.get(solver), t / steps
        for i in range(steps):
            v1 = v(i * dt)
            if solver == "euler":
                euler_step_(x_in, v1, dt)
            else:
                euler_step_(x_in, v1, alpha * dt)
                rk2_stage_(x_in, v1, v((i + alpha) * dt), dt, alpha)
    x_t = x_in[:, :3]
    return (x_t if x_0 is None else x_0.lerp(x_t, 1 / t)), nfe


def _rk45(v, x_in, rtol, atol, end):
    """Dormand-Prince from 0 to end with scipy's step control (the batch is one system), so that it takes the steps of scipy's RK45."""
    def rms(x):
        return x.to(torch.float32 if x.device.type == "mps" else torch.float64).square().mean().sqrt().item()  # mps has no float64

    x_t, t = x_in[:, :3].clone(), 0.0
    k = [v(t)]
    # The first step (Hairer, Norsett & Wanner, II.4): a short Euler step measures how fast the field turns.
    scale = atol + rtol * x_t.abs()
    d0, d1 = rms(x_t / scale), rms(k[0] / scale)
    h = min(end, 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1)
    d2 = rms((_after_euler(v, x_in, k[0], h) - k[0]) / scale) / h
    h = min(100 * h, max(1e-6, h * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2, end)

    rejected = False
    while t < end:
        h = min(h, end - t)
        if h < 10 * np.spacing(t):
            raise ArithmeticError(f"rk45 cannot reach its tolerance at t = {t}: the velocity is not finite, or rtol and atol are too small")
        for c in DOPRI5_C[1:]:
            dopri5_stage_(x_in, x_t, k, h)
            k.append(v(t + c * h))
        dopri5_stage_(x_in, x_t, k, h)
        k.append(v(t + h))
        error = dopri5_error(x_in, x_t, k, h, atol, rtol).item()
        factor = 10 if error == 0 else 0.9 * error**-0.2
        if error < 1:
            t = end if h == end - t else t + h
            x_t.copy_(x_in[:, :3])
            k, h, rejected = [k[-1]], h * min(factor, 1 if rejected else 10), False
        else:  # NaN comes here too, and shrinks the step until the check above stops it
            k, h, rejected = [k[0]], h * (max(0.2, factor) if factor == factor else 0.2), True


def _after_euler(v, x_in, velocity, h):
    """The velocity one Euler step of length h further, (B, 3, H, W); x_in is left where that step ends."""
    euler_step_(x_in, velocity, h)
    return v(h)


# --- any size ---


def reflect_to(x, height, width):
    """Pad (B, C, H, W) at the right and the bottom by reflection, as often as it takes, to height x width."""
    for dim, size in ((2, height), (3, width)):
        n = x.shape[dim]
        i = torch.arange(size, device=x.device) % max(1, 2 * n - 2)
        x = x.index_select(dim, torch.where(i < n, i, 2 * n - 2 - i)) if size > n else x
    return x


def tile_spans(length, tile, overlap):
    """Starts of tiles of that size that cover `length` evenly, and each tile's weights: a partition of unity.

    Returns [(start, (tile,) float32)]: along the overlaps the weights are ramps, and over all tiles they sum to 1.
    """
    if length <= tile:
        return [(0, torch.ones(length))]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    ramp = torch.minimum(torch.arange(tile) + 1, tile - torch.arange(tile)).clamp(max=overlap).float()
    total = torch.zeros(length)
    for s in starts:
        total[s : s + tile] += ramp
    return [(s, ramp / total[s : s + tile]) for s in starts]


@torch.no_grad()
def restore(model, x_lr, sigma_p, seeds, t=1.0, solver=None, steps=8, rtol=1e-3, atol=1e-3, tile=0, tile_pad=32, dtype=torch.float32):
    """x_lr (B, 3, H, W) in [-1, 1], of any size and on any device, to (x_1 (B, 3, H, W) float32 there, evaluations made).

    t in [0, 1]: the dial. solver None: the one-step student, Eq. (13). Else `integrate`. The noise of x_0 is drawn for
    the whole canvas from seeds (B,) int64; each picture is then restored alone, in tiles of side `tile` that overlap by
    2 tile_pad and blend (0: in one piece), so that the batch does not change a pixel.
    """
    check_tile(tile, tile_pad)
    B, _, H, W = x_lr.shape
    device, m = next(model.parameters()).device, model.multiple
    canvas = [-(-max(size, 64) // m) * m for size in (H, W)]  # group norm wants something to average over
    tile = -(-tile // m) * m or max(canvas)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    out, nfe = torch.zeros(B, 3, H, W, device=x_lr.device), 0
    for b in range(B):
        x_in = noise_augment(reflect_to(x_lr[b : b + 1], *canvas), sigma_p, seeds[b : b + 1])
        for y, wy in tile_spans(canvas[0], tile, 2 * tile_pad):
            for x, wx in tile_spans(canvas[1], tile, 2 * tile_pad):
                piece = x_in[:, :, y : y + len(wy), x : x + len(wx)].to(device, copy=True)
                with autocast:
                    x_1, n = (one_step(model, piece, t), 1) if solver is None else integrate(model, piece, solver, steps, rtol, atol, t)
                nfe = max(nfe, n)
                x_1 = x_1[0].float().to(out.device) * (wy[:, None] * wx).to(out.device)
                target = out[b, :, y : y + len(wy), x : x + len(wx)]
                target += x_1[:, : target.shape[1], : target.shape[2]]
    return out, nfe


def auto_tile(height, width):
    return TILE if height * width > WHOLE else 0


def check_tile(tile, tile_pad):
    """Raises InputError where tiles of that size (0: none, "auto") would be all overlap."""
    side = TILE if tile == "auto" else tile
    if 0 < side <= 2 * tile_pad:
        raise InputError(f"--tile {side} must be larger than twice --tile_pad ({2 * tile_pad})")


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


# --- from Python ---


@functools.lru_cache(maxsize=2)
def _load(path, device, preset, mtime):  # mtime: a file that has changed is another file
    net, meta = load_model(path, device, preset)
    task = data.Task(**meta["task"]) if meta["task"] else None
    return net, meta["stage"], task


def load(ckpt=None, device="auto", preset=None):
    """The network of a checkpoint (default: the shipped student): (UNet, stage, Task or None). Kept between calls."""
    path = Path(ckpt or WEIGHTS)
    return _load(str(path), pick_device(device), preset, path.stat().st_mtime if path.is_file() else None)


def upscale(image, t=None, seed=0, ckpt=None, device="auto", dtype="auto", tile="auto", solver=None, steps=None, **how):
    """A picture, larger by the scale the network was trained for (4 for the shipped one).

    image: a PIL picture of any mode, or a uint8 array (H, W, 3); t in [0, 1] (default 0.5), 0 the most faithful, 1 the most realistic;
    solver and steps for a stage-1 flow (whose t is 1 by default); `how` goes to `restore` (rtol, atol, tile_pad). Returns the same
    kind as image. Raises InputError.
    """
    net, stage, task = load(ckpt, device)
    task = task or data.TASKS["photos"]
    if t is not None and not 0 <= t <= 1:
        raise InputError(f"t goes from 0 (fidelity) to 1 (realism), not {t}")
    ts, solver = choose(stage, task, None if t is None else [t], solver, steps)
    array = rgb8(from_pil(image).pixels) if isinstance(image, Image.Image) else np.array(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"an array should be uint8 (H, W, 3), not {array.dtype} {array.shape}")
    dtype = pick_dtype(dtype, pick_device(device))
    out = upscale_array(net, task, array, ts, seed, dtype, tile, solver=solver, steps=steps or STEPS, **how)[0][0]
    return Image.fromarray(out) if isinstance(image, Image.Image) else out


def upscale_array(net, task, array, ts, seed, dtype, tile="auto", **how):
    """uint8 (h, w, 3) restored at each t of ts: [(uint8 (h scale, w scale, 3), evaluations)], all from the same x_0."""
    y = to_float(torch.from_numpy(array)).permute(2, 0, 1)[None]
    x_lr = H_T(y, task.degradation, task.scale)
    tile = auto_tile(*x_lr.shape[2:]) if tile == "auto" else tile
    results = []
    for t in ts:
        x_1, nfe = restore(net, x_lr, task.sigma_p, torch.tensor([seed]), t, tile=tile, dtype=dtype, **how)
        if not x_1.isfinite().all():
            raise InputError(f"at t = {t:g} the network gave a value that is not finite")
        results.append((to_uint8(x_1)[0].numpy(), nfe))
    return results


# --- the command line ---


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("inputs", nargs="*", metavar="PICTURE", help="files, folders, patterns")
    p.add_argument("-i", "--input", nargs="+", default=[], help="the same")
    p.add_argument("-o", "--output", default="restored", help="folder to write to, or a file when there is one picture (default: restored/)")
    p.add_argument("-r", "--recursive", action="store_true", help="look into folders below folders, and mirror them")
    p.add_argument("--t", type=dial, help="0 fidelity to 1 realism, one number or a sweep as 0,0.5,1 (default: 0.5; of a stage-1 flow 1)")
    p.add_argument("--solver", choices=SOLVERS, help="integrate a stage-1 flow instead (default for a stage-1 checkpoint: midpoint)")
    p.add_argument("--steps", type=in_range(int, 1), help=f"steps of the solver (default: {STEPS})")
    p.add_argument("--rtol", type=in_range(float, 1e-6), help="relative tolerance of rk45 (default: 1e-3)")
    p.add_argument("--atol", type=in_range(float, 1e-6), help="absolute tolerance of rk45 (default: 1e-3)")
    p.add_argument("--ckpt", help="weights: a ckpt.pt, a .safetensors or a published file (default: the shipped student)")
    p.add_argument("--model", choices=PRESETS, help="network preset, for a published file, which does not say")
    p.add_argument("--dataset", choices=data.TASKS, help="task, for a file that does not say (default: photos)")
    p.add_argument("-s", "--outscale", type=in_range(float, 0.1, 64), help="final enlargement, by resampling (default: the network's)")
    p.add_argument("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="of the noise in x_0, the same for every picture")
    p.add_argument("--tile", type=tile_size, default="auto", help="side of the tiles in output pixels; 0: never tile (default: auto)")
    p.add_argument("--tile_pad", type=in_range(int, 1), default=32, help="half the width over which tiles blend")
    p.add_argument("--suffix", help="put after each name (default: the enlargement, as _x4)")
    p.add_argument("--ext", choices=("auto", "png", "jpg", "webp"), default="auto", help="format; auto: the input's, png if it is none of these")
    p.add_argument("--quality", type=in_range(int, 1, 100), default=95, help="of jpg and webp")
    p.add_argument("--strip", action="store_true", help="also write the input (repeated pixels) and all results side by side, ..._strip.png")
    p.add_argument("--skip_existing", action="store_true", help="leave alone what is already written")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    args = p.parse_args(argv)
    args.inputs += args.input
    if not args.inputs:
        p.error("name a picture, a folder or a pattern")
    return args


def dial(text):
    try:
        ts = [float(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or numbers with commas between") from None
    if not all(0 <= t <= 1 for t in ts):
        raise argparse.ArgumentTypeError(f"{text}: t goes from 0 (fidelity) to 1 (realism)")
    return ts


def tile_size(text):
    return "auto" if text == "auto" else in_range(int, 0)(text)


def find_inputs(inputs, recursive):
    """[(path, its place below the folder or pattern that named it)], in the order given. Raises InputError."""
    found = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = list_images(path) if recursive else [p for p in sorted(path.iterdir()) if is_picture(p)]
            if not files:
                raise InputError(f"no pictures in {path} itself (-r looks into its folders too)")
            found += [(p, p.relative_to(path)) for p in files]
        elif path.is_file():
            found.append((path, Path(path.name)))
        elif matches := sorted(m for m in glob.glob(name, recursive=True) if Path(m).is_file()):
            found += [(Path(m), Path(Path(m).name)) for m in matches]
        else:
            raise InputError(f"no file, folder or pattern {name}")
    return found


def plan_outputs(pictures, args, ts):
    """For each picture the paths to write: one for each t, then that of the strip, if there is to be one.

    Raises InputError where two of them, or one and an input, would meet.
    """
    to_file = picture_format(args.output) is not None and not Path(args.output).is_dir()
    if to_file and len(pictures) > 1:
        raise InputError(f"{len(pictures)} pictures do not fit in one file: -o {args.output} should name a folder")
    if to_file and args.ext != "auto":
        raise InputError(f"-o {args.output} names the format already: it goes without --ext")
    plan, taken = [], {p.resolve(): p for p, _ in pictures}
    for path, place in pictures:
        ending = path.suffix.lower() if args.ext == "auto" else f".{args.ext}"
        ending = ending if ending in (".png", ".jpg", ".jpeg", ".webp") else ".png"
        base = Path(args.output) if to_file else Path(args.output) / place.with_name(place.stem + args.suffix + ending)
        outs = [base.with_name(f"{base.stem}_t{t:g}{base.suffix}") for t in ts] if len(ts) > 1 else [base]
        outs += [base.with_name(f"{base.stem}_strip.png")] * args.strip
        for out in outs:
            if (other := taken.setdefault(out.resolve(), path)) is not path or out.resolve() == path.resolve():
                raise InputError(f"{path} and {other} would meet at {out}: choose another -o, --suffix or --ext")
        plan.append(outs)
    return plan


def save(path, array, args, note):
    """Write one result, and in it `note`."""
    write_picture(path, array, quality=args.quality, note=note)


def main(argv=None):
    args = parse_args(argv)
    keep_freed_memory()
    device = pick_device(args.device)
    net, stage, task = load(args.ckpt, args.device, args.model)
    if task and args.dataset:
        raise InputError(f"this checkpoint says its task ({task.name}): --dataset is for files that do not")
    task = task or data.TASKS[args.dataset or "photos"]
    ts, solver = choose(stage, task, args.t, args.solver, args.steps)
    check_tile(args.tile, args.tile_pad)
    if solver != "rk45" and (args.rtol or args.atol):
        raise InputError("--rtol and --atol are for --solver rk45")
    if args.suffix is None:
        args.suffix = f"_x{args.outscale or task.scale:g}"
    if Path(args.suffix).name != args.suffix:
        raise InputError(f"--suffix {args.suffix} goes into a file's name, and names no folder: that is -o")
    dtype = pick_dtype(args.dtype, device)
    how = dict(tile=args.tile, tile_pad=args.tile_pad, solver=solver, steps=args.steps or STEPS, rtol=args.rtol or 1e-3, atol=args.atol or 1e-3)
    note = dict(seed=args.seed, weights=Path(args.ckpt or WEIGHTS).name, dtype=str(dtype).removeprefix("torch."), tile=args.tile)
    extension_devices()  # chosen here: what is wrong with the kernels is not a picture's fault

    # --- under torchrun the processes share one list, and leave together ---
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    pictures = find_inputs(args.inputs, args.recursive)
    plan = list(zip(pictures, plan_outputs(pictures, args, ts), strict=True))
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        share = [plan]
        dist.broadcast_object_list(share)
        plan = share[0]

    done = skipped = 0
    for (path, _), outs in plan[rank::world]:
        todo = [(t, out) for t, out in zip(ts, outs, strict=False) if not (args.skip_existing and out.exists())]
        try:
            start = time.time()
            array = read_image(path)
            size = [max(1, round(side * (args.outscale or task.scale))) for side in array.shape[:2]]
            for out in outs:
                check_fits(out, size[0], size[1] * (len(ts) + 1 if args.strip and out is outs[-1] else 1))
            results = upscale_array(net, task, array, [t for t, _ in todo], args.seed, dtype, **how)
            seconds = (time.time() - start) / max(1, len(todo))
            bigs = [np.asarray(Image.fromarray(big).resize(size[::-1], Image.LANCZOS)) if args.outscale else big for big, _ in results]
            if args.strip and len(todo) == len(ts):
                write_picture(outs[-1], np.hstack([np.asarray(Image.fromarray(array).resize(size[::-1], Image.NEAREST)), *bigs]))
            for (t, out), (_, nfe), big in zip(todo, results, bigs, strict=True):
                save(out, big, args, {**note, "t": t, **(dict(solver=solver, nfe=nfe) if solver else {})})
                print(f"{path} {array.shape[1]}x{array.shape[0]} -> {out} {big.shape[1]}x{big.shape[0]}, "
                      f"t {t:g}, {f'{solver}, {nfe} evaluations, ' if solver else ''}{seconds:.1f} s", flush=True)
            done += 1
        except (InputError, OSError, ArithmeticError, MemoryError, RuntimeError) as e:  # rk45 that fails; a picture too large
            if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in str(e):
                raise  # on a CPU PyTorch's being out of memory has no class of its own
            skipped += 1
            print(f"skipped: {'' if isinstance(e, InputError) else f'{path}: '}{(str(e) or 'out of memory').splitlines()[0]}", file=sys.stderr)
    if world > 1:
        counts = torch.tensor([done, skipped])
        dist.all_reduce(counts)
        done, skipped = counts.tolist()
        dist.destroy_process_group()
    if rank == 0 and (done + skipped > 1 or skipped):
        print(f"{done} done, {skipped} skipped", file=sys.stderr if skipped else sys.stdout)
    return 1 if skipped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, OSError) as e:
        sys.exit(f"sample.py: {e}")
