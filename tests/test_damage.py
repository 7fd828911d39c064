"""damage.py, and the networks that follow from it: --model and --denoise of sample.py and upscale(), dial.blend."""
import io
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import damage
import dial
import sample
from console import InputError
from data import TASKS
from model import UNet, load_model, save_release
from pictures import Picture, as_picture, read_image
from test_model import tiny

ASSETS = Path(__file__).parent.parent / "assets"


def clean(name="coffee"):
    """A photograph in assets/, reduced: PIL."""
    image = Image.open(ASSETS / f"{name}.png").convert("RGB")
    return image.resize((image.width // 2, image.height // 2), Image.BICUBIC)


def as_jpeg(image, quality):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def plain(image):
    """Its pixels alone, as a PNG would keep them."""
    return Picture(np.array(image))


@pytest.mark.parametrize("quality", [10, 50, 75, 92, 97])
def test_the_quality_of_a_jpeg_is_in_its_tables(quality, tmp_path):
    image = as_jpeg(clean(), quality)
    assert as_picture(image).quality == pytest.approx(quality, abs=0.2 if quality > 10 else 5)  # below, entries end at 255
    clean().save(tmp_path / "a.jpg", quality=quality)
    clean().save(tmp_path / "a.png")
    assert as_picture(tmp_path / "a.jpg").quality == as_picture(image).quality and as_picture(tmp_path / "a.png").quality is None
    said = f"{as_picture(image).quality:.0f}"
    assert damage.judge(as_picture(image)) == ((0.0, f"a fine JPEG, of quality {said}") if quality > 90 else (1.0, f"a JPEG of quality {said}"))


@pytest.mark.parametrize("name", ["astronaut", "coffee"])
def test_what_is_seen_in_the_pixels(name):
    image, rng = clean(name), np.random.default_rng(0)
    assert damage.judge(plain(image)) == (0.0, "no damage seen")
    assert damage.judge(Picture(np.array(image, np.uint16) * 257)) == (0.0, "no damage seen")  # 16 bits
    for quality in (30, 60, 89):
        said = (1.0, f"it was a JPEG of quality {quality}")
        assert damage.judge(plain(as_jpeg(image, quality))) == said
        assert damage.judge(Picture(np.array(as_jpeg(image, quality))[3:, 5:])) == said  # cut off its grid
        assert damage.judge(Picture(np.array(as_jpeg(image.convert("L"), quality))[..., None])) == said  # gray
    for quality in (90, 97):
        assert damage.judge(plain(as_jpeg(image, quality))) == (0.0, "no damage seen")
        assert damage.table_quality(damage.jpeg_grid(damage.luma(np.array(as_jpeg(image, quality))))[1])[0] == quality
    coarse, tables = io.BytesIO(), rng.integers(12, 60, (2, 64)).tolist()
    image.save(coarse, "JPEG", qtables=tables)  # none of the standard ones: the nearest is coarse, too
    assert damage.judge(plain(Image.open(coarse)))[0] == 1
    noisy = (np.array(image) + rng.normal(0, 20, np.shape(image))).clip(0, 255).astype(np.uint8)
    assert damage.judge(Picture(noisy))[1].startswith("noise of ")
    assert damage.judge(plain(image.filter(ImageFilter.GaussianBlur(2)))) == (1.0, "it is blurred")
    assert damage.judge(plain(image.resize((20, 20)))) == (0.0, "too small to tell")


def test_noise_is_measured_in_its_deviation():
    gray = np.full((256, 256, 1), 128) + np.random.default_rng(0).normal(0, 10, (256, 256, 1))
    assert damage.noise(damage.luma(gray.round().astype(np.uint8))) == pytest.approx(10, rel=0.3)  # of the quietest patches: below it


# --- two networks ---


def other(net):
    """A network trained on from that one, as it were."""
    net = UNet(**net.config)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p + 0.05 * torch.randn_like(p))
    return net.eval()


REAL_TASK = replace(TASKS["photos_real"], sigma_p=TASKS["photos"].sigma_p)


def test_between_two_networks_and_nothing_between_others():
    a, b = tiny(one_step=True), other(tiny(one_step=True))
    net, stage, task = dial.blend((a, "distill", TASKS["photos"]), (b, "distill", REAL_TASK), 0.25)
    for p, q, r in zip(a.parameters(), b.parameters(), net.parameters()):
        torch.testing.assert_close(r, 0.75 * p + 0.25 * q)
    assert stage == "distill" and task == TASKS["photos"]
    larger = UNet(**{**a.config, "channels": 2 * a.config["channels"]})
    for real, words in (((larger, "distill", REAL_TASK), "channels differs"), ((b, "flow", REAL_TASK), "stage differs, distill and flow"),
                        ((b, "distill", replace(REAL_TASK, scale=2)), "scale differs, 4 and 2"), ((b, "distill", replace(REAL_TASK, sigma_p=0.3)), "sigma_p differs")):
        with pytest.raises(InputError, match=words) as e:
            dial.blend((a, "distill", TASKS["photos"]), real, 0.5)
        assert "\n" not in str(e.value)


@pytest.fixture
def both(weights, tmp_path, monkeypatch):
    """The shipped students, tiny."""
    save_release(tmp_path / "photos_real_x4.safetensors", other(load_model(weights / "distill.safetensors")[0]), dict(stage="distill", step=1, task=asdict(REAL_TASK)))
    shutil.copy(weights / "distill.safetensors", tmp_path / "photos_x4.safetensors")
    monkeypatch.setattr(sample, "WEIGHTS", tmp_path / "photos_x4.safetensors")
    monkeypatch.setattr(sample, "REAL", tmp_path / "photos_real_x4.safetensors")
    sample._blend.cache_clear()
    yield tmp_path
    sample._blend.cache_clear()


def test_each_picture_has_its_network_and_says_why(both, monkeypatch, capsys):
    monkeypatch.chdir(both)
    small = clean().crop((0, 0, 64, 56))
    small.save("a.png")
    small.save("b.jpg", quality=70)
    assert sample.main(["a.png", "b.jpg", "--ext", "png", "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "a_x4.png 256x224, t 0.5, clean: no damage seen, " in said[0] and "b_x4.png 256x224, t 0.5, real: a JPEG of quality 70, " in said[1]
    notes = [json.loads(Image.open(f"restored/{name}_x4.png").text["oftsr"]) for name in "ab"]
    assert [(n["weights"], n.get("denoise")) for n in notes] == [("photos_x4.safetensors", None), ("photos_real_x4.safetensors", 1)]
    results = {}
    for flags in (["--model", "clean"], ["--model", "real"], ["--model", "auto"], ["--denoise", "0"], ["--denoise", "0.5"], ["--denoise", "1"]):
        assert sample.main(["b.jpg", "-o", "out.png", "--overwrite", "--device", "cpu", *flags]) == 0
        results[" ".join(flags)] = read_image("out.png").astype(int)
    same = lambda a, b: np.array_equal(results[a], results[b])
    assert same("--model real", "--model auto") and same("--model real", "--denoise 1") and same("--model clean", "--denoise 0")
    assert json.loads(Image.open("out.png").text["oftsr"])["weights"] == "photos_real_x4.safetensors"
    assert sample.weights_note(0.5) == dict(weights="photos_x4.safetensors+photos_real_x4.safetensors", denoise=0.5)
    assert not same("--model clean", "--model real") and not same("--denoise 0.5", "--model real") and not same("--denoise 0.5", "--model clean")
    assert json.loads(Image.open("restored/b_x4.png").text["oftsr"])["denoise"] == 1 and np.array_equal(read_image("restored/b_x4.png"), results["--model auto"])

    up = lambda image, **how: np.asarray(sample.upscale(image, device="cpu", **how))
    assert np.array_equal(up("b.jpg"), results["--model auto"]) and np.array_equal(up("b.jpg", denoise=0.5), results["--denoise 0.5"])
    assert np.array_equal(up(Image.open("b.jpg"), model="clean"), results["--model clean"]) and np.array_equal(up("b.jpg", consistent=True), up("b.jpg", model="clean", consistent=True))
    with pytest.raises(InputError, match="no model 'other'"):
        up("b.jpg", model="other")
    with pytest.raises(InputError, match="denoise goes from 0"):
        up("b.jpg", denoise=2)


def test_the_shipped_networks_have_something_between_them():
    net, stage, task = sample.shipped(0.5, "cpu")
    assert (stage, task.degradation) == ("distill", "bicubic") and sample.shipped(1, "cpu")[2].degradation == "real"
    ends = [sample.load(path, "cpu")[0].out["2"].weight for path in (sample.WEIGHTS, sample.REAL)]
    assert torch.allclose(net.out["2"].weight, (ends[0] + ends[1]) / 2) and not torch.equal(*ends)


def test_without_the_real_network_auto_is_clean(both, monkeypatch, capsys):
    monkeypatch.chdir(both)
    sample.REAL.unlink()
    clean().crop((0, 0, 64, 56)).save("b.jpg", quality=70)
    assert sample.main(["b.jpg", "--device", "cpu"]) == 0 and re.search(r", t 0.5, [\d.]+ s\n", capsys.readouterr().out)
    assert sample.main(["b.jpg", "--model", "auto", "--overwrite", "--device", "cpu"]) == 0 and "clean, as there is no photos_real_x4.safetensors" in capsys.readouterr().out
    for flags in (["--model", "real"], ["--denoise", "0.5"]):
        with pytest.raises(InputError, match="no weights at .*photos_real_x4.safetensors, which take blur") as e:
            sample.main(["b.jpg", "--device", "cpu", *flags])
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("flags, words", [(["--model", "real", "--denoise", "1"], "both say what is taken away"), (["--model", "real", "--ckpt", "x.pt"], "goes without --ckpt"),
                                          (["--denoise", "0", "--ckpt", "x.pt"], "goes without --ckpt"), (["--denoise", "2"], "out of range"),
                                          (["--model", "real", "--consistent"], "would bring back"), (["--model", "ffhq", "--denoise", "1"], "goes without --preset")])
def test_flags_that_do_not_go_together(flags, words, capsys):
    with pytest.raises(SystemExit):
        sample.main(["a.png", *flags])
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_model_with_another_name_is_the_preset():
    args = sample.parse_args(["a.png", "--model", "ffhq", "--ckpt", "x.pt"])
    assert (args.preset, args.model) == ("ffhq", None)
    assert sample.parse_args(["a.png", "--preset", "ffhq", "--ckpt", "x.pt"]).preset == "ffhq" and sample.parse_args(["a.png", "--model", "clean"]).preset is None
    with pytest.raises(InputError, match="no --preset nothing: there are .*of --model also auto, clean, real"):
        sample.main([str(ASSETS / "cat.png"), "--model", "nothing"])


def test_the_page_has_the_second_dial(both, tmp_path):
    import demo
    demo.load.cache_clear()
    (tmp_path / "results").mkdir()
    clean().crop((0, 0, 32, 24)).save(tmp_path / "b.jpg", quality=70)
    try:
        told = demo.open_picture(str(tmp_path / "b.jpg"), demo.STUDENT, 0, "tab", tmp_path)
        assert told["denoise"] == 1
        told = demo.open_picture(str(tmp_path / "b.jpg"), demo.STUDENT, 0, "tab", tmp_path, 0.5)
        path = demo.save(demo.PAGES[told["id"]], 0.5)
        assert np.array_equal(read_image(path), sample.upscale(str(tmp_path / "b.jpg"), denoise=0.5))
        assert json.loads(Image.open(path).text["oftsr"])["denoise"] == 0.5
    finally:
        demo.close("tab")
        demo.load.cache_clear()
