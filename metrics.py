"""What is measured of restored pictures: one function a metric, and what it needs found on this machine.

    psnr_rgb, psnr_y, ssim_y     arithmetic, against the true picture
    lpips                        AlexNet's opinion, against the true picture
    niqe                         how unlike the statistics of good photographs it is; without a true picture

A picture's metric is a function of two batches, restored and true, (B, 3, H, W) uint8, to (B,). `pick_metrics` makes the
table of those that a run measures; `measure` reads two files and goes through it.
"""
import os
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, special

from console import InputError
from degradations import to_float
from pictures import read_image

METRICS = {"psnr_rgb": 3, "psnr_y": 3, "ssim_y": 4, "lpips": 4, "niqe": 3}  # decimals
WINDOW = 11  # side of SSIM's


# --- arithmetic. PSNR and SSIM are of float64, which mps has not: they are for the CPU ---


def psnr_rgb(a, b):
    """PSNR in dB of each picture over all of its pixels and channels: a, b (B, 3, H, W) uint8 -> (B,) float64, inf if equal."""
    return _psnr(a.cpu().double(), b.cpu().double())


def psnr_y(a, b, crop):
    """PSNR in dB of the luma, without `crop` pixels at each border: a, b (B, 3, H, W) uint8 -> (B,) float64, inf if equal."""
    return _psnr(luma(a, crop), luma(b, crop))


def _psnr(a, b):
    return 10 * torch.log10(255**2 / (a - b).square().mean(dim=(1, 2, 3)))


def luma(x, crop=0):
    """BT.601 luma in the limited range 16 to 235, not rounded, less `crop` pixels at each border: uint8 (B, 3, H, W) -> (B, 1, h, w) float64.

    The range is the super-resolution literature's; in the full range every PSNR reads 20 log10(255/219) = 1.3219 dB lower.
    """
    x = x[..., crop : x.shape[-2] - crop, crop : x.shape[-1] - crop].cpu().double() / 255
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    return (x * weights.view(3, 1, 1)).sum(dim=1, keepdim=True) + 16


