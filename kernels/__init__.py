"""The fused kernels: the per-element mathematics of the flow, and the norm-activation and (on a CPU) the convolutions of the network.

Each public function has a PyTorch reference of the same name and signature in reference.py, which is the definition
of right, and a fused implementation in csrc/, in C++ and CUDA. OFTSR_KERNELS chooses, once, at first use:

    auto   the extension, built at first use; PyTorch where there is no compiler, or one that cannot build it (one line on stderr says so)
    ext    the extension, or an error
    torch  PyTorch

The extension's functions are PyTorch operators, torch.ops.oftsr.*: torch.compile keeps them in its graph.
All take tensors of float32, bfloat16 and float16, computed in float32, and float64, computed in float64; contiguous,
channels_last, or slices of these. A tensor of the wrong device, dtype or shape raises RuntimeError.
Symbols: x_1 (HR) and x_lr are (B, 3, H, W) in [-1, 1]; x_in is concat(x_t, x_lr), (B, 6, H, W); t, s, dt are (B,);
seeds is (B,) int64, one stream of noise a picture.
"""
import os
import sys

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from . import build, reference

ops = torch.ops.oftsr
WINOGRAD_TILES = 24  # of 4x4 pixels, whole ones, in a batch: from here on conv3x3 is ours
_winograd_weights = WeakIdKeyDictionary()
_chosen = None  # the device types that the extension serves, once chosen


def extension_devices():
    """The types of device whose tensors the extension takes: ("cpu",), ("cpu", "cuda") or (). Chosen at the first call.

    Raises EnvironmentError if OFTSR_KERNELS asks for what is not there, RuntimeError if the extension does not compile.
    """
    global _chosen
    if _chosen is None:
        _chosen, words = _choose(os.environ.get("OFTSR_KERNELS", "auto"))
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"kernels: {words}", file=sys.stderr, flush=True)
    return _chosen


extension_devices._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without importing the compiler


def _choose(wanted):
    if wanted not in ("auto", "ext", "torch"):
        raise EnvironmentError(f"OFTSR_KERNELS is auto, ext or torch, not {wanted}")
    if wanted == "torch":
        return (), "PyTorch, as OFTSR_KERNELS=torch asks"
    gpu = torch.cuda.is_available()
    cuda = gpu and build.cuda_home() is not None
    try:
        path = build.load(cuda, again=wanted == "ext")
    except build.MissingTool as e:
        if wanted == "ext":
            raise e.__cause__ if isinstance(e.__cause__, RuntimeError) else e
        return (), f"PyTorch; {e}"
    _register()
    if gpu and not cuda:
        return ("cpu",), f"extension for CPU tensors, PyTorch for CUDA tensors, as there is no nvcc ({path})"
    return ("cpu", "cuda") if cuda else ("cpu",), f"extension ({path})"


def _native(x):
    return x.device.type in extension_devices()


def _arithmetic(x, *others):
    """The others in x's type of arithmetic: float64 for float64, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [o if o is None else o.to(dtype) for o in others]


def _like(x, *velocities):
    """The velocities as they are where all have x's dtype, else in the type of the arithmetic."""
    return list(velocities) if all(v.dtype == x.dtype for v in velocities) else _arithmetic(x, *velocities)


def _step(dt, x_in):
    """dt as the operators want it: (tensor or None, number)."""
    return (dt.float().expand(x_in.shape[0]), 0.0) if torch.is_tensor(dt) else (None, dt)


def normal(seeds, shape, stream=0, corner=(0, 0)):
    """Standard normal noise, a function of (seed, stream, c, h, w) alone: Philox 4x32-10 (Salmon et al. 2011), Box-Muller.

    seeds (B,) int64, shape (B, C, H, W), stream a number; returns float32, the same bits from every implementation.
    corner (h, w): where the window of that shape begins in a larger picture.
    """
    if not _native(seeds):
        return reference.normal(seeds, shape, stream, corner)
    return ops.normal(seeds, list(shape), stream, *corner)


@torch.no_grad()
def noise_augment(x_lr, sigma_p, seeds, corner=(0, 0)):
    """Eq. (4), x_0 = sqrt(1 - sigma_p^2) x_lr + sigma_p eps, straight into the network's input, in one pass.

    x_lr (B, C, H, W), sigma_p in [0, 1], seeds (B,) int64; returns concat(x_0, x_lr), (B, 2C, H, W), of x_lr's
    dtype and memory format. corner (h, w): x_lr is a window of a larger picture that begins there, and gets that part
    of the picture's noise. No gradient.
    """
    if not _native(x_lr):
        return reference.noise_augment(x_lr, sigma_p, seeds, corner)
    return ops.noise_augment(x_lr, sigma_p, seeds, *corner)


