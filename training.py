"""What both stages of training share: processes, signals, averages, optimizers, the learning rate, checkpoints, logs.

The loop itself stands in train_flow.py and in distill.py, which differ in teacher and loss. In the order in which they meet
it: the flags; `begin`, one Run a process; `find_checkpoint`, where a run starts; `State`, all that training changes and a
checkpoint holds; `parallel`, several processes as one; `next_batch` to `update`, one step; and at its end signals, log, save.
"""
import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import boards
import data
import folders
import kernels
import partners
from checkpoints import copy_file, one_before, open_checkpoint, save_checkpoint
from console import InputError, atomic_write, in_range, read_lines, speak_anywhere
from degradations import degrade, to_float
from machine import cpu_name, join_processes, keep_freed_memory, pick_device, pick_dtype
from metrics import psnr_rgb
from model import check_fits, count_macs, named, network_of, save_release
from pictures import write_picture

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Settings that may change on resume: what they change is not what is learnt.
FREE = {"init_from", "max_iters", "out_dir", "data_dir", "lr_dir", "eval_interval", "eval_pictures", "eval_steps", "log_interval",
        "always_save_checkpoint", "keep_best", "lpips_backbone", "num_workers", "compile", "grad_checkpoint", "shard", "dry_run", "dataset", "teacher", "tensorboard", "wandb", "asked"}


PARENT = os.getppid()  # asked early: a launcher may be gone before the loop begins
LPIPS_SIDE = 32  # AlexNet's pooling leaves nothing of less
NO_LOSS = 1e-4  # on pictures in [-1, 1], whose mean squared error this would be at 46 dB


class Diverged(InputError):
    """The training has gone wrong: what it holds now must not be saved over what it held."""


# --- flags ---


def add_training_flags(parser):
    """The flags that both stages share, in groups. Those of data.RECIPES are None unless given: `fill_in`."""
    number, whole = in_range(float, 0), in_range(int, 0)
    g = parser.add_argument_group("training")
    g.add_argument("--lr_dir", help="folder of low-resolution pictures, each of a true picture's name: train on these pairs instead of on what H makes")
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
    boards.add_board_flags(g)
    g = parser.add_argument_group("machine")
    g.add_argument("--num_workers", type=in_range(int, -1), default=-1, help="processes that read pictures; -1: 0 on a CPU, else up to 8")
    g.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the network's arithmetic")
    g.add_argument("--grad_checkpoint", action="store_true", help="keep only what goes from block to block for the backward pass, and make the rest again: less memory, more time")
    g.add_argument("--shard", action="store_true", help="share the weights, their average and the optimizer's numbers out among the processes (torch's FSDP), for networks that are too large for one")
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
    low: dict = None  # {path: path of its low-resolution partner}, with --lr_dir
    memory: dict = None  # and of the lists of pictures: folders.remember's
    lock: object = None  # the open starts.jsonl, which says that the folder is taken
    starts: list = None  # its lines
    found: tuple = None  # `stamp` of the ckpt.pt that it goes on from, or of none
    fell_back: bool = False  # ckpt.pt is broken: going on from the one before it
    boards: list = field(default_factory=list)  # where else the log is shown: boards.open_boards'

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


def program(main, name):
    """Run a script's main: what is wrong ends it in one line, a terminal that goes away does not end it."""
    speak_anywhere()
    sys.stdout, sys.stderr = Tolerant(sys.stdout), Tolerant(sys.stderr)
    try:
        main()
    except (InputError, OSError) as e:  # one from a loader's process comes wrapped in its traceback
        sys.exit(f"{name}: {str(e).splitlines()[-1].removeprefix('console.InputError: ')}")
    except RuntimeError as e:
        if "DataLoader worker" in str(e):
            sys.exit(f"{name}: a process that reads pictures died (killed, or /dev/shm is full: fewer --num_workers need less): {str(e).splitlines()[0]}")
        if dist.is_initialized() and any(word in str(e) for word in ("Connection", "gloo", "NCCL", "Broken pipe")):
            sys.exit(f"{name}: another process of this training is gone: {str(e).splitlines()[0]}")
        raise


