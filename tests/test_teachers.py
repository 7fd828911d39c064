"""Teachers that are not ours: conversions to v on closed forms, ResShift's networks against published outputs, files, students."""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import demo
import distill
import kernels
import model
import resshift
import sample
import teachers
import tiles
import train_flow
from checkpoints import save_checkpoint
from console import InputError
from distill import distillation_losses
from flow import integrate, mean_slope, one_step
from model import build, load_model, network_config, save_release
from pictures import read_image, read_note
from resshift import ResShift, SwinUNet, VQAutoencoder
from teachers import Teacher, linear_path, to_linear, to_velocity

GOLDEN = Path(os.environ.get("OFTSR_GOLDEN", "missing"))
golden = pytest.mark.skipif(not (GOLDEN / "resshift").is_dir(), reason="OFTSR_GOLDEN names no folder with resshift/")
TINY = dict(image_size=16, channels=32, mults=(1, 2), blocks=1, attention=(16, 8), swin_depth=2, swin_channels=32, head_channels=16, window=8, mlp_ratio=4)
TINY_VQ = dict(channels=32, mults=(1, 2), blocks=1, codes=64)


def arrays(name):
    with np.load(GOLDEN / name) as f:
        a = {k: torch.from_numpy(f[k]) for k in f}
    return {k.removeprefix("param."): v for k, v in a.items() if k.startswith("param.")}, a


@golden
def test_swinunet_is_the_published_one():
    state, a = arrays("resshift/resshift_swinunet_tiny.npz")
    net = teachers.fill(SwinUNet(**TINY), state, "golden", "the network").eval()
    y = net(torch.cat([a["x"], a["lq"]], 1), a["t"])
    assert (y - a["y"]).abs().max() < 1e-5


@golden
def test_autoencoder_is_the_published_one():
    state, a = arrays("resshift/resshift_vq_tiny.npz")
    vq = teachers.fill(VQAutoencoder(**TINY_VQ), state, "golden", "the autoencoder").eval()
    z = vq.encode(a["image"])
    assert (z - a["z"]).abs().max() < 1e-5
    assert (vq.decode(a["z"]) - a["decoded"]).abs().max() < 1e-5
    assert (vq.decode(a["z"], quantize=False) - a["decoded_unquantised"]).abs().max() < 1e-5


@golden
def test_resshift_parameters():
    real = json.loads((GOLDEN / "resshift/resshift_parameters.json").read_text())
    with torch.device("meta"):
        nets = {"swinunet": SwinUNet(**resshift.SWINUNET), "vq_f4": VQAutoencoder(**resshift.VQ_F4)}
    for name, net in nets.items():
        assert sum(p.numel() for p in net.parameters()) == real[name + "_parameters"] if isinstance(real[name], list) else real[name]
        shapes = [(n, s) for n, s in real[name] if not n.endswith(teachers.BUFFERS)]
        assert {n: list(p.shape) for n, p in net.named_parameters()} == dict(map(tuple, shapes))


@golden
def test_schedule_is_the_published_one():
    table = json.loads((GOLDEN / "resshift/resshift_schedule.json").read_text())
    for steps, schedule in resshift.SCHEDULES.items():
        published = torch.tensor(table[str(steps)]["sqrt_etas"], dtype=torch.float64)
        ours = resshift.sqrt_eta(torch.arange(steps, dtype=torch.float64), **schedule)
        assert (ours - published).abs().max() < 1e-12
        assert (resshift.step_at(published, **schedule) - torch.arange(steps)).abs().max() < 1e-9


# --- closed forms ---


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("predicts", ["x_1", "eps", "noise_minus_clean", "v"])
def test_every_prediction_gives_the_slope_of_its_path(predicts):
    """With x_1 and eps known, v is the derivative of a x_1 + b z_lr + c eps by t: a finite difference, on three paths."""
    g = torch.Generator().manual_seed(0)
    x_1, z_lr, eps = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t, h = tensor(0.3, 0.8), 1e-6
    for path in (linear_path, lambda t: linear_path(t, 0.3), lambda t: resshift.shift_path(t, 2.0)):
        at = lambda t: sum(k.view(-1, 1, 1, 1) * x for k, x in zip(path(t)[0], (x_1, z_lr, eps)))
        a, _, c = (k.view(-1, 1, 1, 1) for k in path(t)[0])
        out = {"x_1": x_1, "eps": eps, "noise_minus_clean": eps - x_1, "v": a * eps - c * x_1}[predicts]
        v = to_velocity(at(t), z_lr, out, predicts, *path(t))
        assert (v - (at(t + h) - at(t - h)) / (2 * h)).abs().max() < 1e-8
    # flow matching says eps - x_1 on the straight path from noise: v is its opposite
    out = eps - x_1
    assert torch.allclose(to_velocity(t[0] * x_1[:1] + (1 - t[0]) * eps[:1], z_lr[:1], out[:1], "noise_minus_clean", *linear_path(t[:1])), -out[:1])


