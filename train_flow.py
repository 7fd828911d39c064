"""Stage 1: train the rectified flow from noised low-resolution pictures to high-resolution ones (Eq. 4, 5).

On a CPU, to see it run:    python train_flow.py --data_dir DIR --image_size 96 --batch_size 8 --max_iters 1000
On one GPU:                 torchrun train_flow.py --dataset ffhq --data_dir DIR
On eight:                   torchrun --nproc_per_node 8 train_flow.py --dataset ffhq --data_dir DIR
On two machines:            torchrun --nnodes 2 --node_rank R --master_addr HOST --nproc_per_node 8 train_flow.py ...
What would run:             python train_flow.py --dataset imagenet --dry_run
To go on after a stop:      the same command with --init_from resume

Writes ckpt.pt, log.jsonl and pictures of the validation set under --out_dir, and at the end weights.safetensors
(the averaged weights in bfloat16, to keep or to share).
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
from console import InputError, in_range
from degradations import degrade, to_float
from evaluate import load_lpips, validate
from model import (
    EMA,
    PRESETS,
    UNet,
    count_macs,
    keep_freed_memory,
    learning_rate,
    load_model,
    make_optimizers,
    network_config,
    pick_device,
    pick_dtype,
    resume,
    rewind_log,
    save_checkpoint,
    save_release,
)
from pictures import write_picture
from sample import integrate, one_step


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    number, whole = in_range(float, 0), in_range(int, 0)
    data.add_task_flags(p)
    p.add_argument("--loss", choices=("l1", "l2"), help="D of Eq. (5) (default: the task's)")
    p.add_argument("--t0_share", type=in_range(float, 0, 0.99), default=0, help="share of the pictures trained at t = 0 alone, where the most faithful picture comes from")
    p.add_argument("--data_dir", help="folder of pictures, searched through (default: data/DATASET)")
    p.add_argument("--out_dir", help="where to write (default: out/DATASET_flow)")
    p.add_argument("--init_from", default="scratch", help="scratch, resume (out_dir/ckpt.pt, exactly), or a file of weights to start from")
    p.add_argument("--seed", type=in_range(int, 0, 2**31 - 1), default=1337, help="fixes order, crops, flips, noise and initial weights")
    p.add_argument("--batch_size", type=in_range(int, 1), default=32, help="pictures a step and process")
    p.add_argument("--gradient_accumulation_steps", type=in_range(int, 1), default=1, help="batches summed before an update")
    p.add_argument("--max_iters", type=in_range(int, 1), default=100_000, help="updates in all")
    p.add_argument("--optimizer", choices=("adam", "muon"), default="adam", help="adam, the paper's; or muon for the convolutions, adam for the rest")
    p.add_argument("--learning_rate", type=number, default=1e-4, help="after the warm-up")
    p.add_argument("--warmup_iters", type=whole, default=1000, help="updates over which the learning rate rises")
    p.add_argument("--lr_decay", choices=("none", "linear", "cosine"), default="none", help="how it falls to 0 at max_iters")
    p.add_argument("--grad_clip", type=number, default=1.0, help="largest gradient norm; 0 disables")
    p.add_argument("--ema", type=in_range(float, 0, 1), default=0.9999, help="decay of the weights' moving average")
    p.add_argument("--eval_interval", type=in_range(int, 1), default=1000, help="updates between validations, each of which saves")
    p.add_argument("--eval_pictures", type=in_range(int, 1), default=16, help="validation pictures")
    p.add_argument("--eval_steps", type=in_range(int, 1), default=4, help="midpoint steps of the few-step prediction")
    p.add_argument("--log_interval", type=in_range(int, 1), default=50, help="updates between lines of log.jsonl")
    p.add_argument("--always_save_checkpoint", action="store_true", help="keep ckpt_STEP.pt of every validation beside the newest")
    p.add_argument("--lpips_backbone", help="file of torchvision's AlexNet weights (default: torchvision's cache)")
    p.add_argument("--num_workers", type=in_range(int, -1), default=-1, help="processes that read pictures; -1: 0 on a CPU, else up to 8")
    p.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    p.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--dry_run", action="store_true", help="print settings, parameters and MACs, and stop")
    return p.parse_args(argv)


def flow_loss(model, x_in, target, t, kind):
    """Eq. (5) of each picture: x_in = concat(x_t, x_lr) (B, 6, H, W), target x_1 - x_0 (B, 3, H, W), t (B,) -> (B,)."""
    error = model(x_in, t).float() - target
    return (error.abs() if kind == "l1" else error.square()).mean(dim=(1, 2, 3))


def main(argv=None):
    args = parse_args(argv)
    task = data.resolve_task(args)
    out_dir = Path(args.out_dir or f"out/{task.name}_flow")

    # --- processes and device ---
    rank, world, local_world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    keep_freed_memory()
    device = pick_device(args.device)
    ddp, master = world > 1, rank == 0
    if ddp:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    dtype = pick_dtype(args.dtype, device)
    autocast = (lambda: torch.autocast(device.type, dtype)) if dtype != torch.float32 else nullcontext
    torch.manual_seed(args.seed)  # the initial weights; everything else is drawn by picture number
    say = tqdm.write if master else lambda text: None

    # --- data ---
    try:
        train_paths, val_paths = data.find_data(task, args.data_dir)
    except InputError as e:
        if not args.dry_run:
            raise
        train_paths, val_paths = [], []
        say(str(e))

    # --- model ---
    now, checkpoint = {**vars(args), "world": world}, None
    if args.init_from == "resume":
        checkpoint, other = resume(out_dir / "ckpt.pt", "flow", asdict(task), now)
        config = checkpoint["model"]
    elif (out_dir / "ckpt.pt").exists() and not args.dry_run:
        raise InputError(f"{out_dir} holds a training already: --init_from resume goes on with it, another --out_dir leaves it alone")
    elif args.init_from != "scratch":
        start, meta = load_model(args.init_from, model=task.model)
        config = meta["model"]
        if meta["stage"] == "distill":
            raise InputError(f"{args.init_from} is a distilled student: stage 1 starts from scratch or from a flow")
        if config.get("precond") and config["precond"]["sigma_p"] != task.sigma_p:
            raise InputError(f"{args.init_from} was trained with --sigma_p {config['precond']['sigma_p']}, not {task.sigma_p}: give the same")
    else:
        precond = PRESETS[task.model].get("precond")
        sigma_d = data.measure_sigma_d(train_paths, task, args.seed) if precond and train_paths else 1.0  # 1: a dry run without data
        config = network_config(task.model, task.condition, task.sigma_p, sigma_d)
    with torch.device("meta" if args.dry_run else "cpu"):
        model = UNet(**config)
    if task.image_size % model.multiple:
        raise InputError(f"--image_size {task.image_size} is not a multiple of {model.multiple}, which the network {task.model!r} needs")
    say(f"{task}")
    say(f"{' '.join(f'{k}={v}' for k, v in vars(args).items() if k not in data.Task.__dataclass_fields__)}")
    say(f"{len(train_paths)} training and {len(val_paths)} validation pictures; {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{count_macs(model, task.image_size, task.image_size) / 1e9:.2f} GMACs a picture; global batch "
        f"{args.batch_size * args.gradient_accumulation_steps * world}; {device}, {dtype}, {world} process(es)")
    if args.dry_run:
        return
    if args.init_from not in ("scratch", "resume"):
        model.load_state_dict(start.state_dict())
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
        say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items() if k != "loss_by_t"))

    def save(name="ckpt.pt"):
        if not all(p.isfinite().all() for p in model.parameters()):
            raise InputError(f"the weights are not finite at step {step}: lower --learning_rate; {out_dir}/ckpt.pt stays as it was")
        save_checkpoint(out_dir / name, dict(
            stage="flow", task=asdict(task), model=model.config, step=step, scores=scores, args=now,
            params=model.state_dict(), ema=ema.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers]))

    def predict(x_in):  # with the averaged weights, in one step and in a few
        with autocast():
            return {"one": one_step(ema_model, x_in, 0.0), "few": integrate(ema_model, x_in, "midpoint", args.eval_steps)[0]}

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
    sums = torch.zeros(2, 10, device=device)  # loss and count by tenth of t, since the last log line
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
            t = ((t - args.t0_share) / (1 - args.t0_share)).clamp(min=0)
            x_in, target = kernels.flow_training_pair(x_1, degrade(x_1, task, seeds), t, task.sigma_p, seeds)
            last = micro == args.gradient_accumulation_steps - 1
            with net.no_sync() if ddp and not last else nullcontext(), autocast():
                losses = flow_loss(net, x_in, target, t, task.loss)
                (losses.mean() / args.gradient_accumulation_steps).backward()
            tenth = (t * 10).long().clamp(max=9)
            sums[0].index_add_(0, tenth, losses.detach())
            sums[1].index_add_(0, tenth, torch.ones_like(losses))
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
            loss = (sums[0].sum() / sums[1].sum()).item()
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step}: lower --learning_rate; {out_dir}/ckpt.pt stays as it was")
            speed = (step - clock_step) * per_step / (time.time() - clock)
            if master:
                by_t = [round(a / max(b, 1), 5) for a, b in zip(*sums.tolist())]
                log(dict(step=step, loss=loss, grad_norm=norm.item(), lr=learning_rate(step - 1, args), images_per_s=round(speed, 1), loss_by_t=by_t))
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.1f}")
            sums.zero_()
            clock, clock_step = time.time(), step
    bar.close()
    if master and step >= args.max_iters:
        ema.copy_to(ema_model)
        save_release(out_dir / "weights.safetensors", ema_model, dict(stage="flow", task=asdict(task), step=step, scores=scores))
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
        sys.exit(f"train_flow.py: {str(e).splitlines()[-1].removeprefix('console.InputError: ')}")