class Tolerant:
    """A stream whose reader may go away (`| head`, a closed terminal, a full disk behind >), or that never was (None, after >&-): what is written then is lost, no more."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115, open as long as the program runs

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self):  # what is still in the buffer would raise again, at the very end
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def begin(stage, task, args, out_dir):
    """The Run of this process: joins the others that torchrun started, takes its device, seeds what is drawn before the first batch.

    Raises InputError if there is no such device, or the others cannot be joined.
    """
    rank, world, local_world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    fill_in(args, data.RECIPES[task.name][stage], world)
    boards.check_boards(args)
    keep_freed_memory()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if world > 1:
        join_processes("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)  # the initial weights; everything else is drawn by picture number
    settings = {**vars(args), "asked": [args.batch_size, args.gradient_accumulation_steps], "world": world, "arithmetic": f"{device.type} {dtype}", "torch": str(torch.__version__)}
    return Run(stage, task, args, Path(out_dir), rank, world, local_world, device, dtype, settings)


def end(run, state, stopped):
    """Leaves the other processes and the folder; after a signal with the exit code that a scheduler expects, 128 + its number."""
    boards.close(run)
    if run.lock:
        run.lock.close()
    if run.world > 1:
        dist.all_reduce(torch.zeros(1))  # nobody leaves while another still listens to it
        dist.destroy_process_group()
    if run.device.type == "cuda":
        run.say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB a process")
    if stopped:
        run.say(f"stopped by a signal at step {state.step}; --init_from resume goes on from there")
        raise SystemExit(128 + stopped)


def parallel(module, run):
    """The module as one of several processes: gradients are their mean."""
    if run.world == 1 or isinstance(module, FSDPModule):
        return module
    return DistributedDataParallel(module, device_ids=[run.device.index] if run.device.type == "cuda" else None)


def spare_memory(model, run):
    """What --grad_checkpoint and --shard ask of a model, in place. Raises InputError where it cannot be."""
    stages = [m for m in model.modules() if hasattr(m, "recompute")]
    if run.args.grad_checkpoint and not stages:
        raise InputError("--grad_checkpoint knows blocks that can be made again, which this network has not")
    if run.args.shard and model.config.get("lora"):
        raise InputError("--shard spreads weights that are trained: those of adapters are few, and what they stand on is frozen")
    for stage in stages:
        stage.recompute = run.args.grad_checkpoint
    if run.args.shard:
        shard(model, run)


def shard(model, run):
    """With --shard the weights of every block are spread over the processes, and are brought together only while it computes. In place.

    What is then a part of a tensor (a DTensor) is made whole by `whole`, and a whole one a part by `like`. Raises InputError where it cannot be.
    """
    if run.world == 1:
        raise InputError("--shard shares the weights out among processes: start them with torchrun --nproc_per_node N")
    if run.args.optimizer == "muon":
        raise InputError("--shard with --optimizer muon: its steps need whole matrices; use adam")
    model.to(memory_format=torch.contiguous_format)  # it takes no other
    mesh = dist.init_device_mesh(run.device.type, (run.world,))
    for part in ("input_blocks", "middle_block", "output_blocks"):
        for block in getattr(model, part, ()):
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor):
    """A tensor that is spread over the processes, made whole on the CPU by all of them together; any other as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def like(tensor, pattern):
    """A whole tensor of the pattern's shape, spread over the processes or laid out in memory as that is: Adam's fused steps take for
    granted that a parameter and its moments lie alike, and --shard leaves them contiguous where a network is channels_last."""
    if isinstance(pattern, DTensor):
        return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
    return torch.empty_like(pattern, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def exchange_gradients(module, now):
    """Whether the next backward pass exchanges gradients between processes: of the batches that are summed only the last does."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = now
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


# --- where a run starts ---


def resolve_auto(args, out_dir, fresh):
    """--init_from auto is resume where there is something to resume, else `fresh`: one command that starts and goes on."""
    if args.init_from == "auto":
        path = Path(out_dir) / "ckpt.pt"
        args.init_from = "resume" if path.exists() or one_before(path).exists() else fresh


def find_checkpoint(run):
    """The checkpoint that --init_from resume goes on from, None for a new run. Raises InputError if it is another run's, or would be overwritten."""
    path = run.out_dir / "ckpt.pt"
    run.found = stamp(path)
    if run.args.init_from != "resume":
        if (path.exists() or one_before(path).exists()) and not run.args.dry_run:
            raise InputError(f"{run.out_dir} holds a training already: --init_from resume goes on with it (auto does, or else starts one), another --out_dir leaves it alone")
        return None
    checkpoint, run.fell_back = open_checkpoint(run.out_dir)
    check_contents(run, checkpoint, path)
    task = asdict(run.task)
    was = {k: type(v)() for k, v in task.items()} | checkpoint["task"]  # a cell that there was not yet was off
    if changed := [f"{k} {was[k]}, not {v}" for k, v in task.items() if was[k] != v]:
        raise InputError(f"{path} was trained with {'; '.join(changed)}: to resume, give the same")
    for key, flag in (("optimizer", "optimizer"), ("objective", "loss")):
        if (was := checkpoint["args"].get(key)) != run.settings.get(key):
            raise InputError(f"{path} was trained with --{flag} {was}: to resume, give the same")
    keep_global_batch(run, checkpoint["args"])
    return checkpoint


def check_contents(run, checkpoint, path):
    """Raises InputError if a checkpoint is not one of this stage, or does not hold what it says."""
    if checkpoint.get("stage") != run.stage:
        raise InputError(f"{path} is not a checkpoint of this script (its stage is {checkpoint.get('stage')}, not {run.stage})")
    kinds = dict(task=dict, model=dict, step=int, scores=dict, args=dict, params=dict, ema=dict, optimizers=list, data=(dict, type(None)))
    for name, kind in kinds.items():
        if not isinstance(checkpoint.get(name), kind):
            raise InputError(f"{path} is not a checkpoint of a training: its {name} is a {type(checkpoint.get(name)).__name__}")
    net, average = network_of(checkpoint["model"], path), checkpoint["ema"].get("shadow_params")
    check_fits(net, checkpoint["params"], path)
    check_fits(net, named(net, average, checkpoint["params"]) if isinstance(average, list) else {}, path)
    folders.check_memory(checkpoint.get("data"), path)
    counts = [(checkpoint["args"], "batch_size", 2**20), (checkpoint["args"], "gradient_accumulation_steps", 2**20), (checkpoint["args"], "world", 2**20),
              (checkpoint, "step", 2**53), (checkpoint, "seen", 2**53), (checkpoint["ema"], "num_updates", 2**53)]
    for held, name, most in counts:
        count = held.get(name, 1)  # what the oldest checkpoints do not say is checked where it is read
        if type(count) is not int or not 0 < count < most:
            raise InputError(f"{path} is not a checkpoint of a training: its {name} is {count!r:.40}")


def keep_global_batch(run, was):
    """What was asked for once, by the same flags, is kept with another number of processes: the pictures an update, shared out anew. Raises InputError if they do not divide.

    The settings `was` may have been shared out already: "asked" says by which flags.
    """
    args, world = run.args, was.get("world")
    held = [was.get("batch_size"), was.get("gradient_accumulation_steps")]
    if world is None or was.get("asked", held) != run.settings["asked"]:
        return
    total = held[0] * held[1] * world
    if total == run.per_step:
        return
    if total % run.world:
        raise InputError(f"the {total} pictures an update do not divide among {run.world} processes: take another number, or give --batch_size and --gradient_accumulation_steps anew")
    share = total // run.world
    args.batch_size = max(n for n in range(1, args.batch_size + 1) if share % n == 0)
    args.gradient_accumulation_steps = share // args.batch_size
    run.settings.update(batch_size=args.batch_size, gradient_accumulation_steps=args.gradient_accumulation_steps)
    run.say(f"{run.world} processes{f', not {world}' if world != run.world else ''}: --batch_size {args.batch_size} --gradient_accumulation_steps {args.gradient_accumulation_steps} keep the global batch of {total}")


def differences(run, was):
    """What is not as in the settings `was`, in words, as far as it makes another training than an uninterrupted one."""
    ours = {k: v for k, v in run.settings.items() if k not in FREE and k not in data.Task.__dataclass_fields__}
    if run.args.lr_decay != "none":
        ours["max_iters"] = run.args.max_iters  # the learning rate falls towards it
    if was.get("batch_size", 0) * was.get("gradient_accumulation_steps", 0) * was.get("world", 0) == run.per_step:
        ours = {k: v for k, v in ours.items() if k not in ("batch_size", "gradient_accumulation_steps", "world")}  # the same pictures
    flags = vars(run.args)
    return [f"{'--' if k in flags else ''}{k} {v}, not {was[k]}" for k, v in ours.items() if k in was and was[k] != v]


def find_pictures(run, checkpoint, origins=()):
    """The files for training and for validation: two sequences of paths. Each picture keeps the part that it had when the run began.

    origins: the metadata of what the run learns or starts from; what those were trained on is remembered with it, and what
    they held out stays out. A dry run that names no folder goes on without pictures, and says why.
    """
    before = [meta["data"] for meta in origins if meta and meta.get("data")]
    for memory in before:
        folders.check_memory(memory, "the file of --teacher or --init_from")
    memory = (checkpoint or {}).get("data") or {}
    def look():
        split = data.find_split(run.task, run.args.data_dir, memory or (before[0] if before else None), quiet=not memory)
        if not run.args.dry_run:
            run.memory = {**folders.remember(split), "before": memory.get("before", before)}
        return data.check_split(split, run.task)
    try:
        pictures = from_first(run, look)
    except InputError as e:
        if not run.args.dry_run or run.args.data_dir:
            raise
        run.say(str(e))
        return [], []
    if run.args.lr_dir:
        run.low = partners.find_partners([*pictures[0], *pictures[1]], run.args.lr_dir)
        pictures = [[p for p in paths if p in run.low] for paths in pictures]
    return pictures


def from_first(run, make):
    """What make() gives in the first process, and the InputError that it raises, in all of them: a long list is made once, and is the same everywhere."""
    if run.world == 1:
        return make()
    box = [None, None]
    if run.master:
        try:
            box[0] = make()
        except (InputError, OSError) as e:
            box[1] = str(e)
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1]:
        raise InputError(box[1])
    return box[0]


