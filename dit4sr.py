"""DiT4SR (Duan et al. 2025) as a teacher: Stable Diffusion 3.5's transformer, its image tokens joined by those of the low-quality latent.

    python distill.py --teacher dit4sr:DIR --lora 64 --dataset realsr512 --data_dir DATA     # pip install -e '.[sd3]'

DIR is a folder as diffusers' save_pretrained writes it, and the prompt, one for all pictures:

    transformer/config.json, transformer/diffusion_pytorch_model.safetensors (or its parts, and their index)
    vae/config.json, vae/diffusion_pytorch_model.safetensors
    prompt.safetensors      prompt_embeds (1, L, D), pooled_prompt_embeds (1, P), and negative_ of both, for guidance: what
                            diffusers' StableDiffusion3Pipeline.encode_prompt returns (--prompt names another file)

The path is flow matching's from pure noise, sigma = 1 - t, the network is told 1000 sigma and predicts noise - clean, so
v = -(what it says). A student is the same frozen weights and adapters of low rank (LoRA, Hu et al. 2021) on the linear layers
of its blocks. The frozen weights lie in memory once, however many networks of a process stand on them, in the precision of
their file (float16 as bfloat16). The student's file holds adapters and prompt; it finds the rest in DIR, or where OFTSR_DIT4SR says.
"""
import copy
import hashlib
import json
import os
import weakref
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checkpoints import load_tensors
from console import InputError
from model import build
from teachers import Teacher, fill, guided

try:
    from diffusers import AutoencoderKL
    from diffusers.models.attention import FeedForward
    from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
    from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, RMSNorm, SD35AdaLayerNormZeroX
    from peft import LoraConfig, inject_adapter_in_model
except ImportError as e:
    raise InputError(f"a DiT4SR needs diffusers and peft: pip install -e '.[sd3]' ({e})") from e

# What was published: the arguments of Transformer, and of diffusers' AutoencoderKL for Stable Diffusion 3.5.
MEDIUM = dict(patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
              pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=list(range(13)), qk_norm="rms_norm")
VAE = dict(in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
           block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, norm_num_groups=32, sample_size=1024,
           scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
PROMPT_TOKENS = 333  # 77 of CLIP's and 256 of T5's

# Names of published files that the forward pass never reads: see JointAttention. {last} is the last block.
UNUSED = ("attn.to_k_control.", "attn2.to_k_control.", "attn2.add_q_proj.", "attn2.add_k_proj.", "attn2.add_v_proj.", "attn2.to_add_out.",
          "attn2.norm_added_q.", "attn2.norm_added_k.", "{last}.attn.add_q_proj.", "{last}.attn.norm_added_q.")
CROSS_STREAM = 1.2  # what the published sampler multiplies the convolution of the low-quality tokens by

# The linear layers that a student adapts.
ADAPTED = r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|to_[qv]_control|add_[qkv]_proj|to_out\.0|to_out_control|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"


# --- the transformer, under the published names ---


class PatchEmbed(nn.Module):
    """Latents (B, C, h, w) -> tokens (B, h w / p^2, D), each with its place: the middle h/p x w/p of a table of max_size x max_size."""

    def __init__(self, channels, patch, dim, max_size):
        super().__init__()
        self.max_size = max_size
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, max_size**2, dim))  # of a file; never trained

    def forward(self, x):
        x = self.proj(x)  # (B, D, H, W)
        H, W = x.shape[2:]
        if max(H, W) > self.max_size:
            raise InputError(f"this DiT4SR knows {self.max_size} x {self.max_size} places for its tokens, and the picture has {H} x {W}: give a smaller --tile")
        top, left = (self.max_size - H) // 2, (self.max_size - W) // 2
        places = self.pos_embed.unflatten(1, (self.max_size, self.max_size))[:, top : top + H, left : left + W]
        return x.flatten(2).mT + places.flatten(1, 2).to(x.dtype)


