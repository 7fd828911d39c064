"""The kernels: every implementation against the reference, the noise against statistics, the build against accidents.

The tests of the operators run on whatever the extension serves here, on CUDA tensors where there is a GPU, and, by
test_cuda_source_on_the_cpu, on the CUDA source compiled for the CPU.
"""
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import build, reference
from model import Conv3x3, Skip, UpConv, add

ROOT = Path(__file__).resolve().parent.parent
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 1, 2, 3, 129 and 1,151 elements; more channels than one draw of noise has; rows longer than a strip; pictures; empty ones.
SHAPES = [(1, 1, 1, 1), (1, 1, 1, 2), (1, 3, 1, 1), (1, 3, 1, 43), (1, 1, 1, 1151), (2, 5, 9, 7), (2, 3, 2, 1100), (3, 3, 33, 64), (0, 3, 4, 4), (2, 3, 0, 5)]
LAYOUTS = ["contiguous", "channels_last", "slice", "channels_last slice"]


def native(device):
    if device not in kernels.extension_devices():
        pytest.skip(f"the extension does not serve {device} tensors here")


def tensor(seed, shape, dtype, layout, device="cpu"):
    """Random numbers in a layout; a slice leaves out channels, rows and columns of a larger tensor."""
    B, C, H, W = shape
    sliced = "slice" in layout
    big = (B, C + 3, H + 1, W + 2) if sliced else shape
    x = torch.randn(big, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    if "last" in layout:
        x = x.contiguous(memory_format=torch.channels_last)
    return x[:, 1 : C + 1, 1:, 2:] if sliced else x


def inputs(op, shape, dtype, layout, device):
    """The arguments of one call of each function."""
    B, C, H, W = shape
    x = lambda seed, batch=1, channels=1: tensor(seed, (B * batch, C * channels, H, W), dtype, layout, device)
    t = torch.linspace(0.1, 0.6, B, device=device)
    seeds = torch.arange(B, device=device) * 2**40 - 5
    k = [x(seed) for seed in range(10, 17)]
    return {
        "normal": (seeds, shape, 3),
        "noise_augment": (x(0), 0.3, seeds),
        "flow_training_pair": (x(0), x(1), t, 0.3, seeds),
        "euler_step_": (x(0, channels=2), x(1), 0.37),
        "euler_step_ per picture": (x(0, channels=2), x(1), t),
        "rk2_stage_": (x(0, channels=2), x(1), x(2), 0.37, 2 / 3),
        "rk2_stage_ per picture": (x(0, channels=2), x(1), x(2), t, 1.0),
        "student_state": (x(0, channels=2), x(1), t),
        "dopri5_stage_": (x(0, channels=2), x(1), k[:1], 0.3),
        "dopri5_stage_ last": (x(0, channels=2), x(1), k[:6], 0.3),
        "dopri5_error": (x(0, channels=2), x(1), k, 0.3, 1e-3, 1e-2),
        "distill_target": (x(0), x(1), t, t + 0.3),
        "distill_loss": (x(0, batch=3), x(1), x(2, batch=2), t, t + 0.3),
        "to_uint8": (x(0),),
    }[op]


ELEMENTWISE = ["noise_augment", "flow_training_pair", "euler_step_", "euler_step_ per picture", "rk2_stage_", "rk2_stage_ per picture",
               "student_state", "dopri5_stage_", "dopri5_stage_ last", "distill_target", "to_uint8"]


def call(module, op, args):
    out = getattr(module, op.split()[0])(*args)
    return out if isinstance(out, tuple) else (out,)


def on_cpu(args):
    return [a.cpu() if torch.is_tensor(a) else [v.cpu() for v in a] if isinstance(a, list) else a for a in args]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elementwise_bits(op, dtype, layout, device):
    """The same operations in the same order: the same bits, in every type and layout. Inputs but the buffer are not touched."""
    native(device)
    for shape in SHAPES:
        args = inputs(op, shape, dtype, layout, device)
        before = on_cpu(args)
        expected = call(reference, op, on_cpu(inputs(op, shape, dtype, layout, device)))
        for ours, right in zip(call(kernels, op, args), expected, strict=True):
            assert ours.dtype == right.dtype and torch.equal(ours.cpu(), right), shape
        for a, b in zip(on_cpu(args)[op.endswith("_") or "_ " in op :], before[op.endswith("_") or "_ " in op :]):
            assert all(map(torch.equal, a, b)) if isinstance(a, list) else not torch.is_tensor(a) or torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_writes_the_state_alone(device):
    """A step changes channels 0 to 2 of its slice: not x_lr, not the buffer around the slice."""
    native(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        whole = torch.zeros(2, 8, 6, 7, device=device).contiguous(memory_format=layout)
        kernels.euler_step_(whole[:, 1:7, 2:5, 1:6], torch.ones(2, 3, 3, 5, device=device), 1.0)
        expected = torch.zeros(2, 8, 6, 7)
        expected[:, 1:4, 2:5, 1:6] = 1
        assert torch.equal(whole.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums(layout, dtype, device):
    """Sums are in double here and in the type of the arithmetic in the reference, whose rounding, 1e-6 a mean, is what is allowed."""
    native(device)
    for shape in SHAPES[:-2]:
        for op in ("distill_loss", "dopri5_error"):
            (ours,), (right,) = (call(m, op, a) for m, a in ((kernels, inputs(op, shape, dtype, layout, device)), (reference, inputs(op, shape, dtype, layout, "cpu"))))
            assert ours.dtype == right.dtype
            torch.testing.assert_close(ours.cpu(), right, rtol=3e-6 if dtype != torch.float64 else 1e-12, atol=0)


def test_mixed_dtypes():
    """The state in float32 and the network's velocity in bfloat16, and the other way round."""
    native("cpu")
    for state, velocity in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float32)):
        make = lambda: (tensor(0, (2, 6, 5, 7), state, "contiguous"), tensor(1, (2, 6, 5, 7), velocity, "channels_last")[:, :3], 0.5)
        assert torch.equal(kernels.euler_step_(*make()), reference.euler_step_(*make()))
    v = tensor(0, (6, 3, 5, 7), torch.bfloat16, "contiguous"), tensor(1, (2, 3, 5, 7), torch.float32, "contiguous"), tensor(2, (4, 3, 5, 7), torch.bfloat16, "contiguous")
    t = torch.tensor([0.2, 0.5])
    torch.testing.assert_close(kernels.distill_loss(*v, t, t + 0.1), reference.distill_loss(*v, t, t + 0.1), rtol=3e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_one_time_for_all_pictures(device):
    """dt and t may be one value, in a tensor or not."""
    native(device)
    x, v = tensor(0, (3, 6, 4, 5), torch.float32, "contiguous", device), tensor(1, (3, 3, 4, 5), torch.float32, "contiguous", device)
    number = kernels.euler_step_(x.clone(), v, 0.25)
    assert torch.equal(number, kernels.euler_step_(x.clone(), v, torch.tensor([0.25], device=device)))
    assert torch.equal(number, kernels.student_state(x, v, 0.25)) and torch.equal(number, kernels.student_state(x, v, torch.tensor([0.25], device=device)))


def test_memory_formats():
    """Outputs keep the memory format of what they are made from."""
    native("cpu")
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 32, 4, 5).contiguous(memory_format=layout)
        seeds, t = torch.arange(2), torch.rand(2)
        for y in (kernels.noise_augment(x, 0.1, seeds), *kernels.flow_training_pair(x, x, t, 0.1, seeds), kernels.student_state(x, x[:, :16], t),
                  kernels.distill_target(x, x, t, t + 0.1), kernels.group_norm_silu(x, 32, torch.ones(32), torch.zeros(32))):
            assert y.is_contiguous(memory_format=layout)


def test_more_than_2_31_elements():
    """Indices are 64-bit: the last pixel of a buffer of 2^31 + elements, without touching the rest of it."""
    native("cpu")
    rows = 2**31 // (6 * 64) + 64
    storage = torch.empty(6 * rows * 64, dtype=torch.bfloat16)  # touched in a few pages only, so not really 4 GiB
    x_in = storage.view(1, 6, rows, 64)[:, :, -2:]
    x_in.zero_()
    kernels.euler_step_(x_in, torch.ones(1, 3, 2, 64, dtype=torch.bfloat16), 2.0)
    assert (x_in[:, :3] == 2).all() and (x_in[:, 3:] == 0).all() and x_in.storage_offset() + 5 * x_in.stride(1) > 2**31


# ---- noise


def test_philox_known_answers():
    """The vectors that come with Salmon et al.'s Random123."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    for words, answer in (([0] * 6, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"), ([ones] * 6, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
                          (pi, "d16cfe09 94fdcceb 5001e420 24126ea1")):
        w = [torch.tensor([v]) for v in words]
        assert " ".join(f"{v.item():08x}" for v in reference.philox(w[:4], w[4:])) == answer


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_one_noise(device):
    """Bit-equal to the reference, whatever the shape; a crop of the canvas, a part of the batch or fewer channels draw the same pixels."""
    native(device)
    for shape in SHAPES:
        args = inputs("normal", shape, None, "contiguous", device)
        assert torch.equal(kernels.normal(*args).cpu(), reference.normal(*on_cpu(args)))
    seeds = torch.tensor([7, -1, 2**63 - 1], device=device)
    big = kernels.normal(seeds, (3, 8, 40, 600))
    assert torch.equal(kernels.normal(seeds[1:2], (1, 3, 17, 33)), big[1:2, :3, :17, :33])
    assert not torch.equal(kernels.normal(seeds, (3, 8, 40, 600), stream=1), big)
    for module in (kernels, reference):
        assert torch.equal(module.normal(seeds, (3, 8, 9, 70), corner=(21, 517)), big[..., 21:30, 517:587])
        x_lr = big[:, :3].clone()
        window = module.noise_augment(x_lr[..., 21:30, 517:587], 0.3, seeds, (21, 517))
        assert torch.equal(window, module.noise_augment(x_lr, 0.3, seeds)[..., 21:30, 517:587])
    far = (2**20, 2**20 + 3)
    assert torch.equal(kernels.normal(seeds, (3, 4, 5, 40), corner=far).cpu(), reference.normal(seeds.cpu(), (3, 4, 5, 40), corner=far))


def test_too_large_for_the_memory_is_one_sentence(capfd):
    """And says so in words that sample.py knows, and PyTorch's stack does not come with it."""
    native("cpu")
    with pytest.raises(RuntimeError, match="cannot allocate memory"):
        kernels.normal(torch.tensor([1]), (1, 3, 10**6, 10**6))  # 12 terabytes
    assert "frame #" not in capfd.readouterr().err


def test_noise_is_normal():
    """A million draws: mean 0 and variance 1 within 4 standard errors, Kolmogorov-Smirnov, tails, independent neighbours."""
    from scipy import stats
    x = kernels.normal(torch.tensor([123]), (1, 4, 512, 512))[0].double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n) and abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    for bound in (3.0, 4.0):  # the tails have as many as they should
        expected = n * 2 * stats.norm.sf(bound)
        assert abs((x.abs() > bound).sum() - expected) < 4 * math.sqrt(expected) + 1
    for a, b in ((x[0], x[1]), (x[0], x[2]), (x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1]), (x, kernels.normal(torch.tensor([124]), (1, 4, 512, 512))[0].double())):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_box_muller_is_accurate():
    """The polynomials against float64: a radius and an angle from every part of their ranges, corners too."""
    edge = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 2**31, 3 * 2**30, 2**32 - 2, 2**32 - 1])
    a = torch.cat([edge.repeat(9), torch.randint(2**32, (100000,), generator=torch.Generator().manual_seed(0))])
    b = torch.cat([edge.repeat_interleave(9), torch.randint(2**32, (100000,), generator=torch.Generator().manual_seed(1))])
    squared, angle = -2 * torch.log((a.double() + 0.5) / 2**32), b.double() * (2 * math.pi / 2**32)
    n0, n1 = (n.double() for n in reference.box_muller(a, b))
    # float32 holds a number near 1 to 2^-25, so its logarithm, too; the rest is rounding.
    torch.testing.assert_close(n0**2 + n1**2, squared, rtol=1e-6, atol=2**-23)
    r = (n0**2 + n1**2).sqrt().clamp(min=1e-30)
    seen = n0**2 + n1**2 > 0
    assert ((n0 / r - angle.cos())[seen]).abs().max() < 3e-7 and ((n1 / r - angle.sin())[seen]).abs().max() < 3e-7


