"""Measure restored pictures against the true ones: PSNR, SSIM, LPIPS and more, their trade-off, and its cost.

    python evaluate.py                                            # the shipped weights on data/photos, else assets/
    python evaluate.py --data_dir DIR --pictures 8 --seeds 1      # a quick look: 8 photographs of yours, one seed
    python evaluate.py --ckpt out/photos_distill/ckpt.pt out/photos_flow/ckpt.pt --data_dir DIR --json scores.json --plot tradeoff.png
    python evaluate.py --ckpt out/photos_flow/ckpt.pt --solver midpoint,rk45 --steps 1,2,4 --data_dir DIR
    python evaluate.py --t 0.2,0.6,1 --solver midpoint --steps 5  # a student beside what it was taught: its teacher's path up to t
    python evaluate.py --data_dir DIR --methods DDRM:20=results/ddrm SinSR:1=results/sinsr --plot methods.png --figure side.png
    python evaluate.py --data_dir DIR --metrics psnr_rgb,lpips,fid,dists,musiq
    python evaluate.py --data_dir DIR --tune_t psnr_rgb=26        # which t gives 26 dB on these pictures
    python evaluate.py --pairs out/eval/bicubic/seed0 out/eval/hr # any two folders of pictures, paired by stem
    python evaluate.py --pairs drawn/ DIR --metrics fid           # of Fréchet distances alone: any number in each
    python evaluate.py --data_dir HR --lr_dir LR --metrics psnr_rgb,lpips,niqe   # pairs that somebody took, as RealSR's
    python evaluate.py --dataset realsr --data_dir DIR --write_pairs PAIRS       # the pictures and their accidents as files, once for all
    python evaluate.py --table realsr --data_dir PAIRS/hr --lr_dir PAIRS/lr      # the paper's Table 4 of these pairs
    python evaluate.py --table realsr --no_truth DIR              # its Table 5: pictures as people have them
    torchrun --nproc_per_node 2 -- evaluate.py --data_dir DIR     # the processes share the pictures

A student is swept over t, a flow over its steps (and over t too, where --t is given), beside a bicubic row. What is
measured is what a user gets: the low-resolution picture has 8 bits (--float_lr: the paper's, in float), every result is
rounded to 8 bits, saved as a PNG under --out_dir, and read back by the same code for every method.
"""
import argparse
import functools
import importlib.util
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

import data
import figures
from checkpoints import file_sha256
from console import InputError, Parser, Progress, check_file, in_range
from degradations import H_T, H, observe, to_float
from folders import check_memory, note
from kernels import to_uint8
from machine import join_processes, keep_freed_memory, pick_device, pick_dtype
from metrics import ALONE, BACKBONES, FEW, FID_MODES, HIGHER, METRICS, USUAL, Metrics, measure, measure_sets, pick_metrics
from model import UNet, load_model
from niqe import check_blocks
from partners import HIGH, LOW, find_partners
from pairs import by_stem, check_pairs, clear, find_alone, find_pairs, find_truth, load_truth, stream_of, write_pairs
from pictures import list_images, read_image, write_picture
from report import TABLES, describe, paper_table, peak_memory, table_line, write_json
from sample import SOLVERS, tile_size
from tiles import check_tile, pick_tile, restore

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = (WEIGHTS / "photos_x4.safetensors", WEIGHTS / "photos_x4_flow.safetensors")
SHIPPED_REAL = (WEIGHTS / "photos_real_x4.safetensors", WEIGHTS / "photos_real_x4_flow.safetensors")  # for what was blurred, noisy and compressed


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
    network: Network = None  # None: bicubic, or somebody's results
    curve: str = None  # of the plot
    how: dict = None  # t, solver and steps: the arguments of tiles.restore
    results: dict = None  # somebody's: {stem of a true picture: path}
    nfe: int = None  # that they say it took


def measured_task(args, row=None):
    """The task as it is measured: a row with the cells that flags override, and low-resolution pictures of 8 bits unless told."""
    args = argparse.Namespace(**{**vars(args), "eight_bit": args.eight_bit is None or args.eight_bit})
    return data.resolve_task(args, row, training=False)


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
        task = measured_task(args)
        if meta["task"] and args.sigma_p is None:
            task = replace(task, sigma_p=data.saved_task(meta["task"], path).sigma_p)  # the network's own: the rest is the data's
    elif meta["task"]:
        task = measured_task(args, data.saved_task(meta["task"], path))
    else:
        raise InputError(f"{path} does not say which task it was trained for: name it with --dataset")
    if not task.condition and task.sigma_p == 1:
        raise InputError(f"{path} draws pictures out of nothing: there are no true ones to measure them against")
    check_memory(meta.get("data"), path)
    return Network("", path, net, stage, task, file_sha256(path), meta.get("step"), meta.get("data"))


