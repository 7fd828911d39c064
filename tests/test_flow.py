"""The mathematics: closed forms of the solvers, the losses of both stages."""
import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import RK45

from distill import backward_in_turn, distillation_losses
from flow import integrate, mean_slope, one_step
from perceptual import Critic, critic_loss, grid_error, mean_score, perceptual_losses
from sample import SOLVERS
from test_model import tiny
from train_flow import flow_loss

ODE_SOLVERS = [name for name in SOLVERS if name != "ancestral"]  # which is a sampler of another process


def buffer(B=2, S=8, seed=0):
    return torch.randn(B, 6, S, S, generator=torch.Generator().manual_seed(seed))


def fixed_field(of_t):
    """A velocity that depends on t alone."""
    return lambda x_in, t: torch.ones_like(x_in[:, :3]) * of_t(t.view(-1, 1, 1, 1))


# --- solvers ---


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_constant_velocity_is_exact(solver, steps):
    x_in, v = buffer(), buffer(seed=1)[:, :3]
    x_1, nfe = integrate(lambda x, t: v, x_in.clone(), solver, steps)
    assert torch.allclose(x_1, x_in[:, :3] + v, atol=2e-6)  # the sum of at most 16 roundings
    if solver != "rk45":
        assert nfe == steps * (1 if solver == "euler" else 2)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("ralston", 2), ("midpoint", 2)])
def test_order_on_v_equals_3_t_squared(solver, order):
    """v = 3 t^2 integrates to 1; halving the step divides the error by 2^order."""
    def error(steps):
        x_1, _ = integrate(fixed_field(lambda t: 3 * t**2), torch.zeros(1, 6, 4, 4), solver, steps)
        return abs(x_1[0, 0, 0, 0].item() - 1)
    ratio = error(8) / max(error(16), 1e-9)
    if solver == "ralston":  # for a pure quadrature its leading error term vanishes: 1/4 f(0) + 3/4 f(2/3) is exact for t^2
        assert error(8) < 1e-6
    else:
        assert ratio == pytest.approx(2**order, rel=0.1)


def test_rk45_on_v_equals_3_t_squared():
    x_1, nfe = integrate(fixed_field(lambda t: 3 * t**2), torch.zeros(1, 6, 4, 4), "rk45")
    assert torch.allclose(x_1, torch.ones_like(x_1), atol=1e-5) and nfe > 7


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_rk45_takes_scipys_steps(tolerance):
    """A turning, stiffening field: the same evaluations at the same times as scipy's RK45, the same end."""
    x_in, times, reference_times = buffer(1, 4), [], []
    angle = torch.linspace(1, 12, 48).view(1, 3, 4, 4)

    def field(x, t):
        times.append(t[0].item())
        return torch.sin(angle * t.view(-1, 1, 1, 1)) * 3 - x[:, :3] * (1 + 5 * t.view(-1, 1, 1, 1))

    def reference_field(t, y):
        reference_times.append(t)
        return (np.sin(angle.double().numpy().ravel() * t) * 3 - y * (1 + 5 * t))

    reference = RK45(reference_field, 0, x_in[:, :3].double().numpy().ravel(), 1, rtol=tolerance, atol=tolerance)
    while reference.status == "running":
        reference.step()
    x_1, nfe = integrate(field, x_in, "rk45", rtol=tolerance, atol=tolerance)
    assert nfe == len(times) == len(reference_times)
    assert np.allclose(times, reference_times, atol=1e-3)
    assert np.allclose(x_1.numpy().ravel(), reference.y, atol=1e-4)


def test_rk45_says_when_the_velocity_is_not_finite():
    with pytest.raises(ArithmeticError, match="not finite"):
        integrate(lambda x, t: torch.full_like(x[:, :3], float("nan")), buffer(), "rk45")