class JointAttention(nn.Module):
    """Attention among the noisy picture's tokens, those of the low-quality one and, with `text`, the prompt's.

    x: (B, 2N, D), noisy then low; text (B, L, D) or None -> the same, the prompt's None in the last block, which makes nothing
    more of it. The published code has a slip that its weights were trained with, so it is kept: the keys of the low-quality
    tokens are not made from them, but are the noisy tokens' keys, normed once more. Their own to_k_control is never read.
    """

    def __init__(self, dim, heads, text, last):
        super().__init__()
        self.heads = heads
        for name in ("to_q", "to_k", "to_v", "to_q_control", "to_v_control", "to_out_control"):
            self.add_module(name, nn.Linear(dim, dim))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = RMSNorm(dim // heads, eps=1e-6), RMSNorm(dim // heads, eps=1e-6)
        if text:
            for name in ("add_k_proj", "add_v_proj", *(() if last else ("add_q_proj", "to_add_out"))):
                self.add_module(name, nn.Linear(dim, dim))
            self.norm_added_k = RMSNorm(dim // heads, eps=1e-6)
            self.norm_added_q = None if last else RMSNorm(dim // heads, eps=1e-6)

    def forward(self, x, text=None):
        N, by_head = x.shape[1] // 2, lambda y: y.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, D/heads)
        (q, q_low), (v, v_low), low = self.to_q(x).chunk(2, dim=1), self.to_v(x).chunk(2, dim=1), x[:, N:]
        k = self.norm_k(by_head(self.to_k(x[:, :N])))
        qs = [self.norm_q(by_head(q)), self.norm_q(by_head(self.to_q_control(q_low)))]
        ks, vs = [k, self.norm_k(k)], [by_head(v), by_head(self.to_v_control(v_low))]
        if text is not None:
            ks, vs = [*ks, self.norm_added_k(by_head(self.add_k_proj(text)))], [*vs, by_head(self.add_v_proj(text))]
            if self.norm_added_q:
                qs = [*qs, self.norm_added_q(by_head(self.add_q_proj(text)))]
        h = F.scaled_dot_product_attention(*(torch.cat(part, dim=2) for part in (qs, ks, vs))).transpose(1, 2).flatten(2)
        out = torch.cat([self.to_out[0](h[:, :N]), self.to_out_control(h[:, N : 2 * N] + low)], dim=1)
        return out, self.to_add_out(h[:, 2 * N :]) if len(qs) == 3 else None


class CrossStreamFeedForward(FeedForward):
    """diffusers' FeedForward of x (B, 2N, D), with what the low-quality half says in the middle added to the noisy half by a 3x3 convolution a channel."""

    def __init__(self, dim):
        super().__init__(dim, dim_out=dim, activation_fn="gelu-approximate")
        self.control_conv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)

    def forward(self, x, height):
        h = self.net[0](x)
        noisy, low = h.chunk(2, dim=1)
        seen = self.control_conv(low.mT.unflatten(2, (height, -1))).flatten(2).mT
        return self.net[2](torch.cat([noisy + CROSS_STREAM * seen, low], dim=1))


class Block(nn.Module):
    """x (B, 2N, D) as JointAttention's, text (B, L, D), emb (B, D), height in tokens -> x, text (None of the last block).

    dual: a second attention, without the prompt. recompute: as model.Stage's.
    """
    recompute = False

    def __init__(self, dim, heads, dual, last):
        super().__init__()
        self.norm1 = SD35AdaLayerNormZeroX(dim) if dual else AdaLayerNormZero(dim)
        self.norm1_context = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6) if last else AdaLayerNormZero(dim)
        self.attn = JointAttention(dim, heads, True, last)
        self.attn2 = JointAttention(dim, heads, False, last) if dual else None
        self.ff = CrossStreamFeedForward(dim)
        self.ff_context = None if last else FeedForward(dim, dim_out=dim, activation_fn="gelu-approximate")

    def forward(self, x, text, emb, height):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.through, x, text, emb, height, use_reentrant=False)
        return self.through(x, text, emb, height)

    def through(self, x, text, emb, height):
        norm = lambda y, scale, shift: F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        h, gate, shift, scale, gate_ff, *second = self.norm1(x, emb=emb)
        c, *context = [self.norm1_context(text, emb)] if self.ff_context is None else self.norm1_context(text, emb=emb)
        h, c = self.attn(h, c)
        x = x + gate[:, None] * h
        if self.attn2:
            x = x + second[1][:, None] * self.attn2(second[0])[0]
        x = x + gate_ff[:, None] * self.ff(norm(x, scale, shift), height)
        if self.ff_context is None:
            return x, None
        gate, shift, scale, gate_ff = context
        text = text + gate[:, None] * c
        return x, text + gate_ff[:, None] * self.ff_context(norm(text, scale, shift))


