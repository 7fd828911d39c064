"""A page on this machine: a picture, a slider from faithful to realistic, and its result under one's hand.

    pip install -e '.[demo]' && python demo.py            # opens http://127.0.0.1:7860 in a browser
    python demo.py --port 8000 --no_browser
    python demo.py --ckpt out/photos_distill/weights.safetensors    # with a network of yours

Nobody but this machine sees the page. Pictures are kept in memory, and what has to be a file (an upload, a download) in a
folder of its own that is gone when the program ends. demo.js is the part of it that runs in the browser.
"""
import atexit
import base64
import functools
import importlib.util
import io
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in sample.py

import numpy as np
from PIL import Image

import sample
from colour import rgb8
from console import InputError, Parser, in_range
from pictures import EXTENSIONS, open_writer, read_picture

ROOT = Path(__file__).parent
FLOW = ROOT / "weights" / "photos_x4_flow.safetensors"
EXAMPLES = [ROOT / "assets" / name for name in ("astronaut.png", "cat.png", "coffee.png")]
STUDENT = "student: one step"
NETWORKS = {STUDENT: (sample.WEIGHTS, {}), "flow: 8 steps of midpoint": (FLOW, dict(solver="midpoint", steps=8))}
MOST_PIXELS = 13_000_000  # of an input: a camera's 4000 x 3000
MOST_BYTES = 100_000_000
KEPT = 300_000_000  # bytes of seen results of one picture, in memory
SHOWN = 16_000_000  # pixels of a result that a browser is given; a larger one is shown reduced


PAGES = {}  # id: Opened


class Stopped(Exception):
    """A computation was cancelled, or makes way for one that somebody waits for."""


@dataclass
class Opened:
    """One picture in one tab, with one network and one seed."""
    name: str
    picture: object  # pictures.Picture
    network: str
    denoise: float  # the second dial, of the student
    seed: int
    folder: Path  # for what becomes a file
    tab: str  # gradio's name of the browser's tab
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    seen: dict = field(default_factory=dict)  # t: what the browser was given
    files: dict = field(default_factory=dict)  # t: the whole result, where the browser was given a smaller one
    share: float = 0.0  # of the computation that runs
    waiting: bool = False
    asked: int = 0  # how many t were asked for
    cancelled: bool = False
    closed: bool = False


class Turns:
    """One computation at a time, as each takes all cores. What is only computed ahead makes way for what somebody waits for."""

    def __init__(self):
        self.lock, self.count, self.urgent, self.here = threading.Lock(), threading.Lock(), 0, threading.local()

    def wait(self, by):
        with self.count:
            self.urgent += by

    @contextmanager
    def turn(self, opened, stop=lambda: False, ahead=False):
        """Raises Stopped, here or from `check` inside, if it is cancelled, if `stop()`, or if it is ahead and somebody waits."""
        if ahead:
            if self.urgent or not self.lock.acquire(blocking=False):
                raise Stopped
        else:
            opened.waiting, opened.cancelled = True, False
            self.wait(1)
            self.lock.acquire()
            self.wait(-1)
            opened.waiting = False
        opened.share = 0.0
        self.here.stop = lambda: opened.closed or stop() or (self.urgent > 0 if ahead else opened.cancelled)
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


@functools.lru_cache(maxsize=8)
def load(network, denoise=0.0):
    """(UNet, Task, arguments of sample.enlarge) of a row of NETWORKS, of the student for a place of the second dial. Between its layers the network looks whether it should go on."""
    from machine import pick_device, pick_dtype
    path, how = NETWORKS[network]
    net, _, task = sample.shipped(denoise) if network == STUDENT else sample.load(path)
    for layer in net.modules():
        layer.register_forward_pre_hook(TURNS.check)
    return net, task, dict(how, dtype=pick_dtype("auto", pick_device("auto")))


def add_networks(paths):
    """Put checkpoints of one's own, students and flows of any family, before the rows of NETWORKS. Raises InputError."""
    rows = {}
    for path in map(Path, paths):
        _, stage, task = sample.load(path)
        if not stage or not task:
            raise InputError(f"{path} does not say whether it is a student or a flow, or of which task: python model.py convert with --stage and --dataset makes a file that does")
        solver = sample.choose(stage, task, None, None, None)[1]
        rows[str(path)] = path, dict(solver=solver, steps=sample.STEPS) if solver else {}
    shipped = dict(NETWORKS)
    NETWORKS.clear()
    NETWORKS.update({**rows, **shipped})


def restored(opened, t, t_map=None):
    """The picture at t, or at each pixel's own, from the top down: yields rows (n, width, C)."""
    net, task, how = load(opened.network, opened.denoise)

    def progress(share):
        opened.share += share
    for rows, _ in sample.enlarge(net, task, opened.picture, t, opened.seed, progress=progress, t_map=t_map, **how):
        yield rows


def size_of(opened):
    """Height and width of the results, and into how many of their pixels (a side) one of the screen's is drawn."""
    height, width = (side * load(opened.network)[1].scale for side in opened.picture.pixels.shape[:2])
    return height, width, math.ceil(math.sqrt(height * width / SHOWN))


