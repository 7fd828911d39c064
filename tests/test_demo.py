"""demo.py: who computes when, what it answers, and the page itself in a browser without a window."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import demo
import sample
from console import InputError
from model import save_release
from test_model import tiny

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def picture_file(path, height=20, width=24, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC).save(path)
    return path


@pytest.fixture
def opened(tmp_path):
    """A function that opens a small picture in a tab: its demo.Opened."""
    (tmp_path / "results").mkdir()

    def opening(tab="tab", seed=0):
        told = demo.open_picture(str(picture_file(tmp_path / "in.png")), next(iter(demo.NETWORKS)), seed, tab, tmp_path)
        return demo.PAGES[told["id"]]
    yield opening
    for tab in ("tab", "other"):
        demo.close(tab)


def where(told):
    return Path(unquote(told["url"].removeprefix("/gradio_api/file=")))


# --- one computation at a time ---


def test_ahead_makes_way_and_a_newer_t_replaces_an_older(opened):
    one, turns = opened(), demo.Turns()
    with turns.turn(one, ahead=True):
        turns.check()
        with pytest.raises(demo.Stopped), turns.turn(one, ahead=True):  # it does not wait
            pass
        waiting = threading.Thread(target=lambda: turns.turn(one).__enter__())
        waiting.start()
        while not turns.urgent:
            pass
        with pytest.raises(demo.Stopped):
            turns.check()
    waiting.join(10)
    assert not waiting.is_alive() and not one.waiting and not turns.urgent
    turns.check()  # here nothing runs any more


def test_cancelled_superseded_closed(opened):
    one = opened()
    for stop in (lambda: setattr(one, "cancelled", True), lambda: setattr(one, "asked", one.asked + 1), lambda: demo.close("tab")):
        calls = []
        original, sample.enlarge = sample.enlarge, lambda *a, **k: (stop(), calls.append(1), original(*a, **k))[2]
        try:
            with pytest.raises(demo.Stopped):
                demo.picture(one, 0.5)
        finally:
            sample.enlarge = original
        assert calls and one.seen == {}
    assert demo.PAGES == {}


def test_what_was_seen_is_kept_and_has_a_limit(opened, monkeypatch):
    one = opened()
    first = demo.picture(one, 0.5)
    monkeypatch.setattr(sample, "enlarge", None)
    assert demo.picture(one, 0.5) == first  # computed no more
    monkeypatch.undo()
    monkeypatch.setattr(demo, "KEPT", len(first) + 100)
    for t in (0.6, 0.7):
        assert demo.picture(one, t) == one.seen[t]
    assert list(one.seen) == [0.7]


def test_two_tabs_do_not_mix(opened):
    one, two = opened(), opened("other", seed=1)
    assert demo.picture(one, 0.5) != demo.picture(two, 0.5)
    demo.close("tab")
    assert demo.show(dict(id=one.id, t=0.5, ahead=False)) == dict(message="this picture is closed: open it again")
    assert demo.show(dict(id=two.id, t=0.5, ahead=False)) == dict(url=two.seen[0.5])


# --- what it answers ---


def test_a_download_is_what_sample_py_gives(opened, tmp_path, monkeypatch):
    one = opened(seed=3)
    told = demo.download(dict(id=one.id, t=0.25, regions=None))
    assert told["name"] == "in_x4.png"
    path = where(told)
    array = np.asarray(Image.open(tmp_path / "in.png"))
    assert np.array_equal(np.asarray(Image.open(path)), sample.upscale(array, t=0.25, seed=3))
    note = json.loads(Image.open(path).text["oftsr"])
    assert (note["t"], note["seed"], note["weights"], note["input"]) == (0.25, 3, "photos_x4.safetensors", "in.png")
    t_map = np.zeros((20, 24), np.uint8)
    t_map[:, 12:] = 204
    regions = demo.data_url(t_map)
    path = where(demo.download(dict(id=one.id, t=0.0, regions=regions)))
    assert np.array_equal(np.asarray(Image.open(path)), sample.upscale(array, t_map=t_map, seed=3))
    assert json.loads(Image.open(path).text["oftsr"])["t_map"] == regions
    monkeypatch.setattr(demo, "SHOWN", 2000)  # too large for the browser: it is given a smaller one
    assert demo.size_of(one) == (80, 96, 2)
    small = demo.small(one, 0.25)
    assert small.shape == (40, 48, 3) and np.array_equal(np.asarray(Image.open(demo.save(one, 0.25))), sample.upscale(array, t=0.25, seed=3))
    kept = one.files[0.25]
    demo.small(one, 0.5)
    assert list(one.files) == [0.5] and not kept.exists()


@pytest.mark.parametrize("make, says", [
    (lambda path: path.write_bytes(b"\x89PNG but no more"), "in.png cannot be read as a picture"),
    (lambda path: path.write_bytes(b""), "the file is empty"),
    (lambda path: Image.new("1", (4000, 3300)).save(path), "more than 13 million"),
])
def test_a_bad_picture_is_a_message(make, says, tmp_path):
    make(tmp_path / "in.png")
    with pytest.raises(InputError, match=says) as e:
        demo.open_picture(str(tmp_path / "in.png"), next(iter(demo.NETWORKS)), 0, "tab", tmp_path)
    assert str(tmp_path) not in str(e.value) and demo.PAGES == {}


def test_mistakes_are_one_line():
    done = subprocess.run([sys.executable, str(ROOT / "demo.py"), "--port", "high"], capture_output=True, text=True)
    assert done.returncode == 2 and "is not a whole number" in done.stderr and done.stderr.count("\n") == 1


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match="the page needs gradio"):
        demo.main([])


# --- in a browser ---


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder for temporary files) of a running demo.py; ended as a user's system would end it."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    temporary = tmp_path_factory.mktemp("temporary")
    process = subprocess.Popen([sys.executable, str(ROOT / "demo.py"), "--no_browser", "--port", str(port)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "TMPDIR": str(temporary)})
    try:
        assert f"http://127.0.0.1:{port}/" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}/", temporary
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert list(temporary.iterdir()) == []  # nothing is kept


@pytest.fixture(scope="module")
def browser(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"])
        yield browser
        browser.close()


def wait_for(page, text):
    page.wait_for_function("text => document.querySelector('#viewer .state')?.textContent.includes(text)", arg=text, timeout=120_000)


def test_the_page(server, browser, tmp_path):
    address, temporary = server
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    wait_for(page, "1024 x 1024 · t = 0.50")  # an example is open
    page.set_input_files("input[type=file]", picture_file(tmp_path / "in.png"))
    wait_for(page, "96 x 80 · t = 0.50")
    middle = page.evaluate("document.querySelector('#viewer canvas').toDataURL()")
    page.focus("#viewer .dial")
    page.keyboard.press("End")
    wait_for(page, "96 x 80 · t = 1.00")
    assert page.evaluate("document.querySelector('#viewer canvas').toDataURL()") != middle

    # A second tab has a picture of its own, and a broken one is a message there.
    other = browser.new_page()
    other.goto(address)
    wait_for(other, "1024 x 1024")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but no more")
    other.set_input_files("input[type=file]", tmp_path / "broken.png")
    other.get_by_text("broken.png cannot be read as a picture").wait_for(timeout=60_000)
    other.set_input_files("input[type=file]", picture_file(tmp_path / "second.png", 16, 16))
    wait_for(other, "64 x 64 · t = 0.50")

    with page.expect_download(timeout=60_000) as download:
        page.click("#viewer .save")
    download.value.save_as(tmp_path / "out.png")
    assert download.value.suggested_filename == "in_x4.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), sample.upscale(np.asarray(Image.open(tmp_path / "in.png")), t=1))
    assert json.loads(Image.open(tmp_path / "out.png").text["oftsr"])["t"] == 1

    # A region of its own, painted over the whole right half.
    page.click("#viewer .paint")
    page.evaluate("Object.assign(document.querySelector('#viewer .region'), { value: 0 })")
    box = page.locator("#viewer canvas").bounding_box()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.up()
    wait_for(page, "regions")
    with page.expect_download(timeout=60_000) as download:
        page.click("#viewer .save")
    download.value.save_as(tmp_path / "regions.png")
    changed = (np.asarray(Image.open(tmp_path / "regions.png")) != np.asarray(Image.open(tmp_path / "out.png"))).any(2)
    assert 0 < changed.mean() < 0.5 and not changed[:, :48].any()

    assert not [url for url in asked if not re.match(re.escape(address) + "|data:|blob:", url)]  # nothing from elsewhere


def test_networks_of_ones_own(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NETWORKS", dict(demo.NETWORKS))
    shipped, files = list(demo.NETWORKS), [str(weights / f"{name}.safetensors") for name in ("distill", "flow")]
    demo.add_networks(files)
    assert list(demo.NETWORKS) == [*files, *shipped] and [demo.NETWORKS[f][1] for f in files] == [{}, dict(solver="midpoint", steps=8)]
    save_release(tmp_path / "silent.safetensors", tiny(), dict(stage=None, step=1, task=None))
    for wrong, words in (("none.pt", "no checkpoint at none.pt"), (tmp_path / "silent.safetensors", "does not say whether it is a student or a flow")):
        with pytest.raises(InputError, match=words):
            demo.add_networks([wrong])
    assert list(demo.NETWORKS) == [*files, *shipped]


def test_a_port_in_use_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *args: pytest.fail("work"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: .*the first free one"):
            demo.main(["--no_browser", "--port", str(port)])
    demo.check_port(port)  # free again