def test_any_schedule_is_the_linear_path_scaled():
    """Variance-preserving alpha, sigma: x / (alpha + sigma) lies on the linear path at t = alpha / (alpha + sigma)."""
    angle = torch.linspace(0.05, 1.5, 7, dtype=torch.float64)
    alpha, sigma = angle.sin(), angle.cos()
    t, scale = to_linear(alpha, sigma)
    (a, b, c), _ = linear_path(t)
    assert torch.allclose(a * scale, alpha) and torch.allclose(c * scale, sigma) and not b.any()


def test_resshift_flow_keeps_the_marginals():
    """z_1 ~ N(m, s^2): integrated along eta by dz/d eta = (z_lr - z_1) + (z - z_1 - eta (z_lr - z_1)) / (2 eta) with the exact
    mean of z_1, samples have at every eta the mean (1 - eta) m + eta z_lr and the variance (1 - eta)^2 s^2 + kappa^2 eta; and so
    over t, where v is of one size."""
    m, s, z_lr, kappa = 0.4, 0.7, -0.5, 2.0
    e0 = resshift.SQRT_ETA_END**2
    g = torch.Generator().manual_seed(1)
    mean = lambda eta: (1 - eta) * m + eta * z_lr
    var = lambda eta: (1 - eta) ** 2 * s**2 + kappa**2 * eta
    clean = lambda z, eta: m + (1 - eta) * s**2 / var(eta) * (z - mean(eta))  # E[z_1 | z_eta]
    start = mean(e0) + var(e0) ** 0.5 * torch.randn(4000, generator=g, dtype=torch.float64)
    z, etas = start.clone(), torch.logspace(0, -3, 401, dtype=torch.float64) * e0
    slope = lambda z, eta: (z_lr - clean(z, eta)) + (z - clean(z, eta) - eta * (z_lr - clean(z, eta))) / (2 * eta)
    for now, then in zip(etas[:-1], etas[1:]):
        middle = z + (then - now) / 2 * slope(z, now)
        z = z + (then - now) * slope(middle, (now + then) / 2)
        if then in etas[100::100]:
            assert abs(z.mean() - mean(then)) < 0.05 * var(then) ** 0.5 and abs(z.var() / var(then) - 1) < 0.06
    teacher = Teacher(lambda x_t, y, t: clean(x_t, (resshift.SQRT_ETA_END * (1 - t.view(-1, 1, 1, 1))) ** 2), path=lambda t: resshift.shift_path(t, kappa))
    x_in = torch.stack([start.view(40, 100), torch.full((40, 100), z_lr, dtype=torch.float64)])[None]
    sizes = [teacher(x_in, tensor(t)).std().item() for t in (0.0, 0.3, 0.6)]
    x_1 = integrate(teacher, x_in.clone(), "midpoint", 100)[0]
    exact = m + s * (start - mean(e0)) / var(e0) ** 0.5  # the one monotone map between two Gaussians
    assert (x_1[0, 0].flatten() - exact).abs().max() < 0.02 * s
    assert max(sizes) < 3 * min(sizes)


