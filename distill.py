"""Stage 2: distil the flow into one step whose t slides from fidelity to realism (Eq. 9 to 12, Algorithm 1).

With all defaults:          python distill.py --dt 0.05
Then, more realism:         python distill.py --loss perceptual --max_iters 2000 --warmup_iters 20 --lr_decay linear
On one GPU:                 torchrun distill.py --dataset ffhq --data_dir DIR
On eight:                   torchrun --nproc_per_node 8 distill.py --dataset ffhq --data_dir DIR
From a published teacher:   python distill.py --dataset ffhq --teacher FILE --data_dir DIR
The paper's comparisons:    python distill.py --loss boot --solver euler --lambda_align 0 --lambda_bc 0
To go on after a stop:      the same command with --init_from resume

The teacher is --teacher, or the newest stage-1 checkpoint of the task under out/, or the shipped one; the task
(sigma_p and all) is the one it was trained for. --loss perceptual, not the paper's, goes on with a student of that teacher,
--init_from or the newest one under out/, whose ends learn from the photographs. Writes what train_flow.py writes.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import kernels
from console import InputError, in_range
from degradations import degrade, to_float
from evaluate import load_lpips, validate
from model import (
    EMA,
    UNet,
    count_macs,
    keep_freed_memory,
    learning_rate,
    load_checkpoint,
    load_model,
    make_optimizers,
    pick_device,
    pick_dtype,
    resume,
    rewind_log,
    save_checkpoint,
    save_release,
)
from pictures import write_picture
from sample import RK2_NODES, integrate, mean_slope, one_step

TEACHER = Path(__file__).parent / "weights" / "photos_x4_flow.safetensors"


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    number, whole = in_range(float, 0), in_range(int, 0)
    data.add_task_flags(p)
    p.add_argument("--teacher", help="stage-1 weights (default: the newest of this task under out/, else the shipped ones)")
    p.add_argument("--loss", dest="objective", choices=("oftsr", "boot", "pinn", "perceptual"), default="oftsr", help="Eq. (9), (16) or (15); or the truth as the flow sees it, for a finished student")
    p.add_argument("--dt", type=in_range(float, 1e-4, 1), default=0.05, help="time step s - t")
    p.add_argument("--solver", choices=("euler", *RK2_NODES), default="midpoint", help="of the teacher's step from t to s")
    p.add_argument("--lambda_align", type=number, default=0.01, help="weight of Eq. (10)")
    p.add_argument("--lambda_bc", type=number, default=0.1, help="weight of Eq. (11)")
    p.add_argument("--t_min", type=in_range(float, -1, 1), default=0.01, help="t is uniform from here; below 0, a step begins at 0 and is shorter, so that s covers (0, dt) too")
    p.add_argument("--t_max", type=in_range(float, 0, 1), default=0.99, help="to here; with 1 - dt, no step is cut short at 1")
    p.add_argument("--look_min", type=in_range(float, 0, 1), default=0.6, help="--loss perceptual: the teacher looks at pictures at times uniform from here to 1")
    p.add_argument("--lambda_adv", type=number, default=0.015, help="--loss perceptual: weight of looking like a photograph to a critic")
    p.add_argument("--lambda_truth", type=number, default=4.0, help="--loss perceptual: weight of the least-squares end, t = 0, and of the straight dial from there")
    p.add_argument("--lambda_grid", type=number, default=10_000.0, help="--loss perceptual: weight of the grid of the network's patches on smooth areas")
    p.add_argument("--data_dir", help="folder of pictures, searched through (default: data/DATASET)")
    p.add_argument("--out_dir", help="where to write (default: out/DATASET_distill; for --loss perceptual out/DATASET_perceptual)")
    p.add_argument("--init_from", help="teacher, resume (out_dir/ckpt.pt, exactly), or a file of weights to start from (default: teacher; for --loss perceptual the newest student under out/)")
    p.add_argument("--seed", type=in_range(int, 0, 2**31 - 1), default=1337, help="fixes order, crops, flips and noise")
    p.add_argument("--batch_size", type=in_range(int, 1), default=32, help="pictures a step and process")
    p.add_argument("--gradient_accumulation_steps", type=in_range(int, 1), default=1, help="batches summed before an update")
    p.add_argument("--max_iters", type=in_range(int, 1), default=20_000, help="updates in all")
    p.add_argument("--optimizer", choices=("adam", "muon"), default="adam", help="adam, the paper's; or muon for the convolutions, adam for the rest")
    p.add_argument("--learning_rate", type=number, default=1e-4, help="after the warm-up")
    p.add_argument("--warmup_iters", type=whole, default=1000, help="updates over which the learning rate rises")
    p.add_argument("--lr_decay", choices=("none", "linear", "cosine"), default="none", help="how it falls to 0 at max_iters")
    p.add_argument("--grad_clip", type=number, default=1.0, help="largest gradient norm; 0 disables")
    p.add_argument("--ema", type=in_range(float, 0, 1), default=0.9999, help="decay of the weights' moving average")
    p.add_argument("--eval_interval", type=in_range(int, 1), default=1000, help="updates between validations, each of which saves")
    p.add_argument("--eval_pictures", type=in_range(int, 1), default=16, help="validation pictures")
    p.add_argument("--eval_steps", type=in_range(int, 1), default=4, help="midpoint steps of the teacher it is compared with")
    p.add_argument("--log_interval", type=in_range(int, 1), default=50, help="updates between lines of log.jsonl")
    p.add_argument("--always_save_checkpoint", action="store_true", help="keep ckpt_STEP.pt of every validation beside the newest")
    p.add_argument("--lpips_backbone", help="file of torchvision's AlexNet weights (default: torchvision's cache)")
    p.add_argument("--num_workers", type=in_range(int, -1), default=-1, help="processes that read pictures; -1: 0 on a CPU, else up to 8")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--dry_run", action="store_true", help="print settings, parameters and MACs, and stop")
    args = p.parse_args(argv)
    if args.t_min > args.t_max:
        p.error(f"--t_min {args.t_min} is above --t_max {args.t_max}")
    if args.objective in ("boot", "pinn") and args.t_max == 1:
        p.error("--t_max 1: Eq. (15) and (16) divide by 1 - t or s - t, which would be 0: stay below 1")
    return args


def distillation_losses(student, teacher, x_in, t, s, solver="midpoint", objective="oftsr"):
    """Algorithm 1, lines 8 to 11: (3,) = [Eq. (9), or (15) or (16), then Eq. (10), Eq. (11)], means over all elements.

    x_in = concat(x_0, x_lr) (B, 6, H, W); t < s (B,). The student's three evaluations are one batch, so are the teacher's two.
    """
    zero = torch.zeros_like(t)
    v_phi = student(x_in.repeat(3, 1, 1, 1), torch.cat([t, s, zero])).float()  # at t, s and 0, always from x_0
    v_t, v_s, _ = v_phi.chunk(3)
    with torch.no_grad():
        x_t_in = kernels.student_state(x_in, v_t, t)  # Eq. (7)
        v_theta = teacher(torch.cat([x_t_in, x_in]), torch.cat([t, zero])).float()  # at (x_t, t) and (x_0, 0)
        v_step = mean_slope(teacher, x_t_in, v_theta[: len(t)], t, s - t, solver).float()
    losses = kernels.distill_loss(v_phi, v_step, v_theta, t, s)
    if objective == "oftsr":
        return losses
    error = {"boot": boot_error, "pinn": pinn_error}[objective](v_t, v_s, v_step, t, s)
    return torch.cat([error.square().mean()[None], losses[1:]])


def boot_error(v_t, v_s, v_step, t, s):
    """What Eq. (16) squares. With lambda = 1 - t (1-s) / (s (1-t)), lambda (1-t) = (s-t) / s: it is Eq. (9)'s error over lambda^2."""
    lam = (1 - t * (1 - s) / (s * (1 - t))).view(-1, 1, 1, 1)
    return (v_s - kernels.distill_target(v_t, v_step, t, s)) / lam**2


