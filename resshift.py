"""ResShift (Yue et al. 2023): its Swin U-Net and its VQ autoencoder under the published names, its schedule, its own sampler.

    teacher = load_teacher("resshift:resshift_realsrx4_s4_v3.pth", args)[0]     # args.autoencoder names autoencoder_vq_f4.pth
    v = teacher(x_in, t)                      # x_in = concat(x_t, z_lr): (B, 6, h, w) latents, t: (B,) -> v: (B, 3, h, w)
    z_1, nfe = teacher.ancestral(x_in, noise, 4)      # its own sampler

With schedule=None the same backbone is trained as this project's flow, the paper's ResShift*: train_flow.py --model resshift, in
latents with --autoencoder FILE.
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoints import load_tensors
from console import InputError
from model import (
    PRESETS,
    Conv3x3,
    NormSiLU,
    ResBlock,
    Stage,
    UpConv,
    build,
    load_model,
    timestep_embedding,
)
from teachers import Teacher, fill, linear_path, read_state

SWINUNET = PRESETS["resshift"]["net"]
VQ_F4 = dict(channels=128, mults=(1, 2, 4), blocks=2, codes=8192)
# kappa: noise in units of the latents' deviation; min_noise: kappa sqrt(eta_1); power: how fast eta rises; pixels: no latents.
SCHEDULES = {4: dict(steps=4, kappa=2.0, min_noise=0.2, power=0.3), 15: dict(steps=15, kappa=2.0, min_noise=0.04, power=0.3)}
SQRT_ETA_END = 0.99


# --- the schedule ---


def sqrt_eta(i, steps, kappa, min_noise, power):
    """sqrt(eta) of step i in [0, steps-1], fractions too: from min_noise / kappa to .99, geometric in (i / (steps-1))^power.

    i a tensor, or a number; the published tables at whole i. sqrt(eta_1) is min_noise itself where kappa < 1.
    """
    first = min(min_noise / kappa, min_noise)
    return first * (SQRT_ETA_END / first) ** ((i / (steps - 1)) ** power)


def step_at(tau, steps, kappa, min_noise, power):
    """The inverse of sqrt_eta: the (fractional) step at which sqrt(eta) = tau, 0 below the first one; tau (B,)."""
    first = min(min_noise / kappa, min_noise)
    part = (torch.log(tau.clamp(min=first) / first) / math.log(SQRT_ETA_END / first)).clamp(0, 1)
    return (steps - 1) * part ** (1 / power)


def shift_path(t, kappa, tau_0=SQRT_ETA_END):
    """ResShift's path, z_eta = (1 - eta) z_1 + eta z_lr + kappa sqrt(eta) eps, over t: ((a, b, c), slopes), each (B,).

    Along eta its velocity, given z_1 and eps = (z_eta - z_1 - eta (z_lr - z_1)) / (kappa sqrt(eta)), is
        dz/d eta = (z_lr - z_1) + kappa eps / (2 sqrt(eta)) = (z_lr - z_1) + (z_eta - z_1 - eta (z_lr - z_1)) / (2 eta)
    and the probability flow is that with the predicted z_1 (teachers.to_velocity). Its second term grows without bound
    as eta falls. Over tau = sqrt(eta) it does not: dz/d tau = 2 tau dz/d eta = 2 tau (z_lr - z_1) + kappa eps. So tau falls
    linearly, tau = tau_0 (1 - t), from tau_0 = .99, where the chain begins, to 0 at the picture: the noise goes at the
    constant speed kappa tau_0, and v is of one size all the way.
    """
    tau, zero = tau_0 * (1 - t), torch.zeros_like(t)
    return (1 - tau**2, tau**2, kappa * tau), (2 * tau * tau_0, -2 * tau * tau_0, zero - kappa * tau_0)


# --- the Swin U-Net ---


class WindowAttention(nn.Module):
    """Self-attention within windows with a learnt bias for each offset: x (B, n, N, C) of n windows of N tokens, mask (n, N, N)."""

    def __init__(self, channels, window, heads):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * window - 1) ** 2, heads), std=0.02))
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def offsets(self, device):
        """(N, N): the row of the table for each pair of positions of a window."""
        i = torch.arange(self.window**2, device=device)
        dy, dx = (a[:, None] - a + self.window - 1 for a in (i // self.window, i % self.window))
        return dy * (2 * self.window - 1) + dx

    def forward(self, x, mask):
        B, n, N, C = x.shape
        # Windows stand beside heads: one (n heads, N, N) bias serves the whole batch.
        q, k, v = self.qkv(x).view(B, n, N, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        bias = self.relative_position_bias_table[self.offsets(x.device)].permute(2, 0, 1) + mask[:, None]  # (n, heads, N, N)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None].to(q.dtype))  # (B, n heads, N, C/heads)
        return self.proj(h.unflatten(1, (n, self.heads)).transpose(2, 3).reshape(B, n, N, C))


class Norm(nn.GroupNorm):
    """GroupNorm of planes in order: in bfloat16 on a CPU PyTorch's backward pass takes 14 times as long with the channels last."""

    def forward(self, x):
        return super().forward(x.contiguous())