@pytest.mark.parametrize("kappa, min_noise, s, tolerance", [(0.2, 0.02, 0.3, 0.004), (0.2, 0.02, 0.03, 0.04), (2.0, 0.04, 0.3, 0.04)])
def test_resshift_flow_is_well_scaled_for_every_solver(kappa, min_noise, s, tolerance):
    """z_1 ~ N(.1, s^2), the network its exact mean, at 15 steps: v keeps its size up to t_last, solvers converge at their order,
    and those that ask at a step's end too, where the network was not trained, do no worse than others."""
    schedule = dict(steps=15, kappa=kappa, min_noise=min_noise, power=0.3)
    teacher = ResShift(TINY, {**schedule, "pixels": True})

    def mean(z, z_lr, step, tau):
        eta = resshift.sqrt_eta(step, **schedule).view(-1, 1, 1, 1) ** 2
        return 0.1 + (1 - eta) * s**2 / ((1 - eta) ** 2 * s**2 + kappa**2 * eta) * (z - 0.1 * (1 - eta) - eta * z_lr)

    teacher.clean = mean
    n, z_lr = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.full((1, 3, 16, 16), -0.05)
    def at(t):
        eta = resshift.SQRT_ETA_END**2 * (1 - t) ** 2
        return torch.cat([0.1 * (1 - eta) + eta * z_lr + ((1 - eta) ** 2 * s**2 + kappa**2 * eta) ** 0.5 * n, z_lr], 1)

    error = lambda solver, steps: ((integrate(teacher, at(0).clone(), solver, steps)[0] - 0.1 - s * n).square().mean().sqrt() / s).item()
    assert max(teacher(at(t), tensor(t)).square().mean().sqrt() for t in (0.0, 0.3, 0.6, 0.9, teacher.t_last)) < 2.2 * kappa
    assert error("euler", 32) < 0.62 * error("euler", 16) and error("midpoint", 16) < 0.35 * error("midpoint", 8)
    for solver in ("midpoint", "ralston", "heun"):
        assert error(solver, 32) < tolerance
    t = tensor(0.9).float()  # and distillation's own step to the end is a jump to the prediction
    v = teacher(at(0.9), t)
    assert torch.equal(mean_slope(teacher, at(0.9), v, t, 1 - t, "heun"), v)
    assert not torch.equal(mean_slope(teacher, at(0.5), v, t - 0.4, 1 - t, "heun"), v)
    x_1, nfe = integrate(teacher, at(0).clone(), "rk45")
    assert (x_1 - 0.1 - s * n).square().mean().sqrt() < tolerance * s and nfe < 40


def test_guidance_is_one_batch():
    calls = []
    def predict():
        calls.append(1)
        return torch.stack([torch.zeros(3), torch.ones(3)])
    assert torch.equal(teachers.guided(predict, 4.0), torch.full((1, 3), 4.0)) and len(calls) == 1


# --- students reach the exact map ---


class Mixing(torch.nn.Module):
    """An invertible linear "autoencoder": channels mixed and scaled."""

    def __init__(self):
        super().__init__()
        self.register_buffer("m", torch.tensor([[1.0, 0.5, 0.0], [-0.3, 0.8, 0.2], [0.1, 0.0, 1.3]]))


class Exact(Teacher):
    """The exact predictor for z_1 | z_lr ~ N(z_lr / 2, s^2) in its space: what `predicts` says, in closed form. See exact_map."""
    s, t_last = 0.4, 1.0

    def __init__(self, predicts, path, mixing=None):
        super().__init__(torch.nn.Identity(), predicts, path)
        self.mixing = mixing

    def to_latents(self, x):
        return x if self.mixing is None else torch.einsum("oc,bchw->bohw", self.mixing.m, x)

    def to_pixels(self, z):
        return z if self.mixing is None else torch.einsum("oc,bchw->bohw", self.mixing.m.inverse(), z)

    def moments(self, z_lr, t):
        a, b, c = (k.view(-1, 1, 1, 1) for k in self.path(t)[0])
        return a, b, c, (a / 2 + b) * z_lr, (a**2 * self.s**2 + c**2).sqrt()

    def predict(self, x_t, z_lr, t):
        a, b, c, mean, deviation = self.moments(z_lr, t)
        n = (x_t - mean) / deviation**2
        x_1, eps = z_lr / 2 + a * self.s**2 * n, c * n
        if self.predicts == "velocity":
            return sum(k.view(-1, 1, 1, 1) * x for k, x in zip(self.path(t)[1], (x_1, z_lr, eps)))
        return {"x_1": x_1, "eps": eps, "noise_minus_clean": eps - x_1, "v": a * eps - c * x_1}[self.predicts]

    def exact_map(self, x_0, z_lr):
        """Where the flow carries x_0: a Gaussian's, deviation by deviation."""
        _, _, _, mean, deviation = self.moments(z_lr, torch.zeros(1))
        return z_lr / 2 + self.s * (x_0 - mean) / deviation


