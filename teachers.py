"""Teachers: the flow that a distillation learns from, found and checked; and networks that are not ours, as v(x_in, t).

    teacher, task, meta = load_teacher(args, out_dir)      # what --teacher names, or else the newest flow of the task; args: distill.py's flags
    teacher, meta = load_family("resshift:FILE", args)     # or "dit4sr:DIR", or "mypackage.module:function"; args: the flags of add_teacher_flags
    v = teacher(x_in, t)          # x_in = concat(x_t, z_lr): (B, 2C, h, w), t: (B,) in [0, 1] -> v: (B, C, h, w)

A family is a subclass of Teacher, named in model.FAMILIES: that table is the one place to add one. It turns what its network
predicts into a velocity, and says what a student of it needs to know. A network without a family of its own is wrapped in a
Teacher by a function of yours: examples/bring_your_own.py is one.

Legend: x_1 clean (t = 1), x_lr the low-resolution picture at full size, z_lr = encode(x_lr) in the teacher's space (pixels:
x_lr itself), eps standard normal noise. Every family's noising is a path x_t = a x_1 + b z_lr + c eps, a(t), b(t), c(t) numbers.
"""
import copy
import functools
import os
import sys
from pathlib import Path

import torch
import torch.nn as nn

import data
import kernels
from checkpoints import load_checkpoint, load_tensors, open_checkpoint
from console import InputError, absent, in_range
from model import FAMILIES, FLOATS, build, find_family, load_model, network_config, trusted

TEACHER = Path(__file__).parent / "weights" / "photos_x4_flow.safetensors"
LAST = 1 - 1e-3  # at t = 1 there is no noise to read off the state: v of what predicts x_1 would be 0 / 0
BUFFERS = ("relative_position_index", "attn_mask")  # of published files, computed here
PREDICTS = ("x_1", "eps", "noise_minus_clean", "v", "velocity")


# --- from what a network predicts to v = dx_t/dt ---


def clean_and_noise(x_t, z_lr, out, predicts, a, b, c):
    """What a network's output says of x_1 and eps, given x_t = a x_1 + b z_lr + c eps. All (B, C, h, w); a, b, c (B, 1, 1, 1).

    With r = x_t - b z_lr = a x_1 + c eps, `predicts` is
        "x_1"                out = x_1:              eps = (r - a x_1) / c
        "eps"                out = eps:              x_1 = (r - c eps) / a
        "noise_minus_clean"  out = eps - x_1:        r = (a + c) x_1 + c out, so x_1 = (r - c out) / (a + c)
        "v"                  out = a eps - c x_1 (Salimans & Ho 2022): a r - c out = (a^2 + c^2) x_1
    All are linear in (x_1, eps), so a network that predicts the mean of one given x_t says the mean of both.
    """
    r = x_t - b * z_lr
    if predicts == "x_1":
        return out, (r - a * out) / c
    if predicts == "eps":
        return (r - c * out) / a, out
    if predicts == "noise_minus_clean":
        x_1 = (r - c * out) / (a + c)
        return x_1, x_1 + out
    if predicts == "v":
        n = a * a + c * c
        return (a * r - c * out) / n, (c * r + a * out) / n
    raise ValueError(f"a network predicts one of {', '.join(PREDICTS)}, not {predicts}")


def to_velocity(x_t, z_lr, out, predicts, path, slope):
    """v, the velocity of the probability flow at x_t, from a network's output: all (B, C, h, w).

    path = (a, b, c), each (B,), of x_t = a x_1 + b z_lr + c eps; slope = (a', b', c'), their derivatives by t. With x_1 and
    eps held, a point of the path moves by a' x_1 + b' z_lr + c' eps. The velocity that carries the density of x_t along is
    the mean of that over all (x_1, eps) that meet in x_t (the conditional flow's, Lipman et al. 2023, Theorem 1), and it is
    linear in them:
        v = a' E[x_1 | x_t] + b' z_lr + c' E[eps | x_t]
    "velocity" is v itself. A linear path of noise to picture (a = t, b = 0, c = 1 - t) and out = eps - x_1 give v = -out.
    """
    if predicts == "velocity":
        return out
    a, b, c, da, db, dc = (k.to(x_t.dtype).view(-1, 1, 1, 1) for k in (*path, *slope))
    x_1, eps = clean_and_noise(x_t, z_lr, out, predicts, a, b, c)
    return da * x_1 + db * z_lr + dc * eps


