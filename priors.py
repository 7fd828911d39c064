"""An unconditional flow as a prior: DDNM, DDRM, DPS and DiffPIR restore with it what no network was trained to restore.

    m = Measurement(y, "bicubic", 4, sigma_n=0.05)      # y = H(x_1) + n: (B, C, h, w) in [-1, 1]
    x_1, nfe = ddnm(flow, m, noise, steps=100)          # noise(i): (B, C, H, W), standard normal, another for each i

All four were published for diffusion models, whose state is x_1 + sigma eps. A flow's, x_t = t x_1 + (1 - t) eps, is t times
that, with sigma = (1 - t) / t. A step from t to u > t makes x_hat, the network's E[x_1 | x_t] drawn towards y, and eps_hat,
what is left of x_t, and goes to
    x_u = u x_hat + (1 - u) (keep eps_hat + sqrt(1 - keep^2) z),   z new noise.
keep = 1 is an Euler step of the flow; `ancestral` is what the reversed diffusion (DDPM) keeps; a smaller one renews more.

What each samples is known where x_1 is Gaussian (tests/test_priors.py). All but DPS are exact, for ever more steps, where y has
no noise and what H sees of x_1 is independent of what it does not; their docstrings say what else that takes. Where H's noise or
a correlation comes in, none is: E[x_1 | x_t] knows no more of y than the noised x_t shows.
"""
import functools
from itertools import pairwise

import torch
import torch.nn.functional as F

import kernels
from console import InputError
from degradations import H, least_multiple


@functools.lru_cache(8)
def singular_vectors(side, degradation, scale):
    """H along one axis of a picture, U diag(s) V^T: (U (n, n), s (side), 0 where nothing is seen, V (side, side)) in float64; n = side / scale."""
    # Lines that are constant across; two columns are to be left of them: PyTorch's bicubic is wrong where one is.
    lines = torch.eye(side, dtype=torch.float64)[:, None, :, None].expand(-1, 1, -1, 2 * least_multiple(scale))
    U, s, Vt = torch.linalg.svd(H(lines, degradation, scale)[:, 0, :, 0].T)
    return U, F.pad(s, (0, side - len(s))), Vt.T


class Measurement:
    """y = H(x_1) + sigma_n n, in coordinates that H does not mix: there y_i = x_i + sigma_i n_i where H sees something, else nothing is known.

    Both reductions work on rows and columns apart, so H's singular vectors are products of those of two small matrices.
    y (B, C, H, W): the coordinates of the pseudo-inverse H^+ y, 0 where nothing is seen; seen, s, sigma (H, W): where, the
    singular values, and sigma_i = sigma_n / s_i, 0 where nothing is seen. Raises InputError for an H that is not linear.
    """

    def __init__(self, y, degradation, scale, sigma_n=0.0):
        if degradation not in ("bicubic", "avgpool"):
            raise InputError(f"a prior restores what bicubic or avgpool reduced: {degradation!r} is not linear")
        sides = [round(side * scale) for side in y.shape[-2:]]
        (U, s, self.rows), (U_w, s_w, self.columns) = ((part.to(y) for part in singular_vectors(side, degradation, scale)) for side in sides)
        self.s = s[:, None] * s_w
        self.seen = self.s > 1e-4
        inverse = torch.where(self.seen, 1 / self.s, 0)
        self.y = inverse * F.pad(U.T @ y @ U_w, (0, sides[1] - y.shape[-1], 0, sides[0] - y.shape[-2]))
        self.sigma = sigma_n * inverse

    def coordinates(self, x):
        return self.rows.T @ x @ self.columns

    def picture(self, z):
        return self.rows @ z @ self.columns.T


def clean(model, x_t, t):
    """x_hat = E[x_1 | x_t] = x_t + (1 - t) v: (B, C, H, W), t a number -> (B, C, H, W). The network sees no x_lr: zeros stand for it."""
    x_in = torch.cat([x_t, torch.zeros_like(x_t)], dim=1)
    return x_t + (1 - t) * model(x_in, torch.full((len(x_t),), t, device=x_t.device)).to(x_t.dtype)


def times(steps):
    """The steps from 0 to 1, [(t, u)]."""
    return list(pairwise(i / steps for i in range(steps + 1)))


def ancestral(t, u):
    """How much of its noise a step from t to u keeps in the reversed diffusion: sigma_u / sigma_t."""
    return t * (1 - u) / (u * (1 - t))


def step(x_t, x_hat, t, u, keep, z):
    """x_u, as above: x_t, x_hat, z (B, C, H, W); t, u, keep numbers."""
    return u * x_hat + (1 - u) * (keep * (x_t - t * x_hat) / (1 - t) + (1 - keep**2) ** 0.5 * z)


@torch.no_grad()
def ddnm(model, m, noise, steps=100):
    """Wang et al. 2023, with noise their DDNM+ (Eq. 17 to 19): (x_1 (B, C, H, W), evaluations).

    x_hat + lam (H^+ y - H^+ H x_hat): what H sees is put in place of the network's guess, and the rest is the reversed
    diffusion's. lam < 1 where y's noise in a coordinate is more than a step adds; up to there the step adds so much less of its own.
    Gaussian x_1: exact, for ever more steps, without noise where what is seen is independent of what is not; else approximate.
    """
    x = noise(0)
    for i, (t, u) in enumerate(times(steps), 1):
        keep = ancestral(t, u)
        share = u - (1 - u) * keep * t / (1 - t)  # of x_hat in x_u
        fresh = (1 - u) * (1 - keep**2) ** 0.5
        z_hat = m.coordinates(clean(model, x, t))
        theirs = share * m.sigma  # y's noise in x_u, were lam 1
        lam = m.seen * torch.where(theirs <= fresh, 1, fresh / theirs)
        z_hat = z_hat + lam * (m.y - z_hat)
        own = (fresh**2 - (lam * theirs) ** 2).clamp(min=0).sqrt()
        x = step(x, m.picture(z_hat), t, u, keep, 0.0) + m.picture(own * noise(i))
    return x, steps


