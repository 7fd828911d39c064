"""The whole method in two dimensions, to read first: a flow, its one-step student with a dial, and one figure.

    python toy.py                    # a minute on a laptop: trains four small networks, prints what they learnt, draws toy.png

A point x_1 = (a, b) lies on a spiral. Only a is measured, x_lr = (a, 0): several turns of the spiral lie above and below, and
each is a true answer, as every sharp photograph is that shrinks to the same small one. The mean of the answers is the safest
guess and lies on no turn at all: it is the blurred photograph. Symbols and equations are the paper's, as in README.md.
"""
import argparse
import copy
import math

import torch
import torch.nn as nn

TURN = 2 * math.pi * torch.linspace(0.02, 1, 300) ** 0.5 * 2.1  # angles along the spiral: as many of them to every bit of its length
CENTRES = 1.5 * TURN[:, None] / TURN[-1] * torch.stack([TURN.cos(), TURN.sin()], dim=1)  # (300, 2): x_1 is one of them and a little noise
WIDTH = 0.04  # deviation of that noise
SIGMA_P, DT, LAMBDA_ALIGN, LAMBDA_BC = 0.3, 0.05, 0.01, 0.1  # of the student


def true_points(n):
    """n points of the spiral x_1, and what is measured of them, x_lr = H^T(H(x_1)) with H(a, b) = a: (n, 2) each."""
    x_1 = CENTRES[torch.randint(len(CENTRES), (n,))] + WIDTH * torch.randn(n, 2)
    return x_1, x_1 * torch.tensor([1.0, 0.0])


def start(x_lr, sigma_p):
    """x_0 = sqrt(1 - sigma_p^2) x_lr + sigma_p eps, Eq. (4)."""
    return math.sqrt(1 - sigma_p**2) * x_lr + sigma_p * torch.randn_like(x_lr)


class Velocity(nn.Module):
    """v(x, x_lr, t): x and x_lr (n, 2), t (n, 1) -> (n, 2)."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5 * 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, 2))

    def forward(self, x, x_lr, t):
        h = torch.cat([x, x_lr, t], dim=1)
        waves = [f(h * k) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]  # so that it can turn sharply
        return self.layers(torch.cat([h, *waves], dim=1))


def train(model, loss, steps, lr=2e-3, batch=512):
    """Adam on loss(n), the mean over n fresh points, its rate falling to 0. Returns the average of the weights."""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 / min(step + 1, 100))
    return ema


def flow(sigma_p, steps):
    """Stage 1, Eq. (5): a velocity that carries x_0 to x_1, from examples of the two ends."""
    model = Velocity()

    def loss(n):
        (x_1, x_lr), t = true_points(n), torch.rand(n, 1)
        x_0 = start(x_lr, sigma_p)
        return (model((1 - t) * x_0 + t * x_1, x_lr, t) - (x_1 - x_0)).square().mean()
    return train(model, loss, steps)


def distil(teacher, sigma_p, steps):
    """Stage 2, Algorithm 1: a student that sees x_0 alone, and t, and says where the teacher's path from x_0 leads."""
    student = copy.deepcopy(teacher).requires_grad_(True)

    def loss(n):
        (_, x_lr), t = true_points(n), 0.01 + 0.98 * torch.rand(n, 1)
        x_0, s, zero = start(x_lr, sigma_p), (t + DT).clamp(max=1), torch.zeros_like(t)
        v_t, v_s, v_0 = student(x_0.repeat(3, 1), x_lr.repeat(3, 1), torch.cat([t, s, zero])).chunk(3)
        with torch.no_grad():
            x_t = x_0 + t * v_t  # Eq. (7)
            v_theta = teacher(x_t, x_lr, t)
            middle = teacher(x_t + (s - t) / 2 * v_theta, x_lr, (s + t) / 2)  # the midpoint method
            target = v_t + (s - t) / s * (middle - v_t)
            v_bc = teacher(x_0, x_lr, zero)
        distill = (v_s - target).square().mean()  # Eq. (9)
        align = ((1 - t) * (v_t - v_theta)).square().mean()  # Eq. (10)
        return distill + LAMBDA_ALIGN * align + LAMBDA_BC * (v_0 - v_bc).square().mean()  # Eq. (11), (12)
    return train(student, loss, steps, lr=1e-3)


@torch.no_grad()
def walk(model, x_0, x_lr, steps=100):
    """The flow's path from x_0 by the midpoint method: (steps + 1, n, 2), x_t at t = 0, 1/steps, ..., 1."""
    path, dt = [x_0], 1 / steps
    for i in range(steps):
        t, x = torch.full((len(x_0), 1), i * dt), path[-1]
        path.append(x + dt * model(x + dt / 2 * model(x, x_lr, t), x_lr, t + dt / 2))
    return torch.stack(path)


