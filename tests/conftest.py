import faulthandler
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # the flat modules: an install, even an editable one, has the package alone

# Tests run beside other work: threads that wait without spinning are many times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a shell starts in the background ignores Ctrl-C, and so do its children: here they get it back, as tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure():
    """An exit that hangs after the tests is a failure, which says where, and not a run without end."""
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Releases of a tiny student and a tiny flow."""
    from data import TASKS
    from model import save_release
    from test_model import tiny
    folder, task = tmp_path_factory.mktemp("weights"), asdict(TASKS["photos"])
    for stage in ("distill", "flow"):
        save_release(folder / f"{stage}.safetensors", tiny(one_step=stage == "distill"), dict(stage=stage, step=1, task=task))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures a.png, b.jpg and below/c.png, in a folder that is also the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "below").mkdir(parents=True)
    for name, (h, w) in (("a.png", (12, 17)), ("b.jpg", (9, 9)), ("below/c.png", (20, 8))):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / "in" / name)
    return tmp_path


@pytest.fixture
def cli(weights):
    """sample.py's main, with the tiny student (stage="flow": the tiny flow)."""
    import sample
    return lambda *args, stage="distill": sample.main(["--ckpt", str(weights / f"{stage}.safetensors"), "--device", "cpu", *map(str, args)])
