"""sample.py as people use it: files, folders, sweeps, mistakes; and upscale() from Python."""
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import tiles
from console import InputError
from data import TASKS
from degradations import degrade, to_float
from kernels import to_uint8
from metrics import psnr_rgb
from model import save_release
from pictures import read_image
from test_model import tiny

ROOT = Path(__file__).parent.parent


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "in/" not in str(p.relative_to(folder)))


def test_one_picture(folder, cli, capsys):
    assert cli("--t", 0.5, "in/a.png") == 0
    out = Image.open("restored/a_x4.png")
    assert out.size == (68, 48)
    note = json.loads(out.text["oftsr"])
    assert (note["t"], note["seed"], note["weights"], note["tile"], note["dtype"], note["input"]) == (0.5, 0, "distill.safetensors", 0, note["dtype"], "a.png")
    said = capsys.readouterr().out
    assert "17x12 -> restored/a_x4.png 68x48, t 0.5" in said and " a second: 1 done, 0 skipped" in said.splitlines()[-1]


def test_sweep_and_strip(folder, cli):
    cli("--t", "0,0.25,1", "--strip", "in/a.png", "-o", "out")
    assert written(folder) == ["out/a_x4_strip.png", "out/a_x4_t0.25.png", "out/a_x4_t0.png", "out/a_x4_t1.png"]
    strip = read_image("out/a_x4_strip.png")
    assert strip.shape == (48, 4 * 68, 3)
    for i, t in enumerate(("0", "0.25", "1")):
        assert np.array_equal(strip[:, (i + 1) * 68 : (i + 2) * 68], read_image(f"out/a_x4_t{t}.png"))
    assert not np.array_equal(read_image("out/a_x4_t0.png"), read_image("out/a_x4_t1.png"))


def test_folders_patterns_and_formats(folder, cli, capsys):
    assert cli("in", "-o", "flat") == 0
    assert written(folder) == ["flat/a_x4.png", "flat/b_x4.jpg"]
    assert cli("-r", "in", "-o", "tree", "--suffix", "", "--ext", "webp") == 0
    assert written(folder / "tree") == ["a.webp", "b.webp", "below/c.webp"]
    cli("-i", "in/*.png", "-o", "glob")
    assert written(folder / "glob") == ["a_x4.png"]
    cli("in/a.png", "-o", "this.gif")
    assert Image.open("this.gif").format == "GIF"
    cli("in/a.png", "-o", "strip", "-s", 3, "--strip")
    assert Image.open("strip/a_x3_strip.png").size == (2 * 51, 36)
    cli("in/a.png", "-o", "just/this.jpg", "-s", 2.5)
    assert Image.open("just/this.jpg").size == (42, 30) and Image.open("just/this.jpg").format == "JPEG"
    capsys.readouterr()
    stamp = Path("flat/a_x4.png").stat().st_mtime_ns
    cli("in", "-o", "flat", "--skip_existing")
    assert Path("flat/a_x4.png").stat().st_mtime_ns == stamp and "->" not in capsys.readouterr().out


def test_pixels_depend_on_the_picture_and_the_seed_only(folder, cli):
    cli("in/a.png", "in/b.jpg", "in/below/c.png", "-o", "one", "--ext", "png")
    cli("in/below/c.png", "-o", "two")
    cli("in/below/c.png", "-o", "three", "--seed", 1)
    assert np.array_equal(read_image("one/c_x4.png"), read_image("two/c_x4.png"))
    assert not np.array_equal(read_image("one/c_x4.png"), read_image("three/c_x4.png"))


@pytest.mark.parametrize("solver, evaluations", [("euler", 3), ("heun", 6), ("ralston", 6), ("midpoint", 6), ("rk45", None)])
def test_solvers_of_a_flow(solver, evaluations, folder, cli):
    cli("in/a.png", "--solver", solver, *(["--steps", 3] if evaluations else []), stage="flow")
    note = json.loads(Image.open("restored/a_x4.png").text["oftsr"])
    assert note["solver"] == solver and note["nfe"] == (evaluations or note["nfe"]) >= 3


