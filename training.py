"""What both stages of training share: processes, signals, averages, optimizers, the learning rate, checkpoints, logs.

The loop itself stands in train_flow.py and in distill.py, which differ in teacher and loss. In the order in which they meet
it: the flags; `begin`, one Run a process; `find_checkpoint`, where a run starts; `State`, all that training changes and a
checkpoint holds; `parallel`, several processes as one; `next_batch` to `update`, one step; and at its end signals, log, save.
"""
import argparse
import json
import math
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import folders
from console import InputError, atomic_write, in_range
from degradations import to_float
from model import UNet, count_macs, keep_freed_memory, load_checkpoint, pick_device, pick_dtype, save_release

# Settings that may change on resume: what they change is not what is learnt.
FREE = {"init_from", "max_iters", "out_dir", "data_dir", "eval_interval", "eval_pictures", "eval_steps", "log_interval",
        "always_save_checkpoint", "lpips_backbone", "num_workers", "compile", "dry_run", "dataset"}


# --- flags ---


def add_training_flags(parser):
    """The flags that both stages share, in groups. Those of data.RECIPES are None unless given: `fill_in`."""
    number, whole = in_range(float, 0), in_range(int, 0)
    g = parser.add_argument_group("training")
    g.add_argument("--data_dir", help="folder of pictures, searched through (default: data/DATASET)")
    g.add_argument("--seed", type=in_range(int, 0, 2**31 - 1), default=1337, help="fixes order, crops, flips, noise and initial weights")
    g.add_argument("--batch_size", type=in_range(int, 1), help="pictures a step and process (default: the task's batch, shared by the processes)")
    g.add_argument("--gradient_accumulation_steps", type=in_range(int, 1), default=1, help="batches summed before an update")
    g.add_argument("--max_iters", type=in_range(int, 1), help="updates in all (default: the task's)")
    g = parser.add_argument_group("optimizer")
    g.add_argument("--optimizer", choices=("adam", "muon"), default="adam", help="adam, the paper's; or muon for the convolutions, adam for the rest")
    g.add_argument("--learning_rate", type=number, help="after the warm-up (default: the task's)")
    g.add_argument("--warmup_iters", type=whole, default=1000, help="updates over which the learning rate rises")
    g.add_argument("--lr_decay", choices=("none", "linear", "cosine"), default="none", help="how it falls to 0 at max_iters")
    g.add_argument("--grad_clip", type=number, default=1.0, help="largest gradient norm; 0 disables")
    g.add_argument("--ema", type=in_range(float, 0, 1), default=0.9999, help="decay of the weights' moving average")
    g = parser.add_argument_group("validation and log")
    g.add_argument("--eval_interval", type=in_range(int, 1), default=1000, help="updates between validations, each of which saves")
    g.add_argument("--eval_pictures", type=in_range(int, 1), default=16, help="validation pictures")
    g.add_argument("--eval_steps", type=in_range(int, 1), default=4, help="midpoint steps of the flow (in stage 2 the teacher) in a validation")
    g.add_argument("--log_interval", type=in_range(int, 1), default=50, help="updates between lines of log.jsonl")
    g.add_argument("--always_save_checkpoint", action="store_true", help="keep ckpt_STEP.pt of every validation beside the newest")
    g.add_argument("--lpips_backbone", help="file of torchvision's AlexNet weights (default: torchvision's cache)")
    g = parser.add_argument_group("machine")
    g.add_argument("--num_workers", type=in_range(int, -1), default=-1, help="processes that read pictures; -1: 0 on a CPU, else up to 8")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    g.add_argument("--compile", action="store_true", help="torch.compile the network")
    g.add_argument("--dry_run", action="store_true", help="print settings, parameters and MACs, and stop")


def fill_in(args, recipe, world):
    """What the flags leave open, from a stage's entry in data.RECIPES: whatever `world` is, the global batch is the same. Raises InputError if they cannot share it."""
    batch, max_iters, learning_rate = recipe
    shares = world * args.gradient_accumulation_steps
    if args.batch_size is None and batch % shares:
        raise InputError(f"a batch of {batch} cannot be shared by {shares} (processes x --gradient_accumulation_steps): give --batch_size")
    args.batch_size = args.batch_size or batch // shares
    args.max_iters = args.max_iters or max_iters
    args.learning_rate = learning_rate if args.learning_rate is None else args.learning_rate


# --- processes and device ---


