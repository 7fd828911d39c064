"""Do the paper's orderings appear in small? Trains ten small networks on photographs under each of three seeds, and says.

    python claims.py --data_dir DIR                  # planned for an hour on 2 idle cores, by CPU times
    python claims.py --data_dir DIR --iters 300      # quicker, and less is to be expected

DIR is a folder of photographs; its validation part is measured (data.py: folders), on crops of 128 x 128, rounded to 8 bits. What is
trained stays under --out_dir: the same command given again goes on, and at its end only prints. A claim "appears" if it holds under
every seed; the numbers are means over the seeds and their deviation.
"""
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

import data
import distill
import train_flow
from console import InputError, Parser, atomic_write, in_range
from degradations import degrade, to_float
from kernels import flow_training_pair, noise_augment, to_uint8
from metrics import load_lpips, psnr_rgb
from model import load_model
from pictures import read_image
from flow import integrate, one_step

SMALL = ["--batch_size", "8", "--image_size", "64", "--optimizer", "muon", "--learning_rate", "1e-3", "--warmup_iters", "50", "--lr_decay", "linear", "--ema", "0.99",
         "--model", "plain", "--eval_pictures", "1", "--eval_interval", "1000000", "--device", "cpu"]
FLOWS = {"sigma_p 0": ["--sigma_p", "0"], "sigma_p .1": ["--sigma_p", "0.1"], "sigma_p .5": ["--sigma_p", "0.5"], "sigma_p 1": ["--sigma_p", "1"],
         "no condition": ["--sigma_p", "0.1", "--no_condition"]}
EULER = ["--solver", "euler", "--dt", "0.05", "--lambda_align", "0", "--lambda_bc", "0"]  # a later flag counts
STUDENTS = {"Eq. (9)": EULER, "BOOT": [*EULER, "--loss", "boot"], "PINN": [*EULER, "--loss", "pinn"], "dt .001": [*EULER, "--dt", "0.001"],
            "midpoint": [*EULER, "--solver", "midpoint"]}
TEACHER, DIAL, STEPS = "sigma_p .1", (0, 0.25, 0.5, 0.75, 1), (1, 2, 4, 8, 16)


BUSY = threading.Lock()  # held while this process of the pool trains


def end_with_parent():
    """In a process of the pool: when the program that made it is gone, its training saves and stops, and it ends."""
    def watch():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
        BUSY.acquire()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def train(job):
    """Train one network, if it is not there, in a process of its own; its output goes to out/log.txt. job: (script's name, flags, out)."""
    script, flags, out = job
    torch.set_num_threads(1)
    if (out / "weights.safetensors").exists() or not multiprocessing.parent_process().is_alive():
        return
    out.mkdir(parents=True, exist_ok=True)
    resume = ["--init_from", "resume"] if (out / "ckpt.pt").exists() else []
    with BUSY, open(out / "log.txt", "a") as f, redirect_stdout(f), redirect_stderr(f):
        {"train_flow": train_flow, "distill": distill}[script].main([*flags, "--out_dir", str(out), *resume])


