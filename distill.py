"""Stage 2: distil the flow into one step whose t slides from fidelity to realism (Eq. 9 to 12, Algorithm 1).

With all defaults:          python distill.py --dt 0.05
On one GPU:                 torchrun distill.py --dataset ffhq --data_dir DIR
On eight:                   torchrun --nproc_per_node 8 distill.py --dataset ffhq --data_dir DIR
From a published teacher:   python distill.py --dataset ffhq --teacher FILE --data_dir DIR
The paper's comparisons:    python distill.py --loss boot --solver euler --lambda_align 0 --lambda_bc 0
Then, a better dial:        python distill.py --loss straight --dt 0.2
To go on after a stop:      the same command with --init_from resume

The teacher is --teacher, or the newest stage-1 checkpoint of the task under out/, or the shipped one; the task
(sigma_p and all) is the one it was trained for. The teacher of --loss straight is a student, or the newest under out/,
whose two ends it keeps and between which it lays a straight line. Writes what train_flow.py writes.
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import kernels
from evaluate import load_lpips, validate
from model import (EMA, InputError, UNet, count_macs, keep_freed_memory, learning_rate, load_checkpoint, load_model, make_optimizers, pick_device,
                   pick_dtype, resume, rewind_log, save_checkpoint, save_release)
from sample import RK2_NODES, integrate, mean_slope, one_step

TEACHER = Path(__file__).parent / "weights" / "photos_x4_flow.safetensors"


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    number, whole = data.in_range(float, 0), data.in_range(int, 0)
    data.add_task_flags(p)
    p.add_argument("--teacher", help="stage-1 weights, or for --loss straight a student's (default: the newest of this task under out/, else the shipped flow)")
    p.add_argument("--loss", dest="objective", choices=("oftsr", "boot", "pinn", "straight"), default="oftsr", help="Eq. (9), (16) or (15); or straighten the dial of a student")
    p.add_argument("--dt", type=data.in_range(float, 1e-4, 1), default=0.05, help="time step s - t")
    p.add_argument("--solver", choices=("euler", *RK2_NODES), default="midpoint", help="of the teacher's step from t to s")
    p.add_argument("--lambda_align", type=number, default=0.01, help="weight of Eq. (10)")
    p.add_argument("--lambda_bc", type=number, default=0.1, help="weight of Eq. (11)")
    p.add_argument("--t_min", type=data.in_range(float, -1, 1), default=0.01, help="t is uniform from here; below 0, a step begins at 0 and is shorter, so that s covers (0, dt) too")
    p.add_argument("--t_max", type=data.in_range(float, 0, 1), default=0.99, help="to here; with 1 - dt, no step is cut short at 1")
    p.add_argument("--data_dir", help="folder of pictures, searched through (default: data/DATASET)")
    p.add_argument("--out_dir", help="where to write (default: out/DATASET_distill; for --loss straight out/DATASET_straight)")
    p.add_argument("--init_from", default="teacher", help="teacher, resume (out_dir/ckpt.pt, exactly), or a file of weights to start from")
    p.add_argument("--seed", type=data.in_range(int, 0, 2**31 - 1), default=1337, help="fixes order, crops, flips and noise")
    p.add_argument("--batch_size", type=data.in_range(int, 1), default=32, help="pictures a step and process")
    p.add_argument("--gradient_accumulation_steps", type=data.in_range(int, 1), default=1, help="batches summed before an update")
    p.add_argument("--max_iters", type=data.in_range(int, 1), default=20_000, help="updates in all")
    p.add_argument("--optimizer", choices=("adam", "muon"), default="adam", help="adam, the paper's; or muon for the convolutions, adam for the rest")
    p.add_argument("--learning_rate", type=number, default=1e-4, help="after the warm-up")
    p.add_argument("--warmup_iters", type=whole, default=1000, help="updates over which the learning rate rises")
    p.add_argument("--lr_decay", choices=("none", "linear", "cosine"), default="none", help="how it falls to 0 at max_iters")
    p.add_argument("--grad_clip", type=number, default=1.0, help="largest gradient norm; 0 disables")
    p.add_argument("--ema", type=data.in_range(float, 0, 1), default=0.9999, help="decay of the weights' moving average")
    p.add_argument("--eval_interval", type=data.in_range(int, 1), default=1000, help="updates between validations, each of which saves")
    p.add_argument("--eval_pictures", type=data.in_range(int, 1), default=16, help="validation pictures")
    p.add_argument("--eval_steps", type=data.in_range(int, 1), default=4, help="midpoint steps of the teacher it is compared with")
    p.add_argument("--log_interval", type=data.in_range(int, 1), default=50, help="updates between lines of log.jsonl")
    p.add_argument("--always_save_checkpoint", action="store_true", help="keep ckpt_STEP.pt of every validation beside the newest")
    p.add_argument("--lpips_backbone", help="file of torchvision's AlexNet weights (default: torchvision's cache)")
    p.add_argument("--num_workers", type=data.in_range(int, -1), default=-1, help="processes that read pictures; -1: 0 on a CPU, else up to 8")
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
    if objective == "straight":
        return straight_losses(student, teacher, x_in, s)
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


def straight_losses(student, teacher, x_in, s):
    """Lay a straight line between the two ends of a finished student, the teacher here: v_phi(x_0, s) = (1-s) v(x_0, 0) + s v(x_0, 1).

    Between the estimate of least squared error (t = 0) and a realistic one (t = 1) the straight line gives away least of the one
    for what it gains of the other (Freirich, Michaeli and Meir 2021); the dial of Eq. (13) bends away from it (LOG.md).
    Returns (3,) = [the error at s, 0, the error at 0], means over all elements.
    """
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    twice = x_in.repeat(2, 1, 1, 1)
    with torch.no_grad():
        v_0, v_1 = teacher(twice, torch.cat([zero, one])).float().chunk(2)
        target = torch.cat([torch.lerp(v_0, v_1, s.view(-1, 1, 1, 1)), v_0])
    at_s, at_0 = (student(twice, torch.cat([s, zero])).float() - target).square().chunk(2)
    return torch.stack([at_s.mean(), at_s.new_zeros(()), at_0.mean()])


def find_teacher(task_name, stage):
    """The newest checkpoint of that task and stage ("flow", "distill") under out/, else the shipped flow for photos. Raises InputError."""
    for path in sorted(Path("out").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except InputError:  # somebody else's, or broken
            continue
        straight = (checkpoint.get("args") or {}).get("objective") == "straight"
        if checkpoint.get("stage") == stage and not straight and (checkpoint.get("task") or {}).get("name") == task_name:
            return path
    if stage == "flow" and task_name == "photos" and TEACHER.is_file():
        return TEACHER
    number, script = {"flow": (1, "train_flow.py"), "distill": (2, "distill.py")}[stage]
    raise InputError(f"no teacher for {task_name}: no stage-{number} checkpoint of it under out/ ({script} --dataset {task_name} makes one, or name a file with --teacher)")


def main(argv=None):
    args = parse_args(argv)
    straight = args.objective == "straight"
    out_dir = Path(args.out_dir or f"out/{args.dataset}_{'straight' if straight else 'distill'}")
    if args.init_from == "resume" and args.teacher is None:
        args.teacher = load_checkpoint(out_dir / "ckpt.pt").get("args", {}).get("teacher")
    args.teacher = str(args.teacher or find_teacher(args.dataset, "distill" if straight else "flow"))
    teacher, meta = load_model(args.teacher, model=args.model or data.TASKS[args.dataset].model)
    if meta["stage"] == ("flow" if straight else "distill"):
        raise InputError(f"{args.teacher} is a {'flow: --loss straight takes a distilled student' if straight else 'distilled student: the teacher is a stage-1 flow'}")
    if meta["task"] and meta["task"]["name"] != args.dataset:
        raise InputError(f"{args.teacher} was trained for {meta['task']['name']}: say --dataset {meta['task']['name']}")
    task = data.resolve_task(args, data.Task(**meta["task"]) if meta["task"] else None)
    if (meta["task"] or {}).get("model", task.model) != task.model:
        raise InputError(f"{args.teacher} holds the network {meta['task']['model']!r}, not {task.model!r}: its student is the same")
    if teacher.precond and teacher.precond["sigma_p"] != task.sigma_p:
        raise InputError(f"{args.teacher} was trained with --sigma_p {teacher.precond['sigma_p']}, not {task.sigma_p}: give the same")

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
    elif (out_dir / "ckpt.pt").exists() and not args.dry_run:
        raise InputError(f"{out_dir} holds a training already: --init_from resume goes on with it, another --out_dir leaves it alone")
    elif args.init_from != "teacher":
        start = load_model(args.init_from, model=task.model)[0]
    model = UNet(**(checkpoint["model"] if checkpoint else {**start.config, "one_step": True}))
    if not checkpoint:
        model.load_state_dict(start.state_dict())
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
    ema = EMA(model, args.ema)
    step, scores = 0, {}  # scores: of the last validation
    if checkpoint:
        model.load_state_dict(checkpoint["params"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema.load_state_dict(checkpoint["ema"])
        step, scores = checkpoint["step"], checkpoint["scores"]
        say(f"resumed at step {step}" + (f", not as before: {', '.join(f'--{k}' for k in other)}" if other else ""))
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    net = torch.compile(model) if args.compile else model
    net = DistributedDataParallel(net, device_ids=[device.index] if device.type == "cuda" else None) if ddp else net
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
            params=model.state_dict(), ema=ema.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers]))

    def predict(x_in):  # with the averaged weights, along the dial; and the teacher in a few steps, or halfway along the straight line
        with autocast():
            return {**{f"t{t:g}": one_step(ema_model, x_in, t) for t in (0, 0.5, 1)},
                    "teacher": (one_step(teacher, x_in, 0.0) + one_step(teacher, x_in, 1.0)) / 2 if straight else
                    integrate(teacher, x_in, "midpoint", args.eval_steps)[0]}

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
    weights = torch.tensor([1.0, args.lambda_align, args.lambda_bc], device=device)  # Eq. (12)
    sums = torch.zeros(4, device=device)  # the three losses and their count, since the last log line
    clock, clock_step, saved = time.time(), step, step  # saved: the step that ckpt.pt holds
    while True:
        if step > saved and (step % args.eval_interval == 0 or step >= args.max_iters or stop):
            if master and not stop:
                ema.copy_to(ema_model)
                scores, grid = validate(predict, val, task, lpips, device)
                log(dict(step=step, **scores))
                data.write_image(out_dir / f"val_{step:07d}.png", grid)
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
            x_1 = data.to_float(x_1.to(device, non_blocking=True))
            seeds, t = data.image_seeds(args.seed, n).to(device), data.uniform_times(args.seed, n).to(device)
            t = args.t_min + (args.t_max - args.t_min) * t
            s, t = (t + args.dt).clamp(1e-3, 1), t.clamp(min=0)
            x_in = kernels.noise_augment(data.degrade(x_1, task, seeds), task.sigma_p, seeds)
            last = micro == args.gradient_accumulation_steps - 1
            with net.no_sync() if ddp and not last else nullcontext(), autocast():
                losses = distillation_losses(net, teacher, x_in, t, s, args.solver, args.objective)
                ((losses * weights).sum() / args.gradient_accumulation_steps).backward()
            sums[:3] += losses.detach()
            sums[3] += 1
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
            parts = sums[:3] / sums[3]
            loss = (parts * weights).sum().item()
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step}: lower --learning_rate; {out_dir}/ckpt.pt stays as it was")
            speed = (step - clock_step) * per_step / (time.time() - clock)
            if master:
                distill, align, bc = parts.tolist()
                log(dict(step=step, loss=loss, distill=distill, align=align, bc=bc, grad_norm=norm.item(),
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
        sys.exit(f"distill.py: {str(e).splitlines()[-1].removeprefix('model.InputError: ')}")