def load_networks(files, device, args):
    """Checkpoints, each called by its file's name, after those of the folders above as far as it takes to tell them apart. Raises InputError if one comes twice."""
    networks, paths = [load_network(file, device, args) for file in files], [Path(file).absolute() for file in files]
    if twice := next((p for i, p in enumerate(paths) if p in paths[:i]), None):
        raise InputError(f"{twice} is named twice")
    for n, path in zip(networks, paths):
        depth = 1 if path.stem.startswith(("ckpt", "weights")) else 0  # what every run calls its files
        while depth < len(path.parts) - 1 and any(name_of(p, depth) == name_of(path, depth) for p in paths if p != path):
            depth += 1
        n.name = name_of(path, depth)
    return networks


def name_of(path, depth):
    return "_".join([*path.parts[:-1][len(path.parts) - 1 - depth:], path.stem])


def check_together(networks):
    """Raises InputError when networks cannot be measured on the same low-resolution pictures."""
    for i, n in enumerate(networks):
        for other in networks[:i]:
            for cell in ("degradation", "strength", "scale", "sigma_n", "crop", "image_size"):
                a, b = getattr(other.task, cell), getattr(n.task, cell)
                if a != b and not (cell == "image_size" and n.task.crop == "random"):
                    raise InputError(f"{other.path} and {n.path} have different tasks ({cell} {a} and {b}): measure them apart, or give --{cell}")


def check_networks(networks, args):
    """Raises InputError when the networks cannot share a table, or a flag would be without effect."""
    check_together(networks)
    stages = {n.stage for n in networks}
    if (args.solver or args.steps) and "flow" not in stages:
        raise InputError("--solver and --steps are for a stage-1 flow, and none is among the checkpoints")
    if args.steps and args.solver == ["rk45"]:
        raise InputError("rk45 chooses its steps itself, by --rtol and --atol: it goes without --steps")
    if args.tune_t and "distill" not in stages:
        raise InputError("--tune_t turns the dial of a student, and none is among the checkpoints")
    if beyond := [t for t in args.t or () if not 0 <= t <= 1]:
        if "flow" in stages:
            raise InputError(f"--t {beyond[0]:g}: a flow begins at t = 0 and ends at 1; beyond them only a student can be asked")
        note(f"t = {', '.join(f'{t:g}' for t in beyond)}: no network was trained there")


def plan_rows(networks, args):
    """The rows of the table: bicubic, then each student over t and each flow over its solvers and steps, and over --t, if given.

    Unless --steps says otherwise, a sweep of a second-order solver begins with the one-step Euler result,
    which has no intermediate time and is what a student starts from. With --tune_t a student's rows are found on the way.
    """
    rows = [Row("bicubic")]
    for n in networks:
        if n.stage == "distill":
            ts = () if args.tune_t else args.t or ((1, 0.5, 0) if args.table else (0, 0.25, 0.5, 0.75, 1))
            rows += [student_row(n, t) for t in dict.fromkeys(ts)]
            continue
        for solver in dict.fromkeys(args.solver or ("euler" if args.table else "midpoint",)):
            hows = [dict(solver=solver, steps=k) for k in dict.fromkeys(args.steps or ((15,) if args.table else (1, 2, 4, 8)))]
            if solver == "rk45":
                hows = [dict(solver=solver, rtol=args.rtol, atol=args.atol)]
            elif not (args.steps or args.t or args.table or "euler" in (args.solver or ())):
                hows.insert(0, dict(solver="euler", steps=1))
            for how in hows:
                name = f"{how['solver']}{how.get('steps', '')}"
                if args.t:
                    rows += [Row(f"{n.name}_{name}_t{t:g}", n, f"{n.name}, {name}", dict(how, t=t)) for t in dict.fromkeys(args.t)]
                else:
                    rows.append(Row(f"{n.name}_{name}", n, f"{n.name}, {solver}", how))
    return rows


def student_row(network, t):
    return Row(f"{network.name}_t{t:g}", network, network.name, dict(t=t))


