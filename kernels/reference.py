"""The definition of right: every kernel in plain PyTorch, in float32 arithmetic, one function each.

The extension (csrc/) performs the same operations in the same order, without fused multiply-add, so that
all but the sums, the norm and the convolution must agree to the bit: the noise of a picture is one picture, whoever draws it.
The arithmetic is float32 for float32, bfloat16 and float16 tensors, rounded once at the end, and float64 for float64.

Symbols as in the README: x_1 (HR) and x_lr are (B, 3, H, W) in [-1, 1]; x_in is concat(x_t, x_lr),
(B, 6, H, W); t, s, dt are (B,) float32; seeds is (B,) int64, one stream of noise a picture.
"""
import math

import torch
import torch.nn.functional as F

# Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
PHILOX_M = (0xD2511F53, 0xCD9E8D57)  # the round's two multipliers
PHILOX_W = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the two halves of the key
MASK = 0xFFFFFFFF
# Minimax polynomials in float32 (Cephes): ln(1+x)/x^3 on [sqrt(1/2)-1, sqrt(2)-1], sin and cos on [-pi/4, pi/4].
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
       -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def philox(counter, key):
    """Philox 4x32-10: four counter words and two key words (int64 tensors holding uint32, broadcastable)
    to four random words of the same kind. A bijection of the counter for each key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]  # wraps modulo 2^64, which keeps all 64 bits
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + PHILOX_W[0]) & MASK, (k1 + PHILOX_W[1]) & MASK
    return c0, c1, c2, c3


def _horner(coefficients, x):
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def _log(u):
    """Natural logarithm of float32 u in (0, 1], by the fixed sequence of operations that the kernels repeat."""
    m, e = torch.frexp(u)  # u = m 2^e, m in [1/2, 1)
    small = m < math.sqrt(0.5)
    x = torch.where(small, m + m, m) - 1.0
    e = torch.where(small, e - 1, e).float()
    z = x * x
    y = _horner(LOG, x) * x * z + e * -2.12194440e-4 - z * 0.5
    return x + y + e * 0.693359375  # ln 2 in two parts, the large one exact


def box_muller(a, b):
    """Two uint32 words (in int64 tensors) to two independent standard normals, float32."""
    u = a.float() * 2.0**-32 + 2.0**-33  # (0, 1]
    radius = torch.sqrt((_log(u) * -2.0).double()).float()  # PyTorch's float32 root on the CPU may be off by a bit
    # The angle is 2 pi b / 2^32: the nearest quarter turn comes off in integers, exactly.
    quarter = (b + 2**29) >> 30
    angle = (b - (quarter << 30)).float() * (2 * math.pi / 2**32)
    z = angle * angle
    sin = _horner(SIN, z) * z * angle + angle
    cos = _horner(COS, z) * z * z - z * 0.5 + 1.0
    odd, second_half, middle = quarter % 2 == 1, (quarter & 2) != 0, ((quarter + 1) & 2) != 0
    c, s = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return radius * torch.where(middle, -c, c), radius * torch.where(second_half, -s, s)


def normal(seeds, shape, stream=0, corner=(0, 0)):
    """Standard normal noise that depends only on (seed, stream, c, h, w).

    seeds (B,) int64; shape (B, C, H, W); returns float32. The Philox key is the seed, the counter is
    (w, h, c // 4, stream), and a draw's four normals are four channels: neither the batch, nor the
    canvas size, nor the memory format changes a pixel's noise. corner: of a window of a larger picture, whose
    pixels h and w begin there.
    """
    B, C, H, W = shape
    dev = seeds.device
    if dev.type == "mps":  # which has no float64 for box_muller
        return normal(seeds.cpu(), shape, stream, corner).to(dev)
    w = torch.arange(corner[1], corner[1] + W, device=dev).view(1, 1, 1, W)
    h = torch.arange(corner[0], corner[0] + H, device=dev).view(1, 1, H, 1)
    block = torch.arange((C + 3) // 4, device=dev).view(1, -1, 1, 1)
    key = (seeds & MASK).view(B, 1, 1, 1), ((seeds >> 32) & MASK).view(B, 1, 1, 1)
    r = philox((w, h, block, torch.full_like(w, stream)), key)
    n = torch.stack([*box_muller(r[0], r[1]), *box_muller(r[2], r[3])], dim=2)  # (B, C/4, 4, H, W)
    return n.flatten(1, 2)[:, :C].contiguous()


def _arith(x):  # the type of the arithmetic: float32, unless the tensor is float64 (for gradcheck and exact solvers)
    return x if x.dtype == torch.float64 else x.float()


def _image(v, x):  # v, (B,) or a number, to broadcast over x (B, C, H, W)
    return v.float().to(_arith(x).dtype).view(-1, 1, 1, 1) if torch.is_tensor(v) else v


def _perturb(x_lr, sigma_p, seeds, corner=(0, 0)):
    x_lr = _arith(x_lr)
    return x_lr * math.sqrt(1 - sigma_p**2) + normal(seeds, x_lr.shape, corner=corner).to(x_lr.dtype) * sigma_p


def noise_augment(x_lr, sigma_p, seeds, corner=(0, 0)):
    """Eq. (4), x_0 = sqrt(1 - sigma_p^2) x_lr + sigma_p eps, straight into the network's input.

    x_lr (B, C, H, W), seeds (B,) int64; returns concat(x_0, x_lr), (B, 2C, H, W), of x_lr's dtype and memory format.
    corner (h, w): x_lr is a window of a larger picture that begins there, and gets that part of the picture's noise.
    """
    x_0 = _perturb(x_lr, sigma_p, seeds, corner)
    return torch.cat([x_0.to(x_lr.dtype), x_lr], dim=1)


def flow_training_pair(x_1, x_lr, t, sigma_p, seeds):
    """What one step of Eq. (5) needs: x_in = concat(x_t, x_lr) with x_t = (1-t) x_0 + t x_1, and the target x_1 - x_0.

    x_1, x_lr (B, C, H, W), t (B,), seeds (B,) int64; returns (B, 2C, H, W) and (B, C, H, W). x_0 is Eq. (4)'s.
    """
    x_0, t = _perturb(x_lr, sigma_p, seeds), _image(t, x_lr)
    x_t = x_0 * (1 - t) + _arith(x_1) * t
    return torch.cat([x_t.to(x_lr.dtype), x_lr], dim=1), (_arith(x_1) - x_0).to(x_1.dtype)


def euler_step_(x_in, v, dt):
    """x_t += dt v, in place in channels 0 to C-1 of x_in (B, 2C, H, W); v (B, C, H, W), dt (B,) or a number. Returns x_in."""
    x_t = x_in[:, : v.shape[1]]
    x_t.copy_(_arith(x_t) + _arith(v) * _image(dt, x_t))
    return x_in


def rk2_coefficients(alpha):
    """The last stage of the RK2 scheme with node alpha, counted from x_t + alpha dt v1, which is where the buffer stands."""
    b2 = 1 / (2 * alpha)
    return 1 - b2 - alpha, b2


def rk2_stage_(x_in, v1, v2, dt, alpha):
    """The second stage of the explicit RK2 scheme with node alpha: 1/2 midpoint, 2/3 Ralston, 1 Heun.

    The first stage was euler_step_(x_in, v1, alpha dt) and v2 the velocity there; this brings x_in to
    x_t + dt ((1 - 1/(2 alpha)) v1 + 1/(2 alpha) v2), in place, keeping no copy of x_t. Shapes as euler_step_.
    """
    b1, b2 = rk2_coefficients(alpha)
    x_t = x_in[:, : v1.shape[1]]
    x_t.copy_(_arith(x_t) + (_arith(v1) * b1 + _arith(v2) * b2) * _image(dt, x_t))
    return x_in


# Dormand & Prince 1980, the pair behind scipy's RK45: row i combines i + 1 velocities; the last row is the fifth-order solution.
DOPRI5_A = ((1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
DOPRI5_C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)  # when each velocity is taken, in units of dt
DOPRI5_E = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)  # fifth order minus fourth


def _combine(coefficients, k):
    """Sum of coefficient times velocity from left to right; a zero coefficient's velocity is not read."""
    terms = [_arith(v) * c for c, v in zip(coefficients, k, strict=True) if c]
    return sum(terms[1:], terms[0])


def dopri5_stage_(x_in, x_t, k, dt):
    """x_in[:, :C] = x_t + dt sum_j a_j k_j, in place: the next point at which the Dormand-Prince pair asks for a velocity.

    x_in (B, 2C, H, W); x_t (B, C, H, W), the state at the start of the step (a tensor of its own, not a view of x_in);
    k a list of 1 to 6 velocities (B, C, H, W), whose number says which row of DOPRI5_A; dt a number. Returns x_in.
    One adaptive step, with v(t) = model(x_in, t):

        k = [v(t)]                                    # or the last velocity of the accepted step before
        for c in DOPRI5_C[1:]:
            dopri5_stage_(x_in, x_t, k, dt)
            k.append(v(t + c dt))
        dopri5_stage_(x_in, x_t, k, dt)               # six velocities: x_in holds the solution at t + dt
        k.append(v(t + dt))
        error = dopri5_error(x_in, x_t, k, dt, atol, rtol).item()
        accepted (error < 1): x_t.copy_(x_in[:, :C]), k = [k[6]]; rejected: k = [k[0]], and a smaller dt
    """
    x_in[:, : x_t.shape[1]].copy_(_arith(x_t) + _combine(DOPRI5_A[len(k) - 1], k) * dt)
    return x_in


def dopri5_error(x_in, x_t, k, dt, atol, rtol):
    """The error norm of scipy's RK45: root mean square, over all elements, of dt sum_j e_j k_j / (atol + rtol max(|x_t|, |x_new|)).

    x_in[:, :C] holds x_new; k is the list of all 7 velocities; shapes as dopri5_stage_. Returns a float64 scalar
    tensor on x_in's device (the mean is taken in float64), so that the step costs one synchronisation: .item().
    """
    x_t, x_new = _arith(x_t), _arith(x_in[:, : x_t.shape[1]])
    scale = torch.maximum(x_t.abs(), x_new.abs()) * rtol + atol
    error = _combine(DOPRI5_E, k) * dt / scale
    return (error if error.device.type == "mps" else error.double()).square().mean().sqrt()  # mps has no float64


def student_state(x_in, v, t):
    """Eq. (7), x_t = x_0 + t v_phi(x_0, t), into a new buffer: concat(x_0, x_lr) (B, 2C, H, W) to concat(x_t, x_lr)."""
    C = v.shape[1]
    x_t = _arith(x_in[:, :C]) + _arith(v) * _image(t, x_in)
    return torch.cat([x_t.to(x_in.dtype), x_in[:, C:]], dim=1)


def distill_target(v_phi, v_theta, t, s):
    """Eq. (9)'s stop-gradient target, v_phi(t) + (s-t)/s (v_theta - v_phi(t)); all (B, C, H, W), t and s (B,). No gradient."""
    v, t, s = _arith(v_phi.detach()), _image(t, v_phi), _image(s, v_phi)
    return (v + (_arith(v_theta.detach()) - v) * ((s - t) / s)).to(v_phi.dtype)


def distill_loss(v_phi, v_step, v_theta, t, s):
    """The three losses of Eq. (12), unweighted: (3,) float32 = [Eq. (9), Eq. (10), Eq. (11)], means over all elements.

    v_phi (3B, C, H, W): the student at t, s and 0, from x_0, one after the other along the batch.
    v_step (B, C, H, W): the teacher's velocity for the step from x_t to x_s (Euler: v_theta at t; RK2: its mean slope).
    v_theta (2B, C, H, W): the teacher at (x_t, t) and at (x_0, 0). t, s (B,).
    The gradient flows into v_phi alone, and in Eq. (9) into v_phi(s) alone.
    """
    v_t, v_s, v_0 = _arith(v_phi).chunk(3)
    u_t, u_0 = _arith(v_theta.detach()).chunk(2)
    distill = (v_s - distill_target(v_t, _arith(v_step), t, s)).square().mean()
    align = ((v_t - u_t) * (1 - _image(t, v_t))).square().mean()
    return torch.stack([distill, align, (v_0 - u_0).square().mean()])


def group_norm_silu(x, groups, weight, bias, scale=None, shift=None, eps=1e-5):
    """silu(group_norm(x) (1 + scale) + shift), the norm-activation of the U-Net (scale-shift: Dhariwal & Nichol 2021).

    x (B, C, H, W); weight, bias (C,); scale, shift (B, C) or None. Statistics in float32; result of x's dtype.
    """
    x_ = _arith(x)
    y = torch.group_norm(x_, groups, weight.to(x_.dtype), bias.to(x_.dtype), eps)
    if scale is not None:
        y = y * (1 + scale.to(x_.dtype)[:, :, None, None]) + shift.to(x_.dtype)[:, :, None, None]
    return F.silu(y).to(x.dtype)


def conv3x3(x, weight, bias, doubled=False):
    """The 3x3 convolution with zeros around the picture: x (B, C, H, W), weight (O, C, 3, 3), bias (O,) -> (B, O, H, W); of x doubled by repetition (B, O, 2H, 2W)."""
    if doubled:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    return F.conv2d(x, weight, bias, padding=1)


def add_conv1x1(h, x, weight, bias):
    """h + the 1x1 convolution of x, in place where there is no gradient: h (B, O, H, W), x (B, C, H, W), weight (O, C, 1, 1), bias (O,)."""
    y = F.conv2d(x, weight, bias)
    return h + y if torch.is_grad_enabled() else h.add_(y)


def to_uint8(x):
    """[-1, 1] to bytes: (B, C, H, W) float to (B, H, W, C) uint8, clamped, rounded half to even."""
    y = (_arith(x).clamp(-1, 1) * 127.5 + 127.5).round()
    return y.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---- what happens to pictures in the world (degradations.py says when). A batch is x (B, C, H, W) float32 with sizes (B, 2)
# int64: picture b is x[b, :, :h, :w], the rest of its canvas means nothing. Sums are written out term by term, each product
# rounded before it is added: so a picture comes out the same, to the bit, whatever its batch, its canvas and the machine.


def _reflected(sizes, r, length):
    """Where the pixels -r to length + r - 1 of rows of `sizes` (B,) pixels come from, reflected at their ends without repeating them: (B, length + 2r)."""
    n = sizes[:, None]
    i = torch.arange(-r, length + r, device=sizes.device) % (2 * n - 2).clamp(min=1)
    return torch.where(i < n, i, 2 * n - 2 - i)


def _inside(x, sizes):
    rows, cols = (torch.arange(n, device=x.device) for n in x.shape[2:])
    sizes = sizes.to(x.device)
    return ((rows < sizes[:, :1])[:, None, :, None] & (cols < sizes[:, 1:])[:, None, None, :])


def filter2d(x, sizes, filters):
    """Each picture correlated with its own filter, filters (B, k, k) float32, k odd, reflected at its edges: (B, C, H, W)."""
    B, _, H, W = x.shape
    r, sizes = filters.shape[-1] // 2, sizes.to(x.device)
    rows, cols = _reflected(sizes[:, 0], r, H), _reflected(sizes[:, 1], r, W)
    wide = x[torch.arange(B, device=x.device)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H + 2r, W + 2r)
    y, f = torch.zeros_like(x), filters.view(B, 1, 1, -1)
    for i in range((2 * r + 1) ** 2):
        u, v = divmod(i, 2 * r + 1)
        y = y + f[..., i : i + 1] * wide[:, :, u : u + H, v : v + W]
    return y


def resample(x, rows, row_weights, cols, col_weights):
    """Each picture resized by sums of a few of its pixels: rows (B, h, T) int64, the rows that make up each new row, with weights (B, h, T)
    float32; cols (B, w, S) likewise: (B, C, h, w)."""
    def along_rows(x, index, weights):
        parts = x.gather(2, index.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])).unflatten(2, index.shape[1:])
        y = torch.zeros_like(parts[:, :, :, 0])
        for t in range(index.shape[2]):
            y = y + weights[:, None, :, t, None] * parts[:, :, :, t]
        return y
    return along_rows(along_rows(x, rows, row_weights).mT, cols, col_weights).mT.contiguous()


