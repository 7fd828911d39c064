"""Speed: against PyTorch, and against the memory.

    python bench.py kernels                 each kernel: ours, eager, torch.compile, and the floor
    python bench.py kernels --only norm     those whose name contains "norm"
    python bench.py kernels --device cuda --dtype bfloat16
    python bench.py model                   the published FFHQ network's one step: as published, and ours
    python bench.py infer --size 1024       the shipped student's one step: ours, onnxruntime's and OpenVINO's, where they are installed
    python bench.py train                   an update of both stages: as published, and ours, and where its time goes
    python bench.py data                    pictures a second and core of the loader, from files and from tars, beside PIL in plain form and what a network needs
    python bench.py data --data_dir DIR     the same of pictures of yours
    python bench.py memory --size 128       what training keeps for the backward pass: GiB a picture, by preset and stage
    python bench.py lora --size 512         what distilling a DiT4SR of the published size takes, GiB by part: worked out, without weights or a card
    python bench.py gpu                     on a graphics card: tests, sanitizers and all of the above on one page, to paste where others read it
    python bench.py degradation             the real world's degradation: ours, and one by one with OpenCV and a codec

Equality comes first: nothing is timed before "all results match". "eager" is what a PyTorch user would write (the
functions below), "compiled" is torch.compile of it. The floor is the time in which a copy moves the bytes that the
kernel cannot but move, each read or written once; of the convolutions, that in which PyTorch's matrix product makes the
multiplications that Winograd's algorithm leaves. Buffers rotate, so that no cache flatters; times are wall-clock
milliseconds, min / median / max.
"""
import copy
import math
import os
import statistics
import sys
import tarfile
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin make every time a multiple of the scheduler's slice

import torch
import torch.nn as nn
import torch.nn.functional as F

import numpy as np
from PIL import Image

import data
import distill
import folders
import gpu_report
import kernels
import machine
import model
import sample
import shards
import training
from console import InputError, Parser, in_range
from degradations import degrade, draw, real, to_float, uniforms
from distill import distillation_losses
from export import reference_kernels
from kernels import reference
from pictures import read_image
from report import peak_memory
from train_flow import flow_loss

SIGMA_P, DT, ALPHA = 0.2, 0.1, 0.5


# --- what a PyTorch user would write ---


def eager_noise_augment(x_lr, seeds):
    x_0 = math.sqrt(1 - SIGMA_P**2) * x_lr + SIGMA_P * torch.randn_like(x_lr)
    return torch.cat([x_0, x_lr], dim=1)


def eager_training_pair(x_1, x_lr, t, seeds):
    t = t.to(x_1.dtype).view(-1, 1, 1, 1)
    x_0 = math.sqrt(1 - SIGMA_P**2) * x_lr + SIGMA_P * torch.randn_like(x_lr)
    x_t = (1 - t) * x_0 + t * x_1
    return torch.cat([x_t, x_lr], dim=1), x_1 - x_0


def eager_euler(x_in, v):
    x_t, x_lr = x_in.chunk(2, dim=1)
    return torch.cat([x_t + DT * v, x_lr], dim=1)


def eager_euler_in_place(x_in, v):
    x_in[:, :3].add_(v, alpha=DT)
    return x_in


def eager_rk2(x_in, v1, v2):
    b1, b2 = reference.rk2_coefficients(ALPHA)
    x_t, x_lr = x_in.chunk(2, dim=1)
    return torch.cat([x_t + DT * (b1 * v1 + b2 * v2), x_lr], dim=1)


def eager_student_state(x_in, v, t):
    x_0, x_lr = x_in.chunk(2, dim=1)
    return torch.cat([x_0 + t.to(v.dtype).view(-1, 1, 1, 1) * v, x_lr], dim=1)


def eager_dopri5(x_in, x_t, *k):
    x_new = x_t + DT * sum(c * v for c, v in zip(reference.DOPRI5_A[5], k) if c)
    return torch.cat([x_new, x_in[:, 3:]], dim=1)


def eager_dopri5_error(x_in, x_t, *k):
    error = DT * sum(c * v for c, v in zip(reference.DOPRI5_E, k) if c)
    return (error / (1e-3 + 1e-2 * torch.maximum(x_t.abs(), x_in[:, :3].abs()))).square().mean().sqrt()


def eager_distill_loss(v_phi, v_step, v_theta, t, s):
    t, s = (a.to(v_phi.dtype).view(-1, 1, 1, 1) for a in (t, s))
    (v_t, v_s, v_0), (u_t, u_0) = v_phi.chunk(3), v_theta.chunk(2)
    target = (v_t + (s - t) / s * (v_step - v_t)).detach()
    return torch.stack([F.mse_loss(v_s, target), F.mse_loss((1 - t) * v_t, (1 - t) * u_t), F.mse_loss(v_0, u_0)])


def eager_norm(x, weight, bias, scale, shift):
    y = F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype))
    return F.silu(y * (1 + scale.to(x.dtype)[:, :, None, None]) + shift.to(x.dtype)[:, :, None, None])


def eager_bytes(x):
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def with_gradient(loss, wanted):
    """Forward and backward: the gradients of the first `wanted` arguments, with the loss's own value."""
    def run(*args):
        args = [a.detach().requires_grad_() if i < wanted else a for i, a in enumerate(args)]
        y = loss(*args)
        return y, *torch.autograd.grad(y, args[:wanted], y.detach())
    return run


def in_bf16(conv):
    """The convolution as a picture is restored in bfloat16: where weights are constants."""
    def run(x, weight, bias):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return conv(x, weight, bias)
    return run