def ssim_y(a, b, crop):
    """SSIM of the luma (Wang et al. 2004) without `crop` pixels at each border: a, b (B, 3, H, W) uint8 -> (B,) float64.

    11x11 Gaussian of deviation 1.5, K1 .01, K2 .03, range 255, the mean over where the window fits.
    Raises ValueError when it fits nowhere.
    """
    if min(a.shape[-2:]) < WINDOW + 2 * crop:
        raise ValueError(f"{a.shape[-2]} x {a.shape[-1]} less {crop} at each border is smaller than SSIM's {WINDOW} x {WINDOW} window")
    g = torch.exp(-(torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2 / (2 * 1.5**2))
    g = (g / g.sum()).view(1, 1, WINDOW, 1)

    def mean(x):  # the Gaussian is separable: columns, then rows
        return F.conv2d(F.conv2d(x, g), g.mT)

    a, b = luma(a, crop), luma(b, crop)
    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    s = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return s.mean(dim=(1, 2, 3))


# --- NIQE (Mittal et al. 2013), without a true picture: how far the statistics of a picture's blocks are from good photographs' ---

NIQE_MODEL = Path(__file__).parent / "assets" / "niqe_pris_params.npz"  # of good photographs: mean and covariance of 36 features
BLOCK = 96  # side of a block in pixels
SHAPES = np.arange(0.2, 10.001, 0.001)  # exponents that are tried for a generalised Gaussian
MOMENTS = special.gamma(2 / SHAPES) ** 2 / (special.gamma(1 / SHAPES) * special.gamma(3 / SHAPES))  # E|x|^2 / E x^2 of each


def niqe(a):
    """NIQE of each picture, lower is better: a (B, 3, H, W) uint8 -> (B,) float64. Of the luma (16 to 235, rounded), as BasicSR has it.

    With features f of the blocks, of mean mu and covariance S, and mu_0 and S_0 those of good photographs:
    sqrt((mu - mu_0)^T ((S + S_0) / 2)^-1 (mu - mu_0)). In float64, as MATLAB's; the float32 halving of Python's versions moves
    small pictures by up to .01. Raises InputError for a picture of less than two blocks of 96 x 96.
    """
    if (a.shape[2] // BLOCK) * (a.shape[3] // BLOCK) < 2:
        raise InputError(f"NIQE needs two blocks of {BLOCK} x {BLOCK} pixels: {a.shape[3]} x {a.shape[2]} is too small")
    good = np.load(NIQE_MODEL)
    return torch.tensor([_niqe(y, good["mu_pris_param"], good["cov_pris_param"]) for y in luma(a).round()[:, 0].numpy()], dtype=torch.float64)


def _niqe(y, good_mean, good_covariance):
    y = y[: y.shape[0] // BLOCK * BLOCK, : y.shape[1] // BLOCK * BLOCK]
    features = np.hstack([block_features(normalised(y), BLOCK), block_features(normalised(halved(y)), BLOCK // 2)])  # (blocks, 36)
    whole = features[~np.isnan(features).any(1)]
    d = good_mean - np.nanmean(features, axis=0)
    return float(np.sqrt(d @ np.linalg.pinv((good_covariance + np.cov(whole, rowvar=False)) / 2) @ d.T).item())


def normalised(y):
    """y (H, W) less its local mean, in units of its local deviation plus 1: what is left of a good photograph is nearly Gaussian."""
    mean = lambda x: ndimage.gaussian_filter(x, 7 / 6, mode="nearest", radius=3)
    mu = mean(y)
    return (y - mu) / (np.sqrt(np.abs(mean(y * y) - mu * mu)) + 1)


def halved(y):
    """y (H, W) at half its size by MATLAB's imresize: Keys' cubic, twice as wide, the edges mirrored."""
    d = np.array([3.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 3.5]) / 2
    kernel = np.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
    for axis in (0, 1):
        y = ndimage.correlate1d(y, kernel / kernel.sum(), axis=axis, mode="reflect")
        y = y.take(range(1, y.shape[axis], 2), axis=axis)
    return y


def block_features(x, side):
    """The 18 features of each block of x (H, W): shape and width of the values, and of their products with four neighbours: (blocks, 18)."""
    h, w = (n // side for n in x.shape)
    blocks = x.reshape(h, side, w, side).swapaxes(1, 2).reshape(h * w, side, side)
    shape, left, right = asymmetric_gaussian(blocks)
    features = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = asymmetric_gaussian(blocks * np.roll(blocks, shift, axis=(1, 2)))
        features += [shape, (right - left) * special.gamma(2 / shape) / special.gamma(1 / shape), left, right]
    return np.stack(features, axis=1)


def asymmetric_gaussian(blocks):
    """The generalised Gaussian, with a width for each side, that has the moments of each block's values: shape, left, right, (blocks,) each."""
    values = blocks.reshape(len(blocks), -1)
    rms = lambda part: np.sqrt((np.square(values) * part).sum(1) / part.sum(1))
    left, right = rms(values < 0), rms(values > 0)
    ratio = left / right
    moment = np.abs(values).mean(1) ** 2 / np.square(values).mean(1) * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shape = SHAPES[np.abs(MOMENTS - moment[:, None]).argmin(1)]
    width = np.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
    return shape, left * width, right * width


# --- networks: found on this machine, never downloaded ---


def load_lpips(backbone=None, device="cpu"):
    """LPIPS v0.1 with AlexNet: a function of two (B, 3, H, W) in [-1, 1] to (B,), or None when no AlexNet is found.

    backbone: a file of torchvision's AlexNet weights; else the file OFTSR_LPIPS_ALEX names; else torchvision's
    cache. Never downloads. Raises InputError when the file named is not there or not an AlexNet.
    """
    file = backbone or os.environ.get("OFTSR_LPIPS_ALEX")
    if not file:
        cached = sorted(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-owt-*.pth"))
        if not cached:
            if os.environ.get("RANK", "0") == "0":
                print("LPIPS is left out: no AlexNet in torchvision's cache (name a file with --lpips_backbone or OFTSR_LPIPS_ALEX)", file=sys.stderr)
            return None
        file = cached[0]
    if not Path(file).is_file():
        raise InputError(f"no AlexNet weights at {file}")
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        state = None
    import lpips
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's advice about arguments that lpips passes
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).to(device).eval().requires_grad_(False)
    layers = {name: p for part in (metric.net.slice1, metric.net.slice2, metric.net.slice3, metric.net.slice4, metric.net.slice5)
              for name, p in part.named_parameters()}
    features = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")} if isinstance(state, dict) else {}
    if features.keys() != layers.keys() or any(features[k].shape != layers[k].shape for k in layers):
        raise InputError(f"{file} does not hold torchvision's AlexNet features")
    for name, p in layers.items():
        p.data.copy_(features[name])

    def distance(a, b):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # metrics in float32, on a GPU too
            return metric(a, b).flatten()
    return distance


def pick_metrics(crop, lpips, device):
    """{name: function of a, b (B, 3, H, W) uint8 -> (B,)}: what `measure` goes through. crop: of the luma's border, pixels; lpips: load_lpips's."""
    chosen = dict(psnr_rgb=psnr_rgb, psnr_y=lambda a, b: psnr_y(a, b, crop), ssim_y=lambda a, b: ssim_y(a, b, crop))
    if lpips:
        chosen["lpips"] = lambda a, b: lpips(to_float(a).to(device), to_float(b).to(device))
    return chosen


def measure(restored, truth, crop, metrics):
    """Every metric of one picture file against another: a dict of floats. Raises InputError that names what does not fit."""
    a, b = (torch.from_numpy(read_image(p)).permute(2, 0, 1)[None] for p in (restored, truth))
    if a.shape != b.shape:
        raise InputError(f"{restored} is {a.shape[3]} x {a.shape[2]}, but {truth} is {b.shape[3]} x {b.shape[2]}")
    check_size(truth, *b.shape[2:], crop)
    return {name: metric(a, b).item() for name, metric in metrics.items()}


def check_size(path, height, width, crop):
    least = max(32, WINDOW + 2 * crop)  # AlexNet's pooling leaves nothing of less than 31, SSIM's window must fit
    if min(height, width) < least:
        raise InputError(f"{path} is {width} x {height}: the metrics need at least {least} pixels a side")
