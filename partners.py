"""Pairs from disk, --lr_dir: the low-resolution picture that somebody took of a true one, in place of what H makes of it."""
import re

import torch

import shards
from console import InputError
from folders import list_folder
from pictures import EXTENSIONS, read_image

LOW, HIGH = re.compile(r"(_lr\d*|x\d+)$", re.IGNORECASE), re.compile(r"_hr$", re.IGNORECASE)  # RealSR's and DIV2K's endings of stems


def find_partners(paths, lr_dir):
    """The low-resolution file of each true picture: {path: path of lr_dir}, paired by stem less _HR, and _LR, _LR4 or x4 (RealSR, DIV2K), or by the very stem.

    lr_dir is a folder, or tars as shards.expand takes them. Both kinds may lie in one: what is named as low-resolution there is
    no true picture. Raises InputError that names a picture without a partner, or with two.
    """
    low, (folder, tars) = {}, shards.expand(lr_dir)
    files = list_folder(folder, tars)
    if not files:
        raise InputError(f"no pictures in {lr_dir} (looked for {' '.join(sorted(EXTENSIONS))})")
    for p in (folder / file for file in files):
        stem = LOW.sub("", p.stem)
        if not HIGH.search(p.stem) and low.setdefault(stem, p) is not p:
            raise InputError(f"{low[stem]} and {p} are both of {stem}: which is meant?")
    alike = {p.resolve() for p in low.values()}
    truth = {p: HIGH.sub("", p.stem) for p in paths if p.resolve() not in alike}
    true = {p.resolve() for p in truth}
    same = {p.stem: p for p in (folder / file for file in files) if HIGH.search(p.stem) and p.resolve() not in true}  # a folder of low-resolution ones under the true ones' names
    low |= {stem: same[p.stem] for p, stem in truth.items() if stem not in low and p.stem in same}
    if not truth:
        raise InputError(f"{lr_dir} holds the true pictures themselves: low-resolution ones end in _LR4, or lie in a folder of their own")
    alone = [(p, stem) for p, stem in truth.items() if stem not in low]
    if alone:
        raise InputError(f"{alone[0][0]} has no partner {alone[0][1]}.* in {lr_dir} ({len(alone)} of {len(truth)} have none)")
    return {p: low[stem] for p, stem in truth.items()}


def read_pair(path, low, scale):
    """Both pictures of a pair, uint8 (H, W, 3) and (h, w, 3). Raises InputError if one cannot be read, or H x W is not exactly scale times h x w."""
    image, small = read_image(path), read_image(low)
    (H, W), (h, w) = image.shape[:2], small.shape[:2]
    if (H, W) != (h * scale, w * scale):
        raise InputError(f"{low} is {w} x {h} and {path} {W} x {H}: for --scale {scale} it should be {w * scale} x {h * scale}")
    return image, small


def cut_pair(image, small, y, x, task):
    """The task's size of both pictures, from the low-resolution pixel (y, x) on."""
    s, size = task.scale, task.image_size
    return image[y * s : y * s + size, x * s : x * s + size], small[y : y + size // s, x : x + size // s]


def middles(low, task):
    """The middles, of the task's size, of pairs {path: path}: [(N, 3, S, S), (N, 3, S/scale, S/scale)] uint8. Raises InputError for a pair that is too small."""
    pairs = []
    for path, partner in low.items():
        image, small = read_pair(path, partner, task.scale)
        if min(image.shape[:2]) < task.image_size:
            raise InputError(f"{path} is {image.shape[1]} x {image.shape[0]}, smaller than the {task.image_size} pixels of {task.name}")
        y, x = ((n - task.image_size) // 2 // task.scale for n in image.shape[:2])
        pairs.append([torch.from_numpy(part.transpose(2, 0, 1).copy()) for part in cut_pair(image, small, y, x, task)])
    return [torch.stack(parts) for parts in zip(*pairs)]