# --- the cases: name, inputs, ours, reference of the same arguments, eager, bytes moved, multiplications ---


def cases(device, dtype, size=256):
    """size: of the pictures, 256 to measure; the maps of the norms and convolutions follow it."""
    B, C, H, W = 32, 3, size, size
    unit = B * C * H * W * torch.empty((), dtype=dtype).element_size()  # bytes of one (B, 3, H, W)
    image = lambda batch=1, channels=1: torch.randn(B * batch, C * channels, H, W, device=device).to(dtype)
    times = lambda: torch.rand(B, device=device) * 0.5 + 0.01
    seeds = lambda: torch.randint(2**62, (B,), device=device)

    def case(name, make, call, eager, units):
        return name, make, lambda *a: call(kernels, *a), lambda *a: call(reference, *a), eager, units * unit, 0

    yield case("noise_augment", lambda: (image(), seeds()), lambda k, x, s: k.noise_augment(x, SIGMA_P, s), eager_noise_augment, 3)
    yield case("flow_training_pair", lambda: (image(), image(), times(), seeds()), lambda k, x, l, t, s: k.flow_training_pair(x, l, t, SIGMA_P, s), eager_training_pair, 5)
    yield case("euler_step_", lambda: (image(1, 2), image()), lambda k, x, v: k.euler_step_(x, v, DT), eager_euler, 3)
    yield case("euler_step_ (eager in place)", lambda: (image(1, 2), image()), lambda k, x, v: k.euler_step_(x, v, DT), eager_euler_in_place, 3)
    yield case("rk2_stage_", lambda: (image(1, 2), image(), image()), lambda k, x, v1, v2: k.rk2_stage_(x, v1, v2, DT, ALPHA), eager_rk2, 4)
    yield case("student_state", lambda: (image(1, 2), image(), times()), lambda k, x, v, t: k.student_state(x, v, t), eager_student_state, 5)
    velocities = lambda n: tuple(image() for _ in range(n))
    yield case("dopri5_stage_", lambda: (image(1, 2), image(), *velocities(6)), lambda k, x, y, *v: k.dopri5_stage_(x, y, list(v), DT), eager_dopri5, 7)
    yield case("dopri5_error", lambda: (image(1, 2), image(), *velocities(7)), lambda k, x, y, *v: k.dopri5_error(x, y, list(v), DT, 1e-3, 1e-2), eager_dopri5_error, 8)
    loss = lambda: (image(3), image(), image(2), times(), times() + 0.3)
    yield case("distill_loss", loss, lambda k, *a: k.distill_loss(*a), eager_distill_loss, 6)
    yield case("distill_loss, with gradient", loss, lambda k, *a: with_gradient(k.distill_loss, 1)(*a), with_gradient(eager_distill_loss, 1), 15)
    yield case("to_uint8", lambda: (image(),), lambda k, x: k.to_uint8(x), eager_bytes, 1 + 1 / torch.empty((), dtype=dtype).element_size())

    for batch, channels, side in ((8, 32, 48), (8, 128, 12), (1, 32, 512), (1, 128, 256)):
        shape = (batch, channels, side * size // 256, side * size // 256)
        unit = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        for layout in (torch.channels_last, torch.contiguous_format):
            def make(shape=shape, layout=layout):
                vector = lambda *size: torch.randn(size, device=device)
                x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
                return x, vector(shape[1]), vector(shape[1]), vector(*shape[:2]), vector(*shape[:2])
            norm = lambda k, x, w, b, s, h: k.group_norm_silu(x, 32, w, b, s, h)
            name = f"norm {'x'.join(map(str, shape))} {'last' if layout == torch.channels_last else 'first'}"
            yield case(name, make, norm, eager_norm, 3)
            if layout == torch.channels_last:
                yield case(name + ", gradient", make, lambda k, *a, norm=norm: with_gradient(lambda *b: norm(k, *b), 5)(*a), with_gradient(eager_norm, 5), 8)

    bf16 = dtype == torch.bfloat16 and device == "cpu" and torch.ops.oftsr.multiplies_in_bf16()
    if device == "cpu" and (dtype == torch.float32 or bf16):
        for batch, channels, out, side, k in ((1, 32, 32, 512, 3), (1, 96, 96, 256, 3), (1, 128, 128, 128, 3), (5, 96, 96, 32, 3), (5, 128, 128, 16, 3), (5, 128, 32, 64, 1), (5, 224, 96, 32, 1)):
            side = side * size // 256
            def make(B=batch, C=channels, O=out, S=side, k=k):
                last = lambda *size: torch.randn(size).contiguous(memory_format=torch.channels_last)
                added = (last(B, O, S, S).to(dtype),) if k == 1 else ()
                return *added, last(B, C, S, S).to(dtype), last(O, C, k, k) / (k * math.sqrt(C)), torch.randn(O)
            name, ours, right = (f"conv {batch}x{channels}x{side}x{side}", kernels.conv3x3, reference.conv3x3) if k == 3 else \
                (f"conv 1x1 {batch}x{channels}x{side}x{side} to {out}, added", kernels.add_conv1x1, reference.add_conv1x1)
            values, macs = batch * side**2, batch * side**2 * channels * out * (9 / 4 if k == 3 else 1)
            moved, wanted = dtype.itemsize * values * (channels + out * (2 if k == 1 else 1)), 3 if k == 3 else 4
            if bf16 and k == 3:
                yield name, make, in_bf16(ours), in_bf16(right), in_bf16(right), moved, macs
            elif not bf16:
                yield name, make, ours, right, right, moved, macs
                yield name + ", gradient", make, with_gradient(ours, wanted), with_gradient(right, wanted), with_gradient(right, wanted), 3 * moved, 3 * macs


# --- the clock ---


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def clock(functions, sets, device, seconds=0.25, least=5, now=time.perf_counter):
    """Milliseconds of each function on the argument sets in turn, by that clock: [(min, median, max)].

    The functions take turns, so that a busy moment of the machine strikes all of them.
    """
    times = [[] for _ in functions]
    for f in functions:
        f(*sets[0])
    begin = time.perf_counter()
    while len(times[0]) < least or (time.perf_counter() - begin < seconds * len(functions) and len(times[0]) < 500):
        for i, f in enumerate(functions):
            args = sets[(len(times[0]) + i) % len(sets)]
            synchronise(device)
            start = now()
            f(*args)
            synchronise(device)
            times[i].append(1e3 * (now() - start))
    return [(min(t), sorted(t)[len(t) // 2], max(t)) for t in times]


def copy_bandwidth(device):
    """Bytes a millisecond that a copy of 256 MiB reads and writes, at its best."""
    src, dst = torch.ones(2**26, device=device), torch.ones(2**26, device=device)
    return 2 * src.nbytes / clock([lambda: dst.copy_(src)], [()], device)[0][0]


def product_speed(device, dtype=torch.float32):
    """Multiplications a millisecond in PyTorch's matrix product, at its best."""
    a = torch.randn(1536, 1536, device=device, dtype=dtype)
    return 1536**3 / clock([lambda: a @ a], [()], device)[0][0]


def tensors(out):
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def worst(ours, right):
    """The largest difference, measured against the largest number."""
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item() for a, b in zip(tensors(ours), tensors(right), strict=True))


def bench_kernels(device, dtype, only, size, equal_only=False):
    if device not in kernels.extension_devices():
        raise SystemExit(f"there are no fused kernels for {device} tensors here: nothing to compare")
    torch._dynamo.config.recompile_limit = 64  # one function is compiled for every shape below
    # Sums are in another order than the reference's (which in float32 errs more, the larger the picture: here it sums in float64),
    # the convolution is another algorithm; everything else is its very bits.
    tolerance, bf16 = {torch.float32: 1e-3, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype], dtype == torch.bfloat16
    todo = [(*c, c[4] if equal_only else torch.compile(c[4], dynamic=False)) for c in cases(device, dtype, size) if only in c[0]]
    for name, make, ours, right, _, _, _, compiled in todo:
        args = make()
        compiled(*args)
        sums = any(word in name for word in ("norm", "loss", "error", "conv"))
        error = worst(ours(*(a.clone() for a in args)), right(*(a.double() if sums and dtype == torch.float32 else a.clone() for a in args)))
        if error > (tolerance * (2 if "conv" in name and bf16 else 1) if sums else 0):
            raise SystemExit(f"{name} does not match its reference: {error:.1e}")
    print("all results match", flush=True)
    if equal_only:
        return
    machine.keep_freed_memory()  # or the columns would time the system's new pages
    bandwidth, speed = copy_bandwidth(device), product_speed(device, dtype if any(case[6] for case in todo) else torch.float32)
    what = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{what}, torch {torch.__version__}, {str(dtype)[6:]}, images 32x3x{size}x{size}, copy {bandwidth / 1e6:.1f} GB/s, "
          f"matrix product {2e-6 * speed:.0f} GFLOP/s\n")
    print(f"{'ms, min / median / max':34}{'ours':>24}{'eager':>26}{'compiled':>26}{'floor':>8}{'eager/':>8}{'compiled/':>10}{'floor/':>7}")
    for name, make, ours, _, eager, moved, macs, compiled in todo:
        sets = [make() for _ in range(max(3, min(64, int(2**27 // moved))))]  # together more than a cache holds
        columns = clock([ours, eager, compiled], sets, device)
        floor, (a, b, c) = max(moved / bandwidth, macs / speed), (column[1] for column in columns)
        text = "".join(f"{lo:>9.2f} {mid:>7.2f} {hi:>8.2f}" for lo, mid, hi in columns)
        print(f"{name:34}{text}{floor:>8.2f}{b / a:>7.1f}x{c / a:>9.1f}x{100 * floor / a:>6.0f}%", flush=True)


# --- the network ---


def as_published(net):
    """The same weights in plain PyTorch: contiguous, float32, norm, scale-shift, SiLU, doubling and PyTorch's convolution each on its own."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)

    def up(self, x):
        return nn.Conv2d.forward(self, F.interpolate(x, scale_factor=2, mode="nearest"))

    def norm(self, x, scale_shift=None):
        y = nn.GroupNorm.forward(self, x)
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return F.silu(y)

    for module in net.modules():
        if isinstance(module, model.NormSiLU):
            module.forward = types.MethodType(norm, module)
        elif isinstance(module, model.UpConv):
            module.forward = types.MethodType(up, module)
        elif isinstance(module, model.Conv3x3):
            module.forward = types.MethodType(nn.Conv2d.forward, module)
    net.input_blocks[0].register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))  # model.py has it channels_last
    return net


def random_network(device, preset="ffhq"):
    """A preset's network (default: the published one) with random weights, none of its layers zero."""
    torch.manual_seed(0)
    net = model.UNet(**model.network_config(preset, True, 0.1, 0.16)).to(device).eval().requires_grad_(False)
    for p in net.parameters():
        if p.dim() > 1 and not p.any():
            nn.init.normal_(p, std=0.3 / math.sqrt(p[0].numel()))
    return net


def bench_model(device, size):
    net = random_network(device)
    plain, ours = as_published(net), net.to(memory_format=torch.channels_last)
    cast = copy.deepcopy(ours)  # what autocast does at every step, done once: the same bits
    for module in cast.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16)
    x_in, t = torch.randn(1, 6, size, size, device=device), torch.full((1,), 0.5, device=device)
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported() or device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @torch.inference_mode()
    def step(network, autocast):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return network(x_in, t)

    right = step(plain, False)
    rows = [("float32, as published: contiguous, eager", plain, False, None), ("float32, channels_last, fused norm, Winograd", ours, False, 1e-4)]
    if bf16:
        rows += [("bfloat16, channels_last, fused norm", ours, True, 3e-2), ("... with the weights cast once", cast, True, 3e-2)]
    for name, network, autocast, tolerance in rows[1:]:  # root mean square of the difference, against that of the output
        error = ((step(network, autocast).float() - right).square().mean() / right.square().mean()).sqrt().item()
        print(f"{name}: {error:.1e} from the published ({tolerance:.0e} allowed)")
        if not error < tolerance:
            raise SystemExit("the results do not match")
    print("all results match")
    print(f"FFHQ network, one step, 1x3x{size}x{size}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}\n" if device == "cpu"
          else f"FFHQ network, one step, 1x3x{size}x{size}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    published = None
    for kept in (False, True) if device == "cpu" else (False,):
        if kept:
            machine.keep_freed_memory()
            print("the same, freed memory kept, as this project's programs do:")
        columns = clock([lambda n=network, a=autocast: step(n, a) for _, network, autocast, _ in rows], [()], device, seconds=3)
        published = published or columns[0][1]
        for (name, *_), (low, median, high) in zip(rows, columns, strict=True):
            print(f"{name:45}{low:>9.1f} {median:>9.1f} {high:>9.1f} ms{published / median:>7.2f}x", flush=True)


# --- the same network in other runtimes ---


def infer_rows(net, x_in, t, bf16):
    """What runs the network once: [(name, function of nothing -> v, error allowed)], the first row the definition of right. A runtime that is not installed is named and left out."""
    def ours(autocast, mode=torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return net(x_in, t).float()

    rows = [("float32, ours", lambda: ours(False), 0)]
    if bf16:
        rows += [("bfloat16, ours", lambda: ours(True), 3e-2), ("... with PyTorch's convolution", lambda: ours(True, torch.no_grad), 3e-2)]
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        print("onnxscript is not installed: ours alone (pip install -e '.[export]')")
        return rows
    with reference_kernels(), torch.no_grad():
        onnx = torch.onnx.export(net, (x_in, t), dynamo=True, verbose=False, opset_version=18, input_names=["x_in", "t"]).model_proto.SerializeToString()
    inputs, threads = {"x_in": x_in.contiguous().numpy(), "t": t.numpy()}, torch.get_num_threads()
    try:
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        rows.append((f"float32, onnxruntime {onnxruntime.__version__}", lambda: torch.from_numpy(session.run(None, inputs)[0]), 1e-4))
    except ImportError:
        print("onnxruntime is not installed: left out (pip install onnxruntime)")
    try:
        import openvino
        core = openvino.Core()
        for name, kind, error in (("float32", "f32", 1e-4), ("bfloat16", "bf16", 3e-2))[: 1 + bf16]:
            run = core.compile_model(core.read_model(onnx), "CPU", {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
            rows.append((f"{name}, OpenVINO {openvino.__version__.split('-')[0]}", lambda run=run: torch.from_numpy(run(inputs)[0].copy()), error))
    except ImportError:
        print("OpenVINO is not installed: left out (pip install openvino)")
    return rows


def bench_infer(path, size, seconds=10):
    """One evaluation of the network at path, for a result of size x size, on the CPU."""
    net = model.load_model(path)[0]
    machine.keep_freed_memory()
    x_in = torch.randn(1, 6, size, size, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    rows = infer_rows(net, x_in, torch.full((1,), 0.5), torch.ops.mkldnn._is_mkldnn_bf16_supported())
    right = rows[0][1]()
    for name, run, allowed in rows[1:]:
        error = ((run() - right).square().mean() / right.square().mean()).sqrt().item()
        print(f"{name}: {error:.1e} from ours in float32 ({allowed:.0e} allowed)")
        if not error < allowed:
            raise SystemExit("the results do not match")
    print("all results match")
    macs = model.count_macs(net, size, size)
    print(f"{path}, one step, 1x3x{size}x{size}, {macs / 1e9:.1f} GMACs, {torch.get_num_threads()} threads, torch {torch.__version__}; min / median / max\n")
    columns = clock([run for _, run, _ in rows], [()], "cpu", seconds=seconds)
    for (name, *_), (low, median, high) in zip(rows, columns, strict=True):
        print(f"{name:45}{low:>9.1f} {median:>9.1f} {high:>9.1f} ms{columns[0][1] / median:>7.2f}x {macs / 1e6 / median:>8.0f} GMAC/s", flush=True)


# --- training ---

PARTS = ("data", "forward", "backward", "optimizer", "average")


def train_step(net, batches, loss, optimizer, average, autocast, device):
    """One update of a network: the seconds of its PARTS. loss(net, x_1, seeds, t) -> a number; average(): of the weights."""
    marks = [time.perf_counter()]

    def mark():
        synchronise(device)
        marks.append(time.perf_counter())
    x_1, n = next(batches)
    x_1, seeds, t = to_float(x_1.to(device)), data.image_seeds(0, n).to(device), data.uniform_times(0, n).to(device)
    mark()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        value = loss(net, x_1, seeds, t)
        mark()
        value.backward()
    mark()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mark()
    average()
    mark()
    return [b - a for a, b in zip(marks, marks[1:])]


def bench_train(device, preset, batch, size, steps, compiled):
    """Updates a second of stage 1, as published (float32, contiguous, eager, a loop for the average) and ours, and of stage 2, in turn; the median of each part.

    compiled: ours once more under torch.compile, as --compile trains.
    """
    task = replace(data.TASKS["photos"], image_size=size, sigma_p=SIGMA_P)
    batches = data.training_batches(sorted(data.ASSETS.glob("*.png")), task, 0, batch, 0, 0, 1, 0)
    ours = random_network(device, preset).requires_grad_(True).train()
    plain, teacher = as_published(ours), copy.deepcopy(ours).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    ours = ours.to(memory_format=torch.channels_last)
    student, shadow = copy.deepcopy(ours), [p.detach().clone() for p in plain.parameters()]
    fast = machine.pick_dtype("auto", torch.device(device)) == torch.bfloat16

    def published_loss(net, x_1, seeds, t):
        x_in, target = eager_training_pair(x_1, degrade(x_1, task, seeds), t, seeds)
        return (net(x_in, t) - target).abs().mean()

    def our_loss(net, x_1, seeds, t):
        return flow_loss(net, *kernels.flow_training_pair(x_1, degrade(x_1, task, seeds), t, SIGMA_P, seeds), t, "l1").mean()

    def distill_loss(net, x_1, seeds, t):
        x_in = kernels.noise_augment(degrade(x_1, task, seeds), SIGMA_P, seeds)
        return distillation_losses(net, teacher, x_in, t * 0.94, t * 0.94 + 0.05).sum()

    @torch.no_grad()
    def published_average():
        for s, p in zip(shadow, plain.parameters()):
            s.sub_((s - p) * (1 - 0.9999))
    more = [("stage 1, compiled", copy.deepcopy(ours), our_loss), ("stage 2, compiled", copy.deepcopy(student), distill_loss)] if compiled else []
    for _, net, _ in more:
        net.compile()
    rows = [("stage 1, as published", plain, published_loss, published_average, False)]
    rows += [(name, net, loss, lambda net=net, ema=training.EMA(net): ema.update(net), fast) for name, net, loss in
             (("stage 1, ours", ours, our_loss), ("stage 2, ours", student, distill_loss), *more)]
    optimizers = [torch.optim.Adam(plain.parameters(), lr=1e-5), *(training.make_optimizers(net, "adam", 1e-5, torch.float32)[0] for _, net, *_ in rows[1:])]
    machine.keep_freed_memory()
    times = [[] for _ in rows]
    for step in range(steps + 2):  # the first two are not counted
        for taken, optimizer, (_, net, loss, average, autocast) in zip(times, optimizers, rows, strict=True):
            taken.append(train_step(net, batches, loss, optimizer, average, autocast, device))
    what = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{preset}, batch {batch}, {size}x{size}, {what}, torch {torch.__version__}, {'bfloat16' if fast else 'float32'}, median of {steps} updates, ms")
    print(f"{'':24}{'images/s':>10}{'all':>10}" + "".join(f"{part:>10}" for part in PARTS))
    totals = []
    for (name, *_), taken in zip(rows, times, strict=True):
        parts = [1e3 * statistics.median(column) for column in zip(*taken[2:])]
        totals.append(1e3 * statistics.median(sum(one) for one in taken[2:]))
        print(f"{name:24}{1e3 * batch / totals[-1]:>10.2f}{totals[-1]:>10.1f}" + "".join(f"{part:>10.1f}" for part in parts))
    print(f"ours is {totals[0] / totals[1]:.2f} times as fast as published; stage 2 takes {totals[2] / totals[1]:.2f} times a step of stage 1")
    if compiled:
        print(f"compiled stage 1 is {totals[1] / totals[3]:.2f}, stage 2 {totals[2] / totals[4]:.2f} times as fast as not")
    if peak := peak_memory(torch.device(device)):
        print(f"peak memory of all of it {peak:.2f} GiB")


# --- pictures for training ---

H100 = 989  # TFLOP/s that NVIDIA states for dense bfloat16 products on an H100 SXM
REACHED = 0.4  # the share of it that a training reaches, assumed


class PlainPictures(torch.utils.data.Dataset):
    """As one writes it with Pillow, the middle of every picture: item (index, n) is (3, S, S) uint8 and n."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __getitem__(self, key):
        image = data.center_crop(Image.open(self.paths[key[0]]).convert("RGB"), self.size)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1)), key[1]


def example_pictures(folder, count=16):
    """Folders of pictures as data sets have them, made of those in assets/: {what they are: folder}."""
    sources = [Image.fromarray(read_image(p)) for p in sorted(data.ASSETS.glob("*.png"))]
    found = {}
    for name, size, ending, options in (("JPEG 500 x 375, as ImageNet's", (500, 375), "jpg", dict(quality=95)), ("PNG 1024 x 1024, as FFHQ's", (1024, 1024), "png", {}),
                                        ("PNG 256 x 256, reduced before", (256, 256), "png", {})):
        found[name] = folder / str(len(found)) / "train"
        found[name].mkdir(parents=True)
        for i in range(count):
            im = sources[i % len(sources)]
            im.rotate(i, Image.BICUBIC).resize(size, Image.BICUBIC).save(found[name] / f"{i:03}.{ending}", **options)
    return found


def bench_data(preset, data_dir, workers, size, seconds=3, batch=8):
    """Pictures a second that one core, and `workers` processes, make ready, centre crops of size x size, the latter by the clock; and what the network `preset` would take."""
    torch.set_num_threads(1)
    task = replace(data.TASKS["photos"], image_size=size, crop="center", hflip=0.0, vflip=0.0, enlarge=True)
    with tempfile.TemporaryDirectory() as tmp:
        rows = []  # what, loader of batches, is it plain
        for name, folder in ({str(data_dir): data_dir} if data_dir else example_pictures(Path(tmp))).items():
            split = data.find_split(task, folder)
            sources = {"files": folders.Files(split.folder, split.train)}
            if any(shards.outer(f) for f in split.train):
                sources = {"tars": sources["files"]}
            elif not data_dir:
                with tarfile.open(folder.parent / "train.tar", "w") as tar:
                    for f in split.train:
                        tar.add(split.folder / f, f)
                sources["tars"] = folders.Files(folder.parent / "train.tar", split.train)
            loaders = []
            if "files" in sources:
                order = data.Order(len(split.train), 0)
                loaders.append(("PIL in plain form", iter(torch.utils.data.DataLoader(PlainPictures(sources["files"], size), batch, sampler=order))))
            loaders += [(f"ours, {what}", data.training_batches(paths, task, 0, batch, 0, 0, 1, 0)) for what, paths in sources.items()]
            firsts = [next(loader) for _, loader in loaders]
            if any(not torch.equal(a, b) for first in firsts[1:] for a, b in zip(first, firsts[0])):
                raise SystemExit(f"the results do not match: {name}")
            print(f"all results match: {name}", flush=True)
            rows.append((name, loaders, data.training_batches([*sources.values()][-1], task, 0, batch, 0, 0, 1, workers) if workers else None))
        print(f"\ncentre crops of {size} x {size}, torch {torch.__version__}; pictures a second of a core's own time, min / median / max")
        best = {}
        for name, loaders, many in rows:
            print(name)
            columns = clock([lambda loader=loader: next(loader) for _, loader in loaders], [()], "cpu", seconds=seconds, least=8, now=time.process_time)
            for (what, _), (low, median, high) in zip(loaders, columns):
                best[name] = 1e3 * batch / median
                print(f"  {what:30}{1e3 * batch / high:>9.1f} {best[name]:>9.1f} {1e3 * batch / low:>9.1f}", flush=True)
            if workers:
                begin, count = None, 0
                while begin is None or time.perf_counter() - begin < seconds:
                    next(many)
                    count, begin = (0, time.perf_counter()) if begin is None and count >= 2 * workers else (count + 1, begin)  # not what was ready
                print(f"  {f'{what}, {workers} processes':30}{'':>10}{batch * count / (time.perf_counter() - begin):>9.1f}", flush=True)
    with torch.device("meta"):
        macs = model.count_macs(model.UNet(**model.network_config(preset, True, SIGMA_P, 0.16)), size, size)
    need = REACHED * H100 * 1e12 / (6 * macs)
    print(f"\narithmetic, nothing measured: an update of {preset} (stage 1) takes 3 x 2 x {macs / 1e9:.1f} GMACs = {6 * macs / 1e12:.2f} TFLOP a picture, forward once and backward twice;\n"
          f"an H100 at {100 * REACHED:.0f} % of the {H100} TFLOP/s that are stated for it trains {need:.0f} pictures a second: with 8 cores a card {need / 8:.0f} a core, with 16 {need / 16:.0f};")
    print("in cores like this one: " + ", ".join(f"{need / rate:.1f} of {name.split(',')[0]}" for name, rate in best.items()))


# --- memory ---


def kept_bytes(net, run):
    """The bytes that autograd keeps for the backward pass of run(), the network's parameters aside; of fake tensors, too."""
    own, kept = {p.untyped_storage()._cdata for p in net.parameters()}, {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()  # which keeps its place from being another's
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graph = run()
    del graph
    return sum(storage.nbytes() for at, storage in kept.items() if at not in own)


def memory_of(preset, size, dtype):
    """Bytes that one more picture of size x size adds: (stage 1; stage 2 in one batch; stage 2 in turn). The teacher keeps none."""
    net, teacher, used = model.UNet(**model.network_config(preset, sigma_p=SIGMA_P, sigma_d=0.16)).to(memory_format=torch.channels_last), lambda x, t: x[:, :3], []
    for batch in (1, 2):
        x_in, t = torch.zeros(batch, 6, size, size), torch.full((batch,), 0.5)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            turns, parts = distill.losses_in_turn(net, teacher, x_in, t, t + DT), []
            for _ in range(3):  # what one evaluation keeps is given back before the next
                parts.append(kept_bytes(net, lambda: next(turns)))
            used.append((kept_bytes(net, lambda: net(x_in, t)), kept_bytes(net, lambda: distill.distillation_losses(net, teacher, x_in, t, t + DT)), max(parts)))
    return [two - one for one, two in zip(*used)]


def bench_memory(dtype, only, size):
    """Prints GiB a picture of each preset at the size that its tasks have, scaled from `size`: all that is kept grows with the area."""
    sides = {}
    for task in data.TASKS.values():
        sides.setdefault(task.model, task.image_size)
    print(f"GiB a picture kept for the backward pass, {str(dtype).removeprefix('torch.')} autocast, measured at {size} x {size}, torch {torch.__version__}\n"
          f"{'':12}{'pixels':>8}{'stage 1':>10}{'stage 2':>10}{'--in_turn':>11}")
    for preset in model.PRESETS:
        if only in preset:
            side = sides.get(preset, 128)
            row = [n * (side / size) ** 2 / 2**30 for n in memory_of(preset, size, dtype)]
            print(f"{preset:12}{side:>8}" + "".join(f"{n:>{w}.3f}" for n, w in zip(row, (10, 10, 11))), flush=True)


def as_shapes(net, frozen):
    """Give a network that lies on the meta device parameters of the CPU that have a shape and no memory (under FakeTensorMode): trained ones in float32, others in `frozen`."""
    for module in net.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=torch.float32 if p.requires_grad else frozen), requires_grad=p.requires_grad)
        for name, b in [*module._buffers.items()]:
            module._buffers[name] = torch.empty(b.shape)
    return net


def lora_memory(teacher, size, frozen=torch.bfloat16):
    """Bytes that a student of a DiT4SR on the meta device keeps for the backward pass of one evaluation under autocast: (of a picture, and with --grad_checkpoint), size x size."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    used, student, side = [], teacher.student(), size // teacher.factor
    with FakeTensorMode():
        as_shapes(student, frozen)
        for again in (False, True):
            for block in student.net.transformer_blocks:
                block.recompute = again
            counts = []
            for batch in (1, 2):
                x_in, t = torch.empty(batch, 2 * teacher.latent_channels, side, side), torch.empty(batch)
                with torch.autocast("cpu", torch.bfloat16):
                    counts.append(kept_bytes(student, lambda: student(x_in, t)))
            used.append(counts[1] - counts[0])
    return used


def bench_lora(rank, size):
    """Prints what distill.py --teacher dit4sr:DIR --lora RANK takes on a card, GiB by part: counted on shapes, as autograd saves them; not measured on a card."""
    from dit4sr import MEDIUM, PROMPT_TOKENS, VAE, DiT4SR
    teacher = DiT4SR(MEDIUM, VAE, PROMPT_TOKENS, guidance=8.0, lora=rank)
    count = lambda net, trained: sum(p.numel() for p in net.parameters() if p.requires_grad == trained)
    adapters, network = count(teacher.student(), True), count(teacher.net, False)
    frozen, learnt, everything = 2 * count(teacher, False), 5 * 4 * adapters, 2 * count(teacher, False) + 5 * 4 * network
    picture, again = lora_memory(teacher, size)
    room, gib = 0.9 * 79 * 2**30, lambda n: f"{n / 2**30:.2f}"
    print(f"GiB to distil a DiT4SR at {size} x {size}, adapters of rank {rank}: worked out from shapes, autocast to bfloat16, torch {torch.__version__}")
    print(f"{gib(frozen):>8}  frozen weights in bfloat16, {network:,} and the autoencoder's, shared by teacher, student and average")
    print(f"{gib(learnt):>8}  {adapters:,} values of adapters, their gradient, two moments and average in float32")
    print("          a picture, kept for the backward pass, and the pictures that fit beside the above in nine tenths of an 80 GB card's 79 GiB:")
    again += picture / MEDIUM["num_layers"]  # the block that is made again
    for n, how in ((3 * picture, "the three evaluations in one batch"), (picture, "--in_turn"), (3 * again, "in one batch, --grad_checkpoint"), (again, "--in_turn --grad_checkpoint")):
        print(f"{gib(n):>8}  {int((room - frozen - learnt) // n):>4}  {how}", flush=True)
    print(f"{gib(everything):>8}  for comparison, before any picture: all of the network trained in float32, beside the frozen teacher")


# --- the real world's degradation ---


def opencv_noise(x, damage, rng):
    """As BasicSR adds it with NumPy: x (h, w, 3) in [0, 1]."""
    source = x @ np.float32([0.2989, 0.587, 0.114])[:, None] if damage.gray else x
    if damage.gaussian:
        n = rng.standard_normal(source.shape) * damage.noise
    else:
        v = np.clip((source * 255).round(), 0, 255) / 255
        N = 2 ** np.ceil(np.log2(len(np.unique(v))))
        n = (rng.poisson(v * N) / N - v) * damage.noise
    return np.clip(x + n, 0, 1).astype(np.float32)


def opencv_jpeg(x, quality):
    import cv2
    _, file = cv2.imencode(".jpg", (x.clip(0, 1) * 255).round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    return cv2.imdecode(file, cv2.IMREAD_COLOR).astype(np.float32) / 255


def opencv_real(x, harm, rng, scale):
    """The same accident (degradations.Harm) with OpenCV's filters and resizing, NumPy's noise and a JPEG codec: x (H, W, 3) float32 in [0, 1]."""
    import cv2
    how = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "antialiased": cv2.INTER_AREA}
    final = x.shape[1] // scale, x.shape[0] // scale
    filtered = lambda x, k: x if k is None else cv2.filter2D(x, -1, k.astype(np.float32))
    for i, damage in enumerate(harm.rounds):
        x = filtered(x, damage.kernel)
        of = final if i else (x.shape[1], x.shape[0])
        x = cv2.resize(x, [max(1, int(side * damage.ratio)) for side in of], interpolation=how[damage.method])
        x = opencv_noise(x, damage, rng)
        if i == 0 and harm.quality:
            x = opencv_jpeg(x, harm.quality)
    if harm.last_quality and not harm.jpeg_last:
        x = opencv_jpeg(x, harm.last_quality)
    x = filtered(cv2.resize(x, final, interpolation=how[harm.method]), harm.kernel)
    return opencv_jpeg(x, harm.last_quality) if harm.last_quality and harm.jpeg_last else x


def bench_degradation(device, size, scale=4, count=64):
    """Pictures a second on one core: `count` crops of the photographs in assets/, at the published strength."""
    try:
        import cv2
    except ImportError:
        raise SystemExit("the other side of this comparison needs OpenCV: pip install opencv-python-headless") from None
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    images = [torch.from_numpy(read_image(p)) for p in sorted(data.ASSETS.glob("*.png"))]
    rng, seeds = np.random.default_rng(0), torch.arange(count)
    crops = []
    for i in range(count):
        image = images[i % len(images)]
        y, x = (int(rng.integers(max(1, side - size + 1))) for side in image.shape[:2])
        crops.append(image[y : y + size, x : x + size])
    x = torch.stack(crops)  # (B, S, S, 3)
    x_1, planes = (x.permute(0, 3, 1, 2).float() / 127.5 - 1).to(device), x.numpy().astype(np.float32) / 255
    harms = [draw(u, 1.0) for u in uniforms(seeds, 100)]
    ours, theirs = real(x_1, seeds.to(device), scale, 1.0), [opencv_real(p, h, rng, scale) for p, h in zip(planes, harms)]
    ours = (ours.cpu() * 0.5 + 0.5).permute(0, 2, 3, 1).numpy()
    # The same draws but for the noise: pictures of the same brightness and of the same roughness.
    means, spread = (np.corrcoef([[f(p) for p in ours], [f(p) for p in theirs]])[0, 1] for f in (np.mean, np.std))
    if min(means, spread) < 0.95:
        raise SystemExit(f"the results do not match: correlation of means {means:.3f}, of deviations {spread:.3f}")
    print(f"the results match: means and deviations of the {count} pictures correlate by {means:.3f} and {spread:.3f}")
    columns = clock([lambda: real(x_1, seeds.to(device), scale, 1.0), lambda: [opencv_real(p, h, rng, scale) for p, h in zip(planes, harms)]], [()], device, seconds=2)
    what = "one CPU thread" if device == "cpu" else torch.cuda.get_device_name()
    print(f"{size} x {size} to {size // scale}, strength 1, {what}, torch {torch.__version__}; pictures a second, draws included in ours\n")
    for name, (low, median, high) in zip(("ours", "OpenCV, NumPy and a codec, one core"), columns):
        print(f"{name:40}{1e3 * count / high:>9.0f} {1e3 * count / median:>7.0f} {1e3 * count / low:>7.0f}")
    print(f"{columns[1][1] / columns[0][1]:.2f}x")


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("what", choices=["kernels", "model", "infer", "train", "data", "memory", "lora", "degradation", "gpu"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a card; gpu: cpu tries the report, small")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="kernels: what the tensors are stored in; memory: of the arithmetic")
    parser.add_argument("--only", default="", help="kernels, memory, gpu: those whose name contains this")
    parser.add_argument("--equal_only", action="store_true", help="kernels: compare with the references, and stop")
    parser.add_argument("--size", type=in_range(int, 16), help="height and width of the pictures (default: 256; memory, train, degradation: 128; lora: 512)")
    parser.add_argument("--model", choices=[name for name, config in model.PRESETS.items() if "family" not in config], help="train, data: network preset (default: photos; data: ffhq)")
    parser.add_argument("--data_dir", help="data: a folder of pictures, or tars (default: some made of the photographs in assets/)")
    parser.add_argument("--workers", type=in_range(int, 0), default=0, help="data: measure so many processes that read, too")
    parser.add_argument("--ckpt", default=str(sample.WEIGHTS), help="infer: the network to run (default: the shipped student)")
    parser.add_argument("--lora", type=in_range(int, 1), default=64, help="lora: rank of the adapters")
    parser.add_argument("--batch", type=in_range(int, 1), default=4, help="train: pictures an update")
    parser.add_argument("--steps", type=in_range(int, 1), default=10, help="train: updates to take the median of")
    parser.add_argument("--compile", action="store_true", help="train: both stages under torch.compile, too")
    args = parser.parse_args(argv)
    if args.what == "gpu":
        if args.device != "cpu" and (why := gpu_report.missing()):
            raise SystemExit(f"bench.py gpu: no NVIDIA card to report on: {why} (--device cpu tries the report here, small)")
        raise SystemExit(0 if gpu_report.report(args.device or "cuda", args.only) else 1)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.what == "kernels":
        bench_kernels(args.device, getattr(torch, args.dtype), args.only, args.size or 256, args.equal_only)
    elif args.what == "model":
        bench_model(args.device, args.size or 256)
    elif args.what == "infer":
        bench_infer(args.ckpt, args.size or 256)
    elif args.what == "train":
        bench_train(args.device, args.model or "photos", args.batch, args.size or 128, args.steps, args.compile)
    elif args.what == "data":
        bench_data(args.model or "ffhq", args.data_dir, args.workers, args.size or 256)
    elif args.what == "memory":
        bench_memory(getattr(torch, args.dtype), args.only, args.size or 128)
    elif args.what == "lora":
        bench_lora(args.lora, args.size or 512)
    else:
        bench_degradation(args.device, args.size or 128)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"bench.py: {e}")