def validation_pictures(run, paths):
    """What `validate` looks at: (N, 3, S, S) uint8; with --lr_dir [those, their partners (N, 3, S/scale, S/scale)]."""
    if run.low:
        return partners.middles({p: run.low[p] for p in data.spread(paths, run.args.eval_pictures)}, run.task)
    return data.validation_pictures(paths, run.task, run.args.eval_pictures)


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
    model: nn.Module
    optimizers: list
    ema: "EMA"
    critic: nn.Module = None  # of distill.py --loss perceptual
    step: int = 0  # updates done
    seen: int = 0  # pictures
    least: float = math.inf  # the lowest mean loss between two looks at it
    scores: dict = field(default_factory=dict)  # of the last validation
    saved: int = 0  # the step that ckpt.pt holds
    proven: bool = False  # whether a loss since then has said that its weights are sound
    validated: int = 0  # the step of the last validation
    whole: bool = True  # False in the middle of an update
    bad_step: torch.Tensor = None  # the first step whose gradient was not finite, inf before; stays on the device


def first_state(run, model, critic=None):
    """The state at step 0 of a model that is on its device: its optimizers, and its average."""
    optimizers = make_optimizers(model, run.args.optimizer, run.args.learning_rate, run.dtype)
    if critic:
        optimizers.append(torch.optim.Adam(critic.parameters(), lr=run.args.learning_rate, betas=(0.5, 0.99)))  # short memory: what it judges changes
    run.settings["kernels"] = "extension" if run.device.type in kernels.extension_devices() else "PyTorch"
    return State(model, optimizers, EMA(model, run.args.ema), critic, bad_step=torch.tensor(math.inf, device=run.device))


