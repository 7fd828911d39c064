"""The metrics against closed forms, other implementations and published numbers."""
import importlib.util
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

import data
import metrics
from console import InputError
from degradations import observe, to_float
from pictures import read_image, write_picture

ROOT = Path(metrics.__file__).parent
GOLDEN = Path(__file__).parent / "golden" / "lpips"  # the LPIPS project's example
ALEX = os.environ.get("OFTSR_LPIPS_ALEX", "")
needs_alex = pytest.mark.skipif(not Path(ALEX).is_file(), reason="OFTSR_LPIPS_ALEX names no file of AlexNet weights")


def random_bytes(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(seed, height, width):
    """A picture with edges and texture, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    x = scipy.ndimage.gaussian_filter(rng.standard_normal((height, width, 3)), (2, 2, 0)) + (rng.random(3) > 0.5)
    return np.uint8(255 * (x - x.min()) / (x.max() - x.min()))


def batch(*arrays):
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def test_psnr_of_a_known_error():
    a = random_bytes(0, 2, 3, 20, 30) // 2
    b = a.clone()
    b[0] += 16  # everywhere: MSE 256
    b[1, 2, 5, 7] += 100  # once: MSE 10,000 / 1,800
    torch.testing.assert_close(metrics.psnr_rgb(a, b), torch.tensor([20 * math.log10(255 / 16), 10 * math.log10(255**2 * 1800 / 1e4)], dtype=torch.float64))
    assert metrics.psnr_rgb(a, a).tolist() == [math.inf, math.inf]
    assert metrics.psnr_y(a, a, 4).tolist() == [math.inf, math.inf]


def test_luma_has_the_limited_range():
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0]], dtype=torch.uint8).view(3, 3, 1, 1)
    torch.testing.assert_close(metrics.luma(colours).flatten(), torch.tensor([16, 235, 81.481], dtype=torch.float64))


def test_full_range_luma_reads_1_3219_dB_lower():
    a, b = random_bytes(1, 1, 3, 24, 24), random_bytes(2, 1, 3, 24, 24)
    full = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)
    mse = ((a.double() - b.double()) * full).sum(dim=1).square().mean()
    assert metrics.psnr_y(a, b, 0).item() - 10 * math.log10(255**2 / mse) == pytest.approx(1.3219, abs=1e-4)


def test_luma_metrics_do_not_see_the_cropped_border():
    a = batch(smooth(3, 40, 48))
    b = a.clone()
    b[..., :4] ^= 255
    b[..., -4:, :] ^= 255
    assert metrics.psnr_y(a, b, 4).item() == math.inf and metrics.ssim_y(a, b, 4).item() == 1
    assert metrics.psnr_y(a, b, 3).item() < 30 and metrics.ssim_y(a, b, 3).item() < 0.9999


def ssim_by_windows(a, b):
    """SSIM of two (H, W) float64, window by window, weights and all, as the paper defines it."""
    g = np.exp(-((np.arange(11) - 5)[:, None] ** 2 + (np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    g /= g.sum()
    values = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (g * p).sum(), (g * q).sum()
            vp, vq, cov = (g * (p - mp) ** 2).sum(), (g * (q - mq) ** 2).sum(), (g * (p - mp) * (q - mq)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(values)


@pytest.mark.parametrize("crop", (0, 4))
def test_ssim_is_that_of_its_definition(crop):
    a = [smooth(seed, 33, 41) for seed in (4, 5)]
    b = [np.uint8(np.clip(x + np.random.default_rng(6).normal(0, s, x.shape), 0, 255)) for x, s in zip(a, (5, 40))]
    ours = metrics.ssim_y(batch(*a), batch(*b), crop)
    for i in range(2):
        p, q = ((65.481 * x[..., 0] + 128.553 * x[..., 1] + 24.966 * x[..., 2]) / 255 + 16 for x in (a[i].astype(float), b[i].astype(float)))
        inside = slice(crop, -crop or None)
        assert ours[i].item() == pytest.approx(ssim_by_windows(p[inside, inside], q[inside, inside]), abs=1e-9)
    assert 0.1 < ours[1] < ours[0] < 0.999


def test_ssim_of_a_picture_with_itself_is_1_and_too_small_a_one_is_refused():
    a = batch(smooth(7, 19, 30))
    assert metrics.ssim_y(a, a, 4).item() == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="smaller than SSIM's 11 x 11"):
        metrics.ssim_y(a, a, 5)


# --- LPIPS ---


@needs_alex
def test_lpips_gives_the_published_distances():
    lpips = metrics.load_lpips()
    ref, p0, p1 = (to_float(batch(read_image(GOLDEN / f"ex_{name}.png"))) for name in ("ref", "p0", "p1"))
    assert lpips(torch.cat([ref, ref]), torch.cat([p0, p1])).tolist() == pytest.approx([0.7219, 0.1376], abs=1e-3)
    assert lpips(ref, ref).item() == 0
    plain = lpips(ref, p0).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert lpips(ref, p0).item() == plain


def test_without_alexnet_one_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("OFTSR_LPIPS_ALEX", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.load_lpips() is None
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content, words", ((None, "no AlexNet weights at"), (b"not weights", "is broken or not a checkpoint"), ({"features.0.weight": 1}, "does not hold"), ({"features.0.weight": torch.ones(1)}, "does not hold")))
def test_a_wrong_alexnet_is_named(tmp_path, content, words):
    file = tmp_path / "alex.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save(content, file)
    with pytest.raises(InputError, match=words) as e:
        metrics.load_lpips(file)
    assert str(file) in str(e.value)


@needs_alex
def test_lpips_takes_the_smallest_picture_that_is_let_through():
    a, b = (to_float(batch(smooth(seed, 32, 32))) for seed in (1, 2))
    assert 0 < metrics.load_lpips()(a, b).item() < 2
    with pytest.raises(InputError, match="at least 32"):
        metrics.check_size("a.png", 31, 40, 4)


# --- against the packages that others measure with ---


def write_pngs(folder, *arrays):
    for i, x in enumerate(arrays):
        write_picture(folder / f"{i}.png", x)
    return [folder / f"{i}.png" for i in range(len(arrays))]


def noisy(x, seed, sigma=12):
    return np.uint8(np.clip(x + np.random.default_rng(seed).normal(0, sigma, x.shape), 0, 255).round())


def test_psnr_and_ssim_agree_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    for seed in range(3):
        x = smooth(seed, 64, 72)
        y = noisy(x, seed)
        assert metrics.psnr_rgb(batch(x), batch(y)).item() == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=255), abs=1e-9)
        a, b = (metrics.luma(batch(z), 4)[0, 0].numpy() for z in (x, y))
        assert metrics.psnr_y(batch(x), batch(y), 4).item() == pytest.approx(skimage.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
        theirs = skimage.structural_similarity(a, b, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)[1]
        assert metrics.ssim_y(batch(x), batch(y), 4).item() == pytest.approx(theirs[5:-5, 5:-5].mean(), abs=1e-7)  # where the window fits


@needs_alex
def test_lpips_agrees_with_its_package():
    import lpips
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = torch.load(ALEX, weights_only=True)
    slices = (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5)
    for name, p in (item for part in slices for item in part.named_parameters()):
        p.data.copy_(state[f"features.{name}"])
    x = smooth(1, 64, 64)
    a, b = to_float(batch(x)), to_float(batch(noisy(x, 2)))
    with torch.no_grad():
        assert metrics.load_lpips()(a, b).item() == pytest.approx(theirs(a, b).item(), abs=1e-6)


# --- Fréchet distances ---


def test_frechet_distance_of_gaussians_in_closed_form():
    """Diagonal covariances: |mu|^2 + sum (s_a - s_b)^2; and any features shifted by d are |d|^2 away."""
    rng = np.random.default_rng(0)
    signs = np.array([[i >> k & 1 for k in range(4)] for i in range(16)]) * 2.0 - 1  # covariance 16/15 I, exactly
    s_a, s_b, shift = np.array([1, 2, 3, 0.5]), np.array([2, 2, 1, 0]), np.array([0.3, -1, 0, 2])
    expected = shift @ shift + 16 / 15 * ((s_a - s_b) ** 2).sum()
    assert metrics.frechet_distance(signs * s_a + shift, signs * s_b) == pytest.approx(expected, rel=1e-12)
    x = rng.standard_normal((7, 50))  # fewer pictures than features
    assert metrics.frechet_distance(x + 3, x) == pytest.approx(9 * 50, rel=1e-9)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n, m", ((40, 30), (5, 60), (6, 4)))
def test_frechet_distance_is_clean_fid_s(n, m):
    fid = pytest.importorskip("cleanfid.fid")
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((n, 12)) @ rng.standard_normal((12, 12)), rng.standard_normal((m, 12)) + 1
    if min(n, m) > 12:
        theirs = fid.frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    else:  # of few pictures the product of covariances is singular, which scipy's root of a matrix stumbles over: by its eigenvalues
        product = np.linalg.eigvals(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real.clip(0)
        theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.sqrt(product).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mix", torch.randn(2048, 48, generator=torch.Generator().manual_seed(0)) / 7)

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.mix.mT


class StandIn(torch.nn.Module):
    """What clean-fid asks of its Inception: .layers of pictures of 299 in [-1, 1], and a call that resizes for itself."""

    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x, return_features: bool = False):
        x = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
        return self.layers((x - 128) / 128)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.jit.script(StandIn()).save(str(path))
    return path


@pytest.mark.skipif(importlib.util.find_spec("cleanfid") is None, reason="needs clean-fid")
@pytest.mark.parametrize("name, mode", (("fid", "clean"), ("fid_tf", "legacy_tensorflow")))
def test_fid_is_clean_fid_s_on_the_same_folders(name, mode, inception, tmp_path):
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W
    truth = [smooth(i, 48, 40) for i in range(6)]
    restored = [noisy(x, i, 30) for i, x in enumerate(truth)]
    a, b = write_pngs(tmp_path / "a", *restored), write_pngs(tmp_path / "b", *truth)
    m = metrics.pick_metrics([name], 4, "cpu", inception=inception)
    assert m.names() == [name] and any(mode in text for text in m.notes) and any("clean-fid " in text for text in m.notes)
    ours = metrics.measure_sets(a, b, m, {})[name]
    net = InceptionV3W(str(inception.parent), download=False, resize_inside=mode != "clean")
    stats = [fid.get_folder_features(str(tmp_path / d), net, num_workers=0, device=torch.device("cpu"), mode=mode, verbose=False) for d in "ab"]
    assert ours == pytest.approx(metrics.frechet_distance(*(s.astype(np.float64) for s in stats)), rel=1e-5) and ours > 0
    assert metrics.measure_sets(b, b, m, {})[name] == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("cleanfid") is None, reason="needs clean-fid")
def test_inception_is_sought_and_never_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OFTSR_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.pick_metrics(["fid"], 4, "cpu").names() == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "inception-2015-12-05.pt" in said and str(tmp_path / "checkpoints") in said and "OFTSR_INCEPTION" in said
    wrong = tmp_path / "net.pt"
    wrong.touch()
    with pytest.raises(InputError, match="should be called inception-2015-12-05.pt"):
        metrics.load_inception(wrong, "clean", "cpu")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"not a network")
    with pytest.raises(InputError, match="is not the TorchScript Inception"):
        metrics.load_inception(tmp_path / "inception-2015-12-05.pt", "clean", "cpu")


def test_vgg16_features_are_torchvision_s(tmp_path, monkeypatch, capsys):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.vgg16(weights=None).features.eval()
    torch.save({f"features.{k}": v for k, v in net.state_dict().items()}, tmp_path / "vgg16-x.pth")
    (file,) = write_pngs(tmp_path / "a", smooth(1, 40, 48))
    m = metrics.pick_metrics(["fd_vgg16"], 4, "cpu", vgg_backbone=tmp_path / "vgg16-x.pth")
    x = (batch(read_image(file)) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = net[:30](x).mean(dim=(2, 3))[0]
    assert m.sets["fd_vgg16"]([file]).shape == (1, 512) and np.allclose(m.sets["fd_vgg16"]([file])[0], expected, atol=1e-6)
    monkeypatch.delenv("OFTSR_VGG16", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    assert metrics.pick_metrics(["fd_vgg16"], 4, "cpu").names() == [] and "--vgg_backbone or OFTSR_VGG16" in capsys.readouterr().err


# --- pyiqa ---


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs pyiqa")
def test_pyiqa_without_weights_is_left_out_with_the_file_and_its_place(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    m = metrics.pick_metrics(["psnr_rgb", "musiq", "dists", "maniqa", "clipiqa"], 4, "cpu")
    said = capsys.readouterr().err.splitlines()
    there = {name for name in ("musiq", "dists", "maniqa", "clipiqa") if name in m.pictures}
    assert len(said) == 4 - len(there) and m.names()[0] == "psnr_rgb"
    for line in said:
        assert re.search(r" is left out: no \S+\.(pth|bin|pt|safetensors) (of \S+ )?in /", line) or "pip install 'setuptools<81'" in line, line
    import pyiqa

    def unimportable(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources")
    monkeypatch.setattr(pyiqa, "create_metric", unimportable)
    assert metrics.pick_metrics(["liqe"], 4, "cpu").names() == []
    assert capsys.readouterr().err == "liqe is left out: pyiqa wants the module pkg_resources, which is not here: pip install 'setuptools<81'\n"


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs pyiqa")
def test_a_metric_of_pyiqa_that_needs_no_weights_is_measured(monkeypatch):
    monkeypatch.setattr(metrics, "PYIQA", ("ssimc",))
    monkeypatch.setitem(metrics.METRICS, "ssimc", 4)
    x = smooth(1, 64, 64)
    m = metrics.pick_metrics(["ssimc"], 4, "cpu")
    import pyiqa
    a, b = batch(noisy(x, 1)), batch(x)
    assert m.pictures["ssimc"](a, b).item() == pytest.approx(pyiqa.create_metric("ssimc")(a / 255, b / 255).item(), abs=1e-6)
    assert m.notes == [f"pyiqa {pyiqa.__version__}"]


# --- consistency ---


@pytest.mark.parametrize("degradation", ("bicubic", "avgpool"))
def test_consistency_is_the_psnr_of_what_was_measured(degradation):
    task = data.replace(data.TASKS["photos"], degradation=degradation, eight_bit=False)
    x = batch(smooth(1, 40, 48))
    y = observe(to_float(x), task, torch.tensor([0]))
    assert metrics.consistency(x, y, task).item() > 120  # the truth explains what was measured, but for float32
    assert metrics.consistency(x, y + 16 / 127.5, task).item() == pytest.approx(20 * math.log10(255 / 16), abs=1e-3)


def test_only_what_is_measured_better_upwards_is_called_higher():
    assert metrics.HIGHER <= metrics.METRICS.keys() and not metrics.HIGHER & {"lpips", "dists", "fid", "fid_tf", "fd_vgg16"}


# --- NIQE ---


def test_niqe_is_the_published_but_for_its_float32_halving(monkeypatch):
    """pyiqa's, once with its halving in float64, as MATLAB's and ours, and once as it is: of few blocks the covariance magnifies float32."""
    published = pytest.importorskip("pyiqa.archs.niqe_arch", reason="no pyiqa here")
    from niqe import NIQE_MODEL, halved
    model = np.load(NIQE_MODEL)
    mean, covariance = (torch.from_numpy(model[k]) for k in ("mu_pris_param", "cov_pris_param"))
    for name in ("cat", "coffee"):
        a = torch.from_numpy(read_image(ROOT / "assets" / f"{name}.png")).permute(2, 0, 1)[None]
        y = metrics.luma(a).round()[:, :, :288, :384]
        ours = metrics.pick_metrics(["niqe"], 4, "cpu").pictures["niqe"](a, None).item()
        assert published.niqe(y, mean[:1], covariance[None]).item() == pytest.approx(ours, abs=0.02)
        with monkeypatch.context() as m:
            m.setattr(published, "imresize", lambda x, scale, antialiasing: torch.from_numpy(halved(x[0, 0].numpy()))[None, None])
            assert published.niqe(y, mean[:1], covariance[None]).item() == pytest.approx(ours, abs=1e-3)


def test_niqe_halves_as_matlab_does():
    """Against the cubic of double width summed directly, over the mirrored picture."""
    from niqe import halved
    y = np.random.default_rng(0).random((12, 20))
    wide = np.pad(y, 4, mode="symmetric")
    d = np.abs(np.arange(8) - 3.5) / 2
    k = np.where(d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2)
    k /= k.sum()
    right = [[k @ wide[2 * i + 1 : 2 * i + 9, 2 * j + 1 : 2 * j + 9] @ k for j in range(10)] for i in range(6)]
    assert np.abs(halved(y) - right).max() < 1e-12


def test_niqe_prefers_photographs_and_needs_two_blocks():
    a = torch.from_numpy(read_image(ROOT / "assets" / "cat.png")).permute(2, 0, 1)[None]
    measure = metrics.pick_metrics(["niqe"], 4, "cpu").pictures["niqe"]
    noisy = (a + 40 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
    assert measure(a, None) < 3 < 6 < measure(noisy, None)
    with pytest.raises(InputError, match="two blocks of 96 x 96 pixels: a picture of 191 x 100 is too small"):
        measure(a[:, :, :100, :191], None)
