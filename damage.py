"""What happened to a picture before one has it, told from its file and its pixels: where the second dial should stand.

    denoise, why = judge(picture)      # 0 or 1, and the reason in words

A JPEG shows in its file, and in its pixels wherever they were saved since: at its grid of 8 x 8 blocks coefficients lie at 0,
between its lines they do not. Strong noise shows where a picture is flat, strong blur as fine detail that is missing.
Mild noise and mild blur do not show: texture looks like the one, a smooth subject like the other (LOG.md). No torch.
"""
import numpy as np
from scipy.fft import dctn

MOST = 256  # pixels a side, the middle of the picture: enough to see it, and quick
COARSE_JPEG = 90  # quality below which the real network is the better one: about there the two are level (LOG.md)
GRID, NOISE, SOFT = 0.1, 6.5, -3.7  # the bounds of the three measures, between 60 clean reductions and what damaged them (LOG.md)
PLACE = np.add.outer(np.arange(8), np.arange(8))  # of a coefficient in its block: how fine it is


def judge(picture):
    """(denoise, why in words) of a pictures.Picture: 1 where something to take away is seen, else 0."""
    jpeg = picture.quality is not None
    if jpeg and picture.quality < COARSE_JPEG:
        return 1.0, f"a JPEG of quality {picture.quality:.0f}"
    y = luma(picture.pixels)
    if min(y.shape) < 24:
        return 0.0, "too small to tell"
    if not jpeg and jpeg_grid(y) > GRID:  # how coarse it was the grid hardly says
        return 1.0, "it was a JPEG"
    if (sigma := noise(y)) > NOISE:
        return 1.0, f"noise of {sigma:.0f} of 255"
    if softness(y) < SOFT:
        return 1.0, "it is blurred"
    return 0.0, f"a fine JPEG, of quality {picture.quality:.0f}" if jpeg else "no damage seen"


def luma(pixels):
    """The middle of a picture (H, W, C) of uint8 or uint16 as brightness, at most (MOST, MOST) float32 in [0, 255]. Alpha is left out."""
    top, left = (max(0, (side - MOST) // 2) for side in pixels.shape[:2])
    part = pixels[top : top + MOST, left : left + MOST].astype(np.float32) / (257 if pixels.dtype == np.uint16 else 1)
    return part[..., :3] @ np.float32([0.299, 0.587, 0.114]) if part.shape[2] > 2 else part[..., 0]


def coefficients(y, dy=0, dx=0):
    """Absolute DCT coefficients of the 8 x 8 blocks from the pixel (dy, dx) on: (N, 8, 8)."""
    y = y[dy:, dx:]
    h, w = (n // 8 for n in y.shape)
    return np.abs(dctn(y[: 8 * h, : 8 * w].reshape(h, 8, w, 8).swapaxes(1, 2).reshape(-1, 8, 8), axes=(1, 2), norm="ortho"))


def jpeg_grid(y):
    """How much more of the fine coefficients of blocks with something in them are 0 on the best of the 64 grids than on the usual one.

    Of what never was a JPEG, or was resized since, below .06; of a JPEG of quality 97 .15 to .4, of a coarser one more.
    """
    shares = []
    for place in range(64):
        c = coefficients(y, *divmod(place, 8))
        busy = c[:, (PLACE > 0) & (PLACE < 5)].max(1) > 4
        shares.append((c[busy][:, PLACE >= 8] < 0.5).mean() if busy.any() else 0.0)  # .5: rounding to 8 bits moves them by .29
    return max(shares) - np.median(shares)


def noise(y):
    """The deviation of the noise, of 255, where the picture is flattest: Immerkaer's (1996), of the 5 % of quietest 8 x 8 patches."""
    m = np.abs(sum(k * y[i : i + y.shape[0] - 2, j : j + y.shape[1] - 2] for k, i, j in
                   ((1, 0, 0), (-2, 0, 1), (1, 0, 2), (-2, 1, 0), (4, 1, 1), (-2, 1, 2), (1, 2, 0), (-2, 2, 1), (1, 2, 2))))
    h, w = (n // 8 for n in m.shape)
    patches = m[: 8 * h, : 8 * w].reshape(h, 8, w, 8).mean((1, 3))
    return float(np.percentile(patches, 5)) * np.sqrt(np.pi / 2) / 6


def softness(y):
    """The logarithm of fine detail over coarse: -2.6 to -.7 of sharp pictures, less of blurred ones."""
    c = coefficients(y).mean(0)
    return float(np.log(c[PLACE >= 8].mean() + 0.05) - np.log(c[(PLACE >= 2) & (PLACE < 4)].mean() + 0.05))
