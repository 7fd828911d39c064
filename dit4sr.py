"""DiT4SR (Duan et al. 2025): a Stable Diffusion 3.5 transformer whose image tokens are joined by those of the low-quality latent.

    pip install -e '.[sd3]'                                       # diffusers and peft
    python distill.py --teacher dit4sr:DIR --lora 64 --guidance 4

DIR is laid out as published: transformer/ and vae/, each a config.json and .safetensors, and beside them prompt.safetensors,
the embeddings of a fixed prompt: prompt_embeds (N, D) and pooled_prompt_embeds (P,), and for guidance the same of an empty
or negative one, negative_prompt_embeds and negative_pooled_prompt_embeds.
"""
import copy
import json
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from console import InputError
from teachers import Teacher, fill, guided, read_state

try:
    from diffusers import AutoencoderKL
    from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
    from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
except ImportError as e:
    raise InputError(f"dit4sr needs diffusers and peft, the extra [sd3]: pip install diffusers peft ({e})") from e

# What --lora adds to: every linear layer that the output depends on.
ADAPTED = (r".*\.(attn|attn2)\.(to_q|to_k|to_v|to_out\.0|to_q_control|to_v_control|to_out_control)|.*\.attn\.(add_q_proj|add_k_proj|add_v_proj|to_add_out)"
           r"|.*\.(ff|ff_context)\.net\.(0\.proj|2)")


# --- the transformer ---


class JoinedAttention(nn.Module):
    """Attention over the tokens of the picture, of the low-quality latent ("control") and, unless context is None, of the prompt.

    x (B, 2N, C), the picture's N tokens before the control's; context (B, M, C) or None -> the same, context None for the last block.
    """

    def __init__(self, width, heads, last):
        super().__init__()
        self.heads, head = heads, width // heads
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_q_control", "to_k_control", "to_v_control", "to_out_control"):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if not last:
            self.to_add_out = nn.Linear(width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, nn.RMSNorm(head, eps=1e-6))

    def forward(self, x, context):
        split = lambda h: h.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, head)
        x, control = x.chunk(2, dim=1)
        q, k, v = self.norm_q(split(self.to_q(x))), self.norm_k(split(self.to_k(x))), split(self.to_v(x))
        qs = [q, self.norm_q(split(self.to_q_control(self.to_q(control))))]
        ks = [k, self.norm_k(split(self.to_k_control(self.to_k(control))))]
        vs = [v, split(self.to_v_control(self.to_v(control)))]
        if context is not None:
            qs.append(self.norm_added_q(split(self.add_q_proj(context))))
            ks.append(self.norm_added_k(split(self.add_k_proj(context))))
            vs.append(split(self.add_v_proj(context)))
        h = F.scaled_dot_product_attention(*(torch.cat(part, dim=2) for part in (qs, ks, vs))).transpose(1, 2).flatten(2)  # (B, tokens, C)
        N = x.shape[1]
        out = torch.cat([self.to_out[0](h[:, :N]), self.to_out_control(h[:, N : 2 * N] + control)], dim=1)
        if context is None:
            return out
        return out, self.to_add_out(h[:, 2 * N :]) if hasattr(self, "to_add_out") else None


class FeedForward(nn.Module):
    """Two linear layers, width times 4 between them: x (B, T, C); with `control`, x's second half is added to its first through a 3x3 convolution there."""

    def __init__(self, width, control):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": nn.Linear(width, 4 * width)}), "2": nn.Linear(4 * width, width)})
        if control:
            self.control_conv = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)

    def forward(self, x, size=None):
        h = F.gelu(self.net["0"]["proj"](x), approximate="tanh")
        if size:
            h, control = h.chunk(2, dim=1)
            near = self.control_conv(control.mT.unflatten(2, size)).flatten(2).mT
            h = torch.cat([h + near, control], dim=1)
        return self.net["2"](h)


