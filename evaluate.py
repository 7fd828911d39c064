"""Measure restored pictures against the true ones: PSNR, SSIM, LPIPS, their trade-off, and its cost.

    python evaluate.py                                            # the shipped weights on data/photos, else assets/
    python evaluate.py --data_dir DIR --pictures 8 --seeds 1      # a quick look: 8 photographs of yours, one seed
    python evaluate.py --ckpt out/photos_distill/ckpt.pt out/photos_flow/ckpt.pt --data_dir DIR --json scores.json --plot tradeoff.png
    python evaluate.py --ckpt out/photos_flow/ckpt.pt --solver midpoint,rk45 --steps 1,2,4 --data_dir DIR
    python evaluate.py --t 0.2,0.6,1 --solver midpoint --steps 5  # a student beside what it was taught: its teacher's path up to t
    python evaluate.py --pairs out/eval/bicubic/seed0 out/eval/hr # any two folders of pictures, paired by stem
    torchrun --nproc_per_node 2 -- evaluate.py --data_dir DIR     # the processes share the pictures

A student is swept over t, a flow over its steps (and over t too, where --t is given), beside a bicubic row. What is
measured is what a user gets: every result is rounded to 8 bits, saved as a PNG under --out_dir, and read back by the
same code for every method.
"""
import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import data
from console import InputError, atomic_write, in_range
from degradations import H_T, H, degrade, to_float
from folders import note, trained_on
from kernels import to_uint8
from metrics import METRICS, check_size, load_lpips, measure, pick_metrics, psnr_rgb
from model import UNet, count_macs, keep_freed_memory, load_model, pick_device, pick_dtype
from pictures import list_images, read_image, write_picture
from sample import SOLVERS, dial, tile_size
from tiles import check_tile, pick_tile, restore

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = (WEIGHTS / "photos_x4.safetensors", WEIGHTS / "photos_x4_flow.safetensors")


def summarise(records, seeds, count):
    """The numbers of one row: means over pictures, and over seeds; NAME_std is the deviation over seeds of the pictures' mean.

    records: a dict of metrics, "seed", "nfe", "seconds" for each picture under each seed. The deviation is that
    of a sample (n - 1), None with one seed or where a mean is infinite (a picture restored without any error).
    """
    if sorted(r["seed"] for r in records) != sorted(count * list(seeds)):
        raise RuntimeError(f"{len(records)} results where there should be {count} of each of the seeds {list(seeds)}")
    row = dict(pictures=count, seeds=list(seeds), nfe=statistics.fmean(r["nfe"] for r in records))
    for name in (name for name in METRICS if name in records[0]):
        means = [statistics.fmean(r[name] for r in records if r["seed"] == s) for s in seeds]
        finite = len(means) > 1 and all(map(math.isfinite, means))
        row.update({name: statistics.fmean(means), f"{name}_std": statistics.stdev(means) if finite else None, f"{name}_by_seed": means})
    seconds = [r["seconds"] for r in records if r["seconds"] is not None]
    return {**row, "seconds": statistics.median(seconds) if seconds else None}


@torch.no_grad()
def validate(predict, x_1, task, lpips, device):
    """A quick look during training: PSNR and LPIPS of what predict makes of x_1 (N, 3, S, S) uint8, and a picture of it.

    predict: x_lr (1, 3, S, S) and seeds (1,) -> {name: (1, 3, S, S)}. Returns the means, {"psnr_NAME",
    "lpips_NAME"}, with x_lr's own under "lr", and x_lr, the results and x_1 of the first four side by side, uint8 (H, W, 3).
    """
    scores, rows = {}, []
    for i, picture in enumerate(x_1):
        truth, seeds = to_float(picture[None]).to(device), torch.full((1,), i, device=device)
        x_lr = degrade(truth, task, seeds)
        results = {"lr": x_lr, **predict(x_lr, seeds)}
        shown = {name: to_uint8(x).permute(0, 3, 1, 2) for name, x in results.items()}
        for name, x in shown.items():
            scores.setdefault(f"psnr_{name}", []).append(psnr_rgb(x.cpu(), picture[None]).item())
            if lpips and min(picture.shape[1:]) >= 32:  # AlexNet's pooling leaves nothing of less
                scores.setdefault(f"lpips_{name}", []).append(lpips(to_float(x), truth).item())
        if i < 4:
            rows.append(torch.cat([x[0].cpu() for x in shown.values()] + [picture], dim=2))
    return {k: statistics.fmean(v) for k, v in scores.items()}, torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


