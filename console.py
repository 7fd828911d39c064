"""What every program here shares with whoever runs it: errors in one line, arguments in range, files that are whole or not there.

No torch, so that a wrong flag is answered at once.
"""
import argparse
import os
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