@torch.no_grad()
def ddrm(model, m, noise, steps=20, eta=0.85, eta_b=1.0):
    """Kawar et al. 2022, Eq. (7) and (8): (x_1 (B, C, H, W), evaluations).

    Coordinate by coordinate, at the level sigma = (1 - u) / u: what is not seen renews eta of its noise; what is seen with less
    noise than sigma is drawn around y, so that both noises make sigma; what is seen with more is drawn towards y.
    Gaussian x_1: exact, for ever more steps, with eta = 0, without noise, where what is seen is independent of what is not. Each step
    of a fixed eta > 0 renews noise that the network has not yet answered to, however short it is: the result varies too little.
    """
    x = noise(0)
    for i, (t, u) in enumerate(times(steps), 1):
        sigma, keep = (1 - u) / u, (1 - eta**2) ** 0.5
        z_hat = m.coordinates(clean(model, x, t))
        eps_hat = (m.coordinates(x) - t * z_hat) / (1 - t)
        clear = m.seen & (m.sigma <= sigma)
        mean = torch.where(m.seen, z_hat + keep * sigma * (m.y - z_hat) / m.sigma, z_hat + keep * sigma * eps_hat)
        mean = torch.where(clear, z_hat + eta_b * (m.y - z_hat), mean)
        deviation = torch.where(clear, (sigma**2 - (eta_b * m.sigma) ** 2).clamp(min=0).sqrt(), eta * sigma)
        x = m.picture(u * (mean + deviation * noise(i)))
    return x, steps


@torch.no_grad()
def diffpir(model, m, noise, steps=100, lam=0.25, zeta=0.1):
    """Zhu et al. 2023, Algorithm 1: (x_1 (B, C, H, W), evaluations).

    x_hat = argmin |y - H x|^2 / sigma_n^2 + lam |x - E[x_1 | x_t]|^2 / sigma^2, sigma = (1 - t) / t; sqrt(zeta) of the noise is renewed.
    The defaults are the published code's configuration for x4: its lambda of 1 is lam = 1/4, as it has sigma_n for pictures in [0, 1]
    and sigma for pictures in [-1, 1]. Its steps are uneven, and begin at the noised bicubic picture; these are not.
    Gaussian x_1: exact, for ever more steps, with zeta = 0 without noise where what is seen is independent of what is not; and with
    lam = 1 and noise as the variance of x_1 in what is seen grows beyond the noise's: the step takes sigma^2 for that of x_1 given x_t.
    """
    x = noise(0)
    for i, (t, u) in enumerate(times(steps), 1):
        z_hat = m.coordinates(clean(model, x, t))
        z_hat = z_hat + m.seen / (1 + lam * (m.sigma * t / (1 - t)) ** 2) * (m.y - z_hat)
        x = step(x, m.picture(z_hat), t, u, (1 - zeta) ** 0.5, noise(i))
    return x, steps


@torch.no_grad()
def dps(model, m, noise, steps=1000, zeta=1.0):
    """Chung et al. 2023, Algorithm 1: (x_1 (B, C, H, W), evaluations, each with its gradient).

    A step of the reversed diffusion less zeta times the gradient of |y - H E[x_1 | x_t]| by x_t, through the network. zeta
    is on this path's scale, where a diffusion's would be 1/2 to 1 of itself; the published code's, for x4, is .3.
    Gaussian x_1: never exact, as the pull's length knows nothing of y's noise nor of what x_t leaves open; what is not seen,
    where independent of the rest, is the prior's.
    """
    x = noise(0)
    for i, (t, u) in enumerate(times(steps), 1):
        with torch.enable_grad():
            x.requires_grad_()
            x_hat = clean(model, x, t)
            miss = (m.s * (m.y - m.coordinates(x_hat))).flatten(1).norm(dim=1)
            pull, = torch.autograd.grad(miss.sum(), x)
        x = step(x.detach(), x_hat.detach(), t, u, ancestral(t, u), noise(i)) - zeta * pull
    return x, steps


METHODS = {"ddnm": ddnm, "ddrm": ddrm, "dps": dps, "diffpir": diffpir}


def restore(model, task, y, seed, method, steps, dtype=torch.float32, progress=None):
    """A low-resolution picture enlarged by a method of METHODS: y (1, 3, h, w) in [-1, 1] -> (x_1 (1, 3, H, W) float32, evaluations).

    task says H, its scale and sigma_n; the noise comes from seed; progress(share) is called at each step. In one piece: the
    prior is of whole pictures. Raises InputError for a size that the network does not take, and for an H that is not linear.
    """
    height, width = (round(side * task.scale) for side in y.shape[-2:])
    if height % model.multiple or width % model.multiple:
        raise InputError(f"it becomes {height} x {width}, and the prior takes multiples of {model.multiple}: cut it to multiples of {least_multiple(model.multiple / task.scale)} pixels")
    device = next(model.parameters()).device
    seeds = torch.tensor([seed], device=device)

    def noise(i):
        if i and progress:
            progress(1 / steps)
        return kernels.normal(seeds, (1, 3, height, width), stream=i)

    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        predict = lambda x_in, t: model(x_in, t).float()
        x_1, nfe = METHODS[method](predict, Measurement(y.to(device), task.degradation, task.scale, task.sigma_n), noise, steps)
    return x_1.float(), nfe