def linear_path(t, sigma_p=1.0):
    """This project's path, Eq. (4) and (5): a = t, b = (1-t) sqrt(1 - sigma_p^2), c = (1-t) sigma_p, and their slopes; t (B,).

    sigma_p = 1 is flow matching from pure noise; its sigma is 1 - t. Returns ((a, b, c), (a', b', c')), each (B,).
    """
    one = torch.ones_like(t)
    keep = (1 - sigma_p**2) ** 0.5
    return (t, (1 - t) * keep, (1 - t) * sigma_p), (one, -keep * one, -sigma_p * one)


def to_linear(alpha, sigma):
    """Any schedule x = alpha x_1 + sigma eps, on the linear path: the time t there, and the scale of its state. Numbers or tensors.

    x / (alpha + sigma) = t x_1 + (1 - t) eps with t = alpha / (alpha + sigma): a diffusion model of whatever schedule is
    asked at the diffusion time where alpha / (alpha + sigma) = t, about (alpha + sigma) x_t, and its answer read with linear_path.
    """
    return alpha / (alpha + sigma), alpha + sigma


def guided(predict, scale):
    """Classifier-free guidance: predict(2B rows, the unconditional half first) -> (2B, ...), and what it is made of by `scale`, (B, ...).

    One call of twice the batch, two evaluations: unconditional + scale (conditional - unconditional) (Ho & Salimans 2022).
    """
    without, with_ = predict().chunk(2)
    return without + scale * (with_ - without)


# --- a teacher ---


