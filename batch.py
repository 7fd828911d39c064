"""Which pictures are meant, where their results go, and what must not be harmed: everything that is known before any work.

    found, skipped = find_inputs(["photos/", "cat.png"], recursive=True)
    jobs, skipped, told = plan(found, ts, scale, args)

What is wrong with one picture concerns that picture alone: it is skipped, or its result renamed, and the reason said.
No torch.
"""
import glob
import hashlib
import itertools
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from console import InputError, check_folder
from pictures import EXTENSIONS, check_fits, picture_format, probe, read_note, scan

STRIP = "strip"  # beside the ts: the input and all results side by side
AUTO = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".avif"}  # endings that --ext auto keeps; else .png


@dataclass
class Job:
    path: Path
    height: int  # of the picture, upright
    width: int
    size: tuple  # of its results: height, width
    outs: dict = field(default_factory=dict)  # t, or STRIP: the file to write; none where all are there already


# --- the pictures ---


def find_inputs(names, recursive):
    """([(path, its place below the folder that named it)] in the order given, each once; [why something is skipped]).

    Raises InputError if there is nothing at all.
    """
    found, skipped, seen = [], [], set()
    for name in names:
        path = Path(name)
        try:
            path.is_dir()
        except PermissionError as e:  # the folder that it lies in is shut
            skipped.append(f"{path}: {e.strerror}")
            continue
        if path.is_dir():
            inside, problems = scan(path, recursive)
            skipped += [f"{p}: {why}" for p, why in problems]
            if not inside:
                skipped.append(f"no pictures in {path}{'' if recursive else ' itself (-r looks into its folders too)'}")
            new = [(p, p.relative_to(path)) for p in inside]
        elif path.is_file():
            new = [(path, Path(path.name))]
        else:
            new = [(Path(m), Path(Path(m).name)) for m in sorted(glob.glob(name, recursive=True)) if Path(m).is_file()]
            if not new:
                skipped.append(f"no file, folder or pattern {name}")
        for p, place in new:
            if (real := p.resolve()) not in seen:
                seen.add(real)
                found.append((p, place))
    if not found:
        raise InputError("; ".join(skipped[:3]) + (f" (and {len(skipped) - 3} more)" if len(skipped) > 3 else ""))
    return found, skipped


# --- whose result a file is ---


def origin(path):
    """What a result's note says of its input: its name, where it lay and what was in it (the latter two as hashes)."""
    return dict(input=path.name, place=_digest(os.fsencode(path.resolve())), content=_digest(path.read_bytes()))


def made_from(note, path):
    """Whether the note of a result (a dict, or None) says that it was made from that picture: same name, and same place or same content."""
    if not note or note.get("input") != path.name or not path.is_file():
        return False
    return note.get("place") == _digest(os.fsencode(path.resolve())) or note.get("content") == _digest(path.read_bytes())


def _digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def own_results(found, bases):
    """Those of the pictures that were made from others of them: {path: the picture it was made from}.

    Their notes say so, or, where there is none (some formats, --no_metadata), their names: those of what is to be made.
    bases: {picture: its result, before t is in the name}.
    """
    by_name, by_result = {}, {_key(base.with_suffix("")): path for path, base in bases.items()}
    for path, _ in found:
        by_name.setdefault(path.name, []).append(path)
    own = {}
    for path, _ in found:
        note = read_note(path)
        if note and "input" in note:
            source = next((p for p in by_name.get(note["input"], []) if p != path and made_from(note, p)), None)
        else:
            source = by_result.get(_key(path.with_name(re.sub(r"_(t[\d.]+|strip)$", "", path.stem))))
        if source not in (None, path):
            own[path] = source
    return own


# --- the results ---


def result_size(height, width, scale, args):
    """Height and width of the result: --outscale, else --width and --height (one alone: the other follows; both: it fits into them), else the network's."""
    factor = args.outscale or scale
    if args.width or args.height:
        factor = min(wanted / have for wanted, have in ((args.width, width), (args.height, height)) if wanted)
    return max(1, round(height * factor)), max(1, round(width * factor))


