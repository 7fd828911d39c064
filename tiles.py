"""A picture of any size through the network: reflected to a size that fits, in tiles that blend, in bounded memory.

    for rows, nfe in restore_rows(model, window, height, width, sigma_p, seed, t, tile=768): ...    # from the top down
    x_1, nfe = restore(model, x_lr, sigma_p, seeds, t)                                              # x_lr in one tensor

The noise of x_0 is a function of a pixel's place in the whole picture, so a tile draws its own part of it.
"""
import math
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from console import InputError
from degradations import H_T
from dial import along_map, map_window
from flow import integrate, one_step
from colour import to_planes

WHOLE = 1280 * 1280  # output pixels up to which a picture is restored in one piece (tile "auto")
TILE = 1024  # side of the tiles above that: larger ones differ less from one piece, and take more memory
LEAST_TILE = 128  # what is not halved any more when memory is short


def reflections(length, size):
    """Where the pixels of a line of `length` lie after it has been reflected at its end, as often as it takes, to `size`: (size,) int64."""
    i = torch.arange(size) % max(1, 2 * length - 2)
    return torch.where(i < length, i, 2 * length - 2 - i)


def reflect_to(x, height, width):
    """Pad (B, C, H, W) at the right and the bottom by reflection, as often as it takes, to height x width."""
    for dim, size in ((2, height), (3, width)):
        x = x.index_select(dim, reflections(x.shape[dim], size).to(x.device)) if size > x.shape[dim] else x
    return x


# --- which tiles ---


