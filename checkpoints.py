"""Files of tensors that can be trusted: whole or not there, checked when read, and never code.

    save_checkpoint, load_checkpoint    .pt, a training's state: a zip file, whose CRCs find flipped bits
    save_tensors, load_tensors          .safetensors, weights to share, with a SHA-256 of their own

Nothing here knows what the tensors mean. Whatever a file holds, reading it costs no more memory than the file is long, runs
nothing out of it (weights_only=True), and ends in its contents or in one line that names the file.
"""
import hashlib
import itertools
import json
import os
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from console import InputError, atomic_path, atomic_write
from machine import out_of_memory


def save_checkpoint(path, checkpoint):
    """A dict of tensors and plain types to a file. Atomic; the file that was there is kept as NAME_before.pt."""
    path = Path(path)

    def write(tmp):
        with open(tmp, "wb") as f:  # given the name alone, torch does not say why it cannot write
            torch.save(checkpoint, f)
        if path.exists():
            copy_file(path, one_before(path))

    atomic_write(path, write)


def one_before(path):
    """Where save_checkpoint keeps the file that it replaces."""
    return path.with_name(f"{path.stem}_before{path.suffix}")


def copy_file(path, to):
    """The same file under another name, which what is written to `path` later does not change: a link, where the file system has them."""
    with atomic_path(to) as tmp:
        try:
            os.link(path, tmp)
        except OSError:
            shutil.copyfile(path, tmp)


def load_checkpoint(path):
    """What save_checkpoint wrote, or torch.save of another program, on the CPU. Raises InputError if there is no such file, it cannot be read, is broken, or is no dict."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    try:
        check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle of another kind than torch.save's
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from e
    except Exception as e:  # the unpickler raises whatever the bytes lead it to
        why = (str(e) if isinstance(e, (zipfile.BadZipFile, OSError)) else "it would run code" if "GLOBAL" in str(e)
               else "there is not enough memory for what it holds, or says it holds" if out_of_memory(e) else "torch.save writes no such bytes")
        raise InputError(f"{path} is broken or not a checkpoint ({why})") from e
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} is not a checkpoint (it holds a {type(checkpoint).__name__})")
    check_parts(checkpoint, path)
    return checkpoint


def check_parts(held, path):
    """Raises InputError if what a pickle holds is more than its file: tensors that say they are larger than their numbers, or have none; lists of the same list over and over."""
    sizes, most = {}, path.stat().st_size + 10**6

    def size(part, depth):
        if torch.is_tensor(part):
            if part.layout != torch.strided or part.device.type != "cpu" or part.numel() * part.element_size() > part.untyped_storage().nbytes():
                raise InputError(f"{path} is broken: it holds a tensor {tuple(part.shape)} whose numbers are not in it, one by one")
        elif isinstance(part, (dict, list, tuple, set, frozenset)):
            if id(part) not in sizes:
                if depth > 50:  # or without end, in a circle
                    raise InputError(f"{path} is broken: its parts lie more than 50 deep in one another")
                inner = itertools.chain(part, part.values()) if isinstance(part, dict) else part
                sizes[id(part)] = 1 + sum(size(p, depth + 1) for p in inner)
                if sizes[id(part)] > most:
                    raise InputError(f"{path} is broken: it holds more than its bytes can say")
            return sizes[id(part)]
        return 1

    size(held, 0)


def open_checkpoint(out_dir):
    """A training's newest checkpoint that is whole, ckpt.pt or the one before it, and whether it is that: (dict, bool). Raises InputError if there is none."""
    path = Path(out_dir) / "ckpt.pt"
    try:
        return load_checkpoint(path), False
    except InputError as e:
        if not one_before(path).is_file() or isinstance(e.__cause__, PermissionError):  # somebody else's file is not broken
            raise
        checkpoint = load_checkpoint(one_before(path))
        if os.environ.get("RANK", "0") == "0":
            print(f"{e}: going on from the one before it, {one_before(path).name}", file=sys.stderr)
        return checkpoint, True


def check_zip(path):
    """Raises BadZipFile if a zip file's contents are not what its CRCs say, or would be larger than the file. No zip file (torch.save before 1.6): nothing."""
    with open(path, "rb") as f:
        if f.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as z:
        if any(i.compress_type != zipfile.ZIP_STORED for i in z.infolist()) or sum(i.file_size for i in z.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("its records are compressed, which torch.save's are not")
        for info in z.infolist():
            with z.open(info) as record:  # reads all of it, and raises if its CRC is another
                while record.read(1 << 22):
                    pass


def save_tensors(path, tensors, meta):
    """{name: tensor} with a dict of plain types as .safetensors, and the checksum of both. Atomic."""
    from safetensors.torch import save
    text = json.dumps(meta)
    header = {"oftsr": text, "sha256": checksum(save(tensors), text)}
    atomic_write(path, lambda tmp: tmp.write_bytes(save(tensors, metadata=header)))  # save_file's only their owner may read


def load_tensors(path):
    """The dict (None if the file has none) and the tensors, {name: tensor}, of a .safetensors file. Raises InputError if there is none, it cannot be read, or is broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load
    if not Path(path).is_file():
        raise InputError(f"no weights at {path}")
    try:
        with open(path, "rb") as f:
            if int.from_bytes(f.read(8), "little") > 10**8:  # safetensors' own bound, before so much is read
                raise InputError(f"{path} is broken or not a .safetensors file (its header would be too large)")
            f.seek(0)
            raw = f.read()
    except PermissionError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from e
    except MemoryError as e:
        raise InputError(f"{path} does not fit in memory: it is {Path(path).stat().st_size / 1e9:.0f} GB") from e
    try:
        tensors = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__") or {}
        meta = json.loads(header.get("oftsr", "null"))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{path} is broken or not a .safetensors file ({str(e).splitlines()[0] if str(e) else type(e).__name__})") from e
    if "oftsr" in header and header.keys() - {"oftsr", "sha256"} or "sha256" in header and header["sha256"] != checksum(raw, header.get("oftsr", "")):
        raise InputError(f"{path} is broken: its bytes are not those that were written (SHA-256)")
    if not isinstance(meta, (dict, type(None))):
        raise InputError(f"{path} is not one of ours: what it says of itself is a {type(meta).__name__}")
    return meta, tensors


def checksum(raw, text):
    """SHA-256 of a .safetensors file's tensors (raw: its bytes), of what its header says of them, and of the text beside them."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = {k: v for k, v in json.loads(raw[8:start]).items() if k != "__metadata__"}
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + text.encode() + raw[start:]).hexdigest()


def file_sha256(path):
    """The beginning of a file's SHA-256, 12 digits; None if there is no such file."""
    if not Path(path or "").is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:12]