def save(run, state):
    """Write the state into the run's folder: tensors and plain types only, so that weights_only=True loads it. The one before is kept.

    Raises Diverged, and leaves the folder as it was, if the weights or their average are not finite.
    """
    params = {name: whole(p) for name, p in state.model.state_dict().items()}
    ema = {**state.ema.state_dict(), "shadow_params": [whole(p) for p in state.ema.shadow_params]}
    optimizers = [{**kept, "state": {i: {k: whole(m) for k, m in moments.items()} for i, moments in kept["state"].items()}}
                  for kept in (o.state_dict() for o in state.optimizers)]
    critic = dict(critic=state.critic.state_dict()) if state.critic else {}
    if run.master:
        for what, values in (("weights", params.values()), ("averaged weights", ema["shadow_params"]), ("critic's weights", critic.get("critic", {}).values())):
            if not all(p.isfinite().all() for p in values):
                raise Diverged(f"the {what} are not finite at step {state.step}: lower --learning_rate; {last_good(run, state)}")
        save_checkpoint(run.out_dir / "ckpt.pt", dict(
            stage=run.stage, task=asdict(run.task), model=state.model.config, step=state.step, seen=state.seen, least=state.least, scores=state.scores,
            args=run.settings, data=run.memory, params=params, ema=ema, optimizers=optimizers, **critic))
        if run.args.always_save_checkpoint:
            copy_file(run.out_dir / "ckpt.pt", run.out_dir / f"ckpt_{state.step:07d}.pt")
    state.saved, state.proven = state.step, False


