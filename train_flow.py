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

import torch
from tqdm import tqdm

import data
import kernels
import resshift
import training
from console import InputError, absent, in_range
from flow import integrate, one_step
from metrics import load_lpips
from model import PRESETS, build, load_model, network_config, preset_name


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    data.add_task_flags(p)
    p.add_argument("--loss", choices=("l1", "l2"), help="D of Eq. (5) (default: the task's)")
    p.add_argument("--t0_share", type=in_range(float, 0, 0.99), default=0, help="share of the pictures trained at t = 0 alone, where the most faithful picture comes from")
    p.add_argument("--autoencoder", metavar="FILE", help="of --model resshift: train in the latents of its autoencoder, the published file (without one on pixels)")
    p.add_argument("--out_dir", help="where to write (default: out/DATASET_flow)")
    p.add_argument("--init_from", default="scratch", help="scratch, resume (out_dir/ckpt.pt, exactly), auto (resume where there is something to resume, else scratch), or a file of weights to start from")
    training.add_training_flags(p)
    p.add_argument("--keep_best", choices=("psnr_one", "psnr_few", "lpips_one", "lpips_few"), help="keep the checkpoint whose validation was best by this, as ckpt_best.pt")
    return p.parse_args(argv)


def flow_loss(model, x_in, target, t, kind):
    """Eq. (5) of each picture: x_in = concat(x_t, x_lr) (B, 6, H, W), target x_1 - x_0 (B, 3, H, W), t (B,) -> (B,)."""
    error = model(x_in, t).float() - target
    return (error.abs() if kind == "l1" else error.square()).mean(dim=(1, 2, 3))


def make_pair(x_1, x_lr, seeds, t, task, args, to_latents):
    """What the network is given, and shown: x_1, x_lr (B, 3, S, S), seeds and t in [0, 1) (B,) -> x_in (B, 6, S, S), target (B, 3, S, S), t (B,).

    In the network's space, smaller where it has an autoencoder: to_latents.
    """
    t = ((t - args.t0_share) / (1 - args.t0_share)).clamp(min=0)
    return *kernels.flow_training_pair(to_latents(x_1), to_latents(x_lr), t, task.sigma_p, seeds), t


def start_network(args, task, train_paths, start, meta, low=None):
    """What a new run starts from: (arguments of UNet, its weights or None). start and meta: what --init_from names, if a file. Raises InputError if it does not fit."""
    if start is None:
        precond = PRESETS[task.model].get("precond")
        sigma_d = data.measure_sigma_d(train_paths, task, args.seed, low=low) if precond and train_paths else 1.0  # 1: a dry run without data
        config = network_config(task.model, task.condition, task.sigma_p, sigma_d)
        return resshift.new_flow(config, args.autoencoder, args.dry_run) if args.autoencoder else (config, None)
    if meta["stage"] == "distill":
        raise InputError(f"{args.init_from} is a distilled student: stage 1 starts from scratch or from a flow")
    if (name := preset_name(start)) != task.model:
        raise InputError(f"{args.init_from} holds the network {name!r}, not {task.model!r}: say --model {name}" if name else f"{args.init_from} does not hold the network {task.model!r}")
    if start.config.get("condition", True) != task.condition:
        raise InputError(f"{args.init_from} {'does not see' if task.condition else 'sees'} x_lr: {'--no_condition' if task.condition else '--condition'} trains such a network")
    if start.precond and start.precond["sigma_p"] != task.sigma_p:
        raise InputError(f"{args.init_from} was trained with --sigma_p {start.precond['sigma_p']}, not {task.sigma_p}: give the same")
    return start.config, start.state_dict()


