"""The dial, further: a t of its own for each pixel, and a result that keeps to the measurement.

    x_1 = along_map(at, t_map)                     # at(t) -> (3, H, W), t_map (H, W): each pixel as at its own t
    x_1 = consistent(x_1, y, "bicubic", 4)         # H(x_1) is the low-resolution picture again
"""
import torch

from degradations import H, H_T

NODES = (0.0, 0.25, 0.5, 0.75, 1.0)


def along_map(at, t_map):
    """Each pixel at its own t: at(t) -> (..., H, W) float, t_map (H, W) in [0, 1] -> (..., H, W).

    `at` is called for each value of the map, where these are five or fewer: so a constant map gives, to the bit, what its t
    gives. Else for those of NODES that lie around the map's values, and between two of them a pixel is interpolated: the dial
    is so nearly straight there that nobody sees it (README.md has the figures).
    """
    ts = t_map.unique().tolist()
    if len(ts) > len(NODES):
        low, high = max(n for n in NODES if n <= ts[0]), min(n for n in NODES if n >= ts[-1])
        ts = [n for n in NODES if low <= n <= high]
    out = at(ts[0])
    before = out
    for a, b in zip(ts, ts[1:], strict=False):
        after = at(b)
        share = (t_map - a) / (b - a)  # exactly 0 at a and 1 at b
        out = torch.where(share > 0, before * (1 - share) + after * share, out)
        before = after
    return out


def consistent(x_1, y, degradation, scale, steps=50):
    """The picture nearest to x_1 that H takes to y, by x_1 <- x_1 + H^T(y - H(x_1)) and the clamp to [-1, 1], repeated.

    x_1 (B, C, H, W), y (B, C, H/scale, W/scale), both in [-1, 1]; returns (B, C, H, W). It ends when no value of H(x_1) is a
    quarter of an 8-bit step away from y's, or after `steps`: a y with values that no picture in [-1, 1] has (the
    overshoots of a hard edge) is met where it can be.
    """
    x_1 = x_1.clamp(-1, 1)
    for _ in range(steps):
        rest = y - H(x_1, degradation, scale)
        if rest.abs().max() < 0.25 / 127.5:
            break
        x_1 = (x_1 + H_T(rest, degradation, scale)).clamp_(-1, 1)
    return x_1