@dataclass
class Run:
    """One training run as one of its processes sees it: what is trained with which settings, and where."""
    stage: str  # "flow" or "distill"
    task: data.Task
    args: argparse.Namespace
    out_dir: Path
    rank: int  # of this process among `world`; local_world of them share the machine
    world: int
    local_world: int
    device: torch.device
    dtype: torch.dtype  # of the network's arithmetic
    settings: dict  # what a checkpoint keeps of all this
    memory: dict = None  # and of the lists of pictures: folders.remember's

    @property
    def master(self):
        return self.rank == 0

    @property
    def per_step(self):
        """Pictures of one update, over all processes: the global batch."""
        return self.args.batch_size * self.args.gradient_accumulation_steps * self.world

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def say(self, text):
        if self.master:
            tqdm.write(text)


def begin(stage, task, args, out_dir):
    """The Run of this process: joins the others that torchrun started, takes its device, seeds what is drawn before the first batch."""
    rank, world, local_world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    fill_in(args, data.RECIPES[task.name][stage], world)
    keep_freed_memory()
    device = pick_device(args.device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)  # the initial weights; everything else is drawn by picture number
    return Run(stage, task, args, Path(out_dir), rank, world, local_world, device, pick_dtype(args.dtype, device), {**vars(args), "world": world})


def end(run, state, stopped):
    """Leaves the other processes; after a signal with the exit code that a scheduler expects, 128 + its number."""
    if run.world > 1:
        dist.destroy_process_group()
    if run.device.type == "cuda":
        run.say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB a process")
    if stopped:
        run.say(f"stopped by a signal at step {state.step}; --init_from resume goes on from there")
        raise SystemExit(128 + stopped)


def parallel(module, run):
    """The module as one of several processes: gradients are their mean."""
    if run.world == 1:
        return module
    return DistributedDataParallel(module, device_ids=[run.device.index] if run.device.type == "cuda" else None)


def exchange_gradients(module, now):
    """Whether the next backward pass exchanges gradients between processes: of the batches that are summed only the last does."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = now


# --- where a run starts ---


def absent(args, path):
    """Whether a dry run does without that file, which is not there (path may be None)."""
    return args.dry_run and not (path and Path(path).is_file())


def find_checkpoint(run):
    """The checkpoint that --init_from resume goes on from, None for a new run. Raises InputError if it is another run's, or would be overwritten."""
    path = run.out_dir / "ckpt.pt"
    if run.args.init_from != "resume":
        if path.exists() and not run.args.dry_run:
            raise InputError(f"{run.out_dir} holds a training already: --init_from resume goes on with it, another --out_dir leaves it alone")
        return None
    checkpoint = load_checkpoint(path)
    if checkpoint.get("stage") != run.stage:
        raise InputError(f"{path} is not a checkpoint of this script (its stage is {checkpoint.get('stage')}, not {run.stage})")
    task = asdict(run.task)
    before = {k: type(v)() for k, v in task.items()} | checkpoint["task"]  # a cell that there was not yet was off
    if changed := [f"{k} {before[k]}, not {v}" for k, v in task.items() if before[k] != v]:
        raise InputError(f"{path} was trained with {'; '.join(changed)}: to resume, give the same")
    for key, flag in (("optimizer", "optimizer"), ("objective", "loss")):
        if (before := checkpoint["args"].get(key)) != run.settings.get(key):
            raise InputError(f"{path} was trained with --{flag} {before}: to resume, give the same")
    return checkpoint


def find_pictures(run, checkpoint, origins=()):
    """The files for training and for validation: two lists of paths. Each picture keeps the part that it had when the run began.

    origins: the metadata of what the run learns or starts from; what those were trained on is remembered with it, and what
    they held out stays out. A dry run that names no folder goes on without pictures, and says why.
    """
    before = [meta["data"] for meta in origins if meta and meta.get("data")]
    memory = (checkpoint or {}).get("data") or {}
    try:
        split = data.find_split(run.task, run.args.data_dir, memory or (before[0] if before else None), quiet=not memory)
        pictures = data.check_split(split, run.task)
    except InputError as e:
        if not run.args.dry_run or run.args.data_dir:
            raise
        run.say(str(e))
        return [], []
    if run.master and not run.args.dry_run:
        run.memory = {**folders.remember(split), "before": memory.get("before", before)}
    return pictures


def announce(run, model, train_paths, val_paths):
    """Says what is about to run. Raises InputError if the network does not take the task's pictures."""
    args, size = run.args, run.task.image_size
    if size % model.multiple:
        raise InputError(f"--image_size {size} is not a multiple of {model.multiple}, which the network {run.task.model!r} needs")
    run.say(f"{run.task}")
    run.say(" ".join(f"{k}={v}" for k, v in vars(args).items() if k not in data.Task.__dataclass_fields__))
    run.say(f"{len(train_paths)} training and {len(val_paths)} validation pictures; {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{count_macs(model, size, size) / 1e9:.2f} GMACs a picture; global batch {run.per_step}; {run.device}, {run.dtype}, {run.world} process(es)")


