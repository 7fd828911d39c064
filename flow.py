"""The flow dx/dt = v(x, x_lr, t), walked: one step of a distilled student (Eq. 13), or a solver's many.

    x_in = noise_augment(x_lr, sigma_p, seeds)      # concat(x_0, x_lr): (B, 6, H, W), Eq. (4)
    x_1 = one_step(student, x_in, t)                # t = 0 fidelity, 1 realism
    x_1, nfe = integrate(flow, x_in, "midpoint", 8)
"""
import math

import numpy as np
import torch

from kernels import dopri5_error, dopri5_stage_, euler_step_, rk2_stage_
from kernels.reference import DOPRI5_C

RK2_NODES = {"midpoint": 1 / 2, "ralston": 2 / 3, "heun": 1.0}


def _times(x_in, t):
    return torch.full((x_in.shape[0],), float(t), device=x_in.device)


def one_step(model, x_in, t):
    """Eq. (13), x_1^t = x_0 + v_phi(x_0, x_lr, t): concat(x_0, x_lr) (B, 2C, H, W), t in [0, 1] -> (B, C, H, W); C is 3, in latents any."""
    return x_in[:, : x_in.shape[1] // 2] + model(x_in, _times(x_in, t)).float()


def mean_slope(model, x_in, v1, t, dt, solver):
    """The slope (x_s - x_t) / dt of one solver step from t to s = t + dt: v1, the velocity at t, for Euler; else second order.

    x_in = concat(x_t, x_lr) (B, 6, H, W), unchanged; v1 (B, 3, H, W); t, dt (B,); solver euler, midpoint, ralston, heun.
    Euler's too where the second velocity would be of a time after model.t_last.
    """
    if solver == "euler":
        return v1
    alpha = RK2_NODES[solver]
    v2 = model(euler_step_(x_in.clone(), v1, alpha * dt), t + alpha * dt)
    late = after(t + alpha * dt, model).view(-1, 1, 1, 1)
    return torch.where(late, v1, v1 + (v2 - v1) / (2 * alpha))


def after(t, model):
    """Whether t, a number or (B,), is later than the last time that a model was trained at (teachers.Teacher.t_last)."""
    return t > getattr(model, "t_last", 1.0) + 1e-6


def integrate(model, x_in, solver="midpoint", steps=8, rtol=1e-3, atol=1e-3, t=1.0):
    """The flow from time 0 to t in [0, 1], in place in channels 0 to C-1 of x_in = concat(x_0, x_lr) (B, 2C, H, W); C is 3, in latents any.

    solver "euler", or second-order "midpoint", "ralston", "heun", in equal steps, `steps` of which would lead to 1;
    or the adaptive "rk45" with rtol and atol. Before 1 it is carried on by its mean velocity so far,
    x_1^t = x_0 + (x_t - x_0) / t, which is what a student that fulfils Eq. (7) says at t. After model.t_last, where it was
    not trained, steps are Euler's, towards what it predicts; rk45 takes one. Returns
    (x_1^t (B, C, H, W), the number of function evaluations: calls of model, twice as many where each is guided).
    """
    evaluations = getattr(model, "evaluations", 1)
    if t < 1e-3:  # the mean velocity is the first one; dividing by t would magnify roundings
        return one_step(model, x_in, 0.0), evaluations
    C = x_in.shape[1] // 2
    nfe, x_0 = 0, x_in[:, :C].clone() if t < 1 else None

    def v(t):
        nonlocal nfe
        nfe += evaluations
        return model(x_in, _times(x_in, t))

    if solver == "rk45":
        end = min(t, getattr(model, "t_last", 1.0))
        _rk45(v, x_in, rtol, atol, end)
        if end < t:
            euler_step_(x_in, v(end), t - end)
    else:
        steps = math.ceil(round(steps * t, 6))
        alpha, dt = RK2_NODES.get(solver), t / steps
        for i in range(steps):
            v1 = v(i * dt)
            if solver == "euler" or after((i + alpha) * dt, model):
                euler_step_(x_in, v1, dt)
            else:
                euler_step_(x_in, v1, alpha * dt)
                rk2_stage_(x_in, v1, v((i + alpha) * dt), dt, alpha)
    x_t = x_in[:, :C]
    return (x_t if x_0 is None else x_0.lerp(x_t, 1 / t)), nfe


def _rk45(v, x_in, rtol, atol, end):
    """Dormand-Prince from 0 to end with scipy's step control (the batch is one system), so that it takes the steps of scipy's RK45."""
    def rms(x):
        return x.to(torch.float32 if x.device.type == "mps" else torch.float64).square().mean().sqrt().item()  # mps has no float64

    C = x_in.shape[1] // 2
    x_t, t = x_in[:, :C].clone(), 0.0
    k = [v(t)]
    # The first step (Hairer, Norsett & Wanner, II.4): a short Euler step measures how fast the field turns.
    scale = atol + rtol * x_t.abs()
    d0, d1 = rms(x_t / scale), rms(k[0] / scale)
    h = min(end, 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1)
    d2 = rms((_after_euler(v, x_in, k[0], h) - k[0]) / scale) / h
    h = min(100 * h, max(1e-6, h * 1e-3) if max(d1, d2) <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2, end)

    rejected = False
    while t < end:
        h = min(h, end - t)
        if h < 10 * np.spacing(t):
            raise ArithmeticError(f"rk45 cannot reach its tolerance at t = {t}: the velocity is not finite, or rtol and atol are too small")
        for c in DOPRI5_C[1:]:
            dopri5_stage_(x_in, x_t, k, h)
            k.append(v(t + c * h))
        dopri5_stage_(x_in, x_t, k, h)
        k.append(v(t + h))
        error = dopri5_error(x_in, x_t, k, h, atol, rtol).item()
        factor = 10 if error == 0 else 0.9 * error**-0.2
        if error < 1:
            t = end if h == end - t else t + h
            x_t.copy_(x_in[:, :C])
            k, h, rejected = [k[-1]], h * min(factor, 1 if rejected else 10), False
        else:  # NaN comes here too, and shrinks the step until the check above stops it
            k, h, rejected = [k[0]], h * (max(0.2, factor) if factor == factor else 0.2), True


def _after_euler(v, x_in, velocity, h):
    """The velocity one Euler step of length h further, (B, 3, H, W); x_in is left where that step ends."""
    euler_step_(x_in, velocity, h)
    return v(h)
