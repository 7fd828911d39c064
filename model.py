"""The velocity network v(x_t, x_lr, t), its presets, and the files that hold it.

One U-Net: guided-diffusion's (Dhariwal & Nichol 2021), with its parameter names and their order, so
that the published files load. Two options of our own make it small enough for a laptop: `patch`
(pixel-unshuffle in, pixel-shuffle out) and `precond` (the network only says what a linear estimate
cannot know).

    model = UNet(**PRESETS["photos"])
    v = model(x_in, t)        # x_in = concat(x_t, x_lr): (B, 6, H, W), t: (B,) in [0, 1] -> v: (B, 3, H, W)

Legend: x_1 HR image (t = 1), x_lr = H^T(H(x_1) + n), x_0 = noised x_lr (t = 0), x_t = (1-t) x_0 + t x_1.
"""
import copy
import importlib
import math
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checkpoints import load_checkpoint, load_tensors, save_tensors
from console import InputError, Parser, check_file, in_range
from kernels import add_conv1x1, conv3x3, conv3x3_in_bf16, conv3x3_in_float32, group_norm_silu, noise_augment

# The families of networks that a checkpoint can hold and `--teacher FAMILY:...` can name, and the class of each: the one place
# to add one. What a class has to say of itself is written in teachers.Teacher.
FAMILIES = {"unet": "model:UNet", "resshift": "resshift:ResShift", "dit4sr": "dit4sr:DiT4SR"}

# channels, mults, blocks: width of the first level, its multiple at each level, residual blocks a level.
# attention: down-sampling factors at which there is attention (none at all if empty). groups, patch, precond: see UNet;
# True stands for the sigmas of the task, which network_config fills in. dropout: the published configurations'.
PRESETS = {
    "tiny": dict(channels=32, mults=(1, 2), blocks=1, patch=2, precond=True),  # for tests
    "photos": dict(channels=32, mults=(1, 3, 4), blocks=2, groups=4, patch=2, precond=True),
    "plain": dict(channels=32, mults=(1, 2), blocks=1, groups=4, patch=2),  # small, for any sigma_p from 0 to 1, and without x_lr
    "ffhq": dict(channels=128, mults=(1, 1, 2, 2, 4, 4), blocks=1, attention=(16,), out_channels=6, dropout=0.1),
    "ffhq512": dict(channels=128, mults=(1, 1, 2, 2, 4, 4), blocks=1, attention=(32,), out_channels=6, dropout=0.1),
    "imagenet": dict(channels=256, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=(8, 16, 32), out_channels=6, dropout=0.1),
    # ResShift's backbone, trained as a flow: see resshift.SwinUNet
    "resshift": dict(family="resshift", net=dict(image_size=64, channels=160, mults=(1, 2, 2, 4), blocks=2, attention=(64, 32, 16, 8),
                                                 swin_depth=2, swin_channels=192, head_channels=32, window=8, mlp_ratio=4)),
    "resshift_small": dict(family="resshift", net=dict(image_size=32, channels=32, mults=(1, 2), blocks=1, attention=(16,), groups=4,
                                                       swin_depth=2, swin_channels=32, head_channels=16, window=8, mlp_ratio=2)),
}


def network_config(preset, condition=True, sigma_p=None, sigma_d=None):
    """The arguments of the network of a preset; a preconditioned one wants sigma_p and sigma_d, both > 0."""
    if "family" in PRESETS[preset]:
        if not condition:
            raise InputError(f"the network {preset!r} sees x_lr: it has no unconditional form")
        return dict(PRESETS[preset], sigma_p=sigma_p)
    config = dict(PRESETS[preset], condition=condition)
    if config.get("precond"):
        if not sigma_p or not condition:
            raise InputError(f"the network {preset!r} is preconditioned, which takes sigma_p > 0 and the condition x_lr")
        if not sigma_d:
            raise InputError("x_lr equals x_1 on all training pictures: there is nothing to restore (is --scale 1?)")
        config["precond"] = dict(sigma_p=sigma_p, sigma_d=sigma_d)
    return config


def trusted():
    """The names in OFTSR_FAMILIES, of code that checkpoints may ask for."""
    return [name for name in os.environ.get("OFTSR_FAMILIES", "").split(",") if name]


