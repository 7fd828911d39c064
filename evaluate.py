"""Metrics."""
import os
import sys
import warnings
from pathlib import Path

import torch

from model import InputError


def psnr_rgb(a, b):
    """PSNR in dB of each picture over all of its pixels and channels: a, b (B, 3, H, W) uint8 -> (B,) float64."""
    mse = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / mse)


def load_lpips(backbone=None, device="cpu"):
    """LPIPS v0.1 with AlexNet: a function of two (B, 3, H, W) in [-1, 1] to (B,), or None when no AlexNet is found.

    backbone: a file of torchvision's AlexNet weights; else the file OFTSR_LPIPS_ALEX names; else torchvision's
    cache. Never downloads. Raises InputError when the file named is not there or not an AlexNet.
    """
    file = backbone or os.environ.get("OFTSR_LPIPS_ALEX")
    if file is None:
        cached = sorted(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-owt-*.pth"))
        if not cached:
            print("LPIPS is left out: no AlexNet in torchvision's cache (name a file with --lpips_backbone or OFTSR_LPIPS_ALEX)", file=sys.stderr)
            return None
        file = cached[0]
    if not Path(file).is_file():
        raise InputError(f"no AlexNet weights at {file}")
    import lpips
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's advice about arguments that lpips passes
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).to(device).eval().requires_grad_(False)
    state = torch.load(file, map_location=device, weights_only=True)
    features = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
    layers = {name: p for part in (metric.net.slice1, metric.net.slice2, metric.net.slice3, metric.net.slice4, metric.net.slice5)
              for name, p in part.named_parameters()}
    if features.keys() != layers.keys() or any(features[k].shape != layers[k].shape for k in layers):
        raise InputError(f"{file} does not hold torchvision's AlexNet features")
    for name, p in layers.items():
        p.data.copy_(features[name])
    return lambda a, b: metric(a, b).flatten()
