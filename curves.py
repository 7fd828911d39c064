"""The paper's curves: what a flow and its student say along t, how straight flows are, how diverse their pictures are; and the second dial's.

    python curves.py path --data_dir DIR --plot path.png            # Fig. 6 and 7: error and LPIPS of x_1^t over t, flow and student
    python curves.py straightness --ckpt out/a/ckpt.pt out/b/ckpt.pt --data_dir DIR --plot straight.png   # Eq. (20) over sigma_p, Fig. 8
    python curves.py diversity --data_dir DIR --seeds 8 --plot seeds.png       # Fig. 11: deviation and LPIPS between seeds, and the grid
    python curves.py denoise --data_dir DIR --t 0.5 --plot denoise.png         # PSNR and LPIPS over the strength of damage, for several --denoise

The checkpoints are --ckpt, or the shipped student and its flow; the pictures are those that evaluate.py would measure,
their middles where they are larger than --side. Numbers are printed, and kept with --json.
"""
import importlib.util
import itertools
import statistics
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import data
import figures
from console import InputError, Parser, Progress, check_file, in_range
from degradations import degrade, least_multiple, to_float
from dial import blend
from evaluate import SHIPPED, check_together, load_networks
from flow import one_step
from kernels import euler_step_, to_uint8
from machine import keep_freed_memory, pick_device, pick_dtype
from metrics import load_lpips, psnr_rgb
from pairs import find_truth, load_truth
from report import write_json
from sample import REAL, WEIGHTS


def parse_args(argv):
    p = Parser(description=__doc__)
    p.add_argument("what", choices=("path", "straightness", "diversity", "denoise"), help="which curve")
    p.add_argument("--ckpt", nargs="+", metavar="FILE", help="students and flows; of denoise the clean network and the real one (default: those in weights/)")
    data.add_task_flags(p)
    p.set_defaults(dataset=None)
    p.add_argument("--stage", choices=("flow", "distill"), help="what a checkpoint is, for a published file, which does not say")
    p.add_argument("--data_dir", help="folder of true pictures (default: data/DATASET)")
    p.add_argument("--pictures", type=in_range(int, 0), default=16, help="this many, spread evenly; 0: all (default: 16)")
    p.add_argument("--trained_too", action="store_true", help="also what a network was trained on")
    p.add_argument("--float_lr", dest="eight_bit", action="store_false", help="low-resolution pictures in float: no --eight_bit")
    p.add_argument("--side", type=in_range(int, 32), default=256, help="largest side of a picture that is looked at, its middle (default: 256)")
    p.add_argument("--steps", type=in_range(int, 1), default=20, help="Euler steps along the path, and points of the curve (default: 20)")
    p.add_argument("--seeds", type=in_range(int, 1), default=1, help="repeat with the seeds 0 to SEEDS - 1 (of diversity at least 2)")
    p.add_argument("--t", type=in_range(float, 0, 1), default=1.0, help="of a student's pictures in diversity and denoise (default: 1)")
    p.add_argument("--denoise", type=shares, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="places of the second dial (default: 0,0.25,0.5,0.75,1)")
    p.add_argument("--strengths", type=shares, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="of the damage in denoise (default: 0,0.25,0.5,0.75,1)")
    p.add_argument("--plot", metavar="FILE", help="draw it there: .png, .pdf or .svg; of diversity the grid of pictures, .png")
    p.add_argument("--json", metavar="FILE", help="write the numbers there")
    p.add_argument("--lpips_backbone", metavar="FILE", help="torchvision's AlexNet weights")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    return p.parse_args(argv)


def shares(text):
    return [in_range(float, 0, 1)(part) for part in text.split(",")]


# --- what a network does at one picture ---


def euler_path(net, x_in, steps):
    """The flow walked in Euler steps: yields (t, x_t (B, 3, H, W), v(x_t, x_lr, t)) at t = 0, 1/steps, ...; x_in = concat(x_0, x_lr) is changed in place."""
    for i in range(steps):
        v = net(x_in, torch.full((len(x_in),), i / steps, device=x_in.device)).float()
        yield i / steps, x_in[:, :3], v
        euler_step_(x_in, v, 1 / steps)


def estimates(network, x_in, steps):
    """x_1^t over t: of a flow x_t + (1 - t) v(x_t, x_lr, t) along its path (Fig. 6), of a student x_0 + v(x_0, x_lr, t) (Eq. 13). Yields (t, (B, 3, H, W))."""
    if network.stage == "distill":
        for i in range(steps + 1):
            yield i / steps, one_step(network.net, x_in, i / steps)
        return
    for t, x_t, v in euler_path(network.net, x_in, steps):
        yield t, x_t + (1 - t) * v
    yield 1.0, x_in[:, :3].clone()


