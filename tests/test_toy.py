"""toy.py: the closed form against an integration of the exact velocity, and that the method comes near it."""
import math
import re

import pytest
import torch

import toy


def exact_velocity(x, x_lr, t, sigma_p):
    """E[x_1 - x_0 | x_t, x_lr] of the spiral, from Bayes' rule: the velocity that a perfect network would learn, float64."""
    a, b = x_lr[:, :1], x[:, 1:]
    spread = math.hypot(t * toy.WIDTH, (1 - t) * sigma_p)
    log = -0.5 * ((a - toy.CENTRES[:, 0]) / toy.WIDTH) ** 2 - 0.5 * ((b - t * toy.CENTRES[:, 1]) / spread) ** 2
    mean_b = toy.CENTRES[:, 1] + t * toy.WIDTH**2 / spread**2 * (b - t * toy.CENTRES[:, 1])
    answer = torch.cat([a, (log.softmax(1) * mean_b).sum(1, keepdim=True)], dim=1)
    return (answer - x) / (1 - t)


@pytest.mark.parametrize("sigma_p", [0.3, 1])
def test_the_closed_form_is_the_path_of_the_exact_velocity(sigma_p):
    torch.manual_seed(0)
    x_lr = toy.true_points(50)[1].double()
    x_0, steps = toy.start(x_lr, sigma_p), 2000
    x = x_0
    for i in range(int(0.9 * steps)):  # midpoint method, to t = .9
        t = i / steps
        half = x + exact_velocity(x, x_lr, t, sigma_p) / (2 * steps)
        x = x + exact_velocity(half, x_lr, t + 0.5 / steps, sigma_p) / steps
    assert (x - toy.exact(x_0, x_lr, 0.9, sigma_p)).abs().max() < 1e-3
    assert torch.allclose(toy.exact(x_0, x_lr, 0.0, sigma_p), x_0.float(), atol=1e-5)


def test_without_noise_the_one_path_leads_to_the_mean():
    torch.manual_seed(0)
    x_lr = torch.tensor([[0.3, 0.0]])
    near = toy.true_points(200_000)[0]
    answers = near[(near[:, 0] - 0.3).abs() < 0.01, 1]
    assert answers.std() > 0.3 and toy.exact(x_lr, x_lr, 1.0, 0)[0, 1].item() == pytest.approx(answers.mean().item(), abs=0.1)  # the sample's own deviation is .03


def test_the_student_learns_the_path_and_the_figure_is_drawn(tmp_path, capsys):
    """After a short training: near the exact path at all t, which the flow asked for one step is not; and farther from the truth as t grows."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    teacher = toy.flow(toy.SIGMA_P, 400)
    student = toy.distil(teacher, toy.SIGMA_P, 150)
    toy.figure({0: teacher, toy.SIGMA_P: teacher, 1: teacher}, student, tmp_path / "toy.png")
    said = [[float(number) for number in re.findall(r"\d*\.\d+", line.split(":", 1)[1])] for line in capsys.readouterr().out.splitlines()]
    truth, nearest, path, teachers = zip(*said)  # at t = 0, .5, 1
    assert truth[0] < truth[1] < truth[2] and path[0] == 0 and max(path) < 0.25
    x_lr = toy.true_points(200)[1]
    x_0 = toy.start(x_lr, toy.SIGMA_P)
    right, late = toy.exact(x_0, x_lr, 1.0, toy.SIGMA_P), torch.ones(200, 1)
    assert (x_0 + student(x_0, x_lr, late) - right).norm(dim=1).median() < 0.5 * (x_0 + teacher(x_0, x_lr, late) - right).norm(dim=1).median()
    assert (tmp_path / "toy.png").stat().st_size > 50_000