class LinearStudent(torch.nn.Module):
    """v = A(t) x_0 + B(t) z_lr, A and B polynomials of t."""

    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.zeros(2, 6))

    def forward(self, x_in, t):
        x_0, z_lr = x_in.chunk(2, 1)
        a, b = (self.k @ torch.stack([(2 * t - 1) ** i for i in range(6)])).view(2, -1, 1, 1, 1)
        return a * x_0 + b * z_lr


def late_linear(t):  # where a network that predicts eps can be read: not at pure noise, which holds nothing of x_1
    (a, b, c), (da, db, dc) = linear_path(0.1 + 0.9 * t)
    return (a, b, c), (0.9 * da, 0.9 * db, 0.9 * dc)


def circle(t):  # a^2 + c^2 = 1, the diffusion schedule that "v" was made for
    angle, nothing = math.pi / 2 * t, torch.zeros_like(t)
    return (angle.sin(), nothing, angle.cos()), (math.pi / 2 * angle.cos(), nothing, -math.pi / 2 * angle.sin())


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("predicts, path", [("x_1", lambda t: linear_path(t, 0.5)), ("eps", late_linear), ("noise_minus_clean", linear_path), ("v", circle),
                                            ("velocity", lambda t: linear_path(t, 0.5)), ("x_1", lambda t: resshift.shift_path(t, 2.0))])
def test_a_student_reaches_the_exact_map(predicts, path, latent):
    """Eq. (9) to (12) on a teacher in closed form, in pixels and through an invertible autoencoder: t = 1 within 2 %."""
    torch.manual_seed(0)
    teacher, student = Exact(predicts, path, Mixing() if latent else None), LinearStudent()
    x_lr, seeds = torch.randn(32, 3, 2, 2), torch.arange(32)
    x_in = teacher.start(teacher.to_latents(x_lr), None, seeds)
    t = (torch.arange(32) + 0.5) / 32 * 1.05 - 0.05
    s, t, zero = (t + 0.05).clamp(1e-3, 1), t.clamp(min=0), torch.zeros(32)
    for _ in range(40):  # Eq. (9) is a fixed point: each solve has the targets of the student before
        with torch.no_grad():
            v_t = student(x_in, t)
            x_t_in = kernels.student_state(x_in, v_t, t)
            u = teacher(torch.cat([x_t_in, x_in]), torch.cat([t, zero]))
            v_step = mean_slope(teacher, x_t_in, u[:32], t, s - t, "midpoint")
        optimizer = torch.optim.LBFGS(student.parameters(), max_iter=25, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12)

        def loss():
            optimizer.zero_grad()
            losses = kernels.distill_loss(torch.cat([v_t, student(x_in, s), student(x_in, zero)]), v_step, u, t, s)
            value = losses[0] + 0.1 * losses[2]
            value.backward()
            return value.detach()
        optimizer.step(loss)
    with torch.no_grad():
        found = teacher.to_pixels(one_step(student, x_in, 1.0))
    exact = teacher.to_pixels(teacher.exact_map(*x_in.chunk(2, 1)))
    assert (found - exact).square().mean().sqrt() < 0.02 * exact.square().mean().sqrt()
    losses = distillation_losses(student, teacher, x_in, t, s)
    assert losses.isfinite().all() and losses[0] < 1e-3


# --- files ---


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny ResShift's two files in the published format, of random weights, and the flags that go with them."""
    monkeypatch.setattr(resshift, "SWINUNET", TINY)
    monkeypatch.setattr(resshift, "VQ_F4", TINY_VQ)
    torch.manual_seed(0)
    net, vq = SwinUNet(**TINY), VQAutoencoder(**TINY_VQ)
    extra = {"input_blocks.1.1.blocks.1.attn_mask": torch.zeros(4, 64, 64)}  # published files hold such buffers
    torch.save({"state_dict": {f"module.{k}": v for k, v in {**net.state_dict(), **extra}.items()}}, tmp_path / "net.pth")
    torch.save(vq.state_dict(), tmp_path / "vq.pth")
    return tmp_path, argparse.Namespace(autoencoder=str(tmp_path / "vq.pth"), chain=15)


