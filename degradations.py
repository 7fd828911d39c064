"""What was done to a picture before one has it: H, the measurement, and H^T, the way back to full size.

    python degradations.py --strength 1 assets/cat.png -o draws.png    # nine accidents of one photograph, to look at
    x_lr = degrade(x_1, task, seeds)      # x_lr = H^T(H(x_1) + n), (B, 3, H, W) in [-1, 1], every draw of a picture from its seed

H is "bicubic", "avgpool", or "real": what happens to pictures in the world, as Real-ESRGAN guesses it (Wang et al. 2021),
with the settings of ResShift (Yue et al. 2023), which are the paper's Tables 4 to 6:

    round 1     blur (lens, motion)  ->  resize  ->  noise (sensor)  ->  JPEG
    round 2     half of the pictures go through it again: blur  ->  resize  ->  noise
    the end     resize to 1/scale and a sinc filter, whose rings are sharpening's; and JPEG; in either order; 8 bits

A strength in [0, 1] scales all of it: 1 is as published, 0 is bicubic reduction to 8 bits and nothing else. What is drawn,
a few dozen numbers a picture, is drawn by `draw`; what is done with them, pixel by pixel, follows below it in that order.
"""
import functools
import math
import sys
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

import kernels
from kernels import reference
from kernels.reference import MASK, philox


def to_float(x):
    """uint8 to [-1, 1] float32, any shape."""
    return x.float() / 127.5 - 1


def least_multiple(scale):
    """The smallest whole number of pixels that scale divides into a whole number: of 4 it is 4, of 3.5 7."""
    return Fraction(str(scale)).numerator


def H(x, degradation, scale):
    """Down-sampling: x (B, C, H, W) to (B, C, H/scale, W/scale). H and W are multiples of scale, which bicubic takes as a fraction too (3.5)."""
    if x.shape[-2] % least_multiple(scale) or x.shape[-1] % least_multiple(scale):
        raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} is not a multiple of the scale {scale}")
    if degradation == "avgpool":
        return F.avg_pool2d(x, scale)
    return F.interpolate(x, size=[round(side / scale) for side in x.shape[-2:]], mode="bicubic", antialias=True)


def H_T(y, degradation, scale):
    """Back to full size: y (B, C, h, w) to (B, C, h scale, w scale); pixel repetition for avgpool, else bicubic."""
    if degradation == "avgpool":
        return y.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    return F.interpolate(y, size=[round(side * scale) for side in y.shape[-2:]], mode="bicubic", antialias=True)


def degrade(x_1, task, seeds):
    """x_lr = H^T(H(x_1) + n): x_1 (B, 3, H, W) in [-1, 1] to the low-resolution picture at full size, in float."""
    return H_T(observe(x_1, task, seeds), task.degradation, task.scale)


def observe(x_1, task, seeds):
    """y = H(x_1) + n, the low-resolution picture itself: x_1 (B, 3, H, W) in [-1, 1] to (B, 3, H/scale, W/scale).

    n has standard deviation task.sigma_n and comes from stream 1 of seeds (B,) int64. task.eight_bit: what H gives is
    clamped and rounded as it is in a file; "real" always is.
    """
    if task.degradation == "real":
        y = real(x_1, seeds, task.scale, task.strength)
    else:
        y = H(x_1, task.degradation, task.scale)
    if task.sigma_n:
        y = y + task.sigma_n * kernels.normal(seeds, y.shape, stream=1)
    if task.eight_bit:
        y = to_float((y.clamp(-1, 1) * 127.5 + 127.5).round())
    return y


# --- the published values ---