# ---- the norm-activation


def norm_inputs(shape, dtype, layout, device, scale_shift=True, parameters=torch.float32):
    B, C, H, W = shape
    x = tensor(0, shape, dtype, layout, device) * 2 + 0.5
    if "slice" in layout:  # arithmetic made it dense
        x = tensor(0, shape, dtype, layout, device)
    vector = lambda seed, *size: torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, parameters)
    scale, shift = vector(3, B, 2 * C).chunk(2, dim=1) if scale_shift else (None, None)
    return x, vector(1, C), vector(2, C), scale, shift


def exact_norm(x, groups, weight, bias, scale, shift):
    """In float64, contiguous, by PyTorch."""
    return reference.group_norm_silu(x.double().contiguous(), groups, weight.double(), bias.double(), *((None, None) if scale is None else (scale.double(), shift.double())))


NORM_SHAPES = [(1, 32, 1, 1), (1, 32, 1, 2), (2, 64, 3, 43), (1, 32, 1, 1151), (3, 96, 17, 19), (5, 32, 8, 8), (1, 128, 40, 41), (2, 64, 5, 1), (0, 32, 4, 4)]
# A stored result is rounded once to its type (2^-9, 2^-12 relative); float32 sums and exponentials leave 1e-5.
NORM_TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2**-8, 1e-5), torch.float16: (2**-11, 1e-5), torch.float64: (1e-12, 1e-12)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype, layout, device):
    """Forward and all gradients against float64, with and without scale and shift, of which the gradient may be asked or not."""
    native(device)
    rtol, atol = NORM_TOLERANCE[dtype]
    for i, shape in enumerate(NORM_SHAPES):
        args = norm_inputs(shape, dtype, layout, device, scale_shift=i % 3 != 2, parameters=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        ours, exact = ([a if a is None else a.detach().to(where).requires_grad_() for a in args] for where in (device, "cpu"))
        y, right = kernels.group_norm_silu(ours[0], 32, *ours[1:]), exact_norm(exact[0], 32, *exact[1:])
        assert y.dtype == dtype
        torch.testing.assert_close(y.double().cpu(), right, rtol=rtol, atol=atol)
        grouped = exact[0].detach().double().unflatten(1, (32, -1)).flatten(2)
        rstd = ((grouped - grouped.mean(2, keepdim=True)).square().mean(2) + 1e-5).rsqrt().flatten().tolist()
        dy = tensor(9, shape, dtype, "channels_last slice", device)  # of another layout than y, as autograd may hand it
        y.backward(dy)
        right.backward(dy.double().cpu())
        for a, b in zip(ours, exact, strict=True):
            if a is None:
                continue
            assert a.grad.dtype == a.dtype and a.grad.shape == a.shape
            # Gradients cancel: what is left is measured against the terms, which are of the order of 1 / deviation, and
            # PyTorch rounds the exact one to a's type, too.
            scale = max([1.0, *b.grad.abs().flatten().tolist(), *rstd])
            rounding = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-11}[a.dtype]
            torch.testing.assert_close(a.grad.double().cpu(), b.grad.double(), rtol=rounding, atol=rounding * scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_norm_of_a_large_picture(layout, device):
    """More pixels than 1,024 chunks of the usual size hold, and several channels in a group."""
    native(device)
    args = norm_inputs((1, 12, 520, 520), torch.float32, layout, device, scale_shift=True)
    ours, exact = ([a.detach().to(where).requires_grad_() for a in args] for where in (device, "cpu"))
    y, right = kernels.group_norm_silu(ours[0], 4, *ours[1:]), exact_norm(exact[0], 4, *exact[1:])
    torch.testing.assert_close(y.double().cpu(), right, rtol=1e-5, atol=1e-5)
    dy = tensor(9, y.shape, torch.float32, layout, device)
    for a, b in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(right, exact, dy.double().cpu()), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-5, atol=2e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_a_large_mean(device):
    """A mean of 1,000 deviations leaves float32's rounding of x alone: one pass over x^2 - mean^2 would err by 0.1."""
    native(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(2, 64, 50, 30, generator=torch.Generator().manual_seed(0)) + 1000).contiguous(memory_format=layout)
        ones, zeros = torch.ones(64), torch.zeros(64)
        ours = kernels.group_norm_silu(x.to(device), 32, ones.to(device), zeros.to(device)).cpu()
        assert (ours - exact_norm(x, 32, ones, zeros, None, None)).abs().max() < 1e-4


def test_silu_of_anything():
    """No overflow at either end, and NaN stays NaN."""
    native("cpu")
    u = torch.tensor([-1e30, -200.0, -88.0, -87.0, -1.0, -1e-40, 0.0, 1e-40, 1.0, 87.0, 200.0, 1e30])
    x = torch.tensor([-1.0, 1.0]).repeat(12, 32, 1, 1)
    y = kernels.group_norm_silu(x, 32, torch.zeros(32), torch.zeros(32), torch.zeros(12, 32), u[:, None].repeat(1, 32))
    torch.testing.assert_close(y[:, 0, 0, 0], F.silu(u), rtol=1e-6, atol=2e-36)  # below e^-87 it is 0
    x[0, 0, 0, 0] = math.nan
    assert kernels.group_norm_silu(x, 32, torch.ones(32), torch.zeros(32)).isnan().sum() == 2  # its group


@pytest.mark.parametrize("device", DEVICES)
def test_bits_repeat(device):
    """Twice the same call, on any number of threads, is twice the same bits: no race, no order of arrival."""
    native(device)
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x, w, b, s, h = norm_inputs((3, 64, 61, 47), torch.float32, "channels_last", device)
        x.requires_grad_(), w.requires_grad_()
        y = kernels.group_norm_silu(x, 32, w, b, s, h)
        y.backward(y.detach())
        errors = [call(kernels, op, inputs(op, (3, 3, 133, 67), torch.float32, "contiguous", device))[0] for op in ("distill_loss", "dopri5_error")]
        conv = [a.requires_grad_() for a in conv_inputs(2, 64, 32, 61, 47)]
        z = kernels.conv3x3(*conv)
        added = [tensor(5, (2, 32, 61, 47), torch.float32, "channels_last"), conv[0], tensor(6, (32, 64, 1, 1), torch.float32, "contiguous").requires_grad_(), conv[2]]
        sums = [*torch.autograd.grad(z.square().sum(), conv), *torch.autograd.grad(kernels.add_conv1x1(*added).square().sum(), added[1:])]
        runs.append([z.detach(), *sums, y.detach(), x.grad, w.grad, *errors, kernels.normal(torch.arange(3, device=device), (3, 3, 133, 67))])
    torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_added_with_and_without_gradient():
    """model.add, of a map and of one that is doubled: in place where there is no gradient, and the same bits."""
    x = tensor(0, (2, 32, 4, 6), torch.float32, "channels_last")
    for times in (1, 2):
        h = tensor(1, (2, 32, 4 * times, 6 * times), torch.float32, "channels_last")
        right = h + x.repeat_interleave(times, 2).repeat_interleave(times, 3)
        assert torch.equal(add(h, x), right)
        with torch.no_grad():
            assert add(h, x) is h and torch.equal(h, right)


# ---- the convolution


def conv_inputs(B, C, O, H, W, layout="channels_last"):
    return tensor(0, (B, C, H, W), torch.float32, layout), tensor(1, (O, C, 3, 3), torch.float32, layout) / (3 * C**0.5), tensor(2, (1, O, 1, 1), torch.float32, "contiguous").flatten()


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 32, 32, 1, 1), (1, 32, 64, 16, 16), (2, 96, 32, 17, 22), (1, 64, 96, 3, 130), (3, 32, 32, 40, 41)], ids=str)
def test_conv(size, layout, doubled):
    """Winograd's convolution and its three gradients against float64, at sizes that tiles of 4x4 and blocks of tiles do not divide."""
    native("cpu")
    ours = [a.detach().requires_grad_() for a in conv_inputs(*size, layout)]
    exact = [a.detach().double().requires_grad_() for a in ours]
    y, right = torch.ops.oftsr.conv3x3(*ours, doubled), reference.conv3x3(*exact, doubled)
    dy = tensor(9, y.shape, torch.float32, layout)
    y.backward(dy)
    right.backward(dy.double())
    assert y.is_contiguous(memory_format=torch.channels_last)
    for a, b in ((y, right), *((a.grad, b.grad) for a, b in zip(ours, exact))):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).abs().max() < 5e-5 * b.abs().max()