def test_a_published_resshift_its_student_and_its_file(published):
    """Latents there and back, any size, the sampler, and a student that load_model builds again from its file alone."""
    folder, args = published
    teacher, _ = teachers.load_family(f"resshift:{folder / 'net.pth'}", args)
    assert teacher.factor == 2 and teacher.multiple == 4 and teacher.t_last == pytest.approx(1 - 0.02 / 0.99)
    x_lr, seeds = torch.rand(2, 3, 44, 28) * 2 - 1, torch.arange(2)
    z_lr = teacher.to_latents(x_lr)
    x_in = teacher.start(z_lr, None, seeds)
    assert x_in.shape == (2, 6, 22, 14) and torch.equal(x_in[:, 3:], z_lr)
    assert (x_in[:, :3] - z_lr).std() == pytest.approx(2 * 0.99, rel=0.1)  # the chain's own start, kappa sqrt(eta_T) of noise
    z_1, nfe = teacher.ancestral(x_in, lambda i: torch.zeros(2, 3, 22, 14), 4)
    assert nfe == 4 and teacher.to_pixels(z_1).shape == x_lr.shape
    student = teacher.student()
    with torch.no_grad():  # with gradients attention takes another way, to its roundings
        assert torch.allclose(student(x_in, torch.zeros(2)), teacher(x_in, torch.zeros(2)), atol=1e-5)  # Eq. (11) holds from the start
    assert {n.split(".")[0] for n, p in student.named_parameters() if p.requires_grad} == {"net"}
    save_release(folder / "student.safetensors", student, dict(stage="distill", task=None, step=1))
    again, meta = load_model(folder / "student.safetensors")
    assert isinstance(again, ResShift) and again.one_step and meta["model"]["family"] == "resshift"
    assert torch.allclose(again(x_in, torch.ones(2)), student(x_in, torch.ones(2)), atol=0.1)  # bfloat16
    x_1, _ = tiles.restore(again, x_lr, 0.1, seeds, 1.0, tile=32, tile_pad=8)
    assert x_1.shape == x_lr.shape and x_1.isfinite().all()


def test_a_flow_in_the_latents_of_a_published_autoencoder(published, monkeypatch, capsys):
    """The paper's ResShift*, small: train_flow.py --autoencoder, which is not trained; a restart; the student and what restores with it; no files in a dry run."""
    from PIL import Image
    folder, _ = published
    monkeypatch.setitem(model.PRESETS["resshift_small"], "net", TINY)
    monkeypatch.chdir(folder)
    Path("photos").mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"photos/{i}.png")
    flags = ["--dataset", "photos", "--data_dir", "photos", "--image_size", "32", "--batch_size", "1", "--eval_pictures", "1", "--eval_steps", "1", "--warmup_iters", "1", "--device", "cpu"]
    flow = [*flags, "--model", "resshift_small", "--autoencoder", "vq.pth", "--learning_rate", "0.01"]
    train_flow.main([*flow, "--max_iters", "1"])
    train_flow.main([*flow, "--max_iters", "2", "--init_from", "resume"])
    net, meta = load_model("out/photos_flow/ckpt.pt")
    vq = torch.load("vq.pth")
    assert meta["stage"] == "flow" and net.factor == 2 and all(torch.equal(p, vq[n]) for n, p in net.autoencoder.state_dict().items())
    z = net.to_latents(torch.rand(1, 3, 32, 32))
    assert z.shape == (1, 3, 16, 16) and net.start(z, 0.1, torch.arange(1)).shape == (1, 6, 16, 16)
    torch.manual_seed(1337)
    drawn = resshift.new_flow(network_config("resshift_small", sigma_p=0.1), "vq.pth")[1]
    moved = [n for n, p in net.state_dict().items() if not torch.equal(p, drawn[n])]
    assert moved and all(n.startswith("net.") for n in moved)
    distill.main([*flags, "--max_iters", "1"])
    student, meta = load_model("out/photos_distill/weights.safetensors")
    x, nfe = tiles.restore(student, torch.rand(1, 3, 44, 28) * 2 - 1, 0.1, torch.arange(1), 0.5)
    assert student.one_step and nfe == 1 and x.shape == (1, 3, 44, 28)

    monkeypatch.setattr(demo, "NETWORKS", dict(demo.NETWORKS))  # the page takes it, too
    demo.load.cache_clear()
    demo.add_networks(["out/photos_distill/weights.safetensors", "out/photos_flow/ckpt.pt"])
    (folder / "results").mkdir()
    for name in list(demo.NETWORKS)[:2]:
        told = demo.open_picture("photos/0.png", name, 0, "tab", folder)
        path = demo.save(demo.PAGES[told["id"]], 1.0, None)
        how = demo.NETWORKS[name][1]
        assert np.array_equal(read_image(path), sample.upscale(read_image("photos/0.png"), t=1.0, ckpt=name, **how)) and read_note(path)["weights"] == Path(name).name
    demo.close("tab")
    capsys.readouterr()
    monkeypatch.setattr(resshift, "VQ_F4", dict(TINY_VQ, mults=(1, 2, 2)))
    train_flow.main([*flow, "--autoencoder", "none.pth", "--out_dir", "out/dry", "--dry_run"])
    distill.main([*flags, "--teacher", "resshift:none.pth", "--autoencoder", "none.pth", "--out_dir", "out/dry", "--dry_run"])
    assert capsys.readouterr().out.count("parameters") == 2 and not Path("out/dry").exists()
    for wrong, words in ((["--autoencoder", "none.pth"], "no weights at none.pth"), (["--autoencoder", "net.pth"], "does not hold ResShift's autoencoder"),
                         (["--model", "plain"], "is of a new flow of --model resshift"), (["--init_from", "out/photos_flow/ckpt.pt"], "has its own")):
        with pytest.raises(InputError, match=words):
            train_flow.main([*flow, *wrong, "--out_dir", "out/other"])


