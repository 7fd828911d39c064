"""Batches: what is wrong with one picture concerns it alone, nothing is overwritten that should not be, and a second run goes on."""
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import batch
import console
import sample
from pictures import read_note

ROOT = Path(__file__).parent.parent


def save(path, seed=0, size=(9, 11)):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def tree(path="."):
    return sorted(p.relative_to(path).as_posix() for p in Path(path).rglob("*") if p.is_file())


def test_a_missing_name_stops_no_other(folder, cli, capsys):
    assert cli("in/a.png", "gone.png", "in/nothing*.jpg", "in/b.jpg", "-o", "out") == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("skipped")] == ["skipped: no file, folder or pattern gone.png", "skipped: no file, folder or pattern in/nothing*.jpg"]
    assert said[-1].endswith("2 done, 2 skipped") and tree("out") == ["a_x4.png", "b_x4.jpg"]


def test_equal_names_get_names_of_their_own(folder, cli, capsys):
    """a.png beside a.jpg keep their endings; a.bmp beside a.png, day1/x beside day2/x are renamed, and it is said."""
    for seed, name in enumerate(("day1/x.png", "day2/x.png", "day1/a.png", "day1/a.jpg", "day1/a.bmp")):
        save(name, seed)
    assert cli("day1", "day2", "-o", "out") == 0
    assert tree("out") == ["a_x4.jpg", "a_x4.png", "a_x4_bmp.png", "x_x4.png", "x_x4_day2.png"]
    said = capsys.readouterr().err
    assert "day2/x.png becomes" in said and "taken by day1/x.png" in said
    before = {p: p.read_bytes() for p in Path("out").iterdir()}
    assert cli("day1", "day2", "-o", "out") == 0  # the same names again, each from its own picture
    assert {p: p.read_bytes() for p in Path("out").iterdir()} == before


def test_one_picture_named_twice_is_done_once(folder, cli, capsys):
    assert cli("in/a.png", "in/below/../a.png", "in", "-o", "out") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("2 done, 0 skipped") and tree("out") == ["a_x4.png", "b_x4.jpg"]


@pytest.mark.parametrize("ext", ["auto", "webp", "tif"])
def test_a_second_run_does_not_enlarge_its_own_results(ext, folder, cli, capsys):
    """`-r .` twice: the outputs lie below the input folder. Once more they are made, from the same pictures."""
    (folder / "in" / "below" / "c.png").rename(folder / "c.png")
    assert cli("-r", ".", "--ext", ext) == 0
    first = tree()
    assert len(first) == 6
    assert cli("-r", ".", "--ext", ext) == 0 and tree() == first
    assert "left out: 3 of the pictures are results of others, as restored/" in capsys.readouterr().err
    assert cli("-r", ".", "--ext", ext, "--skip_existing") == 0 and tree() == first
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 done, 0 skipped, 3 there already")
    assert cli("restored", "-o", "again") == 0  # a folder of results alone may be enlarged again
    assert len(tree("again")) == 1


@pytest.mark.parametrize("flags", [["--no_metadata"], ["--no_metadata", "--t", "0,1", "--strip"]])
def test_results_without_a_note_are_known_by_their_names(flags, folder, cli, capsys):
    """They are not enlarged again, and as nothing says what they were made from, not overwritten unasked."""
    assert cli("in", "-o", "in", *flags) == 0
    first = {p: p.read_bytes() for p in Path("in").glob("*.*")}
    assert cli("in", "-o", "in", *flags) == 1 and "does not say that it was made from a.png" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("in").glob("*.*")} == first
    assert cli("in", "-o", "in", *flags, "--skip_existing") == 0 and cli("in", "-o", "in", *flags, "--overwrite") == 0
    assert {p: p.read_bytes() for p in Path("in").glob("*.*")} == first


def test_results_beside_their_pictures(folder, cli):
    assert cli("in", "-o", "in") == 0 and cli("in", "-o", "in") == 0
    assert tree("in") == ["a.png", "a_x4.png", "b.jpg", "b_x4.jpg", "below/c.png"]
    assert cli("in/a_x4.png", "-o", "in") == 0 and "in/a_x4_x4.png" in tree()  # named alone it is meant
    assert cli("in", "-o", "in") == 0 and len(tree("in")) == 6