def test_conv_where_it_pays(monkeypatch):
    """Ours in float32 between multiples of 32 channels, of enough tiles; PyTorch's very bits elsewhere; no gradient that is not asked for."""
    native("cpu")
    ops, calls = torch.ops.oftsr, []
    monkeypatch.setattr(kernels, "ops", type("Spy", (), {name: staticmethod(lambda *args, name=name: calls.append(name) or getattr(ops, name)(*args))
                                                         for name in ("conv3x3", "conv3x3_input_gradient", "conv3x3_weight_gradient")}))
    x, w, b = conv_inputs(1, 32, 32, 16, 24)
    for args in ((x, w, b, False), (*conv_inputs(4, 32, 64, 8, 12), False), (x[:, :, 8:, 12:], w, b, True)):  # the tiles of the batch, those of the doubled picture
        assert torch.equal(kernels.conv3x3(*args), ops.conv3x3(*args)) and calls == ["conv3x3"]
        calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.conv3x3(x, w, b).dtype == torch.bfloat16
    few = [conv_inputs(1, 32, 32, 15, 24), conv_inputs(1, 32, 32, 3, 3000), conv_inputs(3, 32, 32, 8, 15)]
    for args in (*few, conv_inputs(1, 48, 32, 32, 32), conv_inputs(1, 32, 12, 32, 32), (x.double(), w.double(), b.double())):
        assert torch.equal(kernels.conv3x3(*args), F.conv2d(*args, padding=1))
    assert not calls
    kernels.conv3x3(x.requires_grad_(), w, b).sum().backward()  # through frozen weights
    assert calls == ["conv3x3", "conv3x3_input_gradient"] and w.grad is b.grad is None
    calls.clear()
    kernels.conv3x3(x.detach(), w.requires_grad_(), b.requires_grad_()).sum().backward()  # of the first layer
    assert calls == ["conv3x3", "conv3x3_weight_gradient"] and b.grad.eq(16 * 24).all()
    calls.clear()
    Conv3x3(32, 32).requires_grad_(False)(x.detach()), UpConv(32, 32).requires_grad_(False)(x.detach()[:, :, :8, :12])
    assert calls == ["conv3x3"] * 2


