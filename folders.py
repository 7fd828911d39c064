"""Which pictures of a folder are for training and which for validation, and what a run remembers of them.

The layouts that data sets come in are recognised by the names of their folders: train/ and val/ (valid, validation,
test; any case, at any depth; DIV2K_train_HR, DIV2K_valid_HR, ILSVRC2012_img_val and their like), *_LR_* for the
low-resolution partners, which are never truth. Where nothing is marked, one picture in twenty is kept for validation,
chosen by its name alone: another picture in the folder changes nothing for those that are there already.

    files = list_folder("DIR")             # ["train/a.png", "shards/000.tar/a.png", ...]: a tar is a folder (shards.py)
    split = split_folder("DIR", task)      # .train, .val, .left_out: such lists
    memory = remember(split)               # for the checkpoint: a few bytes a picture
    split, changed = keep_split(split, memory)   # on resume: each picture keeps its part
    trained_on(paths, memory)              # which of these a network has seen
"""
import base64
import functools
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import shards
from console import InputError
from pictures import EXTENSIONS

ASSETS = Path(__file__).parent / "assets"
# A folder's role is the last word of its name, with what data sets put behind it: val, val256, valid_HR, validation_images, val-000.tar.
SUFFIX = r"(?:[\W_]?(?:hr|set|imgs?|images?|photos?|pictures?|files|data|original|large|of|\d+(?:x\d+)?))*"
ROLES = {
    "val": "(?:val|valid|validation)" + SUFFIX,
    "test": "test" + SUFFIX,
    "train": "(?:train|training)" + SUFFIX,
    "small": r"(?:lr|lq|low[\W_]?res(?:olution)?|thumbnails?)(?:[\W_].*|x?\d.*|bi.*)?",
}
ANY = r"(?:.*[\W_])?"  # what may stand before it
SETS = r"(?:(?:div2k|df2k|flickr2k|ffhq|imagenet|ilsvrc\d*|img|lsdir|realsr|train|valid)[\W_])*"  # before the folder's that the user names, whose name may mean anything
HELD = {"val": 0, "test": 1}  # the roles that keep a picture out of training, the stronger first
SYSTEM = {"__macosx", "@eadir", "$recycle.bin"}  # copies and leftovers of operating systems
RESULTS = {"log.jsonl", "evaluation.json"}  # of a training, of evaluate.py: what lies beside them are results, not photographs
SMALL_FILE = re.compile(r"(.*[_-])LR\d*", re.IGNORECASE)  # RealSR: Canon_001_LR4.png beside Canon_001_HR.png
CONTENTS_UP_TO = 20_000  # files of a list whose contents are remembered too; reading those of a million would take minutes
WHY = {"small": "low-resolution partners", "test": "of a test set", "listed": "of the validation set, but not in the list"}


# --- listing ---


@functools.lru_cache(maxsize=100_000)
def role(name, before=ANY):
    """What a folder of that name holds: "val", "test", "train", "small" (low-resolution partners), or None."""
    return next((r for r, word in ROLES.items() if re.fullmatch(before + word, name.casefold().removesuffix(".tar"))), None)


def role_of(file):
    """The role of a file "a/b/c.png" by its folders: partners first, then what is nearest to the file."""
    roles = [r for name in file.split("/")[:-1] if (r := role(name))]
    return "small" if "small" in roles else roles[-1] if roles else None


def list_folder(folder, tars=None):
    """Every picture below folder, or in those tars there alone, as its path from there with "/", sorted; hidden files and folders left out.

    Links to folders and files are followed, and what several names lead to is listed once: under a name in a folder
    for validation, if there is one, else under the real one. Raises InputError if there is no folder, or one below it
    cannot be read.
    """
    if not Path(folder).is_dir():
        raise InputError(f"no folder {folder}")
    real = {"": os.path.realpath(folder)}  # the folders on the way: {path from folder: real path}
    known, todo, later, found, links = set(), [""], [], [], []
    if tars is not None:
        todo = [f"{tar}/" for tar in tars]
        real |= {below: os.path.realpath(os.path.join(folder, below[:-1])) for below in todo}
    while todo or later:
        below = todo.pop() if todo else later.pop(0)  # links to folders last, so that real names win
        visit = real[below], role_of(below) in HELD
        if visit in known or (visit[0], False) in known and not visit[1]:
            continue
        known.add(visit)
        files, folders = scan(real[below], below)
        found += [below + name for name, is_link in files if not is_link]
        links += [below + name for name, is_link in files if is_link]
        for name, is_link in folders:
            path = os.path.join(real[below], name)
            path = os.path.realpath(path) if is_link else path
            if not f"{real[below]}{os.sep}".startswith(f"{path}{os.sep}"):  # a link back to where it lies
                real[f"{below}{name}/"] = path
                (later if is_link else todo).append(f"{below}{name}/")
    if links or len(set(real.values())) < len(real):
        found = each_once(found, links, real)
    return sorted(found)


