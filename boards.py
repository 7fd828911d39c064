"""A training on boards that others made, beside its own log.jsonl: TensorBoard (--tensorboard), Weights & Biases (--wandb). Both optional."""
import hashlib
import importlib
import json
import os
from dataclasses import asdict

from console import InputError

MODULES = dict(tensorboard="torch.utils.tensorboard", wandb="wandb")


def add_board_flags(group):
    group.add_argument("--tensorboard", action="store_true", help="also write out_dir/tensorboard, for `tensorboard --logdir out`")
    group.add_argument("--wandb", action="store_true", help="also log to Weights & Biases; WANDB_MODE=offline needs no network, WANDB_PROJECT names the project (default: oftsr)")


def check_boards(args):
    """Raises InputError if a board that the flags ask for is not installed."""
    for name, module in MODULES.items():
        if getattr(args, name):
            try:
                importlib.import_module(module)
            except ImportError as e:
                raise InputError(f"--{name} needs {name}: pip install {name} ({str(e).splitlines()[0]})") from None


def open_boards(run, state):
    """The boards that the flags ask for, which a resumed run goes on with: a list of functions of (step, {name: number}, picture (H, W, 3) uint8 or None).

    With None for the step a board is closed. Raises InputError if one cannot be opened.
    """
    opened = []
    for name, board in (("tensorboard", tensorboard), ("wandb", wandb)):
        if getattr(run.args, name):
            try:
                opened.append(board(run, state))
            except Exception as e:  # nobody is logged in, no network
                raise InputError(f"--{name}: {(str(e) or type(e).__name__).splitlines()[0]}") from e
    return opened


def tensorboard(run, state):
    from torch.utils.tensorboard import SummaryWriter
    # What was written after the step that the run goes on from comes again: TensorBoard hides it.
    writer = SummaryWriter(run.out_dir / "tensorboard", purge_step=state.step + 1 if state.step else None)

    def show(step, numbers, picture):
        if step is None:
            return writer.close()
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        if picture is not None:
            writer.add_image("validation", picture, step, dataformats="HWC")
        writer.flush()
    return show


def wandb(run, state):
    import wandb
    began = [line for line in run.starts if json.loads(line)["step"] == 0] or run.starts  # what tells this run from all others, however often it is resumed
    board = wandb.init(project=os.environ.get("WANDB_PROJECT", "oftsr"), name=run.out_dir.resolve().name, dir=str(run.out_dir), resume="allow",
                       id=hashlib.sha256(began[-1].encode()).hexdigest()[:16], config={**run.settings, "task": asdict(run.task)})
    board.define_metric("*", step_metric="step")  # its own counter never goes back, as a resumed run does

    def show(step, numbers, picture):
        if step is None:
            return board.finish()
        board.log({"step": step, **numbers, **({} if picture is None else {"validation": wandb.Image(picture)})})
    return show


def post(run, entry, picture=None):
    """Put a line of the log, and a picture, on all boards. One that fails is said and left out from then on: the training goes on."""
    numbers = {}
    for name, value in entry.items():
        if isinstance(value, list):  # loss_by_t
            numbers.update((f"{name}/{i / len(value):g}", v) for i, v in enumerate(value))
        elif name != "step":
            numbers[f"{name[:5].rstrip('_')}/{name.partition('_')[2]}" if name.startswith(("psnr_", "lpips_")) else f"training/{name}"] = value
    each(run, lambda board: board(entry["step"], numbers, picture))


def close(run):
    each(run, lambda board: board(None, {}, None))


def each(run, act):
    for board in list(run.boards):
        try:
            act(board)
        except Exception as e:  # others' code, a full disk, a network that is gone
            run.boards.remove(board)
            run.say(f"a board is left out from here on: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