def tile_spans(length, tile, overlap, multiple=1):
    """Starts of tiles of that size, or as much smaller as so many can be and cover `length`, and each tile's weights: a partition of unity.

    Returns [(start, (side,) float32)]: along the overlaps the weights are ramps, and over all tiles they sum to 1.
    Starts are multiples of `multiple`, as length and tile have to be then.
    """
    if length <= tile:
        return [(0, torch.ones(length))]
    stride = max(multiple, (tile - overlap) // multiple * multiple)
    count = -(-(length - tile) // stride) + 1
    tile = min(tile, -(-(length + (count - 1) * overlap) // (count * multiple)) * multiple)  # or they would overlap by more than they need
    starts = [round(i * (length - tile) / ((count - 1) * multiple)) * multiple for i in range(count)]
    ramp = torch.minimum(torch.arange(tile) + 1, tile - torch.arange(tile)).clamp(max=overlap).float()
    total = torch.zeros(length)
    for s in starts:
        total[s : s + tile] += ramp
    return [(s, ramp / total[s : s + tile]) for s in starts]


def feathered_tiles(height, width, tile, overlap, multiple):
    """Tiles that overlap and blend: [(y, x, weights of its rows, weights of its columns)], from the top down."""
    return [(y, x, wy, wx) for y, wy in tile_spans(height, tile, overlap, multiple) for x, wx in tile_spans(width, tile, overlap, multiple)]


def official_tiles(height, width, most=256, step=32):
    """The published protocol for DIV2K, as feathered_tiles gives its tiles, their weights 0 or 1.

    What has more than most^2 pixels falls into quadrants, each half the height and width and up to a multiple of `step`
    beyond the middle, where they are cut hard; quadrants of what has more than 4 most^2 fall into quadrants again.
    """
    def halves(length, start, keep):
        """The two overlapping halves of a line that starts at `start`: (start, length, what is kept of them)."""
        size, middle = min(length, (length // 2 // step + 1) * step), start + length // 2
        return [(start, size, (keep[0], min(keep[1], middle))), (start + length - size, size, (max(keep[0], middle), keep[1]))]

    def split(rows, columns, leaf):
        if leaf or rows[1] * columns[1] <= most**2:
            yield rows, columns
            return
        last = rows[1] * columns[1] <= 4 * most**2
        for half in halves(rows[1], rows[0], rows[2]):
            for other in halves(columns[1], columns[0], columns[2]):
                if half[2][0] < half[2][1] and other[2][0] < other[2][1]:
                    yield from split(half, other, last)

    def mask(start, length, keep):
        i = torch.arange(start, start + length)
        return ((i >= keep[0]) & (i < keep[1])).float()

    leaves = sorted(split((0, height, (0, height)), (0, width, (0, width)), False))
    return [(rows[0], columns[0], mask(*rows), mask(*columns)) for rows, columns in leaves]


# --- x_lr, a window at a time ---


def lr_window(colour, task):
    """x_lr of a low-resolution picture (h, w, 1 or 3) uint8 or uint16, as a function of a window of it: see restore_rows.

    A window is enlarged from the pixels that reach into it: the same values as in the whole enlargement.
    """
    (h, w), s, reach = colour.shape[:2], task.scale, 4

    def window(top, bottom, left, right):
        y0, y1 = max(0, top // s - reach), min(h, -(-bottom // s) + reach)
        x0, x1 = max(0, left // s - reach), min(w, -(-right // s) + reach)
        x_lr = H_T(torch.from_numpy(np.require(to_planes(colour[y0:y1, x0:x1]), requirements="W"))[None], task.degradation, s)
        return x_lr[..., top - y0 * s : bottom - y0 * s, left - x0 * s : right - x0 * s]
    return window


# --- through the network ---


@torch.inference_mode()  # in which conv3x3 may take weights for constants
def restore_tile(model, x_lr, sigma_p, seed, corner, t=1.0, solver=None, steps=8, rtol=1e-3, atol=1e-3, dtype=torch.float32):
    """One tile, x_lr (1, 3, H, W) whose first pixel is the whole picture's `corner`: (x_1 (3, H, W) float32 on x_lr's device, evaluations).

    t: a number, or a tensor (H, W) of each pixel's own.
    """
    device, m, nfe = next(model.parameters()).device, model.multiple, 0
    size = [-(-max(side, 64) // m) * m for side in x_lr.shape[2:]]  # group norm wants something to average over
    seeds = torch.tensor([seed], device=device)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    with autocast:  # a network that works in latents encodes and decodes each tile
        x_in = model.start(model.to_latents(reflect_to(x_lr, *size).to(device)), sigma_p, seeds, corner)

    def walk(t):
        if solver is None:
            return one_step(model, x_in, t), 1
        if solver != "ancestral":
            return integrate(model, x_in.clone(), solver, steps, rtol, atol, t)
        if not hasattr(model, "ancestral") or t < 1:
            raise InputError("the sampler ancestral is a ResShift's, and goes to t = 1")
        return model.ancestral(x_in, lambda i: model.noise(seeds, x_in.chunk(2, dim=1)[0].shape, corner, stream=1 + i), steps)

    def at(t):
        nonlocal nfe
        with autocast:
            x_1, n = walk(t)
            x_1 = model.to_pixels(x_1)
        nfe += n
        return x_1[0, :, : x_lr.shape[2], : x_lr.shape[3]].float().to(x_lr.device)

    return (along_map(at, t) if torch.is_tensor(t) else at(t)), nfe


def restore_rows(model, window, height, width, sigma_p, seed, t=1.0, tile=0, tile_pad=32, progress=None, t_map=None, **how):
    """One picture through the network, from the top down: yields (rows (3, n, width) float32, evaluations so far), all rows in order.

    window(top, bottom, left, right) is that part of x_lr, (1, 3, bottom - top, right - left); seed: of the noise, drawn for
    the whole picture. tile: 0 (in one piece), a side in pixels (tiles that overlap by 2 tile_pad and blend) or "official"
    (see official_tiles). progress(share): called after each tile with its share of the work; t_map, in place of t: see
    dial.map_window; how: see restore_tile.
    Memory is a tile's, and that of one row of tiles.
    """
    check_tile(tile, tile_pad)
    m = model.multiple
    canvas = [height, width] if tile == "official" else [-(-side // m) * m for side in (height, width)]
    side = -(-tile // m) * m or max(canvas) if tile != "official" else 0
    tiles = feathered_tiles(*canvas, side, 2 * tile_pad, m) if side else official_tiles(*canvas)
    rows, columns = reflections(height, canvas[0]), reflections(width, canvas[1])
    band, top, nfe = torch.zeros(3, 0, width), 0, 0  # rows from `top` on, to which tiles may still add
    for y, x, wy, wx in tiles:
        if y > top:  # all tiles above have been
            yield band[:, : y - top], nfe
            band, top = band[:, y - top :], y
        bottom, right = min(y + len(wy), height), min(x + len(wx), width)
        if bottom - top > band.shape[1]:
            band = torch.cat([band, torch.zeros(3, bottom - top - band.shape[1], width)], dim=1)
        i, j = rows[y : y + len(wy)], columns[x : x + len(wx)]
        x_lr = window(*(int(n) for n in (i.min(), i.max() + 1, j.min(), j.max() + 1)))
        here = t if t_map is None else map_window(t_map, height, width, i, j)
        x_1, n = restore_tile(model, x_lr[:, :, i - i.min()][..., j - j.min()], sigma_p, seed, (y, x), here, **how)
        nfe = max(nfe, n)
        x_1 = x_1.cpu() * (wy[:, None] * wx)
        band[:, y - top : bottom - top, x:right] += x_1[:, : bottom - y, : right - x]
        if progress:
            progress(1 / len(tiles))
    yield band, nfe


def restore(model, x_lr, sigma_p, seeds, t=1.0, **how):
    """x_lr (B, 3, H, W) in [-1, 1], of any size and on any device, to (x_1 (B, 3, H, W) float32 there, evaluations made).

    t in [0, 1]: the dial. solver None: the one-step student, Eq. (13), else `flow.integrate`. The noise of x_0 comes from
    seeds (B,) int64; each picture is restored alone, so that the batch does not change a pixel. how: see restore_rows.
    """
    H, W = x_lr.shape[2:]
    out, nfe = [], 0
    for x, seed in zip(x_lr, seeds.tolist(), strict=True):
        window = lambda top, bottom, left, right, x=x: x[None, :, top:bottom, left:right]
        bands = list(restore_rows(model, window, H, W, sigma_p, seed, t, **how))
        out.append(torch.cat([rows for rows, _ in bands], dim=1).to(x_lr.device))
        nfe = max(nfe, bands[-1][1])
    return torch.stack(out), nfe


def resampled(bands, height, width, new_height, new_width):
    """Rows of a picture (3, height, width), as they come, to rows of (3, new_height, new_width), by Lanczos: yields (3, n, new_width) float32."""
    scale = height / new_height
    reach, kept, first, done = 3 * max(1.0, scale) + 1, np.zeros((3, 0, width), np.float32), 0, 0
    for rows in bands:
        kept = np.concatenate([kept, rows], axis=1)
        last = first + kept.shape[1]
        ready = new_height if last == height else max(done, math.floor((last - reach) / scale))
        if ready > done:
            box = (0, done * scale - first, width, ready * scale - first)
            yield np.stack([np.asarray(Image.fromarray(plane).resize((new_width, ready - done), Image.LANCZOS, box)) for plane in kept])
            begin = max(first, math.floor(ready * scale - reach))
            kept, first, done = kept[:, begin - first :], begin, ready


# --- how large a tile ---


def pick_tile(tile, model, height, width, dtype=torch.float32, tile_pad=32):
    """The side of the tiles for a picture of that size, 0 for one piece; tile "auto" looks at the memory that is free. Else it is as asked."""
    if tile != "auto":
        return tile
    device = next(model.parameters()).device
    room = 0.6 * free_memory(device) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = bytes_per_pixel(model, dtype)
    if height * width <= WHOLE and height * width * need < room:
        return 0
    side = TILE
    while side // 2 >= LEAST_TILE and side * side * need > room:
        side //= 2
    return max(side, 4 * tile_pad)


def smaller_tile(tile, height, width, tile_pad):
    """The tile to try when memory did not suffice for `tile` (0: one piece), or None if there is no smaller one."""
    side = TILE if tile == 0 else tile // 2
    while side >= max(height, width):
        side //= 2
    return side if side >= max(LEAST_TILE, 2 * tile_pad + 1) else None


def bytes_per_pixel(model, dtype):
    """About what the network holds at once for an output pixel: 15 maps of each of its levels (as measured of the shipped one, LOG.md)."""
    return 15 * model.width * (4 if dtype == torch.float32 else 2)


def free_memory(device):
    """Bytes that can be had on a device; on a CPU what the system, a container or ulimit leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        free += [1024 * int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # another system, or no limit ("max")
        pass
    if not free and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(free, default=4 * 2**30)


def check_tile(tile, tile_pad):
    """Raises InputError where tiles of that size (0: none, "auto", "official") would be all overlap."""
    side = {"auto": TILE, "official": 0}.get(tile, tile)
    if 0 < side <= 2 * tile_pad:
        raise InputError(f"--tile {side} must be larger than twice --tile_pad ({2 * tile_pad})")
