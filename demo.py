"""A page on this machine: a picture, a slider from faithful to realistic, and its result under one's hand.

    pip install -e '.[demo]' && python demo.py            # opens http://127.0.0.1:7860 in a browser
    python demo.py --port 8000 --no_browser

Nobody but this machine sees the page. Pictures are kept in memory, and what has to be a file (an upload, a download) in a
folder of its own that is gone when the program ends. demo.js is the part of it that runs in the browser.
"""
import argparse
import base64
import io
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in sample.py

import numpy as np
from PIL import Image

import sample
from console import InputError, Parser, in_range
from pictures import open_writer, read_picture, rgb8

ROOT = Path(__file__).parent
FLOW = ROOT / "weights" / "photos_x4_flow.safetensors"
EXAMPLES = [ROOT / "assets" / name for name in ("figures/cat_small.png", "astronaut.png", "coffee.png")]
NETWORKS = {"student: one step": (sample.WEIGHTS, {}), "flow: 8 steps of midpoint": (FLOW, dict(solver="midpoint", steps=8))}
MOST_PIXELS = 13_000_000  # of an input: a camera's 4000 x 3000
MOST_BYTES = 100_000_000
SHOWN = 16_000_000  # pixels of a result that a browser is given; a larger one is shown reduced


class Stopped(Exception):
    """A computation was cancelled, or makes way for one that somebody waits for."""


@dataclass
class Opened:
    """One picture in one tab, with one network and one seed."""
    path: Path
    picture: object  # pictures.Picture
    network: str
    seed: int
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    seen: dict = field(default_factory=dict)  # t: what the browser was given
    files: dict = field(default_factory=dict)  # t: the whole result, where the browser was given a smaller one
    share: float = 0.0  # of the computation that runs
    waiting: bool = False
    cancelled: bool = False


class Turns:
    """One computation at a time, as each takes all cores. What is only computed ahead makes way for what somebody waits for."""

    def __init__(self):
        self.lock, self.count, self.urgent, self.here = threading.Lock(), threading.Lock(), 0, threading.local()

    def wait(self, by):
        with self.count:
            self.urgent += by

    @contextmanager
    def turn(self, opened, ahead=False):
        """Inside, `check` raises Stopped when this computation should not go on. Raises Stopped if, ahead, it is not its turn."""
        if ahead:
            if self.urgent or not self.lock.acquire(blocking=False):
                raise Stopped
        else:
            opened.share, opened.waiting, opened.cancelled = 0.0, True, False
            self.wait(1)
            self.lock.acquire()
            self.wait(-1)
            opened.waiting = False
        self.here.stop = lambda: self.urgent > 0 if ahead else opened.cancelled
        try:
            self.check()
            yield
        finally:
            self.here.stop = None
            self.lock.release()

    def check(self, *_):
        stop = getattr(self.here, "stop", None)
        if stop and stop():
            raise Stopped


TURNS = Turns()


@functools.lru_cache(maxsize=None)
def load(network):
    """(UNet, Task, arguments of sample.enlarge) of a row of NETWORKS. Between its blocks the network looks whether it should go on."""
    from model import pick_device, pick_dtype
    path, how = NETWORKS[network]
    net, _, task = sample.load(path)
    for block in [*net.input_blocks, net.middle_block, *net.output_blocks]:
        block.register_forward_pre_hook(TURNS.check)
    return net, task, dict(how, dtype=pick_dtype("auto", pick_device("auto")))


def restored(opened, t):
    """The picture at t, a number or a map, from the top down: yields rows (n, width, C)."""
    net, task, how = load(opened.network)

    def progress(share):
        opened.share += share
    for rows, _ in sample.enlarge(net, task, opened.picture, t, opened.seed, progress=progress, **how):
        yield rows


def size_of(opened):
    """Height and width of the results, and into how many of their pixels (a side) one of the screen's is drawn."""
    height, width = (side * load(opened.network)[1].scale for side in opened.picture.pixels.shape[:2])
    return height, width, math.ceil(math.sqrt(height * width / SHOWN))


def note(opened, **more):
    """The settings, as sample.py writes them into a PNG."""
    path, how = NETWORKS[opened.network]
    dtype = str(load(opened.network)[2]["dtype"]).removeprefix("torch.")
    return dict(seed=opened.seed, weights=path.name, dtype=dtype, tile="auto", **how, input=opened.path.name, **more)


def data_url(pixels):
    """uint8 (H, W, 3) for a browser: PNG, or JPEG where that would be many bytes."""
    data, large = io.BytesIO(), pixels.shape[0] * pixels.shape[1] > 4_000_000
    Image.fromarray(pixels).save(data, **(dict(format="JPEG", quality=96, subsampling=0) if large else dict(format="PNG", compress_level=1)))
    return f"data:image/{'jpeg' if large else 'png'};base64,{base64.b64encode(data.getvalue()).decode()}"


def reduced(rows, factor):
    """Means of factor x factor pixels of rows (n factor, W, C): (n, W // factor, C), of their dtype."""
    n, width = len(rows) // factor, rows.shape[1] // factor
    rows = rows[: n * factor, : width * factor].reshape(n, factor, width, factor, -1)
    return np.rint(rows.mean((1, 3), dtype=np.float32)).astype(rows.dtype)


# --- what the page asks for ---


def picture(opened, t, ahead=False):
    """The whole picture at t for the browser, computed once. Raises Stopped."""
    if t not in opened.seen:
        with TURNS.turn(opened, ahead):
            height, width, factor = size_of(opened)
            shown, kept, file = [], None, opened.folder / f"{t}.png" if factor > 1 else None
            with writer(opened, file, note(opened, t=t)) if file else nullcontext() as out:
                for rows in restored(opened, t):
                    if file:
                        out.write(rows)
                        kept = rows if kept is None else np.concatenate([kept, rows])
                        whole = len(kept) // factor * factor
                        rows, kept = reduced(kept[:whole], factor), kept[whole:]
                    shown.append(rgb8(rows))
            if file:
                opened.files[t] = file
            opened.seen[t] = data_url(np.concatenate(shown))
    return opened.seen[t]


def writer(opened, path, settings):
    height, width, _ = size_of(opened)
    pixels = opened.picture.pixels
    return open_writer(path, height, width, pixels.shape[2], pixels.dtype, opened.picture, note=settings)


def save(opened, t, regions=None):
    """The path of the result as a PNG with its settings inside. regions: the map of t as a PNG's data URL. Raises Stopped."""
    if regions is None and t in opened.files:
        return opened.files[t]
    path = opened.folder / "regions.png" if regions else opened.folder / f"{t}.png"
    t_map = read_map(io.BytesIO(base64.b64decode(regions.partition(",")[2]))) if regions else None
    with TURNS.turn(opened), writer(opened, path, note(opened, t=t, **(dict(t_map=regions) if regions else {}))) as out:
        for rows in restored(opened, t if t_map is None else t_map):
            out.write(rows)
    return path
