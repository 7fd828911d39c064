"""The whole method in two dimensions, to read first. python toy.py: a minute on a laptop, prints how good it gets, draws toy.png.

A point x_1 = (a, b) lies on a spiral. Only a is measured, x_lr = (a, 0): several turns of the spiral lie above and below, and
each is a true answer, as every sharp photograph is that shrinks to the same small one. The mean of the answers is the safest
guess and lies on no turn at all: it is the blurred photograph. Symbols and equations are the paper's, as in README.md.
"""
import copy
import math

import torch
import torch.nn as nn

TURN = 2 * math.pi * 1.6 * torch.linspace(0.02, 1, 300) ** 0.5  # angles along 1.6 turns of a spiral, as many to every bit of its length
CENTRES = 1.5 * TURN[:, None] / TURN[-1] * torch.stack([TURN.cos(), TURN.sin()], dim=1)  # (300, 2): x_1 is one of them, and noise
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
        layers = [layer for n in (45, width, width) for layer in (nn.Linear(n, width), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, x_lr, t):
        h = torch.cat([x, x_lr, t], dim=1)
        return self.layers(torch.cat([h, *[f(h * k) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]], dim=1))  # it can turn sharply


def train(model, loss, steps, lr):
    """Adam on loss(n), a mean over n fresh points, at a rate that falls to 0. Returns the model, frozen."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.zero_grad()
        loss(512).backward()
        optimizer.step()
    return model.requires_grad_(False)


def flow(sigma_p, steps):
    """Stage 1: a velocity that carries x_0 to x_1, learnt from pairs of the two ends."""
    model = Velocity()
    def loss(n):
        (x_1, x_lr), t = true_points(n), torch.rand(n, 1)
        x_0 = start(x_lr, sigma_p)
        return (model((1 - t) * x_0 + t * x_1, x_lr, t) - (x_1 - x_0)).square().mean()  # Eq. (5)
    return train(model, loss, steps, lr=2e-3)


def distil(teacher, sigma_p, steps):
    """Stage 2, Algorithm 1: a student that sees x_0 alone, and t, and says where the teacher's path from x_0 leads."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    def loss(n):
        x_lr, t = true_points(n)[1], 0.01 + 0.98 * torch.rand(n, 1)
        x_0, s, zero = start(x_lr, sigma_p), (t + DT).clamp(max=1), torch.zeros_like(t)
        v_t, v_s, v_0 = student(x_0.repeat(3, 1), x_lr.repeat(3, 1), torch.cat([t, s, zero])).chunk(3)
        with torch.no_grad():
            x_t = x_0 + t * v_t  # Eq. (7)
            v_theta, v_bc = teacher(x_t, x_lr, t), teacher(x_0, x_lr, zero)
            v_step = teacher(x_t + (s - t) / 2 * v_theta, x_lr, (s + t) / 2)  # the midpoint method
            target = v_t + (s - t) / s * (v_step - v_t)
        distill, align, bc = ((d * d).mean() for d in (v_s - target, (1 - t) * (v_t - v_theta), v_0 - v_bc))  # Eq. (9), (10), (11)
        return distill + LAMBDA_ALIGN * align + LAMBDA_BC * bc  # Eq. (12)
    return train(student, loss, steps, lr=1e-3)


def walk(model, x_0, x_lr, steps=100):
    """The flow's path from x_0, midpoint method: (steps + 1, n, 2), x_t at t = 0, 1/steps, ..., 1."""
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
    low, high = torch.full_like(b_0, -9), torch.full_like(b_0, 9)
    b = t * (weights * CENTRES[:, 1]).sum(1, keepdim=True)  # sigma_p = 0: one start, one path, which leads to the mean
    for _ in range(40 if sigma_p else 0):
        b = (low + high) / 2
        rank = (weights * torch.special.ndtr((b - t * CENTRES[:, 1]) / math.hypot(t * WIDTH, (1 - t) * sigma_p))).sum(1, keepdim=True)
        below = rank < torch.special.ndtr(b_0 / sigma_p)
        low, high = torch.where(below, b, low), torch.where(below, high, b)
    return torch.cat([torch.lerp(x_0[:, :1].double(), a, t), b], dim=1).float()


def figure(flows, student, path, a=-0.2):
    """The problem; the flow's paths from three starts where a is measured; what the student says at three t; its error, also printed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    fig, colour, ink, red = Figure(figsize=(14, 7.2), layout="constrained"), colormaps["viridis"], "#2a2f45", "#e4572e"
    axes, (x_1, x_lr), measured = fig.subplots(2, 4).flatten(), true_points(2500), torch.tensor([[a, 0.0]]).repeat(48, 1)
    answers, mean = x_1[(x_1[:, 0] - a).abs() < 0.02], exact(measured[:1], measured[:1], 1.0, 0)[0]
    axes[0].axvline(a, c=ink, lw=1, zorder=1)
    axes[0].set_title("one measurement, many true answers")
    for point, style, label in ((answers.T, dict(s=18, c=red), "the answers"), (mean, dict(s=90, c=ink, marker="X"), "their mean"),
                                (measured[0], dict(s=60, c="white", edgecolors=ink), "$x_{lr}$")):
        axes[0].scatter(*point, zorder=3, label=label, **style)
    axes[0].legend(loc="lower right", fontsize=8)
    for ax, (sigma_p, model) in zip(axes[1:4], flows.items()):
        x_0, t = start(measured, sigma_p), torch.linspace(0, 1, 101)
        paths, order = walk(model, x_0, measured)[:, :, 1].T, x_0[:, 1].argsort()
        for i, k in enumerate(order):
            ax.plot(t, paths[k], c=colour(i / 48), lw=1.1)
            if i % 6 == 3:
                ax.plot(t[::4], [exact(x_0[k : k + 1], measured[:1], s.item(), sigma_p)[0, 1] for s in t[::4]], c=ink, ls=":", lw=1)
        ax.scatter(torch.full((len(answers),), 1.03), answers[:, 1], s=8, c=red)
        ax.set(title=f"the flow's paths, $\\sigma_p$ = {sigma_p:g}", xlabel="t  (dotted: exact)", ylim=(-2.3, 2.3))
    x_0, errors = start(x_lr, SIGMA_P), []  # of the flow and the student, at t = 0, .1, ..., 1
    for i, x_t in enumerate(walk(flows[SIGMA_P], x_0, x_lr)[::10]):
        v, right = student(x_0, x_lr, torch.full((len(x_0), 1), i / 10)), exact(x_0[:500], x_lr[:500], i / 10, SIGMA_P)
        errors.append([(x[:500] - right).norm(dim=1).median().item() for x in (x_t, x_0 + i / 10 * v)])
        if i in (0, 5, 10):
            axes[4 + i // 5].scatter(*(x_0 + v).T, s=4, c=colour(torch.special.ndtr(x_0[:, 1] / SIGMA_P)), linewidths=0, zorder=3)  # Eq. (13)
            axes[4 + i // 5].set_title(f"the student in one step, t = {i / 10:g}")
            print(f"student at t = {i / 10:g}: {(x_0 + v - x_1).norm(dim=1).mean():.3f} from the truth, {torch.cdist(x_0 + v, CENTRES).min(1).values.mean():.3f} "
                  f"from the nearest true point; from the exact path {errors[-1][1]:.3f}, its teacher {errors[-1][0]:.3f}")
    axes[7].plot(torch.linspace(0, 1, 11), errors, lw=2, label=["the flow, 100 steps", "the student, 1 step"])
    axes[7].set(title="distance from the exact path (median)", xlabel="t", ylim=(0, None))
    axes[7].legend()
    for ax in (axes[0], *axes[4:7]):
        ax.scatter(*x_1.T, s=2, c="#d5d8e0", linewidths=0, zorder=0)
        ax.set(xlim=(-1.75, 1.75), ylim=(-1.75, 1.75), aspect="equal", xticks=[], yticks=[])
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    torch.manual_seed(0)
    flows = {sigma_p: flow(sigma_p, steps=1500) for sigma_p in (0, SIGMA_P, 1)}
    figure(flows, distil(flows[SIGMA_P], SIGMA_P, steps=2000), "toy.png")