def test_padding_is_seen_by_nobody():
    """A Swin block on a map that is not whole windows: what lies under the padding does not matter."""
    torch.manual_seed(0)
    block = resshift.SwinBlock(32, 8, 2, 4, 2).eval()
    mask = block.mask(12, 10, [16, 16], "cpu").view(2, 2, 64, 64)
    rows = torch.arange(16).roll(-4) >= 12
    columns = torch.arange(16).roll(-4) >= 10
    hidden = (rows[:, None] | columns).unflatten(0, (2, 8)).unflatten(2, (2, 8)).permute(0, 2, 1, 3).flatten(2)  # (2, 2, 64)
    assert (mask.transpose(2, 3)[hidden] == -100).all() and block(torch.randn(1, 32, 12, 10)).shape == (1, 32, 12, 10)


@pytest.mark.parametrize("damage, words", [
    (lambda f: f.write_bytes(b"nothing"), "broken or not a checkpoint"),
    (lambda f: f.unlink(), "no weights at"),
    (lambda f: torch.save({"a": torch.zeros(2)}, f), "does not hold ResShift's network"),
    (lambda f: torch.save([1, 2], f), "not a checkpoint"),
    (lambda f: torch.save({k: v * float("nan") if v.is_floating_point() else v for k, v in torch.load(f)["state_dict"].items()}, f), "not finite")])
def test_a_broken_file_is_one_line(published, damage, words):
    folder, args = published
    damage(folder / "net.pth")
    with pytest.raises(InputError, match=words) as e:
        teachers.load_family(f"resshift:{folder / 'net.pth'}", args)
    assert "\n" not in str(e.value)


def test_a_checkpoint_does_not_choose_what_code_runs():
    with pytest.raises(InputError, match="OFTSR_FAMILIES"):
        build({"family": "os:getcwd"})
    with pytest.raises(InputError, match="there is no family"):
        build({"family": "unknown"})


@pytest.mark.parametrize("preset", ["resshift", "resshift_small"])
def test_no_norm_takes_each_channel_alone(preset):
    """Such a norm takes away what a channel says of brightness and contrast, which a network that predicts the picture must pass on."""
    with torch.device("meta"):
        norms = [m for m in SwinUNet(**model.PRESETS[preset]["net"]).modules() if isinstance(m, model.NormSiLU)]
    assert norms and all(m.num_channels >= 4 * m.num_groups for m in norms)