def note(opened, **more):
    """The settings, as sample.py writes them into a PNG."""
    path, how = NETWORKS[opened.network]
    dtype = str(load(opened.network)[2]["dtype"]).removeprefix("torch.")
    weights = sample.weights_note(opened.denoise) if opened.network == STUDENT else dict(weights=path.name)
    return dict(seed=opened.seed, **weights, dtype=dtype, tile="auto", **how, input=opened.name, **more)


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
    """The whole picture at t for the browser, computed once. Raises Stopped, also when another t is asked for meanwhile."""
    opened.asked += not ahead
    mine = opened.asked
    if t in opened.seen:
        return opened.seen[t]
    with TURNS.turn(opened, lambda: not ahead and opened.asked != mine, ahead):
        if t not in opened.seen:
            opened.seen[t] = data_url(small(opened, t) if size_of(opened)[2] > 1 else np.concatenate([rgb8(rows) for rows in restored(opened, t)]))
        shown = opened.seen[t]
        while len(opened.seen) > 1 and sum(map(len, opened.seen.values())) > KEPT:
            del opened.seen[next(iter(opened.seen))]  # the oldest
    return shown


def small(opened, t):
    """A picture too large for a browser, reduced: uint8 (h, w, 3). The whole goes into a file, for the download."""
    factor, path, shown, kept = size_of(opened)[2], file_for(opened, t), [], None
    with writer(opened, path, note(opened, t=t)) as out:
        for rows in restored(opened, t):
            out.write(rows)
            kept = rows if kept is None else np.concatenate([kept, rows])
            whole = len(kept) // factor * factor
            shown.append(rgb8(reduced(kept[:whole], factor)))
            kept = kept[whole:]
    for old in opened.files.values():  # hundreds of megabytes each: the last one is kept
        old.unlink(missing_ok=True)
    opened.files = {t: path}
    return np.concatenate(shown)


def file_for(opened, what):
    """Where a result becomes a file, under the name that the browser saves it by."""
    return opened.folder / str(what) / f"{Path(opened.name).stem}_x{load(opened.network)[1].scale}.png"


def writer(opened, path, settings):
    height, width, _ = size_of(opened)
    pixels = opened.picture.pixels
    return open_writer(path, height, width, pixels.shape[2], pixels.dtype, opened.picture, note=settings)


def save(opened, t, regions=None):
    """The path of the result as a PNG with its settings inside. regions: the map of t, a PNG as a data URL. Raises Stopped."""
    if regions is None and t in opened.files:
        return opened.files[t]
    t_map, more = None, {}
    if regions:
        from dial import read_map
        with Image.open(io.BytesIO(base64.b64decode(regions.partition(",")[2]))) as im:
            t_map, more = read_map(im), dict(t_map=regions)
    path = file_for(opened, "regions" if regions else t)
    with TURNS.turn(opened), writer(opened, path, note(opened, t=t, **more)) as out:
        for rows in restored(opened, t, t_map):
            out.write(rows)
    return path


# --- what the browser calls: each takes and returns what JSON can say ---


def answering(call):
    """A call of the browser's about an opened picture; what goes wrong becomes a message."""
    def answer(asked):
        opened = PAGES.get(asked["id"])
        if opened is None:
            return dict(message="this picture is closed: open it again")
        try:
            return call(opened, asked)
        except Stopped:
            return dict(message="cancelled" if opened.cancelled else "", later=not opened.cancelled)
        except (InputError, MemoryError, OSError, RuntimeError) as e:
            from machine import out_of_memory
            if isinstance(e, RuntimeError) and not out_of_memory(e):
                raise
            return dict(message="not enough memory for this picture" if out_of_memory(e) else str(e))
    answer.__name__ = call.__name__  # no functools.wraps: gradio would count the arguments of what is wrapped
    return answer


@answering
def show(opened, asked):
    return dict(url=picture(opened, checked(asked["t"]), bool(asked["ahead"])))


@answering
def download(opened, asked):
    path = save(opened, checked(asked["t"]), asked["regions"])
    return dict(url=f"/gradio_api/file={quote(str(path))}", name=path.name)


@answering
def progress(opened, asked):
    return dict(share=min(1.0, opened.share), waiting=opened.waiting)


@answering
def cancel(opened, asked):
    opened.cancelled = True
    return {}


def checked(t):
    if not 0 <= t <= 1:
        raise InputError(f"t goes from 0 to 1, not {t}")
    return float(t)


