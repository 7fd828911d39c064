"""What was done to a picture before one has it: H, the measurement, and H^T, the way back to full size.

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
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

import kernels
from kernels.reference import MASK, philox


def to_float(x):
    """uint8 to [-1, 1] float32, any shape."""
    return x.float() / 127.5 - 1


def H(x, degradation, scale):
    """Down-sampling: x (B, C, H, W) to (B, C, H/scale, W/scale). H and W are multiples of scale."""
    if x.shape[-2] % scale or x.shape[-1] % scale:
        raise ValueError(f"{x.shape[-2]} x {x.shape[-1]} is not a multiple of the scale {scale}")
    if degradation == "avgpool":
        return F.avg_pool2d(x, scale)
    return F.interpolate(x, size=(x.shape[-2] // scale, x.shape[-1] // scale), mode="bicubic", antialias=True)


def H_T(y, degradation, scale):
    """Back to full size: y (B, C, h, w) to (B, C, h scale, w scale); pixel repetition for avgpool, else bicubic."""
    if degradation == "avgpool":
        return y.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    return F.interpolate(y, scale_factor=scale, mode="bicubic", antialias=True)


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
    sinc = sinc_kernel(dice.pick(END_SIZES), dice.between(*milder((math.pi / 3, math.pi), s, math.pi)))
    sharp = unsharp_kernel(dice.between(0, onset(s)), dice.between(0.5, 1.5))
    filtered, sharpened = dice.chance(END_SINC * s), dice.chance((1 - s) / 2)
    last_quality, last_jpeg = dice.between(*milder(JPEG, s, 98)), dice.chance(often)
    return Harm(s, rounds, quality if jpeg else None, "antialiased" if antialiased else method, sinc if filtered else sharp if sharpened else None,
                last_quality if last_jpeg else None, dice.chance(0.5))


def draw_round(dice, r, s, often):
    """One round's Damage at strength s, or None if the picture is spared."""
    spared = not dice.chance(r.chance * (s if r.chance < 1 else 1))
    kernel, blurred = draw_kernel(dice, r, s), dice.chance(r.blur * often)
    way, resized = dice.pick(dict(zip(("up", "down", "keep"), r.resize))), dice.chance(often)
    low, high = milder(r.ratio, s, 1)
    up, down, method = dice.between(1, high), dice.between(low, 1), dice.pick(METHODS)
    gaussian, noisy = dice.chance(0.5), dice.chance(often)
    noise = dice.between(*milder([g / 255 for g in r.gaussian] if gaussian else r.poisson, s, 0))
    gray = dice.chance(GRAY)
    ratio = {"up": up, "down": down, "keep": 1.0}[way] if resized else 1.0
    return None if spared else Damage(kernel if blurred else None, ratio, method, gaussian, noise if noisy else 0.0, gray)


