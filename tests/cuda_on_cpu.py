"""Of the CUDA source under the emulation alone (test_kernels.py runs it there): any order of threads, small grids, tensors larger than the memory."""
import pytest
import torch

import kernels
from kernels import reference
from test_kernels import ELEMENTWISE, call, inputs, norm_inputs, tensor


def gradients(op, wanted, args):
    args = [a.detach().clone().requires_grad_() if i in wanted and a is not None else a for i, a in enumerate(args)]
    out = op(*args)
    return [out.detach(), *torch.autograd.grad(out, [args[i] for i in wanted if args[i] is not None], torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape))]


def results():
    """{name: what every kernel gives}, more than one strip, chunk and block of each."""
    found = {op: [a for a in call(kernels, op, inputs(op, (2, 3, 3, 1100), torch.float32, "contiguous", "cpu"))] for op in (*ELEMENTWISE, "dopri5_error")}
    found["distill_loss"] = gradients(kernels.distill_loss, [0], inputs("distill_loss", (2, 3, 3, 1100), torch.bfloat16, "channels_last", "cpu"))
    for layout in ("contiguous", "channels_last"):
        x, *rest = norm_inputs((2, 40, 20, 21), torch.float32, layout, "cpu")
        found[f"norm {layout}"] = gradients(kernels.group_norm_silu, [0, 2, 3, 4, 5], [x, 4, *rest])
    return found


def test_any_order_of_threads_and_blocks_gives_the_same_bits(monkeypatch):
    expected = results()
    for seed in range(4):
        monkeypatch.setenv("OFTSR_SEED", str(seed))
        for name, tensors in results().items():
            for a, b in zip(tensors, expected[name], strict=True):
                assert torch.equal(a, b), (name, seed)


def test_a_grid_smaller_than_the_picture(monkeypatch):
    """Blocks take strips in turn; kernels whose blocks do not are not started."""
    monkeypatch.setenv("OFTSR_MOST_BLOCKS", "5")
    for op in ELEMENTWISE:
        ours, right = (call(module, op, inputs(op, (2, 3, 3, 1100), torch.float32, "contiguous", "cpu")) for module in (kernels, reference))
        assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True)), op
    x, *rest = norm_inputs((2, 40, 20, 21), torch.float32, "contiguous", "cpu")
    with pytest.raises(RuntimeError, match="needs 20 blocks, more than a grid holds"):
        kernels.group_norm_silu(x, 4, *rest)


# --- more than 2^31 elements: only pages that are touched take memory, and of each launch the first and last blocks run ---

H, W = 2**17 + 1, 2**14  # of one channel, more than 2^31 pixels


@pytest.fixture
def edges(monkeypatch):
    monkeypatch.setenv("OFTSR_EDGE_BLOCKS", "16")  # of 1,024 pixels: the first and the last row


def huge(make):
    try:
        return make()
    except RuntimeError as e:
        if "memory" not in str(e):
            raise
        pytest.skip("this system promises no memory that it does not have")


def row(seed, channels=1, dtype=torch.bfloat16, batch=1):
    """(small, large): one row of a picture, and the picture of H such rows, in the memory of one."""
    small = tensor(seed, (batch, channels, 1, W), dtype, "contiguous")
    return small, small.expand(batch, channels, H, W)


def test_noise_beyond_2_31(edges):
    seeds = torch.tensor([7])
    out = huge(lambda: kernels.normal(seeds, (1, 1, H, W)))
    assert torch.equal(out[..., :1, :], reference.normal(seeds, (1, 1, 1, W))) and torch.equal(out[..., -1:, :], reference.normal(seeds, (1, 1, 1, W), corner=(H - 1, 0)))
    small, large = row(0)
    out = huge(lambda: kernels.noise_augment(large, 0.3, seeds))
    assert torch.equal(out[..., -1:, :], reference.noise_augment(small, 0.3, seeds, (H - 1, 0)))


@pytest.mark.parametrize("op", ["euler_step_", "student_state", "distill_target", "to_uint8"])
def test_elementwise_beyond_2_31(op, edges):
    (x, big_x), (v, big_v), t, s = row(0, 2), row(1), torch.tensor([0.3]), torch.tensor([0.6])
    if op == "euler_step_":
        out = huge(lambda: torch.empty(1, 2, H, W, dtype=torch.bfloat16))
        out[..., -1:, :] = x
        kernels.euler_step_(out, big_v, 0.37)
        reference.euler_step_(x, v, 0.37)
        right = x
    else:
        small, large = {"student_state": ((x, v, t), (big_x, big_v, t)), "distill_target": ((v, v / 2, t, s), (big_v, (v / 2).expand_as(big_v), t, s)), "to_uint8": ((v,), (big_v,))}[op]
        out, right = huge(lambda: getattr(kernels, op)(*large)), getattr(reference, op)(*small)
    last, right = (out[:, -1:], right) if op == "to_uint8" else (out[..., -1:, :], right)
    assert out.numel() > 2**31 and torch.equal(last, right)


def test_gradient_of_the_losses_beyond_2_31(edges):
    phi, big_phi = row(0, batch=3)
    (step, big_step), (theta, big_theta) = row(1), row(2, batch=2)
    t, s, weights = torch.tensor([0.3]), torch.tensor([0.6]), torch.tensor([1.0, 0.1, 0.01])
    right = torch.ops.oftsr.distill_loss_backward(weights / H, phi, step, theta, t, s)  # a mean over H times as many
    out = huge(lambda: torch.ops.oftsr.distill_loss_backward(weights, big_phi, big_step, big_theta, t, s))
    assert right.any() and out.numel() > 3 * 2**31
    torch.testing.assert_close(out[..., -1:, :], right, rtol=2**-7, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_norm_beyond_2_31(layout, edges):
    """The last of many small pictures, which the last blocks make from beginning to end."""
    B, C = 2**18 + 1, 32
    x, dy = (huge(lambda: torch.empty(B, C, 16, 16, dtype=torch.bfloat16, memory_format=layout)) for _ in range(2))
    x[-1], dy[-1] = tensor(0, (C, 16, 16, 1), torch.bfloat16, "contiguous")[..., 0], tensor(1, (C, 16, 16, 1), torch.bfloat16, "contiguous")[..., 0]
    weight, bias = torch.linspace(0.5, 2, C), torch.linspace(-1, 1, C)
    y, mean, rstd = huge(lambda: torch.ops.oftsr.group_norm_silu(x, 1, weight, bias, None, None, 1e-5))
    one = torch.ops.oftsr.group_norm_silu(x[-1:].clone(), 1, weight, bias, None, None, 1e-5)
    assert y.numel() > 2**31 and all(torch.equal(a[-1:], b) for a, b in zip((y, mean, rstd), one))
    dx = huge(lambda: torch.ops.oftsr.group_norm_silu_backward(dy, x, 1, weight, bias, None, None, mean, rstd)[0])
    assert torch.equal(dx[-1:], torch.ops.oftsr.group_norm_silu_backward(dy[-1:].clone(), x[-1:].clone(), 1, weight, bias, None, None, *one[1:])[0]) and dx[-1].any()