def test_the_example_that_trains_a_resshift(tmp_path, monkeypatch):
    """It writes a teacher with its own schedule, whatever --chain says, and all of the training, from which it goes on exactly."""
    from PIL import Image
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    monkeypatch.setitem(model.PRESETS["resshift_small"], "net", TINY)
    import train_resshift
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    train = lambda name, steps, kappa="0.2": train_resshift.main([
        "--data_dir", str(tmp_path), "--image_size", "16", "--batch_size", "1", "--steps", "15", "--kappa", kappa, "--min_noise", "0.02", "--loss", "velocity",
        "--optimizer", "muon", "--max_iters", "4", "--stop_at", str(steps), "--keep_every", "2", "-o", str(tmp_path / name)])
    train("at_once.safetensors", 4)
    train("in_two.safetensors", 2)
    assert not (tmp_path / "in_two.safetensors").exists()
    with pytest.raises(SystemExit, match="another network or schedule"):
        train("in_two.safetensors", 4, "0.3")
    train("in_two.safetensors", 4)
    first, second = (teachers.load_family(f"resshift:{tmp_path / name}", argparse.Namespace(autoencoder=None, chain=4))[0] for name in ("at_once.safetensors", "in_two.safetensors"))
    assert first.schedule == dict(steps=15, kappa=0.2, min_noise=0.02, power=0.3, pixels=True)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_bring_your_own(tmp_path, monkeypatch):
    """README's example, small: its teacher is distilled, and its student restores once its function is named."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    monkeypatch.setitem(model.FAMILIES, "unet", model.FAMILIES["unet"])  # what load_family adds goes with the test
    args = argparse.Namespace(autoencoder=None, chain=4)
    teacher, _ = teachers.load_family("bring_your_own:teacher", args)
    student = teacher.student()
    assert student.config == {"family": "bring_your_own:teacher", "one_step": True}
    x_in = teacher.start(torch.rand(1, 3, 16, 16), None, torch.arange(1))
    losses = distillation_losses(student, teacher, x_in, torch.tensor([0.3]), torch.tensor([0.4]))
    losses.sum().backward()
    assert losses.isfinite().all() and all(p.grad is not None for p in student.parameters())
    save_release(tmp_path / "s.safetensors", student, dict(stage="distill", task=None, step=0))
    del model.FAMILIES["bring_your_own:teacher"]
    (tmp_path / "out").mkdir()  # nor does the checkpoint of a training bring its teacher's code along
    save_checkpoint(tmp_path / "out" / "ckpt.pt", dict(args=dict(teacher="bring_your_own:teacher")))
    resumed = argparse.Namespace(init_from="resume", teacher=None, autoencoder=None, chain=4, lora=64, guidance=8.0, prompt=None)
    with pytest.raises(InputError, match="distilled from bring_your_own:teacher, which is code: if it is yours, say --teacher bring_your_own:teacher again"):
        teachers.load_teacher(resumed, tmp_path / "out")
    assert "bring_your_own:teacher" not in model.FAMILIES
    with pytest.raises(InputError, match="OFTSR_FAMILIES=bring_your_own:teacher"):
        load_model(tmp_path / "s.safetensors")
    monkeypatch.setenv("OFTSR_FAMILIES", "bring_your_own:teacher")
    assert load_model(tmp_path / "s.safetensors")[0].one_step


def test_a_network_of_your_own_in_latents(published, monkeypatch):
    """--autoencoder with a function: pictures go in and out through it, and the student's file holds it; with what has its own it is refused."""
    folder, args = published
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    monkeypatch.setitem(model.FAMILIES, "unet", model.FAMILIES["unet"])
    teacher, _ = teachers.load_family("bring_your_own:teacher", args)
    x_lr = torch.rand(1, 3, 16, 24) * 2 - 1
    z_lr = teacher.to_latents(x_lr)
    assert (teacher.factor, teacher.multiple) == (2, 2) and z_lr.shape == (1, 3, 8, 12) and torch.equal(z_lr, teacher.autoencoder.encode(x_lr))
    student = teacher.student()
    assert {n.split(".")[0] for n, p in student.named_parameters() if p.requires_grad} == {"net"}
    save_release(folder / "s.safetensors", student, dict(stage="distill", task=None, step=0))
    again = load_model(folder / "s.safetensors")[0]
    x_1, nfe = tiles.restore(again, x_lr, 0.1, torch.arange(1), 1.0, tile=16, tile_pad=4)
    assert again.one_step and again.factor == 2 and x_1.shape == x_lr.shape and nfe == 1
    with pytest.raises(InputError, match="already"):
        teacher.enter_latents(TINY_VQ)
    del model.FAMILIES["bring_your_own:teacher"]
    for spec in ("dit4sr:DIR", "weights.safetensors"):
        with pytest.raises(InputError, match="--autoencoder is for resshift:FILE and functions of yours"):
            distill.main(["--teacher", spec, "--autoencoder", args.autoencoder, "--device", "cpu"])