def draw_kernel(dice, r, s):
    """A blur of one of the six kinds, or a sinc filter: (k, k) float64."""
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
    k = onset(s) * (sinc_kernel(size, cutoff) if sinc else blur_kernel(size, shape, sigma_x, *turned, beta))
    k[size // 2, size // 2] += 1 - onset(s)
    return k


# --- the kernels of blur ---


def blur_kernel(size, shape, sigma_x, sigma_y, angle=0.0, beta=1.0):
    """A blur that sums to 1, (size, size) float64: with q = p^T Sigma^-1 p at the point p, and Sigma turned by `angle` (radians),

    exp(-q / 2), the Gaussian, for shape ""; exp(-q^beta / 2) for "generalized"; 1 / (1 + q^beta) for "plateau".
    """
    y, x = np.mgrid[:size, :size] - size // 2
    c, s = math.cos(angle), math.sin(angle)
    q = ((c * x + s * y) / sigma_x) ** 2 + ((c * y - s * x) / sigma_y) ** 2
    k = 1 / (1 + q**beta) if shape == "plateau" else np.exp(-0.5 * q**beta)
    return k / k.sum()


def sinc_kernel(size, cutoff):
    """The ideal low-pass filter of all frequencies below `cutoff` (radians a pixel), cut to (size, size), whose rings are those
    of sharpening: cutoff J_1(cutoff r) / (2 pi r), in float64, brought to the sum 1."""
    y, x = np.mgrid[:size, :size] - size // 2
    r = np.hypot(x, y)
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
# A batch is x (B, 3, H, W) in [0, 1] with sizes [(h, w)]: picture i is x[i, :, :h, :w], the rest of its canvas means nothing.


def real(x_1, seeds, scale, strength=-1.0):
    """The picture after all that happened to it: x_1 (B, 3, H, W) in [-1, 1] -> (B, 3, H/scale, W/scale), of values n / 127.5 - 1.

    seeds (B,) int64; strength as `draw`'s. On a CPU each picture is worked on alone, at its own sizes; elsewhere all
    together, on canvases of the largest size.
    """
    harms = [draw(numbers, strength) for numbers in uniforms(seeds, 100)]
    x, size = x_1.float() * 0.5 + 0.5, 1 if x_1.device.type == "cpu" else len(x_1)
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    y = torch.cat([harm(x[p], seeds[p], harms[p], scale) for p in parts])
    return to_float((y.clamp(0, 1) * 255).round())


def harm(x, seeds, harms, scale):
    """The pipeline: x (B, 3, H, W) in [0, 1], seeds (B,), a Harm each -> (B, 3, H/scale, W/scale), neither clamped nor rounded."""
    final = (x.shape[2] // scale, x.shape[3] // scale)
    whole, nothing = x, Damage()
    sizes = [tuple(x.shape[2:])] * len(x)
    first = [h.rounds[0] if h.rounds else nothing for h in harms]
    x = blur(x, sizes, [d.kernel for d in first])
    x, sizes = resize(x, sizes, [d.ratio for d in first], [d.method for d in first])
    x = add(x, noise(x, sizes, first, seeds, NOISES[0]))
    x = jpeg(x, sizes, [h.quality for h in harms])

    second = [h.rounds[1] if len(h.rounds) > 1 else None for h in harms]
    if any(second):
        targets = [[max(1, int(f * d.ratio)) for f in final] if d else size for d, size in zip(second, sizes)]
        second = [d or nothing for d in second]
        x = blur(x, sizes, [d.kernel for d in second])
        x, sizes = resize(x, sizes, targets, [d.method for d in second])
        x = add(x, noise(x, sizes, second, seeds, NOISES[1]))

    x = jpeg(x, sizes, [None if h.jpeg_last else h.last_quality for h in harms])
    x, sizes = resize(x, sizes, [final] * len(x), [h.method for h in harms])
    x = blur(x, sizes, [h.kernel for h in harms])
    x = jpeg(x, sizes, [h.last_quality if h.jpeg_last else None for h in harms])
    untouched = [i for i, h in enumerate(harms) if h.strength == 0]
    if untouched:
        x[untouched] = H(whole[untouched], "bicubic", scale)
    return x


def blur(x, sizes, filters):
    """Each picture filtered by its own kernel (k, k), k odd, all channels alike, reflected at its edges; None leaves it as it is.

    The kernels differ, so pictures are the groups of one convolution and colours its batch. Sixteen neighbouring pixels of
    the result are its channels, which is where libraries are fast: on a CPU 3 to 10 times faster than a group a channel.
    """
    if not any(f is not None for f in filters):
        return x
    B, _, H, W = x.shape
    side, n = max(len(f) for f in filters if f is not None), 16
    r, columns = side // 2, -(-W // n) * n
    weight = np.zeros((B, n, side, side + n - 1), np.float32)
    for k, f in zip(weight, filters):
        f = np.ones((1, 1)) if f is None else f
        margin = r - len(f) // 2
        for i in range(n):
            k[i, margin : margin + len(f), margin + i : margin + i + len(f)] = f
    rows, cols = (torch.stack([reflected(size[d], r, length) for size in sizes]).to(x.device) for d, length in ((0, H), (1, columns)))
    wide = x.transpose(0, 1)[:, torch.arange(B, device=x.device)[:, None, None], rows[:, :, None], cols[:, None, :]]  # (3, B, H + 2r, ...)
    y = F.conv2d(wide, torch.from_numpy(weight).to(x.device).flatten(0, 1)[:, None], stride=(1, n), groups=B)  # (3, B n, H, W / n)
    return y.unflatten(1, (B, n)).permute(1, 0, 3, 4, 2).flatten(3)[..., :W]


def reflected(n, r, length):
    """Where the pixels -r to length + r - 1 of a row of n pixels come from, reflected at its ends without repeating them: int64."""
    i = torch.arange(-r, length + r) % max(1, 2 * n - 2)
    return torch.where(i < n, i, 2 * n - 2 - i)


def resize(x, sizes, targets, methods):
    """Each picture resized by its own method to a size (h, w) or by a ratio: (x, sizes), on a canvas of the largest."""
    done = []
    for picture, (h, w), target, method in zip(x, sizes, targets, methods):
        picture = picture[None, :, :h, :w]
        if target == 1 or target == (h, w):
            done.append(picture)
        elif method == "antialiased":
            done.append(F.interpolate(picture, size=target, mode="bicubic", antialias=True))
        else:
            how = {"size": tuple(target)} if not isinstance(target, float) else {"scale_factor": max(target, 1 / h, 1 / w)}
            done.append(F.interpolate(picture, mode=method, **how))
    sizes = [tuple(p.shape[2:]) for p in done]
    if len(done) == 1:
        return done[0], sizes
    H, W = (max(size) for size in zip(*sizes))
    return torch.cat([F.pad(p, (0, W - p.shape[3], 0, H - p.shape[2])) for p in done]), sizes


def inside(sizes, x):
    """Where the canvases (B, ., H, W) hold picture: bool (B, 1, H, W)."""
    h, w = torch.tensor(sizes, device=x.device).view(-1, 1, 1, 2).unbind(-1)
    rows, cols = (torch.arange(n, device=x.device) for n in x.shape[2:])
    return ((rows < h)[..., None] & (cols < w)[:, :, None])


def per_picture(values, x):
    return torch.tensor(values, device=x.device).view(-1, 1, 1, 1)


def noise(x, sizes, damages, seeds, stream):
    """The noise of each picture, Gaussian or Poisson, in colour or in gray: (B, 3, H, W) to add to x; None where there is none at all.

    Poisson: a pixel of value v counts k photons where v N were expected, and becomes v + noise (k / N - v), for the 8-bit v
    of the picture and N its number of different v, rounded up to a power of 2. k is the Poisson quantile of the
    probability at which the normal draw z stands: so both noises come from z, which is the same on any machine.
    """
    if not any(d.noise for d in damages):
        return None
    z = kernels.normal(seeds, x.shape, stream)
    gray, amount = per_picture([d.gray for d in damages], x), per_picture([float(d.noise) for d in damages], x).float()
    z = torch.where(gray, z[:, :1], z)
    n = amount * z
    counted = [i for i, d in enumerate(damages) if not d.gaussian and d.noise]
    if counted:
        v = x[counted]
        luma = (v * v.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        level = (torch.where(gray[counted], luma, v).clamp(0, 1) * 255).round().long()
        for i, values in zip(counted, level):
            h, w = sizes[i]
            N = 1 << (values[:, :h, :w].unique().numel() - 1).bit_length()
            k = poisson(values, N, z[i])
            n[i] = damages[i].noise * (k / N - values / 255)
    return n


def add(x, n):
    return x if n is None else (x + n).clamp(0, 1)


BINS, REACH = 4096, 6  # normal draws from -6 to 6 fall into so many bins


@functools.lru_cache
def poisson_quantiles(N, device):
    """(256, BINS) float32: of the level v of 255, at the middle z of a bin, the smallest k with P(Poisson(v N / 255) <= k) >= Phi(z)."""
    z = (np.arange(BINS) + 0.5) * (2 * REACH / BINS) - REACH
    k = np.arange(int(N + 8 * N**0.5 + 20))
    below = special.pdtr(k, np.arange(256)[:, None] * N / 255)  # (256, K)
    table = np.stack([np.searchsorted(row, special.ndtr(z)) for row in below])
    return torch.from_numpy(table.astype(np.float32)).flatten().to(device)


def poisson(level, N, z):
    """Photons counted where level N / 255 are expected: level int64 0 to 255, z standard normal, of shapes that broadcast -> float32."""
    bins = ((z + REACH) * (BINS / (2 * REACH))).long().clamp(0, BINS - 1)
    return poisson_quantiles(N, level.device)[level * BINS + bins]


# --- JPEG, without the files: what they lose is lost in the rounding of 8 x 8 cosine transforms ---

_u, _x = np.mgrid[:8, :8]
DCT = torch.from_numpy(np.where(_u, 0.5, 8**-0.5) * np.cos((2 * _x + 1) * _u * np.pi / 16)).float()  # D X D^T: the transform
LUMA = torch.tensor([[16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
                     [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
                     [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99]], dtype=torch.float32)
CHROMA = torch.full((8, 8), 99.0)
CHROMA[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]], dtype=torch.float32)
YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
RGB = torch.tensor([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])


def jpeg(x, sizes, qualities):
    """What JPEG leaves of each picture at its own quality (1 to 99, not only whole numbers; None: no JPEG), in [0, 1].

    As the published pipeline computes it: colour at half the resolution, tables neither rounded nor limited to 255, the one for
    luma transposed (in a file the 11 of [16, 11, ...] is the horizontal frequency's).
    """
    chosen = [i for i, q in enumerate(qualities) if q is not None]
    if not chosen:
        return x
    factor = per_picture([(50 / q if q < 50 else 2 - q / 50) for q in (qualities[i] for i in chosen)], x).float()
    H, W = x.shape[2:]
    part = x[chosen].clamp(0, 1) * inside([sizes[i] for i in chosen], x)
    ycc = F.pad(part * 255, (0, -W % 16, 0, -H % 16))  # black beyond the edges
    ycc = torch.einsum("dc,bchw->bdhw", YCC.to(x.device), ycc)
    y = quantise(ycc[:, :1] - 128, LUMA.T.to(x.device) * factor) + 128
    c = quantise(F.avg_pool2d(ycc[:, 1:], 2), CHROMA.to(x.device) * factor)
    ycc = torch.cat([y, c.repeat_interleave(2, 2).repeat_interleave(2, 3)], dim=1)
    rgb = torch.einsum("dc,bchw->bdhw", RGB.to(x.device), ycc)[..., :H, :W].clamp(0, 255) / 255
    if len(chosen) == len(x):
        return rgb
    x = x.clone()
    x[chosen] = rgb
    return x


def quantise(planes, table):
    """Planes (B, C, H, W) of multiples of 8, through the cosine transform of their 8 x 8 blocks, rounded to multiples of table (B, 1, 8, 8), and back."""
    B, C, H, W = planes.shape
    D, table = DCT.to(planes.device), table.view(B, 1, 1, 8, 1, 8)
    rows = D @ planes.reshape(B, C, H // 8, 8, W)
    coefficients = (rows.view(B, C, H // 8, 8, W // 8, 8) @ D.T / table).round() * table
    rows = D.T @ (coefficients @ D).view(B, C, H // 8, 8, W)
    return rows.view(B, C, H, W)