def test_a_bad_picture_is_skipped_and_counted(folder, cli, capsys):
    Path("in/bad.png").write_bytes(b"\x89PNG but no more")
    assert cli("in", "-s", 0.1) == 1  # and a picture made smaller than a pixel has one
    assert Image.open("restored/b_x0.1.jpg").size == (1, 1)
    for name in written(folder):
        Path(name).unlink()
    capsys.readouterr()
    assert cli("in") == 1
    captured = capsys.readouterr()
    assert "skipped: in/bad.png cannot be read" in captured.err and captured.err.strip().endswith("2 done, 1 skipped")
    assert written(folder) == ["restored/a_x4.png", "restored/b_x4.jpg"]


def test_what_one_picture_lacks_is_not_the_others_loss(folder, cli, capsys, monkeypatch):
    """Values that are not finite; a result that does not fit its format, known before any work; a bug is no picture's fault."""
    enlarge = sample.enlarge

    def fail_with(error):
        def failing(net, task, picture, *args, **how):
            if picture.pixels.shape[1] == 17:  # a.png
                raise error
            return enlarge(net, task, picture, *args, **how)
        monkeypatch.setattr(sample, "enlarge", failing)

    fail_with(ArithmeticError("rk45 cannot reach its tolerance"))
    assert cli("in", "-o", "out") == 1
    assert "skipped: in/a.png: rk45 cannot" in capsys.readouterr().err and written(folder) == ["out/b_x4.jpg"]
    fail_with(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli("in", "-o", "out")
    monkeypatch.setattr(tiles, "restore_tile", lambda net, x_lr, *args, **how: (torch.full_like(x_lr[0], float("nan")), 1))
    monkeypatch.setattr(sample, "enlarge", enlarge)
    assert cli("in/a.png", "-o", "nan") == 1 and "not finite" in capsys.readouterr().err
    Image.new("RGB", (4097, 2)).save("wide.webp")
    assert cli("wide.webp", "-o", "out") == 1 and "has at most 16383 pixels a side" in capsys.readouterr().err
    assert written(folder) == ["out/b_x4.jpg", "wide.webp"]


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nframe #0: c10"),
                                   MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_out_of_memory_halves_the_tile(error, folder, cli, capsys, monkeypatch):
    """Until it suffices, in one line each; in the end that picture alone is skipped, in one line."""
    restore_tile, most = tiles.restore_tile, 200

    def short(net, x_lr, *args, **how):
        if max(x_lr.shape[2:]) > most:
            raise error
        return restore_tile(net, x_lr, *args, **how)
    monkeypatch.setattr(tiles, "restore_tile", short)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 130, 3), dtype=np.uint8)).save("in/large.png")
    assert cli("in/a.png", "in/large.png", "-o", "out") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "memory" in line] == ["in/large.png: not enough memory for one piece, going on with tiles of 512",
                                                           "in/large.png: not enough memory for tiles of 512, going on with tiles of 256",
                                                           "in/large.png: not enough memory for tiles of 256, going on with tiles of 128"]
    assert json.loads(Image.open("out/large_x4.png").text["oftsr"])["tile"] == 128
    most = 100
    assert cli("in/a.png", "in/large.png", "-o", "less") == 1
    said = capsys.readouterr().err.splitlines()
    assert "skipped: in/large.png: not enough memory" in said and said[-1].endswith("1 done, 1 skipped")
    assert written(folder / "less") == ["a_x4.png"] and written(folder / "out") == ["a_x4.png", "large_x4.png"]