def test_skipping_looks_before_it_decodes(folder, cli, capsys, monkeypatch):
    assert cli("in", "-o", "out") == 0
    stamps = {p: p.stat().st_mtime_ns for p in Path("out").iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(sample, "read_picture", lambda *args: pytest.fail("decoded"))
    assert cli("in", "-o", "out", "--skip_existing") == 0
    assert "0 done, 0 skipped, 2 there already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Path("out").iterdir()} == stamps


def test_a_sweep_goes_on_where_it_was_stopped(folder, cli):
    cli("--t", "0,0.5,1", "in/a.png", "-o", "out")
    kept = Path("out/a_x4_t0.png").stat().st_mtime_ns
    Path("out/a_x4_t1.png").unlink()
    cli("--t", "0,0.5,1", "in/a.png", "-o", "out", "--skip_existing", "--strip")
    assert tree("out") == ["a_x4_strip.png", "a_x4_t0.5.png", "a_x4_t0.png", "a_x4_t1.png"] and Path("out/a_x4_t0.png").stat().st_mtime_ns == kept


def test_only_what_was_made_from_the_same_picture_is_overwritten(folder, cli, capsys):
    save("day1/x.png", 1)
    save("day2/x.png", 2)
    save("out/y_x4.png", 3)
    save("day1/y.png", 4)
    assert cli("day1/x.png", "-o", "out") == 0
    mine, others = Path("out/x_x4.png").read_bytes(), Path("out/y_x4.png").read_bytes()
    for flags in ([], ["--skip_existing"]):
        capsys.readouterr()
        assert cli("day2/x.png", "-o", "out", *flags) == 1
        assert "out/x_x4.png is there already and was made from another x.png" in capsys.readouterr().err
    assert cli("day1", "-o", "out") == 1
    assert "out/y_x4.png is there already and does not say that it was made from y.png" in capsys.readouterr().err
    assert Path("out/x_x4.png").read_bytes() == mine and Path("out/y_x4.png").read_bytes() == others
    save("day1/x.png", 5)  # edited: the same picture by its place
    assert cli("day1/x.png", "-o", "out") == 0 and Path("out/x_x4.png").read_bytes() != mine
    Path("day1").rename("day3")  # moved: the same by what is in it
    assert cli("day3/x.png", "-o", "out") == 0
    assert cli("day2/x.png", "day3/y.png", "-o", "out", "--overwrite") == 0 and read_note("out/x_x4.png")["input"] == "x.png"
    assert Path("out/y_x4.png").read_bytes() != others


def test_a_picture_in_a_shut_folder_is_skipped_alone(user):
    folder, rights = user
    save(folder / "shut" / "a.png")
    save(folder / "b.png")
    (folder / "shut").chmod(0)
    with rights():
        found, skipped = batch.find_inputs([str(folder / "shut" / "a.png"), str(folder / "shut"), str(folder / "b.png")], False)
    assert [p.name for p, _ in found] == ["b.png"] and skipped[0] == f"{folder / 'shut' / 'a.png'}: Permission denied" and f"{folder / 'shut'}: Permission denied" in skipped


def test_what_is_wrong_is_said_before_any_work(folder, cli, capsys, monkeypatch):
    monkeypatch.setattr(sample, "read_picture", lambda *args, **how: pytest.fail("work"))
    save("wide.png", size=(2, 4100))
    assert cli("wide.png", "-o", "out", "--ext", "webp") == 1 and "at most 16383" in capsys.readouterr().err
    assert cli("in/a.png", "--max_pixels", "100") == 1 and "raise --max_pixels" in capsys.readouterr().err
    Path("in/broken.png").write_bytes(b"\x89PNG but no more")
    assert cli("in/broken.png") == 1 and "in/broken.png cannot be read" in capsys.readouterr().err
    if os.path.isdir("/proc/self"):
        with pytest.raises(console.InputError, match="cannot write to /proc/"):
            cli("in/a.png", "-o", "/proc/results")
    monkeypatch.setattr(console.tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    console.check_folder.cache_clear()
    with pytest.raises(console.InputError, match="cannot write to locked: Permission denied"):
        cli("in/a.png", "-o", "locked")
    console.check_folder.cache_clear()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder here that nobody can write in")
@pytest.mark.parametrize("script, flags", [
    ("evaluate", ["--plot", "/proc/p.png"]), ("evaluate", ["--figure", "/proc/p.png"]), ("evaluate", ["--json", "/proc/p.json"]),
    ("curves", ["path", "--plot", "/proc/p.png"]), ("curves", ["diversity", "--seeds", "2", "--json", "/proc/p.json"]), ("curves", ["path", "--plot", "p.jpeg"]),
    ("sample", ["--export", "/proc/m.onnx", "--model", "clean"]), ("sample", ["--export", "in", "--model", "clean"]), ("runs", ["in", "--plot", "/proc/p.png"]),
    ("model", ["convert", "in/a.pt", "/proc/m.safetensors"])])
def test_where_a_result_cannot_be_written_is_said_before_any_work(script, flags, folder, monkeypatch):
    """The table took an hour, and its plot had no place."""
    module = importlib.import_module(script)
    for work in ("load_networks", "load_pictures", "prepare", "read_runs", "load_model"):
        if (script, work) != ("curves", "load_networks"):  # whose stages the check needs
            monkeypatch.setattr(module, work, lambda *args, **how: pytest.fail("work"), raising=False)
    if script == "curves":
        monkeypatch.setattr(module, "load_networks", lambda *args, **how: [SimpleNamespace(stage="flow", task=None)])
        monkeypatch.setattr(module, "check_together", lambda networks: None)
    with pytest.raises(console.InputError, match="cannot write to /proc|in is a folder|a plot is a .png"):
        (module.convert if script == "model" else module.main)(flags)


@pytest.mark.parametrize("flags, size", [(["--width", 34], (34, 24)), (["--height", 30], (42, 30)), (["--width", 34, "--height", 20], (28, 20)),
                                         (["-s", 2.5], (42, 30)), (["--width", 999], (999, 705))])
def test_sizes(flags, size, folder, cli):
    assert cli("in/a.png", "-o", "out.png", *flags) == 0
    assert Image.open("out.png").size == size


def test_suffixes_say_the_size(folder, cli):
    cli("in/a.png", "--width", 30)
    cli("in/a.png", "-s", 1.5)
    cli("in/a.png", "--suffix", "_big")
    assert tree("restored") == ["a_big.png", "a_w30.png", "a_x1.5.png"]


def test_no_metadata_leaves_no_note(folder, cli):
    cli("in", "-o", "out", "--no_metadata")
    assert read_note("out/a_x4.png") is None and read_note("out/b_x4.jpg") is None
    cli("in", "-o", "noted")
    assert read_note("noted/b_x4.jpg")["input"] == "b.jpg" and read_note("noted/a_x4.png")["t"] == 0.5


@pytest.mark.parametrize("text", ['{"input": ["a.png"]}', "[" * 100_000, '{"input": {}}', "\xff"])
def test_a_note_that_is_not_ours_is_none(text, folder, cli):
    """What any program may write into a picture under our key."""
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    info.add_text("oftsr", text)
    Image.open("in/a.png").save("in/z.png", pnginfo=info)
    assert read_note("in/z.png") is None and cli("in", "-o", "out") == 0


def test_the_command_line_needs_no_pytorch():
    """--help, --version and usage errors are answered before anything heavy is loaded."""
    code = "import sys, sample\ntry: sample.main(sys.argv[1:])\nexcept SystemExit as e: print('code', e.code)\nprint('torch' in sys.modules, 'tqdm' in sys.modules)"
    for args, expected in ((["--help"], "code 0"), (["--version"], "code 0"), (["--til", "3"], "code 2"), (["x.png", "--t", "2"], "code 2"), ([], "code 2")):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT)
        assert expected in done.stdout and done.stdout.splitlines()[-1] == "False False", (args, done.stdout, done.stderr)
        assert len(done.stderr.splitlines()) <= 1 and (expected == "code 0" or "(see " in done.stderr)


def test_interrupted_it_leaves_whole_files_and_says_how_to_go_on(folder, weights):
    """Ctrl-C in the middle of a batch: exit code 130, one line, no half file; with --skip_existing the rest is done."""
    for i in range(6):
        save(f"many/{i}.png", i, (40, 40))
    code = ("import sys, time, sample, tiles\nrestore = tiles.restore_tile\n"
            "def slow(*args, **how):\n    time.sleep(0.3)\n    return restore(*args, **how)\n"
            "tiles.restore_tile = slow\nsys.exit(sample.program())")
    command = [sys.executable, "-c", code, "many", "-o", "out", "--ckpt", str(weights / "distill.safetensors"), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    while not list(Path("out").glob("*.png")) and program.poll() is None:  # less those under way, whose names begin with a dot
        time.sleep(0.05)
    program.send_signal(signal.SIGINT)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 130 and "Traceback" not in said and said.splitlines()[-1].startswith("stopped: ") and "--skip_existing" in said
    left = tree("out")
    assert 0 < len(left) < 6 and all(Image.open(f"out/{name}").load() for name in left)
    again = subprocess.run([*command, "--skip_existing"], capture_output=True, text=True, env=env)
    assert again.returncode == 0 and f"{6 - len(left)} done, 0 skipped, {len(left)} there already" in again.stdout


def test_progress_in_plain_lines(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    progress = console.Progress(10, "megapixels")
    progress.start("1 of 2: a.png")
    for second in range(1, 13):
        clock[0] = second
        progress.add(0.25)
    progress.say("a line")
    captured = capsys.readouterr()
    assert captured.err == "1 of 2: a.png, 25 % of all, 30 s left\n" and captured.out == "a line\n"


def test_progress_in_a_terminal(monkeypatch):
    class Terminal:
        text, encoding = "", "utf-8"

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = console.Progress(10, "megapixels")
    progress.start("2 of 3: b.png")
    progress.to(5)
    progress.close()
    assert "2 of 3: b.png" in terminal.text and "50 %" in terminal.text and "left" in terminal.text


@pytest.mark.parametrize("seconds, words", [(3, "3 s"), (89, "89 s"), (91, "2 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")])
def test_durations(seconds, words):
    assert console.duration(seconds) == words
