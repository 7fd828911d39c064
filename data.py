"""The table of tasks, and the pictures of a task: crops, flips, the order of training.

    python data.py --dataset ffhq --data_dir DIR      # what a training would use of a folder, and what is missing there

A picture is (3, H, W); on disk and in a batch from the loader it is uint8, for the network it is
float in [-1, 1]. Nothing here depends on how many processes train: picture number n of a training
run is the same picture, crop and flip on one GPU and on eight.
"""
import argparse
import atexit
import itertools
import multiprocessing.util
import signal
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import shards
from console import InputError, Parser, in_range
from degradations import H_T, degrade, least_multiple, to_float
from folders import ASSETS, Files, expected, keep_split, list_hash, note, split_folder
from model import PRESETS
from partners import cut_pair, read_pair
from pictures import probe, read_image


# --- tasks: a row is everything an experiment of the paper fixes ---


@dataclass(frozen=True)
class Task:
    name: str
    degradation: str = "bicubic"  # H: "bicubic" (antialiased), "avgpool", or "real" (degradations.py)
    scale: int = 4  # a fraction only where evaluate.py measures at one
    sigma_n: float = 0.0  # noise of the measurement, on the [-1, 1] scale
    eight_bit: bool = False  # the low-resolution picture is clamped and rounded to 8 bits, as in a file; the paper's is not
    strength: float = 0.0  # of "real": 0 (bicubic) to 1 (as published); -1: drawn by picture
    sigma_p: float = 0.1  # perturbation of the start, Eq. (4)
    image_size: int = 256  # side of a training picture
    crop: str = "center"  # "center": resize the short side, cut the middle; "random": cut anywhere, no resizing
    enlarge: bool = False  # what is smaller than image_size is enlarged, not refused: the paper's ImageNet has such pictures
    model: str = "ffhq"  # preset of model.py
    loss: str = "l1"  # D of Eq. (5)
    hflip: float = 0.5
    vflip: float = 0.06
    condition: bool = True  # the network sees x_lr
    train_files: int = 0  # train on the first N files by name; 0: all that are not for validation; -1: those too
    val_list: str = ""  # names of the validation files, a list in assets/ or anywhere; "": what folders.split_folder finds
    paper: str = ""  # where the paper reports it


TASKS = {task.name: task for task in (
    Task("photos", eight_bit=True, sigma_p=0.1, image_size=128, crop="random", model="photos"),
    Task("photos_real", degradation="real", strength=-1.0, eight_bit=True, sigma_p=0.1, image_size=128, crop="random", model="photos"),
    Task("ffhq", train_files=60000, val_list="ffhq_val_100.txt", paper="Table 2, top"),
    Task("ffhq_noisy", degradation="avgpool", sigma_n=0.05, sigma_p=0.5, train_files=60000, val_list="ffhq_val_100.txt", paper="Table 2, bottom"),
    Task("ffhq_x8", scale=8, train_files=60000, val_list="ffhq_val_100.txt", paper="Table 13"),
    Task("ffhq512_x4", image_size=512, model="ffhq512", train_files=60000, val_list="ffhq_val_100.txt", paper="Table 13"),
    Task("ffhq512_x8", image_size=512, scale=8, model="ffhq512", train_files=60000, val_list="ffhq_val_100.txt", paper="Table 13"),
    Task("div2k", sigma_p=0.2, crop="random", val_list="div2k_val_100.txt", paper="Table 1"),
    Task("imagenet", sigma_p=0.2, model="imagenet", enlarge=True, val_list="imagenet_val_100.txt", paper="Table 3"),
    Task("realsr", degradation="real", strength=1.0, eight_bit=True, sigma_p=0.2, enlarge=True, paper="Tables 4 and 5, 64 to 256"),
    Task("realsr512", degradation="real", strength=1.0, eight_bit=True, sigma_p=0.2, image_size=512, crop="random", paper="Tables 5 and 6, 128 to 512"),
    Task("ffhq_uncond", sigma_p=1.0, loss="l2", hflip=0.0, vflip=0.0, condition=False, train_files=-1, paper="Appendix F"),
)}