def scan(path, below):
    """The pictures and the folders (and tars, but for those that lie there unpacked) in one folder or tar: two lists of (name, is it a link)."""
    files, folders = [], []
    if below and os.path.isfile(path):
        parts = ((name, name.split("/")) for name in shards.members(path))
        return [(name, False) for name, p in parts if is_picture(p[-1]) and not SYSTEM & {f.casefold() for f in p[:-1]}], []
    try:
        with os.scandir(path) as entries:
            for e in entries:
                if e.name.startswith("."):
                    continue
                if e.is_dir() or shards.is_tar(e.name) and e.is_file():
                    folders.append((e.name, e.is_symlink()))
                elif is_picture(e.name) and e.is_file():
                    files.append((e.name, e.is_symlink()))
                elif e.name in RESULTS and below:
                    return [], []
    except OSError as e:
        raise InputError(f"cannot read the folder {path}: {e.strerror}") from None
    names = {name for name, _ in folders}
    return files, sorted(f for f in folders if f[0].casefold() not in SYSTEM and not (shards.is_tar(f[0]) and f[0][:-4] in names))


def is_picture(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def each_once(found, links, real):
    """Of files that are the same on the disk, one: the name that says validation, else the real one."""
    chosen = {}
    for i, file in enumerate([*found, *links]):
        below = file
        while (below := below.rpartition("/")[0]) and f"{below}/" not in real:  # folders within a tar
            pass
        path = os.path.join(real[below and f"{below}/"], file[len(below and f"{below}/"):])
        path = os.path.realpath(path) if i >= len(found) else path
        if path not in chosen or HELD.get(role_of(file), 2) < HELD.get(role_of(chosen[path]), 2):
            chosen[path] = file
    return chosen.values()


class Files(Sequence):
    """The paths of a long list of names below a folder, made one by one as they are asked for.

    All names are one piece of memory: a million Paths would take 300 MB of this process, and as much of every one that reads pictures for it.
    """

    def __init__(self, folder, names):
        names = [os.fsencode(name) for name in names]
        self.folder, self.text = Path(folder), b"".join(names)
        self.ends = np.cumsum([0, *map(len, names)])  # name i is text[ends[i] : ends[i + 1]]

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.folder / os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]])


# --- splitting ---


DRAWN = "one in twenty, by its name"
NONE_HELD = "none: all are for training"


@dataclass
class Split:
    folder: Path
    train: list  # of paths from the folder on, with "/"
    val: list
    left_out: dict  # {why: those that are neither}
    how: str  # what told validation from training

    @property
    def marked(self):
        """Whether the validation pictures are the data set's own, not drawn from among those for training."""
        return bool(self.val) and self.how != DRAWN