class Teacher(nn.Module):
    """A flow of another family, called as ours is: forward(x_in = concat(x_t, z_lr), t) = v.

    What a family, or an object of yours, says of itself, and model.UNet too:
    net, predicts    the network, and what it predicts: one of PREDICTS
    path(t)          ((a, b, c), (a', b', c')) of x_t = a x_1 + b z_lr + c eps
    predict(...)     how it is asked: x_t, z_lr (B, C, h, w), t (B,) -> its output
    to_latents, to_pixels   pictures (B, 3, H, W) in [-1, 1] to its space (B, C, H / factor, W / factor), and back
    latent_channels, factor, multiple   C; pixels a latent; heights and widths in pixels are multiples of this
    t_last           the largest t it was trained at: from there one step leads to 1
    evaluations      network evaluations a call (2 with guidance)
    width            values of one map of each of its levels, for a pixel of the picture: to know how large a tile may be
    one_step         a student: its input is always x_0, so the path's numbers are those of t = 0, and t is only told
    config           the arguments that model.build makes it of, with its "family"
    """
    latent_channels, factor, multiple, t_last, evaluations, precond, width = 3, 1, 1, 1 - 1e-3, 1, None, 64

    def __init__(self, net, predicts="x_1", path=None, one_step=False):
        super().__init__()
        if predicts not in PREDICTS:
            raise InputError(f"a teacher predicts one of {', '.join(PREDICTS)}, not {predicts!r}")
        self.net, self.predicts, self.one_step, self.config, self.autoencoder = net, predicts, one_step, {}, None
        if path:
            self.path = path

    def path(self, t):
        return linear_path(t)

    def predict(self, x_t, z_lr, t):
        return self.net(x_t, z_lr, t)

    def enter_latents(self, autoencoder):
        """Work in the latents of a resshift.VQAutoencoder of those arguments from now on: a network of one's own that was trained there. Raises InputError if it does already."""
        from resshift import VQAutoencoder
        if self.factor != 1:
            raise InputError("--autoencoder: this teacher works in latents of its own already")
        self.autoencoder = VQAutoencoder(**autoencoder).requires_grad_(False)
        self.factor = self.autoencoder.factor
        self.multiple *= self.factor
        self.width = self.width / self.factor**2 + sum(autoencoder["channels"] * mult / 4**level for level, mult in enumerate(autoencoder["mults"]))

    @torch.no_grad()
    def to_latents(self, x):
        return self.autoencoder.encode(x).float() if self.autoencoder else x

    @torch.no_grad()
    def to_pixels(self, z):
        return self.autoencoder.decode(z).float() if self.autoencoder else z

    def start(self, z_lr, sigma_p, seeds, corner=(0, 0)):
        """concat(x_0, z_lr), the path's point at t = 0 with z_lr for x_1: z_lr (B, C, h, w), seeds (B,) int64 -> (B, 2C, h, w).

        The path says its noise itself: sigma_p, the task's, is not read. corner: the pixel of a larger picture where this
        window of it begins, and with it its part of that picture's noise.
        """
        (a, b, c), _ = self.path(torch.zeros(1, device=z_lr.device))
        z_lr = z_lr.float()
        return torch.cat([(a + b) * z_lr + c * self.noise(seeds, z_lr.shape, corner), z_lr], dim=1)

    def noise(self, seeds, shape, corner=(0, 0), stream=0):
        """Standard normal latents of that shape, those of the whole picture's noise that lie at the pixel `corner`."""
        return kernels.normal(seeds, shape, stream, tuple(i // self.factor for i in corner))


    def student(self):
        """The network that distillation starts from: the teacher's own, told that its input is x_0."""
        student = copy.deepcopy(self)
        for mine, its in zip(student.parameters(), self.trainable()):
            mine.requires_grad_(its)
        student.one_step, student.config = True, {**self.config, "one_step": True}
        return student

    def trainable(self):
        """Which parameters a student trains, in their order: the network's, not the autoencoder's."""
        return [name.startswith("net.") for name, _ in self.named_parameters()]

    def forward(self, x_in, t):
        t = t.to(x_in.device).float().expand(x_in.shape[0])
        x_t, z_lr = (x_in if x_in.dtype == torch.float64 else x_in.float()).chunk(2, dim=1)
        t = t.clamp(max=LAST) if self.predicts == "x_1" and not self.one_step else t
        out = self.predict(x_t, z_lr, t).to(x_t.dtype)
        return to_velocity(x_t, z_lr, out, self.predicts, *self.path(torch.zeros_like(t) if self.one_step else t))


# --- the teacher that --teacher names ---


def add_teacher_flags(parser):
    """What a teacher of another family needs beside --teacher."""
    g = parser.add_argument_group("teachers of other families")
    g.add_argument("--autoencoder", help="resshift, or a function of yours: the file of ResShift's autoencoder, in whose latents it works (without one it works on pictures)")
    g.add_argument("--lora", type=in_range(int, 1, 4096), default=64, help="dit4sr: rank of the student's adapters (default: 64)")
    g.add_argument("--guidance", type=in_range(float, 1, 100), default=8.0, help="dit4sr: scale of its classifier-free guidance, two evaluations a step; 1 is none (default: 8, its published sampler's)")
    g.add_argument("--prompt", metavar="FILE", help="dit4sr: the .safetensors of its prompt's embeddings (default: prompt.safetensors in its folder)")
    g.add_argument("--chain", type=int, choices=(4, 15), default=4, help="resshift: steps that it was trained for, where the file does not say (default: 4)")


def load_teacher(args, out_dir):
    """The teacher that --teacher names, a resumed run had, or is the newest, and its task as flags override it: (UNet or Teacher, Task, its metadata).

    Raises InputError if it is no flow, or not of this task. Sets args.teacher to its path. A dry run needs no file: without
    one it gets the row's network without weights.
    """
    if args.init_from == "resume" and args.teacher is None:
        before, kinds = open_checkpoint(out_dir)[0].get("args", {}), dict(teacher=str, autoencoder=str, chain=int, lora=int, guidance=(int, float), prompt=str)
        if not isinstance(before, dict) or not all(isinstance(before.get(key), (kind, type(None))) for key, kind in kinds.items()):
            raise InputError(f"{out_dir}/ckpt.pt is not a checkpoint of a training: its settings are none")
        for key in kinds:
            setattr(args, key, before.get(key, getattr(args, key)))
        if names_function(args.teacher) and args.teacher not in trusted():  # a checkpoint alone does not get code to run
            raise InputError(f"{out_dir}/ckpt.pt was distilled from {args.teacher}, which is code: if it is yours, say --teacher {args.teacher} again")
    args.teacher = args.teacher or newest(args.dataset, "flow", args.dry_run)
    if args.teacher and names_family(args.teacher):
        teacher, meta = load_family(args.teacher, args)
        return teacher, data.resolve_task(args, data.saved_task(meta["task"], args.teacher) if meta["task"] else None), meta
    if args.autoencoder:
        raise InputError(f"--autoencoder is for resshift:FILE and functions of yours: {args.teacher} says itself what it works in")
    if absent(args, args.teacher):
        task = data.resolve_task(args)
        with torch.device("meta"):
            return build(network_config(task.model, task.condition, task.sigma_p, sigma_d=1.0)), task, dict(step=None)
    teacher, meta = load_model(args.teacher, model=args.model or data.TASKS[args.dataset].model)
    if meta["stage"] == "distill":
        raise InputError(f"{args.teacher} is a distilled student: the teacher is a stage-1 flow")
    if meta["task"] and meta["task"]["name"] != args.dataset:
        raise InputError(f"{args.teacher} was trained for {meta['task']['name']}: say --dataset {meta['task']['name']}")
    task = data.resolve_task(args, data.saved_task(meta["task"], args.teacher) if meta["task"] else None)
    if (meta["task"] or {}).get("model", task.model) != task.model:
        raise InputError(f"{args.teacher} holds the network {meta['task']['model']!r}, not {task.model!r}: its student is the same")
    if teacher.precond and teacher.precond["sigma_p"] != task.sigma_p:
        raise InputError(f"{args.teacher} was trained with --sigma_p {teacher.precond['sigma_p']}, not {task.sigma_p}: give the same")
    return teacher, task, meta


def newest(task_name, stage, optional=False):
    """The newest checkpoint of that task under out/ of stage "flow", or "distill" (not of --loss perceptual), else the shipped flow for photos: its path.

    Says which it is. Where there is none: None if optional, else raises InputError.
    """
    what, script, flag = {"flow": ("teacher", "train_flow.py", "--teacher"), "distill": ("student", "distill.py", "--init_from")}[stage]
    say = functools.partial(print, file=sys.stderr) if os.environ.get("RANK", "0") == "0" else lambda line: None
    for path in sorted(Path("out").glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except InputError:  # broken
            continue
        task, args = checkpoint.get("task"), checkpoint.get("args")
        if checkpoint.get("stage") != stage or not isinstance(task, dict) or not isinstance(args, dict):  # another's
            continue
        if task.get("name") == task_name and args.get("objective") != "perceptual":
            say(f"{what}: {path}, the newest of {task_name} under out/ ({flag} names another)")
            return str(path)
    if stage == "flow" and task_name == "photos" and TEACHER.is_file():
        say(f"{what}: the shipped {TEACHER.name} ({flag} names another)")
        return str(TEACHER)
    if optional:
        return None
    raise InputError(f"no {what} for {task_name}: none under out/ ({script} --dataset {task_name} makes one, or name a file with {flag})")


def names_family(spec):
    """Whether --teacher names a family and its file, FAMILY:FILE, or a function, package.module:function; else it is a file of ours."""
    head, colon, tail = spec.partition(":")
    return bool(colon) and not Path(spec).exists() and (head in FAMILIES or len(head) > 1 and f"{head}.{tail}".replace(".", "").isidentifier())


def names_function(spec):
    """Whether --teacher names code to import, package.module:function."""
    return bool(spec) and names_family(spec) and spec.partition(":")[0] not in FAMILIES


def load_family(spec, args):
    """The teacher that a spec names, and the metadata of its file: (Teacher in evaluation mode, {"task", "step"}). Raises InputError.

    args: an object with the flags of add_teacher_flags. A function is called without arguments and returns a Teacher, or
    any module with what Teacher lists; naming it here is leave to import it.
    """
    head, _, tail = spec.partition(":")
    meta = {"task": None, "step": None}
    if args.autoencoder and head in FAMILIES and head != "resshift":
        raise InputError(f"--autoencoder is for resshift:FILE and functions of yours: {spec} has its own")
    if not names_function(spec):
        family = find_family(head)
        if not hasattr(family, "published"):
            raise InputError(f"{spec}: weights of this project's own network are named without {head}:")
        if absent(args, tail):
            with torch.device("meta"):
                teacher = family.empty(args)
        else:
            teacher, meta = family.published(tail, args)
    else:
        from resshift import VQ_F4, fill_autoencoder
        FAMILIES[spec] = spec
        teacher = build({"family": spec, **({"autoencoder": dict(VQ_F4, mults=list(VQ_F4["mults"]))} if args.autoencoder else {})})
        if args.autoencoder and not absent(args, args.autoencoder):
            fill_autoencoder(teacher, args.autoencoder)
    return teacher.eval().requires_grad_(False), meta


def first_student(args, task, teacher):
    """The student that a new run starts from, by --init_from, and the metadata of its file. Raises InputError if that does not fit."""
    start, meta = teacher, None
    if args.init_from != "teacher" and not absent(args, args.init_from):
        start, meta = load_model(args.init_from, model=task.model)
        form = lambda net: {**net.config, "one_step": None, "folder": None}
        if form(start) != form(teacher):
            raise InputError(f"{args.init_from} is not the teacher's network with the teacher's sigma_p: start from a student of {args.teacher}")
        if meta["task"] and meta["task"]["name"] != task.name:
            raise InputError(f"{args.init_from} was trained for {meta['task']['name']}, not {task.name}")
    return start.student(), meta


# --- files ---


def read_state(path):
    """The tensors of a published file, by name: a state dict (.pth, .pt, .safetensors), alone or under "state_dict" or "params". Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"no weights at {path}")
    if str(path).endswith(".safetensors"):
        state = load_tensors(path)[1]
    else:
        state = load_checkpoint(path)
        for key in ("state_dict", "params_ema", "params"):
            state = state.get(key, state) if isinstance(state.get(key), dict) else state
    # what DistributedDataParallel and torch.compile put before a name
    state = {str(name).replace("module.", "").replace("_orig_mod.", ""): value for name, value in state.items()}
    if not state or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{path} is not a file of weights: it should hold tensors by name")
    return state


def fill(module, state, path, what, assign=False):
    """Load tensors into module, strictly but for BUFFERS, in float32; assign: those of state themselves, as they are. Raises InputError, one line that says how many do not fit."""
    state = {name: value for name, value in state.items() if not name.endswith(BUFFERS)}
    own = module.state_dict()
    wrong = [n for n, p in own.items() if n not in state or state[n].shape != p.shape or state[n].dtype not in FLOATS]
    if wrong or len(state) != len(own):
        first = f", the first {wrong[0]}" if wrong else ""
        raise InputError(f"{path} does not hold {what}: {len(wrong)} of its {len(own)} tensors are missing or of another shape{first}; "
                         f"{len(set(state) - set(own))} others are not its own")
    if bad := [n for n, v in state.items() if not v.isfinite().all()]:
        raise InputError(f"{path} is broken: {bad[0]} holds values that are not finite")
    module.load_state_dict(state if assign else {name: value.float() for name, value in state.items()}, assign=assign)
    return module