# --- pictures and pairs ---


def by_stem(paths, folder):
    """{path below folder without its ending: path}. Raises InputError where two pictures share one."""
    found = {}
    for p in paths:
        stem = p.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise InputError(f"{found[stem]} and {p} differ only in their ending: which is meant?")
        found[stem] = p
    return found


def find_pairs(restored, truth):
    """The pictures of two folders, paired by stem: [(stem, path, path)]. Raises InputError that names one without a partner."""
    a, b = (by_stem(list_images(folder), folder) for folder in (restored, truth))
    for here, there, folder in ((a, b, truth), (b, a, restored)):
        alone = [stem for stem in here if stem not in there]
        if alone:
            raise InputError(f"{here[alone[0]]} has no partner {alone[0]}.* in {folder} ({len(alone)} of {len(here)} have none)")
    return [(stem, a[stem], b[stem]) for stem in a]


def find_truth(task, data_dir, count, networks, trained_too):
    """The true pictures: ({stem: path}, what they are in words).

    A folder's validation pictures, or, where none are marked, all of it; less those that one of the networks was trained
    on, unless trained_too; of these `count`, spread evenly, or all (0). Raises InputError if none is left.
    """
    split = data.find_split(task, data_dir)
    paths = [split.folder / f for f in (split.val if split.marked else sorted(split.train + split.val))]
    what = f"{'validation pictures' if split.marked else 'pictures, none marked for validation,'} of {split.folder}"
    seen, alike = (set().union(*lists) for lists in zip(([], []), *(trained_on(paths, n.memory) for n in networks)))
    if seen and trained_too:
        what += f", {len(seen)} of them trained on,"
    elif seen:
        paths = [p for p in paths if p not in seen]
        what += f" less {len(seen)} trained on"
        if not paths:
            raise InputError(f"all {len(seen)} pictures of {split.folder} were trained on by {' or '.join(n.name for n in networks)}: "
                             "name others, or measure them all the same with --trained_too")
    if alike := alike & set(paths):
        note(f"{len(alike)} pictures, as {min(alike)}, have the names of pictures that were trained on but are other files: if they show the same, "
             "what follows is no measure of pictures never seen")
    chosen = data.spread(paths, count or len(paths))
    return by_stem(chosen, split.folder), f"{len(chosen)} {what}"


def load_truth(path, task):
    """A true picture, (H, W, 3) uint8: the task's centre crop, or the whole picture less what exceeds a multiple of the scale. Raises InputError if it is too small."""
    image = read_image(path)
    if task.crop == "center":
        data.check_side(path, *image.shape[:2], task)
        image = np.asarray(data.center_crop(Image.fromarray(image), task.image_size))
    height, width = (n - n % task.scale for n in image.shape[:2])
    check_size(path, height, width, task.scale)
    return np.ascontiguousarray(image[:height, :width])


def bicubic(x_lr, task):
    """The row that betrays a wrong protocol: bicubic enlargement, (B, 3, H, W). But for avgpool x_lr is that already."""
    if task.degradation != "avgpool":
        return x_lr
    return H_T(H(x_lr, task.degradation, task.scale), "bicubic", task.scale)  # H undoes the repetition exactly


# --- what to measure ---


@dataclass
class Network:
    name: str
    path: Path
    net: UNet
    stage: str  # "flow" or "distill"
    task: data.Task
    sha256: str  # of the file, its beginning
    step: int  # how long it was trained; None if the file does not say
    memory: dict  # of the lists it was trained on (folders.remember); None if the file does not say


@dataclass
class Row:
    name: str  # on the terminal, and of its folder under out_dir
    network: Network = None  # None: bicubic
    curve: str = None  # of the plot
    how: dict = None  # t, solver and steps: the arguments of tiles.restore