# --- what training changes, and the checkpoint that holds it ---


@dataclass
class State:
    """All that training changes: a run that goes on from a checkpoint of it is the run that never stopped."""
    model: UNet
    optimizers: list
    ema: "EMA"
    critic: nn.Module = None  # of distill.py --loss perceptual
    step: int = 0  # updates done
    scores: dict = field(default_factory=dict)  # of the last validation


def first_state(run, model, critic=None):
    """The state at step 0 of a model that is on its device: its optimizers, and its average."""
    optimizers = make_optimizers(model, run.args.optimizer, run.args.learning_rate, run.dtype)
    if critic:
        optimizers.append(torch.optim.Adam(critic.parameters(), lr=run.args.learning_rate, betas=(0.5, 0.99)))  # short memory: what it judges changes
    return State(model, optimizers, EMA(model, run.args.ema), critic)


def save(run, state, name="ckpt.pt"):
    """Write the state into the run's folder: tensors and plain types only, so that weights_only=True loads it. Whole or not at all."""
    if not all(p.isfinite().all() for p in state.model.parameters()):
        raise InputError(f"the weights are not finite at step {state.step}: lower --learning_rate; {run.out_dir}/ckpt.pt stays as it was")
    critic = dict(critic=state.critic.state_dict()) if state.critic else {}
    save_checkpoint(run.out_dir / name, dict(
        stage=run.stage, task=asdict(run.task), model=state.model.config, step=state.step, scores=state.scores, args=run.settings, data=run.memory,
        params=state.model.state_dict(), ema=state.ema.state_dict(), optimizers=[o.state_dict() for o in state.optimizers], **critic))


def restore(run, state, checkpoint):
    """Put a checkpoint's contents into the state, and say what is not as it was."""
    state.model.load_state_dict(checkpoint["params"])
    for optimizer, kept in zip(state.optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    state.ema.load_state_dict(checkpoint["ema"])
    if state.critic:
        state.critic.load_state_dict(checkpoint["critic"])
    state.step, state.scores = checkpoint["step"], checkpoint["scores"]
    other = [k for k, v in run.settings.items() if k not in FREE and k not in asdict(run.task) and checkpoint["args"].get(k) != v]
    run.say(f"resumed at step {state.step}" + (f", not as before: {', '.join(f'--{k}' for k in other)}" if other else ""))


def save_checkpoint(path, checkpoint):
    """A dict of tensors and plain types to a file. Atomic."""
    atomic_write(path, lambda tmp: torch.save(checkpoint, tmp))


def release(run, state, ema_model):
    """Write weights.safetensors: the averaged weights to keep or to share."""
    state.ema.copy_to(ema_model)
    save_release(run.out_dir / "weights.safetensors", ema_model, dict(stage=run.stage, task=asdict(run.task), step=state.step, scores=state.scores, data=run.memory))


# --- one step ---


def batches(run, paths, step):
    """The batches of this process from update `step` on, without end: ((B, 3, S, S) uint8, (B,) int64 picture numbers)."""
    workers = run.args.num_workers
    if workers < 0:
        workers = 0 if run.device.type == "cpu" else min(8, os.cpu_count() // run.local_world)
    return data.training_batches(paths, run.task, run.args.seed, run.args.batch_size, step * run.per_step, run.rank, run.world, workers)


def next_batch(run, loader):
    """One batch on the device: x_1 (B, 3, S, S) in [-1, 1], picture numbers n (B,), their noise seeds and times t in [0, 1), (B,)."""
    x_1, n = next(loader)
    x_1 = to_float(x_1.to(run.device, non_blocking=True))
    return x_1, n, data.image_seeds(run.args.seed, n).to(run.device), data.uniform_times(run.args.seed, n).to(run.device)


def learning_rate(step, args):
    """Linear warm-up over args.warmup_iters to args.learning_rate; then, by args.lr_decay, constant or falling to 0 at args.max_iters."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    done = min(1.0, (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters))
    return args.learning_rate * {"none": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[args.lr_decay]


def before_update(run, state):
    """Give every optimizer the rate of the update to come, and seed what the network draws in it (dropout): a resumed run draws the same."""
    torch.manual_seed(run.args.seed * 2**32 + state.step * run.world + run.rank)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, run.args)


def update(run, state):
    """One step of all optimizers with the gradients that have gathered, and of the average: the gradient's norm, before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), run.args.grad_clip or math.inf)
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.model)
    state.step += 1
    return norm


# --- signals ---


class Signals:
    """SIGTERM and SIGINT ask for a last save: `asked` is the number of the one that came, 0 before."""

    def __init__(self):
        self.asked = 0
        for s in (signal.SIGTERM, signal.SIGINT):
            signal.signal(s, self.ask)

    def ask(self, signum, frame):
        self.asked = signum

    def agreed(self, run):
        """The signal that all processes stop for, together, after the same step; 0: they go on."""
        if run.world == 1:
            return self.asked
        flag = torch.tensor(self.asked)  # on the CPU, so that no GPU waits
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


# --- log ---


class Meter:
    """Sums over the steps since the last line of the log, and pictures a second."""

    def __init__(self, run, shape, step):
        self.run, self.sums = run, torch.zeros(shape, device=run.device)
        self.restart_clock(step)

    def restart_clock(self, step):
        """What was done until now (a validation, a save) does not count as training."""
        self.since, self.step = time.time(), step

    def read(self, step):
        """(the sums over all processes, pictures a second); both begin anew."""
        if self.run.world > 1:
            dist.all_reduce(self.sums)
        sums, speed = self.sums.clone(), (step - self.step) * self.run.per_step / (time.time() - self.since)
        self.sums.zero_()
        self.restart_clock(step)
        return sums, round(speed, 1)


def check_loss(run, state, loss):
    """Raises InputError if the loss is not a number."""
    if not math.isfinite(loss):
        raise InputError(f"the loss is {loss} at step {state.step}: lower --learning_rate; {run.out_dir}/ckpt.pt stays as it was")


def log(run, entry, hidden=()):
    """A line for log.jsonl, a dict of plain types with "step", shown on the terminal but for the keys hidden."""
    if run.master:
        with open(run.out_dir / "log.jsonl", "a") as f:
            f.write(json.dumps(entry) + "\n")
        run.say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items() if k not in hidden))


