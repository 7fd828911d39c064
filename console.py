"""What every program here shares with whoever runs it: errors in one line, arguments in range, files that are whole or not there.

No torch, so that a wrong flag is answered at once.
"""
import argparse
import os
import sys
import time
from pathlib import Path


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


def atomic_write(path, write):
    """write(temporary path), then rename: whoever reads `path`, at whatever moment, finds a whole file, old or new.

    Raises InputError where the system refuses: no permission, a full disk, a file where a folder should be.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")  # always the same name: what a killed process left is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch.save's, when the disk is full
        raise InputError(f"cannot write {path}: {e.strerror if isinstance(e, OSError) and e.strerror else str(e).splitlines()[0]}") from e
    finally:
        if tmp.parent.is_dir():
            tmp.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line with a hint, and which takes no beginning of a flag for the flag."""

    def __init__(self, **options):
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
            self.bar = tqdm(total=total, unit=unit, position=rank, leave=False, dynamic_ncols=True, smoothing=0.05,
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
