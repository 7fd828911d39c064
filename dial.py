"""The dial, further: a t of its own for each pixel, a second dial, and a result that keeps to the measurement.

    x_1 = along_map(at, t_map)                     # at(t) -> (3, H, W); t_map (H, W): each pixel as at its own t
    net, stage, task = blend(clean, real, 0.5)     # between a network that takes no blur, noise and compression away and one that does
    x_1 = consistent(x_1, y, "bicubic", 4)         # H(x_1) is the low-resolution picture again
"""
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from console import InputError
from degradations import H, H_T
from model import average
from colour import resized, rgb8
from pictures import from_pil, read_picture

NODES = (0.0, 0.25, 0.5, 0.75, 1.0)


def read_map(source):
    """A map of t, to lay over a whole picture: (h, w, 1) uint8, 0 for t = 0, 255 for t = 1, from a picture's path, a PIL picture or an array (h, w).

    The map's size is its own. Raises InputError.
    """
    if isinstance(source, Image.Image):
        pixels = from_pil(source).pixels
    elif isinstance(source, np.ndarray):
        if source.dtype not in (np.uint8, np.uint16) or source.ndim != 2:
            raise InputError(f"a map of t as an array should be uint8 or uint16, (h, w), not {source.dtype} {source.shape}")
        pixels = source[..., None]
    else:
        pixels = read_picture(source, metadata=False).pixels
    return np.rint(rgb8(pixels).mean(2, keepdims=True)).astype(np.uint8)


def map_window(t_map, height, width, rows, columns):
    """t of some rows and columns (int64 indices) of a picture of height x width: t_map (h, w, 1) uint8 -> (rows, columns) float64 in [0, 1]."""
    top, bottom = int(rows.min()), int(rows.max()) + 1
    ts = resized(t_map, height, width, top, bottom)[..., 0][rows.numpy() - top][:, columns.numpy()]
    return torch.from_numpy(ts) / 255.0


def along_map(at, t_map):
    """Each pixel at its own t: at(t) -> (..., H, W), t_map (H, W) float64 in [0, 1] -> (..., H, W).

    `at` is called for each value of the map where these are five or fewer: so a constant map gives, to the bit, what its t
    gives. Else for those of NODES that lie around the map's values, and between two of them a pixel is interpolated.
    """
    ts = t_map.unique().tolist()
    if len(ts) > len(NODES):
        low, high = max(n for n in NODES if n <= ts[0]), min(n for n in NODES if n >= ts[-1])
        ts = [n for n in NODES if low <= n <= high]
    out = before = at(ts[0])
    for a, b in pairwise(ts):
        after = at(b)
        share = ((t_map - a) / (b - a)).to(out.dtype)  # exactly 0 at a and 1 at b; beyond 1 the next pair has its say
        out = torch.where(share > 0, before * (1 - share) + after * share, out)
        before = after
    return out


def blend(clean, real, denoise):
    """The network (1 - denoise) clean + denoise real, weight by weight, of two (UNet, stage, Task) as sample.load gives them: such a triple.

    Only networks that were trained on from a common start have something in common between them. Raises InputError where
    the two cannot have one: other layers, another stage, or another task but for what is done to its pictures.
    """
    (a, stage, task), (b, other_stage, other) = clean, real
    differ = [(name, a.config.get(name), b.config.get(name)) for name in {**a.config, **b.config} if a.config.get(name) != b.config.get(name)]
    differ += [("stage", stage, other_stage)] if stage != other_stage else []
    differ += [(cell, x, y) for cell in ("scale", "sigma_p", "sigma_n", "condition") if (x := getattr(task, cell)) != (y := getattr(other, cell))]
    if differ:
        name, x, y = differ[0]
        raise InputError(f"there is nothing between the clean network and the real one: their {name} differs, {x} and {y}")
    return average([a, b], [1 - denoise, denoise]), stage, task


def consistent(x_1, y, degradation, scale, steps=50):
    """A picture near x_1 that H takes to y: x_1 <- x_1 + H^T(y - H(x_1)), clamped to [-1, 1], repeated.

    x_1 (B, C, H, W), y (B, C, H/scale, W/scale), both in [-1, 1]; returns (B, C, H, W). It ends when no value of H(x_1) is
    more than a quarter of an 8-bit step away from y's, or after `steps`: a y that no picture in [-1, 1] leads to (hard edges
    between black and white) is met as far as it can be.
    """
    x_1 = x_1.clamp(-1, 1)
    for _ in range(steps):
        rest = y - H(x_1, degradation, scale)
        if rest.abs().max() < 0.25 / 127.5:
            break
        x_1 = (x_1 + H_T(rest, degradation, scale)).clamp_(-1, 1)
    return x_1