def find_methods(methods, stems, complete, taken):
    """The rows of --methods, (name, evaluations or None, folder) each. complete: the folders should hold nothing else.

    Results are paired with the true pictures by their place below the folder, or by the name alone, which of a NAME_HR may
    be NAME_LR4, that of the picture restored. Raises InputError for what has no partner, and for a name that is in `taken` already.
    """
    rows = []
    for name, nfe, folder in methods:
        if name in taken or name in [row.name for row in rows]:
            raise InputError(f"two rows would be called {name}: give --methods another name")
        there = by_stem(list_images(folder), folder)
        lows = {LOW.sub("", stem): stem for stem in there if LOW.search(stem)}
        names = {stem: stem.rpartition("/")[2] for stem in stems}
        places = {stem: next((place for place in (stem, lows.get(HIGH.sub("", name))) if place in there), name) for stem, name in names.items()}
        if missing := [stem for stem, place in places.items() if place not in there]:
            raise InputError(f"{name} has no {missing[0]}.* in {folder} ({len(missing)} of {len(stems)} are missing)")
        if len(set(places.values())) < len(places):
            raise InputError(f"in {folder} one result would serve for two true pictures of the same name: lay it out as the true ones are")
        if complete and (extra := sorted(there.keys() - set(places.values()))):
            raise InputError(f"{there[extra[0]]} of {name} has no true picture ({len(extra)} of {len(there)} have none)")
        rows.append(Row(name, results={stem: there[place] for stem, place in places.items()}, nfe=nfe))
    return rows


# --- measuring ---


def bicubic(x_lr, task):
    """The row that betrays a wrong protocol: bicubic enlargement, (B, 3, H, W). But for avgpool x_lr is that already."""
    if task.degradation != "avgpool":
        return x_lr
    return H_T(H(x_lr, task.degradation, task.scale), "bicubic", task.scale)  # H undoes the repetition exactly


@dataclass
class Bench:
    """What all rows of a table share."""
    truth: dict  # {stem: path of the true picture's PNG, None where there is no truth}
    task: data.Task
    out_dir: Path
    metrics: Metrics
    dtype: torch.dtype
    rk45_dtype: torch.dtype
    tile: object
    tile_pad: int
    rank: int = 0
    world: int = 1
    low: dict = None  # {stem: path} of low-resolution files, with --lr_dir; else H makes them of the true pictures
    features: dict = field(default_factory=dict)  # of the true pictures, for Fréchet distances

    def png(self, row, seed, stem):
        return row.results[stem] if row.results else self.out_dir / row.name / f"seed{seed}" / f"{stem}.png"

    def observed(self, stem, stream):
        """The low-resolution picture (1, 3, h, w) in [-1, 1] behind which the true one lies."""
        return read_float(self.low[stem]) if self.low else observe(read_float(self.truth[stem]), self.task, stream)

    def seeds(self, row, count):
        """bicubic without noise has no seed, nor have somebody's results."""
        drawn = row.network or (not row.results and not self.low and (self.task.sigma_n or self.task.degradation == "real"))
        return range(count) if drawn else [0]


def read_float(path):
    """A picture file as (1, 3, H, W) in [-1, 1]."""
    return to_float(torch.from_numpy(read_image(path)).permute(2, 0, 1)[None])


@torch.no_grad()
def run_row(row, bench, seeds, progress):
    """Restore, save, read back and measure this process's share of the true pictures under each seed: a list of records.

    The noise of a picture follows from its file's name and the seed: it does not depend on which others are there.
    "seconds" is the time of `restore` alone: x_0 and the network, without reading, degrading, writing or measuring.
    """
    records = []
    for seed in seeds:
        progress.start(f"{row.name}, seed {seed}")
        for stem in sorted(bench.truth)[bench.rank::bench.world]:
            path, png = bench.truth[stem], bench.png(row, seed, stem)
            stream = stream_of(stem, seed)
            y = bench.observed(stem, stream)
            nfe, seconds = (row.nfe, None) if row.results else restore_picture(row, bench, y, stream, png)
            records.append(dict(stem=stem, seed=seed, nfe=nfe, seconds=seconds, **measure(png, path, math.ceil(bench.task.scale), bench.metrics, y, bench.task)))
            progress.add(1)
    if len(records) > 1:
        records[0]["seconds"] = None  # it warmed the machine up
    return records