BLURS = {"iso": 0.45, "aniso": 0.25, "generalized_iso": 0.12, "generalized_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03}
SINC = 0.1  # chance that a blur is a sinc filter instead of these
BETA = {"generalized": (0.5, 4.0), "plateau": (1.0, 2.0)}  # their shape: below 1 and above it with equal chance
METHODS = ("area", "bilinear", "bicubic")  # of resizing, none antialiased, with equal chance
GRAY = 0.4  # chance that the three channels share their noise
JPEG = (30, 95)  # quality
END_SINC, END_SIZES = 0.8, range(3, 15, 2)  # of the last filter


@dataclass(frozen=True)
class Round:
    chance: float  # that a picture goes through it
    blur: float  # chance of a blur
    sizes: range  # of its kernel
    sigma: tuple
    resize: tuple  # chances of up, down, neither
    ratio: tuple  # of resizing: of the picture's size in round 1, of the final size in round 2
    gaussian: tuple  # deviation of the noise, of 255; half of the pictures have Poisson noise instead,
    poisson: tuple  # that of photons counted, times this


ROUNDS = (Round(1.0, 1.0, range(3, 21, 2), (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0)),
          Round(0.5, 0.8, range(3, 15, 2), (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5)))
PARAMETERS, NOISES = 2, (3, 4)  # Philox streams: of what is drawn once a picture, and of the two rounds' noise


# --- what is drawn ---


@dataclass
class Damage:
    """What one round does to one picture. The defaults do nothing."""
    kernel: np.ndarray = None  # (k, k)
    ratio: float = 1.0
    method: str = "area"
    gaussian: bool = True  # else Poisson
    noise: float = 0.0  # deviation on [0, 1], or the factor of Poisson noise
    gray: bool = False


@dataclass
class Harm:
    """All that is done to one picture."""
    strength: float
    rounds: tuple  # of Damage
    quality: float  # of the JPEG that ends round 1; None: no JPEG
    method: str  # of the last resizing: METHODS or "antialiased"
    kernel: np.ndarray  # the last filter, or None
    last_quality: float
    jpeg_last: bool  # after resizing and filter, else before


class Dice:
    """The uniform numbers of one picture, one after another. Each question takes its number whatever the others' answers:
    the same seed under another strength is the same accident, only milder."""

    def __init__(self, numbers):
        self.roll = iter(numbers.tolist()).__next__

    def between(self, low, high):
        return low + (high - low) * self.roll()

    def chance(self, p):
        return self.roll() < p

    def pick(self, chances):
        """A key of {key: chance}; a sequence stands for equal chances."""
        chances = chances if isinstance(chances, dict) else dict.fromkeys(chances, 1 / len(chances))
        u = self.roll()
        for key, p in chances.items():
            if (u := u - p) < 0:
                return key
        return key


def uniforms(seeds, count):
    """Numbers in [0, 1) that are a function of the seed and their place alone: seeds (B,) int64 -> (B, count) float64, on the CPU."""
    seeds = seeds.cpu()[:, None]
    place = torch.arange(-(-count // 4))[None]
    zero = torch.zeros_like(place)
    words = philox((place, zero, zero, zero + PARAMETERS), (seeds & MASK, (seeds >> 32) & MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :count].double().numpy() * 2.0**-32


def draw_strength(dice):
    """How strong the harm to a picture is in training: 0 for .15 of them, 1 for .15, else uniform between, so that half lies below 1/2."""
    end, s = dice.roll(), dice.roll()
    return 0.0 if end < 0.15 else 1.0 if end >= 0.85 else s


def milder(values, strength, harmless):
    """A range of values, drawn towards the value that does no harm: the whole range at 1, that value alone at 0."""
    return [harmless + strength * (v - harmless) for v in values]


def onset(strength):
    return min(1, 4 * strength)


def draw(numbers, strength=-1.0):
    """What is done to a picture, from its uniform numbers: a Harm. strength in [0, 1]; -1: drawn, too.

    Below strength 1 every range shrinks towards no harm (`milder`), what always happens does so with chance (1 + strength) / 2,
    what the end adds with chance `strength` of its own, and instead of the last sinc filter there may be sharpening, as
    phones do: an unsharp mask. Blurs and masks, which no range makes harmless, come in over the first quarter of strength.
    """
    dice = Dice(numbers)
    drawn = draw_strength(dice)
    s = drawn if strength < 0 else strength
    often = (1 + s) / 2
    rounds = tuple(damage for r in ROUNDS if (damage := draw_round(dice, r, s, often)))
    quality, jpeg = dice.between(*milder(JPEG, s, 98)), dice.chance(often)
    method, antialiased = dice.pick(METHODS), not dice.chance(s)
    sinc = dice.pick(END_SIZES), dice.between(*milder((math.pi / 3, math.pi), s, math.pi))
    sharp = dice.between(0, onset(s)), dice.between(0.5, 1.5)
    filtered, sharpened = dice.chance(END_SINC * s), dice.chance((1 - s) / 2)
    kernel = sinc_kernel(*sinc) if filtered else unsharp_kernel(*sharp) if sharpened else None
    last_quality, last_jpeg = dice.between(*milder(JPEG, s, 98)), dice.chance(often)
    return Harm(s, rounds, quality if jpeg else None, "antialiased" if antialiased else method, kernel,
                last_quality if last_jpeg else None, dice.chance(0.5))


def draw_round(dice, r, s, often):
    """One round's Damage at strength s, or None if the picture is spared."""
    spared = not dice.chance(r.chance * (s if r.chance < 1 else 1))
    make_kernel, blurred = draw_kernel(dice, r, s), dice.chance(r.blur * often)
    way, resized = dice.pick(dict(zip(("up", "down", "keep"), r.resize))), dice.chance(often)
    low, high = milder(r.ratio, s, 1)
    up, down, method = dice.between(1, high), dice.between(low, 1), dice.pick(METHODS)
    gaussian, noisy = dice.chance(0.5), dice.chance(often)
    noise = dice.between(*milder([g / 255 for g in r.gaussian] if gaussian else r.poisson, s, 0))
    gray = dice.chance(GRAY)
    ratio = {"up": up, "down": down, "keep": 1.0}[way] if resized else 1.0
    return None if spared else Damage(make_kernel() if blurred else None, ratio, method, gaussian, noise if noisy else 0.0, gray)


def draw_kernel(dice, r, s):
    """A function that makes a blur of one of the six kinds, or a sinc filter: (k, k) float64. Making takes longer than drawing, and half are not wanted."""
    size, sinc, kind = dice.pick(r.sizes), dice.chance(SINC), dice.pick(BLURS)
    lowest = math.pi / 3 if size < 13 else math.pi / 5
    cutoff = dice.between(*milder((lowest, math.pi), s, math.pi))
    sigma = milder(r.sigma, s, r.sigma[0])
    sigma_x, sigma_y, angle = dice.between(*sigma), dice.between(*sigma), dice.between(-math.pi, math.pi)
    below, place = dice.chance(0.5), dice.roll()
    shape, _, spread = kind.rpartition("_")
    low, high = BETA.get(shape, (1.0, 1.0))
    beta = low + (1 - low) * place if below else 1 + (high - 1) * place
    turned = (sigma_x, 0.0) if spread == "iso" else (sigma_y, angle)

    def make():
        k = onset(s) * (sinc_kernel(size, cutoff) if sinc else blur_kernel(size, shape, sigma_x, *turned, beta))
        k[size // 2, size // 2] += 1 - onset(s)
        return k
    return make


# --- the kernels of blur ---


@functools.lru_cache
def places(size):
    """How far each pixel of a filter lies below and right of its middle: (2, size, size)."""
    return np.mgrid[:size, :size] - size // 2


def blur_kernel(size, shape, sigma_x, sigma_y, angle=0.0, beta=1.0):
    """A blur that sums to 1, (size, size) float64: with q = p^T Sigma^-1 p at the point p, and Sigma turned by `angle` (radians),

    exp(-q / 2), the Gaussian, for shape ""; exp(-q^beta / 2) for "generalized"; 1 / (1 + q^beta) for "plateau".
    """
    y, x = places(size)
    c, s = math.cos(angle), math.sin(angle)
    q = ((c * x + s * y) / sigma_x) ** 2 + ((c * y - s * x) / sigma_y) ** 2
    k = 1 / (1 + q**beta) if shape == "plateau" else np.exp(-0.5 * q**beta)
    return k / k.sum()


def sinc_kernel(size, cutoff):
    """The ideal low-pass filter of all frequencies below `cutoff` (radians a pixel), cut to (size, size), whose rings are those
    of sharpening: cutoff J_1(cutoff r) / (2 pi r), in float64, brought to the sum 1."""
    r = np.hypot(*places(size))
    r[size // 2, size // 2] = 1
    k = cutoff * special.j1(cutoff * r) / (2 * np.pi * r)
    k[size // 2, size // 2] = cutoff**2 / (4 * np.pi)  # its limit at r = 0
    return k / k.sum()


def unsharp_kernel(amount, sigma, size=9):
    """x + amount (x - its Gaussian blur), as a filter of the sum 1: (size, size) float64."""
    k = -amount * blur_kernel(size, "", sigma, sigma)
    k[size // 2, size // 2] += 1 + amount
    return k


# --- what is done, on batches of pictures of different sizes ---
# A batch is x (B, 3, H, W) in [0, 1] with sizes (B, 2): picture b is x[b, :, :h, :w], the rest of its canvas means nothing. The
# arithmetic is in kernels/: reference.py defines it, so that every machine and every batch gives the same bits.


def real(x_1, seeds, scale, strength=-1.0):
    """The picture after all that happened to it: x_1 (B, 3, H, W) in [-1, 1] -> (B, 3, H/scale, W/scale), of values n / 127.5 - 1.

    seeds (B,) int64; strength as `draw`'s. H and W are multiples of scale.
    """
    if x_1.shape[2] % scale or x_1.shape[3] % scale:
        raise ValueError(f"{x_1.shape[2]} x {x_1.shape[3]} is not a multiple of the scale {scale}")
    harms, x_1 = [draw(numbers, strength) for numbers in uniforms(seeds, 100)], x_1.float()
    if kernels.damages(x_1):
        y = harm_one_by_one(x_1, seeds, harms, scale)
    else:
        size = 1 if x_1.device.type == "cpu" else len(x_1)  # one picture stays in a CPU's cache
        y = torch.cat([harm(x_1[i : i + size], seeds[i : i + size], harms[i : i + size], scale) for i in range(0, len(x_1), size)])
    untouched = [i for i, h in enumerate(harms) if h.strength == 0]
    if untouched:
        y[untouched] = H(x_1[untouched], "bicubic", scale) * 0.5 + 0.5
    return to_float((y.clamp(0, 1) * 255).round())


def harm(x_1, seeds, harms, scale):
    """The pipeline: x_1 (B, 3, H, W) in [-1, 1], seeds (B,), a Harm each -> (B, 3, H/scale, W/scale) in [0, 1], neither clamped nor rounded."""
    nothing, final = Damage(), (x_1.shape[2] // scale, x_1.shape[3] // scale)
    x, sizes = x_1 * 0.5 + 0.5, torch.tensor([x_1.shape[2:]] * len(x_1))

    first = [h.rounds[0] if h.rounds else nothing for h in harms]
    x = blur(x, sizes, [d.kernel for d in first])
    x, sizes = resize(x, sizes, [d.ratio for d in first], [d.method for d in first])
    x = add_noise(x, sizes, first, seeds, NOISES[0])
    x = jpeg(x, sizes, [h.quality for h in harms])

    second = [h.rounds[1] if len(h.rounds) > 1 else None for h in harms]
    if any(second):
        targets = [[max(1, int(f * d.ratio)) for f in final] if d else 1.0 for d in second]
        second = [d or nothing for d in second]
        x = blur(x, sizes, [d.kernel for d in second])
        x, sizes = resize(x, sizes, targets, [d.method for d in second])
        x = add_noise(x, sizes, second, seeds, NOISES[1])

    x = jpeg(x, sizes, [None if h.jpeg_last else h.last_quality for h in harms])
    x, sizes = resize(x, sizes, [final] * len(x), [h.method for h in harms])
    x = blur(x, sizes, [h.kernel for h in harms])
    return jpeg(x, sizes, [h.last_quality if h.jpeg_last else None for h in harms])


def harm_one_by_one(x_1, seeds, harms, scale):
    """harm() by the extension, to the same bits: each picture goes through its own stages alone, and stays in the processor's cache."""
    final, first, rows, filters, taps = (x_1.shape[2] // scale, x_1.shape[3] // scale), [0], [], [np.zeros(0)], 0
    for h in harms:
        for kind, value, *rest in stages(h, final):
            if kind == kernels.BLUR:
                filters.append(value.ravel())
                value, rest, taps = len(value), (taps, 0, 0), taps + value.size
            rows.append((kind, value, *rest))
        first.append(len(rows))
    tables = torch.tensor(first), torch.from_numpy(np.array(rows, np.float64)), torch.from_numpy(np.concatenate(filters).astype(np.float32))
    return kernels.damage(x_1, seeds, *tables, poisson_steps(), *final)


def stages(h, final):
    """A Harm as kernels.damage wants it, in harm()'s order: what a picture is spared is left out. final (h, w)."""
    def jpeg(quality):
        return kernels.JPEG, table_factor(quality), 0, 0, 0

    for i, d in enumerate(h.rounds):
        if d.kernel is not None:
            yield kernels.BLUR, d.kernel
        if i == 0 and d.ratio != 1:
            yield kernels.RESIZE, METHODS.index(d.method), 0, 0, d.ratio
        elif i == 1:
            yield kernels.RESIZE, METHODS.index(d.method), *(max(1, int(f * d.ratio)) for f in final), 0
        if d.noise:
            yield kernels.NOISE, d.noise, d.gaussian, d.gray, NOISES[i]
        if i == 0 and h.quality:
            yield jpeg(h.quality)
    if h.last_quality and not h.jpeg_last:
        yield jpeg(h.last_quality)
    yield kernels.RESIZE, (*METHODS, "antialiased").index(h.method), *final, 0
    if h.kernel is not None:
        yield kernels.BLUR, h.kernel
    if h.last_quality and h.jpeg_last:
        yield jpeg(h.last_quality)


def blur(x, sizes, filters):
    """Each picture filtered by its own kernel (k, k), k odd, reflected at its edges; None leaves it as it is."""
    if not any(f is not None for f in filters):
        return x
    side = max(len(f) for f in filters if f is not None)
    all_filters = np.zeros((len(x), side, side), np.float32)
    for padded, f in zip(all_filters, filters):
        f = np.ones((1, 1)) if f is None else f
        margin = (side - len(f)) // 2
        padded[margin : side - margin, margin : side - margin] = f
    return reference.filter2d(x, sizes, torch.from_numpy(all_filters).to(x.device))


def add_noise(x, sizes, damages, seeds, stream):
    """Each picture with the noise that its Damage says, clamped to [0, 1]."""
    if not any(d.noise for d in damages):
        return x
    amount, gaussian, gray = (torch.tensor([getattr(d, name) for d in damages]) for name in ("noise", "gaussian", "gray"))
    return reference.photon_noise(x, sizes, amount.float(), gaussian, gray, poisson_quantiles(), seeds, stream)


@functools.lru_cache
def poisson_quantiles(bins=4096):
    """(9, 256, bins) int16: for N = 2^n, the level v of 255 and the middle z of a bin of [-6, 6], the smallest k with P(Poisson(v N / 255) <= k) >= Phi(z).

    Drawing photons by a table of normal draws makes them, too, the same on any machine; a bin holds at most .0012 of the probability.
    """
    at = special.ndtr((np.arange(bins) + 0.5) * (12 / bins) - 6)
    tables = []
    for N in 2 ** np.arange(9):
        k = np.arange(int(N + 8 * N**0.5 + 20))
        below = special.pdtr(k, np.arange(256)[:, None] * N / 255)  # (256, K)
        first = np.searchsorted(at, below, side="right")  # the first bin that lies above k
        steps = np.zeros((256, bins + 1), np.int16)
        np.add.at(steps, (np.arange(256)[:, None], first), 1)
        tables.append(steps[:, :bins].cumsum(1, dtype=np.int16))
    return torch.from_numpy(np.stack(tables))


@functools.lru_cache
def poisson_steps():
    """poisson_quantiles() in a sixteenth of the memory, so that a processor's cache holds it: (9, 256, bins / 16) int16.

    In 16 bins k rises once at most. Of each 16: 32 k of the first, and in how many of them k is that (16: in all).
    """
    k = poisson_quantiles().unflatten(2, (-1, 16))
    return (32 * k[..., 0] + (k == k[..., :1]).sum(-1)).to(torch.int16)


def jpeg(x, sizes, qualities):
    """What JPEG leaves of each picture at its own quality (1 to 99, not only whole numbers; None: no JPEG)."""
    if not any(qualities):
        return x
    factors = [0.0 if q is None else table_factor(q) for q in qualities]
    return reference.jpeg(x, sizes, torch.tensor(factors, dtype=torch.float32))


def table_factor(quality):
    """What JPEG's tables are multiplied by at a quality."""
    return 50 / quality if quality < 50 else 2 - quality / 50


# --- resizing: each new pixel is a sum of a few old ones ---


def resize(x, sizes, targets, methods):
    """Each picture resized by its own method to a size (h, w), or by a ratio: (x, sizes), on a canvas of the largest."""
    if all(target == 1 for target in targets):
        return x, sizes
    rows, cols, new = [], [], []
    for (h, w), target, method in zip(sizes.tolist(), targets, methods):
        ratio = target if isinstance(target, float) else None
        to = [max(1, int(n * ratio)) for n in (h, w)] if ratio else target
        new.append(to)
        rows.append(taps(method, h, to[0], ratio))
        cols.append(taps(method, w, to[1], ratio))
    return reference.resample(x, *(t.to(x.device) for t in (*stack_taps(rows), *stack_taps(cols)))), torch.tensor(new)


@functools.lru_cache(64)  # of a square picture, rows and columns are alike
def taps(method, n, m, ratio=None):
    """Of which pixels of a row of n the m new ones are made, as PyTorch's interpolate has it: (indices (m, T) int64, weights (m, T) float32).

    A ratio that was asked for, not m / n, spaces the new pixels; PyTorch's positions are in float32, and so are these.
    """
    i = np.arange(m)
    if n == m and ratio in (None, 1):
        return i[:, None], np.ones((m, 1), np.float32)
    if method == "area":
        start, end = i * n // m, -((i + 1) * -n // m)
        index = start[:, None] + np.arange((end - start).max())
        weights = (index < end[:, None]) / (end - start)[:, None]
        return np.minimum(index, n - 1), weights.astype(np.float32)
    if method == "antialiased":
        step = max(n / m, 1)
        index = np.floor((i + 0.5) * n / m - 2 * step)[:, None].astype(int) + np.arange(int(4 * step) + 2)
        d = np.abs(index + 0.5 - (i + 0.5)[:, None] * n / m) / step
        weights = np.where((index >= 0) & (index < n), cubic(d, -0.5), 0)
        return index.clip(0, n - 1), (weights / sum(weights.T)[:, None]).astype(np.float32)
    step, half = np.float32(1 / ratio if ratio else n / m), np.float32(0.5)
    at = step * (i.astype(np.float32) + half) - half
    if method == "bilinear":
        at = np.maximum(at, 0)
    base = np.floor(at)
    t = (at - base)[:, None].astype(np.float64)
    if method == "bilinear":
        offsets, weights = np.array([0, 1]), np.hstack([1 - t, t])
    else:
        offsets, weights = np.array([-1, 0, 1, 2]), cubic(np.hstack([t + 1, t, 1 - t, 2 - t]), -0.75)
    return (base[:, None].astype(int) + offsets).clip(0, n - 1), weights.astype(np.float32)


def cubic(d, a):
    """Keys' cubic kernel at the distance d >= 0 in pixels: 0 from 2 on."""
    return np.where(d < 1, ((a + 2) * d - (a + 3)) * d * d + 1, np.where(d < 2, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a, 0))


def stack_taps(parts):
    """Several pictures' taps as tensors (B, m, T), filled up with weights of 0."""
    shape = (len(parts), *(max(index.shape[d] for index, _ in parts) for d in (0, 1)))
    indices, weights = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for b, (index, weight) in enumerate(parts):
        indices[b, : index.shape[0], : index.shape[1]] = index
        weights[b, : index.shape[0], : index.shape[1]] = weight
    return torch.from_numpy(indices), torch.from_numpy(weights)


# --- to look at ---


def main(argv=None):
    from console import Parser, in_range
    from pictures import read_image, write_picture
    p = Parser(description="Nine accidents of one photograph, side by side, 4 times smaller.")
    p.add_argument("picture", help="a photograph")
    p.add_argument("-o", "--output", default="draws.png", help="where to write (default: draws.png)")
    p.add_argument("--strength", type=in_range(float, 0, 1), default=1.0, help="0: bicubic reduction alone; 1: as published (default)")
    p.add_argument("--seed", type=in_range(int, 0, 2**62), default=0, help="of the first of the nine (default: 0)")
    p.add_argument("--zoom", type=in_range(int, 1, 16), default=2, help="repeat each pixel so often (default: 2)")
    args = p.parse_args(argv)
    image = read_image(args.picture)
    h, w = (n - n % 4 for n in image.shape[:2])
    x_1 = to_float(torch.from_numpy(image[:h, :w].copy()).permute(2, 0, 1))
    y = real(x_1.expand(9, -1, -1, -1), torch.arange(args.seed, args.seed + 9), 4, args.strength)
    rows = [torch.cat(list(y[i : i + 3]), dim=2) for i in (0, 3, 6)]
    sheet = kernels.to_uint8(torch.cat(rows, dim=1)[None])[0].numpy()
    write_picture(args.output, sheet.repeat(args.zoom, 0).repeat(args.zoom, 1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"degradations.py: {e}")
