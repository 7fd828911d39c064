"""The metrics against closed forms, other implementations and published numbers."""
import math
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch

import metrics
from console import InputError
from degradations import to_float
from pictures import read_image

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


def test_without_alexnet_one_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("OFTSR_LPIPS_ALEX", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.load_lpips() is None
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content, words", ((None, "no AlexNet weights at"), (b"not weights", "does not hold"), ({"features.0.weight": torch.ones(1)}, "does not hold")))
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