def photon_noise(x, sizes, amount, gaussian, gray, quantiles, seeds, stream):
    """Each picture with its noise, clamped to [0, 1]: amount (B,) float32, gaussian and gray (B,) bool, seeds (B,) int64.

    z is normal; for gray pictures that of the first channel for all. Gaussian noise is amount z. Else a pixel of 8-bit value v (for gray
    noise that of the luma) counts k photons where v N were expected, and amount (k / N - v) is added: N is the number of
    different v in the picture, rounded up to a power of 2, and k is the Poisson quantile at which z stands among normals,
    quantiles (9, 256, bins) int16: of log2 N, 255 v, and z in bins from -6 to 6.
    """
    B, bins = len(x), quantiles.shape[2]
    pick = lambda values: values.to(x.device).view(B, 1, 1, 1)
    amount, gaussian, gray = pick(amount), pick(gaussian), pick(gray)
    z = normal(seeds, x.shape, stream)
    z = torch.where(gray, z[:, :1], z)
    luma = x[:, :1] * 0.2989 + x[:, 1:2] * 0.587 + x[:, 2:3] * 0.114
    v = (torch.where(gray, luma, x).clamp(0, 1) * 255).round().long()
    seen = torch.zeros(B, 257, device=x.device).scatter_(1, torch.where(_inside(x, sizes), v, 256).flatten(1), 1.0)[:, :256].sum(1)
    log_N = torch.frexp(seen - 1).exponent.clamp(min=0).long().view(B, 1, 1, 1)  # of 2^m values m, of one more m + 1
    place = ((z + 6) * (bins / 12)).long().clamp(0, bins - 1)
    k = quantiles.to(x.device).flatten()[(log_N * 256 + v) * bins + place].float()
    noise = torch.where(gaussian, z, k / (2.0**log_N) - v.float() / 255)
    return torch.where(amount == 0, x, (x + amount * noise).clamp(0, 1))