def split_folder(folder, task):
    """The pictures of a folder, or of what shards.expand takes, as a Split, for a task (whose val_list and train_files count).

    Validation pictures are those that the task's list names, whatever their endings; else those in val/ and its like; else
    those in test/. Where nothing is marked, and the task has no list and the folder no train/, one in twenty.
    Raises InputError if there is no folder or no picture.
    """
    folder, tars = shards.expand(folder)
    groups = group_by_role(list_folder(folder, tars), role(folder.resolve().name, SETS))
    if set(groups) <= {"small"}:
        raise InputError(f"no pictures in {folder} " + (f"but {len(groups['small'])} {WHY['small']}: name the folder of the large ones" if groups
                                                        else f"(looked for {' '.join(sorted(EXTENSIONS))})"))
    everything = [f for r in (None, "train", "val", "test") for f in groups.get(r, ())]
    rest = [f for r in (None, "train") for f in groups.get(r, ())]
    listed, left_out = read_list(task.val_list), {WHY["small"]: groups.get("small", [])}
    if val := [f for f in everything if stem_of(f) in listed]:
        how, chosen = f"the {len(val)} that {task.val_list} names", set(val)
        left_out[WHY["listed"]] = [f for r in HELD for f in groups.get(r, ()) if f not in chosen]
    elif val := groups.get("val"):
        how, left_out[WHY["test"]] = "the validation folder", groups.get("test", [])
    elif val := groups.get("test"):
        how = "the test folder"
    elif listed or "train" in groups or task.train_files < 0:
        how, val = NONE_HELD, []
    else:
        how, val = DRAWN, draw(rest)
    if task.train_files < 0:
        rest, left_out = everything, {WHY["small"]: groups.get("small", [])}
    else:
        held = set(val)
        rest = sorted((f for f in rest if f not in held), key=stem_of if task.train_files else None)[: task.train_files or None]
    return Split(folder, sorted(rest), sorted(val), {why: files for why, files in left_out.items() if files}, how)


def group_by_role(files, own):
    """{role: files}; own: the role of the folder itself, of which "test" does not count: many a first try lies in test/."""
    large = {stem.casefold() for f in files if (stem := f.rpartition(".")[0]).casefold().endswith(("_hr", "-hr"))}
    groups = {}
    for file in files:
        small = SMALL_FILE.fullmatch(file.rpartition(".")[0]) if large else None
        if small and f"{small[1]}hr".casefold() in large or own == "small":
            r = "small"
        else:
            r = role_of(file) or (own if own != "test" else None)
        groups.setdefault(r, []).append(file)
    return groups