def load_network(path, device, args):
    """A checkpoint with the task it is measured on: its own with the cells that flags override, or the row of --dataset."""
    path = Path(path)
    net, meta = load_model(path, device, args.model)
    stage = meta["stage"] or args.stage
    if stage is None:
        raise InputError(f"{path} does not say what it is: add --stage flow or --stage distill")
    if args.stage and args.stage != stage:
        raise InputError(f"{path} says that its stage is {stage}: --stage is for files that do not")
    if args.dataset:
        task = data.resolve_task(args)
        if meta["task"] and args.sigma_p is None:
            task = replace(task, sigma_p=meta["task"]["sigma_p"])  # the network's own: the rest is the data's
    elif meta["task"]:
        task = data.resolve_task(args, data.Task(**meta["task"]))
    else:
        raise InputError(f"{path} does not say which task it was trained for: name it with --dataset")
    if not task.condition and task.sigma_p == 1:
        raise InputError(f"{path} draws pictures out of nothing: there are no true ones to measure them against")
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    name = f"{path.absolute().parent.name}_{path.stem}" if path.stem.startswith("ckpt") else path.stem
    return Network(name, path, net, stage, task, digest.hexdigest()[:12], meta.get("step"), meta.get("data"))


def check_networks(networks, args):
    """Raises InputError when the networks cannot share a table, or a flag would be without effect."""
    for i, n in enumerate(networks):
        for other in networks[:i]:
            if n.name == other.name:
                raise InputError(f"{other.path} and {n.path} would both be called {n.name}: rename one")
            for cell in ("degradation", "strength", "scale", "sigma_n", "crop", "image_size"):
                a, b = getattr(other.task, cell), getattr(n.task, cell)
                if a != b and not (cell == "image_size" and n.task.crop == "random"):
                    raise InputError(f"{other.path} and {n.path} have different tasks ({cell} {a} and {b}): measure them apart, or give --{cell}")
    stages = {n.stage for n in networks}
    if (args.solver or args.steps) and "flow" not in stages:
        raise InputError("--solver and --steps are for a stage-1 flow, and none is among the checkpoints")
    if args.steps and args.solver == ["rk45"]:
        raise InputError("rk45 chooses its steps itself, by --rtol and --atol: it goes without --steps")


def plan_rows(networks, args):
    """The rows of the table: bicubic, then each student over t and each flow over its solvers and steps, and over --t, if given.

    Unless --steps says otherwise, a sweep of a second-order solver begins with the one-step Euler result,
    which has no intermediate time and is what a student starts from.
    """
    rows = [Row("bicubic")]
    for n in networks:
        if n.stage == "distill":
            rows += [Row(f"{n.name}_t{t:g}", n, n.name, dict(t=t)) for t in dict.fromkeys(args.t or (0, 0.25, 0.5, 0.75, 1))]
            continue
        for solver in dict.fromkeys(args.solver or ("midpoint",)):
            hows = [dict(solver=solver, steps=k) for k in dict.fromkeys(args.steps or (1, 2, 4, 8))]
            if solver == "rk45":
                hows = [dict(solver=solver, rtol=args.rtol, atol=args.atol)]
            elif not (args.steps or args.t or "euler" in (args.solver or ())):
                hows.insert(0, dict(solver="euler", steps=1))
            for how in hows:
                name = f"{how['solver']}{how.get('steps', '')}"
                if args.t:
                    rows += [Row(f"{n.name}_{name}_t{t:g}", n, f"{n.name}, {name}", dict(how, t=t)) for t in dict.fromkeys(args.t)]
                else:
                    rows.append(Row(f"{n.name}_{name}", n, f"{n.name}, {solver}", how))
    return rows