class Block(nn.Module):
    """One block of the transformer: x (B, 2N, C), context (B, M, C), temb (B, C), size (rows, columns) of the picture's tokens."""

    def __init__(self, width, heads, last, dual):
        super().__init__()
        self.norm1 = SD35AdaLayerNormZeroX(width) if dual else AdaLayerNormZero(width)
        self.norm1_context = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6) if last else AdaLayerNormZero(width)
        self.attn = JoinedAttention(width, heads, last)
        self.attn2 = JoinedAttention(width, heads, last) if dual else None
        self.ff, self.ff_context = FeedForward(width, True), None if last else FeedForward(width, False)

    def forward(self, x, context, temb, size):
        normed, gate, shift, scale, gate_mlp, *second = self.norm1(x, emb=temb)
        if self.ff_context is None:
            attended, _ = self.attn(normed, self.norm1_context(context, temb))
        else:
            normed_context, c_gate, c_shift, c_scale, c_gate_mlp = self.norm1_context(context, emb=temb)
            attended, told = self.attn(normed, normed_context)
        x = x + gate[:, None] * attended
        if second:
            x = x + second[1][:, None] * self.attn2(second[0], None)
        x = x + gate_mlp[:, None] * self.ff(modulated(x, shift, scale), size)
        if self.ff_context is None:
            return x, None
        context = context + c_gate[:, None] * told
        return x, context + c_gate_mlp[:, None] * self.ff_context(modulated(context, c_shift, c_scale))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class DiT4SRTransformer(nn.Module):
    """The velocity noise - clean: x, lq (B, 16, h, w) latents, prompt (B, M, D), pooled (B, P), t (B,) in 0..1000 -> (B, 16, h, w).

    The arguments are those of transformer/config.json. checkpointing: blocks are run again in the backward pass, to save memory.
    """

    def __init__(self, sample_size, patch_size, in_channels, num_layers, attention_head_dim, num_attention_heads, joint_attention_dim, caption_projection_dim,
                 pooled_projection_dim, out_channels, pos_embed_max_size, dual_attention_layers=(), qk_norm="rms_norm"):
        super().__init__()
        if qk_norm != "rms_norm":
            raise InputError(f"a DiT4SR has qk_norm rms_norm, not {qk_norm}: this is another transformer")
        width = num_attention_heads * attention_head_dim
        self.patch, self.checkpointing, self.prompt_dims = patch_size, False, (joint_attention_dim, pooled_projection_dim)
        self.pos_embed = PatchEmbed(height=sample_size, width=sample_size, patch_size=patch_size, in_channels=in_channels, embed_dim=width, pos_embed_max_size=pos_embed_max_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(embedding_dim=width, pooled_projection_dim=pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(Block(width, num_attention_heads, i == num_layers - 1, i in dual_attention_layers) for i in range(num_layers))
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)

    def forward(self, x, lq, prompt, pooled, t):
        size = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        temb, context = self.time_text_embed(t, pooled), self.context_embedder(prompt)
        h = torch.cat([self.pos_embed(x), self.pos_embed(lq)], dim=1)
        for block in self.transformer_blocks:
            again = self.checkpointing and torch.is_grad_enabled()
            h, context = checkpoint(block, h, context, temb, size, use_reentrant=False) if again else block(h, context, temb, size)
        h = self.proj_out(self.norm_out(h.chunk(2, dim=1)[0], temb)).unflatten(1, size)  # (B, rows, columns, patch patch C)
        return h.unflatten(-1, (self.patch, self.patch, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# --- the teacher ---


class DiT4SR(Teacher):
    """v(x_in, t) of the DiT4SR in a folder, x_in = concat(x_t, z_lr) (B, 32, h, w); its start is pure noise. See this file's head.

    lora      rank of what a student adds: all else is the teacher's own, in memory once, and on disk in its folder
    guidance  scale of classifier-free guidance of the teacher; its student needs none
    """
    latent_channels, t_last = 16, 1.0

    def __init__(self, folder, lora=None, guidance=None, one_step=False):
        with torch.device("cpu"):
            net, vae = (read_part(kind, folder, part) for kind, part in ((DiT4SRTransformer, "transformer"), (AutoencoderKL, "vae")))
            prompt = read_state(Path(folder) / "prompt.safetensors")
        super().__init__(net, "noise_minus_clean", one_step=one_step)
        self.config = dict(family="dit4sr", folder=str(Path(folder).absolute()), lora=lora, guidance=guidance, one_step=one_step)
        self.vae, self.lora, self.guidance = vae.requires_grad_(False), lora, guidance
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple, self.evaluations = self.factor * net.patch, 2 if guidance and not one_step else 1
        self.width = sum(c / 4**level for level, c in enumerate(vae.config.block_out_channels))
        for kind in ("", "negative_") if guidance else ("",):
            for name, dim in zip(("prompt_embeds", "pooled_prompt_embeds"), net.prompt_dims):
                value = prompt.get(kind + name)
                if value is None or value.shape[-1] != dim:
                    raise InputError(f"{folder}/prompt.safetensors should hold {kind}{name} of {dim} numbers{' a token' if name == 'prompt_embeds' else ''}"
                                     + (": --guidance needs a second prompt" if kind else ""))
                self.register_buffer(kind + name, value.float().flatten(0, -2) if name == "prompt_embeds" else value.float().flatten(), persistent=False)
        if one_step and lora:
            self.add_adapters()

    @classmethod
    def published(cls, folder, args):
        return cls(folder, args.lora, args.guidance), {"task": None, "step": None}

    @torch.no_grad()
    def to_latents(self, x):
        mean = self.vae.encode(x).latent_dist.mode().float()
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def to_pixels(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)).sample.float()

    def predict(self, x_t, z_lr, t):
        def ask(kinds):
            n, B = len(kinds), len(t)
            words = [torch.stack([getattr(self, k + name) for k in kinds]).repeat_interleave(B, dim=0) for name in ("prompt_embeds", "pooled_prompt_embeds")]
            return self.net(x_t.repeat(n, 1, 1, 1), z_lr.repeat(n, 1, 1, 1), *words, 1000 * (1 - t).repeat(n))
        if self.one_step:
            return ask([""])
        with self.without_adapters():
            return guided(lambda: ask(["negative_", ""]), self.guidance) if self.guidance else ask([""])

    # --- a student that is the teacher and a little more ---

    def student(self):
        if not self.lora:
            return super().student()
        student = copy.copy(self)  # the same network: the teacher runs it without what the student adds
        student.one_step, student.evaluations, student.config = True, 1, {**self.config, "one_step": True}
        student.add_adapters()
        return student

    def add_adapters(self):
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as e:
            raise InputError(f"--lora needs peft, of the extra [sd3]: pip install peft ({e})") from e
        self.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=self.lora, lora_alpha=self.lora, target_modules=ADAPTED), self.net)
        self.net.checkpointing = True

    @contextmanager
    def without_adapters(self):
        layers = [m for m in self.net.modules() if hasattr(m, "_disable_adapters")]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def __deepcopy__(self, memo):
        """A copy of what is trained, and the rest itself."""
        for p in self.parameters():
            if not p.requires_grad:
                memo.setdefault(id(p), p)
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin

    def state_dict(self, *args, **kwargs):
        """Of a student with an addition that alone: the rest is in the folder."""
        state = super().state_dict(*args, **kwargs)
        return {name: v for name, v in state.items() if "lora_" in name} if self.lora and self.one_step else state

    def load_state_dict(self, state, strict=True, assign=False):
        if self.lora and self.one_step:
            if strict and set(state) != set(self.state_dict()):
                raise RuntimeError("the addition's names are others")
            strict = False
        return super().load_state_dict(state, strict=strict, assign=assign)


def read_part(kind, folder, part):
    """The transformer or the autoencoder of a folder, from its config.json and all .safetensors beside it. Raises InputError."""
    here = Path(folder) / part
    try:
        config = {k: v for k, v in json.loads((here / "config.json").read_text()).items() if not k.startswith("_")}
        model = kind.from_config(config) if kind is AutoencoderKL else kind(**config)
    except (OSError, ValueError, TypeError) as e:
        raise InputError(f"{here}/config.json is missing, or is not that of a {kind.__name__} ({str(e).splitlines()[0]})") from None
    files = sorted(here.glob("*.safetensors"))
    if not files:
        raise InputError(f"no .safetensors in {here}")
    state = {name: value for file in files for name, value in read_state(file).items()}
    return fill(model, state, here, f"a {kind.__name__}").eval()