def open_picture(path, network, seed, tab, folder, denoise=None):
    """Open a file in a tab, in place of what it had open: its id, sizes and the picture itself, for the browser. Raises InputError.

    denoise: where the second dial stands; None: where the picture asks for it.
    """
    if path is None:
        return None
    name = Path(path).name
    if network not in NETWORKS or seed is None or seed != int(seed) or not 0 <= seed < 2**53:
        raise InputError("the seed is a whole number from 0 on")
    try:
        picture = read_picture(path, MOST_PIXELS)
    except InputError as e:
        raise InputError(str(e).replace(str(path), name).replace("if you trust it, raise --max_pixels (max_pixels in Python)", "sample.py takes larger ones")) from None
    denoise = 0.0 if network != STUDENT else sample.pick_denoise(picture, denoise=denoise)[0]
    load(network, denoise)  # what is wrong with the weights is said now
    close(tab)
    opened = Opened(name, picture, network, denoise, int(seed), folder / "results" / secrets.token_urlsafe(16), tab)
    PAGES[opened.id] = opened
    height, width, factor = size_of(opened)
    return dict(id=opened.id, name=name, width=width, height=height, shown=factor, denoise=denoise, before=data_url(rgb8(picture.pixels)))


def close(tab):
    """Forget what a tab had opened, and remove its files."""
    for opened in [o for o in PAGES.values() if o.tab == tab]:
        opened.closed = True
        del PAGES[opened.id]
        shutil.rmtree(opened.folder, ignore_errors=True)


# --- the page ---


def build(folder):
    """The page (gradio.Blocks). folder: what it may write into."""
    import gradio as gr

    def dropped(event: gr.EventData):
        path = Path(event.path).resolve()
        return str(path) if path.is_relative_to(folder.resolve()) else None  # the browser names it: only what it has sent

    def opening(path, network, seed, denoise, request: gr.Request):
        try:
            return open_picture(path, network, seed, request.session_hash, folder, denoise)
        except InputError as e:
            raise gr.Error(str(e), title="This picture is not opened", duration=20, print_exception=False) from None

    def asking(path, network, seed, request: gr.Request):  # a new picture says itself where the second dial should stand
        told = opening(path, network, seed, None, request)
        return told, told["denoise"] if told else 0.0

    def closing(request: gr.Request):
        close(request.session_hash)

    with gr.Blocks(title="OFTSR", analytics_enabled=False, fill_width=True) as page:
        path = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                gr.Markdown("## OFTSR\nA picture 4 times larger, and a dial: **faithful** invents nothing, **realistic** draws what may have been there.")
                upload = gr.UploadButton("Choose a picture", variant="primary", file_types=sorted(EXTENSIONS), elem_id="upload")
                with gr.Row():
                    examples = [(gr.Button(p.stem, icon=str(p), size="sm", min_width=70), p) for p in EXAMPLES]
                network = gr.Radio(list(NETWORKS), value=next(iter(NETWORKS)), label="Network", elem_id="network")
                denoise = gr.Slider(0, 1, 0, step=0.25, label="Blur, noise and compression taken away", visible=sample.REAL.is_file(), elem_id="denoise")
                seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, elem_id="seed")
            with gr.Column(scale=4, min_width=500):
                viewer = gr.HTML(html_template=(ROOT / "demo.html").read_text(), js_on_load=(ROOT / "demo.js").read_text(), elem_id="viewer",
                                 server_functions=[show, download, progress, cancel])
        upload.upload(lambda file: file, upload, path)
        for button, example in examples:
            button.click(lambda example=str(example): example, None, path)
        viewer.dropped(dropped, None, path)
        path.change(asking, [path, network, seed], [viewer, denoise], show_progress="hidden")
        gr.on([network.change, seed.submit, seed.blur, denoise.release], opening, [path, network, seed, denoise], viewer, show_progress="hidden")
        page.load(lambda: str(EXAMPLES[0]), None, path)
        page.unload(closing)
    return page


def check_port(port):
    """Raises InputError if another program listens there, or this one may not."""
    with socket.socket() as s:
        if sys.platform != "win32":  # where it would take a port from others; elsewhere it allows one that was closed a moment ago
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as e:
            raise InputError(f"--port {port}: {e.strerror or e}; without --port the first free one from 7860 on is taken") from None


def main(argv=None):
    p = Parser(description=__doc__, usage="%(prog)s [flags]")
    p.add_argument("--port", type=in_range(int, 0, 65535), help="of the page (default: the first free one from 7860 on)")
    p.add_argument("--ckpt", nargs="+", default=[], metavar="FILE", help="students and flows of yours, of any family, to choose beside the shipped ones")
    p.add_argument("--no_browser", action="store_true", help="open no browser: the page's address is printed")
    args = p.parse_args(argv)
    if args.port:
        check_port(args.port)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install -e '.[demo]'")
    folder = Path(tempfile.mkdtemp(prefix="oftsr-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes then, too
    os.environ.update(GRADIO_TEMP_DIR=str(folder / "gradio"), GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
    (folder / "results").mkdir()
    import gradio as gr
    add_networks(args.ckpt)
    for name in NETWORKS:
        load(name)
    page = build(folder)
    page.launch(server_name="127.0.0.1", server_port=args.port, inbrowser=not args.no_browser, share=False, quiet=True, max_file_size=MOST_BYTES,
                allowed_paths=[str(folder / "results")], footer_links=[], ssr_mode=False, prevent_thread_lock=True,
                theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]))
    print(f"{page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"demo.py: {e}")