def last_good(run, state):
    """Where the last checkpoint is, in words. One that no loss has been computed from since may be ruined itself."""
    if not state.saved:
        return "nothing was saved yet"
    path = run.out_dir / "ckpt.pt"
    before = f": {one_before(path).name} is the one before it" if one_before(path).exists() else ""
    return f"{path} keeps step {state.saved}" + ("" if state.proven else f", which may be ruined itself{before}")


@contextmanager
def last_save(run, state):
    """Whatever ends the loop by surprise (a killed loader, a lost process, no memory, a bad picture too many) costs no step: the state is saved first."""
    try:
        yield
    except Diverged:
        raise
    except BaseException:
        if run.master and state.whole and state.step > state.saved and not run.args.shard:  # the others' parts are gone
            try:
                save(run, state)
                run.say(f"saved step {state.step} before the error below")
            except InputError as e:  # the first error says more
                run.say(f"not saved: {e}")
        raise


def restore(run, state, checkpoint):
    """Put a checkpoint's contents, but for the weights that the model has from it, into the state, and say what is not as it was. Raises InputError if they do not fit."""
    was = checkpoint["args"]
    try:
        for optimizer, kept in zip(state.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": checked_moments(optimizer, kept["state"])})
        state.ema.load_state_dict(checkpoint["ema"])
        if state.critic:
            state.critic.load_state_dict(checkpoint["critic"])
        state.seen = int(checkpoint.get("seen", checkpoint["step"] * was["batch_size"] * was["gradient_accumulation_steps"] * was.get("world", 1)))
        state.least = float(checkpoint.get("least", math.inf))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise InputError(f"{run.out_dir}/ckpt.pt does not hold this training: {(str(e) or type(e).__name__).splitlines()[0]}") from e
    state.step = state.saved = checkpoint["step"]
    state.scores = checkpoint["scores"]
    changed = differences(run, was)
    run.say(f"resumed at step {state.step}" + (f", not as before: {'; '.join(changed)}" if changed else ""))


def checked_moments(optimizer, kept):
    """An optimizer's state, {number of the parameter: {name: tensor}}, spread as its parameters are. Raises ValueError if it is not of their shapes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if sorted(kept) != list(range(len(params))):
        raise ValueError(f"the optimizer has {len(params)} parameters, the checkpoint {len(kept)}")
    for i, moments in kept.items():
        for name, m in moments.items():
            if not torch.is_tensor(m) or m.shape != (torch.Size() if name == "step" else params[i].shape) or not m.isfinite().all():
                raise ValueError(f"the optimizer's {name} of parameter {i} is not a finite tensor of its shape")
    return {i: {name: m if name == "step" else like(m, params[i]) for name, m in moments.items()} for i, moments in kept.items()}


def release(run, state, ema_model):
    """Write weights.safetensors: the averaged weights to keep or to share."""
    state.ema.copy_to(ema_model)
    if run.master:
        save_release(run.out_dir / "weights.safetensors", ema_model, dict(stage=run.stage, task=asdict(run.task), step=state.step, scores=state.scores, data=run.memory))


# --- one step ---


def batches(run, paths, seen):
    """The batches of this process from picture number `seen` on, without end: ((B, 3, S, S) uint8, (B,) int64 picture numbers)."""
    workers = run.args.num_workers
    if workers < 0:
        workers = 0 if run.device.type == "cpu" else min(8, os.cpu_count() // run.local_world)
    loader = data.training_batches(paths, run.task, run.args.seed, run.args.batch_size, seen, run.rank, run.world, workers, run.low)
    if workers and hasattr(signal, "SIGCHLD"):  # torch's handler would raise in the middle of an update; next() finds a dead loader, too
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return loader


def next_batch(run, loader):
    """One batch on the device: x_1 and x_lr (B, 3, S, S) in [-1, 1], picture numbers n (B,), their noise seeds and times t in [0, 1), (B,)."""
    try:
        x_1, n, *y = next(loader)
    except (ConnectionError, EOFError) as e:  # it died while it handed a batch over; at any other time torch says it so
        raise RuntimeError(f"DataLoader worker exited unexpectedly ({e or type(e).__name__})") from e
    x_1, seeds = to_float(x_1.to(run.device, non_blocking=True)), data.image_seeds(run.args.seed, n).to(run.device)
    return x_1, data.low_resolution(x_1, y, run.task, seeds), n, seeds, data.uniform_times(run.args.seed, n).to(run.device)


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
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    state.bad_step = torch.where(norm.isfinite(), state.bad_step, state.bad_step.clamp(max=state.step + 1))  # no waiting for the device
    state.whole = False
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.model)
    state.step, state.seen, state.whole = state.step + 1, state.seen + run.per_step, True
    return norm


# --- signals ---


class Signals:
    """A signal (data.STOPPING) asks for a last save: `asked` is the number of the one that came, 0 before.

    So does the end of torchrun, by kill -9, of which no signal tells its processes: they would train on as orphans.
    """

    def __init__(self):
        self.asked = 0
        self.launcher = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None
        for s in data.STOPPING:
            if signal.getsignal(s) != signal.SIG_IGN:  # nohup's
                signal.signal(s, self.ask)

    def ask(self, signum, frame):
        self.asked = int(signum)

    def agreed(self, run):
        """The signal that all processes stop for, together, after the same step; 0: they go on."""
        if self.launcher and os.getppid() != self.launcher:
            self.asked = self.asked or int(signal.SIGTERM)
        if run.world == 1:
            return self.asked
        flag = torch.tensor(self.asked)  # on the CPU, so that no GPU waits
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


# --- the run's folder: log, pictures, who holds it ---


def open_folder(run, state):
    """Takes the run's folder for this run alone, notes the start in starts.jsonl, and rewinds the log to the state. Raises InputError if another run holds it, or has saved there since this one looked."""
    step = from_first(run, lambda: enter_folder(run, state))
    if step != state.step:
        raise InputError(f"{run.out_dir}/ckpt.pt was saved while this training began: process {run.rank} read step {state.step}, the first one step {step}: start again")


def enter_folder(run, state):
    """What open_folder does in the first process: the step of the state."""
    path = run.out_dir / "ckpt.pt"
    try:
        run.out_dir.mkdir(parents=True, exist_ok=True)
        run.lock = open(run.out_dir / "starts.jsonl", "a+")  # noqa: SIM115, open as long as the run lives
        take(run.lock, run.out_dir)
        if stamp(path) != run.found:
            raise InputError(f"another process has trained into {run.out_dir} meanwhile: start again, with --init_from auto to go on with it")
        if run.fell_back:
            if path.exists():
                os.replace(path, path.with_name("ckpt_broken.pt"))
            copy_file(one_before(path), path)
        run.lock.write(json.dumps(about(run, state)) + "\n")
        run.lock.flush()
        run.lock.seek(0)  # read here and nowhere else: whoever closes the file a second time gives the lock away
        run.starts = run.lock.read().splitlines()
    except OSError as e:
        raise InputError(f"cannot write into {run.out_dir}: {e.strerror}") from e
    entries = rewind_log(run, state)
    for entry in entries:
        if "psnr_lr" in entry:
            state.validated, state.scores = entry["step"], {k: v for k, v in entry.items() if k != "step"}
    run.boards = boards.open_boards(run, state)
    return state.step


def stamp(path):
    """What every save of a file changes: its number, size and time; None if there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def take(file, folder, wait=10):
    """Locks an open file until it is closed or the process ends, however it ends. Raises InputError if another process has it for `wait` seconds more.

    Where there are no such locks (Windows, some network file systems) there is no protection.
    """
    for attempt in range(10 * wait + 1):
        try:
            return fcntl and fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if attempt == 10 * wait:
                raise InputError(f"another process trains into {folder}: stop it, or give another --out_dir") from None
            time.sleep(0.1)
        except OSError:
            return None


def about(run, state):
    """What a later reader wants to know of a start: settings, code, versions, machine."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow", "safetensors")}
    gpu = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None
    return dict(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), step=state.step, argv=sys.argv, settings=run.settings, task=asdict(run.task), git=revision(),
                versions=dict(python=platform.python_version(), **versions),
                machine=dict(name=platform.node(), system=platform.platform(), cpus=os.cpu_count(), cpu=cpu_name(), threads=torch.get_num_threads(), gpu=gpu, processes=run.world))


