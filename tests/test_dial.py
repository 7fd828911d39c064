"""--t_map and --consistent: as functions, and as people use them."""
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dial
import sample
from console import InputError
from degradations import H
from pictures import read_image

pytestmark = pytest.mark.usefixtures("folder")


def at(t):
    """A stand-in for the network: every pixel another line in t, with a bend."""
    x = torch.linspace(-1, 1, 12).view(1, 3, 4)
    return x + t * (1 - x) + 0.01 * t * t


def test_a_pixel_is_what_its_t_gives():
    t_map = torch.tensor([[0, 0.2, 0.2, 1], [1, 1, 1, 1], [0.2, 0.2, 0.2, 0]], dtype=torch.float64)
    out = dial.along_map(at, t_map)
    for t in (0, 0.2, 1):
        assert torch.equal(out[:, t_map == t], at(t)[:, t_map == t])  # to the bit


def test_many_values_are_interpolated_between_nodes_around_them():
    t_map, asked = torch.linspace(0.3, 0.7, 12, dtype=torch.float64).view(3, 4), []
    out = dial.along_map(lambda t: asked.append(t) or at(t), t_map)
    assert asked == [0.25, 0.5, 0.75]
    exact = torch.stack([at(t)[0].flatten()[i] for i, t in enumerate(t_map.flatten().tolist())]).view(3, 4)
    assert (out[0] - exact).abs().max() < 0.01 * 0.125**2 * 1.01 < (at(0.5)[0] - exact).abs().max()  # the bend, between nodes .25 apart