class SwinBlock(nn.Module):
    """Attention within windows, moved by `shift` on both axes, then an MLP: x (B, C, H, W), any H and W.

    A map that is not whole windows is padded at the right and the bottom, and nobody attends to the padding.
    """

    def __init__(self, channels, window, heads, shift, mlp_ratio):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = Norm(32, channels), Norm(32, channels)
        self.attn = WindowAttention(channels, window, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Conv2d(channels, mlp_ratio * channels, 1), "fc2": nn.Conv2d(mlp_ratio * channels, channels, 1)})

    def windows(self, x):
        """(B, C, H, W) -> (B, n, window^2, C)."""
        w = self.window
        return x.unflatten(2, (-1, w)).unflatten(4, (-1, w)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    def mask(self, H, W, padded, device):
        """(n, N, N): -100 where two positions of a window are taken for no neighbours, or the second is padding, else 0.

        The seam that the shift closes is marked as in the published code, whose weights were trained with it: only in the
        lowest windows, and there with rows and columns swapped, the left columns against the right ones.
        """
        rows, columns = (torch.arange(size, device=device) for size in padded)
        inside = (rows.roll(-self.shift) < H)[:, None] & (columns.roll(-self.shift) < W)
        seam = ((rows >= padded[0] - self.shift) & (self.shift > 0))[:, None].expand_as(inside)
        seam, inside = self.windows(torch.stack([seam, inside])[None])[0].unbind(-1)  # (n, N)
        seam = seam.unflatten(1, (self.window, self.window)).mT.flatten(1)
        return -100.0 * ((seam[:, :, None] != seam[:, None, :]) | ~inside[:, None, :]).float()

    def forward(self, x):
        H, W = x.shape[2:]
        padded = [-(-side // self.window) * self.window for side in (H, W)]
        h = F.pad(self.norm1(x), (0, padded[1] - W, 0, padded[0] - H)).roll((-self.shift, -self.shift), (2, 3))
        h = self.attn(self.windows(h), self.mask(H, W, padded, x.device))
        h = h.unflatten(1, (padded[0] // self.window, -1)).unflatten(3, (self.window, -1)).permute(0, 5, 1, 3, 2, 4)
        h = h.flatten(4, 5).flatten(2, 3).roll((self.shift, self.shift), (2, 3))[:, :, :H, :W]
        x = x + h
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class SwinLayer(nn.Module):
    """A few SwinBlocks, every other one shifted, at a width of their own: x (B, C, H, W) -> the same."""

    def __init__(self, channels, size, swin_depth, swin_channels, head_channels, window, mlp_ratio):
        super().__init__()
        whole = size <= window  # one window holds the map that it was made for
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, swin_channels, 1)})
        self.blocks = nn.ModuleList(SwinBlock(
            swin_channels, min(size, window), swin_channels // head_channels, 0 if whole or i % 2 == 0 else window // 2, mlp_ratio) for i in range(swin_depth))
        self.patch_unembed = nn.ModuleDict({"proj": nn.Conv2d(swin_channels, channels, 1)})

    def forward(self, x):
        x = self.patch_embed["proj"](x)
        for block in self.blocks:
            x = block(x)
        return self.patch_unembed["proj"](x)


class Down(nn.Module):
    """Halving by a strided convolution: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Up(nn.Module):
    """Doubling by repetition and a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = UpConv(channels, channels)

    def forward(self, x):
        return self.conv(x)


class SwinUNet(nn.Module):
    """ResShift's network: concat(x, lq) (B, 6, H, W), step (B,) in [0, steps-1], fractions too -> (B, 3, H, W).

    image_size: of the pictures (or latents) it was made for, which fixes where there is attention (at the sizes in
    `attention`) and that windows are not shifted where one fills the map. swin_*: depth and width of each attention layer.
    H, W multiples of `multiple`. Raises ValueError for others.
    """

    def __init__(self, image_size, channels, mults, blocks, attention, swin_depth, swin_channels, head_channels, window, mlp_ratio, groups=32):
        super().__init__()
        self.channels, self.multiple, emb = channels, 2 ** (len(mults) - 1), 4 * channels
        self.time_embed = nn.ModuleDict({"0": nn.Linear(channels, emb), "2": nn.Linear(emb, emb)})
        swin = lambda ch, size: SwinLayer(ch, size, swin_depth, swin_channels, head_channels, window, mlp_ratio)

        def stage(c_in, c_out, size, first):
            return [ResBlock(c_in, emb, c_out, groups), *([swin(c_out, size)] if first and size in attention else [])]

        ch, size = channels * mults[0], image_size
        self.input_blocks, skips = nn.ModuleList([Stage(Conv3x3(6, ch))]), [ch]
        for level, mult in enumerate(mults):
            for i in range(blocks):
                self.input_blocks.append(Stage(*stage(ch, mult * channels, size, i == 0)))
                skips.append(ch := mult * channels)
            if level < len(mults) - 1:
                self.input_blocks.append(Stage(Down(ch)))
                skips.append(ch)
                size //= 2
        self.middle_block = Stage(ResBlock(ch, emb, ch, groups), swin(ch, size), ResBlock(ch, emb, ch, groups))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                layers = stage(ch + skips.pop(), ch := mult * channels, size, i == 0)
                if level and i == blocks:
                    layers.append(Up(ch))
                    size *= 2
                self.output_blocks.append(Stage(*layers))
        self.out = nn.ModuleDict({"0": NormSiLU(groups, ch), "2": Conv3x3(ch, 3)})

    def forward(self, x, step):
        if x.shape[-2] % self.multiple or x.shape[-1] % self.multiple:
            raise ValueError(f"the network takes heights and widths that are multiples of {self.multiple}, not {x.shape[-2]} x {x.shape[-1]}")
        emb = self.time_embed["2"](F.silu(self.time_embed["0"](timestep_embedding(step / 999, self.channels))))
        h, skips = x.contiguous(memory_format=torch.channels_last), []
        for block in self.input_blocks:
            skips.append(h := block(h, emb))
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out["2"](self.out["0"](h))


# --- the VQ autoencoder ---


class VQBlock(nn.Module):
    """Residual block of the autoencoder: x (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(32, channels, eps=1e-6), Conv3x3(channels, out_channels)
        self.norm2, self.conv2 = NormSiLU(32, out_channels, eps=1e-6), Conv3x3(out_channels, out_channels)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x):
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class VQAttention(nn.Module):
    """Self-attention over all positions, one head: x (B, C, H, W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        return x + self.proj_out(h)


def vq_middle(channels):
    return nn.ModuleDict({"block_1": VQBlock(channels, channels), "attn_1": VQAttention(channels), "block_2": VQBlock(channels, channels)})


class VQAutoencoder(nn.Module):
    """encode: pictures (B, 3, H, W) in [-1, 1] -> latents (B, 3, H/f, W/f), f = 2^(levels-1); decode: back, by the nearest codes."""

    def __init__(self, channels, mults, blocks, codes):
        super().__init__()
        self.factor = 2 ** (len(mults) - 1)
        widths = [channels * m for m in mults]
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        self.encoder["conv_in"], self.encoder["down"] = Conv3x3(3, channels), nn.ModuleList()
        for level, (c_in, c_out) in enumerate(zip([channels, *widths], widths)):
            down = nn.ModuleDict({"block": nn.ModuleList(VQBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))})
            if level < len(widths) - 1:
                down["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(c_out, c_out, 3, stride=2)})
            self.encoder["down"].append(down)
        self.encoder.update({"mid": vq_middle(c_out), "norm_out": NormSiLU(32, c_out, eps=1e-6), "conv_out": Conv3x3(c_out, 3)})
        self.decoder.update({"conv_in": Conv3x3(3, c_out), "mid": vq_middle(c_out), "up": nn.ModuleList()})
        for level, (c_in, c_out) in enumerate(zip([*widths[1:], widths[-1]], widths)):  # run from the last to the first
            up = nn.ModuleDict({"block": nn.ModuleList(VQBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks + 1))})
            if level:
                up["upsample"] = nn.ModuleDict({"conv": UpConv(c_out, c_out)})
            self.decoder["up"].append(up)
        self.decoder.update({"norm_out": NormSiLU(32, channels, eps=1e-6), "conv_out": Conv3x3(channels, 3)})
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, 3)})
        self.quant_conv, self.post_quant_conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def encode(self, x):
        e = self.encoder
        h = e["conv_in"](x)
        for down in e["down"]:
            for block in down["block"]:
                h = block(h)
            if "downsample" in down:
                h = down["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))
        h = through_middle(e["mid"], h)
        return self.quant_conv(e["conv_out"](e["norm_out"](h)))

    def nearest_codes(self, z):
        """Each latent's nearest code, in float32: (B, 3, h, w) -> the same shape."""
        codes = self.quantize["embedding"].weight.float()
        flat = z.float().movedim(1, -1).flatten(0, 2)  # (B h w, 3)
        # |z - c|^2 without |z|^2, in pieces that hold 2^24 distances
        index = torch.cat([(codes.square().sum(1) - 2 * part @ codes.T).argmin(1) for part in flat.split(max(1, 2**24 // len(codes)))])
        return codes[index].view(z.shape[0], *z.shape[2:], 3).movedim(-1, 1)

    def decode(self, z, quantize=True):
        d = self.decoder
        h = d["conv_in"](self.post_quant_conv(self.nearest_codes(z).to(z.dtype) if quantize else z))
        h = through_middle(d["mid"], h)
        for up in reversed(d["up"]):
            for block in up["block"]:
                h = block(h)
            if "upsample" in up:
                h = up["upsample"]["conv"](h)
        return d["conv_out"](d["norm_out"](h))


def through_middle(middle, h):
    for name in ("block_1", "attn_1", "block_2"):
        h = middle[name](h)
    return h


def fill_autoencoder(model, path):
    """Load the published autoencoder at path into a ResShift's. Raises InputError."""
    fill(model.autoencoder, read_state(path), path, "ResShift's autoencoder (VQ, f4)")


def new_flow(config, path, dry_run=False):
    """A flow in the latents of the published autoencoder at path, the paper's ResShift*: (arguments of ResShift, weights: its network's drawn, None in a dry run).

    config: the arguments of the same flow in pixels. Raises InputError.
    """
    with torch.device("meta" if dry_run else "cpu"):
        model = build({**config, "autoencoder": VQ_F4})
    if dry_run:
        return model.config, None
    fill_autoencoder(model, path)
    return model.config, model.state_dict()


# --- the teacher ---


class ResShift(Teacher):
    """v(x_in, t) of a ResShift, x_in = concat(x_t, z_lr) (B, 6, h, w); its student; or the same backbone trained as a flow.

    net          arguments of SwinUNet
    schedule     of SCHEDULES' form, "pixels": True where the noise is in pictures; or None: net says v itself, at 999 t
    sigma_p      of a flow's start, Eq. (4); not ResShift's
    autoencoder  arguments of VQAutoencoder, None in pixels
    Between the steps that it was trained at, ResShift is asked at the fraction of a step whose sqrt(eta) is the state's, and
    below the first step (t > t_last) at the first: what remains there is the one jump to its prediction.
    """
    def __init__(self, net, schedule=None, sigma_p=None, autoencoder=None, one_step=False):
        super().__init__(SwinUNet(**net), "velocity" if schedule is None else "x_1", one_step=one_step)
        plain = lambda d: {k: list(v) if isinstance(v, tuple) else v for k, v in d.items()} if d else None
        self.config = dict(family="resshift", net=plain(net), schedule=plain(schedule), sigma_p=sigma_p, autoencoder=plain(autoencoder), one_step=one_step)
        self.schedule, self.sigma_p = schedule, sigma_p
        self.autoencoder = VQAutoencoder(**autoencoder).requires_grad_(False) if autoencoder else None
        self.factor = self.autoencoder.factor if autoencoder else 1
        self.multiple, self.t_last = self.net.multiple * self.factor, 1.0
        self.width = sum(sum(d["channels"] * mult / (factor * 2**level) ** 2 for level, mult in enumerate(d["mults"]))
                         for d, factor in ((net, self.factor), (autoencoder, 1)) if d)
        if schedule:
            self.times = {k: v for k, v in schedule.items() if k != "pixels"}
            self.t_last = 1 - sqrt_eta(0, **self.times) / SQRT_ETA_END

    @classmethod
    def empty(cls, args):
        """The published teacher without its weights, with an autoencoder where args.autoencoder names one, of a chain of args.chain steps."""
        return cls(SWINUNET, dict(SCHEDULES[args.chain], pixels=args.autoencoder is None), autoencoder=VQ_F4 if args.autoencoder else None)

    @classmethod
    def published(cls, path, args):
        """The teacher in a file, one of this project or a published one, and its metadata: args has --autoencoder and --chain.

        A published file holds the network alone: its autoencoder is another, and the steps of its chain are --chain.
        """
        state = None if str(path).endswith(".safetensors") and Path(path).is_file() and load_tensors(path)[0] else read_state(path)
        if state is None:
            teacher, meta = load_model(path)
            if not isinstance(teacher, cls) or teacher.one_step:
                raise InputError(f"{path} holds no ResShift to learn from")
            return teacher, meta
        teacher = cls.empty(args)
        fill(teacher.net, state, path, "ResShift's network")
        if args.autoencoder:
            fill_autoencoder(teacher, args.autoencoder)
        return teacher, {"task": None, "step": None}

    def path(self, t):
        return shift_path(t, self.schedule["kappa"]) if self.schedule else linear_path(t, self.sigma_p)

    def predict(self, x_t, z_lr, t):
        if not self.schedule:
            return self.net(torch.cat([x_t, z_lr], dim=1), 999 * t)
        tau = SQRT_ETA_END * (1 - t)
        return self.clean(x_t, z_lr, step_at(tau, **self.times), torch.full_like(t, SQRT_ETA_END) if self.one_step else tau)

    def clean(self, x_t, z_lr, step, tau):
        """The network's z_1, given a state of noise kappa tau: step, tau (B,)."""
        noise = self.schedule["kappa"] * tau.clamp(min=sqrt_eta(0, **self.times))
        scale = 1 / (1 + 3 * noise) if self.schedule.get("pixels") else (1 + noise**2).rsqrt()
        return self.net(torch.cat([x_t * scale.view(-1, 1, 1, 1), z_lr], dim=1), step)

    @torch.no_grad()
    def ancestral(self, x_in, noise, steps):
        """ResShift's own sampler: concat(x_0, z_lr) -> (z_1 (B, 3, h, w), evaluations), in `steps` steps of its chain, evenly taken.

        From step i to the one below, with eta_{-1} = 0: x = (eta_{i-1} / eta_i) x + (alpha_i / eta_i) z_1 + kappa sqrt(eta_{i-1} alpha_i / eta_i) eps,
        alpha_i = eta_i - eta_{i-1}. noise(i) gives eps (B, 3, h, w). In pixels each prediction is clamped, as published.
        Raises InputError for more steps than the chain has.
        """
        if not self.schedule or steps > self.times["steps"]:
            raise InputError(f"the network has a chain of {self.times['steps']} steps, not {steps}" if self.schedule else
                             "the sampler ancestral is a ResShift's: this network was trained as a flow")
        x, z_lr = x_in.float().chunk(2, dim=1)
        chosen = [round(i) for i in torch.linspace(self.times["steps"] - 1, 0, steps).tolist()][::-1]
        taus = [sqrt_eta(i, **self.times) for i in chosen]
        for i in reversed(range(len(taus))):
            at = lambda value: torch.full((x.shape[0],), float(value), device=x.device)
            z_1 = self.clean(x, z_lr, at(chosen[i]), at(taus[i])).float()
            z_1 = z_1 if self.autoencoder else z_1.clamp(-1, 1)
            eta, before = taus[i] ** 2, taus[i - 1] ** 2 if i else 0.0
            x = before / eta * x + (1 - before / eta) * z_1
            if i:
                x = x + self.schedule["kappa"] * (before * (eta - before) / eta) ** 0.5 * noise(i)
        return x, len(taus)
