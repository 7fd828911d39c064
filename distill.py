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

import torch
from tqdm import tqdm

import data
import kernels
import teachers
import training
from checkpoints import file_sha256
from console import in_range
from flow import RK2_NODES, integrate, mean_slope, one_step
from metrics import load_lpips
from model import build
from perceptual import Critic, add_perceptual_flags, check_teacher, critic_loss, perceptual_losses


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    data.add_task_flags(p)
    p.add_argument("--teacher", help="stage-1 weights (default: the newest of this task under out/, else the shipped ones), or resshift:FILE, or dit4sr:DIR, or package.module:function")
    teachers.add_teacher_flags(p)
    p.add_argument("--loss", dest="objective", choices=("oftsr", "boot", "pinn", "perceptual"), default="oftsr", help="Eq. (9), (16) or (15); or the truth as the flow sees it, for a finished student")
    p.add_argument("--dt", type=in_range(float, 1e-4, 1), default=0.05, help="time step s - t")
    p.add_argument("--solver", choices=("euler", *RK2_NODES), default="midpoint", help="of the teacher's step from t to s")
    p.add_argument("--lambda_align", type=in_range(float, 0), default=0.01, help="weight of Eq. (10)")
    p.add_argument("--lambda_bc", type=in_range(float, 0), default=0.1, help="weight of Eq. (11)")
    p.add_argument("--align_grad", action="store_true", help="the gradient of Eq. (10) flows through x_t and the teacher too, which the paper leaves open")
    p.add_argument("--in_turn", action="store_true", help="the student's evaluations at t, 0 and s one after the other, not in one batch: a third of the memory")
    p.add_argument("--t_min", type=in_range(float, -1, 1), default=0.01, help="t is uniform from here; below 0, a step begins at 0 and is shorter, so that s covers (0, dt) too")
    p.add_argument("--t_max", type=in_range(float, 0, 1), default=0.99, help="to here; with 1 - dt, no step is cut short at 1")
    p.add_argument("--out_dir", help="where to write (default: out/DATASET_distill; for --loss perceptual out/DATASET_perceptual)")
    p.add_argument("--init_from", help="teacher, resume (out_dir/ckpt.pt, exactly), auto (resume where there is something to resume, else the default), or a file of weights to start from (default: teacher; for --loss perceptual the newest student under out/)")
    add_perceptual_flags(p)
    training.add_training_flags(p)
    p.add_argument("--keep_best", choices=("psnr_t0", "psnr_t0.5", "psnr_t1", "lpips_t0", "lpips_t0.5", "lpips_t1"), help="keep the checkpoint whose validation was best by this, as ckpt_best.pt")
    args = p.parse_args(argv)
    if args.t_min > args.t_max:
        p.error(f"--t_min {args.t_min} is above --t_max {args.t_max}")
    if args.in_turn and args.objective != "oftsr":
        p.error(f"--in_turn: the evaluations of --loss {args.objective} depend on each other, those of oftsr do not")
    if args.objective in ("boot", "pinn") and args.t_max == 1:
        p.error("--t_max 1: Eq. (15) and (16) divide by 1 - t or s - t, which would be 0: stay below 1")
    return args


def distillation_losses(student, teacher, x_in, t, s, solver="midpoint", objective="oftsr", align_grad=False):
    """Algorithm 1, lines 8 to 11: (3,) = [Eq. (9), or (15) or (16), then Eq. (10), Eq. (11)], means over all elements.

    x_in = concat(x_0, x_lr) (B, 6, H, W); t < s (B,). The student's three evaluations are one batch, so are the teacher's two.
    The paper prints no stop-gradient in Eq. (10); here the teacher and x_t are constants in it, unless align_grad.
    """
    zero = torch.zeros_like(t)
    v_phi = student(x_in.repeat(3, 1, 1, 1), torch.cat([t, s, zero])).float()  # at t, s and 0, always from x_0
    v_t, v_s, _ = v_phi.chunk(3)
    with torch.no_grad():
        x_t_in = kernels.student_state(x_in, v_t, t)  # Eq. (7)
        v_theta = teacher(torch.cat([x_t_in, x_in]), torch.cat([t, zero])).float()  # at (x_t, t) and (x_0, 0)
        v_step = mean_slope(teacher, x_t_in, v_theta[: len(t)], t, s - t, solver).float()
    losses = kernels.distill_loss(v_phi, v_step, v_theta, t, s)
    if align_grad:
        losses = torch.stack([losses[0], align_through(teacher, x_in, v_t, t), losses[2]])
    if objective == "oftsr":
        return losses
    error = {"boot": boot_error, "pinn": pinn_error}[objective](v_t, v_s, v_step, t, s)
    return torch.cat([error.square().mean()[None], losses[1:]])