def revision():
    """Git's name for the state of this code, None where there is none."""
    here = Path(__file__).resolve().parent
    above = {**os.environ, "GIT_CEILING_DIRECTORIES": str(here.parent)}  # an installed copy may lie in somebody's repository, whose revision says nothing
    try:
        return subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, env=above).stdout.strip() or None
    except OSError:  # no git
        return None


def rewind_log(run, state):
    """Drop from log.jsonl what came after the state, which will come again, and a line that is none (a kill cut it short): the entries that stay.

    Of a run that begins anew in the folder of an old log (its ckpt.pt is gone, or never was), the old log is set aside.
    """
    path = run.out_dir / "log.jsonl"
    if path.exists() and path.stat().st_size and state.step == 0:
        names = (f"log_before{i}.jsonl" for i in itertools.chain([""], itertools.count(2)))
        aside = next(there for name in names if not (there := path.with_name(name)).exists())
        os.replace(path, aside)
        run.say(f"{run.out_dir} held the log of another training, but no checkpoint: it is now {aside.name}")
    entries = [entry for entry in read_lines(path) if type(entry.get("step")) is int and entry["step"] <= state.step] if path.exists() else []
    atomic_write(path, lambda tmp: tmp.write_text("".join(json.dumps(entry) + "\n" for entry in entries)))
    return entries