def read_list(name):
    """The stems in a list of names: a file in assets/ or anywhere, or "" or "none". Raises InputError if it is not there."""
    if not name or name == "none":
        return set()
    path = next((p for p in (ASSETS / name, Path(name)) if p.is_file()), None)
    if path is None:
        raise InputError(f"no list of names {name}, neither here nor in assets/")
    try:
        return {stem_of(line.strip()) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a list of names: it is no text in UTF-8") from None


def stem_of(file):
    return os.path.splitext(file.rpartition("/")[2])[0]


def draw(files):
    """One in twenty of the files, by the hash of its stem; the one of the smallest hash where that gives none."""
    numbers = {f: int.from_bytes(digest(stem_of(f))[:4], "big") for f in files}
    chosen = [f for f, n in numbers.items() if n < 2**32 // 20]
    return chosen or sorted(files, key=numbers.get)[: len(files) > 1]


# --- remembering ---


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def list_hash(split):
    """The SHA-256, its first 16 digits, of which pictures train and which validate, by their paths from the folder on."""
    lines = [f"{which} {f}\n" for which in ("train", "val") for f in getattr(split, which)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def name_key(file):
    return digest(stem_of(str(file).replace(os.sep, "/")).casefold())[:5]


def content_key(path):
    """Five bytes that tell a file from all others by its size and its first 64 KiB."""
    file, start, size = shards.place(path)
    with open(file, "rb") as f:
        f.seek(start)
        return hashlib.sha256(size.to_bytes(8, "big") + f.read(min(size, 65536))).digest()[:5]


def pack(keys):
    """Keys of five bytes as text: sorted, so that equal sets are equal text."""
    return base64.b64encode(b"".join(sorted(set(keys)))).decode()


def unpack(text):
    raw = base64.b64decode(text or "")
    return {raw[i : i + 5] for i in range(0, len(raw), 5)}


def remember(split):
    """What a checkpoint keeps of its lists, plain text and numbers: the counts, the hash, and of each picture five bytes of its name's hash.

    Of lists up to CONTENTS_UP_TO also five bytes for each training picture's contents, by which a renamed copy is known. For
    ImageNet's 1.28 million names that is 8.5 MB of text; a stranger has the name of one of them once in a million.
    """
    contents = [content_key(split.folder / f) for f in split.train] if len(split.train) <= CONTENTS_UP_TO else []
    return dict(train=len(split.train), val=len(split.val), how=split.how, sha256=list_hash(split),
                train_names=pack(map(name_key, split.train)), val_names=pack(map(name_key, split.val)), train_contents=pack(contents))


def check_memory(memory, path):
    """Raises InputError if that, in the file at path, is neither None nor what `remember` gives, with "before" a list of such."""
    def kept(m):
        return (isinstance(m, dict) and all(isinstance(m.get(k), kind) for k, kind in dict(train=int, val=int, how=str, sha256=str).items())
                and re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", m["sha256"])
                and all(isinstance(m.get(k), str) and re.fullmatch(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", m[k]) for k in ("train_names", "val_names", "train_contents")))
    if memory and not (kept(memory) and isinstance(memory.get("before", []), list) and all(map(kept, memory.get("before", [])))):
        raise InputError(f"{path} is broken: its list of the pictures that it was trained on is none")


def trained_on(paths, memory):
    """Of paths, those that a run with that memory was trained on, and those that only share a name with one: two lists.

    Where contents are remembered they decide; of a list too long for that, the name does.
    """
    seen, alike = set(), set()
    for m in [memory, *memory.get("before", ())] if memory else ():  # and what its teacher was trained on
        names, contents = unpack(m["train_names"]), unpack(m["train_contents"])
        same_name = {p for p in paths if name_key(p) in names}
        seen |= {p for p in paths if content_key(p) in contents} if contents else same_name
        alike |= same_name
    return [p for p in paths if p in seen], [p for p in paths if p in alike - seen]


def keep_split(split, memory):
    """The split that a run began with, in a folder that may have changed since: (Split, what has changed in one line, or "").

    What was held out stays held out and what was trained on stays in training, whatever the folders are called now; a new
    picture goes where split_folder puts it.
    """
    if not memory or memory["sha256"] == list_hash(split):
        return split, ""
    held, used = unpack(memory["val_names"]), unpack(memory["train_names"])
    keys = {f: name_key(f) for f in [*split.train, *split.val]}
    val = [f for f in split.val if keys[f] not in used - held] + [f for f in split.train if keys[f] in held - used]
    train = [f for f in split.train if keys[f] not in held - used] + [f for f in split.val if keys[f] in used - held]
    new, missing = sum(k not in held | used for k in keys.values()), len((held | used) - set(keys.values()))
    changed = f"{new} pictures are new, {missing} are missing" if new or missing else "some lie elsewhere"
    return replace(split, train=sorted(train), val=sorted(val)), f"{split.folder} is not as this run began with it: {changed}; each that was there keeps its part"


# --- what is there, and what should be ---


EXPECTED = {  # by the beginning of a task's name: pictures for training, for validation, and how they come
    "ffhq": (60_000, 100, "images1024x1024/ as unpacked or all in one folder: 00000.png to 69999.png, of which the first 60,000 train"),
    "div2k": (800, 100, "DIV2K_train_HR/0001.png to 0800.png and DIV2K_valid_HR/0801.png to 0900.png"),
    "imagenet": (1_281_167, 100, "train/ with 1,281,167 pictures in 1,000 folders and val/ with ILSVRC2012_val_00000001 to 00050000, as unpacked"),
}


def expected(split, task):
    """What a data set's usual layout has and this folder has not, in one line; "" where all is there or the task has no data set of its own."""
    family = next((name for name in EXPECTED if task.name.startswith(name)), None)
    if family is None or task.train_files < 0:
        return ""
    train, val, layout = EXPECTED[family]
    short = [f"{n:,} for {what} where {want:,} are expected" for n, want, what in ((len(split.train), train, "training"), (len(split.val), val, "validation")) if n != want]
    listed = read_list(task.val_list)
    missing = sorted(listed - {stem_of(f) for f in split.val}) if split.val else []
    if missing:
        short.append(f"no {missing[0]}" + (f" and {len(missing) - 1} more of {task.val_list}" if len(missing) > 1 else ""))
    return f"{', '.join(short)}: {layout}" if short else ""


def note(text):
    """One line to whoever started the program, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