def align_through(teacher, x_in, v_t, t):
    """Eq. (10) with the gradient through x_t = x_0 + t v_phi and the teacher: x_in (B, 6, H, W), v_t (B, 3, H, W), t (B,) -> a number."""
    (x_0, x_lr), times = x_in.chunk(2, dim=1), t.view(-1, 1, 1, 1)
    v_theta = teacher(torch.cat([x_0 + times * v_t, x_lr], dim=1), t).float()
    return ((1 - times) * (v_t - v_theta)).square().mean()


def losses_in_turn(student, teacher, x_in, t, s, solver="midpoint", align_grad=False):
    """distillation_losses one by one: yields Eq. (10), Eq. (11), Eq. (9).

    Each depends on one evaluation of the student alone. Whoever goes backward through each before asking for the next needs
    the memory of one, not of three.
    """
    zero = torch.zeros_like(t)
    v_t = student(x_in, t).float()
    with torch.no_grad():
        x_t_in = kernels.student_state(x_in, v_t, t)  # Eq. (7)
        v_theta = teacher(x_t_in, t).float()
        target = kernels.distill_target(v_t, mean_slope(teacher, x_t_in, v_theta, t, s - t, solver).float(), t, s)
        v_bc = teacher(x_in, zero).float()
    yield align_through(teacher, x_in, v_t, t) if align_grad else ((1 - t.view(-1, 1, 1, 1)) * (v_t - v_theta)).square().mean()
    yield (student(x_in, zero).float() - v_bc).square().mean()
    yield (student(x_in, s).float() - target).square().mean()


def backward_in_turn(student, teacher, x_in, t, s, args, exchange):
    """A backward pass through each of losses_in_turn, weighted as in Eq. (12): distillation_losses' (3,), without gradient.

    exchange: whether this batch is the last before an update, so that the last pass exchanges gradients between processes.
    """
    turns, losses = losses_in_turn(student, teacher, x_in, t, s, args.solver, args.align_grad), []
    for weight, last in ((args.lambda_align, False), (args.lambda_bc, False), (1, True)):
        training.exchange_gradients(student, exchange and last)  # known before the student is evaluated
        loss = next(turns)
        (weight * loss / args.gradient_accumulation_steps).backward()
        losses.append(loss.detach())
    return torch.stack(losses).roll(1)


def boot_error(v_t, v_s, v_step, t, s):
    """What Eq. (16) squares. With lambda = 1 - t (1-s) / (s (1-t)), lambda (1-t) = (s-t) / s: it is Eq. (9)'s error over lambda^2."""
    lam = (1 - t * (1 - s) / (s * (1 - t))).view(-1, 1, 1, 1)
    return (v_s - kernels.distill_target(v_t, v_step, t, s)) / lam**2


def pinn_error(v_t, v_s, v_step, t, s):
    """What Eq. (15) squares: only the teacher is stopped, the gradient flows through v_phi at both s and t."""
    s, dt = s.view(-1, 1, 1, 1), (s - t).view(-1, 1, 1, 1)
    return s / dt * (v_s - v_t) + v_t - v_step.detach()


def make_times(t, args, t_last=1.0):
    """The teacher's step: t (B,) in [0, 1) -> t uniform from t_min to t_max, and s = min(t + dt, 1); t is at least 0, s above it.

    What would begin after t_last, the last time that the teacher was trained at, begins there, and is longer.
    """
    t = args.t_min + (args.t_max - args.t_min) * t
    return t.clamp(0, t_last), (t + args.dt).clamp(1e-3, 1)


