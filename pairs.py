"""Which pictures evaluate.py measures: the true ones of a folder, the partners of two, pairs written once, and the folder of its own results."""
import functools
import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from console import InputError, atomic_write
from degradations import least_multiple, observe, to_float
from folders import note, trained_on
from metrics import check_size
from partners import HIGH, read_pair
from pictures import list_images, read_image, write_picture

PAIRS = "pairs.json"  # in a folder of pairs: what they are, and the hash of their pixels
MARK = "evaluation.json"  # in a folder of results: what lies beside it is ours to take away


def by_stem(paths, folder):
    """{path below folder without its ending: path}. Raises InputError where two pictures share one."""
    found = {}
    for p in paths:
        stem = p.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise InputError(f"{found[stem]} and {p} differ only in their ending: which is meant?")
        found[stem] = p
    return found


def find_pairs(restored, truth):
    """The pictures of two folders, paired by stem: [(stem, path, path)]. Raises InputError that names one without a partner."""
    a, b = (by_stem(list_images(folder), folder) for folder in (restored, truth))
    for here, there, folder in ((a, b, truth), (b, a, restored)):
        alone = [stem for stem in here if stem not in there]
        if alone:
            raise InputError(f"{here[alone[0]]} has no partner {alone[0]}.* in {folder} ({len(alone)} of {len(here)} have none)")
    return [(stem, a[stem], b[stem]) for stem in a]


def find_truth(task, data_dir, count, networks, trained_too):
    """The true pictures: ({stem: path}, what they are in words).

    A folder's validation pictures, or, where none are marked, all of it; less those that one of the networks was trained
    on, unless trained_too; of these `count`, spread evenly, or all (0). Raises InputError if none is left.
    """
    split = data.find_split(task, data_dir)
    paths = [split.folder / f for f in (split.val if split.marked else sorted(split.train + split.val))]
    what = f"{'validation pictures' if split.marked else 'pictures, none marked for validation,'} of {split.folder}"
    seen, alike = (set().union(*lists) for lists in zip(([], []), *(trained_on(paths, n.memory) for n in networks)))
    if seen and trained_too:
        what += f", {len(seen)} of them trained on,"
    elif seen:
        paths = [p for p in paths if p not in seen]
        what += f" less {len(seen)} trained on"
        if not paths:
            raise InputError(f"all {len(seen)} pictures of {split.folder} were trained on by {' or '.join(n.name for n in networks)}: "
                             "name others, or measure them all the same with --trained_too")
    if alike := alike & set(paths):
        note(f"{len(alike)} pictures, as {min(alike)}, have the names of pictures that were trained on but are other files: if they show the same, "
             "what follows is no measure of pictures never seen")
    chosen = data.spread(paths, count or len(paths))
    return by_stem(chosen, split.folder), f"{len(chosen)} {what}"


def load_truth(path, task, low=None):
    """A true picture, (H, W, 3) uint8: the task's centre crop, or the whole picture less what exceeds a multiple of the scale. Raises InputError if it is too small.

    low: the file of its low-resolution partner, which the whole picture has to fit.
    """
    image = read_pair(path, low, task.scale)[0] if low else read_image(path)
    if not low and task.crop == "center":
        data.check_side(path, *image.shape[:2], task)
        image = np.asarray(data.center_crop(Image.fromarray(image), task.image_size))
    height, width = (n - n % least_multiple(task.scale) for n in image.shape[:2])
    check_size(path, height, width, math.ceil(task.scale))
    return np.ascontiguousarray(image[:height, :width])


def find_alone(folder, count):
    """Pictures of which there are no true ones, `count` spread evenly or all (0): as find_truth."""
    paths = list_images(folder)
    chosen = data.spread(paths, count or len(paths))
    return by_stem(chosen, folder), f"{len(chosen)} pictures of {folder}, no true ones"


def stream_of(stem, seed):
    """The noise stream (1,) of a picture: of its file's name and the seed, whatever other pictures are there."""
    number = int.from_bytes(hashlib.sha256(os.fsencode(stem.rpartition("/")[2])).digest()[:4], "little")
    return data.image_seeds(seed, torch.tensor([number]))


# --- pairs, written once ---