# How each row is trained, by stage: pictures of an update over all processes, updates, learning rate after the warm-up.
# The paper's Sec. 4.1 and Tables 7 and 8 (its last line), but for Table 9's and 13's, and the rate of div2k, which is its published configuration's.
RECIPES = {name: {"flow": (32, 100_000, 1e-4), "distill": (32, 20_000, 1e-4)} for name in TASKS} | {
    "div2k": {"flow": (32, 100_000, 1e-5), "distill": (32, 20_000, 1e-5)},
    "imagenet": {"flow": (32, 100_000, 1e-4), "distill": (32, 50_000, 1e-4)},
} | {name: {"flow": (32, 30_000, 1e-4), "distill": (16, 10_000, 1e-4)} for name in ("ffhq_x8", "ffhq512_x4", "ffhq512_x8")}


def add_task_flags(parser):
    """--dataset picks a row of the table, any other of these overrides a cell of it."""
    g = parser.add_argument_group("task: --dataset picks a row of data.TASKS, the rest override its cells")
    g.add_argument("--dataset", choices=TASKS, default="photos", help="which row (default: photos, any folder of photographs)")
    g.add_argument("--degradation", choices=("bicubic", "avgpool", "real"), help="H")
    g.add_argument("--scale", type=factor, help="how many times smaller x_lr is; measured on, not trained for, a fraction as 3.5 too")
    g.add_argument("--sigma_n", type=in_range(float, 0, 10), help="noise of the measurement, on the [-1, 1] scale")
    g.add_argument("--strength", type=in_range(float, -1, 1), help="of --degradation real: 0 (bicubic reduction) to 1 (as published); -1: drawn by picture")
    g.add_argument("--eight_bit", action=argparse.BooleanOptionalAction, help="round the low-resolution picture to 8 bits, as a file does")
    g.add_argument("--sigma_p", type=in_range(float, 0, 1), help="perturbation of the start, Eq. (4)")
    g.add_argument("--image_size", type=in_range(int, 8), help="side of a training picture")
    g.add_argument("--crop", choices=("center", "random"), help="resize and cut the middle, or cut anywhere")
    g.add_argument("--enlarge", action=argparse.BooleanOptionalAction, help="enlarge pictures smaller than --image_size instead of refusing them")
    g.add_argument("--val_list", metavar="FILE", help="names of the validation files, one a line; none: what the folders say")
    g.add_argument("--model", choices=PRESETS, help="network preset")
    g.add_argument("--condition", action="store_true", default=None, help="the network sees x_lr")
    g.add_argument("--no_condition", dest="condition", action="store_false", default=None, help="it does not: x_lr counts only through x_0")
    g.add_argument("--hflip", type=in_range(float, 0, 1), help="chance of a horizontal flip")
    g.add_argument("--vflip", type=in_range(float, 0, 1), help="chance of a vertical flip")


def factor(text):
    """An argparse type: 1 to 64, an int where it is whole, else of at most two decimals."""
    value = in_range(float, 1, 64)(text)
    if value != round(value, 2):
        raise argparse.ArgumentTypeError(f"{text} has more than two decimals")
    return int(value) if value == int(value) else value


def saved_task(cells, path):
    """The Task that the file at path says it was made for (a dict), checked: a number of another type or size is not believed. Raises InputError."""
    known = {f.name: f for f in fields(Task)}
    limits = dict(scale=(1, 64), sigma_n=(0, 10), strength=(-1, 1), sigma_p=(0, 1), image_size=(8, 65536), hflip=(0, 1), vflip=(0, 1))
    words = dict(degradation=("bicubic", "avgpool", "real"), crop=("center", "random"), loss=("l1", "l2"))
    for name, value in cells.items():
        if name not in known:
            raise InputError(f"{path} was made for a task with {name!r}, which this version does not know")
        kind, (low, high) = known[name].type, limits.get(name, (-2**31, 2**31))
        right = type(value) in {str: (str,), bool: (bool,), int: (int,), float: (int, float)}[kind]
        if not right or (kind in (int, float) and not low <= value <= high) or value not in words.get(name, (value,)):
            raise InputError(f"{path} was made for a task whose {name} is {value!r:.40}, which no task has")
    if "name" not in cells:
        raise InputError(f"{path} was made for a task without a name")
    return Task(**cells)


def resolve_task(args, row=None, training=True):
    """The row that --dataset names (or the row given), with the cells that other flags override. Raises InputError where they do not fit each other."""
    given = {f.name: v for f in fields(Task) if f.name != "name" and (v := getattr(args, f.name, None)) is not None}
    task = replace(row or TASKS[args.dataset], **given)
    if not isinstance(task.scale, int) and (training or task.degradation != "bicubic"):
        raise InputError(f"--scale {task.scale}: " + ("networks are trained for whole factors; evaluate.py measures them at others" if training else f"{task.degradation} takes whole factors"))
    if task.image_size % least_multiple(task.scale) and (training or task.crop == "center"):  # whole pictures are measured less their last rows
        raise InputError(f"--image_size {task.image_size} is not a multiple of --scale {task.scale}")
    if -1 < task.strength < 0:
        raise InputError(f"--strength {task.strength:g} should lie between 0 and 1, or be -1: drawn by picture")
    if task.degradation != "real":
        if "strength" in given and task.strength:
            raise InputError(f"--strength is of --degradation real, not of {task.degradation}")
        task = replace(task, strength=0.0)
    return task