def test_one_euler_step_is_the_one_step_path():
    model, x_in = tiny(), buffer(2, 16)
    assert torch.equal(integrate(model, x_in.clone(), "euler", 1)[0], one_step(model, x_in, 0.0))


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_the_flows_dial_is_the_mean_velocity_up_to_t(solver):
    """v = 3 t^2 leads to t^3 at t, whose mean velocity is t^2; at t = 0 it is v itself."""
    x_in = buffer(1, 4)
    for t in (0, 0.25, 0.7, 1):
        x, nfe = integrate(fixed_field(lambda tau: 3 * tau**2), x_in.clone(), solver, 64, rtol=1e-6, atol=1e-6, t=t)
        assert torch.allclose(x - x_in[:, :3], torch.full_like(x, t**2), atol=0.03 if solver == "euler" else 2e-4)
        assert nfe == 1 if t == 0 else nfe > 6
    _, nfe = integrate(fixed_field(lambda tau: 3 * tau**2), x_in.clone(), "midpoint", 5, t=0.6)
    assert nfe == 6  # three of the five steps that lead to 1
    x, _ = integrate(fixed_field(lambda tau: 0 * tau + 0.3), x_in.clone(), solver, t=1e-6)
    assert torch.allclose(x - x_in[:, :3], torch.full_like(x, 0.3), atol=1e-6)


def test_integrate_leaves_x_lr_alone_and_works_in_place():
    model, x_in = tiny(), buffer(1, 16)
    before = x_in.clone()
    x_1, _ = integrate(model, x_in, "midpoint", 2)
    assert torch.equal(x_in[:, 3:], before[:, 3:]) and x_1.data_ptr() == x_in.data_ptr()
    assert not torch.equal(x_in[:, :3], before[:, :3])


@pytest.mark.parametrize("solver", ["euler", "midpoint", "ralston", "heun"])
def test_mean_slope_is_one_step_of_the_solver(solver):
    model, x_in = tiny(), buffer(2, 16)
    t, dt = torch.tensor([0.3, 0.6]), torch.tensor([0.2, 0.1])
    shifted = lambda x, tau: dt.view(-1, 1, 1, 1) * model(x, t + dt * tau)  # dx/dtau, tau from 0 to 1: integrate's clock
    before = x_in.clone()
    slope = mean_slope(model, x_in, model(x_in, t), t, dt, solver)
    assert torch.equal(x_in, before)
    assert torch.allclose(x_in[:, :3] + dt.view(-1, 1, 1, 1) * slope, integrate(shifted, x_in.clone(), solver, 1)[0], atol=1e-5)


# --- losses ---


def test_flow_loss_is_eq_5():
    x_in, target, t = buffer(), buffer(seed=1)[:, :3], torch.rand(2)
    shifted = lambda x, t: target + 0.5 * t.view(-1, 1, 1, 1)
    assert torch.allclose(flow_loss(shifted, x_in, target, t, "l1"), 0.5 * t, atol=1e-6)
    assert torch.allclose(flow_loss(shifted, x_in, target, t, "l2"), 0.25 * t**2, atol=1e-6)


def test_exact_student_has_no_loss():
    """A teacher with a closed-form trajectory, v = a(x_lr) + 2 t, and the student that is its mean slope from 0 to t."""
    t, x_in = torch.tensor([0.2, 0.6]), buffer()
    teacher = lambda x, t: x[:, 3:] + 2 * t.view(-1, 1, 1, 1)
    student = lambda x, t: x[:, 3:] + t.view(-1, 1, 1, 1)  # x_t = x_0 + t a + t^2
    for objective in ("oftsr", "boot", "pinn"):
        main, align, bc = distillation_losses(student, teacher, x_in, t, t + 0.1, "midpoint", objective)
        assert main < 1e-9 and bc < 1e-12  # midpoint is exact for this field
        assert align == pytest.approx(((1 - t) * t).square().mean().item(), rel=1e-5)  # v_theta - v_phi = t
        assert distillation_losses(student, teacher, x_in, t, t + 0.1, "euler", objective)[0] > 1e-5