def restore_picture(row, bench, y, stream, png):
    """Restore one low-resolution picture y (1, 3, h, w) as the row says, into a PNG: (evaluations, seconds or None)."""
    x_lr = H_T(y, bench.task.degradation, bench.task.scale)
    if row.network is None:
        x, nfe, seconds = bicubic(x_lr, bench.task), 0, None
    else:
        dtype = bench.rk45_dtype if row.how.get("solver") == "rk45" else bench.dtype
        start = time.perf_counter()
        x, nfe = restore(row.network.net, x_lr, row.network.task.sigma_p, stream, dtype=dtype, tile_pad=bench.tile_pad,
                         tile=pick_tile(bench.tile, row.network.net, *x_lr.shape[2:], dtype, bench.tile_pad), **row.how)
        seconds = time.perf_counter() - start  # x is back on the CPU: the device has finished
    if not x.isfinite().all():
        raise InputError(f"{row.name} gave a value that is not finite for {png.name}")
    write_picture(png, to_uint8(x)[0].numpy())
    return nfe, seconds


def measure_row(row, bench, count, progress):
    """A line of the table, from all processes and under `count` seeds: what `summarise` makes of it, and "t", "solver", "steps"."""
    seeds = bench.seeds(row, count)
    parts = [run_row(row, bench, seeds, progress)]
    if bench.world > 1:
        gathered = [None] * bench.world
        dist.all_gather_object(gathered, parts[0])
        parts = gathered
    sets = []
    if bench.metrics.sets and bench.rank == 0:  # the files of all processes are there now
        stems = sorted(bench.truth)
        sets = [measure_sets([bench.png(row, s, stem) for stem in stems], [bench.truth[stem] for stem in stems], bench.metrics, bench.features) for s in seeds]
    how = dict(t=None, solver=None, steps=None) | (row.how or {})
    return dict(name=row.name, curve=row.curve, **how, **summarise(sum(parts, []), seeds, len(bench.truth), sets))


def summarise(records, seeds, count, sets=()):
    """The numbers of one row: means over pictures, and over seeds; NAME_std is the deviation over seeds of the pictures' mean.

    records: a dict of metrics, "seed", "nfe", "seconds" for each picture under each seed; sets: one of Fréchet distances for
    each seed. The deviation is that of a sample (n - 1), None with one seed or where a mean is infinite (a picture restored
    without any error).
    """
    if sorted(r["seed"] for r in records) != sorted(count * list(seeds)):
        raise RuntimeError(f"{len(records)} results where there should be {count} of each of the seeds {list(seeds)}")
    known = all(r["nfe"] is not None for r in records)
    row = dict(pictures=count, seeds=list(seeds), nfe=statistics.fmean(r["nfe"] for r in records) if known else None)
    by_seed = {name: [statistics.fmean(r[name] for r in records if r["seed"] == s) for s in seeds] for name in METRICS if name in records[0]}
    by_seed |= {name: [one[name] for one in sets] for name in METRICS if sets and name in sets[0]}
    for name, means in by_seed.items():
        finite = len(means) > 1 and all(map(math.isfinite, means))
        row.update({name: statistics.fmean(means), f"{name}_std": statistics.stdev(means) if finite else None, f"{name}_by_seed": means})
    seconds = [r["seconds"] for r in records if r["seconds"] is not None]
    return {**row, "seconds": statistics.median(seconds) if seconds else None}


def choose_t(score, goal=None, lower=True, rounds=6):
    """The t in [0, 1] that serves best (Appendix J): t, among those that score(t) -> number was asked for.

    With a goal, where the score comes closest to it: it rises or falls with t, and the interval is halved `rounds` times.
    Without one, where the score is lowest (or highest): of five t, then of the neighbours of the best at ever smaller distances.
    """
    known = {t: score(t) for t in ((0.0, 1.0) if goal is not None else (0.0, 0.25, 0.5, 0.75, 1.0))}
    low, high, width = 0.0, 1.0, 0.125
    for _ in range(rounds):
        if goal is None:
            best = (min if lower else max)(known, key=known.get)
            new = [t for t in (best - width, best + width) if 0 <= t <= 1 and t not in known]
            width /= 2
            if width < 1 / 64:
                break
        else:
            if (known[0.0] - goal) * (known[1.0] - goal) > 0:  # it lies beyond both ends
                break
            middle = (low + high) / 2
            known[middle] = score(middle)
            low, high = (middle, high) if (known[middle] > goal) == (known[0.0] > goal) else (low, middle)
            new = []
        known.update({t: score(t) for t in new})
    if goal is not None:
        return min(known, key=lambda t: abs(known[t] - goal))
    return (min if lower else max)(known, key=known.get)