def find_split(task, data_dir=None, memory=None, quiet=False):
    """The pictures of a task, for training and for validation, as a folders.Split.

    data_dir: a folder, or tars as shards.expand takes them; it defaults to data/<task name> (of photos_real data/photos), and where there is no data/photos, to the photographs in assets/. memory: what
    a checkpoint remembers of its lists; each picture then keeps the part it had, and what has changed is said, unless quiet.
    Raises InputError if there is no folder or no picture.
    """
    folder = Path(data_dir or Path("data") / task.name.removesuffix("_real"))
    if data_dir is None and folder.name == "photos" and not folder.is_dir():
        folder = ASSETS
        note("no folder data/photos: using the photographs in assets/, enough to see it run "
             "and far too few to learn from or to judge by (--data_dir names a folder of yours)")
    split = split_folder(folder, task)
    if folder == ASSETS:  # not the figures below it
        split = replace(split, train=[f for f in split.train if "/" not in f], val=[f for f in split.val if "/" not in f])
    split, changed = keep_split(split, memory)
    if changed and not quiet:
        note(changed)
    return split


def find_data(task, data_dir=None):
    """The training and the validation files of a task: two sequences of paths, neither empty. Raises InputError if there are none to train on."""
    return check_split(find_split(task, data_dir), task)


def check_split(split, task):
    """The files of a Split that a training can use, as two sequences of paths, neither empty. Raises InputError if most are too small, or none is for training.

    Where no picture is for validation, a training looks at itself on pictures that it has seen, and says so.
    """
    if not split.train:
        raise InputError(f"{split.folder} holds validation pictures alone ({split.how}): name the folder above it, or one of pictures to train on")
    if not split.val:
        note(f"no validation pictures in {split.folder} ({split.how}): the scores during training are of pictures that it trains on")
    train, val = (Files(split.folder, files) for files in (split.train, split.val or spread(split.train, 100)))
    sizes, _ = picture_sizes(train, 200)
    small = [item for item in sizes if not fits(*item[0], task)]
    if len(small) > len(sizes) / 2:  # fewer are left out one by one
        (w, h), path = small[0]
        raise InputError(f"{len(small)} of {len(sizes)} pictures looked at in {split.folder} are smaller than the {task.image_size} pixels of {task.name}, "
                         f"as {path}, {w} x {h}: truth is not enlarged")
    return train, val


def spread(items, count):
    """`count` of the items, or all if they are fewer, evenly over their order."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else items


# --- datasets ---


def fits(width, height, task, size=None):
    """Whether a picture is large enough to be truth at the task's size (or another); enlarged, it would be a blurred one."""
    return min(height, width) >= (size or task.image_size) or (task.enlarge and task.crop == "center")


def check_side(path, height, width, task, size=None):
    """Raises InputError, which names the file and its size, if it does not fit."""
    if not fits(width, height, task, size):
        raise InputError(f"{path} is {width} x {height}, smaller than the {size or task.image_size} pixels of {task.name}: truth is not enlarged")