class Transformer(nn.Module):
    """x_t, z_lr (B, C, h, w), prompt (B, L, joint_attention_dim), pooled (B, P), timestep (B,) in 0..1000 -> noise - clean (B, C, h, w).

    The arguments are those of the published config.json. Raises InputError for another normalisation than Stable Diffusion 3.5's.
    """

    def __init__(self, patch_size, in_channels, num_layers, attention_head_dim, num_attention_heads, joint_attention_dim, pooled_projection_dim,
                 pos_embed_max_size, dual_attention_layers, qk_norm):
        super().__init__()
        if qk_norm != "rms_norm":
            raise InputError(f"a DiT4SR norms its queries and keys by rms_norm, as Stable Diffusion 3.5 does, not by {qk_norm}")
        dim, self.patch, self.channels = num_attention_heads * attention_head_dim, patch_size, in_channels
        self.pos_embed = PatchEmbed(in_channels, patch_size, dim, pos_embed_max_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(Block(dim, num_attention_heads, i in dual_attention_layers, i == num_layers - 1) for i in range(num_layers))
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)

    def forward(self, x_t, z_lr, prompt, pooled, timestep):
        p, height = self.patch, x_t.shape[2] // self.patch
        x = torch.cat([self.pos_embed(x_t), self.pos_embed(z_lr)], dim=1)
        emb, text = self.time_text_embed(timestep, pooled), self.context_embedder(prompt)
        for block in self.transformer_blocks:
            x, text = block(x, text, emb, height)
        x = self.proj_out(self.norm_out(x.chunk(2, dim=1)[0], emb))  # (B, N, p p C)
        return x.unflatten(2, (p, p, self.channels)).unflatten(1, (height, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def used(self, state):
        """The tensors of a published file that the forward pass reads, of all that it holds."""
        last = f"transformer_blocks.{len(self.transformer_blocks) - 1}"
        return {name: value for name, value in state.items() if not any(part.format(last=last) in name for part in UNUSED)}


# --- a folder of frozen weights, once in memory ---


class Base:
    """The frozen weights of a folder: {name: parameter} as DiT4SR calls them, and a digest that knows them again. Raises InputError.

    transformer, vae: their arguments. The folder's files are read into memory as they are, float16 as bfloat16.
    """
    opened = weakref.WeakValueDictionary()  # by folder: what a teacher, its student and that one's average share

    def __init__(self, folder, transformer, vae):
        with torch.device("meta"):
            net, autoencoder = Transformer(**transformer), AutoencoderKL(**vae)
        fill(net, net.used(read_parts(folder / "transformer")), folder / "transformer", "DiT4SR's transformer", assign=True)
        fill(autoencoder, read_parts(folder / "vae"), folder / "vae", "its autoencoder", assign=True)
        self.parameters = {f"{part}.{name}": p.requires_grad_(False) for part, module in (("net", net), ("autoencoder", autoencoder)) for name, p in module.named_parameters()}
        about = [(name, list(p.shape), p.flatten()[:8].tolist()) for name, p in sorted(self.parameters.items())]
        self.digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]

    @classmethod
    def open(cls, folder, transformer, vae):
        key = str(Path(folder).resolve())
        base = cls.opened.get(key) or cls(Path(folder), transformer, vae)
        cls.opened[key] = base
        return base


def read_json(path):
    """The dict in a JSON file. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"no {path}: a DiT4SR is a folder with transformer/, vae/ and the prompt's embeddings (dit4sr.py says how they are called)")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"{path} is broken: {e}") from e
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, not an object")
    return found


def read_config(folder, known, make):
    """Those arguments in folder/config.json that `known` names, for `make`. Raises InputError if one is missing, or make takes them not."""
    found = read_json(folder / "config.json")
    if missing := [k for k in known if k not in found]:
        raise InputError(f"{folder / 'config.json'} does not say {', '.join(missing)}")
    config = {k: found[k] for k in known}
    try:
        with torch.device("meta"):
            make(**config)
    except InputError:
        raise
    except Exception as e:  # what a class says to arguments that are not its own
        raise InputError(f"{folder / 'config.json'} describes none: {(str(e) or type(e).__name__).splitlines()[0]}") from e
    return config


def read_parts(folder, stem="diffusion_pytorch_model.safetensors"):
    """The tensors of a folder, by name: of one .safetensors, or of the parts that its index lists. Raises InputError."""
    whole, index = folder / stem, folder / f"{stem}.index.json"
    files = [whole]
    if index.is_file() and not whole.is_file():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise InputError(f"{index} lists no parts")
        files = [folder / Path(str(name)).name for name in sorted(set(parts.values()))]
    state = {}
    for file in files:
        state.update(load_tensors(file)[1])
    return {name: value.bfloat16() if value.dtype == torch.float16 else value for name, value in state.items()}


def read_prompt(path, transformer, guidance):
    """The prompt's embeddings in a file, as DiT4SR's buffers: {"prompt": (1 or 2, L, D), "pooled": (1 or 2, P)} in float32, the negative one first. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"no {path}: the prompt's embeddings (dit4sr.py says which tensors; --prompt names another file)")
    state, signs, out = load_tensors(path)[1], ("negative_", "") if guidance else ("",), {}
    for name, ours, dims, width in (("prompt_embeds", "prompt", 3, transformer["joint_attention_dim"]), ("pooled_prompt_embeds", "pooled", 2, transformer["pooled_projection_dim"])):
        if missing := [sign + name for sign in signs if sign + name not in state]:
            raise InputError(f"{path} lacks {' and '.join(missing)}" + (" (--guidance 1 does without the negative ones)" if guidance else ""))
        found = [y[None] if y.ndim == dims - 1 else y for y in (state[sign + name].float() for sign in signs)]
        if any(y.ndim != dims or len(y) != 1 or y.shape != found[0].shape or y.shape[-1] != width or not y.isfinite().all() for y in found):
            raise InputError(f"{path}: its {name} should be one prompt's, {width} wide, finite, and the negative one's as long, not {' and '.join(str(tuple(y.shape)) for y in found)}")
        out[ours] = torch.cat(found)
    return out