def test_processes_share_the_list_and_a_bad_picture_stops_no_other(folder, weights):
    Path("in/aa.png").write_bytes(b"\x89PNG but no more")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "sample.py"), "-r", "in", "-o", "out",
               "--ckpt", str(weights / "distill.safetensors"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "3 done, 1 skipped" in done.stderr
    assert written(folder) == ["out/a_x4.png", "out/b_x4.jpg", "out/below/c_x4.png"]


def test_an_unconditional_flow_restores_nothing(folder, tmp_path):
    save_release(tmp_path / "free.safetensors", tiny(), dict(stage="flow", task=asdict(data.TASKS["ffhq_uncond"])))
    with pytest.raises(InputError, match="unconditional"):
        sample.main(["--ckpt", str(tmp_path / "free.safetensors"), "in/a.png"])


def test_an_input_is_never_overwritten(folder, cli, capsys):
    before = {name: Path(name).read_bytes() for name in ("in/a.png", "in/b.jpg")}
    for args in (["in/a.png", "-o", "in/a.png"], ["in/a.png", "-o", "in", "--suffix", ""], ["in/a.png", "in/b.jpg", "-o", "in", "--suffix", "", "--overwrite"]):
        assert cli(*args) == 1
        said = capsys.readouterr().err
        assert "in/a.png: its result would overwrite it: choose another -o or --suffix" in said and " 0 done, " in said
    assert {name: Path(name).read_bytes() for name in before} == before and written(folder) == []


@pytest.mark.parametrize("args, says", [
    (["in", "-o", "one.png"], "2 pictures do not fit in one file"),
    (["nothing.png"], "no file, folder or pattern nothing.png"),
    (["empty"], "no pictures in empty"),
    (["in/a.png", "--t", "1.5"], "from 0 (fidelity) to 1 (realism)"),
    (["in/a.png", "--t", "half"], "not a number"),
    (["in/a.png", "--til", "64"], "unrecognized arguments"),
    (["in/a.png", "--tile", "64"], "larger than twice --tile_pad"),
    (["in/a.png", "--tile", "half"], "not a whole number"),
    (["in/a.png", "--tile", "700", "--tile_pad", "400"], "larger than twice --tile_pad"),
    (["in/a.png", "--steps", "4"], "one-step student"),
    (["in/a.png", "--solver", "euler"], "one-step student"),
    (["in/a.png", "--rtol", "0.1"], "for --solver rk45"),
    (["in/a.png", "--suffix", "a/b"], "names no folder"),
    (["in/a.png", "-o", "b.gif", "--ext", "png"], "without --ext"),
    (["in/a.png", "-o", "b.psd"], ".psd cannot be written"),
    (["in/a.png", "-s", "2", "--width", "9"], "give one"),
    (["in/a.png", "--skip_existing", "--overwrite"], "contradict"),
    (["in/a.png", "--device", "cuda:99"], "no device"),
    (["in/a.png", "--device", "gpu"], "no device"),
    (["in/a.png", "-o", "in/b.jpg/below"], "cannot write to in/b.jpg/below"),
    ([], "name a picture"),
])
def test_mistakes_are_one_line_and_write_nothing(args, says, folder, cli, capsys):
    (folder / "empty").mkdir()
    with pytest.raises((InputError, SystemExit)) as e:
        cli(*args)
    message = str(e.value) if e.type is InputError else capsys.readouterr().err.strip()
    assert says in message and "\n" not in message and written(folder) == []
    assert e.type is InputError or message.endswith("--help)")


def test_a_flow_has_the_dial_too(folder, cli, capsys):
    cli("--t", "0,0.5,1", "--steps", 2, "--suffix", "", "in/a.png", stage="flow")
    told = capsys.readouterr().out
    assert "t 0.5, midpoint, 2 evaluations" in told and "t 0, midpoint, 1 evaluations" in told
    note = json.loads(Image.open("restored/a_t0.5.png").text["oftsr"])
    assert (note["t"], note["solver"], note["nfe"]) == (0.5, "midpoint", 2)
    cli("--steps", 2, "--suffix", "_whole", "in/a.png", stage="flow")
    cli("--solver", "euler", "--steps", 1, "--suffix", "_euler", "in/a.png", stage="flow")
    assert np.array_equal(read_image("restored/a_t1.png"), read_image("restored/a_whole.png"))
    assert np.array_equal(read_image("restored/a_t0.png"), read_image("restored/a_euler.png"))
    assert not np.array_equal(read_image("restored/a_t0.5.png"), read_image("restored/a_t1.png"))


def test_upscale_does_not_confuse_flow_and_student(folder, weights, tmp_path):
    array, flow, student = read_image("in/a.png"), weights / "flow.safetensors", weights / "distill.safetensors"
    by_default = sample.upscale(array, ckpt=flow, device="cpu", steps=2)
    assert np.array_equal(by_default, sample.upscale(array, ckpt=flow, device="cpu", solver="midpoint", steps=2))
    for wrong, says in ((dict(ckpt=student, solver="euler"), "one-step student"), (dict(ckpt=flow, t=-1), "from 0"),
                        (dict(ckpt=student, t=7), "from 0"), (dict(ckpt=student, tile=64), "larger than twice")):
        with pytest.raises(InputError, match=says):
            sample.upscale(array, device="cpu", **wrong)
    save_release(tmp_path / "unknown.safetensors", tiny(), dict(task=None))
    with pytest.raises(InputError, match="does not say what it is"):
        sample.upscale(array, ckpt=tmp_path / "unknown.safetensors", device="cpu")
    assert sample.upscale(array, ckpt=tmp_path / "unknown.safetensors", device="cpu", t=0.5).shape == (48, 68, 3)


def test_errors_reach_the_shell_as_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--ckpt", str(tmp_path / "none.pt"), str(ROOT / "assets" / "cat.png")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"sample.py: no checkpoint at {tmp_path / 'none.pt'}\n"


def test_upscale_is_the_command_line(folder, cli, weights):
    cli("in/a.png", "--t", 0.25, "--seed", 3)
    array, kwargs = read_image("in/a.png"), dict(t=0.25, seed=3, ckpt=weights / "distill.safetensors", device="cpu")
    big = sample.upscale(array, **kwargs)
    assert isinstance(big, np.ndarray) and np.array_equal(big, read_image("restored/a_x4.png"))
    picture = sample.upscale(Image.fromarray(array), **kwargs)
    assert isinstance(picture, Image.Image) and np.array_equal(np.asarray(picture), big)
    assert np.array_equal(sample.upscale("in/a.png", **kwargs), big)
    for bad in (array / 255, array[None], np.zeros((4, 4, 5), np.uint8)):
        with pytest.raises(InputError, match="uint8"):
            sample.upscale(bad, **kwargs)


def test_the_shipped_student_restores_and_its_dial_trades():
    """On a photograph it was not trained on: well above bicubic at t = 0, and PSNR falls along the dial."""
    task = TASKS["photos"]
    x_1 = torch.from_numpy(read_image(ROOT / "assets" / "coffee.png")).permute(2, 0, 1)[None]
    x_lr = degrade(to_float(x_1), task, torch.tensor([0]))
    net, stage, _ = sample.load(device="cpu")
    score = lambda x: psnr_rgb(to_uint8(x).permute(0, 3, 1, 2), x_1).item()
    dial = [score(tiles.restore(net, x_lr, task.sigma_p, torch.tensor([0]), t)[0]) for t in (0, 0.5, 1)]
    assert stage == "distill" and dial[0] > score(x_lr) + 0.7 and dial[0] > dial[1] > dial[2]


def test_tiled_is_close_to_whole():
    """Group norm sees a tile only, so tiling moves pixels, but where tiles blend there is no edge. The shipped weights."""
    array = np.asarray(Image.open(ROOT / "assets" / "astronaut.png").crop((0, 0, 96, 96)))
    kwargs = dict(device="cpu", dtype="float32")
    whole, tiled = (sample.upscale(array, tile=tile, **kwargs).astype(float) for tile in (0, 160))
    assert 0 < np.abs(whole - tiled).mean() < 2
    step = np.abs(np.diff(tiled - whole, axis=1)).mean(axis=(0, 2))
    borders = [e - 1 for start, weights in tiles.tile_spans(384, 160, 64, 8) for e in (start, start + len(weights)) if 0 < e < 384]
    assert len(borders) == 6 and step[borders].max() < 2.5 * np.median(step)  # no jump where a tile begins or ends