def straightness(net, x_in, x_1, steps):
    """S(v) of Eq. (20), the mean over pixels, 0 for a straight flow: (along the flow's own path, x_1 where that ends; with the data's x_1).

    The first is how much a flow bends (Liu et al. 2022); the second is what it was trained to make small.
    """
    start, x_lr = x_in[:, :3].clone(), x_in[:, 3:]
    velocities = [v for _, _, v in euler_path(net, x_in.clone(), steps)]
    mean = sum(velocities) / steps  # x_1 - x_0 of the path
    bend = statistics.fmean((v - mean).square().mean().item() for v in velocities)
    gap = 0.0
    for i in range(steps):
        t = (i + 0.5) / steps
        x_t = torch.cat([torch.lerp(start, x_1, t), x_lr], dim=1)
        v = net(x_t, torch.full((len(x_in),), t, device=x_in.device)).float()
        gap += (v - (x_1 - start)).square().mean().item() / steps
    return bend, gap


# --- the curves ---


def starts(network, x_1, task, seed, index):
    """concat(x_0, x_lr) (1, 6, H, W) of picture number `index` under a seed."""
    stream = data.image_seeds(seed, torch.tensor([index])).to(x_1.device)
    return network.net.start(degrade(x_1, task, stream), network.task.sigma_p, stream)


def measure_path(networks, pictures, task, args, lpips, progress):
    """{name: (ts, mean squared errors of x_1^t in [0, 1], LPIPS or None)}."""
    curves = {}
    for n in networks:
        errors, distances = {}, {}
        for seed, (i, x_1) in itertools.product(range(args.seeds), enumerate(pictures)):
            progress.start(n.name)
            for t, x in estimates(n, starts(n, x_1, task, seed, i), args.steps):
                x = x.clamp(-1, 1)
                errors.setdefault(t, []).append((x - x_1).square().mean().item() / 4)
                distances.setdefault(t, []).append(lpips(x, x_1).item() if lpips else None)
            progress.add(1)
        curves[n.name] = (list(errors), [statistics.fmean(e) for e in errors.values()], [statistics.fmean(d) if lpips else None for d in distances.values()])
    return curves


def measure_straightness(networks, pictures, task, args, progress):
    """{name: (sigma_p, S along the path, S with the data)}."""
    found = {}
    for n in networks:
        values = []
        for seed, (i, x_1) in itertools.product(range(args.seeds), enumerate(pictures)):
            progress.start(n.name)
            values.append(straightness(n.net, starts(n, x_1, task, seed, i), x_1, args.steps))
            progress.add(1)
        found[n.name] = (n.task.sigma_p, *(statistics.fmean(v) for v in zip(*values)))
    return found


def measure_diversity(network, pictures, task, args, lpips, progress):
    """(deviation between seeds of a pixel's value, of 255; mean LPIPS between two seeds, or None; rows of a grid of pictures).

    A row: the low-resolution picture, one result for each seed, where they differ (8 times enlarged), the truth.
    """
    deviations, distances, rows = [], [], []
    for i, x_1 in enumerate(pictures):
        progress.start(network.name)
        results = []
        for seed in range(args.seeds):
            x_in = starts(network, x_1, task, seed, i)
            ts = estimates(network, x_in, args.steps) if network.stage == "flow" else [(args.t, one_step(network.net, x_in, args.t))]
            results.append([x for _, x in ts][-1].clamp(-1, 1))
            progress.add(1)
        shown = [to_uint8(x)[0].numpy() for x in results]
        spread = np.stack(shown).astype(np.float64).std(axis=0, ddof=1)
        deviations.append(spread.mean())
        if lpips:
            distances += [lpips(a, b).item() for a, b in itertools.combinations(results, 2)]
        x_lr = to_uint8(starts(network, x_1, task, 0, i)[:, 3:])[0].numpy()
        rows.append([x_lr, *shown, np.uint8((8 * spread).clip(0, 255)), to_uint8(x_1)[0].numpy()])
    return statistics.fmean(deviations), statistics.fmean(distances) if distances else None, rows


def measure_denoise(clean, real, pictures, task, args, lpips, progress):
    """Of each place of the second dial, in words: (strengths of damage, mean PSNR in 8 bits, mean LPIPS or None). Of flows their one Euler step."""
    curves, t = {}, args.t if clean.stage == "distill" else 0.0
    for denoise in args.denoise:
        net, _, _ = blend(*((n.net, n.stage, n.task) for n in (clean, real)), denoise)
        mixed, rows = replace(clean, net=net), []
        for strength in args.strengths:
            progress.start(f"denoise {denoise:g}, strength {strength:g}")
            damaged, scores = replace(task, degradation="real", strength=strength), []
            for seed, (i, x_1) in itertools.product(range(args.seeds), enumerate(pictures)):
                x = one_step(net, starts(mixed, x_1, damaged, seed, i), t).clamp(-1, 1)
                scores.append((psnr_rgb(to_uint8(x), to_uint8(x_1)).item(), lpips(x, x_1).item() if lpips else None))
                progress.add(1)
            psnr, distance = zip(*scores)
            rows.append((strength, statistics.fmean(psnr), statistics.fmean(distance) if lpips else None))
        curves[f"denoise {denoise:g}"] = tuple(zip(*rows))
    return curves