@pytest.mark.parametrize("size", [(1, 32, 32, 1, 2), (2, 96, 32, 7, 11), (1, 224, 96, 20, 30), (3, 64, 128, 16, 9)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_conv1x1(size, layout, monkeypatch):
    """With its four gradients, and in place where there is none, against float64, at numbers of pixels that blocks do not divide."""
    native("cpu")
    B, C, O, H, W = size
    ours = [tensor(3, (B, O, H, W), torch.float32, "channels_last"), tensor(0, (B, C, H, W), torch.float32, layout),
            tensor(1, (O, C, 1, 1), torch.float32, layout) / C**0.5, tensor(2, (1, O, 1, 1), torch.float32, "contiguous").flatten()]
    ours, exact = [a.detach().requires_grad_() for a in ours], [a.detach().double().requires_grad_() for a in ours]
    right, dy = reference.add_conv1x1(*exact), tensor(9, (B, O, H, W), torch.float32, layout)
    right.backward(dy.double())
    with torch.no_grad():  # contiguous memory has no kernel
        torch.testing.assert_close(kernels.add_conv1x1(ours[0].clone(memory_format=torch.contiguous_format), *ours[1:]).double(), right, rtol=0, atol=1e-5 * right.abs().max().item())
    monkeypatch.setattr(kernels, "reference", None)  # the kernels, then, and nothing else
    y = kernels.add_conv1x1(*ours)
    y.backward(dy)
    for a, b in ((y, right), *((a.grad, b.grad) for a, b in zip(ours, exact))):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    with torch.no_grad():
        h = ours[0].detach()
        assert kernels.add_conv1x1(h, *ours[1:]) is h and torch.equal(h, y)
        skip = Skip(C, O)
        skip.weight.data, skip.bias.data = ours[2].data, ours[3].data
        assert torch.equal(skip(ours[1], exact[0].detach().float().contiguous(memory_format=torch.channels_last)), y)


class InBf16(torch.inference_mode):
    """Where conv3x3 may multiply in bfloat16."""
    def __enter__(self):
        super().__enter__()
        self.autocast = torch.autocast("cpu", torch.bfloat16)
        self.autocast.__enter__()

    def __exit__(self, *args):
        self.autocast.__exit__(*args)
        super().__exit__(*args)


def error_of(y, right):
    """The root mean square of the error and the largest one, against the deviation of the right result."""
    error = (y.double() - right).abs() / right.std()
    return error.square().mean().sqrt().item(), error.max().item()


@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("size", [(1, 32, 32, 1, 1), (1, 32, 64, 16, 16), (2, 96, 32, 17, 22), (1, 64, 96, 3, 130), (3, 32, 32, 40, 41), (1, 256, 128, 9, 50)], ids=str)
def test_conv_in_bf16(size, doubled):
    """Against float64, at sizes that tiles and blocks of tiles do not divide; the usual points 1 and 2 would make an error of 2.5 %, a wrong pixel one of 100 %."""
    native("cpu")
    if not torch.ops.oftsr.multiplies_in_bf16():
        pytest.skip("this processor does not multiply in bfloat16")
    x, w, b = conv_inputs(*size, "contiguous")
    x, w = x.bfloat16(), w.detach()
    right = reference.conv3x3(x.double(), w.double(), b.double(), doubled)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = torch.ops.oftsr.conv3x3_bf16(x.contiguous(memory_format=layout), kernels._winograd_weight(w), b, doubled)
        assert y.dtype == torch.bfloat16 and y.shape == right.shape and y.is_contiguous(memory_format=torch.channels_last)
        mean, most = error_of(y, right)
        assert mean < 0.016 and most < 0.1


def test_conv_in_bf16_where_it_pays(monkeypatch):
    """Under autocast and inference_mode, on a processor that does it without AMX, of enough tiles; PyTorch's very bits elsewhere, so in training."""
    native("cpu")
    calls, able = [], [True]
    monkeypatch.setattr(kernels, "ops", type("Fake", (), dict(multiplies_in_bf16=lambda: able[0], conv3x3_bf16=lambda *args: calls.append(args[3]))))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    x, w, b = conv_inputs(1, 32, 32, 16, 24)
    up = UpConv(32, 32).requires_grad_(False)

    def as_pytorch(x, w, b):
        return torch.equal(kernels.conv3x3(x, w, b), F.conv2d(x, w, b, padding=1)) and not calls
    with InBf16():
        kernels.conv3x3(x, w, b), kernels.conv3x3(x[:, :, :8, :12], w, b, doubled=True), up(x)
        assert calls == [False, True, True]
        calls.clear()
        assert as_pytorch(x[:, :, 1:], w, b) and as_pytorch(*conv_inputs(1, 48, 32, 32, 32)) and as_pytorch(*conv_inputs(1, 32, 12, 32, 32)) and as_pytorch(*conv_inputs(1, 544, 512, 32, 32))
        able[0] = False
        assert as_pytorch(x, w, b)
        able[0] = True
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert as_pytorch(x, w, b)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as a teacher is asked while its student learns
        assert as_pytorch(x, w, b)
        up(x)
        assert not calls
    with torch.inference_mode():
        assert not kernels.conv3x3_in_bf16(x, w)


def test_transformed_weights_follow_the_weights():
    """Made once, made anew when the weights change in place or are others, let go with them."""
    w = torch.nn.Parameter(torch.randn(32, 32, 3, 3))
    with InBf16():
        before, held = kernels._winograd_weight(w), len(kernels._winograd_weights)
        assert kernels._winograd_weight(w) is before
    with torch.no_grad():
        torch._foreach_mul_([w], 2)
    with InBf16():
        twice = kernels._winograd_weight(w)
        w.data = w.data * 2
        assert torch.equal(twice, 2 * before) and torch.equal(kernels._winograd_weight(w), 4 * before)
    del w
    assert len(kernels._winograd_weights) == held - 1


# ---- gradients, registration, compilation


def test_gradcheck():
    """Analytic gradients against finite differences in float64."""
    native("cpu")
    for layout in ("contiguous", "channels_last"):
        args = [a.double().requires_grad_() for a in norm_inputs((2, 8, 3, 5), torch.float64, layout, "cpu")]
        assert torch.autograd.gradcheck(lambda x, *p: kernels.group_norm_silu(x, 4, *p), args)
    assert torch.autograd.gradcheck(lambda x, *p: kernels.group_norm_silu(x, 4, *p), args[:3])
    v_phi, v_step, v_theta, t, s = inputs("distill_loss", (2, 3, 3, 4), torch.float64, "contiguous", "cpu")
    v_t, v_s, v_0 = v_phi.chunk(3)
    losses = lambda v_t, v_s, v_0: kernels.distill_loss(torch.cat([v_t, v_s, v_0]), v_step, v_theta, t, s)
    assert torch.autograd.gradcheck(lambda v_s, v_0: losses(v_t, v_s, v_0), [v_s.requires_grad_(), v_0.requires_grad_()])
    # Eq. (9) holds v_phi(t) still in its target, which finite differences do not know: its other losses alone.
    assert torch.autograd.gradcheck(lambda v_t: losses(v_t, v_s.detach(), v_0.detach())[1:], [v_t.requires_grad_()])


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_the_losses(device):
    """Against autograd through the reference; nothing flows into the teacher, nor through the target."""
    native(device)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        for layout in LAYOUTS:
            grads = []
            for module, where in ((kernels, device), (reference, "cpu")):
                args = inputs("distill_loss", (2, 3, 9, 7), dtype, layout, where)
                args = args[0].detach().requires_grad_(), args[1].detach().requires_grad_(), args[2].detach().requires_grad_(), *args[3:]
                (module.distill_loss(*args) * torch.tensor([1.0, 0.1, 0.01], device=where)).sum().backward()
                assert args[1].grad is None and args[2].grad is None
                grads.append(args[0].grad.cpu().float())
            torch.testing.assert_close(grads[0], grads[1], rtol=tolerance, atol=1e-9)


def operator_calls():
    """One call of each operator, as torch.library.opcheck wants them."""
    x, v = tensor(0, (2, 6, 5, 4), torch.float32, "channels_last"), tensor(1, (2, 3, 5, 4), torch.float32, "contiguous")
    x_lr, t, s, seeds = v.clone(), torch.tensor([0.2, 0.4]), torch.tensor([0.5, 0.6]), torch.tensor([1, 2])
    phi, theta = tensor(2, (6, 3, 5, 4), torch.float32, "contiguous"), tensor(3, (4, 3, 5, 4), torch.float32, "contiguous")
    h, w, b, scale, shift = norm_inputs((2, 32, 3, 4), torch.float32, "channels_last", "cpu")
    y, mean, rstd = torch.ops.oftsr.group_norm_silu(h, 32, w, b, scale, shift, 1e-5)
    g = lambda tensor: tensor.detach().clone().requires_grad_()
    return {
        "normal": (seeds, [2, 3, 5, 4], 0), "noise_augment": (x_lr, 0.2, seeds), "flow_training_pair": (v, x_lr, t, 0.2, seeds),
        "euler_step_": (x, v, t, 0.0), "rk2_stage_": (x, v, v.clone(), None, 0.5, 0.25, 0.75), "student_state": (x, v, t),
        "dopri5_stage_": (x, v, [v.clone(), v.clone()], [0.5, 0.25], 0.1), "dopri5_error": (x, v, [v.clone()] * 2, [0.5, 0.25], 0.1, 1e-3, 1e-3),
        "distill_target": (v, v.clone(), t, s), "distill_loss": (g(phi), v, theta, t, s), "distill_loss_backward": (torch.ones(3), phi, v, theta, t, s),
        "group_norm_silu": (g(h), 32, g(w), g(b), g(scale), g(shift), 1e-5),
        "group_norm_silu_backward": (y, h, 32, w, b, scale, shift, mean, rstd), "to_uint8": (v,),
        "conv3x3": (g(h), *map(g, conv_inputs(1, 32, 64, 1, 1)[1:]), True), "conv3x3_input_gradient": (h, torch.zeros(32, 64, 3, 3)), "conv3x3_weight_gradient": (h, y, False),
        "add_conv1x1": (g(torch.zeros(2, 64, 3, 4).contiguous(memory_format=torch.channels_last)), g(h), g(torch.zeros(64, 32, 1, 1)), g(torch.zeros(64))),
        "conv1x1_input_gradient": (h, torch.zeros(32, 64, 1, 1)), "conv1x1_weight_gradient": (h, y),
        "add_conv1x1_": (torch.zeros(2, 64, 3, 4).contiguous(memory_format=torch.channels_last), h, torch.zeros(64, 32, 1, 1), torch.zeros(64)),
        "conv3x3_bf16": (h.bfloat16(), torch.zeros(36, 2, 16, 32, 2, dtype=torch.bfloat16), torch.zeros(64), True),
    }


def test_opcheck():
    """PyTorch's own examination of each operator: schema, fake implementation, autograd, under its compiler."""
    native("cpu")
    calls = operator_calls()
    assert set(calls) == set(kernels.FAKE)
    if not torch.ops.oftsr.multiplies_in_bf16():
        del calls["conv3x3_bf16"]
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.oftsr, name).default, args)


