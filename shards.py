"""Tar files of pictures (webdataset's shards) as if they were folders: shards/000.tar/cat.jpg is the member cat.jpg of shards/000.tar.

    folder, tars = expand("shards/{000..099}.tar")   # what --data_dir may name beside a folder
    members("shards/000.tar")                        # ["cat.jpg", ...]
    source("shards/000.tar/cat.jpg")                 # its bytes; of a path in no tar the path itself

A tar's headers are read once, for the place and size of every member; then any picture is one seek and one read away, so that
the order of training stays a function of the seed and a picture's number, and a run goes on to the bit. The package
webdataset streams instead: its order follows from the number of readers and from what its shuffling buffers hold.
No torch.
"""
import functools
import hashlib
import os
import re
import tarfile
import time
from pathlib import Path

import numpy as np

from console import InputError, atomic_path

CACHED_FROM = 1000  # members of a tar whose index is kept on the disk too: less is read as fast from the headers
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}  # how compressed files begin


def expand(name):
    """(folder, None) of a folder, and (the folder they lie in, the tars below it) of a tar or of several: "DIR/{train,val}-{000..099}.tar".

    Raises InputError if one of the tars is not there; a folder that is not there is left to the caller.
    """
    name = os.fspath(name)
    if os.path.isdir(name) or not name.casefold().endswith(".tar"):
        return Path(name), None
    tars = {}
    for tar in braces(name):
        if not os.path.isfile(tar):
            raise InputError(f"no file {tar}" + (f", which {name} names" if tar != name else ""))
        tars[tar] = True
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(tar)) for tar in tars])
    relative = [os.path.relpath(tar, folder).replace(os.sep, "/") for tar in tars]
    return Path(folder if os.path.isabs(name) else os.path.relpath(folder)), relative


def braces(text):
    """What a shell makes of {000..099} and {a,b}, one by one."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not found:
        yield text
        return
    first, last, words = found.groups()
    width = max(len(n) for n in (first, last)) if words is None and any(n.startswith("0") for n in (first, last)) else 0
    for word in words.split(",") if words is not None else (f"{i:0{width}}" for i in range(int(first), int(last) + 1)):
        yield from braces(text[: found.start()] + word + text[found.end():])


def is_tar(name):
    return name.casefold().endswith(".tar")


def outer(name):
    """The tar in which a name "shards/000.tar/cat.jpg" lies by its looks, None of any other."""
    found = re.search(r"\.tar(?=/)", name, re.IGNORECASE)
    return name[: found.end()] if found else None


def members(tar):
    """The files in a tar, and in tars within it, by their paths from the tar on, sorted; hidden ones left out. Raises InputError if it is broken."""
    return [os.fsdecode(name) for name in index(tar)[0].tolist()]


def source(path):
    """The bytes of a tar's member; of any other path the path itself. Raises as `place`."""
    file, start, size = place(path)
    if file == path:
        return path
    with open(file, "rb") as f:
        f.seek(start)
        return f.read(size)


def place(path):
    """Where a path's bytes lie: (the tar, their beginning, how many) of a member, else (the path, 0, how many). Raises FileNotFoundError if there is none, InputError if the tar is broken."""
    tar, name = divide(path)
    if tar is None:
        return path, 0, os.path.getsize(path)
    names, places = index(tar)
    at = np.searchsorted(names, name)
    if at == len(names) or names[at] != name:
        raise FileNotFoundError(f"no {path}")
    return tar, *places[at].tolist()


def divide(path):
    """(the tar on the disk, the member's name as bytes) of a path that leads into one, (None, None) of any other."""
    text = os.fspath(path).replace(os.sep, "/")
    for found in re.finditer(r"\.tar(?=/)", text, re.IGNORECASE):
        if os.path.isfile(tar := text[: found.end()]):
            return tar, os.fsencode(text[found.end() + 1:])
    return None, None


def index(tar):
    """The members of a tar: their names, sorted, (N,) bytes, and the place and size of each in it, (N, 2) int64. Of a tar that has changed they are read anew."""
    try:
        stat = os.stat(tar)
        return _index(os.path.realpath(tar), stat.st_size, stat.st_mtime_ns)
    except OSError as e:
        raise InputError(f"cannot read the tar {tar}: {e.strerror or e}") from None


@functools.lru_cache(maxsize=None)
def _index(tar, size, changed):
    """index, of a tar of that size, changed at that time in ns: from the cache on the disk, or from the headers."""
    stamp, cached = np.array([size, changed]), cache_file(tar)
    try:
        with np.load(cached, allow_pickle=False) as kept:
            names, places = kept["names"], kept["places"]
            if np.array_equal(kept["stamp"], stamp) and names.dtype.kind == "S" and places.shape == (len(names), 2):
                return names, places
    except Exception:  # there is none, or it is broken: NumPy raises what zipfile and its own parser raise  # noqa: S110
        pass
    found = {}
    with open(tar, "rb") as f:
        for name, start, length in walk(f, tar):
            found[os.fsencode(name)] = start, length  # of two of one name the later is meant, as when tar unpacks
    names = sorted(found)
    places = np.array([found[name] for name in names], dtype=np.int64).reshape(-1, 2)
    names = np.array(names, dtype=bytes)
    if len(names) >= CACHED_FROM and cached and time.time_ns() - changed > 2e9:  # what is younger may change once more at the same time
        try:
            with atomic_path(cached) as tmp, open(tmp, "wb") as f:
                np.savez(f, names=names, places=places, stamp=stamp)
        except (InputError, OSError):  # a full disk, a home that cannot be written: the headers serve
            pass
    return names, places


def cache_file(tar):
    """Where the index of a tar is kept: below XDG_CACHE_HOME or ~/.cache. None where there is no home."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "oftsr" / "shards" / f"{hashlib.sha256(os.fsencode(tar)).hexdigest()[:32]}.npz"


def walk(file, tar, start=0):
    """(name, place, size) of every regular file in an open tar, whose own place is `start`; tars in it are folders. Raises InputError if it is broken."""
    last, inside = "", None
    try:
        inside = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, closed with its file; "r:": as it is, in a compressed one nothing can be sought
        while member := inside.next():
            inside.members.clear()  # a million of them would take a gigabyte
            last, parts = member.name, [p for p in member.name.split("/") if p not in ("", ".")]
            if not member.isreg() or member.issparse() or any(p.startswith(".") for p in parts):
                continue
            name, place = "/".join(parts), start + member.offset_data
            if is_tar(name):
                yield from ((f"{name}/{n}", *rest) for n, *rest in walk(inside.extractfile(member), f"{tar}/{name}", place))
            else:
                yield name, place, member.size
        file.seek(inside.offset)  # tarfile takes what it does not understand for the end
        if file.read(512) != bytes(512):
            raise tarfile.ReadError("its end is missing")
    except (InputError, OSError):
        raise
    except Exception as e:  # what a broken header leads tarfile to: its own errors, OverflowError, MemoryError, RecursionError
        file.seek(0)
        head = file.read(6)
        packed = next((kind for magic, kind in PACKED.items() if head.startswith(magic)), None)
        if packed:
            raise InputError(f"the tar {tar} is compressed with {packed}, so that nothing in it can be sought: unpack it, pictures are compressed themselves") from None
        raise InputError(f"the tar {tar} is broken or cut short{f' after {last}' if last else ''} ({str(e).splitlines()[0] if str(e) else type(e).__name__}): fetch or make it again") from None