def eager_losses(student, teacher, x_in, t, s):
    """Algorithm 1 as the paper prints it, evaluation by evaluation, Euler."""
    image = lambda v: v.view(-1, 1, 1, 1)
    x_0, x_lr = x_in[:, :3], x_in[:, 3:]
    v_t, v_s, v_0 = student(x_in, t), student(x_in, s), student(x_in, 0 * t)
    with torch.no_grad():
        x_t = x_0 + image(t) * v_t
        u_t, u_0 = teacher(torch.cat([x_t, x_lr], 1), t), teacher(x_in, 0 * t)
    dt, s, t = image(s - t), image(s), image(t)
    lam = 1 - t * (1 - s) / (s * (1 - t))
    x_theta = x_t.detach() + (1 - t) * u_t
    return {
        "oftsr": (v_s - (v_t + dt / s * (u_t - v_t)).detach()).square().mean(),
        "pinn": (s / dt * (v_s - v_t) + v_t - u_t).square().mean(),
        "boot": (((x_0 + v_s) - (x_0 + v_t + lam * (x_theta - (x_0 + v_t))).detach()) / lam**2).square().mean(),
    }, ((1 - t) * (v_t - u_t)).square().mean(), (v_0 - u_0).square().mean()


@pytest.mark.parametrize("objective", ["oftsr", "boot", "pinn"])
def test_distillation_losses_and_gradients_are_the_papers(objective):
    """Batched and fused against one evaluation at a time: values, and the gradient of Eq. (12) in every parameter."""
    t, x_in = torch.tensor([0.1, 0.7]), buffer(2, 16)
    s = t + 0.05
    grads, values = [], []
    for batched in (True, False):
        teacher, student = tiny(), tiny(one_step=True).requires_grad_(True)
        if batched:
            losses = distillation_losses(student, teacher, x_in, t, s, "euler", objective)
        else:
            main, align, bc = eager_losses(student, teacher, x_in, t, s)
            losses = torch.stack([main[objective], align, bc])
        (losses * torch.tensor([1.0, 0.01, 0.1])).sum().backward()
        values.append(losses.detach())
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert torch.allclose(*values, rtol=1e-4)
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()


@pytest.mark.parametrize("align_grad", [False, True])
def test_the_evaluations_in_turn_are_those_in_one_batch(align_grad):
    """Values, and the gradient of Eq. (12) in every parameter; with align_grad also against Eq. (10) differentiated as it is printed."""
    t, x_in = torch.tensor([0.1, 0.7]), buffer(2, 16)
    args = argparse.Namespace(solver="midpoint", align_grad=align_grad, lambda_align=5.0, lambda_bc=0.1, gradient_accumulation_steps=1)
    values, grads = [], []
    for how in ("batch", "turn", "printed"):
        teacher, student = tiny().requires_grad_(False), tiny(one_step=True).requires_grad_(True)
        if how == "turn":
            losses = backward_in_turn(student, teacher, x_in, t, t + 0.05, args, exchange=True)
        else:
            losses = distillation_losses(student, teacher, x_in, t, t + 0.05, "midpoint", "oftsr", align_grad)
            if how == "printed" and align_grad:
                x_t = torch.cat([x_in[:, :3] + t.view(-1, 1, 1, 1) * student(x_in, t), x_in[:, 3:]], dim=1)
                align = ((1 - t.view(-1, 1, 1, 1)) * (student(x_in, t) - teacher(x_t, t))).square().mean()
                losses = torch.stack([losses[0], align, losses[2]])
            (losses * torch.tensor([1, 5.0, 0.1])).sum().backward()
        values.append(losses.detach())
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    for value, grad in zip(values[1:], grads[1:]):
        assert torch.allclose(value, values[0], rtol=1e-4) and (grad - grads[0]).norm() < 1e-4 * grads[0].norm()
    through = distillation_losses(student, teacher, x_in, t, t + 0.05, align_grad=True)[1]
    constant = distillation_losses(student, teacher, x_in, t, t + 0.05)[1]
    there, back = (torch.autograd.grad(loss, student.out["2"].weight, retain_graph=True)[0] for loss in (through, constant))
    assert through.item() == pytest.approx(constant.item(), rel=1e-4) and (there - back).norm() > 1e-3 * back.norm()  # the same loss, another gradient


def perceptual_example():
    """x_1, x_in, z_in, t, s of five pictures: two of them, a quarter rounded up, are at s = .25 and .5; the last x_1 is smooth."""
    x_in, z_in = buffer(5, 16), buffer(5, 16, seed=1)
    z_in[:, 3:] = x_in[:, 3:]
    x_1 = x_in[:, 3:] / 2
    x_1[4] = 0.1
    return x_1, x_in, z_in, torch.linspace(0.6, 1, 5), torch.tensor([0.25, 0.5, 0.0, 0.0, 0.0])