def center_crop(image, size):
    """Resize the short side of a PIL picture to size (halving with a box filter first, then bicubic) and cut the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


class Pictures(torch.utils.data.Dataset):
    """Training pictures: item (index, n) is (3, S, S) uint8 and n, the crop and flips being drawn from (seed, n).

    low: {path: path of its low-resolution partner}, of which the same part comes third, (3, S/scale, S/scale); cuts are anywhere then.
    A picture that is broken, or too small for the task, is replaced by the next one with a warning that names it; when
    more than 1 % are broken, or none is large enough, InputError. All processes that load for one training process count together.
    """

    def __init__(self, paths, task, seed, low=None):
        self.paths, self.task, self.seed, self.low = paths, task, seed, low
        self.broken, self.small = torch.zeros(2, len(paths), dtype=torch.bool).share_memory_()  # which have been found to be

    def __len__(self):
        return len(self.paths)

    def load(self, index):
        for i in itertools.count(index):
            path = self.paths[i % len(self)]
            try:
                parts = read_pair(path, self.low[path], self.task.scale) if self.low else [read_image(path)]
            except InputError as e:
                self.skip(i % len(self), self.broken, e)
                if (found := int(self.broken.sum())) > 0.01 * len(self):
                    raise InputError(f"{found} of {len(self)} training pictures cannot be used, the last: {e}") from None
                continue
            height, width = parts[0].shape[:2]
            if fits(width, height, self.task) and not (self.low and min(height, width) < self.task.image_size):  # pairs are not enlarged
                return parts
            e = f"{path} is {width} x {height}, smaller than the {self.task.image_size} pixels of {self.task.name}"
            self.skip(i % len(self), self.small, e)
            if i - index >= len(self):
                raise InputError(f"no training picture is large enough, the last: {e}")

    def skip(self, index, others, why):
        if not others[index] and others.sum() < 10:  # of the rest, of which there may be a million, no line each
            print(f"skipped: {why}", file=sys.stderr)
        others[index] = True

    def __getitem__(self, key):
        index, n = key
        rng, size = np.random.default_rng([self.seed, n]), self.task.image_size
        image, *small = self.load(index)
        if small:
            y, x = (int(rng.integers((d - size) // self.task.scale + 1)) for d in image.shape[:2])
            parts = cut_pair(image, *small, y, x, self.task)
        elif self.task.crop == "random":
            y, x = (int(rng.integers(d - size + 1)) for d in image.shape[:2])
            parts = [image[y : y + size, x : x + size]]
        else:
            parts = [np.asarray(center_crop(Image.fromarray(image), size))]
        if rng.random() < self.task.hflip:
            parts = [part[:, ::-1] for part in parts]
        if rng.random() < self.task.vflip:
            parts = [part[::-1] for part in parts]
        x_1, *y = (torch.from_numpy(part.transpose(2, 0, 1).copy()) for part in parts)
        return x_1, n, *y


class Order(torch.utils.data.Sampler):
    """The endless order of training: (index, n) for n = start + rank, start + rank + world, ...

    n counts the pictures that all processes together have seen; every epoch is another permutation. To
    resume is to start at another n.
    """

    def __init__(self, length, seed, start=0, rank=0, world=1):
        self.length, self.seed, self.start, self.rank, self.world = length, seed, start, rank, world

    def __iter__(self):
        current = None
        for n in itertools.count(self.start + self.rank, self.world):
            epoch, i = divmod(n, self.length)
            if epoch != current:
                current, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length)
            yield int(order[i]), n


def training_batches(paths, task, seed, batch_size, start, rank, world, num_workers, low=None):
    """Batches without end, from picture number `start` on: ((B, 3, S, S) uint8, (B,) int64 picture numbers); with `low`, as Pictures has it, its parts third."""
    order = Order(len(paths), seed, start, rank, world)
    return iter(torch.utils.data.DataLoader(
        Pictures(paths, task, seed, low), batch_size, sampler=order, num_workers=num_workers,
        pin_memory=torch.cuda.is_available(), persistent_workers=num_workers > 0, worker_init_fn=ignore_signals))


# What asks a training for a last save: the scheduler's end of time, Ctrl-C, a terminal that closes, Slurm's --signal=USR1.
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


def ignore_signals(worker):
    """A process that loads ignores the signals that are sent to all of a training's processes: it ends with the one it loads for."""
    for s in STOPPING:
        signal.signal(s, signal.SIG_IGN)


