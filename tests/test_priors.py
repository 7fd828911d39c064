"""The four methods on a Gaussian prior, whose posterior is known; their results' mean and covariance computed, not drawn: all but DPS are linear in the noise."""
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from console import InputError
from degradations import H
from model import save_release
from pictures import read_image
from priors import Measurement, ddnm, ddrm, diffpir, dps, restore, times
from test_model import tiny

SHAPE, SIDE = (4, 4), 2  # of x_1 and the scale; two pixels of y are wanted along each axis
N = SHAPE[0] * SHAPE[1]
EXACT = [(ddnm, {}), (ddrm, dict(eta=0.0)), (diffpir, dict(zeta=0.0))]  # without noise, where seen and unseen are independent


def dense(degradation):
    """H as a matrix, from its own answers to unit pictures: (4, 16)."""
    return torch.stack([H(e.view(1, 1, *SHAPE), degradation, SIDE).flatten() for e in torch.eye(N, dtype=torch.float64)], dim=1)


def gaussian(degradation, correlated=False, sigma_n=0.0, seed=0, variance=1.0):
    """A prior N(mu, C), a measurement of a draw, and the posterior: (velocity, Measurement, y, (mu, C), (mean, covariance))."""
    torch.manual_seed(seed)
    A, eye = dense(degradation), torch.eye(N, dtype=torch.float64)
    mu = 0.5 * torch.randn(N, dtype=torch.float64)
    if correlated:
        place = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in SHAPE))
        C = torch.exp(-torch.cdist(place, place) / 3)
    else:  # two variances: of what H sees, and of what it does not
        seen = torch.linalg.pinv(A) @ A
        C = variance * seen + 0.6 * (eye - seen)
    y = A @ (mu + torch.linalg.cholesky(C) @ torch.randn(N, dtype=torch.float64)) + sigma_n * torch.randn(len(A), dtype=torch.float64)
    gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + sigma_n**2 * torch.eye(len(A)))

    def v(x_in, t):  # E[x_1 - eps | x_t], in closed form
        t = t[0].item()
        x = x_in[:, :1].flatten(1) - t * mu
        return (mu + x @ torch.linalg.inv(t * t * C + (1 - t) ** 2 * eye) @ (t * C - (1 - t) * eye)).view(-1, 1, *SHAPE)

    return v, Measurement(y.view(1, 1, 2, 2), degradation, SIDE, sigma_n), y, (mu, C), (mu + gain @ (y - A @ mu), C - gain @ A @ C)


def law(method, v, m, steps, **how):
    """Mean (16,) and covariance (16, 16) of what a method gives: its answers to no noise and to each unit of noise."""
    def noise(i):
        z = torch.zeros(1 + (steps + 1) * N, N, dtype=torch.float64)
        z[1 + i * N : 1 + (i + 1) * N] = torch.eye(N)
        return z.view(-1, 1, *SHAPE)

    x, nfe = method(v, m, noise, steps=steps, **how)
    assert nfe == steps
    mean, response = x[0].flatten(), x[1:].flatten(1) - x[0].flatten()
    return mean, response.T @ response


def apart(law, exact):
    """How far a mean and a covariance are from the exact ones, relative to them."""
    return [((a - b).norm() / b.norm()).item() for a, b in zip(law, exact)]


@pytest.mark.parametrize("degradation, scale", [("bicubic", 4), ("avgpool", 4), ("bicubic", 3)])
def test_the_measurement_is_h_in_other_coordinates(degradation, scale):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8 * scale, 5 * scale, dtype=torch.float64)
    m = Measurement(H(x, degradation, scale), degradation, scale, 0.1)
    z = m.coordinates(x)
    assert m.seen.sum() == 40 and torch.allclose(m.picture(z), x) and torch.allclose(z.norm(), x.norm())
    assert torch.allclose(m.y, z * m.seen) and torch.allclose(H(m.picture(m.y), degradation, scale), H(x, degradation, scale))
    assert torch.allclose((m.sigma * m.s)[m.seen], torch.tensor(0.1, dtype=torch.float64)) and not m.sigma[~m.seen].any()


def test_h_of_the_real_world_has_no_singular_values():
    with pytest.raises(InputError, match="not linear"):
        Measurement(torch.zeros(1, 3, 4, 4), "real", 4)


@pytest.mark.parametrize("method, how", EXACT)
@pytest.mark.parametrize("degradation", ["bicubic", "avgpool"])
def test_without_noise_and_correlation_the_posterior_is_sampled(degradation, method, how):
    """The mean at once, and the covariance with an error that halves with the step."""
    v, m, y, _, posterior = gaussian(degradation)
    coarse, fine = (apart(law(method, v, m, steps, **how), posterior) for steps in (40, 80))
    assert max(coarse[0], fine[0]) < 1e-9
    assert fine[1] < 0.07 and fine[1] / coarse[1] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("method, how", [(ddrm, dict(eta=0.85)), (diffpir, dict(zeta=0.3))])