def log(run, entry, hidden=(), picture=None):
    """A line for log.jsonl, a dict of plain types with "step", shown on the terminal but for the keys hidden, and on the boards, with a picture (H, W, 3). What cannot be written is said, and shown alone."""
    if not run.master:
        return
    path = run.out_dir / "log.jsonl"
    try:
        with open(path, "a") as f:
            f.write(json.dumps(entry) + "\n")
    except OSError as e:
        run.say(f"cannot write {path}: {e.strerror}; the training goes on")
    run.say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in entry.items() if k not in hidden))
    boards.post(run, entry, picture)


class Meter:
    """Sums over the steps since the last line of the log, and pictures a second."""

    def __init__(self, run, shape, step):
        self.run, self.sums, self.total = run, torch.zeros(shape, device=run.device), torch.zeros(2, device=run.device)
        self.first = None  # the loss of the first batch
        self.restart_clock(step)

    def add(self, loss):
        """Count one batch's loss, a tensor of one number."""
        loss = loss.detach()
        self.first = loss if self.first is None else self.first
        self.total += torch.stack([loss, torch.ones_like(loss)])

    def restart_clock(self, step):
        """What was done until now (a validation, a save) does not count as training."""
        self.since, self.step = time.time(), step

    def read(self, step):
        """(the sums over all processes, pictures a second); both begin anew."""
        if self.run.world > 1:
            dist.all_reduce(self.sums)
        sums, speed = self.sums.clone(), (step - self.step) * self.run.per_step / (time.time() - self.since)
        self.sums.zero_()
        self.total.zero_()
        self.restart_clock(step)
        return sums, round(speed, 1)


def check(run, state, meter, paths):
    """Raises Diverged if a gradient since the last check was not finite, or the mean loss is a hundred times the lowest that it was.

    No lowest counts below NO_LOSS: a student of a teacher that says the same at every t begins with a loss of next to nothing.
    Names the step and its pictures, and the checkpoint that is still good. To be called before every save and reading of the meter.
    """
    total, count = meter.total.tolist()
    if (bad := state.bad_step.item()) < math.inf:
        numbers = range(state.seen - int(state.step - bad + 1) * run.per_step, state.seen - int(state.step - bad) * run.per_step)
        order = data.Order(len(paths), run.args.seed, numbers[0])
        names = [str(paths[i]) for i, _ in itertools.islice(order, len(numbers))]
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise Diverged(f"the loss or its gradient is not finite at step {bad:.0f}, of the pictures {some}: lower --learning_rate; {last_good(run, state)}")
    if not count:
        return
    if state.least == math.inf:
        state.least = meter.first.item()
    if total / count > 100 * max(state.least, NO_LOSS):
        raise Diverged(f"the loss rose from {state.least:.3g} to {total / count:.3g} by step {state.step}: lower --learning_rate; {last_good(run, state)}")
    state.least, state.proven = min(state.least, total / count), state.step > state.saved