def test_compile_keeps_them_in_one_graph():
    """fullgraph=True, and the operators stand in the graph; the first use may itself be under torch.compile."""
    native("cpu")
    seen = []

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def step(x_lr, seeds, t):
        x_in = kernels.noise_augment(x_lr, 0.2, seeds)
        h = kernels.group_norm_silu(x_in.repeat(1, 16, 1, 1), 32, torch.ones(96), torch.zeros(96))
        return kernels.euler_step_(x_in, h[:, :3], t)

    args = tensor(0, (2, 3, 8, 8), torch.float32, "contiguous"), torch.arange(2), torch.rand(2)
    expected = step(*args)
    chosen, kernels._chosen = kernels._chosen, None
    try:
        torch._dynamo.reset()
        assert torch.equal(torch.compile(step, backend=backend, fullgraph=True)(*args), expected)
    finally:
        kernels._chosen = chosen
    assert {"oftsr.noise_augment", "oftsr.group_norm_silu", "oftsr.euler_step_"} <= set(seen)


def test_no_gradient_where_there_is_none():
    """What has no gradient gives none, in every implementation, rather than a wrong one."""
    x, t, seeds = torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(2), torch.arange(2)
    outs = [kernels.noise_augment(x, 0.1, seeds), *kernels.flow_training_pair(x, x, t, 0.1, seeds), kernels.student_state(torch.cat([x, x], 1), x, t), kernels.distill_target(x, x, t, t + 0.1)]
    assert not any(y.requires_grad for y in outs)


