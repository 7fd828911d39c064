"""Integrating the flow."""
import torch

from kernels import euler_step_, rk2_stage_

RK2_NODES = {"midpoint": 1 / 2, "ralston": 2 / 3, "heun": 1.0}
SOLVERS = ("euler", *RK2_NODES)


def one_step(model, x_in, t):
    """Eq. (13), x_1^t = x_0 + v_phi(x_0, x_lr, t): concat(x_0, x_lr) (B, 6, H, W), t a number or (B,) -> (B, 3, H, W)."""
    t = torch.as_tensor(t, dtype=torch.float32, device=x_in.device).expand(x_in.shape[0])
    return x_in[:, :3] + model(x_in, t).float()


def teacher_step(model, x_in, t, dt, solver):
    """The teacher's velocity at (x_t, t) and its mean slope over [t, t + dt]: two (B, 3, H, W), equal for Euler.

    x_in = concat(x_t, x_lr) (B, 6, H, W), unchanged; t, dt (B,).
    """
    v1 = model(x_in, t)
    if solver == "euler":
        return v1, v1
    alpha = RK2_NODES[solver]
    v2 = model(euler_step_(x_in.clone(), v1, alpha * dt), t + alpha * dt)
    return v1, (1 - 1 / (2 * alpha)) * v1 + 1 / (2 * alpha) * v2


def integrate(model, x_in, solver="euler", steps=8):
    """The ODE dx/dt = v(x, x_lr, t) from t = 0 to 1 in equal steps, in place in channels 0 to 2 of x_in (B, 6, H, W).

    Returns (x_1, the number of function evaluations made).
    """
    nfe, dt = 0, 1 / steps

    def v(t):
        nonlocal nfe
        nfe += 1
        return model(x_in, torch.full((x_in.shape[0],), t, device=x_in.device))

    for i in range(steps):
        v1 = v(i * dt)
        if solver == "euler":
            euler_step_(x_in, v1, dt)
        else:
            alpha = RK2_NODES[solver]
            euler_step_(x_in, v1, alpha * dt)
            rk2_stage_(x_in, v1, v((i + alpha) * dt), dt, alpha)
    return x_in[:, :3], nfe
