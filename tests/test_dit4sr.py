"""DiT4SR as a teacher: its transformer against published outputs, folders whole and broken, a student of adapters from training to a picture."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import teachers

dit4sr = pytest.importorskip("dit4sr", reason="diffusers and peft are not here (pip install -e '.[sd3]')", exc_type=(ImportError, teachers.InputError))

GOLDEN = Path(os.environ.get("OFTSR_GOLDEN", "missing"))
golden = pytest.mark.skipif(not (GOLDEN / "dit4sr").is_dir(), reason="OFTSR_GOLDEN names no folder with dit4sr/")
TINY = dict(patch_size=2, in_channels=16, num_layers=3, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
            pooled_projection_dim=20, pos_embed_max_size=24, dual_attention_layers=[0, 1], qk_norm="rms_norm")


@golden
def test_the_transformer_is_the_published_one():
    """Outputs to 1e-5, and what it leaves unread is unread: the file's other tensors are those of UNUSED."""
    with np.load(GOLDEN / "dit4sr/dit4sr_tiny.npz") as f:
        a = {k: torch.from_numpy(f[k]) for k in f}
    state = {k.removeprefix("param."): v for k, v in a.items() if k.startswith("param.")}
    net = dit4sr.Transformer(**TINY)
    net = teachers.fill(net, net.used(state), "golden", "the network").eval()
    with torch.no_grad():
        y = net(a["x"], a["lq"], a["prompt"], a["pooled"], a["t"])
        assert (y - a["y"]).abs().max() < 1e-5
        wide = net(a["x"][..., :8], a["lq"][..., :8], a["prompt"], a["pooled"], a["t"])  # the published one takes squares alone
    assert wide.shape == (2, 16, 16, 8) and wide.isfinite().all()


@golden
def test_the_parameters_are_the_published_ones():
    real = json.loads((GOLDEN / "dit4sr/dit4sr_parameters.json").read_text())
    assert {k: real["config"][k] for k in dit4sr.MEDIUM} == dit4sr.MEDIUM
    with torch.device("meta"):
        net = dit4sr.Transformer(**dit4sr.MEDIUM)
    published = dict(real["shapes"])
    assert {name: list(p.shape) for name, p in net.state_dict().items()} == net.used(published)
    assert len(published) - len(net.used(published)) == 207  # to_k_control 24 x 2, the rest of attn2 13 x 12, the last block 3