def write_pairs(folder, task, sources, what, seed=0):
    """True pictures {stem: path} and what H makes of them under a seed, as hr/NAME_HR.png and lr/NAME_LR4.png in a folder: a line that says so.

    PAIRS beside them holds the settings and the hash of the pixels. Where it is there already, nothing is written: the same is asked
    for and found as it was, or InputError is raised.
    """
    names = {stem: HIGH.sub("", stem.replace("/", "_")) for stem in sorted(sources)}
    cells = {k: v for k, v in asdict(task).items() if k in ("degradation", "strength", "scale", "sigma_n", "eight_bit", "crop", "image_size")}
    asked = dict(task=cells, seed=seed, names=list(names.values()))
    if len(set(names.values())) < len(names):
        raise InputError("two of the true pictures would have one name: name one of their folders with --data_dir")
    if (folder / PAIRS).is_file():
        if (kept := read_pairs(folder))["asked"] != asked:
            raise InputError(f"{folder} holds pairs of other pictures or another H: choose another folder, or take it away")
        check_pairs(folder / "lr")
        return f"{folder}: {len(names)} pairs are there already, unchanged, sha256 {kept['sha256'][:12]}"
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else already: choose another")
    for stem, name in names.items():
        truth = load_truth(sources[stem], task)
        y = observe(to_float(torch.from_numpy(truth.copy()).permute(2, 0, 1)[None]), task, stream_of(stem, seed))
        low = (y[0].permute(1, 2, 0).clamp(-1, 1) * 127.5 + 127.5).round().byte().numpy()
        write_picture(folder / "hr" / f"{name}_HR.png", truth)
        write_picture(folder / "lr" / f"{name}_LR{task.scale}.png", low)
    digest = pixels_sha256(folder)
    atomic_write(folder / PAIRS, lambda tmp: tmp.write_text(json.dumps(dict(what=what, sha256=digest, asked=asked), indent=1) + "\n"))
    return f"{folder}: {len(names)} pairs written of {what}, sha256 {digest[:12]}; measure on them with --data_dir {folder / 'hr'} --lr_dir {folder / 'lr'}"


def read_pairs(folder):
    try:
        kept = json.loads((folder / PAIRS).read_text())
        return dict(asked=kept["asked"], sha256=str(kept["sha256"]))
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / PAIRS} is broken: take {folder} away and write it again") from None


def check_pairs(lr_dir):
    """Of --lr_dir in a folder of write_pairs: its hash in words, for the protocol; "" for any other. Raises InputError if the pictures are not those that were written."""
    folder = Path(lr_dir).absolute().parent
    if not (folder / PAIRS).is_file():
        return ""
    digest = read_pairs(folder)["sha256"]
    if pixels_sha256(folder) != digest:
        raise InputError(f"{folder} does not hold the pairs that were written (SHA-256 of their pixels): take it away and write it again")
    return f", pairs of sha256 {digest[:12]},"


def pixels_sha256(folder):
    """SHA-256 of the names, sizes and pixels of the pictures below a folder."""
    digest = hashlib.sha256()
    for path in list_images(folder):
        pixels = read_image(path)
        digest.update(f"{path.relative_to(folder).as_posix()} {pixels.shape}\n".encode() + pixels.tobytes())
    return digest.hexdigest()


# --- the folder of results ---


@functools.cache
def lock(out_dir):
    """Keep the folder for this program while it runs. Raises InputError if another one has it."""
    from filelock import FileLock, Timeout  # comes with torch
    held = FileLock(out_dir / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another evaluate.py writes into {out_dir}: choose another --out_dir") from None
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    return held  # as long as somebody has it, it is held


def clear(out_dir):
    """Make out_dir a folder of this run alone: what an earlier run left there goes. Raises InputError if something there is not ours."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock(out_dir)
        there, marked = sorted(p for p in out_dir.iterdir() if p.name not in (MARK, ".lock")), (out_dir / MARK).is_file()
        for path in there:
            if not (marked and path.is_dir() and (path.name == "hr" or all(p.name.startswith("seed") for p in path.iterdir()))):
                raise InputError(f"--out_dir {out_dir} holds {path.name}, which evaluate.py did not write: choose another, or take it away")
        for path in there:
            shutil.rmtree(path)
    except OSError as e:
        raise InputError(f"cannot write into {out_dir}: {e.strerror}") from None
    atomic_write(out_dir / MARK, lambda tmp: tmp.write_text("{}\n"))  # no training takes what lies beside it for photographs