@torch.no_grad()
def flow_training_pair(x_1, x_lr, t, sigma_p, seeds):
    """One training example of Eq. (5) in one pass: x_in = concat(x_t, x_lr), x_t = (1-t) x_0 + t x_1, and the target x_1 - x_0.

    x_1, x_lr (B, C, H, W) of one dtype, t (B,) in [0, 1], sigma_p in [0, 1], seeds (B,) int64; returns (B, 2C, H, W)
    and (B, C, H, W). x_0 is Eq. (4)'s; its noise is drawn inside. No gradient.
    """
    if not _native(x_lr):
        return reference.flow_training_pair(x_1, x_lr, t, sigma_p, seeds)
    return ops.flow_training_pair(x_1, x_lr, t.float(), sigma_p, seeds)


@torch.no_grad()
def euler_step_(x_in, v, dt):
    """x_t += dt v, in place in channels 0 to C-1 of x_in (B, 2C, H, W); v (B, C, H, W), dt a number or (B,). Returns x_in."""
    if not _native(x_in):
        return reference.euler_step_(x_in, v, dt)
    ops.euler_step_(x_in, *_like(x_in, v), *_step(dt, x_in))
    return x_in


@torch.no_grad()
def rk2_stage_(x_in, v1, v2, dt, alpha):
    """The second stage of the explicit RK2 scheme with node alpha: 1/2 midpoint, 2/3 Ralston, 1 Heun.

    The first stage was euler_step_(x_in, v1, alpha dt) and v2 the velocity there; this brings x_in to
    x_t + dt ((1 - 1/(2 alpha)) v1 + 1/(2 alpha) v2), in place, keeping no copy of x_t. Shapes as euler_step_.
    """
    if not _native(x_in):
        return reference.rk2_stage_(x_in, v1, v2, dt, alpha)
    ops.rk2_stage_(x_in, *_like(x_in, v1, v2), *_step(dt, x_in), *reference.rk2_coefficients(alpha))
    return x_in


@torch.no_grad()
def dopri5_stage_(x_in, x_t, k, dt):
    """x_in[:, :C] = x_t + dt sum_j a_j k_j, in place: a stage of the Dormand-Prince pair, whichever len(k) says (1 to 6).

    x_in (B, 2C, H, W); x_t and the velocities in k (B, C, H, W); dt a number. reference.dopri5_stage_ shows the whole step.
    """
    if not _native(x_in):
        return reference.dopri5_stage_(x_in, x_t, k, dt)
    ops.dopri5_stage_(x_in, x_t, _like(x_in, *k), reference.DOPRI5_A[len(k) - 1], dt)
    return x_in


@torch.no_grad()
def dopri5_error(x_in, x_t, k, dt, atol, rtol):
    """scipy's error norm of the step from x_t to x_in[:, :C]: RMS of dt sum_j e_j k_j / (atol + rtol max(|x_t|, |x_new|)).

    k is the list of all 7 velocities, shapes as dopri5_stage_. Returns a float64 scalar tensor on x_in's device.
    """
    if not _native(x_in):
        return reference.dopri5_error(x_in, x_t, k, dt, atol, rtol)
    return ops.dopri5_error(x_in, x_t, _like(x_in, *k), reference.DOPRI5_E, dt, atol, rtol)


@torch.no_grad()
def student_state(x_in, v, t):
    """Eq. (7), x_t = x_0 + t v_phi(x_0, t), into a new buffer: concat(x_0, x_lr) (B, 2C, H, W) to concat(x_t, x_lr).

    v (B, C, H, W), t (B,) or a number. No gradient, as the paper has none through x_t.
    """
    if not _native(x_in):
        return reference.student_state(x_in, v, t)
    per_picture, number = _step(t, x_in)
    if per_picture is None:
        per_picture = torch.full((1,), number, device=x_in.device).expand(x_in.shape[0])
    return ops.student_state(x_in, *_like(x_in, v), per_picture)


@torch.no_grad()
def distill_target(v_phi, v_theta, t, s):
    """Eq. (9)'s stop-gradient target, v_phi(t) + (s-t)/s (v_theta - v_phi(t)); all (B, C, H, W), t and s (B,)."""
    if not _native(v_phi):
        return reference.distill_target(v_phi, v_theta, t, s)
    phi, theta = (v_phi, v_theta) if v_phi.dtype == v_theta.dtype else (v_phi.float(), v_theta.float())
    return ops.distill_target(phi, theta, t.float(), s.float()).to(v_phi.dtype)


