"""Figures of what evaluate.py and curves.py measure: trade-offs as bubbles, pictures side by side, curves over t.

Numbers and pictures come from their callers; nothing here restores or measures a row. Plots need matplotlib, which is
imported when one is drawn; pictures beside pictures need Pillow alone.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from console import InputError, atomic_write
from metrics import METRICS, luma
from pictures import read_image, write_picture

TILE = 256  # side of a picture, and of its detail, in side_by_side


def new_axes(**labels):
    """A matplotlib figure with one pair of axes: (figure, axes)."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.add_subplot(**labels)
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure, path):
    atomic_write(path, lambda tmp: figure.savefig(tmp, format=Path(path).suffix[1:].lower(), dpi=150))


def radius(nfe):
    """Of a bubble, in points: it grows by the same with each tenfold of the evaluations (Fig. 1b)."""
    return 4 + 5 * np.log10(max(1.0, nfe or 1.0))


def tradeoff(path, rows):
    """PSNR against LPIPS: a curve for each network, its points labelled with t or the evaluations counted, and a bubble for each other row."""
    figure, axes = new_axes(xlabel="LPIPS (left is better)", ylabel="PSNR in dB (up is better)")
    curves = {}
    for row in rows:
        curves.setdefault(row["curve"] or row["name"], []).append(row)
    for name, points in curves.items():
        points = sorted(points, key=lambda p: (p["t"] is None, p["t"], p["nfe"] or 0) if p["curve"] else ())
        x, y = [p["lpips"] for p in points], [p["psnr_rgb"] for p in points]
        (line,) = axes.plot(x, y, "-" if len(points) > 1 else "", label=name)
        axes.scatter(x, y, [radius(p["nfe"]) ** 2 for p in points], color=line.get_color(), alpha=0.7, linewidths=0, label=name if len(points) == 1 else None)
        for p in points:
            label = f"t {p['t']:g}" if p["t"] is not None else f"{p['nfe']:.4g} NFE" if p["nfe"] else ""
            axes.annotate(label, (p["lpips"], p["psnr_rgb"]), textcoords="offset points", xytext=(6, 4), fontsize=8)
    handles = {h.get_label(): h for h in axes.get_legend_handles_labels()[0]}
    axes.legend(handles.values(), handles.keys(), fontsize=8)
    save(figure, path)


def over_t(path, curves, xlabel="t", ylabel="MSE (line)"):
    """Curves over t in one plot: curves {name: (ts, errors, distances)}; errors on the left axis, LPIPS dashed on the right, None where it is not known."""
    figure, axes = new_axes(xlabel=xlabel, ylabel=ylabel)
    other = axes.twinx() if any(d[0] is not None for _, _, d in curves.values()) else None
    for name, (ts, errors, distances) in curves.items():
        (line,) = axes.plot(ts, errors, "o-", label=name, markersize=4)
        if other and distances[0] is not None:
            other.plot(ts, distances, "s--", color=line.get_color(), markersize=4)
    if other:
        other.set_ylabel("LPIPS (dashed)")
    axes.legend(fontsize=8)
    save(figure, path)


def points(path, values, xlabel, ylabel):
    """A curve through (x, y) pairs."""
    figure, axes = new_axes(xlabel=xlabel, ylabel=ylabel)
    axes.plot(*zip(*values), "o-")
    save(figure, path)


# --- pictures beside pictures ---


def choose(stems, asked, count=4):
    """The pictures to show: those asked for by their place or their name, else `count` spread evenly. Raises InputError for one that is not measured."""
    if not asked:
        return [stems[i * len(stems) // count] for i in range(count)] if len(stems) > count else stems
    found = [next((s for s in stems if s == name or s.rpartition("/")[2] == name), None) for name in asked]
    if None in found:
        raise InputError(f"--figure_pictures {asked[found.index(None)]} is not among the pictures that are measured, as {stems[0]}")
    return found


def detail(truth, size):
    """Where a picture, (H, W, 3) uint8, has most detail: (left, top) of the square of that size with the largest mean change between neighbours."""
    y = luma(torch.from_numpy(truth).permute(2, 0, 1)[None])
    change = (y[..., 1:, 1:] - y[..., :-1, 1:]).abs() + (y[..., 1:, 1:] - y[..., 1:, :-1]).abs()
    means = F.avg_pool2d(change, min(size - 1, *change.shape[-2:]), stride=4)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return 4 * column, 4 * row


def column(array, box, caption, numbers):
    """One picture of a band: its caption, itself with the square marked, the square enlarged, its numbers. A PIL picture TILE wide."""
    image, font = Image.fromarray(array), ImageFont.load_default(13)
    out = Image.new("RGB", (TILE, 2 * TILE + 40), "white")
    small = image.copy()
    small.thumbnail((TILE, TILE), Image.LANCZOS)
    ratio = small.width / image.width
    out.paste(small, ((TILE - small.width) // 2, 20 + (TILE - small.height) // 2))
    draw = ImageDraw.Draw(out)
    left, top = (TILE - small.width) // 2, 20 + (TILE - small.height) // 2
    draw.rectangle([left + box[0] * ratio, top + box[1] * ratio, left + box[2] * ratio, top + box[3] * ratio], outline="red")
    out.paste(image.crop(box).resize((TILE, TILE), Image.NEAREST), (0, TILE + 20))
    draw.text((4, 2), caption, "black", font)
    draw.text((4, 2 * TILE + 22), numbers, "black", font)
    return out


def side_by_side(path, stems, rows, bench):
    """Every row's picture of each stem under its first seed, the true one last, with what was measured of it (Figs. 4, 5, 14, 15)."""
    bands = []
    for stem in stems:
        truth = read_image(bench.truth[stem])
        size = min(64, *truth.shape[:2])
        left, top = detail(truth, size)
        box = (left, top, left + size, top + size)
        b = torch.from_numpy(truth).permute(2, 0, 1)[None]
        columns = []
        for row in rows:
            array = read_image(bench.png(row, 0, stem))
            a = torch.from_numpy(array).permute(2, 0, 1)[None]
            with torch.no_grad():
                scores = {name: bench.metrics.pictures[name](a, b).item() for name in ("psnr_rgb", "lpips") if name in bench.metrics.pictures}
            columns.append(column(array, box, row.name, "  ".join(f"{name} {value:.{METRICS[name]}f}" for name, value in scores.items())))
        bands.append(np.hstack([np.asarray(c) for c in [*columns, column(truth, box, "truth", stem.rpartition("/")[2][-34:])]]))
    write_picture(Path(path), np.vstack(bands))


def grid(path, rows):
    """Pictures in rows, lists of (h, w, 3) uint8, each row on a white ground of the widest."""
    bands = [np.hstack(row) for row in rows]
    width = max(b.shape[1] for b in bands)
    write_picture(Path(path), np.vstack([np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in bands]))
