"""A picture's pixels between a file and the network: to sRGB, to another depth, to float and back, colour and alpha apart, resampled.

Pixels are (H, W, C) uint8 or uint16: C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha); alpha is straight. No torch, no files.
"""
import struct
from functools import lru_cache

import numpy as np
from PIL import Image

BAND = 4_000_000  # pixels that are converted at a time


# --- to sRGB ---


@lru_cache(maxsize=None)
def srgb_profile(space="rgb"):
    """The ICC profile of sRGB, or of gray with sRGB's curve, the same bytes whenever it is made."""
    if space == "gray":
        import imagecodecs
        x = np.linspace(0, 1, 1024)
        curve = np.rint(65535 * np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)).astype(np.uint16)
        profile = imagecodecs.cms_profile("gray", whitepoint=[0.3127, 0.3290, 1.0], transferfunction=curve)
    else:
        from PIL import ImageCms
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]  # the date


def to_srgb(pixels, space, profile, notes):
    """Pixels (H, W, C) of colour space "gray", "rgb" or "cmyk" and an ICC profile (or None) as gray or RGB in sRGB; alpha, if there is, follows.

    Relative colorimetric with black point compensation: a colour that sRGB holds stays, white is white, the nearest
    is taken of others. A profile that says sRGB leaves the pixels as they are. What cannot be used adds a line to notes.
    """
    colours = {"gray": 1, "rgb": 3, "cmyk": 4}[space]
    colour, alpha = pixels[..., :colours], pixels[..., colours:]
    kind = profile[16:20].strip().lower().decode("ascii", "replace") if profile else None
    if kind is not None and kind != space and not (kind == "rgb" and space == "gray"):
        notes.append("its colour profile is for other colours than it has, and is not used")
        kind = None
    try:
        if kind is not None:
            colour = _through_profile(colour, space, kind, profile)
    except Exception as e:  # imagecodecs' own classes
        notes.append(f"its colour profile is broken and not used ({str(e).splitlines()[0] if str(e) else type(e).__name__})")
        kind = None
    if kind is None and space == "cmyk":
        notes.append("CMYK without a usable profile: its colours are a guess")
        colour = in_bands(_guess_rgb, colour, colour.dtype)
    return np.concatenate([colour, alpha], axis=-1) if alpha.shape[2] else colour