def find_family(name):
    """The class (or function) behind the name of a family. Raises InputError if there is none of that name.

    A "package.module:function" of somebody's own is imported only if it was named on the command line or in
    OFTSR_FAMILIES (names with commas between): a checkpoint alone does not get code to run.
    """
    if name not in FAMILIES and name not in trusted():
        raise InputError(f"the checkpoint holds a network of the family {name!r}, which is none of {', '.join(FAMILIES)}: if it is yours, "
                         f"say OFTSR_FAMILIES={name}" if ":" in name else f"there is no family {name!r}: there are {', '.join(FAMILIES)}")
    module, _, function = FAMILIES.get(name, name).partition(":")
    if __package__ and ":" not in name:  # ours, in the installed package
        module = f"{__package__}.{module}"
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as e:
        raise InputError(f"cannot import {module}:{function}: {e}") from e


def build(config):
    """The network of a checkpoint's or preset's arguments: UNet, unless they say another "family"."""
    config = dict(config)
    name = config.pop("family", "unet")
    if name in FAMILIES and FAMILIES[name] != name:
        return find_family(name)(**config)
    teacher = find_family(name)()  # somebody's own function: its teacher, or the student of that
    teacher.config = {"family": name, **config}
    if config.get("autoencoder"):
        teacher.enter_latents(config["autoencoder"])
    return teacher.student() if config.get("one_step") else teacher


def timestep_embedding(t, dim):
    """Sinusoidal embedding of t (B,) in [0, 1], the published networks' 999 t: (B, dim), cosines first."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    args = 999 * t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class NormSiLU(nn.GroupNorm):
    """GroupNorm, optional scale-shift (B, 2C), SiLU: one kernel."""

    def forward(self, x, scale_shift=None):
        scale, shift = (None, None) if scale_shift is None else scale_shift.chunk(2, dim=1)
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, scale, shift, self.eps)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with zeros around the picture, (B, C, H, W) -> (B, C', H, W): a kernel of ours where it is faster."""

    def __init__(self, channels, out_channels):
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x):
        return conv3x3(x, self.weight, self.bias)


class UpConv(Conv3x3):
    """A 3x3 convolution of x doubled by repetition, without the doubled x: (B, C, H, W) -> (B, C', 2H, 2W).

    By conv3x3 where a kernel of ours takes it. Elsewhere: among repeated pixels a 3x3 kernel meets only 2x2 different ones,
    another 2x2 in each phase (a, b) of the output's rows and columns. So the taps that fall on one pixel are added, and four
    2x2 convolutions of x do it, with 4/9 of the arithmetic.
    """

    def forward(self, x):
        B, _, H, W = x.shape
        if conv3x3_in_bf16(x, self.weight, doubled=True) or conv3x3_in_float32(x, self.weight, doubled=True):
            return conv3x3(x, self.weight, self.bias, doubled=True)
        if H * W < 1024:  # adding the taps would cost more than it saves
            return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        e = torch.eye(3, dtype=self.weight.dtype, device=x.device)
        taps = torch.stack([e[0], e[1] + e[2], e[0] + e[1], e[2]]).view(2, 2, 3)  # (phase, tap of 2, taps of 3 that it sums)
        weight = torch.einsum("aph,bqw,oihw->aboipq", taps, taps, self.weight).flatten(0, 2)
        phases = F.conv2d(x, weight, self.bias.repeat(4), padding=1).unflatten(1, (2, 2, -1))  # (B, 2, 2, C', H+1, W+1)
        y = torch.empty(B, self.out_channels, 2 * H, 2 * W, dtype=phases.dtype, device=x.device, memory_format=torch.channels_last)
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):  # pixel (2i + a, 2j + b) is phase (a, b) at (i + a, j + b)
            y[:, :, a::2, b::2] = phases[:, a, b, :, a:a + H, b:b + W]
        return y


def add(h, x):
    """h + x, or, of twice its height and width, h + x doubled by repetition: (B, C, H, W). Where there is no gradient it is added to h in place."""
    doubled = h.shape != x.shape
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler, or an exporter, makes something of its own of it
        return h + (F.interpolate(x, scale_factor=2, mode="nearest") if doubled else x)
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)) if doubled else ():  # without the doubled x
        h[:, :, a::2, b::2].add_(x)
    return h if doubled else h.add_(x)