def validate(run, state, predict, pictures, lpips, signals):
    """A look at `validation_pictures`: a line of the log, and val_STEP.png. Broken off by a signal, as if it had not begun."""
    scores, grid = look(predict, pictures, run.task, lpips, run.device, signals)
    if scores:
        state.scores, state.validated = scores, state.step
        log(run, dict(step=state.step, **scores), picture=grid)
        write_picture(run.out_dir / f"val_{state.step:07d}.png", grid)
        keep_best(run, scores)


def keep_best(run, scores):
    """--keep_best METRIC: after a validation that gave its best value so far, as log.jsonl knows, ckpt.pt is ckpt_best.pt too (Appendix E)."""
    if name := run.args.keep_best:
        values = [line[name] for line in read_lines(run.out_dir / "log.jsonl") if isinstance(line.get(name), float)]
        if scores[name] == (min if name.startswith("lpips") else max)([scores[name], *values]):
            copy_file(run.out_dir / "ckpt.pt", run.out_dir / "ckpt_best.pt")


def check_best(run, lpips, pictures):
    """Raises InputError if --keep_best judges by a network that is not on this machine, or does not take pictures of that size: `validation_pictures`."""
    if not run.master or not (run.args.keep_best or "").startswith("lpips"):
        return
    if lpips is None:
        raise InputError(f"--keep_best {run.args.keep_best} needs LPIPS, whose AlexNet is not here")
    side = (pictures[0] if isinstance(pictures, list) else pictures).shape[-1]
    if side < LPIPS_SIDE:
        raise InputError(f"--keep_best {run.args.keep_best}: LPIPS takes no pictures below {LPIPS_SIDE} x {LPIPS_SIDE}, and those to validate are {side} x {side}")


@torch.no_grad()
def look(predict, pictures, task, lpips, device, signals=None):
    """PSNR and LPIPS of what predict makes of the pictures (N, 3, S, S) uint8, or of the second of [pictures, partners], and a picture of it; (None, None) if a signal comes meanwhile.

    predict: x_lr (1, 3, S, S) and seeds (1,) -> {name: (1, 3, S, S)}. Returns the means, {"psnr_NAME",
    "lpips_NAME"}, with x_lr's own under "lr", and x_lr, the results and x_1 of the first four side by side, uint8 (H, W, 3).
    """
    pictures, low = pictures if isinstance(pictures, list) else (pictures, None)
    scores, rows = {}, []
    for i, picture in enumerate(pictures):
        if signals and signals.asked:
            return None, None
        truth, seeds = to_float(picture[None]).to(device), torch.full((1,), i, device=device)
        x_lr = degrade(truth, task, seeds) if low is None else data.low_resolution(truth, [low[i : i + 1]], task, seeds)
        results = {"lr": x_lr, **predict(x_lr, seeds)}
        shown = {name: kernels.to_uint8(x).permute(0, 3, 1, 2) for name, x in results.items()}
        for name, x in shown.items():
            scores.setdefault(f"psnr_{name}", []).append(psnr_rgb(x.cpu(), picture[None]).item())
            if lpips and min(picture.shape[1:]) >= LPIPS_SIDE:
                scores.setdefault(f"lpips_{name}", []).append(lpips(to_float(x), truth).item())
        if i < 4:
            rows.append(torch.cat([x[0].cpu() for x in shown.values()] + [picture], dim=2))
    return {k: statistics.fmean(v) for k, v in scores.items()}, torch.cat(rows, dim=1).permute(1, 2, 0).numpy()


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
        """Write the averaged parameters into model, whose own are whole."""
        torch._foreach_copy_(self.of(model), [whole(p) for p in self.shadow_params])
        return model

    def state_dict(self):  # the published files' format
        return dict(decay=self.decay, num_updates=self.num_updates, shadow_params=self.shadow_params)

    def load_state_dict(self, state):
        self.num_updates = state["num_updates"]
        for mine, p in zip(self.shadow_params, state["shadow_params"], strict=True):  # one by one: what --shard spreads knows no _foreach_copy_
            mine.copy_(like(p, mine))