def test_noise_that_is_renewed_by_a_fixed_share_takes_variance_away(method, how):
    """In a coordinate that is not seen, of variance c, the method is a recursion for numbers: computed here, and below c however short the steps."""
    v, m, _, (_, C), _ = gaussian("avgpool")
    c, keep2 = 0.6, 1 - how.get("eta", 0) ** 2 if method is ddrm else 1 - how["zeta"]

    def variance(steps):
        found = 1.0
        for t, u in times(steps):
            guess = t * c / (t * t * c + (1 - t) ** 2)  # E[x_1 | x_t] = guess x_t
            found = (u * guess + (1 - u) * keep2**0.5 * (1 - t * guess) / (1 - t)) ** 2 * found + (1 - u) ** 2 * (1 - keep2)
        return found

    unseen = torch.eye(N, dtype=torch.float64) - torch.linalg.pinv(dense("avgpool")) @ dense("avgpool")
    _, covariance = law(method, v, m, 40, **how)
    assert torch.allclose(unseen @ covariance @ unseen, variance(40) * unseen, atol=1e-9)
    assert variance(4000) == pytest.approx(variance(8000), rel=1e-3) and variance(8000) < 0.95 * c


@pytest.mark.parametrize("method, how", EXACT)
def test_a_correlation_is_not_seen_through(method, how):
    """y is met all the same; what is not seen gets a mean that no number of steps mends."""
    v, m, y, _, posterior = gaussian("bicubic", correlated=True)
    errors = []
    for steps in (40, 80):
        mean, covariance = law(method, v, m, steps, **how)
        assert torch.allclose(dense("bicubic") @ mean, y) and (dense("bicubic") @ covariance).abs().max() < 1e-9
        errors.append(apart((mean, covariance), posterior)[0])
    assert errors[1] > 0.005 and errors[1] > 0.8 * errors[0]


@pytest.mark.parametrize("method, how", EXACT[:2])
def test_with_noise_ddnm_and_ddrm_are_approximate(method, how):
    """Of what is seen: an error that more steps do not mend, and too little variance."""
    v, m, _, _, posterior = gaussian("avgpool", sigma_n=0.3)
    A = dense("avgpool")
    for steps in (40, 80):
        mean, covariance = law(method, v, m, steps, **how)
        assert (A @ (mean - posterior[0])).norm() > 0.05 * (A @ posterior[0]).norm()
        assert not torch.allclose(A @ covariance @ A.T, A @ posterior[1] @ A.T, rtol=0.05)


def test_with_noise_diffpir_is_exact_only_for_a_prior_that_says_little():
    def error(variance):
        v, m, _, _, posterior = gaussian("avgpool", sigma_n=0.3, variance=variance)
        return apart(law(diffpir, v, m, 80, lam=1.0, zeta=0.0), posterior)
    flat, narrow = error(1e4), error(0.5)
    assert flat[0] < 1e-3 and flat[1] < 0.08 and narrow[0] > 0.02


def test_dps_leaves_alone_what_is_not_seen_and_pulls_the_rest():
    v, m, y, (mu, C), (mean, _) = gaussian("avgpool", sigma_n=0.3)
    A = dense("avgpool")
    unseen = torch.eye(N, dtype=torch.float64) - torch.linalg.pinv(A) @ A
    found, covariance = law(dps, v, m, 80, zeta=0.0)  # the reversed diffusion: the prior
    assert torch.allclose(found, mu) and apart((found, covariance), (mu, C))[1] < 0.07
    generator = torch.Generator().manual_seed(0)
    draws, _ = dps(v, m, lambda i: torch.randn(4000, 1, *SHAPE, generator=generator, dtype=torch.float64), steps=80, zeta=0.1)
    draws = draws.flatten(1)
    # 4,000 draws: a mean to .05, a variance to 12 %, with the steps' 5 %
    assert (unseen @ (draws.mean(0) - mu)).abs().max() < 0.05 and torch.allclose((draws @ unseen).var(0), (unseen @ C).diagonal(), rtol=0.12)
    before, after = ((A @ (x - mean)).norm() for x in (mu, draws.mean(0)))
    assert after < 0.6 * before


