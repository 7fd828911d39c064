"""Train a small ResShift from scratch, in pixels: a teacher of another family to distil, on a machine without a GPU.

    python examples/train_resshift.py --data_dir DIR --steps 4 --max_iters 3000 -o out/resshift4.safetensors
    python distill.py --teacher resshift:out/resshift4.safetensors --data_dir DIR

The published loss without its LPIPS: mean squared error of the predicted picture at a step drawn at random.
"""
import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # run from anywhere

import data
import kernels
from degradations import degrade, to_float
from model import PRESETS, save_release
from resshift import ResShift, sqrt_eta


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    data.add_task_flags(p)
    p.add_argument("--data_dir", help="folder of pictures")
    p.add_argument("--steps", type=int, choices=(4, 15), default=4, help="of the chain")
    p.add_argument("--kappa", type=float, default=0.5, help="its noise, on the [-1, 1] scale")
    p.add_argument("--min_noise", type=float, default=0.05, help="kappa sqrt(eta) of its last step")
    p.add_argument("--batch_size", type=int, default=16)
    p.add_argument("--max_iters", type=int, default=3000)
    p.add_argument("--learning_rate", type=float, default=5e-4)
    p.add_argument("--ema", type=float, default=0.999)
    p.add_argument("-o", "--output", default="out/resshift.safetensors")
    args = p.parse_args(argv)
    task = data.resolve_task(args)
    torch.manual_seed(0)
    # min_noise is kappa sqrt(eta_1), except where kappa < 1, as the published schedule has it: there sqrt(eta_1) itself
    schedule = dict(steps=args.steps, kappa=args.kappa, min_noise=args.min_noise, power=0.3, pixels=True)
    net, average = (ResShift(PRESETS["resshift_small"]["net"], schedule) for _ in range(2))
    average.requires_grad_(False).load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=args.learning_rate, fused=True)
    batches = data.training_batches(data.find_data(task, args.data_dir)[0], task, 0, args.batch_size, 0, 0, 1, 0)
    clock, total = time.time(), 0.0
    for step in range(args.max_iters):
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (step + 1) / 100) * (1 - step / args.max_iters)
        x_1, n = next(batches)
        x_1, seeds = to_float(x_1), data.image_seeds(0, n)
        x_lr = degrade(x_1, task, seeds)
        i = torch.randint(args.steps, (len(x_1),)).float()
        tau = sqrt_eta(i, **net.times)
        eta, noise = (tau**2).view(-1, 1, 1, 1), (args.kappa * tau).view(-1, 1, 1, 1)
        x_t = x_1 + eta * (x_lr - x_1) + noise * kernels.normal(seeds, x_1.shape)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(net.clean(x_t, x_lr, i, tau).float(), x_1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in net.parameters()], 1 - min(args.ema, (1 + step) / (10 + step)))
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {total / 100:.5f}  pictures/s {100 * args.batch_size / (time.time() - clock):.1f}", flush=True)
            clock, total = time.time(), 0.0
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    save_release(args.output, average, dict(stage="flow", task=asdict(task), step=args.max_iters))


if __name__ == "__main__":
    main()