# --- the command line ---


def load_pictures(task, args, networks, device):
    """The true pictures, (1, 3, H, W) in [-1, 1] each: those that evaluate.py would measure, the middle of what is larger than --side; and what they are in words."""
    sources, what = find_truth(task, args.data_dir, args.pictures, networks, args.trained_too)
    multiple = least_multiple(task.scale)
    for n in networks:
        multiple = np.lcm(multiple, n.net.multiple * n.net.factor)
    pictures = []
    for path in sources.values():
        truth = Image.fromarray(load_truth(path, task))
        w, h = (min(side, args.side) // multiple * multiple for side in truth.size)
        if not w or not h:
            raise InputError(f"{path} is smaller than the {multiple} pixels that the networks take")
        x, y = (truth.width - w) // 2, (truth.height - h) // 2
        pictures.append(to_float(torch.from_numpy(np.array(truth.crop((x, y, x + w, y + h))))).permute(2, 0, 1)[None].to(device))
    return pictures, what


def check(args, networks):
    """Raises InputError where the curve asked for is not one of these networks."""
    stages = {n.stage for n in networks}
    if args.what == "denoise" and (len(networks) != 2 or len(stages) != 1):
        raise InputError("denoise is between two students, or two flows (at t = 0): --ckpt CLEAN REAL")
    if args.what == "straightness" and stages != {"flow"}:
        raise InputError("straightness is of stage-1 flows alone: name them with --ckpt")
    if args.what == "diversity" and args.seeds < 2:
        raise InputError("diversity is between seeds: --seeds 2 or more")
    if args.plot and args.what == "diversity" and not args.plot.endswith(".png"):
        raise InputError(f"--plot {args.plot}: the grid of pictures is a .png")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise InputError(f"--plot {args.plot}: a plot is a .png, .pdf or .svg")
    if args.plot and args.what != "diversity" and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install matplotlib")
    for file in filter(None, (args.json, args.plot)):
        check_file(file)


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    keep_freed_memory()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    shipped = dict(straightness=SHIPPED[1:], denoise=(WEIGHTS, REAL)).get(args.what, SHIPPED)  # a student has no path
    networks = load_networks(args.ckpt or shipped, device, args)
    if args.what != "denoise":
        check_together(networks)
    check(args, networks)
    task = networks[0].task
    pictures, what = load_pictures(task, args, networks, device)
    lpips = load_lpips(args.lpips_backbone, device) if args.what != "straightness" else None
    sweeps = len(args.denoise) * len(args.strengths) if args.what == "denoise" else len(networks)
    progress = Progress(sweeps * len(pictures) * args.seeds, "picture")
    print(f"{args.what}: {what}, the middle {args.side} at most, H {f'real, t {args.t:g},' if args.what == 'denoise' else task.degradation} x{task.scale} in {'8 bits' if task.eight_bit else 'float'}, seeds 0 to {args.seeds - 1}, "
          f"{args.steps} steps; " + "; ".join(f"{n.name} = {n.path} sha256 {n.sha256}" for n in networks))
    with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
        if args.what == "path":
            found = measure_path(networks, pictures, task, args, lpips, progress)
            for name, curve in found.items():
                print(*(f"{name}  t {t:.3f}  MSE {e:.6f}" + (f"  LPIPS {d:.4f}" if d is not None else "") for t, e, d in zip(*curve)), sep="\n")
            if args.plot:
                figures.over_t(args.plot, found)
        elif args.what == "denoise":
            found = measure_denoise(*networks, pictures, task, args, lpips, progress)
            for name, curve in found.items():
                print(*(f"{name}  strength {s:.2f}  PSNR {p:.3f}" + (f"  LPIPS {d:.4f}" if d is not None else "") for s, p, d in zip(*curve)), sep="\n")
            if args.plot:
                figures.over_t(args.plot, found, "strength of the damage", "PSNR, dB (line)")
        elif args.what == "straightness":
            found = measure_straightness(networks, pictures, task, args, progress)
            for name, (sigma_p, path, gap) in sorted(found.items(), key=lambda item: item[1]):
                print(f"{name}  sigma_p {sigma_p:g}  S {path:.6f} along the path  {gap:.6f} with the data")
            if args.plot:
                figures.points(args.plot, sorted((v[0], v[1]) for v in found.values()), "sigma_p", "straightness S(v), Eq. (20)")
        else:
            found, rows = {}, []
            for n in networks:
                deviation, distance, grid = measure_diversity(n, pictures, task, args, lpips, progress)
                found[n.name], rows = (deviation, distance), rows + grid
                print(f"{n.name}  deviation {deviation:.3f} of 255" + (f"  LPIPS between seeds {distance:.4f}" if distance is not None else ""))
            if args.plot:
                figures.grid(args.plot, rows)
    progress.close()
    if args.json:
        write_json(args.json, dict(what=args.what, pictures=what), [dict(name=name, values=values) for name, values in found.items()])


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"curves.py: {e}")