def distill_loss(v_phi, v_step, v_theta, t, s):
    """The three losses of Eq. (12), unweighted, in one pass: (3,) float32 = [Eq. (9), Eq. (10), Eq. (11)], means over all elements.

    v_phi (3B, C, H, W): the student at t, s and 0, from x_0, one after the other along the batch.
    v_step (B, C, H, W): the teacher's velocity for the step from x_t to x_s (Euler: v_theta at t; RK2: its mean slope).
    v_theta (2B, C, H, W): the teacher at (x_t, t) and at (x_0, 0). t, s (B,).
    The gradient flows into v_phi alone, and in Eq. (9) into v_phi(s) alone.
    """
    if not _native(v_phi):
        return reference.distill_loss(v_phi, v_step, v_theta, t, s)
    if not v_phi.dtype == v_step.dtype == v_theta.dtype:
        v_phi, v_step, v_theta = v_phi.float(), v_step.float(), v_theta.float()
    return ops.distill_loss(v_phi, v_step.detach(), v_theta.detach(), t.float(), s.float())


def group_norm_silu(x, groups, weight, bias, scale=None, shift=None, eps=1e-5):
    """silu(group_norm(x) (1 + scale) + shift), the norm-activation of the U-Net (scale-shift: Dhariwal & Nichol 2021).

    x (B, C, H, W); weight, bias (C,); scale, shift (B, C), both or neither. The result has x's dtype and memory
    format; statistics are in float32, merged in float64. The gradient flows into all five tensors, once.
    """
    if not _native(x):
        return reference.group_norm_silu(x, groups, weight, bias, scale, shift, eps)
    return ops.group_norm_silu(x, groups, *_arithmetic(x, weight, bias, scale, shift), eps)[0]


def conv3x3(x, weight, bias, doubled=False):
    """The 3x3 convolution with zeros around the picture: x (B, C, H, W), weight (O, C, 3, 3), bias (O,) -> (B, O, H, W).

    doubled: of x doubled by repetition, (B, O, 2H, 2W), of whose products 11 in 36 are zeros, and left out.
    On the CPU, in float32 and between multiples of 32 channels, by Winograd's algorithm F(4x4, 3x3) (Lavin & Gray 2016),
    which multiplies a quarter as often and errs about four times as much as PyTorch's (with 32 channels 1.3e-6 of the
    result's deviation, with 512 4.5e-6); an Inf or NaN spreads over its tile. From `WINOGRAD_TILES` on, below which
    transforming the weights costs more than it saves: so in a small picture the last bits can depend on its batch.
    In bfloat16 only where conv3x3_in_bf16 says so. Elsewhere PyTorch's. The gradient flows into all three tensors, once.
    """
    if conv3x3_in_bf16(x, weight, doubled):
        return ops.conv3x3_bf16(x.bfloat16(), _winograd_weight(weight), bias.float(), doubled)
    if not conv3x3_in_float32(x, weight, doubled):
        return reference.conv3x3(x, weight, bias, doubled)
    return ops.conv3x3(x, weight, bias, doubled)