def main(argv=None):
    args = parse_args(argv)
    task = data.resolve_task(args)
    if args.autoencoder and not (task.model.startswith("resshift") and args.init_from in ("scratch", "auto", "resume")):
        raise InputError("--autoencoder is of a new flow of --model resshift: a file of --init_from has its own")

    # --- processes and device ---
    out_dir = args.out_dir or f"out/{task.name}_flow"
    training.resolve_auto(args, out_dir, "scratch")
    run = training.begin("flow", task, args, out_dir)

    # --- data ---
    checkpoint = training.find_checkpoint(run)
    named = args.init_from not in ("scratch", "resume") and not absent(args, args.init_from)
    start, meta = load_model(args.init_from, model=task.model) if named else (None, None)
    train_paths, val_paths = training.find_pictures(run, checkpoint, [meta])

    # --- model ---
    config, weights = (checkpoint["model"], checkpoint["params"]) if checkpoint else start_network(args, task, train_paths, start, meta, run.low)
    with torch.device("meta" if args.dry_run else "cpu"):
        model = build(config)
    training.announce(run, model, train_paths, val_paths)
    if args.dry_run:
        return
    if weights:
        model.load_state_dict(weights)
    model.to(run.device, memory_format=torch.channels_last)
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    training.spare_memory(model, run)
    state = training.first_state(run, model)
    if checkpoint:
        training.restore(run, state, checkpoint)
    training.open_folder(run, state)
    if args.compile:
        model.compile()
    net = training.parallel(model, run)

    # --- validation and log ---
    lpips = load_lpips(args.lpips_backbone, run.device) if run.master else None
    val = training.validation_pictures(run, val_paths) if run.master else None
    training.check_best(run, lpips, val)

    def predict(x_lr, seeds):  # with the averaged weights, in one step and in a few
        with run.autocast():
            x_in = ema_model.start(ema_model.to_latents(x_lr), task.sigma_p, seeds)
            found = {"one": one_step(ema_model, x_in, 0.0), "few": integrate(ema_model, x_in, "midpoint", args.eval_steps)[0]}
            return {name: ema_model.to_pixels(x) for name, x in found.items()}

    # --- the loop ---
    signals, stop = training.Signals(), 0  # stop: the signal that all processes have agreed to stop for
    batches = training.batches(run, train_paths, state.seen)
    meter = training.Meter(run, (2, 10), state.step)  # loss and count by tenth of t
    bar = tqdm(total=args.max_iters, initial=state.step, disable=None if run.master else True, unit="step")
    with training.last_save(run, state):
        while True:
            due = state.step % args.eval_interval == 0 or state.step >= args.max_iters
            if state.step and (due or stop):
                if state.step > state.saved:
                    training.check(run, state, meter, train_paths)
                    training.save(run, state)
                if not stop:
                    state.ema.copy_to(ema_model)
                if run.master and state.step > state.validated and not stop:
                    training.validate(run, state, predict, val, lpips, signals)
                stop = stop or signals.agreed(run)
                meter.restart_clock(state.step)
            if state.step >= args.max_iters or stop:
                break

            training.before_update(run, state)
            for micro in range(args.gradient_accumulation_steps):
                x_1, x_lr, n, seeds, t = training.next_batch(run, batches)
                training.exchange_gradients(net, micro == args.gradient_accumulation_steps - 1)
                with run.autocast():
                    x_in, target, t = make_pair(x_1, x_lr, seeds, t, task, args, model.to_latents)
                    losses = flow_loss(net, x_in, target, t, task.loss)
                    loss = losses.mean()
                    (loss / args.gradient_accumulation_steps).backward()
                meter.add(loss)
                tenth = (t * 10).long().clamp(max=9)
                meter.sums[0].index_add_(0, tenth, losses.detach())
                meter.sums[1].index_add_(0, tenth, torch.ones_like(losses))
            norm = training.update(run, state)
            bar.update()

            stop = signals.agreed(run)
            if state.step % args.log_interval == 0:
                training.check(run, state, meter, train_paths)
                sums, speed = meter.read(state.step)
                loss = (sums[0].sum() / sums[1].sum()).item()
                by_t = [round(a / max(b, 1), 5) for a, b in zip(*sums.tolist())]
                training.log(run, dict(step=state.step, loss=loss, grad_norm=norm.item(), lr=training.learning_rate(state.step - 1, args),
                                       images_per_s=speed, loss_by_t=by_t), hidden=("loss_by_t",))
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.1f}")
    bar.close()
    if state.step >= args.max_iters:
        training.release(run, state, ema_model)
    training.end(run, state, stop)


if __name__ == "__main__":
    training.program(main, "train_flow.py")