def image(v):
    return v.view(-1, 1, 1, 1)


def test_perceptual_losses_measure_each_part_of_the_dial():
    teacher, critic = tiny(), Critic(tiny().feature_channels)
    x_1, x_in, z_in, t, s = perceptual_example()
    truth = x_1 - x_in[:, :3]
    dial = lambda x, t: truth[[*range(5), *range(5), 0, 1]]  # what is asked: all pictures at t = 1, all at 0, two between
    losses = lambda student: perceptual_losses(student, teacher, critic, x_1, x_in, z_in, t, s)[0]
    looks, end, line, *_ = losses(dial)
    assert looks < 1e-6 and end < 1e-9 and line < 1e-9
    looks, end, line, *_ = losses(lambda x, t: dial(x, t) + 0.1 * image(t * (1 - t)))  # its ends as they were
    assert looks < 1e-6 and end < 1e-9
    assert line.item() == pytest.approx((0.01 * (s[:2] - s[:2] ** 2).square().mean() / truth[:2].square().mean()).item(), rel=1e-4)
    looks, end, line, *_ = losses(lambda x, t: dial(x, t) + 0.1 * image(t))  # still straight, to another end
    assert looks > 1e-3 and end < 1e-9 and line < 1e-9
    looks, end, line, *_ = losses(lambda x, t: dial(x, t) * image(1 - 0.1 * (1 - t)))  # and from another
    assert looks < 1e-6 and end.item() == pytest.approx(0.01, rel=1e-4) and line < 1e-9


def test_the_grid_is_what_depends_on_the_place_in_the_patch_where_the_photograph_is_smooth():
    ramp = torch.linspace(-0.05, 0.05, 32).expand(2, 3, 32, 32)  # smooth, but in the second picture's upper half
    x_1 = ramp.clone()
    x_1[1, :, :16] += torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 1, 1).expand_as(x_1).clone().requires_grad_()
    assert grid_error(x, x_1, 2) < 1e-12
    places = torch.tensor([[0.1, 0.0], [0.0, 0.0]]).repeat(16, 16)  # one pixel of each patch
    right = torch.tensor([0.1, 0, 0, 0]).var(correction=0).item()
    assert grid_error(x + places, x_1, 2).item() == pytest.approx(right, rel=1e-4)
    assert grid_error(x + places, x_1, 4).item() == pytest.approx(right, rel=1e-4) and grid_error(x + places, x_1, 1) < 1e-12
    gradient = torch.autograd.grad(grid_error(x + places, x_1, 2), x)[0]
    assert gradient[0].ne(0).all() and gradient[1, :, 16:].ne(0).all() and gradient[1, :, :16].eq(0).all()
    odd = F.pad(x + places, (0, 7, 0, 6))  # what is no square is not looked at
    assert torch.equal(grid_error(odd, F.pad(x_1, (0, 7, 0, 6)), 2), grid_error(x + places, x_1, 2))
    assert grid_error(places.expand_as(x_1), torch.randn(2, 3, 32, 32), 2) == 0  # nothing smooth
    for deviation, smooth in ((0.04, True), (0.06, False)):
        rows = torch.zeros_like(x_1)
        rows[:, 1, ::2] = 2 * deviation  # in one channel alone
        assert (grid_error(places.expand_as(rows), rows, 2) > 0) == smooth
    alternating = x.detach().clone()
    alternating[0] += places
    alternating[1] -= places  # a texture, no grid: the smooth squares that it has more and those that it has less
    assert grid_error(alternating, ramp, 2) < 1e-12
    assert grid_error(alternating, ramp, 2, each=True).item() == pytest.approx(right, rel=0.01)
    assert grid_error(x + places, x_1, 2, each=True).item() == pytest.approx(right, rel=1e-4)


