"""The ground-truth stage, distill.py --loss perceptual: what holds both ends of a finished student's dial to the photographs.

Not the paper's, which names it as future work. Eq. (9) holds the student to its teacher, whose realism bounds its own. Here
t = 1 learns from what the flow's own encoder sees in its pictures and in the photographs, and from a small critic that reads
the same; t = 0 is least squares; all between is laid on a straight line. The patches' grid is kept out by a loss of its own.

    critic = Critic(teacher.feature_channels)
    losses, seen, there = perceptual_losses(student, teacher, critic, x_1, x_in, z_in, t, s)      # for the student
    verdict = critic_loss(critic, seen, there)                                                    # for the critic
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from console import InputError, in_range


def add_perceptual_flags(parser):
    """The flags of this stage alone."""
    g = parser.add_argument_group("--loss perceptual")
    g.add_argument("--look_min", type=in_range(float, 0, 1), default=0.6, help="the teacher looks at pictures at times uniform from here to 1")
    g.add_argument("--lambda_adv", type=in_range(float, 0), default=0.015, help="weight of looking like a photograph to a critic")
    g.add_argument("--lambda_truth", type=in_range(float, 0), default=4.0, help="weight of the least-squares end, t = 0, and of the straight dial from there")
    g.add_argument("--lambda_grid", type=in_range(float, 0), default=10_000.0, help="weight of the grid of the network's patches on smooth areas")


def check_teacher(teacher, task):
    """Raises InputError if there is nothing to look through in that teacher, or a student of that task does not see what it is compared with."""
    if not hasattr(teacher, "features"):
        raise InputError("--loss perceptual looks through the encoder of a flow of this project's U-Net, which this teacher is not")
    if not task.condition:
        raise InputError(f"--loss perceptual compares with the photograph behind x_lr, which a network of {task.name} does not see")


class Critic(nn.Module):
    """Tells photographs from restored pictures by what the flow's encoder sees in them, as Sauer et al. (2024) do with a diffusion model's.

    features, one (B, C, h, w) a level, as UNet.features returns them -> scores, one (B, 1, h, w) a level: high for photographs.
    """

    def __init__(self, channels, width=64):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(c, width, 3, padding=1), nn.GroupNorm(4, width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, padding=1)) for c in channels)

    def forward(self, features):
        return [head(f) for head, f in zip(self.heads, features, strict=True)]


def perceptual_losses(student, teacher, critic, x_1, x_in, z_in, t, s):
    """Ground truth for both ends of a finished student's dial, and a straight line between them.

    x_1 (B, 3, H, W); x_in = concat(x_0, x_lr) and z_in, the same under other noise, (B, 6, H, W); t, s (B,) in [0, 1]. The
    frozen teacher looks at x_1^1 = x_0 + v_phi(x_0, 1) and at x_1 on their way, at t, from z_in's start: were it x_0, the
    noise would be the student's own. Returns (losses, seen, there): what its encoder saw in x_1^1 and in x_1, lists of
    (B, C, h, w), finest level first; and of the losses (5,)
    - "looks": how differently it saw the two. Mean absolute error, relative, the mean over the levels;
    - "truth": v_phi(x_0, 0) against x_1 - x_0: least squares, the faithful end. Relative squared error;
    - "line": v_phi(x_0, s) against (1-s) v_phi(x_0, 0) + s v_phi(x_0, 1), held constant. Relative squared error, of the first
      quarter of the pictures, rounded up: it has only to follow. Where realism is the Wasserstein-2 distance, a straight
      line from the least-squares estimate to the best realistic one gives away least on the way (Freirich, Michaeli and
      Meir 2021): a guide here, as the realistic end is not quite that;
    - "grid": how much x_1^1, x_1^0 and x_1^s show the network's patches: see grid_error. x_1^0 in each smooth square by itself,
      as no least-squares estimate has details that fine there; the others, which have texture, in the mean over all;
    - "adv": how little x_1^1 looks like a photograph to the critic, which learns nothing from it.
    """
    few = -(-len(s) // 4)
    few_s = s[:few]
    times = torch.cat([torch.ones_like(s), torch.zeros_like(s), few_s])
    v_1, v_0, v_s = student(torch.cat([x_in, x_in, x_in[:few]]), times).float().split([len(s), len(s), few])
    (x_0, x_lr), z = x_in.chunk(2, dim=1), z_in.chunk(2, dim=1)[0]

    def look(x):
        return teacher.features(torch.cat([torch.lerp(z, x, t.view(-1, 1, 1, 1)), x_lr], dim=1), t)

    seen = look(x_0 + v_1)
    with torch.no_grad():
        there = look(x_1)
        line = torch.lerp(v_0[:few], v_1[:few], few_s.view(-1, 1, 1, 1))
    looks = sum((a.float() - b.float()).abs().mean() / b.float().abs().mean() for a, b in zip(seen, there)) / len(seen)
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    adv = -mean_score(torch.func.functional_call(critic, frozen, (seen,)))
    grid = (grid_error(x_0 + v_1, x_1, teacher.patch) + grid_error(x_0[:few] + v_s, x_1[:few], teacher.patch)
            + grid_error(x_0 + v_0, x_1, teacher.patch, each=True))
    return torch.stack([looks, relative_error(v_0, x_1 - x_0), relative_error(v_s, line), grid, adv]), seen, there


def grid_error(x, x_1, patch, size=8, smooth=0.05, each=False):
    """How much the mean of pictures x (B, 3, H, W) depends on the place of a pixel in its patch: the variance over the patch^2 places.

    Where x_1 is smooth, in the squares of `size` pixels in which it deviates by less than `smooth` (6 of 255), as it is there
    that a grid of some .1 of 255 would show, if anywhere. The variance of the mean over all these squares; or, `each`, the
    mean of every square's own. patch divides size. A number; 0 where nothing is smooth, or smaller than a square.
    """
    height, width = (side // size * size for side in x.shape[2:])
    squares = lambda a: F.pixel_unshuffle(a[..., :height, :width], size).unflatten(1, (3, size // patch, patch, size // patch, patch))
    calm = (squares(x_1).std((2, 3, 4, 5), correction=0).amax(1) < smooth).float()  # (B, H / size, W / size)
    calm = calm / calm.sum().clamp(min=1)
    places = squares(x).mean((2, 4)).flatten(2, 3)  # (B, 3, patch^2, H / size, W / size)
    if each:
        return (places.var(2, correction=0).mean(1) * calm).sum()
    return (places * calm[:, None, None]).sum((0, 3, 4)).var(1, correction=0).mean()


def relative_error(a, b):
    """The mean squared error of a against b, any shape alike, over the mean square of b: a number, 1 for a = 0."""
    return (a - b).square().mean() / b.square().mean()


def critic_loss(critic, seen, there):
    """The hinge loss of a critic that is shown features of restored pictures and of photographs, both constants: a number >= 0."""
    restored, photographs = critic([f.detach() for f in seen]), critic(there)
    return mean_score([F.relu(1 + a) for a in restored]) + mean_score([F.relu(1 - a) for a in photographs])


def mean_score(maps):
    """The mean over levels of the means of a list of maps."""
    return sum(a.float().mean() for a in maps) / len(maps)