def main(argv=None):
    args = parse_args(argv)
    perceptual = args.objective == "perceptual"
    out_dir = args.out_dir or f"out/{args.dataset}_{'perceptual' if perceptual else 'distill'}"
    training.resolve_auto(args, out_dir, None)
    teacher, task, teacher_meta = teachers.load_teacher(args, out_dir)
    if perceptual:
        check_teacher(teacher, task)
    args.init_from = args.init_from or (teachers.newest(args.dataset, "distill", args.dry_run) if perceptual else "teacher")

    # --- processes and device ---
    run = training.begin("distill", task, args, out_dir)
    run.settings.update(teacher_step=teacher_meta["step"], teacher_sha256=file_sha256(args.teacher))

    # --- data ---
    checkpoint = training.find_checkpoint(run)
    model, meta = (build(checkpoint["model"]), None) if checkpoint else teachers.first_student(args, task, teacher)
    train_paths, val_paths = training.find_pictures(run, checkpoint, [teacher_meta, meta])

    # --- model ---
    training.announce(run, model, train_paths, val_paths)
    if args.dry_run:
        return
    if checkpoint:
        model.load_state_dict(checkpoint["params"])
    teacher.to(run.device)
    model.to(run.device, memory_format=torch.channels_last)
    critic = Critic(teacher.feature_channels).to(run.device, memory_format=torch.channels_last) if perceptual else None
    ema_model = copy.deepcopy(model).eval().requires_grad_(False)
    training.spare_memory(model, run)
    state = training.first_state(run, model, critic)
    if checkpoint:
        training.restore(run, state, checkpoint)
    training.open_folder(run, state)
    if args.compile:
        model.compile()
    net = training.parallel(model, run)
    judge = training.parallel(critic, run) if perceptual else None

    # --- validation and log ---
    lpips = load_lpips(args.lpips_backbone, run.device) if run.master else None
    val = training.validation_pictures(run, val_paths) if run.master else None
    training.check_best(run, lpips, val)

    def predict(x_lr, seeds):  # with the averaged weights, along the dial; and the teacher in a few steps
        with run.autocast():
            x_in = teacher.start(teacher.to_latents(x_lr), task.sigma_p, seeds)
            found = {**{f"t{t:g}": one_step(ema_model, x_in, t) for t in (0, 0.5, 1)}, "teacher": integrate(teacher, x_in, "midpoint", args.eval_steps)[0]}
            return {name: teacher.to_pixels(x) for name, x in found.items()}

    # --- the loop ---
    parts = {"looks": 1, "truth": args.lambda_truth, "line": args.lambda_truth, "grid": args.lambda_grid, "adv": args.lambda_adv, "critic": 1} if perceptual else \
        {"distill": 1, "align": args.lambda_align, "bc": args.lambda_bc}  # and their weights, Eq. (12); the critic's loss is its own
    lambdas = torch.tensor([*parts.values()], dtype=torch.float32, device=run.device)
    signals, stop = training.Signals(), 0  # stop: the signal that all processes have agreed to stop for
    batches = training.batches(run, train_paths, state.seen)
    meter = training.Meter(run, (len(parts) + 1,), state.step)  # the losses and the count
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
                last = micro == args.gradient_accumulation_steps - 1
                for module in (net, judge):
                    training.exchange_gradients(module, last)
                with run.autocast():
                    x_in = teacher.start(teacher.to_latents(x_lr), task.sigma_p, seeds)
                    if perceptual:
                        z_in = kernels.noise_augment(x_lr, task.sigma_p, data.image_seeds(args.seed + 1, n).to(run.device))
                        losses, seen, there = perceptual_losses(net, teacher, critic, x_1, x_in, z_in, args.look_min + (1 - args.look_min) * t, t)
                        losses = torch.cat([losses, critic_loss(judge, seen, there)[None]])
                    elif args.in_turn:
                        losses = backward_in_turn(net, teacher, x_in, *make_times(t, args, teacher.t_last), args, last)
                    else:
                        losses = distillation_losses(net, teacher, x_in, *make_times(t, args, teacher.t_last), args.solver, args.objective, args.align_grad)
                    loss = (losses * lambdas).sum()
                    if not args.in_turn:
                        (loss / args.gradient_accumulation_steps).backward()
                meter.add(loss)
                meter.sums[:-1] += losses.detach()
                meter.sums[-1] += 1
            norm = training.update(run, state)
            bar.update()

            stop = signals.agreed(run)
            if state.step % args.log_interval == 0:
                training.check(run, state, meter, train_paths)
                sums, speed = meter.read(state.step)
                means = dict(zip(parts, (sums[:-1] / sums[-1]).tolist()))
                loss = sum(mean * parts[part] for part, mean in means.items() if part != "critic")
                training.log(run, dict(step=state.step, loss=loss, **means, grad_norm=norm.item(), lr=training.learning_rate(state.step - 1, args), images_per_s=speed))
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed:.1f}")
    bar.close()
    if state.step >= args.max_iters:
        training.release(run, state, ema_model)
    training.end(run, state, stop)


if __name__ == "__main__":
    training.program(main, "distill.py")
