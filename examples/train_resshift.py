"""Train a small ResShift from scratch, in pixels: a teacher of another family to distil, on a machine without a GPU.

    python examples/train_resshift.py --data_dir DIR --image_size 32 --steps 15 --kappa 0.2 --min_noise 0.2 --loss velocity --optimizer muon --learning_rate 2e-3
    python distill.py --teacher resshift:out/resshift.safetensors --data_dir DIR --image_size 32 --dt 0.2 --t_min -0.2 --t_max 0.8

The published loss without its LPIPS: mean squared error of the predicted picture at a step drawn at random. An error of the
picture is one of tau + 1/tau times its size of the flow's v (resshift.shift_path), so that what is small in the loss where
there is little noise need not be small there: --loss velocity weighs it as v does. A short training needs that.
The output with the ending .pt holds all of the training every so many steps; the same command goes on from there.
"""
import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere

import data
import kernels
from checkpoints import load_checkpoint, save_checkpoint
from console import InputError
from degradations import degrade, to_float
from model import PRESETS, save_release
from resshift import ResShift, sqrt_eta
from training import make_optimizers


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    data.add_task_flags(p)
    p.add_argument("--data_dir", help="folder of pictures")
    p.add_argument("--steps", type=int, choices=(4, 15), default=4, help="of the chain")
    p.add_argument("--kappa", type=float, default=0.5, help="its noise, on the [-1, 1] scale")
    p.add_argument("--min_noise", type=float, default=0.05, help="kappa sqrt(eta) of its last step")
    p.add_argument("--loss", choices=("picture", "velocity"), default="picture", help="what the squared error is of (default: picture, as published)")
    p.add_argument("--optimizer", choices=("adam", "muon"), default="adam")
    p.add_argument("--batch_size", type=int, default=16)
    p.add_argument("--max_iters", type=int, default=3000)
    p.add_argument("--keep_every", type=int, default=100, help="steps")
    p.add_argument("--stop_at", type=int, help="stop at this step, a multiple of --keep_every, to go on another time")
    p.add_argument("--learning_rate", type=float, default=5e-4)
    p.add_argument("--ema", type=float, default=0.999)
    p.add_argument("-o", "--output", default="out/resshift.safetensors")
    args = p.parse_args(argv)
    task = data.resolve_task(args)
    kept = Path(args.output).with_suffix(".pt")
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # min_noise is kappa sqrt(eta_1), except where kappa < 1, as the published schedule has it: there sqrt(eta_1) itself
    schedule = dict(steps=args.steps, kappa=args.kappa, min_noise=args.min_noise, power=0.3, pixels=True)
    net, average = (ResShift(PRESETS["resshift_small"]["net"], schedule) for _ in range(2))
    average.requires_grad_(False).load_state_dict(net.state_dict())
    optimizers = make_optimizers(net, args.optimizer, args.learning_rate, torch.bfloat16)
    weights = (lambda tau: (tau + 1 / tau) ** 2) if args.loss == "velocity" else torch.ones_like
    mean_weight = weights(sqrt_eta(torch.arange(float(args.steps)), **net.times)).mean()
    start, end = 0, min(args.stop_at or args.max_iters, args.max_iters)
    if kept.is_file():
        before = load_checkpoint(kept)
        if before.get("model") != net.config or not {"step", "net", "average", "optimizers"} <= before.keys():
            sys.exit(f"{kept} is the training of another network or schedule: give another --output")
        start = before["step"]
        net.load_state_dict(before["net"])
        average.load_state_dict(before["average"])
        for optimizer, state in zip(optimizers, before["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    batches = data.training_batches(data.find_data(task, args.data_dir)[0], task, 0, args.batch_size, start * args.batch_size, 0, 1, 0)
    clock, total = time.time(), 0.0
    for step in range(start, end):
        torch.manual_seed(step)  # what a step draws is its own, also after a stop
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (step + 1) / 100) * (1 - step / args.max_iters)
        x_1, n = next(batches)
        x_1, seeds = to_float(x_1), data.image_seeds(0, n)
        x_lr = degrade(x_1, task, seeds)
        i = torch.randint(args.steps, (len(x_1),)).float()
        tau = sqrt_eta(i, **net.times)
        eta, noise = (tau**2).view(-1, 1, 1, 1), (args.kappa * tau).view(-1, 1, 1, 1)
        x_t = x_1 + eta * (x_lr - x_1) + noise * kernels.normal(seeds, x_1.shape)
        with torch.autocast("cpu", torch.bfloat16):
            error = (net.clean(x_t, x_lr, i, tau).float() - x_1).square().mean((1, 2, 3))
        loss = (weights(tau) / mean_weight * error).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in net.parameters()], 1 - min(args.ema, (1 + step) / (10 + step)))
        total += loss.item()
        if (step + 1) % args.keep_every == 0:
            print(f"step {step + 1}  loss {total / args.keep_every:.5f}  pictures/s {args.keep_every * args.batch_size / (time.time() - clock):.1f}", flush=True)
            save_checkpoint(kept, dict(model=net.config, net=net.state_dict(), average=average.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step + 1))
            clock, total = time.time(), 0.0
    if end == args.max_iters:
        save_release(args.output, average, dict(stage="flow", task=asdict(task), step=args.max_iters))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"train_resshift.py: {e}")