class Skip(nn.Conv2d):
    """h + the 1x1 convolution of x: x (B, C, H, W), h (B, C', H, W) -> (B, C', H, W), in place where there is no gradient."""

    def __init__(self, channels, out_channels):
        super().__init__(channels, out_channels, 1)

    def forward(self, x, h):
        return add_conv1x1(h, x, self.weight, self.bias)


class ResBlock(nn.Module):
    """x (B, C, H, W), emb (B, E) -> (B, C', H', W'); `resample` is None, "down" (mean of 2x2) or "up" (repeat 2x2)."""

    def __init__(self, channels, emb_dim, out_channels, groups, resample=None):
        super().__init__()
        self.resample, self.dropout = resample, 0.0
        # The keys are the published names; what has no parameters (SiLU, dropout) has no entry.
        first = (UpConv if resample == "up" else Conv3x3)(channels, out_channels)
        self.in_layers = nn.ModuleDict({"0": NormSiLU(groups, channels), "2": first})
        self.emb_layers = nn.ModuleDict({"1": nn.Linear(emb_dim, 2 * out_channels)})
        self.out_layers = nn.ModuleDict({"0": NormSiLU(groups, out_channels), "3": zeroed(Conv3x3(out_channels, out_channels))})
        self.skip_connection = None if channels == out_channels else Skip(channels, out_channels)

    def forward(self, x, emb):
        h = self.in_layers["0"](x)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        h = self.in_layers["2"](h)
        h = self.out_layers["0"](h, self.emb_layers["1"](F.silu(emb)))
        if self.dropout:
            h = F.dropout(h, self.dropout, self.training)
        h = self.out_layers["3"](h)
        return self.skip_connection(x, h) if self.skip_connection else add(h, x)


