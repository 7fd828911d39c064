"""NIQE (Mittal, Soundararajan and Bovik 2013): how unlike good photographs a picture is, with no true picture beside it.

A picture is cut into blocks, each described by 36 numbers: the shape and width of the distribution of its pixels, brought to
local mean 0 and deviation 1, and of their products with their neighbours, at two scales. Good photographs have these numbers
distributed as assets/niqe_pris_params.npz says; NIQE is the distance of the picture's own distribution from that.
"""
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage, special

from console import InputError

NIQE_MODEL = Path(__file__).parent / "assets" / "niqe_pris_params.npz"  # of good photographs: mean and covariance of 36 features
BLOCK = 96  # side of a block in pixels
SHAPES = np.arange(0.2, 10.001, 0.001)  # exponents that are tried for a generalised Gaussian
MOMENTS = special.gamma(2 / SHAPES) ** 2 / (special.gamma(1 / SHAPES) * special.gamma(3 / SHAPES))  # E|x|^2 / E x^2 of each


def niqe(y):
    """NIQE of pictures, lower is better: luma y (B, 1, H, W) from 16 to 235, which is rounded, as BasicSR does -> (B,) float64.

    With features f of the blocks, of mean mu and covariance S, and mu_0 and S_0 those of good photographs:
    sqrt((mu - mu_0)^T ((S + S_0) / 2)^-1 (mu - mu_0)). In float64, as MATLAB's; the float32 halving of Python's versions moves
    small pictures by up to .01. Raises InputError for a picture of less than two blocks of 96 x 96.
    """
    check_blocks("a picture", *y.shape[2:])
    good = np.load(NIQE_MODEL)
    return torch.tensor([_niqe(y, good["mu_pris_param"], good["cov_pris_param"]) for y in y[:, 0].cpu().double().round().numpy()], dtype=torch.float64)


def check_blocks(what, height, width):
    """Raises InputError, which names `what`, if it is too small."""
    if (height // BLOCK) * (width // BLOCK) < 2:
        raise InputError(f"NIQE needs two blocks of {BLOCK} x {BLOCK} pixels: {what} of {width} x {height} is too small")


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