def test_dps_subtracts_the_gradient_through_the_network():
    """The last of two steps, against differences. At t = 0 E[x_1 | x_t] is the prior's mean whatever x_t: the first pull is none."""
    v, m, _, (mu, _), _ = gaussian("bicubic", correlated=True)
    torch.manual_seed(1)
    fixed = [torch.randn(1, 1, *SHAPE, dtype=torch.float64) for _ in range(3)]
    with_, without = (dps(v, m, lambda i: fixed[i].clone(), steps=2, zeta=zeta)[0] for zeta in (0.25, 0.0))

    def miss(x):
        x_hat = x + 0.5 * v(torch.cat([x, x], dim=1), torch.tensor([0.5]))
        return (m.s * (m.y - m.coordinates(x_hat))).norm()

    x = 0.5 * mu.view(1, 1, *SHAPE) + 0.5 * fixed[1]
    units = 1e-5 * torch.eye(N, dtype=torch.float64).view(N, 1, 1, *SHAPE)
    slope = torch.stack([(miss(x + e) - miss(x - e)) / 2e-5 for e in units])
    assert torch.allclose((without - with_).flatten(), 0.25 * slope, atol=1e-6) and slope.norm() > 0.1


# --- the command line ---


@pytest.fixture
def prior(tmp_path):
    """A tiny unconditional flow, of weights drawn at random, and what writes others."""
    def write(name, stage="flow", **cells):
        task = replace(data.TASKS["ffhq_uncond"], **cells)
        net = tiny(condition=task.condition, precond=None, mults=(1, 2, 2))
        save_release(tmp_path / name, net, dict(stage=stage, step=1, task=asdict(task)))
        return str(tmp_path / name)
    return write


@pytest.mark.parametrize("method", ["ddnm", "ddrm", "dps", "diffpir"])
def test_a_prior_restores_pictures(method, prior, folder, capsys):
    flags = ["--prior", prior("p.safetensors"), "--method", method, "--device", "cpu", "--dtype", "float32"]
    small = Image.fromarray(np.random.default_rng(0).integers(100, 150, (8, 12, 3), dtype=np.uint8))
    small.save("in/small.png")
    assert sample.main([*flags, "in/small.png", "--steps", "5"]) == 0
    assert f"{method}, 5 evaluations" in capsys.readouterr().out
    big = read_image("restored/small_x4.png")
    assert big.shape == (32, 48, 3)
    assert sample.main([*flags, "in/small.png", "--steps", "5", "-o", "again", "--dataset", "ffhq_noisy", "--seed", "3"]) == 0
    assert (read_image("again/small_x4.png") != big).any()


@pytest.mark.parametrize("method", ["ddnm", "ddrm", "diffpir"])
def test_without_noise_what_a_network_gives_is_reduced_to_y_again(method, prior):
    net, _, task = sample.load(prior("p.safetensors"), "cpu")
    y, shares = 2 * torch.rand(1, 3, 8, 12) - 1, []
    x_1, nfe = restore(net, task, y, 0, method, 5, progress=shares.append)
    assert torch.allclose(H(x_1, "bicubic", 4), y, atol=1e-4) and nfe == 5 and sum(shares) == pytest.approx(1)
    assert not torch.equal(x_1, restore(net, task, y, 1, method, 5)[0])


def test_a_size_that_the_prior_does_not_take_concerns_that_picture(prior, folder, capsys):
    assert sample.main(["--prior", prior("p.safetensors"), "--method", "ddrm", "--steps", "2", "--device", "cpu", "in/a.png", "in/below/c.png"]) == 1
    said = capsys.readouterr().err
    assert "in/a.png" in said and "48 x 68" in said and "1 done, 1 skipped" in said


def test_mistakes_with_a_prior_are_one_line(prior, folder, capsys):
    free, sees = prior("p.safetensors"), prior("c.safetensors", condition=True, sigma_p=0.1)
    student = prior("s.safetensors", stage="distill")
    for flags, words in ((["--prior", sees, "--method", "ddnm"], "unconditional stage-1 flow"), (["--prior", student, "--method", "dps"], "unconditional stage-1 flow"),
                         (["--method", "ddnm"], "--method goes with --prior"), (["--prior", free], "--prior goes with --method"), (["--ckpt", free, "--prior", free, "--method", "ddnm"], "without --ckpt"),
                         (["--prior", free, "--method", "ddnm", "--t", "0.5"], "without --t"), (["--prior", free, "--method", "ddnm", "--solver", "euler"], "without --solver"),
                         (["--prior", free, "--method", "ddnm", "--dataset", "realsr"], "not linear"), (["--prior", free, "--method", "pnp"], "invalid choice")):
        with pytest.raises((InputError, SystemExit)) as e:
            sample.main([*flags, "--device", "cpu", "in/a.png"])
        said = str(e.value) if e.type is InputError else capsys.readouterr().err.strip()
        assert words in said and "\n" not in said
    assert not (folder / "restored").exists()
