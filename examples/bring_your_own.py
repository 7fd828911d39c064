"""Distil a network of your own: wrap it in a teachers.Teacher, and name the function that does.

    PYTHONPATH=examples python distill.py --teacher bring_your_own:teacher --data_dir DIR
    PYTHONPATH=examples OFTSR_FAMILIES=bring_your_own:teacher python sample.py --ckpt out/photos_distill/ckpt.pt --t 1 picture.png

This one predicts the clean picture x_1 from x_t, x_lr and t, along the path x_t = (1 - t) x_0 + t x_1 of linear_path.
"""
import torch
import torch.nn as nn

from teachers import Teacher, linear_path


class Denoiser(nn.Module):
    """x_lr and a residual: x_t, x_lr (B, 3, H, W), t (B,) -> x_1 (B, 3, H, W)."""

    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(7, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x_t, x_lr, t):
        return x_lr + self.layers(torch.cat([x_t, x_lr, t.view(-1, 1, 1, 1).expand_as(x_t[:, :1])], dim=1))


def teacher():
    torch.manual_seed(0)
    net = Denoiser()  # here yours would load its weights: net.load_state_dict(torch.load("mine.pt", weights_only=True))
    return Teacher(net, predicts="x_1", path=lambda t: linear_path(t, sigma_p=0.1))