def _through_profile(colour, space, kind, profile):
    largest = np.iinfo(colour.dtype).max
    if space == "gray":  # as many values as there are grays
        ramp = (np.arange(largest + 1) * (65535 // largest)).astype(np.uint16)[None, :, None]
        values = np.rint(_transform(ramp if kind == "gray" else ramp.repeat(3, -1), kind, profile).mean(-1))
        if np.abs(values - ramp[..., 0]).max() < 257:
            return colour
        return to_depth(values.astype(np.uint16), colour.dtype)[0][colour]
    if space == "rgb" and _is_srgb(profile):
        return colour
    return in_bands(lambda rows: _transform(rows, space, profile), colour, colour.dtype)


def in_bands(convert, pixels, dtype):
    """(H, W, C) as (H, W, 3) of dtype by convert, which takes some rows and gives (n, W, 3), or (n, W, 1), which counts three times: of what it needs beside them, a band's."""
    out = np.empty((*pixels.shape[:2], 3), dtype)
    rows = max(1, BAND // pixels.shape[1])
    for y in range(0, len(pixels), rows):
        out[y : y + rows] = convert(pixels[y : y + rows])
    return out


def _guess_rgb(cmyk):
    largest = np.iinfo(cmyk.dtype).max
    rest = largest - cmyk.astype(np.float32)
    return np.rint(rest[..., :3] * rest[..., 3:] / largest).astype(cmyk.dtype)


def _transform(colour, space, profile):
    import imagecodecs
    flags = imagecodecs.CMS.FLAGS.BLACKPOINTCOMPENSATION
    if colour.dtype == np.uint16:
        flags |= imagecodecs.CMS.FLAGS.NOOPTIMIZE  # its table of 16-bit colours is off by up to 15 of 255
    colour = np.ascontiguousarray(colour[..., 0] if space == "gray" else colour)
    return imagecodecs.cms_transform(colour, profile, srgb_profile(), colorspace=space, outcolorspace="rgb",
                                     intent=imagecodecs.CMS.INTENT.RELATIVE_COLORIMETRIC, flags=flags)


@lru_cache(maxsize=64)
def _is_srgb(profile):
    """Whether a profile is sRGB under whatever name: it moves no colour by as much as a step in 255."""
    steps = np.linspace(0, 65535, 9).astype(np.uint16)
    chart = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    return np.abs(_transform(chart, "rgb", profile).astype(int) - chart).max() < 257


# --- to the network and back ---


def to_depth(pixels, dtype):
    """uint8 or uint16 pixels as either: 255 and 65535 are the same white."""
    if pixels.dtype == dtype:
        return pixels
    if dtype == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_planes(colour):
    """(H, W, 1 or 3) uint8 or uint16 as (3, H, W) float32 in [-1, 1]; gray three times."""
    planes = colour.astype(np.float32) / np.float32(np.iinfo(colour.dtype).max / 2) - 1
    return np.ascontiguousarray(np.broadcast_to(planes, (*planes.shape[:2], 3)).transpose(2, 0, 1))


def from_planes(planes, channels, dtype):
    """(3, H, W) float in [-1, 1], clamped, as (H, W, channels) uint8 or uint16; channels 1: the mean of the three."""
    half = np.float32(np.iinfo(dtype).max / 2)
    planes = planes.mean(0, keepdims=True) if channels == 1 else planes
    return np.rint(np.clip(planes, -1, 1) * half + half).astype(dtype).transpose(1, 2, 0)


def split_alpha(pixels):
    """(H, W, C) as colour (H, W, 1 or 3) and alpha (H, W, 1), or None where there is none, made for enlarging each on its own.

    The colour of a pixel counts by its alpha: where nothing shows it is made from what shows nearby, so that no
    restoring or resampling brings in what was hidden, and edges get no fringes.
    """
    colours = 3 if pixels.shape[2] >= 3 else 1
    colour, alpha = pixels[..., :colours], pixels[..., colours:]
    if not alpha.shape[2]:
        return colour, None
    largest = np.iinfo(pixels.dtype).max
    if alpha.min(initial=largest) == largest or not alpha.any():
        return colour, alpha
    weight = alpha.astype(np.float32) / largest
    filled = _spread(colour.astype(np.float32) * weight, weight)
    return np.rint(np.clip(filled, 0, largest)).astype(pixels.dtype), smooth_stairs(alpha)


def smooth_stairs(alpha):
    """Alpha (H, W, 1) whose hard edges, all or nothing from pixel to pixel, follow the line that their stairs stand for; made for enlarging.

    Straight borders, lines and gaps thinner than 3 pixels, and edges that are soft already stay as they are.
    """
    largest = np.iinfo(alpha.dtype).max
    a = alpha[..., 0].astype(np.float32) / largest
    low, high = _around(a, np.minimum), _around(a, np.maximum)
    between = (a > low + 0.02) & (a < high - 0.02)
    thin = (_around(low, np.maximum) != a) | (_around(high, np.minimum) != a)
    stairs = (high - low > 0.02) & ~_around(between | thin, np.maximum)
    if not stairs.any():
        return alpha
    # Beside a straight border, 1/2 pixel away, this blur is 0.69 or 0.31: the slope takes these back to 1 and 0.
    share = (_blurred(a) - low) / np.maximum(high - low, 0.02)
    line = low + (high - low) * np.clip(0.5 + 2.6 * (share - 0.5), 0, 1)
    return np.rint(largest * np.where(stairs, line, a)).astype(alpha.dtype)[..., None]


def _around(x, extreme):
    """The least or the largest of each pixel's 3 x 3 neighbours, x (H, W)."""
    for axis in (0, 1):
        x = np.pad(x, [(1, 1) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        n = x.shape[axis]
        x = extreme.reduce([x.take(range(i, n - 2 + i), axis) for i in range(3)])
    return x


def _blurred(x):
    """x (H, W) under a Gaussian of one pixel."""
    weights = np.exp(-np.arange(-3, 4) ** 2 / 2).astype(np.float32)
    for axis in (0, 1):
        x = np.pad(x, [(3, 3) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        n = x.shape[axis]
        x = sum(w * x.take(range(i, n - 6 + i), axis) for i, w in enumerate(weights / weights.sum()))
    return x


def _spread(premultiplied, weight):
    """Colour everywhere from premultiplied colour (H, W, C) and weight (H, W, 1) in [0, 1]: each pixel's own share, the rest from a coarser level."""
    H, W = weight.shape[:2]
    if max(H, W) <= 1:
        return premultiplied / np.maximum(weight, 1e-6)

    def halved(x):
        x = np.pad(x, ((0, H % 2), (0, W % 2), (0, 0)))
        return x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]

    w = halved(weight)
    scale = 1 / np.maximum(w, 1)
    coarse = _spread(halved(premultiplied) * scale, w * scale)
    return premultiplied + (1 - weight) * _doubled(coarse)[:H, :W]


def _doubled(x):
    """(h, w, C) to (2h, 2w, C), linearly between pixel centres."""
    for axis in (0, 1):
        before = np.concatenate([x.take([0], axis), x], axis).take(range(x.shape[axis]), axis)
        after = np.concatenate([x, x.take([-1], axis)], axis).take(range(1, x.shape[axis] + 1), axis)
        x = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x


def resized(pixels, height, width, top=0, bottom=None, resample=Image.BICUBIC):
    """Rows top to bottom of pixels (H, W, C) uint8 or uint16 resampled to (height, width), antialiased: the same rows whatever is asked with them.

    For alpha, and for sizes that are not the network's; only the input's rows that these need are touched.
    """
    H, W = pixels.shape[:2]
    bottom = height if bottom is None else bottom
    scale, reach = H / height, 4 * max(1, H / height) + 2
    first, last = max(0, int(top * scale - reach)), min(H, int(bottom * scale + reach) + 1)
    box = (0, top * scale - first, W, bottom * scale - first)
    largest = np.iinfo(pixels.dtype).max
    planes = [np.asarray(Image.fromarray(np.asarray(pixels[first:last, :, c], np.float32)).resize((width, bottom - top), resample, box))
              for c in range(pixels.shape[2])]
    return np.rint(np.clip(np.stack(planes, axis=-1), 0, largest)).astype(pixels.dtype)


def on_white(pixels):
    """Straight alpha laid on white, (H, W, C) to (H, W, 1 or 3)."""
    colours = 3 if pixels.shape[2] >= 3 else 1
    if pixels.shape[2] == colours:
        return pixels
    largest = np.iinfo(pixels.dtype).max
    alpha = pixels[..., colours:].astype(np.float32) / largest
    return np.rint(pixels[..., :colours] * alpha + largest * (1 - alpha)).astype(pixels.dtype)


def as_rgb(pixels):
    """Gray three times, RGB as it is; alpha, if there is, follows."""
    return np.concatenate([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=-1) if pixels.shape[2] < 3 else pixels


def rgb8(pixels):
    """(H, W, C) uint8 or uint16 as RGB, uint8 (H, W, 3): rounded to 8 bits, transparency laid on white."""
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return pixels
    return in_bands(lambda rows: on_white(to_depth(rows, np.uint8)), pixels, np.uint8)