def _tiles(x, doubled):
    return x.shape[0] * (x.shape[-2] // 4) * (x.shape[-1] // 4) << 2 * doubled


def conv3x3_in_float32(x, weight, doubled=False):
    """Whether conv3x3 goes by Winograd's algorithm in float32."""
    return (x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and weight.shape[0] % 32 == weight.shape[1] % 32 == 0
            and _tiles(x, doubled) >= WINOGRAD_TILES and not torch.is_autocast_enabled("cpu") and _native(x))


def add_conv1x1(h, x, weight, bias):
    """h + the 1x1 convolution of x: h (B, O, H, W), x (B, C, H, W), weight (O, C, 1, 1), bias (O,) -> (B, O, H, W). The gradient flows into all four tensors, once.

    Where there is no gradient (torch.no_grad) it is added to h in place. By a kernel of ours on the CPU, in float32, between multiples
    of 32 channels, h in channels_last memory; elsewhere PyTorch's.
    """
    if (x.device.type != "cpu" or not h.dtype == x.dtype == weight.dtype == torch.float32 or weight.shape[0] % 32 or weight.shape[1] % 32
            or h.stride() != (h[0].numel(), 1, h.shape[3] * h.shape[1], h.shape[1]) or torch.is_autocast_enabled("cpu") or not _native(x)):
        return reference.add_conv1x1(h, x, weight, bias)
    if torch.is_grad_enabled():
        return ops.add_conv1x1(h, x, weight, bias)
    ops.add_conv1x1_(h, x, weight, bias)
    return h


def conv3x3_in_bf16(x, weight, doubled=False):
    """Whether conv3x3 goes by Winograd's algorithm in bfloat16: under autocast, on a CPU that multiplies in it by AVX-512, not AMX (there PyTorch's is faster).

    Only in torch.inference_mode, where weights are constants: they are transformed once, and again after a change in place.
    What is multiplied is rounded to bfloat16, the rest is float32's: an error of 1.1 % of the result's deviation, where PyTorch's
    makes .3 %. Not between more than 512 and 512 channels, whose transformed weights would fill the memory.
    """
    able = (torch.is_inference_mode_enabled() and x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and not torch.compiler.is_compiling() and _native(x) and ops.multiplies_in_bf16() and not torch.cpu._is_amx_tile_supported())
    O, C = weight.shape[:2]
    return able and weight.dtype == torch.float32 and not weight.is_inference() and O % 32 == C % 32 == 0 and O * C <= 512**2 and _tiles(x, doubled) >= WINOGRAD_TILES


def _winograd_weight(weight):
    """G g G^T of weight (O, C, 3, 3) in bfloat16, as csrc/cpu_conv.cpp reads it: (36, O / 32, C / 2, 32, 2). Made once for each state of a weight."""
    state = weight.data_ptr(), weight._version
    known = _winograd_weights.get(weight)
    if known is None or known[0] != state:
        O, C, a, b = *weight.shape[:2], 0.625, 1.5  # the points are 0, a, -a, b, -b and infinity
        finite = [[1 / n, p / n, p * p / n] for p, q in ((a, b), (-a, b), (b, a), (-b, a)) for n in [2 * p * p * (p * p - q * q)]]
        G = torch.tensor([[1 / (a * b) ** 2, 0, 0], *finite, [0, 0, 1]], dtype=torch.float64)  # which autocast leaves as it is
        U = torch.einsum("pi,ocij,qj->pqoc", G, weight.double(), G).reshape(36, O // 32, 32, C // 2, 2)
        known = _winograd_weights[weight] = state, U.transpose(2, 3).bfloat16().contiguous()
    return known[1]


def to_uint8(x):
    """[-1, 1] to bytes: (B, C, H, W) float to (B, H, W, C) uint8 on x's device, clamped, rounded half to even."""
    if not _native(x):
        return reference.to_uint8(x)
    return ops.to_uint8(x)


# ---- what happens to pictures in the world: of the extension on a CPU; its definition is degradations.harm, of the functions in reference.py

BLUR, RESIZE, NOISE, JPEG = range(4)


def damages(x):
    """Whether `damage` takes x."""
    return x.device.type == "cpu" and _native(x)


def damage(x_1, seeds, first, stages, filters, steps, h, w):
    """Each picture through its own stages: x_1 (B, 3, H, W) float32 in [-1, 1], seeds (B,) int64 -> (B, 3, h, w) in [0, 1], neither clamped nor rounded.

    Picture b's are rows first[b] to first[b + 1] - 1 of stages (S, 5) float64, first (B + 1,) int64:
    BLUR, side, where in filters (F,) float32 it begins; RESIZE, 0 area, 1 bilinear, 2 bicubic or 3 antialiased, and height, width, 0, or 0, 0, ratio;
    NOISE, amount, whether Gaussian, whether gray, stream of noise; JPEG, factor of its tables. steps (9, 256, bins / 16) int16: degradations.poisson_steps.
    """
    return ops.damage(x_1, seeds, first, stages, filters, steps, h, w)


# ---- what PyTorch's compiler and autograd want to know of the operators


def _new(x, channels):
    """An output of x's memory format, as csrc/ops.cpp makes it."""
    last = x.stride(1) == 1 and not x.is_contiguous()
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last if last else torch.contiguous_format)


def _vector(x, *shape):
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _last(x, *shape):
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _norm_outputs(x, groups, *_):
    return _new(x, x.shape[1]), _vector(x, x.shape[0], groups), _vector(x, x.shape[0], groups)


def _norm_gradients(dy, x, groups, weight, bias, scale, *_):
    per_picture = 0 if scale is None else x.shape[0]
    C = x.shape[1]
    return _new(x, C), _vector(x, C), _vector(x, C), _vector(x, per_picture, C), _vector(x, per_picture, C)


FAKE = {  # shapes, dtypes and memory formats of the outputs
    "normal": lambda seeds, shape, *_: seeds.new_empty(shape, dtype=torch.float32),
    "noise_augment": lambda x_lr, *_: _new(x_lr, 2 * x_lr.shape[1]),
    "flow_training_pair": lambda x_1, x_lr, t, sigma_p, seeds: (_new(x_lr, 2 * x_lr.shape[1]), _new(x_1, x_1.shape[1])),
    "euler_step_": lambda *_: None,
    "rk2_stage_": lambda *_: None,
    "dopri5_stage_": lambda *_: None,
    "dopri5_error": lambda x_in, *_: x_in.new_empty((), dtype=torch.float64),
    "student_state": lambda x_in, v, t: _new(x_in, x_in.shape[1]),
    "distill_target": lambda v_phi, *_: _new(v_phi, v_phi.shape[1]),
    "distill_loss": lambda v_phi, *_: _vector(v_phi, 3),
    "distill_loss_backward": lambda grad, v_phi, *_: _new(v_phi, v_phi.shape[1]),
    "group_norm_silu": _norm_outputs,
    "group_norm_silu_backward": _norm_gradients,
    "conv3x3": lambda x, weight, bias, doubled: _last(x, x.shape[0], len(bias), *(side * (1 + doubled) for side in x.shape[2:])),
    "conv3x3_bf16": lambda x, U, bias, doubled: _last(x, x.shape[0], len(bias), *(side * (1 + doubled) for side in x.shape[2:])),
    "add_conv1x1": lambda h, *_: _last(h, *h.shape),
    "add_conv1x1_": lambda *_: None,
    "conv1x1_input_gradient": lambda dy, weight: _last(dy, dy.shape[0], weight.shape[1], *dy.shape[2:]),
    "conv1x1_weight_gradient": lambda x, dy: _last(x, dy.shape[1], x.shape[1], 1, 1),
    "conv3x3_input_gradient": lambda dy, weight: _last(dy, dy.shape[0], weight.shape[1], *dy.shape[2:]),
    "conv3x3_weight_gradient": lambda x, dy, doubled: _last(x, dy.shape[1], x.shape[1], 3, 3),
    "to_uint8": lambda x: x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=torch.uint8),
}