def tune(network, bench, args, progress, say):
    """--tune_t METRIC[=GOAL] for one student: every line that was measured on the way, and what came out in words."""
    name, goal = args.tune_t
    lines = {}

    def score(t):
        lines[t] = measure_row(student_row(network, t), bench, args.seeds, progress)
        say(lines[t])
        return lines[t][name]
    t = choose_t(score, goal, lower=name not in HIGHER)
    digits = METRICS[name]
    asked = f"nearest to {goal:g}" if goal is not None else "best"
    return list(lines.values()), f"{network.name}: --t {t:g} is {asked}: {name} {lines[t][name]:.{digits}f}"


# --- the command line ---


def parse_args(argv):
    p = Parser(description=__doc__)
    data.add_task_flags(p)
    p.set_defaults(dataset=None)  # so that a checkpoint's own task is known from one that was asked for
    whole, positive = in_range(int, 0), in_range(int, 1)
    g = p.add_argument_group("what is measured")
    g.add_argument("--ckpt", nargs="+", metavar="FILE", help="students and flows to measure (default: those in weights/, with --table those for damaged pictures)")
    g.add_argument("--stage", choices=("flow", "distill"), help="what a checkpoint is, for a published file, which does not say")
    g.add_argument("--methods", nargs="+", type=method, default=[], metavar="NAME[:NFE]=DIR", help="folders of other methods' results for the same pictures, a row each")
    g.add_argument("--pairs", nargs=2, metavar=("RESTORED", "TRUE"), help="measure a folder of pictures against another instead")
    g.add_argument("--metrics", type=chosen_metrics, help=f"of {', '.join(METRICS)} (default: {','.join(USUAL)})")
    g.add_argument("--table", choices=TABLES, help="measure what the paper's Tables 4 and 5 report, with 15 Euler steps of a flow and t = 1, 0.5, 0, and lay it out as they do")
    g = p.add_argument_group("on which pictures")
    g.add_argument("--lr_dir", help="folder of low-resolution pictures, each of a true picture's name: measure on these pairs instead of on what H makes")
    g.add_argument("--no_truth", metavar="DIR", help="folder of pictures to enlarge of which there are no true ones: measured by metrics that need none")
    g.add_argument("--write_pairs", metavar="DIR", help="write the true pictures and what H makes of them under seed 0 into DIR/hr and DIR/lr, and measure nothing; what is there is compared")
    g.add_argument("--data_dir", help="folder of true pictures: its validation pictures, else all (default: data/DATASET)")
    g.add_argument("--pictures", type=whole, default=0, help="measure this many pictures, spread evenly; 0: all")
    g.add_argument("--trained_too", action="store_true", help="measure what a network was trained on, too, which is left out otherwise")
    g.add_argument("--float_lr", dest="eight_bit", action="store_false", help="the paper's low-resolution pictures, in float: no --eight_bit")
    g.add_argument("--seeds", type=positive, default=3, help="repeat with the seeds 0 to SEEDS - 1: x_0 is random")
    g = p.add_argument_group("how they are restored")
    g.add_argument("--t", type=dial, help="where to set the dial (default: 0,0.25,0.5,0.75,1 for a student; 1, the whole path, for a flow)")
    g.add_argument("--tune_t", type=tuning, metavar="METRIC[=GOAL]", help="find a student's t: where the metric is best, or comes closest to the goal")
    g.add_argument("--solver", type=solvers, help=f"of a flow, one or several of {','.join(SOLVERS)} (default: midpoint)")
    g.add_argument("--steps", type=lambda text: [positive(x) for x in text.split(",")], help="of a flow's solver (default: one of euler, then 1,2,4,8)")
    g.add_argument("--rtol", type=in_range(float, 1e-6), default=1e-3, help="relative tolerance of rk45")
    g.add_argument("--atol", type=in_range(float, 1e-6), default=1e-3, help="absolute tolerance of rk45")
    g = p.add_argument_group("what is written")
    g.add_argument("--out_dir", default="out/eval", help="where the measured PNGs go; an earlier run's are taken away (default: out/eval)")
    g.add_argument("--json", metavar="FILE", help="write the table there too")
    g.add_argument("--plot", metavar="FILE", help="draw PSNR against LPIPS there, a bubble's size for the evaluations: .png, .pdf or .svg")
    g.add_argument("--figure", metavar="FILE", help="draw the rows side by side there, with numbers and a detail of each: .png")
    g.add_argument("--figure_pictures", metavar="STEM,...", type=lambda text: text.split(","), help="which pictures (default: 4, spread evenly)")
    g = p.add_argument_group("machine")
    for kind, flag in (("lpips", "--lpips_backbone"), ("vgg16", "--vgg_backbone"), ("inception", "--inception")):
        b = BACKBONES[kind]
        g.add_argument(flag, metavar="FILE", help=f"weights of {b.what}, {b.pattern} (default: {b.variable}, else torch's cache)")
    g.add_argument("--tile", type=tile_size, default="auto", help="side of the tiles in output pixels; 0: never tile (default: auto)")
    g.add_argument("--tile_pad", type=positive, default=32, help="half the width over which tiles blend")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic (auto: of rk45's float32, by which the paper counts evaluations)")
    return p.parse_args(argv)


def dial(text):
    try:
        return [in_range(float, -10, 10)(x) for x in text.split(",")]
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"{e}; it takes numbers with commas between, 0 (fidelity) to 1 (realism) and, on your own risk, beyond") from None