ERRORS = {
    "v must have the shape (2, 3, 4, 4), not (2, 3, 4, 5).": lambda x: kernels.euler_step_(x.repeat(1, 2, 1, 1), torch.zeros(2, 3, 4, 5), 0.1),
    "x_in must have four dimensions, (B, C, H, W), not the shape (6, 4, 4).": lambda x: kernels.euler_step_(torch.zeros(6, 4, 4), x, 0.1),
    "x_in must hold x_t and x_lr, so an even number of channels, not 3.": lambda x: kernels.euler_step_(x, x, 0.1),
    "x_lr must be a float32, bfloat16, float16 or float64 tensor.": lambda x: kernels.noise_augment(x.int(), 0.1, torch.arange(2)),
    "seeds must be int64.": lambda x: kernels.noise_augment(x, 0.1, torch.zeros(2)),
    "seeds must have one value a picture, (2,), not the shape (3).": lambda x: kernels.noise_augment(x, 0.1, torch.arange(3)),
    "sigma_p must lie in [0, 1], not 1.5.": lambda x: kernels.noise_augment(x, 1.5, torch.arange(2)),
    "x_1 must have the dtype of the other tensors.": lambda x: kernels.flow_training_pair(x.half(), x, torch.rand(2), 0.1, torch.arange(2)),
    "the 3 channels of x do not make 2 equal groups.": lambda x: kernels.group_norm_silu(x, 2, torch.ones(3), torch.zeros(3)),
    "weight must have the shape (C) with its channels next to one another; it has the shape (4).": lambda x: kernels.group_norm_silu(x, 3, torch.ones(4), torch.zeros(3)),
    "weight must have the shape (O, 32, 3, 3), not (32, 32, 1, 1).": lambda x: torch.ops.oftsr.conv3x3(torch.zeros(1, 32, 4, 4), torch.zeros(32, 32, 1, 1), torch.zeros(32), False),
    "convolutions here take multiples of 32 channels, not 3 to 32.": lambda x: torch.ops.oftsr.conv3x3(x, torch.zeros(32, 3, 3, 3), torch.zeros(32), False),
    "convolutions here take multiples of 32 channels, not 0 to 32.": lambda x: torch.ops.oftsr.conv3x3(torch.zeros(1, 0, 4, 4), torch.zeros(32, 0, 3, 3), torch.zeros(32), False),
    "weight must have the shape (32, C, 3, 3), not (64, 32, 3, 3).": lambda x: torch.ops.oftsr.conv3x3_input_gradient(torch.zeros(1, 32, 4, 4), torch.zeros(64, 32, 3, 3)),
    "dy must have the shape (1, O, 4, 4), not (1, 32, 4, 5).": lambda x: torch.ops.oftsr.conv3x3_weight_gradient(torch.zeros(1, 32, 4, 4), torch.zeros(1, 32, 4, 5), False),
    "weight must have the shape (32, C, 1, 1), not (64, 32, 1, 1).": lambda x: torch.ops.oftsr.conv1x1_input_gradient(torch.zeros(1, 32, 4, 4), torch.zeros(64, 32, 1, 1)),
    "dy must have the shape (1, O, 4, 4), not (1, 64, 4, 5).": lambda x: torch.ops.oftsr.conv1x1_weight_gradient(torch.zeros(1, 32, 4, 4), torch.zeros(1, 64, 4, 5)),
    "h must have the shape (1, 32, 4, 4), not (1, 32, 5, 4).": lambda x: torch.ops.oftsr.add_conv1x1(torch.zeros(1, 32, 5, 4), torch.zeros(1, 32, 4, 4), torch.zeros(32, 32, 1, 1), torch.zeros(32)),
    "h must lie in channels_last memory.": lambda x: torch.ops.oftsr.add_conv1x1_(torch.zeros(1, 32, 4, 4), torch.zeros(1, 32, 4, 4), torch.zeros(32, 32, 1, 1), torch.zeros(32)),
    "weight must have the shape (O, 32, 1, 1), not (32, 32, 3, 3).": lambda x: torch.ops.oftsr.add_conv1x1_(
        torch.zeros(1, 32, 4, 4), torch.zeros(1, 32, 4, 4), torch.zeros(32, 32, 3, 3), torch.zeros(32)),
    "x must be a bfloat16 tensor on the CPU.": lambda x: torch.ops.oftsr.conv3x3_bf16(x, torch.zeros(1), torch.zeros(32), False),
    "U must be a transformed weight, bfloat16 (36, O / 32, 16, 32, 2), not (36, 1, 32, 32).": lambda x: torch.ops.oftsr.conv3x3_bf16(
        torch.zeros(1, 32, 4, 4).bfloat16(), torch.zeros(36, 1, 32, 32).bfloat16(), torch.zeros(32), False),
    "scale and shift must be given together.": lambda x: kernels.group_norm_silu(x, 3, torch.ones(3), torch.zeros(3), torch.zeros(2, 3)),
    "the mean over no elements is not defined: v_step has the shape (0, 3, 4, 4).": lambda x: kernels.distill_loss(x[:0], x[:0], x[:0], torch.rand(0), torch.rand(0)),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_are_sentences(sentence):
    native("cpu")
    with pytest.raises(RuntimeError) as e:
        ERRORS[sentence](torch.zeros(2, 3, 4, 4))
    assert str(e.value).splitlines()[0] == sentence


@needs_gpu
def test_two_devices_are_an_error():
    native("cuda")
    with pytest.raises(RuntimeError, match="v must be on the device of the other tensors"):
        kernels.euler_step_(torch.zeros(1, 6, 4, 4, device="cuda"), torch.zeros(1, 3, 4, 4), 0.1)


@needs_gpu
def test_current_stream():
    """Work goes to PyTorch's current stream: a long task there comes first."""
    native("cuda")
    x, v = torch.zeros(1, 6, 64, 64, device="cuda"), torch.zeros(1, 3, 64, 64, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)
        v.fill_(1)
        kernels.euler_step_(x, v, 1.0)
        done = x[:, :3].clone()
    torch.cuda.synchronize()
    assert (done == 1).all()


# ---- choosing and building


def python(code, cache, **env):
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wrapper(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


USE = "import torch, kernels; print(kernels.normal(torch.tensor([1]), (1, 1, 1, 2)).tolist()); kernels.to_uint8(torch.zeros(1, 1, 1, 1))"


def test_choice(tmp_path):
    """OFTSR_KERNELS is obeyed, said once, and a missing or broken compiler is told apart."""
    broken = wrapper(tmp_path / "broken", 'case "$*" in *-dumpversion*|*-dumpfullversion*|-v) exec c++ "$@";; esac; echo a broken compiler speaks >&2; exit 1')
    runs = {
        "torch": python(USE, tmp_path / "a", OFTSR_KERNELS="torch"),
        "absent, auto": python(USE, tmp_path / "b", OFTSR_KERNELS="auto", CXX="no-such-compiler", OFTSR_MARCH="x86-64"),
        "absent, ext": python(USE, tmp_path / "c", OFTSR_KERNELS="ext", CXX="no-such-compiler", OFTSR_MARCH="x86-64"),
        "broken, auto": python(USE, tmp_path / "d", OFTSR_KERNELS="auto", CXX=broken, OFTSR_MARCH="x86-64"),
        "broken, ext": python(USE, tmp_path / "f", OFTSR_KERNELS="ext", CXX=broken, OFTSR_MARCH="x86-64"),
        "homeless, auto": python("import pathlib\ndef nobody(): raise RuntimeError('no home')\npathlib.Path.home = nobody\n" + USE, "", OFTSR_KERNELS="auto", OFTSR_MARCH="x86-64"),
        "nonsense": python(USE, tmp_path / "e", OFTSR_KERNELS="fast"),
        "nowhere, auto": python(USE, tmp_path / "broken" / "cache", OFTSR_KERNELS="auto"),  # below a file
    }
    out = {name: (*run.communicate(), run.returncode) for name, run in runs.items()}
    noise = str(reference.normal(torch.tensor([1]), (1, 1, 1, 2)).tolist())
    for name, word in (("torch", "OFTSR_KERNELS=torch"), ("absent, auto", "no C++ compiler (no-such-compiler is not on the PATH)"), ("nowhere, auto", "in TORCH_EXTENSIONS_DIR"),
                       ("broken, auto", "cannot build it (a broken compiler speaks)"), ("homeless, auto", "no home folder")):
        stdout, stderr, code = out[name]
        said = [line for line in stderr.splitlines() if "building" not in line]
        assert code == 0 and stdout.strip() == noise and len(said) == 1 and said[0].startswith("kernels: PyTorch") and word in said[0], out[name]
    for name, words in (("absent, ext", "apt-get install g++"), ("broken, ext", "a broken compiler speaks"), ("nonsense", "OFTSR_KERNELS is auto, ext or torch, not fast")):
        assert out[name][2] != 0 and words in out[name][1], out[name]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_what_did_not_build_is_not_tried_at_every_start(tmp_path):
    """Until the compiler is another one, or OFTSR_KERNELS=ext asks. What a killed build left goes with the next."""
    def start(**env):
        run = python(USE, tmp_path / "cache", CXX=f"ccache {cxx}", OFTSR_MARCH="x86-64", **env)  # no ccache here, or one that PyTorch finds itself
        stderr = run.communicate()[1]
        tries = (tmp_path / "log").read_text().count("try")
        (tmp_path / "log").write_text("")
        return run.returncode, tries > 0, stderr

    cxx = wrapper(tmp_path / "cxx", f'echo try >> {tmp_path}/log; case "$*" in *c++20*) echo error: no c++20 >&2; exit 1;; esac; exec c++ "$@"')
    (tmp_path / "log").write_text("")
    assert start(OFTSR_KERNELS="auto")[:2] == (0, True)
    code, tried, stderr = start(OFTSR_KERNELS="auto")
    assert code == 0 and not tried and "no c++20" in stderr and "tried again" in stderr and stderr.count("\n") == 1
    assert start(OFTSR_KERNELS="ext")[:2] == (1, True)
    wrapper(tmp_path / "cxx", f'echo try >> {tmp_path}/log; exec c++ "$@" -O0')  # mended
    folder = next((tmp_path / "cache").glob("*/*"))
    (folder / "build-killed").mkdir()
    (folder / "build-killed" / "ops.o").touch()
    code, tried, stderr = start(OFTSR_KERNELS="auto")
    assert code == 0 and tried and "extension (" in stderr, stderr
    assert not list(folder.glob("build-*"))
    # What was built for any x86-64 does not multiply in bfloat16, wherever it runs.
    conv = """import torch, kernels, torch.nn.functional as F
x, w, b = torch.randn(1, 32, 32, 32), torch.randn(32, 32, 3, 3), torch.randn(32)
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16): print(torch.equal(kernels.conv3x3(x, w, b), F.conv2d(x, w, b, padding=1)), torch.ops.oftsr.multiplies_in_bf16())"""
    assert python(conv, tmp_path / "cache", CXX=f"ccache {cxx}", OFTSR_MARCH="x86-64").communicate()[0] == "True False\n"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_a_file_system_without_locks_or_without_programs(tmp_path):
    """Lustre has no flock: who builds does not wait for it. A noexec folder: PyTorch does the work, and one line says so."""
    cxx = wrapper(tmp_path / "cxx", 'exec c++ "$@" -O0')
    unlocked = "import fcntl\ndef flock(*_): raise OSError(38, 'Function not implemented')\nfcntl.flock = flock\n"
    noexec = "import torch\ndef load(path): raise OSError(f'{path}: failed to map segment from shared object')\ntorch.ops.load_library = load\n"
    runs = [python(code + USE, tmp_path / name, OFTSR_KERNELS="auto", CXX=cxx) for name, code in (("unlocked", unlocked), ("noexec", noexec))]
    (_, said), (_, refused) = (run.communicate(timeout=300) for run in runs)
    assert [run.returncode for run in runs] == [0, 0] and "extension (" in said, (said, refused)
    last = refused.splitlines()[-1]
    assert last.startswith("kernels: PyTorch; ") and "TORCH_EXTENSIONS_DIR" in last and "Traceback" not in refused


def test_import_is_silent(tmp_path):
    """Importing chooses, builds and prints nothing."""
    run = python("import kernels", tmp_path)
    assert run.communicate() == ("", "") and run.returncode == 0 and not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_many_processes_build_once(tmp_path):
    """Three processes at once, beside the locks of a killed one: each source is compiled once, and all three work."""
    cxx = wrapper(tmp_path / "cxx", f'case "$*" in *" -c "*) echo "$*" >> {tmp_path}/log;; esac; exec c++ "$@" -O0')
    code = "from kernels import build; f = build.cache(False); f.mkdir(parents=True, exist_ok=True); (f / 'lock').touch(); (f / 'build.lock').touch()"
    assert python(code, tmp_path / "cache", CXX=cxx).wait() == 0
    runs = [python(USE, tmp_path / "cache", OFTSR_KERNELS="ext", CXX=cxx) for _ in range(3)]
    outs = [run.communicate() for run in runs]
    assert all(run.returncode == 0 for run in runs), outs
    assert len({stdout for stdout, _ in outs}) == 1
    compiled = (tmp_path / "log").read_text().splitlines()
    assert len(compiled) == len(build.sources(cuda=False)), compiled
    assert sum("building the extension" in stderr for _, stderr in outs) == 1


FATBIN = struct.pack("<IH", 0xBA55ED50, 1)  # how a fat binary begins


def nvcc_or_skip():
    if not torch.version.cuda:
        pytest.skip("this PyTorch has no CUDA")
    if build.cuda_home() is None:
        pytest.skip("no CUDA toolkit here")


def test_cuda_extension_builds_links_and_loads(tmp_path):
    """For sm_80, sm_90, sm_100 and sm_120, GPU or not; on a machine without, its CPU half works."""
    nvcc_or_skip()
    code = ("import torch, kernels; from kernels import build; print(build.load(cuda=True)); kernels._chosen = ('cpu',); kernels._register();"
            "print(kernels.normal(torch.tensor([1]), (1, 1, 1, 2)).tolist())")
    run = python(code, tmp_path, TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0;12.0")
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr
    library, noise = stdout.strip().splitlines()
    assert noise == str(reference.normal(torch.tensor([1]), (1, 1, 1, 2)).tolist())
    content = Path(library).read_bytes()
    for name in (b"flow_training_pair", b"group_norm_silu"):
        assert name in content
    assert machines(content) >= {80, 90, 100, 120}


def machines(library):
    """The architectures that a library's CUDA code is compiled for, from the headers of its fat binaries: a set of int."""
    found, at = set(), library.find(FATBIN)
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", library, at)
        entry, end = at + header, at + header + size
        while entry < end:  # kind, version, header's size, payload's size; the architecture stands at byte 28
            _, _, entry_header, payload = struct.unpack_from("<HHIQ", library, entry)
            found.add(struct.unpack_from("<I", library, entry + 28)[0])
            entry += entry_header + payload
        at = library.find(FATBIN, end)
    return found


def test_what_a_block_needs_fits_a_multiprocessor(tmp_path):
    """As ptxas counts it: registers of all its threads, shared memory, nothing worth naming spilled to memory."""
    nvcc_or_skip()
    for name in ("cuda.cu", "cuda_norm.cu"):
        done = subprocess.run([f"{build.cuda_home()}/bin/nvcc", *build.NVCC_FLAGS, "-Xptxas", "-v", "-arch=sm_80", "-cubin", build.CSRC / name, "-o", tmp_path / "object"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        numbers = lambda what: [int(n) for n in re.findall(what, done.stderr)]
        registers, shared = numbers(r"Used (\d+) registers"), numbers(r"(\d+) bytes smem")
        assert len(registers) > 20 and 256 * max(registers) <= 65536 and max(shared) <= 48 * 1024 and max(numbers(r"(\d+) bytes spill stores")) <= 16


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
EMULATION = ["-std=c++20", "-O1", "-fPIC", "-w", *build.EXACT]


@needs_gxx
def test_cuda_source_on_the_cpu(tmp_path):
    """The tests of the operators once more, on the CUDA source, compiled for the CPU by tests/cuda_on_cpu.h; and tests/cuda_on_cpu.py."""
    for f in build.CSRC.iterdir():
        (tmp_path / f.name).write_text(f.read_text().replace("return launch(Cpu());", "return launch(Cuda{nullptr});"))
    shutil.copy(ROOT / "tests" / "cuda_on_cpu.h", tmp_path / "launch.h")
    from torch.utils.cpp_extension import include_paths, library_paths
    flags = [*EMULATION, "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{p}" for p in include_paths())]
    names = ["ops.cpp", "cpu.cpp", "cpu_conv.cpp", "cpu_damage.cpp", "cuda.cu", "cuda_norm.cu"]
    compilers = [subprocess.Popen(["g++", *flags, "-x", "c++", "-c", tmp_path / name, "-o", tmp_path / f"{name}.o"]) for name in names]
    assert not any([c.wait() for c in compilers])
    library = tmp_path / "emulated.so"
    subprocess.run(["g++", "-shared", "-o", library, *(tmp_path / f"{name}.o" for name in names), *(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-lc10"], check=True)
    code = (f"import sys, torch, pytest, kernels; torch.ops.load_library({str(library)!r}); kernels._chosen = ('cpu',); kernels._register();"
            f"sys.exit(pytest.main(['-q', '-x', '-rs', '-p', 'no:cacheprovider', {str(ROOT / 'tests' / 'cuda_on_cpu.py')!r}, {__file__!r},"
            "'-k', 'cuda_on_cpu or elementwise or sums or one_noise or test_norm or repeat or gradcheck or losses or in_place or 2_31']))")
    run = python(code, tmp_path)
    stdout, stderr = run.communicate()
    assert run.returncode == 0 and " passed" in stdout, stdout[-3000:] + stderr[-2000:]


RACE = """#include <stdio.h>
#include "launch.h"
__global__ void neighbours(int* out, int number) {
  __shared__ int shared[64];
  shared[threadIdx.x] = 64 * number + threadIdx.x;
  if (WAITS) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}
int main() {
  int out[64];
  try {
    for (int number = 0; number < 3; number++) {
      launch(Cuda{nullptr}, neighbours, 1, dim3(64), out, number);
      for (int x : out) printf("%d ", x);
    }
  } catch (const std::exception& e) { puts(e.what()); }
}
"""


@needs_gxx
def test_the_emulation_finds_a_race(tmp_path):
    """A kernel that needs a barrier: with it every order gives one result; without it they differ; where some threads pass it by, that is said."""
    shutil.copy(ROOT / "tests" / "cuda_on_cpu.h", tmp_path / "launch.h")
    (tmp_path / "race.cpp").write_text(RACE)
    said = {}
    for waits in ("1", "0", "threadIdx.x<32"):
        subprocess.run(["g++", *EMULATION, f"-DWAITS=({waits})", f"-I{build.CSRC}", tmp_path / "race.cpp", "-o", tmp_path / "race"], check=True)
        said[waits] = {subprocess.run([tmp_path / "race"], env={**os.environ, "OFTSR_SEED": str(seed)}, capture_output=True, text=True).stdout for seed in range(5)}
    right = "".join(f"{64 * number + (i + 1) % 64} " for number in range(3) for i in range(64))
    assert said["1"] == {right} and len(said["0"]) == 5
    assert all("a barrier that others never reach" in words for words in said["threadIdx.x<32"])