# --- the teacher ---


class DiT4SR(Teacher):
    """v(x_in, t) of a DiT4SR, x_in = concat(x_t, z_lr) (B, 32, h, w), or of a student: the same weights, frozen, and adapters.

    transformer, vae  arguments of Transformer and of diffusers' AutoencoderKL
    tokens            of the prompt
    folder, base      where the frozen weights lie, and their digest
    guidance          scale of classifier-free guidance, of the teacher alone: two evaluations a call; 1 is none
    lora              rank of a student's adapters
    state_dict and load_state_dict are of the prompt and the adapters: the rest is a Base's. The latent of a picture is the mean of
    what the encoder says, where the published sampler draws from it: the same picture gives the same result.
    """

    def __init__(self, transformer, vae, tokens, folder=None, base=None, guidance=1.0, lora=64, one_step=False):
        with torch.device("meta"):
            super().__init__(Transformer(**transformer), "noise_minus_clean", one_step=one_step)
            self.autoencoder = AutoencoderKL(**vae)
            rows = 1 if one_step or guidance == 1 else 2
            self.register_buffer("prompt", torch.empty(rows, tokens, transformer["joint_attention_dim"]))
            self.register_buffer("pooled", torch.empty(rows, transformer["pooled_projection_dim"]))
        self.config = dict(family="dit4sr", transformer=dict(transformer), vae=dict(vae), tokens=tokens, folder=folder, base=base, guidance=guidance, lora=lora, one_step=one_step)
        self.requires_grad_(False)
        if one_step:
            inject_adapter_in_model(LoraConfig(r=lora, lora_alpha=lora, target_modules=ADAPTED), self.net, low_cpu_mem_usage=True)
        self.base, self.guidance, self.evaluations, self.t_last = None, guidance, rows, 1.0
        widths = vae["block_out_channels"]
        self.latent_channels, self.factor = transformer["in_channels"], 2 ** (len(widths) - 1)
        self.multiple = self.factor * self.net.patch
        self.width = sum(c / 4**level for level, c in enumerate(widths)) + 8 * self.net.proj_out.in_features / self.multiple**2

    @classmethod
    def empty(cls, args):
        """The published teacher without its weights, in Stable Diffusion 3.5 medium's size."""
        return cls(MEDIUM, VAE, PROMPT_TOKENS, guidance=args.guidance, lora=args.lora)

    @classmethod
    def published(cls, folder, args):
        """The teacher in a folder, and its metadata: args has --prompt, --guidance and --lora. Raises InputError."""
        folder = Path(folder)
        transformer = read_config(folder / "transformer", MEDIUM, Transformer)
        vae = read_config(folder / "vae", VAE, AutoencoderKL)
        if vae["latent_channels"] != transformer["in_channels"] or not all(isinstance(vae[k], (int, float)) for k in ("scaling_factor", "shift_factor")):
            raise InputError(f"{folder / 'vae'} is not this transformer's: {vae['latent_channels']} channels of latents for {transformer['in_channels']}, scaling_factor "
                             f"{vae['scaling_factor']}, shift_factor {vae['shift_factor']}")
        prompt = read_prompt(args.prompt or folder / "prompt.safetensors", transformer, args.guidance != 1)
        base = Base.open(folder, transformer, vae)
        teacher = cls(transformer, vae, prompt["prompt"].shape[1], str(folder), base.digest, args.guidance, args.lora)
        teacher.load_state_dict(prompt)
        return teacher, {"task": None, "step": None}

    def student(self):
        """A network on the same frozen weights, with adapters that say nothing yet; or a student's, as they are."""
        student, mine, state = build({**self.config, "one_step": True}), self.state_dict(), {}
        for name, p in student.state_dict().items():
            if name in ("prompt", "pooled"):
                state[name] = mine[name][-1:].clone()
            elif name in mine:
                state[name] = mine[name].clone()
            else:
                state[name] = torch.zeros(p.shape, device=mine["prompt"].device)
                if "lora_A" in name:
                    nn.init.kaiming_uniform_(state[name], a=5**0.5)  # as a linear layer's; lora_B's zeros hide it at first
        if not self.prompt.is_meta:  # else a dry run's
            student.load_state_dict(state)
        return student

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "lora_" in name or name in ("prompt", "pooled")}

    def load_state_dict(self, state, strict=True, assign=True):
        """Takes the tensors of state as they are, and the frozen weights of the folder. Raises InputError if those are others than it was trained with."""
        if missing := self.state_dict().keys() ^ state.keys():
            raise RuntimeError(f"not the state of this DiT4SR: {sorted(missing)[0]}")
        folder = os.environ.get("OFTSR_DIT4SR") or self.config["folder"]
        if not Path(folder).is_dir():
            raise InputError(f"these adapters stand on the DiT4SR in {folder}, which is not here: OFTSR_DIT4SR=DIR says where it is")
        self.base = Base.open(folder, self.config["transformer"], self.config["vae"])
        if self.base.digest != self.config["base"]:
            raise InputError(f"{folder} holds another DiT4SR than the one that these adapters stand on")
        for prefix, module in self.named_modules():
            for name in module._parameters:
                frozen = self.base.parameters.get(f"{prefix}.{name}".replace(".base_layer", ""))
                if frozen is not None:
                    module._parameters[name] = frozen
        return super().load_state_dict(state, strict=False, assign=True)

    def __deepcopy__(self, memo):
        """A copy with adapters of its own, on the same frozen weights."""
        for shared in (self.base, *(p for p in self.parameters() if not p.requires_grad)):
            memo.setdefault(id(shared), shared)
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def predict(self, x_t, z_lr, t):
        kind, rows = self.net.proj_out.weight.dtype, len(self.prompt)  # of the frozen weights, which all is computed in
        each = lambda y: y.to(kind).repeat_interleave(len(t), dim=0)  # the negative prompt for all pictures, then the prompt
        ask = lambda: self.net(x_t.to(kind).repeat(rows, 1, 1, 1), z_lr.to(kind).repeat(rows, 1, 1, 1), each(self.prompt), each(self.pooled), 1000 * (1 - t).repeat(rows)).float()
        return guided(ask, self.guidance) if rows == 2 else ask()

    @torch.no_grad()
    def to_latents(self, x):
        how = self.config["vae"]
        z = self.autoencoder.encode(x.to(next(self.autoencoder.parameters()).dtype)).latent_dist.mode().float()
        return (z - how["shift_factor"]) * how["scaling_factor"]

    @torch.no_grad()
    def to_pixels(self, z):
        how = self.config["vae"]
        z = z / how["scaling_factor"] + how["shift_factor"]
        return self.autoencoder.decode(z.to(next(self.autoencoder.parameters()).dtype)).sample.float()
