"""A one-step student as one ONNX file for other programs: a low-resolution picture in, the restored one out.

    python sample.py --export model.onnx
    onnxruntime.InferenceSession("model.onnx").run(None, {"input": picture, "t": numpy.float32([0.3])})

    input   (B, 3, h, w) float32, RGB in [0, 1], of any size
    t       (1,) float32, the dial in [0, 1]; may be left out
    seed    (1,) int64, of the noise in x_0, the same noise that sample.py draws; may be left out
    output  (B, 3, h scale, w scale) float32, RGB in [0, 1]

All is inside: the enlargement, the noise, the padding to the network's multiple by reflection, Eq. (13), the clamp. t and
seed are inputs that have a default, as ONNX allows: so programs that know models of one picture in and one out (chaiNNer)
load the file as it is. Only standard operators are used, and of these the plain ones where runtimes differ.
"""
import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from console import InputError, atomic_write
from degradations import H_T
from kernels.reference import philox


def enlarge(y, scale):
    """Antialiased bicubic enlargement by a whole number, as a convolution: y (B, C, h, w) -> (B, C, h scale, w scale).

    What F.interpolate does, to its roundings. ONNX has Resize for it, but of the runtimes onnxruntime alone does as torch
    does at the border: leave out the weights that fall outside, and divide by the sum of the others.
    """
    offset = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5  # of output pixel p from its input pixel
    d = (torch.arange(-2, 3) - offset[:, None]).abs()  # (scale, 5), from the five input pixels around it
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2  # Keys 1981, a = -1/2
    k = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    weight = torch.einsum("ai,bj->abij", k, k).flatten(0, 1)[:, None].float()  # (scale^2, 1, 5, 5)
    B, C, h, w = y.shape
    x = F.conv2d(y.reshape(B * C, 1, h, w), weight, padding=2) / F.conv2d(torch.ones_like(y[:1, :1]), weight, padding=2)
    return F.pixel_shuffle(x, scale).reshape(B, C, h * scale, w * scale)


def normal(seed, height, width):
    """kernels.normal(seed, (1, 3, height, width)) with a runtime's own logarithm, sine and cosine: the same noise to 1e-5."""
    w, h = torch.arange(width).view(1, width), torch.arange(height).view(height, 1)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    zero = torch.zeros_like(w)
    r = [x.float() for x in philox((w, h, zero, zero), (low, high))]
    radius = [torch.sqrt(-2 * torch.log(a * 2.0**-32 + 2.0**-33)) for a in (r[0], r[2])]
    angle = [b * (2 * math.pi / 2**32) for b in (r[1], r[3])]
    return torch.stack([radius[0] * angle[0].cos(), radius[0] * angle[0].sin(), radius[1] * angle[1].cos()])[None]


def reflected(n, size):
    """The indices, (size,), that carry n pixels on by reflection, as often as it takes."""
    i = torch.arange(size) % torch.full((1,), 2 * n - 2).clamp(min=1)
    return torch.where(i < n, i, 2 * n - 2 - i)


class Restorer(nn.Module):
    """What is exported: (input, t, seed) -> output, as the top of this file says."""

    def __init__(self, net, task):
        super().__init__()
        self.net, self.task = net, task

    def forward(self, picture, t, seed):
        scale, m, sigma_p = self.task.scale, self.net.multiple, self.task.sigma_p
        y = 2 * picture - 1
        x_lr = enlarge(y, scale) if self.task.degradation == "bicubic" else H_T(y, self.task.degradation, scale)
        height, width = x_lr.shape[2:]
        rows, columns = ((torch.sym_max(size, 64) + m - 1) // m * m for size in (height, width))  # as sample.restore's canvas
        x_lr = x_lr.index_select(2, reflected(height, rows)).index_select(3, reflected(width, columns))
        x_0 = math.sqrt(1 - sigma_p**2) * x_lr + sigma_p * normal(seed, rows, columns)
        x_1 = x_0 + self.net(torch.cat([x_0, x_lr], dim=1), t)  # Eq. (13)
        return (x_1[:, :, :height, :width] / 2 + 0.5).clamp(0, 1)


@contextmanager
def reference_kernels():
    """PyTorch's own operators in place of ours, which no other program knows."""
    chosen, kernels._chosen = kernels._chosen, ()
    try:
        yield
    finally:
        kernels._chosen = chosen


def export_onnx(path, net, task, t=0.5, seed=0):
    """Write the student `net` of that task to path, with t and seed for those who give none; returns a line that says what was written.

    Needs the packages onnx and onnxscript. Raises InputError.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise InputError(f"--export needs the package {e.name}: pip install -e '.[export]'") from None
    # Of UpConv's two ways the export keeps the one that the example takes: at this size a doubling and a convolution.
    example = (torch.rand(2, 3, 24, 40), torch.tensor([float(t)]), torch.tensor([seed]))
    dynamic = torch.export.Dim.DYNAMIC
    with reference_kernels(), torch.no_grad():
        program = torch.onnx.export(
            Restorer(net, task).eval(), example, dynamo=True, verbose=False, opset_version=18,
            input_names=["input", "t", "seed"], output_names=["output"], dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic}, {}, {}))
    model = program.model_proto
    for name, value in zip(("t", "seed"), example[1:], strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    for value, factor in ((model.graph.input[0], ""), (model.graph.output[0], f"{task.scale} * ")):
        batch, _, height, width = value.type.tensor_type.shape.dim
        batch.dim_param, height.dim_param, width.dim_param = "batch", f"{factor}height", f"{factor}width"
    del model.graph.value_info[:]  # what is inside goes by the exporter's names for these
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's notes: where in which file of this machine a line of Python stands
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    atomic_write(path, lambda tmp: tmp.write_bytes(data))
    return f"{path}: x{task.scale}, {len(data) / 1e6:.1f} MB, ONNX opset {model.opset_import[0].version}; defaults t {t:g}, seed {seed}"