def solvers(text):
    names = text.split(",")
    if unknown := [name for name in names if name not in SOLVERS]:
        raise argparse.ArgumentTypeError(f"no solver {unknown[0]!r}: there are {', '.join(SOLVERS)}")
    return names


def chosen_metrics(text):
    names = text.split(",")
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"no metric {unknown[0]!r}: there are {', '.join(METRICS)}")
    return [name for name in METRICS if name in names]


def tuning(text):
    name, _, goal = text.partition("=")
    (name,) = chosen_metrics(name)
    return name, in_range(float, -math.inf)(goal) if goal else None


def method(text):
    """NAME[:NFE]=DIR as (name, evaluations or None, folder)."""
    name, equals, folder = text.partition("=")
    name, _, nfe = name.partition(":")
    if not (equals and name and folder) or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} should be NAME=DIR or NAME:NFE=DIR")
    return name, in_range(int, 0)(nfe) if nfe else None, Path(folder)


def check_flags(args):
    """What can be known to be wrong before any work. Raises InputError."""
    check_tile(args.tile, args.tile_pad)
    if args.no_truth and (idle := [f for f in ("data_dir", "lr_dir", "trained_too", "plot", "figure", "write_pairs") if getattr(args, f)]):
        raise InputError(f"--no_truth measures pictures that have no true ones: it goes without --{idle[0]}")
    if args.write_pairs and (idle := [f for f in ("lr_dir", "methods", "metrics", "table", "t", "tune_t", "solver", "steps", "plot", "figure", "json") if getattr(args, f)]):
        raise InputError(f"--write_pairs writes pictures and measures nothing: it goes without --{idle[0]}")
    if args.table and args.metrics:
        raise InputError("--table says what is measured: it goes without --metrics")
    if args.table:
        args.metrics = list(TABLES[args.table][bool(args.no_truth)])
    args.metrics = args.metrics or [name for name in METRICS if name in (ALONE - {"consistency"} if args.no_truth else USUAL)]
    if args.no_truth and (lost := [name for name in args.metrics if name not in ALONE]):
        raise InputError(f"{lost[0]} needs true pictures, which --no_truth has not: there are {', '.join(name for name in METRICS if name in ALONE)}")
    if args.pairs and (idle := [f for f in ("ckpt", "data_dir", "lr_dir", "no_truth", "write_pairs", "table", "pictures", "t", "solver", "steps", "plot", "methods", "figure", "tune_t") if getattr(args, f)]):
        raise InputError(f"--pairs measures two folders as they are: it goes without --{idle[0]}")
    if args.pairs and "consistency" in args.metrics:
        raise InputError("--pairs knows no low-resolution pictures to measure consistency with")
    if (args.lr_dir or args.write_pairs) and not isinstance(args.scale or 1, int):
        raise InputError(f"--scale {args.scale}: files of pairs are a whole number of times smaller")
    if args.tune_t and args.t:
        raise InputError("--tune_t seeks the t that --t would give: one or the other")
    if args.tune_t and args.tune_t[0] not in args.metrics:
        raise InputError(f"--tune_t {args.tune_t[0]} is not among --metrics")
    for flag, endings in (("plot", (".png", ".pdf", ".svg")), ("figure", (".png",))):
        if (file := getattr(args, flag)) and Path(file).suffix.lower() not in endings:
            raise InputError(f"--{flag} {file} should end in {' or '.join([', '.join(endings[:-1]), endings[-1]] if len(endings) > 1 else endings)}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    for file in filter(None, (args.json, args.plot, args.figure)):
        check_file(file)


def pick(args, crop, device):
    metrics = pick_metrics(args.metrics, crop, device, args.lpips_backbone, args.vgg_backbone, args.inception)
    if not metrics.names():
        raise InputError(f"nothing is left to measure of --metrics {','.join(args.metrics)}")
    return metrics


def measure_pairs(args, device):
    """The table of one row for two folders; of Fréchet distances alone, of all pictures of each, be they pairs or not (Appendix F)."""
    restored, truth = args.pairs
    if set(args.metrics) <= {*FID_MODES, "fd_vgg16"}:
        return measure_folders(args, device)
    pairs = find_pairs(restored, truth)
    crop = data.TASKS[args.dataset or "photos"].scale if args.scale is None else math.ceil(args.scale)
    metrics = pick(args, crop, device)
    warn_of_few(metrics, len(pairs))
    progress, records = Progress(len(pairs), "pair"), []
    for stem, a, b in pairs:
        progress.start(stem)
        records.append(dict(seed=0, nfe=None, seconds=None, **measure(a, b, crop, metrics)))
        progress.add(1)
    progress.close()
    sets = [measure_sets([a for _, a, _ in pairs], [b for _, _, b in pairs], metrics, {})] if metrics.sets else ()
    row = dict(name=Path(restored).name, **{**summarise(records, [0], len(pairs), sets), "seeds": None})
    protocol = dict(restored=str(restored), truth=str(truth), pictures=len(pairs), crop=crop, metrics=metrics.notes, torch=torch.__version__)
    print(f"{len(pairs)} pairs: {restored} against {truth}; psnr_y and ssim_y without {crop} pixels at each border; {''.join(f'{text}; ' for text in metrics.notes)}torch {torch.__version__}")
    print(table_line(None, len(row["name"]), metrics.names()) + "\n" + table_line(row, len(row["name"]), metrics.names()))
    if args.json:
        write_json(args.json, protocol, [row])


def measure_folders(args, device):
    """Fréchet distances of one folder's pictures to another's, however many each has."""
    files = [list_images(folder) for folder in args.pairs]
    metrics = pick(args, 0, device)
    warn_of_few(metrics, min(map(len, files)))
    scores = measure_sets(*files, metrics, {})
    print(f"{len(files[0])} pictures of {args.pairs[0]} against {len(files[1])} of {args.pairs[1]}; {''.join(f'{text}; ' for text in metrics.notes)}torch {torch.__version__}")
    print("  ".join(f"{name} {value:.{METRICS[name]}f}" for name, value in scores.items()))
    if args.json:
        protocol = dict(restored=str(args.pairs[0]), truth=str(args.pairs[1]), pictures=[len(f) for f in files], metrics=metrics.notes, torch=torch.__version__)
        write_json(args.json, protocol, [dict(name=Path(args.pairs[0]).name, **scores)])


def warn_of_few(metrics, count):
    if metrics.sets and count < FEW:
        note(f"{', '.join(metrics.sets)} of {count} pictures: with fewer than {FEW:,} it compares only with the same number of the same pictures")


def prepare(args, device, rank, world):
    """What is measured, and on what: (networks, rows, the Bench, {stem: path of the true picture}, what those are in words). Raises InputError: everything that can be wrong comes before any work."""
    networks = load_networks(args.ckpt or [p for p in (SHIPPED_REAL if args.table else SHIPPED) if p.is_file()], device, args)
    check_networks(networks, args)
    args.dataset = args.dataset or "photos"
    task = networks[0].task if networks else measured_task(args)
    rows = plan_rows(networks, args)
    sources, what = find_alone(args.no_truth, args.pictures) if args.no_truth else find_truth(task, args.data_dir, args.pictures, networks, args.trained_too)
    low = sources if args.no_truth else None
    if args.lr_dir:
        what += check_pairs(args.lr_dir)
        partners = find_partners(list(sources.values()), args.lr_dir)
        sources = {stem: path for stem, path in sources.items() if path in partners}
        low = {stem: partners[path] for stem, path in sources.items()}
    rows[1:1] = find_methods(args.methods, list(sources), not args.pictures, {row.name for row in rows})
    figures.choose(sorted(sources), args.figure_pictures)
    out_dir, sizes = Path(args.out_dir), {}  # of the results
    for stem, path in sources.items():
        sizes[path] = [side * task.scale for side in read_image(path).shape[:2]] if args.no_truth else load_truth(path, task, low and low[stem]).shape[:2]
        if out_dir.resolve() in path.resolve().parents:
            raise InputError(f"{path} lies in --out_dir {out_dir}, where results go: choose another")
    metrics = pick(args, math.ceil(task.scale), device)
    for path, size in sizes.items() if "niqe" in metrics.names() else ():
        check_blocks(path, *size)
    if args.plot and not {"psnr_rgb", "lpips"} <= metrics.pictures.keys():
        raise InputError("--plot draws psnr_rgb against lpips, and not both are measured")
    if args.tune_t and args.tune_t[0] not in metrics.names():
        raise InputError(f"--tune_t needs {args.tune_t[0]}, which is left out")
    warn_of_few(metrics, len(sources))
    if not networks:
        note("no --ckpt, and no weights in weights/: bicubic alone is measured")
    if rank == 0:
        clear(out_dir)
    dtype = pick_dtype(args.dtype, device)
    truth = {stem: None if args.no_truth else out_dir / "hr" / f"{stem}.png" for stem in sources}
    bench = Bench(truth, task, out_dir, metrics, dtype, torch.float32 if args.dtype == "auto" else dtype, args.tile, args.tile_pad, rank, world, low)
    return networks, rows, bench, sources, what


def measure_all(networks, rows, bench, args, width):
    """Every row of the table, each said when it is measured: their lines. The other processes say nothing."""
    total = sum(len(bench.seeds(row, args.seeds)) for row in rows) * len(sorted(bench.truth)[bench.rank::bench.world])
    progress = Progress(total, "picture", bench.rank if bench.world > 1 else None)
    say = (progress.bar.write if progress.bar else functools.partial(print, flush=True)) if bench.rank == 0 else lambda text: None
    names, results = bench.metrics.names(), []
    for row in rows:
        results.append(measure_row(row, bench, args.seeds, progress))
        say(table_line(results[-1], width, names))
    for n in networks if args.tune_t else ():
        if n.stage == "distill":
            lines, found = tune(n, bench, args, progress, lambda line: say(table_line(line, width, names)))
            results += lines
            say(found)
    progress.close()
    return results


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    keep_freed_memory()
    device = pick_device(args.device)
    if args.pairs:
        return measure_pairs(args, device) if rank == 0 else None
    if args.write_pairs:
        networks = load_networks(args.ckpt or (), device, args)
        args.dataset = args.dataset or "photos"
        task = networks[0].task if networks else measured_task(args)
        return print(write_pairs(Path(args.write_pairs), task, *find_truth(task, args.data_dir, args.pictures, networks, args.trained_too)))
    networks, rows, bench, sources, what = prepare(args, device, rank, world)

    # --- measure ---
    protocol, heading = describe(networks, rows, bench, what, args, device)
    width = max([len(row.name) for row in rows] + [len(n.name) + 10 for n in networks if args.tune_t])
    if rank == 0:
        print(f"{heading}\n{table_line(None, width, bench.metrics.names())}", flush=True)
    if world > 1:
        join_processes()
        dist.barrier()  # the folder is clear
    for stem in () if args.no_truth else sorted(sources)[rank::world]:
        write_picture(bench.truth[stem], load_truth(sources[stem], bench.task, bench.low and bench.low[stem]))
    results = measure_all(networks, rows, bench, args, width)

    # --- keep ---
    if rank == 0:
        protocol["peak_memory_gib"] = peak_memory(device)
        if protocol["peak_memory_gib"]:
            print(f"peak memory of {'the GPU' if device.type == 'cuda' else 'the process'} {protocol['peak_memory_gib']:.2f} GiB")
        if args.table:
            print(paper_table(args.no_truth or args.lr_dir or what, results, TABLES[args.table][bool(args.no_truth)]))
        if args.json:
            write_json(args.json, protocol, results)
        if args.plot:
            figures.tradeoff(args.plot, results)
        if args.figure:
            figures.side_by_side(args.figure, figures.choose(sorted(sources), args.figure_pictures), rows, bench)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:  # OSError: a disk that is full, a folder that cannot be written
        sys.exit(f"evaluate.py: {e}")