_u, _x = torch.arange(8)[:, None].double(), torch.arange(8)[None].double()
DCT = (torch.where(_u > 0, 0.5, 8**-0.5) * torch.cos((2 * _x + 1) * _u * (math.pi / 16))).float()  # D X D^T: the transform
JPEG_LUMA = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
             (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
             (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))
JPEG_CHROMA = ((17, 18, 24, 47, *[99] * 4), (18, 21, 26, 66, *[99] * 4), (24, 26, 56, 99, *[99] * 4), (47, 66, 99, 99, *[99] * 4), *[(99,) * 8] * 4)


def jpeg(x, sizes, factors):
    """What JPEG leaves of each picture, x in [0, 1] of 3 channels: its tables are `factors` (B,) float32 times the standard's; 0: no JPEG.

    As the published pipeline computes it: colours at half the resolution, black beyond the edges to multiples of 16, tables
    neither rounded nor limited to 255, the one for luma transposed (in a file the 11 of 16, 11, ... is the horizontal frequency's).
    """
    H, W = x.shape[2:]
    factors = factors.to(x.device).view(-1, 1, 1, 1, 1, 1)
    rgb = F.pad((x.clamp(0, 1) * 255) * _inside(x, sizes), (0, -W % 16, 0, -H % 16))
    r, g, b = rgb.split(1, dim=1)
    y = r * 0.299 + g * 0.587 + b * 0.114 - 128
    c = torch.cat([r * -0.168736 + g * -0.331264 + b * 0.5, r * 0.5 + g * -0.418688 + b * -0.081312], dim=1)
    c = ((c[..., ::2, ::2] + c[..., ::2, 1::2]) + (c[..., 1::2, ::2] + c[..., 1::2, 1::2])) * 0.25
    table = lambda values: torch.tensor(values, dtype=torch.float32, device=x.device).view(8, 1, 8) * factors.clamp(min=1e-6)
    y = _quantised(y, table([*zip(*JPEG_LUMA)])) + 128
    cb, cr = _quantised(c, table(JPEG_CHROMA)).repeat_interleave(2, 2).repeat_interleave(2, 3).split(1, dim=1)
    rgb = torch.cat([y + cr * 1.402, y + cb * -0.344136 + cr * -0.714136, y + cb * 1.772], dim=1)
    return torch.where(factors[..., 0, 0] == 0, x, rgb[..., :H, :W].clamp(0, 255) / 255)


def _quantised(planes, table):
    """(B, C, H, W) through the cosine transform of its 8 x 8 blocks, rounded to multiples of table (B, 1, 1, 8, 1, 8), and back."""
    D = DCT.to(planes.device)

    def sums(matrix, x, dim):  # of matrix[a, i] x[i] along dim, from i = 0 to 7
        shape = [8 if d == dim else 1 for d in range(6)]
        y = matrix[:, 0].view(shape) * x.narrow(dim, 0, 1)
        for i in range(1, 8):
            y = y + matrix[:, i].view(shape) * x.narrow(dim, i, 1)
        return y

    B, C, H, W = planes.shape
    blocks = planes.reshape(B, C, H // 8, 8, W // 8, 8)
    c = (sums(D, sums(D, blocks, 3), 5) / table).round() * table
    return sums(D.T, sums(D.T, c, 5), 3).reshape(B, C, H, W)