def validation_crops(args, size=128):
    """The middles, `size` pixels wide, of args.pictures of the validation pictures that are large enough: (N, 3, size, size) uint8."""
    crops = []
    for path in data.find_data(data.TASKS["photos"], args.data_dir)[1]:
        image = read_image(path)
        y, x = ((side - size) // 2 for side in image.shape[:2])
        if min(y, x) >= 0:
            crops.append(torch.from_numpy(image[y : y + size, x : x + size].copy()).permute(2, 0, 1))
    if not crops:
        raise InputError(f"no validation picture of {args.data_dir} is {size} pixels wide and high")
    return torch.stack(data.spread(crops, args.pictures))


@torch.no_grad()
def measure(job):
    """The numbers of all networks of a seed, kept in out/scores.json: {network: {setting: [psnr_rgb, lpips]}}, and {network: {"S": Eq. (20)}}."""
    args, seed, out = job
    torch.set_num_threads(1)
    if (out / "scores.json").exists():
        return json.loads((out / "scores.json").read_text())
    truth, scores, lpips = validation_crops(args), {}, load_lpips()
    x_1, seeds = to_float(truth), data.image_seeds(seed, torch.arange(len(truth)))
    x_lr = degrade(x_1, data.TASKS["photos"], seeds)

    def judge(x):
        x = to_uint8(x).permute(0, 3, 1, 2)
        return [psnr_rgb(x, truth).mean().item(), lpips(to_float(x), x_1).mean().item()]

    for name in FLOWS:
        net, meta = load_model(out / name / "weights.safetensors")
        sigma_p = meta["task"]["sigma_p"]
        scores[name] = {f"{n} steps": judge(integrate(net, noise_augment(x_lr, sigma_p, seeds), "euler", n)[0]) for n in (STEPS if name == TEACHER else STEPS[-1:])}
        scores[name]["S"] = straightness(net, x_1, x_lr, sigma_p, seeds)
        if name == TEACHER:
            scores[name].update({f"t {t:g}": judge(x) for t, x in path_estimates(net, noise_augment(x_lr, sigma_p, seeds)).items()})
    for name in STUDENTS:
        net, _ = load_model(out / name / "weights.safetensors")
        x_in = noise_augment(x_lr, 0.1, seeds)
        scores[name] = {f"t {t:g}": judge(one_step(net, x_in, t)) for t in (DIAL if name == "midpoint" else DIAL[-1:])}
    atomic_write(out / "scores.json", lambda tmp: tmp.write_text(json.dumps(scores)))
    return scores


def straightness(net, x_1, x_lr, sigma_p, seeds, times=8):
    """S(v) of Eq. (20) on pictures x_1 (N, 3, H, W), in t by the midpoint rule: a number, 0 for straight paths."""
    total = 0.0
    for i in range(times):
        t = torch.full((len(x_1),), (i + 0.5) / times)
        x_in, target = flow_training_pair(x_1, x_lr, t, sigma_p, seeds)
        total += (net(x_in, t).float() - target).square().mean().item() / times
    return total


def path_estimates(net, x_in, steps=16):
    """x_1^t = x_t + (1 - t) v(x_t, t) along the flow's path from x_in = concat(x_0, x_lr), Euler (Fig. 6): {t of DIAL: (N, 3, H, W)}."""
    estimates = {}
    for i in range(steps):
        t = i / steps
        v = net(x_in, torch.full((len(x_in),), t)).float()
        if t in DIAL:
            estimates[t] = x_in[:, :3] + (1 - t) * v
        x_in[:, :3] += v / steps
    return {**estimates, 1: x_in[:, :3]}


def claims(scores):
    """Each of the paper's claims in the numbers of one seed: [(claim, [numbers that should not rise from left to right])]."""
    last, at_1 = f"{STEPS[-1]} steps", "t 1"
    flow, student = (lambda name, how=last: scores[name][how][1]), (lambda name: scores[name][at_1][1])
    fall = lambda name, settings, which: [scores[name][s][which] for s in settings]
    dial = [f"t {t:g}" for t in DIAL]
    return [
        ("LPIPS: better with sigma_p .1 than with 0 (Table 7)", [flow("sigma_p 0"), flow(TEACHER)]),
        ("LPIPS: better with the condition x_lr than without (Table 7)", [flow("no condition"), flow(TEACHER)]),
        ("S: straighter for smaller sigma_p: 1, .5, .1, 0 (Fig. 8)", [scores[n]["S"] for n in ("sigma_p 1", "sigma_p .5", TEACHER, "sigma_p 0")]),
        ("LPIPS at t = 1: Eq. (9) better than BOOT's (Table 8)", [student("BOOT"), student("Eq. (9)")]),
        ("LPIPS at t = 1: Eq. (9) better than PINN's (Table 8)", [student("PINN"), student("Eq. (9)")]),
        ("LPIPS at t = 1: midpoint at least as good as Euler (Table 8)", [student("Eq. (9)"), student("midpoint")]),
        ("LPIPS at t = 1: dt .05 better than .001 (Table 8)", [student("dt .001"), student("Eq. (9)")]),
        ("PSNR of the student falls as t grows: 0 to 1 (Table 2)", fall("midpoint", dial, 0)),
        ("LPIPS of the student falls as t grows (Table 2)", fall("midpoint", dial, 1)),
        ("PSNR of the teacher's estimate falls along its path (Fig. 6)", fall(TEACHER, dial, 0)),
        ("LPIPS of the teacher's estimate falls along its path (Fig. 6)", fall(TEACHER, dial, 1)),
        ("LPIPS falls with more steps: 1, 2, 4, 8, 16 (Sec. 2.2)", fall(TEACHER, [f"{n} steps" for n in STEPS], 1)),
    ]


def report(by_seed):
    """A line for each claim: its numbers over the seeds, and under how many of them it holds."""
    for same in zip(*map(claims, by_seed)):
        claim, series = same[0][0], [numbers for _, numbers in same]
        holds = sum(all(a >= b for a, b in zip(numbers, numbers[1:])) for numbers in series)
        digits = 2 if claim.startswith("PSNR") else 4
        spread = [f"{statistics.fmean(n):.{digits}f} ±{statistics.stdev(n) if len(n) > 1 else 0:.{digits}f}" for n in zip(*series)]
        verdict = "appears" if holds == len(series) else "does not appear" if holds == 0 else f"appears under {holds} of {len(series)} seeds"
        print(f"{claim:64} {verdict:28} {', '.join(spread)}")


def parse_args(argv):
    p = Parser(description=__doc__)
    p.add_argument("--data_dir", required=True, help="folder of photographs")
    p.add_argument("--out_dir", type=Path, default=Path("out/claims"), help="where the networks go (default: out/claims)")
    p.add_argument("--iters", type=in_range(int, 1), default=1500, help="updates of each flow; a student has a third of them (default: 1500)")
    p.add_argument("--seeds", type=in_range(int, 1), default=3, help="repeat with the seeds 0 to SEEDS - 1")
    p.add_argument("--pictures", type=in_range(int, 1), default=24, help="validation pictures")
    p.add_argument("--workers", type=in_range(int, 1), default=min(2, os.cpu_count()), help="networks trained at a time, one core each")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if load_lpips() is None:
        raise InputError("the claims are about LPIPS: name a file of AlexNet's weights in OFTSR_LPIPS_ALEX")
    n = len(validation_crops(args))
    outs = {seed: args.out_dir / f"iters{args.iters}_seed{seed}" for seed in range(args.seeds)}
    common = lambda seed, iters: [*SMALL, "--data_dir", args.data_dir, "--seed", str(seed), "--max_iters", str(iters)]
    flows = [("train_flow", [*common(seed, args.iters), *flags], out / name) for seed, out in outs.items() for name, flags in FLOWS.items()]
    students = [("distill", [*common(seed, max(1, args.iters // 3)), "--teacher", str(out / TEACHER / "weights.safetensors"), *flags], out / name)
                for seed, out in outs.items() for name, flags in STUDENTS.items()]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        for jobs in (flows, students):
            for i, _ in enumerate(pool.map(train, jobs), 1):
                print(f"{jobs[0][0]}: {i} of {len(jobs)} trained", file=sys.stderr, flush=True)
        by_seed = list(pool.map(measure, [(args, seed, out) for seed, out in outs.items()]))
    print(f"{args.seeds} seeds, {args.iters} updates a flow and {max(1, args.iters // 3)} a student, of 8 crops of 64 x 64; measured on {n} crops of 128 x 128")
    report(by_seed)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"claims.py: {e}")
