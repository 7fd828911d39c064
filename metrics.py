"""What is measured of restored pictures: one function a metric, and what it needs found on this machine.

    psnr_rgb, psnr_y, ssim_y     arithmetic, against the true picture
    lpips                        AlexNet's opinion, against the true picture

A picture's metric is a function of two batches, restored and true, (B, 3, H, W) uint8, to (B,). `pick_metrics` makes the
table of those that a run measures; `measure` reads two files and goes through it.
"""
import os
import pickle
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from console import InputError
from degradations import to_float
from pictures import read_image

METRICS = {"psnr_rgb": 3, "psnr_y": 3, "ssim_y": 4, "lpips": 4}  # decimals
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
                print("LPIPS is left out, as it needs torchvision's AlexNet: python -c 'import torchvision; torchvision.models.alexnet(weights=\"DEFAULT\")' "
                      "fetches it (233 MB), or name a file with --lpips_backbone or OFTSR_LPIPS_ALEX", file=sys.stderr)
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