def test_the_faithful_end_shows_no_grid_in_any_square_and_the_others_none_in_all_together():
    teacher, critic, (x_1, x_in, z_in, t, s) = tiny(), Critic(tiny().feature_channels), perceptual_example()
    x_1, places = torch.full_like(x_1, 0.1), torch.tensor([[0.1, 0.0], [0.0, 0.0]]).repeat(8, 8)
    wider = torch.tensor([[0.1, 0.0], [0.0, 0.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1).repeat(4, 4)  # not of its patches
    texture = torch.cat([places[:, :8], -places[:, 8:]], dim=1)  # of squares with more and squares with less
    right = places[:2, :2].var(correction=0).item()

    def grid(pattern, time):
        at = lambda t: image(torch.isin(t, time).float()) * pattern
        dial = lambda x, t: (x_1 - x_in[:, :3])[[*range(5), *range(5), 0, 1]] + at(t)
        return perceptual_losses(dial, teacher, critic, x_1, x_in, z_in, t, s)[0][3].item()

    faithful, between, realistic = torch.tensor(0.0), s[:2], torch.tensor(1.0)
    assert teacher.patch == 2
    for time in (faithful, between, realistic):
        assert grid(places, time) == pytest.approx(right, rel=1e-3) and grid(wider, time) < 1e-9
    assert grid(texture, faithful) == pytest.approx(right, rel=1e-3) and grid(texture, between) < 1e-9 and grid(texture, realistic) < 1e-9


def test_the_teacher_looks_at_both_on_their_way_from_another_start():
    teacher, critic, (x_1, x_in, z_in, t, s) = tiny(), Critic(tiny().feature_channels), perceptual_example()
    losses, seen, there = perceptual_losses(lambda x, t: 0.2 * x[:, 3:], teacher, critic, x_1, x_in, z_in, t, s)
    way = lambda x: torch.cat([(1 - image(t)) * z_in[:, :3] + image(t) * x, x_in[:, 3:]], dim=1)
    for maps, x in ((seen, x_in[:, :3] + 0.2 * x_in[:, 3:]), (there, x_1)):
        expected = teacher.features(way(x), t)
        assert len(maps) == len(expected) == 2 and [m.shape[1] for m in maps] == teacher.feature_channels
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, expected))
    looks = [((a - b).abs().mean() / b.abs().mean()).item() for a, b in zip(seen, there)]
    assert losses[0].item() == pytest.approx(sum(looks) / 2, rel=1e-5)
    assert losses[4].item() == pytest.approx(-mean_score(critic(seen)).item(), rel=1e-5)


def test_perceptual_losses_teach_the_student_and_nobody_else_and_the_line_moves_no_end():
    teacher, student, critic = tiny(), tiny(one_step=True).requires_grad_(True), Critic(tiny().feature_channels)
    losses, seen, there = perceptual_losses(student, teacher, critic, *perceptual_example())
    for loss in losses:
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)])
        assert grads.isfinite().all() and grads.norm() > 0
    losses.sum().backward()
    assert all(p.grad is None for p in critic.parameters())
    critic_loss(critic, seen, there).backward()
    assert all(p.grad.norm() > 0 for p in critic.parameters() if p.ndim == 4)
    end = torch.zeros((), requires_grad=True)
    losses, _, _ = perceptual_losses(lambda x, t: student(x, t) + end * image((t == 1).float()), teacher, critic, *perceptual_example())
    grads = [torch.autograd.grad(loss, end, retain_graph=True, allow_unused=True)[0] for loss in losses]
    assert grads[0] != 0 and grads[4] != 0 and not grads[1] and not grads[2]
    losses, _, _ = perceptual_losses(lambda x, t: student(x, t) + end * image((t == 0).float()), teacher, critic, *perceptual_example())
    grads = [torch.autograd.grad(loss, end, retain_graph=True, allow_unused=True)[0] for loss in losses]
    assert grads[1] != 0 and not grads[0] and not grads[2] and not grads[4]


def test_a_critic_learns_to_tell():
    torch.manual_seed(0)
    critic, noise = Critic([8]), torch.randn(4, 8, 6, 6)
    restored, photographs = [noise * 0.5], [noise]
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        losses.append(critic_loss(critic, restored, photographs))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(2, abs=0.3) and 0 <= losses[-1] < 0.5
    assert critic(photographs)[0].mean() > 0.5 and critic(restored)[0].mean() < -0.5