@pytest.mark.parametrize("degradation", ["bicubic", "avgpool"])
def test_consistent_gives_the_measurement_back(degradation):
    y = torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
    start = torch.rand(1, 3, 48, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = dial.consistent(start, y, degradation, 4)
    assert (H(x, degradation, 4) - y).abs().max() < 0.25 / 127.5 and x.abs().max() <= 1
    assert torch.equal(dial.consistent(x, y, degradation, 4), x)  # what is consistent is left alone
    assert (x - start).square().mean() < start.square().mean()  # and it is still the picture that it was, not any that fits


def test_consistent_ends_where_no_picture_fits():
    y = torch.ones(1, 1, 4, 16)
    y[..., ::2] = -1  # black beside white in every pixel: H blurs, so that only values beyond [-1, 1] would do
    x = dial.consistent(torch.zeros(1, 1, 16, 64), y, "bicubic", 4)
    assert x.isfinite().all() and x.abs().max() <= 1 and (H(x, "bicubic", 4) - y).abs().max() > 0.01


def save(name, array):
    Image.fromarray(np.asarray(array, np.uint8)).save(name)
    return name


@pytest.mark.parametrize("tile", [0, 80])
def test_a_constant_map_is_its_t(tile, cli):
    save("in/big.png", np.random.default_rng(0).integers(0, 256, (30, 26, 3)))
    save("m.png", np.full((5, 9), 51))
    cli("in/big.png", "--t_map", "m.png", "-o", "map", "--tile", tile)
    cli("in/big.png", "--t", 0.2, "-o", "t", "--tile", tile)
    assert np.array_equal(read_image("map/big_x4.png"), read_image("t/big_x4.png"))
    note = json.loads(Image.open("map/big_x4.png").text["oftsr"])
    assert note["t_map"] == "m.png" and "t" not in note


@pytest.mark.parametrize("stage, tile", [("distill", 0), ("distill", 80), ("flow", 0)])
def test_two_halves_each_at_their_t(stage, tile, cli):
    save("in/big.png", np.random.default_rng(0).integers(0, 256, (30, 26, 3)))
    half = np.zeros((60, 52))
    half[:, 26:] = 255
    save("m.png", half)
    extra = ["--steps", 2] if stage == "flow" else []
    cli("in/big.png", "--t_map", "m.png", "-o", "map", "--tile", tile, *extra, stage=stage)
    cli("in/big.png", "--t", "0,1", "-o", "t", "--tile", tile, *extra, stage=stage)
    mixed, low, high = (read_image(f"{name}.png") for name in ("map/big_x4", "t/big_x4_t0", "t/big_x4_t1"))
    assert np.array_equal(mixed[:, :44], low[:, :44]) and np.array_equal(mixed[:, 60:], high[:, 60:])
    assert not np.array_equal(low[:, :44], high[:, :44])


@pytest.mark.parametrize("name", ["a", "alpha", "gray16"])
def test_a_consistent_result_reduced_again_is_the_input(name, cli):
    rng = np.random.default_rng(0)
    base = np.clip(128 + 40 * np.cumsum(rng.standard_normal((14, 18, 4)), 1), 40, 215)  # no hard edges of black and white
    if name == "gray16":
        Image.fromarray((base[..., 0] * 257).astype(np.uint16)).save("in/gray16.png")
    else:
        save(f"in/{name}.png", base[..., : 4 if name == "alpha" else 3])
    cli(f"in/{name}.png", "--t", 1, "--consistent", "-o", "out")
    cli(f"in/{name}.png", "--t", 1, "-o", "plain")
    assert json.loads(Image.open(f"out/{name}_x4.png").text["oftsr"])["consistent"] is True

    def wrong(folder):
        small, big = (np.asarray(Image.open(f), np.float64) for f in (f"in/{name}.png", f"{folder}/{name}_x4.png"))
        unit = 257 if name == "gray16" else 1
        small, big = (x.reshape(*x.shape[:2], -1)[..., :3] / unit for x in (small, big))
        if name == "alpha":  # straight colour is another where alpha is not full: it was made from what shows
            small = sample.split_alpha(np.asarray(Image.open(f"in/{name}.png")))[0].astype(np.float64)
        again = H(torch.from_numpy(big).permute(2, 0, 1)[None], "bicubic", 4)[0].permute(1, 2, 0).numpy()
        return np.abs(again - small).max()
    assert wrong("out") < 0.5 < wrong("plain")  # rounding to 8 bits gives the input


def test_the_first_picture_of_the_readme(monkeypatch):
    root = Path(sample.__file__).parent
    assert "python assets/before_after.py" in (root / "README.md").read_text()
    figure = runpy.run_path(str(root / "assets" / "before_after.py"))
    asked = []
    monkeypatch.setitem(figure["main"].__globals__, "upscale", lambda im, t: asked.append(t) or im.resize((4 * im.width, 4 * im.height)))
    figure["main"]("out.png")
    assert asked == [0, 0.5, 1] and Image.open("out.png").size == Image.open(root / "assets" / "figures" / "dial.png").size


def test_the_gallery_of_the_readme(monkeypatch):
    root = Path(sample.__file__).parent
    assert "python assets/gallery.py" in (root / "README.md").read_text()
    figure = runpy.run_path(str(root / "assets" / "gallery.py"))
    asked = []
    monkeypatch.setitem(figure["main"].__globals__, "upscale", lambda path, model, t: asked.append((path.name, model, t)) or np.zeros((4 * 600, 4 * 640, 3), np.uint8))
    figure["main"]("out.png")
    assert asked == [(name, *how) for how in (("clean", 0.5), ("real", 0), ("real", 1)) for name in ("china.jpg", "flower.jpg", "hopper.jpg")]
    assert Image.open("out.png").size == Image.open(root / "assets" / "figures" / "gallery.jpg").size


def test_upscale_takes_both(cli, weights):
    array, student = read_image("in/a.png"), dict(ckpt=weights / "distill.safetensors", device="cpu")
    plain = sample.upscale(array, t=0.2, **student)
    for t_map in (np.full((3, 4), 51, np.uint8), Image.new("L", (7, 5), 51), save("m.png", np.full((5, 9), 51))):
        assert np.array_equal(sample.upscale(array, t_map=t_map, **student), plain)
    assert not np.array_equal(sample.upscale(array, t=0.2, consistent=True, **student), plain)
    with pytest.raises(InputError, match="own enlargement"):
        sample.upscale(array, consistent=True, outscale=2, **student)
    with pytest.raises(InputError, match="a map of t as an array"):
        sample.upscale(array, t_map=np.zeros((3, 4)), **student)


@pytest.mark.parametrize("args, says", [
    (["in/a.png", "--t", 1, "--t_map", "in/b.jpg"], "give one"),
    (["in/a.png", "--t_map", "none.png"], "no picture at none.png"),
    (["in/a.png", "--consistent", "-s", 2], "own enlargement"),
    (["in/a.png", "--export", "m.onnx"], "takes no pictures"),
    (["--export", "m.onnx", "--t", "0,1"], "one --t"),
])
def test_mistakes_are_one_line(args, says, cli, capsys):
    with pytest.raises((InputError, SystemExit)) as e:
        cli(*args)
    message = str(e.value) if e.type is InputError else capsys.readouterr().err.strip().splitlines()[-1]
    assert says in message and "\n" not in message


def test_a_flow_is_not_exported(cli):
    with pytest.raises(InputError, match="for a one-step student"):
        cli("--export", "m.onnx", stage="flow")