def rewind_log(path, step):
    """Drop from a log.jsonl what came after `step`, which will come again, and a line that a kill cut short."""
    def wanted(line):
        try:
            return json.loads(line)["step"] <= step
        except ValueError:
            return False
    lines = [line for line in path.read_text().splitlines() if wanted(line)] if path.exists() else []
    atomic_write(path, lambda tmp: tmp.write_text("".join(line + "\n" for line in lines)))


# --- optimizers and the average ---


def make_optimizers(model, name, lr, dtype):
    """The optimizers of a model, as a list: Adam; or with "muon", Muon for the inner convolutions and Adam for all else."""
    inner = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 4 and not n.startswith(("input_blocks.0.", "out."))] if name == "muon" else []
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [torch.optim.Adam(rest, lr=lr, fused=rest[0].device.type != "mps"), *([Muon(inner, lr, dtype=dtype)] if inner else [])]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal: of the update's singular values only the sign is kept (Jordan et al. 2024).

    For convolutions: a kernel (O, I, h, w) is taken for a matrix (O, I h w). Steps are scaled to the root mean square
    that Adam's have (.2, Liu et al. 2025), so that learning rates are of Adam's size. dtype: of the orthogonalisation.
    """

    def __init__(self, params, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # kernels of one shape are orthogonalised together
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's look ahead
                alike.setdefault(p.shape, []).append((p, update.flatten(1)))
            for shape, pairs in alike.items():
                ps, updates = zip(*pairs)
                steps = 0.2 * max(updates[0].shape) ** 0.5 * self.orthogonal(torch.stack(updates).to(self.dtype)).float()
                torch._foreach_sub_(list(ps), [s.reshape(shape) for s in steps], alpha=group["lr"])

    @staticmethod
    def orthogonal(x):
        """U V^T of x = U S V^T, (N, O, I), roughly (singular values .7 to 1.2): five Newton-Schulz steps of Jordan's quintic."""
        if x.shape[1] > x.shape[2]:
            return Muon.orthogonal(x.mT).mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
        return x


class EMA:
    """Exponential moving average of a model's parameters, warmed up: decay_n = min(decay, (1 + n) / (10 + n))."""

    def __init__(self, model, decay=0.9999):
        self.decay, self.num_updates = decay, 0
        self.names = [n for n, p in model.named_parameters() if p.requires_grad] or [n for n, _ in model.named_parameters()]
        self.shadow_params = [p.detach().clone() for p in self.of(model)]

    def of(self, model):
        """The parameters that are averaged, the trained ones, of this model or a copy of it."""
        return [model.get_parameter(name) for name in self.names]

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        torch._foreach_lerp_(self.shadow_params, self.of(model), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model):
        """Write the averaged parameters into model."""
        torch._foreach_copy_(self.of(model), self.shadow_params)
        return model

    def state_dict(self):  # the published files' format
        return dict(decay=self.decay, num_updates=self.num_updates, shadow_params=self.shadow_params)

    def load_state_dict(self, state):
        self.num_updates = state["num_updates"]
        torch._foreach_copy_(self.shadow_params, list(state["shadow_params"]))