def _norm_context(ctx, inputs, output):
    x, ctx.groups, weight, bias, scale, shift, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)


def _norm_backward(ctx, dy, *_):
    x, weight, bias, scale, shift, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dscale, dshift = ops.group_norm_silu_backward(dy, x, ctx.groups, weight, bias, scale, shift, mean, rstd)
    return dx, None, dweight, dbias, *((None, None) if scale is None else (dscale, dshift)), None


def _conv_context(ctx, inputs, output):
    x, weight, _, ctx.doubled = inputs
    ctx.save_for_backward(x, weight)


def _conv_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias, _ = ctx.needs_input_grad
    dy = dy.contiguous(memory_format=torch.channels_last)  # once for all three
    dx = ops.conv3x3_input_gradient(dy, weight) if of_x else None
    if of_x and ctx.doubled:
        dx = F.avg_pool2d(dx, 2, divisor_override=1)  # a pixel's gradient is the sum over those that it stands for
    return dx, ops.conv3x3_weight_gradient(x, dy, ctx.doubled) if of_weight else None, dy.sum((0, 2, 3)) if of_bias else None, None


def _conv1x1_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


def _conv1x1_backward(ctx, dy):
    x, weight = ctx.saved_tensors
    of_h, of_x, of_weight, of_bias = ctx.needs_input_grad
    dy = dy.contiguous(memory_format=torch.channels_last)  # once for all, and for what h came from
    return (dy if of_h else None, ops.conv1x1_input_gradient(dy, weight) if of_x else None, ops.conv1x1_weight_gradient(x, dy) if of_weight else None,
            dy.sum((0, 2, 3)) if of_bias else None)


def _loss_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _loss_backward(ctx, grad):
    return ops.distill_loss_backward(grad.contiguous(), *ctx.saved_tensors), None, None, None, None


def _register():
    for name, fake in FAKE.items():
        torch.library.register_fake(f"oftsr::{name}", fake)
    torch.library.register_autograd("oftsr::group_norm_silu", _norm_backward, setup_context=_norm_context)
    torch.library.register_autograd("oftsr::conv3x3", _conv_backward, setup_context=_conv_context)
    torch.library.register_autograd("oftsr::add_conv1x1", _conv1x1_backward, setup_context=_conv1x1_context)
    torch.library.register_autograd("oftsr::distill_loss", _loss_backward, setup_context=_loss_context)
