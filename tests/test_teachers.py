"""Teachers that are not ours: conversions to v on closed forms, ResShift's and DiT4SR's networks against published outputs, files, students."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import resshift
import teachers
from resshift import SwinUNet, VQAutoencoder

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
