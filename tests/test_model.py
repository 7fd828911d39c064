"""model.py against the published networks, the preconditioning's algebra, EMA, and the files."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from console import InputError
from checkpoints import load_checkpoint, save_checkpoint
from model import PRESETS, UNet, UpConv, count_macs, load_model, network_config, save_release
from training import EMA, Muon, make_optimizers

GOLDEN = Path(os.environ.get("OFTSR_GOLDEN", "nowhere"))
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="OFTSR_GOLDEN does not name the folder of published reference outputs")
GOLDEN_CONFIG = dict(channels=32, mults=(1, 2, 2), blocks=1, attention=(4,), head_channels=32, out_channels=6)


def tiny(sigma_p=0.2, sigma_d=0.1, **changes):
    """The tiny network with every parameter away from zero (published layers start at zero and would hide mistakes)."""
    torch.manual_seed(0)
    model = UNet(**{**network_config("tiny", True, sigma_p, sigma_d), **changes})
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("preset, total", [("ffhq", 93_567_366), ("imagenet", 552_820_998)])
def test_big_presets_have_the_published_parameters(preset, total):
    published = json.loads((Path(__file__).parent / "golden/published_parameters.json").read_text())[preset]
    with torch.device("meta"):
        model = UNet(**network_config(preset))
    assert [[name, list(p.shape)] for name, p in model.named_parameters()] == published
    assert sum(p.numel() for p in model.parameters()) == total


@needs_golden
def test_published_outputs_are_reproduced():
    golden = np.load(GOLDEN / "guided_unet_tiny.npz")
    model = UNet(**GOLDEN_CONFIG)
    model.load_state_dict({k[6:]: torch.tensor(golden[k]) for k in golden.files if k.startswith("param.")})
    x_in, t = torch.cat([torch.tensor(golden["x"]), torch.tensor(golden["x_lr"])], dim=1), torch.tensor(golden["t"])
    with torch.no_grad():
        assert (model.raw(x_in, t) - torch.tensor(golden["raw"])).abs().max() < 1e-5
        assert (model(x_in, t) - torch.tensor(golden["velocity"])).abs().max() < 1e-5


@needs_golden
def test_published_checkpoint_loads(monkeypatch):
    monkeypatch.setitem(PRESETS, "golden", GOLDEN_CONFIG)
    with pytest.raises(InputError, match="--model"):
        load_model(GOLDEN / "official_ema_tiny.pth")
    model, meta = load_model(GOLDEN / "official_ema_tiny.pth", model="golden")
    golden = np.load(GOLDEN / "guided_unet_tiny.npz")
    for name, p in model.named_parameters():
        assert torch.equal(p, torch.tensor(golden[f"param.{name}"])), name
    assert meta["stage"] is None and meta["task"] is None
    with pytest.raises(InputError, match="does not hold this network"):
        load_model(GOLDEN / "official_ema_tiny.pth", model="ffhq")


def test_small_presets_sizes():
    with torch.device("meta"):
        sizes = {p: sum(x.numel() for x in UNet(**network_config(p, True, 0.1, 0.1)).parameters()) for p in ("tiny", "photos")}
    assert sizes["tiny"] < 1_000_000
    assert sizes["photos"] < 8_000_000
    assert count_macs(UNet(**network_config("photos", True, 0.1, 0.1)), 256, 256) == pytest.approx(12.59e9, rel=1e-3)  # README.md, weights/README.md


@pytest.mark.parametrize("height, width", [(32, 32), (27, 41), (3, 5)])
def test_up_conv_is_the_convolution_of_the_doubled_picture(height, width):
    torch.manual_seed(0)
    layer = UpConv(5, 7).double()
    x = torch.randn(2, 5, height, width, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    doubled = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    right = torch.nn.functional.conv2d(doubled, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(y, right, rtol=0, atol=1e-13)
    wrt, dy = (x, layer.weight, layer.bias), torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(y, wrt, dy), torch.autograd.grad(right, wrt, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_keeps_the_directions_and_levels_the_singular_values(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    assert shape[1] == 1 or s.max() / s.min() > 2
    y = u.mT @ Muon.orthogonal(x.to(dtype)).float() @ vh.mT  # diagonal, where the directions are x's
    diagonal = y.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    assert (y - torch.diag_embed(diagonal)).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_muon_takes_the_inner_convolutions_and_adam_the_rest():
    model = tiny().requires_grad_(True)
    adam, muon = make_optimizers(model, "muon", 1e-3, torch.float32)
    sizes = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in (adam, muon)]
    assert sum(sizes) == sum(p.numel() for p in model.parameters()) and sizes[1] > sizes[0]
    kernel, bias = model.input_blocks[1][0].in_layers["2"].parameters()
    before = kernel.detach().clone(), bias.detach().clone()
    model(torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(1)).square().mean().backward()
    muon.step()
    step = kernel.detach() - before[0]
    assert torch.equal(bias, before[1])
    assert (step * kernel.grad).sum() < 0 and step.square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.3)
    assert len(make_optimizers(model, "adam", 1e-3, torch.float32)) == 1


def test_count_macs_counts_a_convolution_by_hand():
    """patch 2, one level: the first convolution alone is 24 x 32 x 9 multiplications at each of (H/2)(W/2) places."""
    small, large = (count_macs(tiny(), s, s) for s in (16, 32))
    first = 24 * 32 * 9 * 8 * 8
    assert small > first
    assert 3.5 < large / small < 4.0  # the time embedding does not grow with the picture


@pytest.mark.parametrize("t", [0.0, 0.03, 0.5, 0.9, 1.0])
def test_preconditioning_is_the_best_linear_estimate(t):
    """Drawn numbers: v regressed on r has slope -c_skip, residual deviation c_out, and c_in brings r to deviation 1."""
    sigma_p, sigma_d, n = 0.2, 0.13, 2_000_000
    c_skip, c_in, c_out = (float(c) for c in tiny(sigma_p, sigma_d).coefficients(torch.tensor([t])))
    rng = np.random.default_rng(0)
    eps, d = rng.standard_normal(n), sigma_d * rng.standard_normal(n)
    r, v = (1 - t) * sigma_p * eps + t * d, d - sigma_p * eps
    tolerance = 5 / np.sqrt(n)  # five standard errors, all quantities being of order one or less
    assert abs((v * r).mean() / (r * r).mean() + c_skip) < tolerance * max(1, abs(c_skip)) * 4
    assert abs((c_in * r).std() - 1) < tolerance
    assert abs((v + c_skip * r).std() - c_out) < tolerance


def test_untrained_preconditioned_student_says_x_lr():
    """At t = 0 an F of zero predicts x_1 = x_lr: the coefficients of a student are those of t = 0 for every t."""
    model = UNet(**{**network_config("tiny", True, 0.2, 0.1), "one_step": True})  # its last layer starts at zero
    x_in = torch.randn(2, 6, 16, 16)
    for t in (0.0, 0.5, 1.0):
        assert torch.allclose(x_in[:, :3] + model(x_in, torch.full((2,), t)), x_in[:, 3:], atol=1e-6)


def test_student_and_teacher_agree_at_t_0_only():
    teacher, student = tiny(), tiny(one_step=True)
    x_in = torch.randn(2, 6, 16, 16)
    assert torch.equal(teacher(x_in, torch.zeros(2)), student(x_in, torch.zeros(2)))
    assert not torch.allclose(teacher(x_in, torch.ones(2)), student(x_in, torch.ones(2)), atol=1e-3)


def test_network_sees_all_its_inputs_and_refuses_odd_sizes():
    model, x_in, t = tiny(), torch.randn(1, 6, 16, 16), torch.tensor([0.5])
    v = model(x_in, t)
    assert v.shape == (1, 3, 16, 16)
    for change in (x_in.index_fill(1, torch.tensor([0]), 0.0), x_in.index_fill(1, torch.tensor([5]), 0.0)):
        assert not torch.allclose(model(change, t), v, atol=1e-4)
    assert not torch.allclose(model(x_in, torch.tensor([0.7])), v, atol=1e-4)
    with pytest.raises(ValueError, match="multiples of 4"):
        model(torch.randn(1, 6, 16, 18), t)


def test_unconditional_network_ignores_x_lr():
    torch.manual_seed(0)
    model = UNet(channels=32, mults=(1, 2), blocks=1, condition=False)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    x_in = torch.randn(1, 6, 16, 16)
    other = torch.cat([x_in[:, :3], torch.randn(1, 3, 16, 16)], dim=1)
    assert torch.equal(model(x_in, torch.tensor([0.5])), model(other, torch.tensor([0.5])))


def test_preconditioning_wants_noise():
    with pytest.raises(InputError, match="sigma_p > 0"):
        network_config("photos", True, 0.0, 0.1)


def test_ema_follows_its_recursion():
    model = tiny()
    ema, reference = EMA(model, 0.5), next(model.parameters()).double().clone()
    for n in range(8):
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        reference = decay * reference + (1 - decay) * next(model.parameters()).double()
    assert torch.allclose(ema.shadow_params[0].double(), reference, atol=1e-5)
    assert not torch.allclose(ema.shadow_params[0], next(model.parameters()), atol=1e-2)
    assert ema.num_updates == 8


def test_release_round_trip(tmp_path):
    model, path = tiny(), tmp_path / "w.safetensors"
    save_release(path, model, dict(stage="flow", step=7, task=None))
    loaded, meta = load_model(path)
    assert meta["stage"] == "flow" and meta["step"] == 7
    assert loaded.config == model.config
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.bfloat16().float())


def test_bad_files_are_one_line(tmp_path):
    for name, content in (("a.pt", b"not a checkpoint"), ("b.safetensors", b""), ("c.safetensors", b"\xff" * 64)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as e:
            load_model(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(InputError, match="no weights at"):
        load_model(tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "missing" / "ckpt.pt")
    assert not (tmp_path / "missing").exists()


WRITER = """
import sys, torch
from checkpoints import save_checkpoint
n = 0
while True:
    n += 1
    save_checkpoint(sys.argv[1], dict(n=n, data=torch.full((500_000,), float(n))))
    print(n, flush=True)
"""


def test_kill_during_a_save_leaves_a_whole_file(tmp_path):
    """A writer is killed (-9) at eight moments spread over its saves: the file there is always one complete save."""
    path = tmp_path / "ckpt.pt"
    for i in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parent.parent) as writer:
            writer.stdout.readline()  # the first save is done
            time.sleep(0.007 * i)
            writer.send_signal(signal.SIGKILL)
        saved = load_checkpoint(path)
        assert torch.equal(saved["data"], torch.full((500_000,), float(saved["n"])))
    assert len(list(tmp_path.iterdir())) <= 4  # the one before; and of a kill between them, the new file and a copy of the old, which the next save sweeps
    save_checkpoint(path, dict(n=0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "ckpt_before.pt"]


def test_a_release_may_be_read_by_whom_any_new_file_may(tmp_path):
    (tmp_path / "plain").touch()
    save_release(tmp_path / "weights.safetensors", tiny(), dict(stage="flow"))
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