@atexit.register
def end_loaders():
    """At exit, ends the processes that still load. multiprocessing, which comes after this, would ask them by SIGTERM, which they ignore, and then wait for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def validation_pictures(paths, task, count):
    """The middles of `count` of the files, spread evenly: (N, 3, S, S) uint8.

    S is the task's size, or, where crops are random, the first multiple of it from 256 on that half of the files have:
    enlarged, they would flatter whatever blurs. One that is broken or too small is left out with a warning; InputError if
    none is left.
    """
    sides, size, middles = {}, task.image_size, []
    for p in spread(paths, count):
        try:
            head = probe(p)
            sides[p] = min(head.width, head.height)
        except InputError as e:
            note(f"skipped for validation: {e}")
    if task.crop == "random" and sides:  # a multiple, as it has to be one of the scale and of the network's, too
        most = sorted(sides.values())[(len(sides) - 1) // 2]  # half of them have as much
        size *= max(1, min(-(-256 // size), most // size))
    for p in sides:
        try:
            middles.append(middle(p, task, size))
        except InputError as e:
            note(f"skipped for validation: {e}")
    if not middles:
        raise InputError("none of the validation pictures can be used")
    return torch.stack(middles)


def middle(path, task, size):
    """The middle of a picture file, (3, size, size) uint8, of which nothing else stays in memory. Raises InputError if it cannot be read or is smaller."""
    x = read_image(path)
    check_side(path, *x.shape[:2], task, size)
    return torch.from_numpy(np.array(center_crop(Image.fromarray(x), size)).transpose(2, 0, 1))


def image_seeds(seed, numbers):
    """The noise streams of pictures `numbers` (B,) int64 in a run of that seed: (B,) int64, one each."""
    return (numbers % 2**32) + (seed % 2**31) * 2**32


def uniform_times(seed, numbers):
    """t of Eq. (5) and (9) for pictures `numbers` (B,) int64: (B,) float32, uniform in [0, 1).

    The additive recurrence of the golden ratio: every stretch of pictures covers [0, 1) evenly, which
    independent draws do not, and a picture's t depends on nothing but its number.
    """
    offset = np.random.default_rng(seed).random()
    return ((numbers.double() * ((5**0.5 - 1) / 2) + offset) % 1).float().clamp(max=1 - 2**-24)


def low_resolution(x_1, y, task, seeds):
    """x_lr (B, 3, S, S) of the true pictures x_1 in [-1, 1]: of y, a list that holds their partners uint8, or else degraded by the task."""
    return H_T(to_float(y[0].to(x_1.device)), task.degradation, task.scale) if y else degrade(x_1, task, seeds)


def measure_sigma_d(paths, task, seed, count=256, low=None):
    """sigma_d of the preconditioning: the root mean square of x_1 - x_lr (whose mean is about 0) over `count` crops, in training's order."""
    batches = training_batches(paths, task, seed, min(count, 32), 0, 0, 1, 0, low)
    total, pixels = 0.0, 0
    for _ in range(max(1, count // 32)):
        x_1, n, *y = next(batches)
        x_1 = to_float(x_1)
        d = x_1 - low_resolution(x_1, y, task, image_seeds(seed, n))
        total, pixels = total + d.double().square().sum().item(), pixels + d.numel()
    return (total / pixels) ** 0.5


# --- what a folder holds ---


def picture_sizes(paths, count=2000):
    """Of `count` of the files, spread evenly: their (width, height), smallest first, and what cannot be opened. From the headers alone."""
    sizes, broken = [], []
    for path in spread(paths, count):
        try:
            p = probe(path)
            sizes.append(((p.width, p.height), path))
        except InputError:
            broken.append(path)
    return sorted(sizes, key=lambda item: min(item[0])), broken


def describe(split, task):
    """What a training would use of a folder: counts, the split, sizes, the hash of the list; and what was expected. Lines of text."""
    yield f"{task.name} in {split.folder}"
    yield f"  training    {len(split.train):,} pictures"
    yield f"  validation  {len(split.val):,} pictures: {split.how}"
    if tars := {tar for files in (split.train, split.val) for f in files if (tar := shards.outer(f))}:
        yield f"  shards      {len(tars):,} tars, as {min(tars)}"
    for why, files in split.left_out.items():
        yield f"  left out    {len(files):,} {why}, as {files[0]}"
    for name, files in (("training", split.train), ("validation", split.val)):
        sizes, broken = picture_sizes([split.folder / f for f in files])
        if sizes:
            small = [item for item in sizes if min(item[0]) < task.image_size]
            (w, h), (mw, mh) = sizes[0][0], sizes[len(sizes) // 2][0]
            yield (f"  sizes       {name}: smallest {w} x {h}, median {mw} x {mh}, of {len(sizes):,} looked at"
                   + (f"; {len(small):,} smaller than {task.image_size}, {'enlarged' if task.enlarge else 'not used'}, as {small[0][1]}" if small else ""))
        if broken:
            yield f"  broken      {len(broken):,}, as {broken[0]}"
    yield f"  sha256      {list_hash(split)} of the list"
    if missing := expected(split, task):
        yield f"  expected    {missing}"


def main(argv=None):
    p = Parser(description="What a training would use of a folder of pictures.")
    add_task_flags(p)
    p.add_argument("--data_dir", help="the folder (default: data/DATASET)")
    args = p.parse_args(argv)
    task = resolve_task(args)
    for line in describe(find_split(task, args.data_dir), task):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"data.py: {e}")
