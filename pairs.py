"""Which pictures evaluate.py measures: the true ones of a folder, the partners of two, and the folder of its own results."""
import functools
import math
import shutil

import numpy as np
from PIL import Image

import data
from console import InputError, atomic_write
from degradations import least_multiple
from folders import note, trained_on
from metrics import check_size
from partners import read_pair
from pictures import list_images, read_image

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
