"""What every program here shares with whoever runs it: errors in one line, arguments in range, files that are whole or not there.

No torch, so that a wrong flag is answered at once.
"""
import argparse
import functools
import itertools
import json
import os
import platform
import re
import struct
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

VERSION = "0.1.0"
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}  # devices on Windows, whatever the ending
_count = itertools.count()


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line that says what, and what would be right."""


def in_range(kind, low, high=None):
    """An argparse type: a number of that kind in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        if not value >= low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text} is out of range: {f'{low} to {high}' if high is not None else f'at least {low}'}")
        return value
    return parse


def absent(args, path):
    """Whether a dry run does without that file or folder, which is not there (path may be None)."""
    return getattr(args, "dry_run", False) and not (path and Path(path).exists())


def speak_anywhere():
    """Have the console show what it cannot write, a name in another alphabet say, as \\u escapes instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def read_lines(path):
    """The lines of a .jsonl file, a dict each; one that is being written, was cut short or has a flipped bit is left out."""
    def parse(line):
        try:
            return json.loads(line.decode())
        except (ValueError, RecursionError):
            return None
    return [entry for line in Path(path).read_bytes().splitlines() if isinstance(entry := parse(line), dict)]


@functools.lru_cache(maxsize=None)
def check_folder(folder):
    """Raises InputError if nothing can be written in a folder, or in the one above it that is there."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise InputError(f"cannot write to {folder}: {e.strerror}") from None


def check_file(path):
    """Raises InputError if no file can be written at `path`: it is a folder, or in its folder nothing can be. For before the work whose result it is to hold."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder: name a file to write")
    check_folder(Path(path).parent)


@contextmanager
def atomic_path(path):
    """A temporary path beside `path`: renamed to it when the block ends well, removed when it does not.

    Whoever reads `path`, at whatever moment, finds a whole file, old or new; of two programs that write it the last to
    finish wins. Raises InputError where the system refuses: no permission, a full disk, a file where a folder should be.
    """
    path = Path(path)
    if sys.platform == "win32" and path.name.split(".")[0].strip().upper() in RESERVED:
        raise InputError(f"cannot write {path}: on Windows {path.name} names a device")
    # The program's number keeps two programs apart, and tells later ones whether this one still lives. A name has at most 255 bytes.
    tmp = path.with_name(f".{path.name[:40]}.oftsr-{platform.node()[:40]}-{os.getpid()}-{next(_count)}.tmp")
    try:
        with refusals(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_litter(path.parent.resolve())
        yield tmp
        with refusals(path):
            with open(tmp, "rb+") as f:  # Windows syncs only what is open for writing
                os.fsync(f.fileno())
            os.replace(tmp, path)
    finally:
        if tmp.parent.is_dir():
            tmp.unlink(missing_ok=True)


@contextmanager
def refusals(path):
    """What the system or an encoder says against writing `path`, as an InputError in one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SystemError, struct.error) as e:
        first = e
        while not isinstance(first, OSError) and first.__context__:  # when the disk is full torch.save says that first, and last that it stands where it should not
            first = first.__context__
        why = first.strerror if isinstance(first, OSError) and first.strerror else (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"cannot write {path}: {why}") from e


def atomic_write(path, write):
    """write(temporary path), then rename it to `path`: see atomic_path."""
    with atomic_path(path) as tmp, refusals(path):
        write(tmp)


@functools.lru_cache(maxsize=None)  # once a folder: a folder may be long
def _remove_litter(folder):
    """Remove what killed programs left in a folder: this machine's that run no more, and any that nobody wrote to for a day."""
    for entry in os.scandir(folder):
        if name := re.fullmatch(r"\..*\.oftsr-(.*)-(\d+)-\d+\.tmp", entry.name):
            try:
                dead = name[1] == platform.node()[:40] and not _runs(int(name[2]))
                if dead or time.time() - entry.stat().st_mtime > 86400:
                    os.unlink(entry.path)
            except OSError:  # another program was first, or it is not ours to remove
                pass


def _runs(pid):
    """Whether a program of that number runs, as far as can be told: on Windows to ask would be to end it."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line with a hint, and which takes no beginning of a flag for the flag."""

    def __init__(self, **options):
        speak_anywhere()  # every program here begins with one of these
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Progress:
    """How far a batch has come: one bar with the time left; where stderr is no terminal, a line every `every` seconds.

    total: the work, in `unit`s; rank: of this process among those that share the batch, None if it is alone.
    """

    def __init__(self, total, unit, rank=None, every=10):
        self.total, self.done, self.text, self.rank, self.every = total, 0.0, "", rank, every
        self.begin = self.said = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm
            try:
                unknown = os.get_terminal_size(sys.stderr.fileno()).columns == 0  # a terminal that does not say how wide it is
            except (AttributeError, OSError):
                unknown = True
            self.bar = tqdm(total=total, unit=f" {unit}", position=rank, leave=False, smoothing=0.05, dynamic_ncols=not unknown, **(dict(ncols=80, nrows=24) if unknown else {}),
                            bar_format="{desc} |{bar}| {percentage:.0f} %, {remaining} left, {rate_noinv_fmt}")

    def start(self, text):
        """Say in the bar what is being worked on now."""
        self.text = text
        if self.bar is not None:
            self.bar.set_description_str(self._marked(text))

    def add(self, amount):
        self.to(self.done + amount)

    def to(self, done):
        """So much is done: more than before, or less where something has to be done again."""
        self.done = done
        now = time.monotonic()
        if self.bar is not None:
            self.bar.n = done
            self.bar.refresh()
        elif now - self.said >= self.every and 0 < done < self.total:
            self.said = now
            left = (now - self.begin) * (self.total / done - 1)
            self.say(f"{self.text}, {100 * done / self.total:.0f} % of all, {duration(left)} left", sys.stderr)

    def say(self, line, file=None):
        """A line for the user, on stdout unless told; the bar stays below it."""
        if self.bar is not None:
            self.bar.write(self._marked(line), file=file or sys.stdout)
        else:
            print(self._marked(line), file=file or sys.stdout, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def _marked(self, line):
        return line if self.rank is None else f"[{self.rank}] {line}"


def duration(seconds):
    """As people say it: 40 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