def exact(x_0, x_lr, t, sigma_p):
    """x_t of the flow that a perfect network would learn, in closed form: (n, 2).

    The measured coordinate goes straight from x_0 to a. The other is a mixture of Gaussians at every t, and as no two paths
    cross, a point keeps its rank: x_t is the quantile of rank F_0(x_0) of the mixture at t, found by halving an interval.
    """
    a, b_0 = x_lr[:, :1].double(), x_0[:, 1:].double()
    weights = (-0.5 * ((a - CENTRES[:, 0]) / WIDTH) ** 2).softmax(dim=1)  # of each centre, given a: (n, 300)
    if sigma_p == 0:  # one start, one path, which leads to the mean of the answers
        b = t * (weights * CENTRES[:, 1]).sum(1, keepdim=True)
    else:
        def rank(b):  # F_t
            return (weights * torch.special.ndtr((b - t * CENTRES[:, 1]) / math.hypot(t * WIDTH, (1 - t) * sigma_p))).sum(1, keepdim=True)
        wanted, low, high = torch.special.ndtr(b_0 / sigma_p), torch.full_like(b_0, -9), torch.full_like(b_0, 9)
        for _ in range(50):
            b = (low + high) / 2
            low, high = torch.where(rank(b) < wanted, b, low), torch.where(rank(b) < wanted, high, b)
    return torch.cat([torch.lerp(x_0[:, :1].double(), a, t), b], dim=1).float()


@torch.no_grad()
def figure(flows, student, errors, path):
    """The problem, the flow's paths from three starts, what the student says at three t, and how far from right it is."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(14, 7.4), layout="constrained")
    axes, a, colours = fig.subplots(2, 4).flatten(), 0.25, dict(cmap="plasma", vmin=-0.05, vmax=1.05)
    truth, x_lr = true_points(4000)
    measured = torch.tensor([[a, 0.0]])
    answers = truth[(truth[:, 0] - a).abs() < 0.02]
    mean = exact(measured, measured, 1.0, 0)[0]

    axes[0].set_title("one measurement, many true answers")
    axes[0].scatter(*truth.T, s=2, c="#b8bcc8", linewidths=0)
    axes[0].axvline(a, c="#2a2f45", lw=1)
    axes[0].scatter(*answers.T, s=16, c="#e4572e", linewidths=0, label="true answers", zorder=3)
    axes[0].scatter(*mean, s=90, c="#2a2f45", marker="X", label="their mean", zorder=3)
    axes[0].scatter(a, 0, s=50, facecolors="white", edgecolors="#2a2f45", label="$x_{lr}$", zorder=3)
    axes[0].legend(loc="lower left", fontsize=8)

    for ax, (sigma_p, model) in zip(axes[1:4], flows.items()):
        x_0, t = start(measured.repeat(48, 1), sigma_p), torch.linspace(0, 1, 101)
        rank = x_0[:, 1].argsort().argsort() / 47
        ax.set_title(f"$\\sigma_p$ = {sigma_p:g}: " + {0: "one path, to the mean", 1: "the same, from pure noise"}.get(sigma_p, "the paths part"))
        for b, r in zip(walk(model, x_0, measured.repeat(48, 1))[:, :, 1].T, rank):
            ax.plot(t, b, c=axes[0].scatter([], [], c=[], **colours).to_rgba(r), lw=1.1)
        for p in x_0[rank.argsort()[::6]]:
            ax.plot(t[::4], [exact(p[None], measured, float(s), sigma_p)[0, 1] for s in t[::4]], "k:", lw=0.9)
        ax.scatter(torch.full((len(answers),), 1.03), answers[:, 1], s=8, c="#e4572e", linewidths=0)
        ax.set(xlabel="t", ylim=(-2.4, 2.4))

    x_0 = start(x_lr, SIGMA_P)
    for ax, t in zip(axes[4:7], (0.0, 0.5, 1.0)):
        x = x_0 + student(x_0, x_lr, torch.full((len(x_0), 1), t))  # Eq. (13)
        ax.set_title(f"the dial at t = {t:g}")
        ax.scatter(*truth.T, s=2, c="#d9dbe3", linewidths=0)
        ax.scatter(*x.T, s=4, c=torch.special.ndtr(x_0[:, 1] / SIGMA_P), linewidths=0, **colours)
    axes[7].set_title("distance from the exact path")
    for (name, error), colour in zip(errors.items(), ("#7a8194", "#e4572e")):
        axes[7].plot(torch.linspace(0, 1, len(error)), error, c=colour, lw=2, label=name)
    axes[7].set(xlabel="t", ylim=0)
    axes[7].legend()
    for ax in (axes[0], *axes[4:7]):
        ax.set(xlim=(-1.75, 1.75), ylim=(-1.75, 1.75), aspect="equal", xticks=[], yticks=[])
    fig.savefig(path, dpi=110)