@torch.no_grad()
def run_row(row, truth, task, seeds, out_dir, metrics, dtype, tile, tile_pad):
    """Restore, save, read back and measure each picture of truth {stem: path of its PNG} under each seed: a list of records.

    The noise of a picture follows from its file's name and the seed: it does not depend on which others are there.
    "seconds" is the time of `restore` alone: x_0 and the network, without reading, degrading, writing or measuring.
    """
    records = []
    for seed in seeds:
        for stem, path in truth.items():
            x_1 = to_float(torch.from_numpy(read_image(path)).permute(2, 0, 1)[None])
            number = int.from_bytes(hashlib.sha256(os.fsencode(path.stem)).digest()[:4], "little")
            stream = data.image_seeds(seed, torch.tensor([number]))
            x_lr = degrade(x_1, task, stream)
            if row.network is None:
                x, nfe, seconds = bicubic(x_lr, task), 0, None
            else:
                start = time.perf_counter()
                x, nfe = restore(row.network.net, x_lr, row.network.task.sigma_p, stream, dtype=dtype, tile_pad=tile_pad,
                                 tile=pick_tile(tile, row.network.net, *x_lr.shape[2:], dtype, tile_pad), **row.how)
                seconds = time.perf_counter() - start  # x is back on the CPU: the device has finished
            if not x.isfinite().all():
                raise InputError(f"{row.name} gave a value that is not finite for {stem} with seed {seed}")
            png = out_dir / row.name / f"seed{seed}" / f"{stem}.png"
            write_picture(png, to_uint8(x)[0].numpy())
            records.append(dict(seed=seed, nfe=nfe, seconds=seconds, **measure(png, path, task.scale, metrics)))
    if len(records) > 1:
        records[0]["seconds"] = None  # it warmed the machine up
    return records


# --- what to say ---


def table_line(row, width, names):
    """One aligned line of the table: mean and spread of each metric; without a row, the heading."""
    if row is None:
        return f"{'':{width}} {'NFE':>5} " + " ".join(f"{name:>15}" for name in names) + f" {'s/picture':>10}"
    cells = []
    for name in names:
        mean, std, digits = row[name], row[f"{name}_std"], METRICS[name]
        cells.append(f"{mean:.{digits}f}" + (" " * (digits + 4) if std is None else f" ±{std:.{digits}f}"))
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.3f}"
    nfe = "-" if row["nfe"] is None else f"{row['nfe']:.4g}"
    return f"{row['name']:{width}} {nfe:>5} " + " ".join(f"{c:>15}" for c in cells) + f" {seconds:>10}"


def write_json(path, protocol, rows):
    """The table as strict JSON: what is infinite becomes the text "inf"."""
    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [plain(v) for v in x]
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x

    text = json.dumps(plain(dict(protocol=protocol, rows=rows)), indent=1, allow_nan=False)
    atomic_write(path, lambda tmp: tmp.write_text(text + "\n"))


