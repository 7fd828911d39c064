"""DiT4SR's transformer (Duan et al. 2025), under its published names: Stable Diffusion 3.5's, its image tokens joined by those of the low-quality latent."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from console import InputError

try:
    from diffusers.models.attention import FeedForward
    from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
    from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, RMSNorm, SD35AdaLayerNormZeroX
except ImportError as e:
    raise InputError(f"a DiT4SR needs diffusers: pip install -e '.[sd3]' ({e})") from e

# What was published: the arguments of Transformer for Stable Diffusion 3.5 medium.
MEDIUM = dict(patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
              pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=list(range(13)), qk_norm="rms_norm")

# Names of published files that the forward pass never reads: see JointAttention. {last} is the last block.
UNUSED = ("attn.to_k_control.", "attn2.to_k_control.", "attn2.add_q_proj.", "attn2.add_k_proj.", "attn2.add_v_proj.", "attn2.to_add_out.",
          "attn2.norm_added_q.", "attn2.norm_added_k.", "{last}.attn.add_q_proj.", "{last}.attn.norm_added_q.")
CROSS_STREAM = 1.2  # what the published sampler multiplies the convolution of the low-quality tokens by


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
