"""What was done to a picture before one has it: H, the measurement, and H^T, the way back to full size.

    x_lr = degrade(x_1, task, seeds)      # x_lr = H^T(H(x_1) + n), (B, 3, H, W) in [-1, 1], each picture's noise from its seed
"""
import torch.nn.functional as F

import kernels


def to_float(x):
    """uint8 to [-1, 1] float32, any shape."""
    return x.float() / 127.5 - 1


def H(x, degradation, scale):
    """Down-sampling: x (B, C, H, W) to (B, C, H/scale, W/scale). H and W are multiples of scale."""
    if x.shape[-2] % scale or x.shape[-1] % scale:
        raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} is not a multiple of the scale {scale}")
    if degradation == "avgpool":
        return F.avg_pool2d(x, scale)
    return F.interpolate(x, size=(x.shape[-2] // scale, x.shape[-1] // scale), mode="bicubic", antialias=True)


def H_T(y, degradation, scale):
    """Back to full size: y (B, C, h, w) to (B, C, h scale, w scale); pixel repetition for avgpool, else bicubic."""
    if degradation == "avgpool":
        return y.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    return F.interpolate(y, scale_factor=scale, mode="bicubic", antialias=True)


def degrade(x_1, task, seeds):
    """x_lr = H^T(H(x_1) + n): x_1 (B, 3, H, W) in [-1, 1] to the low-resolution picture at full size, in float.

    n has standard deviation task.sigma_n and comes from stream 1 of seeds (B,) int64. task.eight_bit: what H gives is
    clamped and rounded as it is in a file.
    """
    y = H(x_1, task.degradation, task.scale)
    if task.sigma_n:
        y = y + task.sigma_n * kernels.normal(seeds, y.shape, stream=1)
    if task.eight_bit:
        y = to_float((y.clamp(-1, 1) * 127.5 + 127.5).round())
    return H_T(y, task.degradation, task.scale)
