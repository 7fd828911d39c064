import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager
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
# By this the processes that tests start are known.
RUN = os.environ["OFTSR_TEST_RUN"] = uuid.uuid4().hex
STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[STATUS] = int(exitstatus)


def pytest_unconfigure(config):
    """What the tests started and left running is named and killed: it would hold the terminal's pipe open. An exit that hangs is shown where it stands, and ended."""
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"OFTSR_TEST_RUN={RUN}".encode() in environ.read_bytes().split(b"\0"):
                print("left running by a test:", environ.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"), file=sys.__stderr__)
                os.kill(int(environ.parent.name), signal.SIGKILL)
        except OSError:  # another user's, or gone
            pass

    def end():
        time.sleep(60)
        faulthandler.dump_traceback(sys.__stderr__)
        os._exit(config.stash.get(STATUS, 1))
    threading.Thread(target=end, daemon=True).start()


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
def user():
    """(a folder, a context within which this process may do no more than the folder's owner, who is not root): for root nothing is shut."""
    if not hasattr(os, "seteuid"):
        pytest.skip("no such users here")
    root = os.geteuid() == 0

    @contextmanager
    def rights():
        try:
            if root:
                os.seteuid(65534)
            yield
        finally:
            if root:
                os.seteuid(0)

    with tempfile.TemporaryDirectory() as folder:
        if root:
            os.chown(folder, 65534, 65534)
        yield Path(folder), rights


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