def pinn_error(v_t, v_s, v_step, t, s):
    """What Eq. (15) squares: only the teacher is stopped, the gradient flows through v_phi at both s and t."""
    s, dt = s.view(-1, 1, 1, 1), (s - t).view(-1, 1, 1, 1)
    return s / dt * (v_s - v_t) + v_t - v_step.detach()


class Critic(nn.Module):
    """Tells photographs from restored pictures by what the flow's encoder sees in them, as Sauer et al. (2024) do with a diffusion model's.

    features, one (B, C, h, w) a level, as UNet.features returns them -> scores, one (B, 1, h, w) a level: high for photographs.
    """

    def __init__(self, channels, width=64):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(c, width, 3, padding=1), nn.GroupNorm(4, width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, padding=1)) for c in channels)

    def forward(self, features):
        return [head(f) for head, f in zip(self.heads, features, strict=True)]


def perceptual_losses(student, teacher, critic, x_1, x_in, z_in, t, s):
    """Ground truth for both ends of a finished student's dial, and a straight line between them.

    x_1 (B, 3, H, W); x_in = concat(x_0, x_lr) and z_in, the same under other noise, (B, 6, H, W); t, s (B,) in [0, 1]. The
    frozen teacher looks at x_1^1 = x_0 + v_phi(x_0, 1) and at x_1 on their way, at t, from z_in's start: were it x_0, the
    noise would be the student's own. Returns (losses, seen, there): what its encoder saw in x_1^1 and in x_1, lists of
    (B, C, h, w), finest level first; and of the losses (5,)
    - "looks": how differently it saw the two. Mean absolute error, relative, the mean over the levels;
    - "truth": v_phi(x_0, 0) against x_1 - x_0: least squares, the faithful end. Relative squared error;
    - "line": v_phi(x_0, s) against (1-s) v_phi(x_0, 0) + s v_phi(x_0, 1), held constant. Relative squared error, of the first
      quarter of the pictures, rounded up: it has only to follow. Where realism is the Wasserstein-2 distance, a straight
      line from the least-squares estimate to the best realistic one gives away least on the way (Freirich, Michaeli and
      Meir 2021): a guide here, as the realistic end is not quite that;
    - "grid": how much x_1^1, x_1^0 and x_1^s show the network's patches: see grid_error. x_1^0 in each smooth square by itself,
      as no least-squares estimate has details that fine there; the others, which have texture, in the mean over all;
    - "adv": how little x_1^1 looks like a photograph to the critic, which learns nothing from it.
    """
    few = -(-len(s) // 4)
    few_s = s[:few]
    times = torch.cat([torch.ones_like(s), torch.zeros_like(s), few_s])
    v_1, v_0, v_s = student(torch.cat([x_in, x_in, x_in[:few]]), times).float().split([len(s), len(s), few])
    (x_0, x_lr), z = x_in.chunk(2, dim=1), z_in.chunk(2, dim=1)[0]

    def look(x):
        return teacher.features(torch.cat([torch.lerp(z, x, t.view(-1, 1, 1, 1)), x_lr], dim=1), t)

    seen = look(x_0 + v_1)
    with torch.no_grad():
        there = look(x_1)
        line = torch.lerp(v_0[:few], v_1[:few], few_s.view(-1, 1, 1, 1))
    looks = sum((a.float() - b.float()).abs().mean() / b.float().abs().mean() for a, b in zip(seen, there)) / len(seen)
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    adv = -mean_score(torch.func.functional_call(critic, frozen, (seen,)))
    grid = (grid_error(x_0 + v_1, x_1, teacher.patch) + grid_error(x_0[:few] + v_s, x_1[:few], teacher.patch)
            + grid_error(x_0 + v_0, x_1, teacher.patch, each=True))
    return torch.stack([looks, relative_error(v_0, x_1 - x_0), relative_error(v_s, line), grid, adv]), seen, there


def grid_error(x, x_1, patch, size=8, smooth=0.05, each=False):
    """How much the mean of pictures x (B, 3, H, W) depends on the place of a pixel in its patch: the variance over the patch^2 places.

    Where x_1 is smooth, in the squares of `size` pixels in which it deviates by less than `smooth` (6 of 255), as it is there
    that a grid of some .1 of 255 would show, if anywhere. The variance of the mean over all these squares; or, `each`, the
    mean of every square's own. patch divides size. A number; 0 where nothing is smooth, or smaller than a square.
    """
    height, width = (side // size * size for side in x.shape[2:])
    squares = lambda a: F.pixel_unshuffle(a[..., :height, :width], size).unflatten(1, (3, size // patch, patch, size // patch, patch))
    calm = (squares(x_1).std((2, 3, 4, 5), correction=0).amax(1) < smooth).float()  # (B, H / size, W / size)
    calm = calm / calm.sum().clamp(min=1)
    places = squares(x).mean((2, 4)).flatten(2, 3)  # (B, 3, patch^2, H / size, W / size)
    if each:
        return (places.var(2, correction=0).mean(1) * calm).sum()
    return (places * calm[:, None, None]).sum((0, 3, 4)).var(1, correction=0).mean()


def relative_error(a, b):
    """The mean squared error of a against b, any shape alike, over the mean square of b: a number, 1 for a = 0."""
    return (a - b).square().mean() / b.square().mean()


def critic_loss(critic, seen, there):
    """The hinge loss of a critic that is shown features of restored pictures and of photographs, both constants: a number >= 0."""
    restored, photographs = critic([f.detach() for f in seen]), critic(there)
    return mean_score([F.relu(1 + a) for a in restored]) + mean_score([F.relu(1 - a) for a in photographs])


def mean_score(maps):
    """The mean over levels of the means of a list of maps."""
    return sum(a.float().mean() for a in maps) / len(maps)


def newest(task_name, stage):
    """The newest checkpoint of that task under out/ of stage "flow", or "distill" (not of --loss perceptual), else the shipped flow for photos. Raises InputError."""
    for path in sorted(Path("out").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except InputError:  # broken
            continue
        task, args = checkpoint.get("task"), checkpoint.get("args")
        if checkpoint.get("stage") != stage or not isinstance(task, dict) or not isinstance(args, dict):  # another's
            continue
        if task["name"] == task_name and args.get("objective") != "perceptual":
            return path
    if stage == "flow" and task_name == "photos" and TEACHER.is_file():
        return TEACHER
    what, script, flag = {"flow": ("teacher", "train_flow.py", "--teacher"), "distill": ("student", "distill.py", "--init_from")}[stage]
    raise InputError(f"no {what} for {task_name}: none under out/ ({script} --dataset {task_name} makes one, or name a file with {flag})")


def main(argv=None):
    args = parse_args(argv)
    perceptual = args.objective == "perceptual"
    out_dir = Path(args.out_dir or f"out/{args.dataset}_{'perceptual' if perceptual else 'distill'}")
    if args.init_from == "resume" and args.teacher is None:
        args.teacher = load_checkpoint(out_dir / "ckpt.pt").get("args", {}).get("teacher")
    args.teacher = str(args.teacher or newest(args.dataset, "flow"))
    teacher, meta = load_model(args.teacher, model=args.model or data.TASKS[args.dataset].model)
    if meta["stage"] == "distill":
        raise InputError(f"{args.teacher} is a distilled student: the teacher is a stage-1 flow")
    if meta["task"] and meta["task"]["name"] != args.dataset:
        raise InputError(f"{args.teacher} was trained for {meta['task']['name']}: say --dataset {meta['task']['name']}")
    task = data.resolve_task(args, data.Task(**meta["task"]) if meta["task"] else None)
    if (meta["task"] or {}).get("model", task.model) != task.model:
        raise InputError(f"{args.teacher} holds the network {meta['task']['model']!r}, not {task.model!r}: its student is the same")
    if teacher.precond and teacher.precond["sigma_p"] != task.sigma_p:
        raise InputError(f"{args.teacher} was trained with --sigma_p {teacher.precond['sigma_p']}, not {task.sigma_p}: give the same")
    if perceptual and not task.condition:
        raise InputError(f"--loss perceptual compares with the photograph behind x_lr, which a network of {task.name} does not see")
    args.init_from = str(args.init_from or (newest(args.dataset, "distill") if perceptual else "teacher"))

    # --- processes and device ---
    rank, world, local_world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    keep_freed_memory()
    device = pick_device(args.device)
    ddp, master = world > 1, rank == 0
    if ddp:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    dtype = pick_dtype(args.dtype, device)
    autocast = (lambda: torch.autocast(device.type, dtype)) if dtype != torch.float32 else nullcontext
    torch.manual_seed(args.seed)
    say = tqdm.write if master else lambda text: None

    # --- data ---
    train_paths, val_paths = data.find_data(task, args.data_dir)

    # --- model ---
    now, checkpoint, start = {**vars(args), "world": world, "teacher_step": meta["step"]}, None, teacher
    if args.init_from == "resume":
        checkpoint, other = resume(out_dir / "ckpt.pt", "distill", asdict(task), now)
        if (before := checkpoint["args"].get("objective")) != args.objective:
            raise InputError(f"{out_dir}/ckpt.pt was trained with --loss {before}: to resume, give the same")
    elif (out_dir / "ckpt.pt").exists() and not args.dry_run:
        raise InputError(f"{out_dir} holds a training already: --init_from resume goes on with it, another --out_dir leaves it alone")
    elif args.init_from != "teacher":
        start, its = load_model(args.init_from, model=task.model)
        if {**start.config, "one_step": teacher.config["one_step"]} != teacher.config:
            raise InputError(f"{args.init_from} is not the teacher's network with the teacher's sigma_p: start from a student of {args.teacher}")
        if its["task"] and its["task"]["name"] != task.name:
            raise InputError(f"{args.init_from} was trained for {its['task']['name']}, not {task.name}")
    model = UNet(**(checkpoint["model"] if checkpoint else {**start.config, "one_step": True}))
    if not checkpoint:
        model.load_state_dict(start.state_dict())
    critic = Critic(teacher.feature_channels) if perceptual else None
    if task.image_size % model.multiple:
        raise InputError(f"--image_size {task.image_size} is not a multiple of {model.multiple}, which the network {task.model!r} needs")
    say(f"{task}")
    say(f"{' '.join(f'{k}={v}' for k, v in vars(args).items() if k not in data.Task.__dataclass_fields__)}")
    say(f"{len(train_paths)} training and {len(val_paths)} validation pictures; {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{count_macs(model, task.image_size, task.image_size) / 1e9:.2f} GMACs a picture; global batch "
        f"{args.batch_size * args.gradient_accumulation_steps * world}; {device}, {dtype}, {world} process(es)")
    if args.dry_run:
        return
    teacher.to(device)
    model.to(device, memory_format=torch.channels_last)
    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, dtype)
    if perceptual:
        critic.to(device, memory_format=torch.channels_last)
        optimizers.append(torch.optim.Adam(critic.parameters(), lr=args.learning_rate, betas=(0.5, 0.99)))  # short memory: what it judges changes
    ema = EMA(model, args.ema)
    step, scores = 0, {}  # scores: of the last validation
    if checkpoint:
        model.load_state_dict(checkpoint["params"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.load_state_dict(checkpoint["ema"])
        if perceptual:
            critic.load_state_dict(checkpoint["critic"])
        step, scores = checkpoint["step"], checkpoint["scores"]
        say(f"resumed at step {step}" + (f", not as before: {', '.join(f'--{k}' for k in other)}" if other else ""))
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    net = torch.compile(model) if args.compile else model
    parallel = lambda module: DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None) if ddp else module
    net, judge = parallel(net), parallel(critic) if perceptual else None
    lpips = load_lpips(args.lpips_backbone, device) if master else None
    val = data.validation_pictures(val_paths, task, args.eval_pictures) if master else None

    # --- logging, saving, stopping ---
    log_path = out_dir / "log.jsonl"
    if master:
        rewind_log(log_path, step)

    def log(entry):
        with open(log_path, "a") as f:
            f.write(json.dumps(entry) + "\n")
        say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items()))

    def save(name="ckpt.pt"):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise InputError(f"the weights are not finite at step {step}: lower --learning_rate; {out_dir}/ckpt.pt stays as it was")
        save_checkpoint(out_dir / name, dict(
            stage="distill", task=asdict(task), model=model.config, step=step, scores=scores, args=now,
            params=model.state_dict(), ema=ema.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers],
            **(dict(critic=critic.state_dict()) if perceptual else {})))

    def predict(x_in):  # with the averaged weights, along the dial; and the teacher in a few steps
        with autocast():
            return {**{f"t{t:g}": one_step(ema_model, x_in, t) for t in (0, 0.5, 1)},
                    "teacher": integrate(teacher, x_in, "midpoint", args.eval_steps)[0]}

    asked = stop = 0  # the signal that came, and the one that all processes have agreed to stop for

    def ask_to_stop(signum, frame):
        nonlocal asked
        asked = signum

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, ask_to_stop)

    # --- the loop ---
    workers = args.num_workers if args.num_workers >= 0 else 0 if device.type == "cpu" else min(8, os.cpu_count() // local_world)
    per_step = args.batch_size * args.gradient_accumulation_steps * world  # pictures
    batches = data.training_batches(train_paths, task, args.seed, args.batch_size, step * per_step, rank, world, workers)
    bar = tqdm(total=args.max_iters, initial=step, disable=None if master else True, unit="step")
    losses_of = {"looks": 1, "truth": args.lambda_truth, "line": args.lambda_truth, "grid": args.lambda_grid, "adv": args.lambda_adv} if perceptual else \
        {"distill": 1, "align": args.lambda_align, "bc": args.lambda_bc}  # and their weights, Eq. (12)
    weights = torch.tensor([*losses_of.values()], dtype=torch.float32, device=device)
    sums = torch.zeros(len(losses_of) + 2, device=device)  # the losses, the critic's own and the count, since the last log line
    clock, clock_step, saved = time.time(), step, step  # saved: the step that ckpt.pt holds
    while True:
        if step > saved and (step % args.eval_interval == 0 or step >= args.max_iters or stop):
            if master and not stop:
                ema.copy_to(ema_model)
                scores, grid = validate(predict, val, task, lpips, device)
                log(dict(step=step, **scores))
                write_picture(out_dir / f"val_{step:07d}.png", grid)
            if master:
                save()
                if args.always_save_checkpoint:
                    save(f"ckpt_{step:07d}.pt")
            clock, clock_step, saved = time.time(), step, step
        if step >= args.max_iters or stop:
            break

        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
        for micro in range(args.gradient_accumulation_steps):
            x_1, n = next(batches)
            x_1 = to_float(x_1.to(device, non_blocking=True))
            seeds, t = data.image_seeds(args.seed, n).to(device), data.uniform_times(args.seed, n).to(device)
            x_lr = degrade(x_1, task, seeds)
            x_in = kernels.noise_augment(x_lr, task.sigma_p, seeds)
            last = micro == args.gradient_accumulation_steps - 1
            with net.no_sync() if ddp and not last else nullcontext(), autocast():
                if perceptual:
                    z_in = kernels.noise_augment(x_lr, task.sigma_p, data.image_seeds(args.seed + 1, n).to(device))
                    losses, seen, there = perceptual_losses(net, teacher, critic, x_1, x_in, z_in, args.look_min + (1 - args.look_min) * t, t)
                else:
                    t = args.t_min + (args.t_max - args.t_min) * t
                    s, t = (t + args.dt).clamp(1e-3, 1), t.clamp(min=0)
                    losses = distillation_losses(net, teacher, x_in, t, s, args.solver, args.objective)
                ((losses * weights).sum() / args.gradient_accumulation_steps).backward()
            sums[: len(losses)] += losses.detach()
            sums[-1] += 1
            if perceptual:
                with judge.no_sync() if ddp and not last else nullcontext(), autocast():
                    verdict = critic_loss(judge, seen, there)
                    (verdict / args.gradient_accumulation_steps).backward()
                sums[-2] += verdict.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        step += 1
        bar.update()

        stop = asked
        if ddp:  # all stop together, at the same step; on the CPU, so that no GPU waits
            flag = torch.tensor(asked)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stop = int(flag)
        if step % args.log_interval == 0:
            if ddp:
                dist.all_reduce(sums)
            *parts, verdict, _ = (sums / sums[-1]).tolist()
            loss = sum(part * weight for part, weight in zip(parts, losses_of.values()))
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step}: lower --learning_rate; {out_dir}/ckpt.pt stays as it was")
            speed = (step - clock_step) * per_step / (time.time() - clock)
            if master:
                log(dict(step=step, loss=loss, **dict(zip(losses_of, parts)), **(dict(critic=verdict) if perceptual else {}), grad_norm=norm.item(),
                         lr=learning_rate(step - 1, args), images_per_s=round(speed, 1)))
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.1f}")
            sums.zero_()
            clock, clock_step = time.time(), step
    bar.close()
    if master and step >= args.max_iters:
        ema.copy_to(ema_model)
        save_release(out_dir / "weights.safetensors", ema_model, dict(stage="distill", task=asdict(task), step=step, scores=scores))
    if ddp:
        dist.destroy_process_group()
    if device.type == "cuda":
        say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB a process")
    if stop:
        say(f"stopped by a signal at step {step}; --init_from resume goes on from there")
        sys.exit(128 + stop)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:  # one from a loader's process comes wrapped in its traceback
        sys.exit(f"distill.py: {str(e).splitlines()[-1].removeprefix('console.InputError: ')}")