def plot(path, rows):
    """PSNR against LPIPS: a curve for each network, its points labelled with t or the evaluations counted, and bicubic."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="LPIPS (left is better)", ylabel="PSNR in dB (up is better)")
    curves = {}
    for row in rows:
        curves.setdefault(row["curve"] or row["name"], []).append(row)
    for name, points in curves.items():
        axes.plot([p["lpips"] for p in points], [p["psnr_rgb"] for p in points], "o-" if len(points) > 1 else "s", label=name)
        for p in points if points[0]["curve"] else ():
            label = f"t {p['t']:g}" if p["t"] is not None else f"{p['nfe']:.4g} NFE"
            axes.annotate(label, (p["lpips"], p["psnr_rgb"]), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    atomic_write(path, lambda tmp: figure.savefig(tmp, format=Path(path).suffix[1:].lower(), dpi=150))


# --- the command line ---


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    data.add_task_flags(p)
    p.set_defaults(dataset=None)  # so that a checkpoint's own task is known from one that was asked for
    whole, positive = in_range(int, 0), in_range(int, 1)
    p.add_argument("--ckpt", nargs="+", metavar="FILE", help="students and flows to measure (default: those in weights/)")
    p.add_argument("--data_dir", help="folder of true pictures: its val/, else those of the task's list, else all (default: data/DATASET)")
    p.add_argument("--pairs", nargs=2, metavar=("RESTORED", "TRUE"), help="measure a folder of pictures against another instead")
    p.add_argument("--pictures", type=whole, default=0, help="measure this many pictures, spread evenly; 0: all")
    p.add_argument("--trained_too", action="store_true", help="measure what a network was trained on, too, which is left out otherwise")
    p.add_argument("--seeds", type=positive, default=3, help="repeat with the seeds 0 to SEEDS - 1: x_0 is random")
    p.add_argument("--t", type=dial, help="where to set the dial (default: 0,0.25,0.5,0.75,1 for a student; 1, the whole path, for a flow)")
    p.add_argument("--solver", type=solvers, help=f"of a flow, one or several of {','.join(SOLVERS)} (default: midpoint)")
    p.add_argument("--steps", type=lambda text: [positive(x) for x in text.split(",")], help="of a flow's solver (default: one of euler, then 1,2,4,8)")
    p.add_argument("--rtol", type=in_range(float, 1e-6), default=1e-3, help="relative tolerance of rk45")
    p.add_argument("--atol", type=in_range(float, 1e-6), default=1e-3, help="absolute tolerance of rk45")
    p.add_argument("--stage", choices=("flow", "distill"), help="what a checkpoint is, for a published file, which does not say")
    p.add_argument("--out_dir", default="out/eval", help="where the measured PNGs go (default: out/eval)")
    p.add_argument("--json", metavar="FILE", help="write the table there too")
    p.add_argument("--plot", metavar="FILE", help="draw PSNR against LPIPS there: .png, .pdf or .svg")
    p.add_argument("--lpips_backbone", metavar="FILE", help="torchvision's AlexNet weights (default: OFTSR_LPIPS_ALEX, else torchvision's cache)")
    p.add_argument("--tile", type=tile_size, default="auto", help="side of the tiles in output pixels; 0: never tile (default: auto)")
    p.add_argument("--tile_pad", type=positive, default=32, help="half the width over which tiles blend")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    return p.parse_args(argv)


def solvers(text):
    names = text.split(",")
    if unknown := [name for name in names if name not in SOLVERS]:
        raise argparse.ArgumentTypeError(f"no solver {unknown[0]!r}: there are {', '.join(SOLVERS)}")
    return names


def check_flags(args):
    """What can be known to be wrong before any work. Raises InputError."""
    check_tile(args.tile, args.tile_pad)
    if args.pairs and (idle := [f for f in ("ckpt", "data_dir", "pictures", "t", "solver", "steps", "plot") if getattr(args, f)]):
        raise InputError(f"--pairs measures two folders as they are: it goes without --{idle[0]}")
    if args.plot and Path(args.plot).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise InputError(f"--plot {args.plot} should end in .png, .pdf or .svg")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    for file in filter(None, (args.json, args.plot)):
        if Path(file).is_dir():
            raise InputError(f"{file} is a folder: name a file to write")


def measure_pairs(args, device):
    """The table of one row for two folders."""
    restored, truth = args.pairs
    pairs, lpips = find_pairs(restored, truth), load_lpips(args.lpips_backbone, device)
    crop = data.TASKS[args.dataset or "photos"].scale if args.scale is None else args.scale
    metrics = pick_metrics(crop, lpips, device)
    records = [dict(seed=0, nfe=0, seconds=None, **measure(a, b, crop, metrics)) for _, a, b in pairs]
    row = dict(name=Path(restored).name, **{**summarise(records, [0], len(pairs)), "nfe": None, "seeds": None})
    protocol = dict(restored=str(restored), truth=str(truth), pictures=len(pairs), crop=crop, torch=torch.__version__)
    names = [name for name in METRICS if name in row]
    print(f"{len(pairs)} pairs: {restored} against {truth}; psnr_y and ssim_y without {crop} pixels at each border; torch {torch.__version__}")
    print(table_line(None, len(row["name"]), names) + "\n" + table_line(row, len(row["name"]), names))
    if args.json:
        write_json(args.json, protocol, [row])


def how_degraded(task):
    strength = "drawn" if task.strength < 0 else f"{task.strength:g}"
    return f"real, strength {strength}," if task.degradation == "real" else task.degradation


def describe(networks, rows, task, what, args, dtype, device):
    """The protocol: (dict, one line, a line for each network with its cost)."""
    parts = []
    for n in networks:
        how = " ".join(r.name.removeprefix(f"{n.name}_") for r in rows if r.network is n)
        how += f" (rk45: rtol {args.rtol:g}, atol {args.atol:g})" if "rk45" in how else ""
        parts.append(dict(name=n.name, file=str(n.path), sha256=n.sha256, stage=n.stage, step=n.step, sigma_p=n.task.sigma_p, how=how,
                          parameters=sum(p.numel() for p in n.net.parameters()), gmacs_256=count_macs(n.net, 256, 256) / 1e9))
    cut = f"centre {task.image_size}" if task.crop == "center" else f"whole, to multiples of {task.scale}"
    protocol = dict(pictures=what, cut=cut, H=how_degraded(task), scale=task.scale, sigma_n=task.sigma_n, seeds=list(range(args.seeds)), networks=parts,
                    dtype=str(dtype).removeprefix("torch."), tile=args.tile, device=str(device), torch=torch.__version__)
    line = (f"{what} ({cut}), H {how_degraded(task)} x{task.scale}, sigma_n {task.sigma_n:g}, seeds {','.join(map(str, range(args.seeds)))}; "
            + "".join(f"{p['name']} = {p['file']} sha256 {p['sha256']}, sigma_p {p['sigma_p']:g}, {p['how']}; " for p in parts)
            + f"{protocol['dtype']}, tile {args.tile}, {device}, torch {torch.__version__}")
    costs = [f"{p['name']}: {p['stage']}, step {'unknown' if p['step'] is None else p['step']}, {p['parameters']:,} parameters, "
             f"{p['gmacs_256']:.2f} GMACs an evaluation at 256x256" for p in parts]
    return protocol, "\n".join([line, *costs])


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    keep_freed_memory()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.pairs:
        return measure_pairs(args, device) if rank == 0 else None

    # --- what to measure, and on what: everything that can be wrong comes before any work ---
    ckpts = args.ckpt or [p for p in SHIPPED if p.is_file()]
    networks = [load_network(path, device, args) for path in ckpts]
    check_networks(networks, args)
    args.dataset = args.dataset or "photos"
    task = networks[0].task if networks else data.resolve_task(args)
    rows = plan_rows(networks, args)
    sources, what = find_truth(task, args.data_dir, args.pictures, networks, args.trained_too)
    out_dir = Path(args.out_dir)
    for path in sources.values():
        load_truth(path, task)
        if out_dir.resolve() in path.resolve().parents:
            raise InputError(f"{path} lies in --out_dir {out_dir}, where results go: choose another")
    lpips = load_lpips(args.lpips_backbone, device)
    if args.plot and not lpips:
        raise InputError("--plot draws PSNR against LPIPS, and there is no AlexNet for it")

    if not networks and rank == 0:
        print("no --ckpt, and no weights in weights/: bicubic alone is measured", file=sys.stderr)

    # --- measure ---
    metrics = pick_metrics(task.scale, lpips, device)
    names = list(metrics)
    width = max(len(row.name) for row in rows)
    protocol, heading = describe(networks, rows, task, what, args, dtype, device)
    say = functools.partial(print, flush=True) if rank == 0 else lambda text: None
    say(f"{heading}\n{table_line(None, width, names)}")
    if world > 1:
        dist.init_process_group("gloo")
    truth = {}
    for stem in sorted(sources)[rank::world]:
        truth[stem] = out_dir / "hr" / f"{stem}.png"
        write_picture(truth[stem], load_truth(sources[stem], task))
    results = []
    for row in rows:
        seeds = range(args.seeds) if row.network or task.sigma_n or task.degradation == "real" else [0]  # without noise, bicubic has no seed
        parts = [run_row(row, truth, task, seeds, out_dir, metrics, dtype, args.tile, args.tile_pad)]
        if world > 1:
            gathered = [None] * world
            dist.all_gather_object(gathered, parts[0])
            parts = gathered
        how = dict(t=None, solver=None, steps=None) | (row.how or {})
        results.append(dict(name=row.name, curve=row.curve, **how, **summarise(sum(parts, []), seeds, len(sources))))
        say(table_line(results[-1], width, names))

    # --- keep ---
    if rank == 0 and args.json:
        write_json(args.json, protocol, results)
    if rank == 0 and args.plot:
        plot(args.plot, results)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:  # OSError: a disk that is full, a folder that cannot be written
        sys.exit(f"evaluate.py: {e}")