class AttentionBlock(nn.Module):
    """Self-attention over the H W positions of x (B, C, H, W); the qkv channels are grouped by head, then q, k, v."""

    def __init__(self, channels, head_channels, groups):
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"heads of {head_channels} channels do not divide {channels}")
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).reshape(B, C, H * W))
        qkv = qkv.view(B, self.heads, 3, C // self.heads, H * W).transpose(-1, -2)  # (B, heads, 3, HW, C/heads)
        h = F.scaled_dot_product_attention(*qkv.unbind(2))  # (B, heads, HW, C/heads)
        h = self.proj_out(h.transpose(-1, -2).reshape(B, C, H * W))
        return x + h.view(B, C, H, W)


class Stage(nn.Sequential):
    """One entry of input_blocks, middle_block or output_blocks: passes the time embedding to those who want it.

    recompute  what its layers make is not kept for the backward pass, which makes it again: less memory, a third more time.
    """
    recompute = False

    def forward(self, x, emb):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.through, x, emb, use_reentrant=False)
        return self.through(x, emb)

    def through(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def zeroed(layer):
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class UNet(nn.Module):
    """The velocity network. x_in = concat(x_t, x_lr) (B, 6, H, W), t (B,) -> v (B, 3, H, W); H, W multiples of `multiple`.

    groups     of every GroupNorm. As many as channels would be InstanceNorm, which hides from a layer how strong each
               of its channels is: few groups suit a narrow network (LOG.md).
    patch      p > 1: the work is done at 1/p of the width and height, on p^2 times the channels.
    precond    None, or {"sigma_p", "sigma_d"}: see `coefficients`.
    one_step   a distilled student, whose input is always x_0, whatever t.
    dropout    share of the features that a residual block forgets while it is trained.
    condition  False: no x_lr among the inputs (channels 3 to 5 of x_in are not read).
    Raises ValueError for a size that is not a multiple of `multiple`, and for channels that do not divide.
    """

    def __init__(self, channels, mults, blocks, attention=(), head_channels=64, groups=32, patch=1, out_channels=3,
                 condition=True, precond=None, one_step=False, dropout=0.0):
        super().__init__()
        if channels % 2:
            raise ValueError(f"channels must be even, for sines and cosines, not {channels}")
        self.config = dict(channels=channels, mults=list(mults), blocks=blocks, attention=list(attention),
                           head_channels=head_channels, groups=groups, patch=patch, out_channels=out_channels,
                           condition=condition, precond=precond, one_step=one_step, dropout=dropout)
        self.patch, self.precond, self.one_step, self.condition = patch, precond, one_step, condition
        self.multiple = patch * 2 ** (len(mults) - 1)
        self.channels, emb = channels, 4 * channels
        self.feature_channels = [mult * channels for mult in mults]
        self.time_embed = nn.ModuleDict({"0": nn.Linear(channels, emb), "2": nn.Linear(emb, emb)})

        def stage(c_in, c_out, factor):
            attend = [AttentionBlock(c_out, head_channels, groups)] if factor in attention else []
            return [ResBlock(c_in, emb, c_out, groups), *attend]

        ch, factor = channels * mults[0], 1
        first = Conv3x3((6 if condition else 3) * patch**2, ch)
        self.input_blocks, skips = nn.ModuleList([Stage(first)]), [ch]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.input_blocks.append(Stage(*stage(ch, mult * channels, factor)))
                skips.append(ch := mult * channels)
            if level < len(mults) - 1:
                self.input_blocks.append(Stage(ResBlock(ch, emb, ch, groups, "down")))
                skips.append(ch)
                factor *= 2
        middle = AttentionBlock(ch, head_channels, groups) if attention else nn.Identity()
        self.middle_block = Stage(ResBlock(ch, emb, ch, groups), middle, ResBlock(ch, emb, ch, groups))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                layers = stage(ch + skips.pop(), ch := mult * channels, factor)
                if level and i == blocks:
                    layers.append(ResBlock(ch, emb, ch, groups, "up"))
                    factor //= 2
                self.output_blocks.append(Stage(*layers))
        last = zeroed(Conv3x3(ch, out_channels * patch**2))
        self.out = nn.ModuleDict({"0": NormSiLU(groups, ch), "2": last})
        for block in self.modules():
            if isinstance(block, ResBlock):
                block.dropout = dropout

    def encode(self, x, t):
        """The first half of F: x as raw's -> the embedding of t (B, E), and what each input block makes, a list of (B, C, h, w)."""
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise ValueError(f"the network takes heights and widths that are multiples of {self.multiple}, not {x.shape[-2]} x {x.shape[-1]}")
        emb = self.time_embed["2"](F.silu(self.time_embed["0"](timestep_embedding(t, self.channels))))
        h, skips = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x, []
        h = h.contiguous(memory_format=torch.channels_last)
        for block in self.input_blocks:
            skips.append(h := block(h, emb))
        return emb, skips

    def raw(self, x, t):
        """The bare network F: x (B, 6 or 3, H, W), t (B,) -> (B, out_channels, H, W)."""
        emb, skips = self.encode(x, t)
        h = self.middle_block(skips[-1], emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        h = self.out["2"](self.out["0"](h))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h

    # What every family says of itself (see teachers.Teacher); this one works on pictures, and was trained at every t.
    factor, t_last = 1, 1.0

    def to_latents(self, x):
        return x

    def to_pixels(self, x):
        return x

    def start(self, x_lr, sigma_p, seeds, corner=(0, 0)):
        """concat(x_0, x_lr), Eq. (4): x_lr (B, 3, H, W), seeds (B,) int64 -> (B, 6, H, W); corner as noise_augment's."""
        return noise_augment(x_lr, sigma_p, seeds, corner)

    @property
    def width(self):
        """Values of one map of each of its levels, for a pixel of the picture."""
        return sum(self.channels * mult / (self.patch * 2**level) ** 2 for level, mult in enumerate(self.config["mults"]))

    def student(self):
        """The network that distillation starts from: this one, told that its input is x_0."""
        with torch.device(next(self.parameters()).device):
            student = UNet(**{**self.config, "one_step": True})
        student.load_state_dict(self.state_dict())
        return student

    def coefficients(self, t):
        """c_skip, c_in, c_out of the preconditioned velocity, each (B, 1, 1, 1).

        With r = x_t - x_lr and d = x_1 - x_lr of variance sigma_d^2, and x_0 taken for x_lr + sigma_p eps:
            r = (1-t) sigma_p eps + t d    of variance n = (1-t)^2 sigma_p^2 + t^2 sigma_d^2
            v = x_1 - x_0 = d - sigma_p eps,    cov(v, r) = t sigma_d^2 - (1-t) sigma_p^2
        so the best linear estimate of v from r is cov(v, r) / n r = c_skip (x_lr - x_t), and what it leaves
        has variance sigma_p^2 + sigma_d^2 - cov(v, r)^2 / n = sigma_p^2 sigma_d^2 / n = c_out^2. The network
        says that rest, in units of c_out, from r in units of its deviation (the idea is EDM's, Karras et al. 2022):
            v = c_skip (x_lr - x_t) + c_out F(c_in (x_t - x_lr), x_lr, t)
        """
        p2, d2 = self.precond["sigma_p"] ** 2, self.precond["sigma_d"] ** 2
        t = (torch.zeros_like(t) if self.one_step else t).float().view(-1, 1, 1, 1)
        n = (1 - t) ** 2 * p2 + t**2 * d2
        return ((1 - t) * p2 - t * d2) / n, n**-0.5, (p2 * d2 / n) ** 0.5

    def inputs(self, x_in, t):
        """What F is given for x_in = concat(x_t, x_lr) at t (B,); and r = x_t - x_lr, None without preconditioning."""
        if not self.precond:
            return x_in if self.condition else x_in[:, :3], None
        x_t, x_lr = x_in.float().chunk(2, dim=1)
        r, (_, c_in, _) = x_t - x_lr, self.coefficients(t)
        return torch.cat([c_in * r, x_lr], dim=1), r

    def features(self, x_in, t):
        """What the network sees in x_t: of each level of its encoder, finest first, the last map, (B, feature_channels[level], h, w)."""
        _, maps = self.encode(self.inputs(x_in, t)[0], t)
        return [h for h, after in zip(maps, [*maps[1:], None]) if after is None or after.shape[-1] < h.shape[-1]]

    def forward(self, x_in, t):
        t = t.to(x_in.device).expand(x_in.shape[0])
        x, r = self.inputs(x_in, t)
        f = self.raw(x, t)[:, :3]
        if not self.precond:
            return f
        c_skip, _, c_out = self.coefficients(t)
        return c_out * f.float() - c_skip * r


def count_macs(model, height, width, standard=False):
    """Multiply-accumulates of convolutions, linear layers and attention for one picture of height x width, as run; no autoencoder's.

    standard: of the layers as they are usually written, convolutions and linear layers alone, as Table 10 counts them: what
    UpConv saves is in it, the products of attention are not.
    """
    from torch.utils.flop_counter import FlopCounterMode
    meta = copy.deepcopy(model, {id(p): p.to("meta") for p in [*model.parameters(), *model.buffers()]})
    counts = []
    for layer in meta.modules() if standard else ():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(lambda layer, _, out: counts.append(out.numel() * layer.weight[0].numel()))
    channels = getattr(model, "latent_channels", 3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(torch.empty(1, 2 * channels, height // model.factor, width // model.factor, device="meta"), torch.empty(1, device="meta"))
    return sum(counts) if standard else counter.get_total_flops() // 2


# --- files ---

# What a network may be made of, as the file of one says it: (least, most) of each number.
LIMITS = dict(channels=(1, 4096), blocks=(1, 16), head_channels=(1, 4096), groups=(1, 4096), patch=(1, 16), out_channels=(3, 12))


def network_of(config, path):
    """The network that a file's metadata describes, without memory ("meta"). Raises InputError, which names the file, if it describes none."""
    try:
        wrong = [] if config.get("family", "unet") != "unet" else not_a_unet(config)
        if not wrong:
            with torch.device("meta"):
                return build(config)
    except InputError:
        raise
    except Exception as e:  # what a class says to arguments that are not its own
        wrong = [(str(e) or type(e).__name__).splitlines()[0]]
    raise InputError(f"{path} describes no network of this project: {', '.join(wrong)}")


def not_a_unet(config):
    """The names of those arguments of UNet in a file's metadata that are of the wrong type, or larger than any network's."""
    whole = lambda value, low, high: type(value) is int and low <= value <= high
    known = {**dict(attention=[], head_channels=64, groups=32, patch=1, out_channels=3, condition=True, precond=None, one_step=False, dropout=0.0), **config}
    wrong = [k for k, (low, high) in LIMITS.items() if not whole(known[k], low, high)]
    wrong += [k for k in ("mults", "attention") if len(known[k]) > 10 or not all(whole(v, 1, 256) for v in known[k])]
    wrong += [k for k in ("condition", "one_step") if type(known[k]) is not bool]
    p = known["precond"]
    if p and not (p.keys() == {"sigma_p", "sigma_d"} and all(type(v) in (int, float) and 0 < v < 100 for v in p.values())):
        wrong.append("precond")
    if type(known["dropout"]) not in (int, float) or not 0 <= known["dropout"] < 1:
        wrong.append("dropout")
    return wrong if known["mults"] else [*wrong, "mults"]


def named(net, averages, params=None):
    """{name: tensor} of the list of averages that a checkpoint holds: of what is trained, in its order; what is not stands in its params. {} if they are not as many."""
    trained = [n for n, p in net.named_parameters() if p.requires_grad]
    others = params if len(trained) < len(net.state_dict()) and isinstance(params, dict) else {}
    return {**others, **dict(zip(trained, averages))} if len(averages) == len(trained) else {}


FLOATS = torch.float64, torch.float32, torch.bfloat16, torch.float16


def check_fits(net, state, path):
    """Raises InputError if state, {name: tensor} of a file, is not what the network takes: every name, its shape, finite numbers."""
    ours = net.state_dict()
    wrong = [n for n, p in ours.items() if not torch.is_tensor(state.get(n)) or state[n].shape != p.shape or state[n].dtype not in FLOATS]
    if wrong or len(state) != len(ours):
        raise InputError(f"{path} does not hold this network: {len(wrong)} of its {len(ours)} parameters are missing or of another shape")
    if broken := [n for n, p in state.items() if not p.isfinite().all()]:
        raise InputError(f"{path} is broken: its {broken[0]} holds numbers that are not finite")


def preset_name(net):
    """The preset whose network that is, whatever its sigmas; None if it is none's."""
    form = lambda config: {**config, "precond": bool(config.get("precond")), "one_step": False, "condition": True, "dropout": 0, "sigma_p": 0, "autoencoder": None}
    with torch.device("meta"):
        return next((name for name in PRESETS if form(build(PRESETS[name]).config) == form(net.config)), None)


def save_release(path, model, meta):
    """Weights to share: bfloat16 .safetensors with `meta` (a dict of plain types) as JSON beside them. Atomic."""
    save_tensors(path, {name: p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}, {**meta, "model": model.config})


def weights_in(checkpoint, path):
    """The metadata and the weights of a .pt's dict: (dict, a list of averages in parameter order or {name: tensor}).

    Ours; a published OFTSR file, {"ema", "step"}, or all of its training, {"optimizer", "model": weights, "ema", "step"}; or
    bare weights {name: tensor}, as guided-diffusion's are. Raises InputError if it is none of these.
    """
    bare = lambda x: isinstance(x, dict) and len(x) > 0 and all(map(torch.is_tensor, x.values()))
    ema = checkpoint.get("ema")
    if bare(checkpoint):
        return {}, dict(checkpoint)
    if not isinstance(ema, dict) or not isinstance(ema.get("shadow_params"), list):
        raise InputError(f"{path} holds no averaged weights ('ema'), which a checkpoint of this project or a published one does")
    meta = {k: checkpoint.get(k) for k in ("stage", "task", "step", "model", "data")}
    return {**meta, "model": None if bare(meta["model"]) else meta["model"]}, ema["shadow_params"]


def blind(averages, config):
    """Whether a published list of averages is of a U-Net of that config without x_lr (Appendix F's): its first convolution has 3 inputs."""
    if not isinstance(averages, list) or "family" in config:
        return False
    with torch.device("meta"):
        first = [name for name, _ in build(config).named_parameters()].index("input_blocks.0.0.weight")
    return len(averages) > first and averages[first].ndim == 4 and averages[first].shape[1] == 3 * config.get("patch", 1) ** 2


def adapted(state, ours, path):
    """Bare weights {name: tensor} as a network whose parameters are `ours` takes them: guided-diffusion's unconditional ones, too.

    Of the first convolution of those the weights for x_lr begin at 0, as if it were not there; of the last, outputs that we
    do not have go. Every other name and shape must match. Raises InputError that lists what does not.
    """
    state, first = dict(state), "input_blocks.0.0.weight"
    if first in state and state[first].ndim == 4 and 2 * state[first].shape[1] == ours[first].shape[1]:
        state[first] = torch.cat([state[first], torch.zeros_like(state[first])], dim=1)
    for name in ("out.2.weight", "out.2.bias"):
        if name in state and len(state[name]) > len(ours[name]):
            state[name] = state[name][: len(ours[name])]
    wrong = [f"{n} is missing" for n in ours if n not in state] + [f"{n} is none of ours" for n in state if n not in ours]
    wrong += [f"{n} is {tuple(p.shape)}, not {tuple(ours[n].shape)}" for n, p in state.items() if n in ours and p.shape != ours[n].shape]
    if wrong:
        raise InputError(f"{path} does not hold this network, in {len(wrong)} places: {'; '.join(wrong[:8])}{'; ...' if len(wrong) > 8 else ''}")
    return state


def load_model(path, device="cpu", model=None):
    """The network in a file, in float32 and evaluation mode, with its metadata: (UNet or one of another family, dict).

    path is a training checkpoint (its EMA is taken), a .safetensors release, or a file of others: see weights_in. Of these
    `model` names the preset. Metadata holds at
    least "stage" ("flow" or "distill", None if the file does not say) and "task" (a dict, or None).
    Raises InputError when there is no such file, or it is none of these, or does not fit.
    """
    if str(path).endswith(".safetensors"):
        meta, state = load_tensors(path)
    else:
        held = load_checkpoint(path)
        meta, state = weights_in(held, path)
    meta = {"stage": None, "task": None, "step": None, "model": None, **(meta or {})}
    named_task = meta["task"] is None or isinstance(meta["task"], dict) and isinstance(meta["task"].get("name"), str)
    if meta["stage"] not in ("flow", "distill", None) or not named_task or not isinstance(meta["step"], (int, type(None))) or abs(meta["step"] or 0) >= 2**53:
        raise InputError(f"{path} is not one of ours: its stage, task or step is none")
    if not meta["model"]:
        if model is None:
            raise InputError(f"{path} does not say which network it holds: name it with --model {{{','.join(PRESETS)}}}")
        if PRESETS[model].get("precond"):
            raise InputError(f"{path} does not say the sigmas of its network, which {model!r} has: it is not one of ours")
        meta["model"] = PRESETS[model]
        if blind(state, meta["model"]):
            meta["model"] = {**meta["model"], "condition": False}
        if isinstance(state, dict):
            state = adapted(state, network_of(PRESETS[model], path).state_dict(), path)
    net = network_of(meta["model"], path)
    if isinstance(state, list):
        state = named(net, state, held.get("params"))
    check_fits(net, state, path)
    net.load_state_dict({n: p.float() for n, p in state.items()}, assign=True)
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), meta


def average(networks, shares):
    """A new network whose weights are sum_i shares[i] networks[i], in float32: what networks of one start have in common (a post-hoc EMA), or a point between two.

    networks: of one config, as load_model gives them. shares: as many numbers, of sum 1. Raises ValueError if they are not.
    """
    if len(networks) != len(shares) or abs(sum(shares) - 1) > 1e-6 or any(net.config != networks[0].config for net in networks):
        raise ValueError("an average takes networks of one config, and a share of each that sum to 1")
    states = [net.state_dict() for net in networks]
    with torch.device("meta"):  # built anew, as a copy would carry hooks along
        mixed = build(networks[0].config)
    mixed.load_state_dict({name: sum(share * state[name] for share, state in zip(shares, states)) for name in states[0]}, assign=True)
    return mixed.train(networks[0].training).requires_grad_(False)


# --- python model.py convert IN OUT ---


def share(text):
    """FILE or FILE=SHARE, as --average takes them: (file, share or None)."""
    file, sign, number = text.rpartition("=")
    return (file, in_range(float, 0, 1)(number)) if sign else (text, None)


def load_average(net, meta, args):
    """net averaged with the files of --average, each with its share or, where none is given, all alike; net has the rest. Raises InputError if they do not fit."""
    files, given = zip(*args.average)
    if None in given and given.count(None) < len(given):
        raise InputError("--average: give every file a share (FILE=SHARE), or none")
    shares = [1 / (1 + len(files)) if s is None else s for s in given]
    if sum(shares) > 1 + 1e-6:
        raise InputError(f"--average: the shares sum to {sum(shares):g}, more than 1, and {args.file} has the rest")
    networks = [net]
    for file in files:
        other, theirs = load_model(file, model=args.model)
        if other.config != net.config or theirs["stage"] != meta["stage"]:
            raise InputError(f"--average: {file} does not hold the network of {args.file}, at the same stage and with the same sigmas")
        networks.append(other)
    return average(networks, [1 - sum(shares), *shares])


def add_learnt(net, args):
    """net + NEW - OLD: what the flow of OLD learnt until NEW, added to a network that was trained on from OLD. Raises InputError if they do not fit."""
    form = lambda config: {**config, "one_step": None, "folder": None}
    flows = [load_model(file, model=args.model)[0] for file in args.add]
    for file, flow in zip(args.add, flows):
        if form(flow.config) != form(net.config):
            raise InputError(f"--add: {file} does not hold the network of {args.file}, with the same sigmas")
        flow.config = net.config
    return average([net, *flows], [1, 1, -1])


def convert(argv=None):
    """Any file that load_model takes as a release, with what it does not say from flags. Raises InputError."""
    from dataclasses import asdict

    from data import TASKS
    p = Parser(prog="model.py", description="Weights of others, or a training checkpoint, as a .safetensors to share.")
    p.add_argument("what", choices=("convert",))
    p.add_argument("file", metavar="IN", help="a published file, guided-diffusion's, a ckpt.pt or a .safetensors")
    p.add_argument("release", metavar="OUT", help="the .safetensors to write")
    p.add_argument("--model", choices=PRESETS, help="network preset, for a file that does not say")
    p.add_argument("--stage", choices=("flow", "distill"), help="what it is, for a file that does not say")
    p.add_argument("--dataset", choices=TASKS, help="its task, for a file that does not say")
    p.add_argument("--average", nargs="+", default=[], type=share, metavar="FILE[=SHARE]", help="average IN's weights with those of these files, later ones of the same run or of a run from it: each has its share of 1, or all the same, and IN has the rest")
    p.add_argument("--add", nargs=2, metavar=("NEW", "OLD"), help="IN plus what NEW learnt since OLD: a student goes along with its teacher OLD, which was trained on, before any new distillation")
    args = p.parse_args(argv)
    if not args.release.endswith(".safetensors"):
        raise InputError(f"{args.release} should end in .safetensors")
    check_file(args.release)
    net, meta = load_model(args.file, model=args.model)
    for flag, known in (("stage", meta["stage"]), ("dataset", meta["task"] and meta["task"]["name"])):
        if known and getattr(args, flag) not in (None, known):
            raise InputError(f"{args.file} says that it is {known}: --{flag} is for files that do not")
    if args.average:
        net = load_average(net, meta, args)
    if args.add:
        net = add_learnt(net, args)
    stage = meta["stage"] or args.stage
    if stage is None:
        raise InputError(f"{args.file} does not say what it is: add --stage flow or --stage distill")
    task = meta["task"] or (asdict(TASKS[args.dataset]) if args.dataset else None)
    save_release(args.release, net, dict(stage=stage, task=task, step=meta["step"], data=meta.get("data")))
    print(f"{args.release}: {stage} of {task['name'] if task else 'an unknown task'}, {sum(p.numel() for p in net.parameters()):,} parameters, step {meta['step']}")


if __name__ == "__main__":
    try:
        convert()
    except (InputError, OSError) as e:
        sys.exit(f"model.py: {e}")