def plan(found, ts, scale, args):
    """What is to be done: ([Job], [why a picture is skipped], [what else to tell]).

    args: output, suffix, ext, strip, skip_existing, overwrite, outscale, width, height, max_pixels. Raises InputError for what concerns all pictures.
    """
    skipped, told, jobs = [], [], []
    to_file = is_file_name(args.output)
    bases = {path: Path(args.output) if to_file else Path(args.output) / result_name(place, args) for path, place in found}
    own = own_results(found, bases)
    if own:
        a, b = next(iter(own.items()))
        told.append(f"left out: {len(own)} of the pictures are results of others, as {a} of {b}")
    bases = {path: base for path, base in bases.items() if path not in own}
    if to_file and len(bases) > 1:
        raise InputError(f"{len(bases)} pictures do not fit in one file: -o {args.output} should name a folder")
    check_folder(Path(args.output).parent if to_file else Path(args.output))
    files = {path: names(base, ts, args.strip) for path, base in bases.items()} if to_file else name_results(bases, ts, args.strip, told)
    for path in bases:
        try:
            head = probe(path, args.max_pixels)
            size = result_size(head.height, head.width, scale, args)
            jobs.append(Job(path, head.height, head.width, size, to_write(path, dict(zip([*ts, STRIP], files[path])), size, args)))
        except InputError as e:
            skipped.append(str(e))
    return jobs, skipped, told


def is_file_name(output):
    """Whether -o names one file. Raises InputError if it names one of a kind that cannot be written."""
    path = Path(output)
    if path.is_dir() or path.suffix.lower() not in EXTENSIONS:
        return False
    if picture_format(path) is None:
        raise InputError(f"{path.suffix} cannot be written: use .png, .jpg, .webp or .tif")
    return True


def result_name(place, args):
    ending = place.suffix.lower() if args.ext == "auto" else f".{args.ext}"
    return place.with_name(place.stem + args.suffix + (ending if args.ext != "auto" or ending in AUTO else ".png"))


def names(base, ts, strip):
    """The files of one picture: one for each t, then that of the strip."""
    outs = [base.with_name(f"{base.stem}_t{t:g}{base.suffix}") for t in ts] if len(ts) > 1 else [base]
    return outs + [base.with_name(f"{base.stem}_strip.png")] * strip


def name_results(bases, ts, strip, told):
    """{picture: its files}, no two of them the same and none an input: a picture whose result would meet another gets more of its own name into it."""
    taken, files = {_key(path): path for path in bases}, {}
    for path in sorted(bases, key=lambda p: bases[p].suffix != p.suffix.lower()):  # first those that keep their ending
        base = bases[path]
        more = [path.suffix[1:].lower()] * (base.suffix != path.suffix.lower()) + [path.absolute().parent.name]
        for word in itertools.chain([""], filter(None, more), map(str, itertools.count(2))):
            files[path] = names(base.with_name(f"{base.stem}_{word}{base.suffix}") if word else base, ts, strip)
            meets = [taken[_key(out)] for out in files[path] if _key(out) in taken]
            if not meets or meets[0] is path:  # to_write refuses the latter
                break
            met = meets[0]
        if word:
            told.append(f"{path} becomes {files[path][0].name}, as {base.name} is taken by {met}")
        taken.update({_key(out): path for out in files[path]})
    return files


def to_write(path, outs, size, args):
    """What of {t or STRIP: file} is to be written. Raises InputError if one cannot or must not be.

    What is there already may be overwritten only if it was made from `path`, and is left alone with --skip_existing.
    """
    todo = {}
    for t, out in outs.items():
        check_fits(out, size[0], size[1] * (len(outs) if t == STRIP else 1))
        check_folder(out.parent)
        if _key(out) == _key(path):
            raise InputError(f"{path}: its result would overwrite it: choose another -o or --suffix")
        if not out.exists():
            todo[t] = out
            continue
        note = read_note(out)
        known = note is not None and "input" in note
        if not (args.overwrite or made_from(note, path) or args.skip_existing and not known):
            whose = f"was made from another {note['input']}" if known else f"does not say that it was made from {path.name}"
            raise InputError(f"{path}: {out} is there already and {whose}: choose another -o or --suffix, or --overwrite")
        if not args.skip_existing:
            todo[t] = out
    return todo


def _key(path):
    """A file's identity: two names of one file have the same."""
    real = str(path.resolve())
    return real.casefold() if sys.platform in ("win32", "darwin") else real
