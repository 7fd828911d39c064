"""The ONNX file against PyTorch, with onnxruntime alone: sizes and t it was not exported with, its noise, its defaults."""
import re
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import export
import kernels
import sample
from console import InputError
from data import TASKS
from model import save_release
from test_model import tiny
from tiles import restore

TASK = replace(TASKS["photos"], sigma_p=0.2)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a tiny student with attention."""
    path = tmp_path_factory.mktemp("export") / "student.safetensors"
    save_release(path, tiny(one_step=True, attention=(2,)), dict(stage="distill", task=asdict(TASK)))
    return path


@pytest.fixture(scope="module")
def session(student):
    """onnxruntime's, of what sample.py exports with t = 0.25 and seed 7 as its defaults."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript, which PyTorch exports with, is not installed")
    path = student.with_name("model.onnx")
    sample.main(["--export", str(path), "--t", "0.25", "--seed", "7", "--ckpt", str(student)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of inputs with a default
    return onnxruntime.InferenceSession(path, options)


@pytest.fixture
def expected(student):
    """What PyTorch says for (B, 3, h, w) in [0, 1], t and seed."""
    def restored(picture, t, seed):
        x_lr = F.interpolate(2 * picture - 1, scale_factor=4, mode="bicubic", antialias=True)
        x_1, _ = restore(sample.load(student, "cpu")[0], x_lr, TASK.sigma_p, torch.full((len(picture),), seed), t)
        return (x_1 / 2 + 0.5).clamp(0, 1).numpy()
    return restored


@pytest.mark.parametrize("size, t, seed", [((1, 3, 24, 40), 0.5, 0), ((3, 3, 17, 31), 0.9, 2**40 + 3), ((1, 3, 3, 50), 0.0, 2**63 - 1), ((1, 3, 1, 1), 1.0, 5)])
def test_the_file_says_what_pytorch_says(size, t, seed, session, expected):
    picture = torch.rand(size, generator=torch.Generator().manual_seed(0))
    inputs = {"input": picture.numpy(), "t": np.float32([t]), "seed": np.int64([seed])}
    (out,), want = session.run(None, inputs), expected(picture, t, seed)
    assert out.shape == want.shape == (*size[:2], 4 * size[2], 4 * size[3])
    assert np.abs(out - want).max() < 1e-4 and want.std() > 0.1  # 8-bit steps are 4e-3; the picture is none of clamped black


def test_programs_that_know_one_input_get_the_defaults(session, expected):
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [("input", ["batch", 3, "height", "width"], "tensor(float)")]
    assert [o.shape for o in session.get_outputs()] == [["batch", 3, "4 * height", "4 * width"]]
    picture = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    (out,) = session.run(None, {"input": picture.numpy()})
    assert np.abs(out - expected(picture, 0.25, 7)).max() < 1e-4
    assert np.abs(out - expected(picture, 0.25, 8)).max() > 1e-3 < np.abs(out - expected(picture, 0.5, 7)).max()


def test_readmes_example(session, student, tmp_path, monkeypatch):
    code = re.search(r"```python\n(import numpy as np, onnxruntime.*?)```", (Path(export.__file__).parent / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    Path("assets").mkdir()
    small = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    Image.fromarray(small).save("assets/cat.png")
    shutil.copy(student.with_name("model.onnx"), "model.onnx")
    exec(code, {})
    want = sample.upscale(small, t=0.3, seed=7, ckpt=student, device="cpu", dtype="float32")
    assert np.abs(np.asarray(Image.open("cat_x4.png")).astype(int) - want).max() <= 1 and want.std() > 20


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 3, 1, 1), (2, 3, 2, 9), (1, 1, 17, 12)])
def test_enlarge_is_torchs(scale, size):
    y = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.allclose(export.enlarge(y, scale), F.interpolate(y, scale_factor=scale, mode="bicubic", antialias=True), atol=1e-5)


def test_without_onnx(student, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="needs the package onnx"):
        sample.main(["--export", str(tmp_path / "m.onnx"), "--ckpt", str(student)])
    assert not list(tmp_path.glob("*.onnx"))


def test_noise_is_the_kernels():
    seeds = torch.tensor([0, 2**40 + 3, -1])
    for seed in seeds:
        assert torch.allclose(export.normal(seed[None], 60, 33), kernels.normal(seed[None], (1, 3, 60, 33)), atol=1e-5)


def test_the_kernels_are_ours_again_after_an_export():
    before = kernels.extension_devices()
    with pytest.raises(ZeroDivisionError), export.reference_kernels():
        assert kernels.extension_devices() == ()
        1 / 0  # noqa: B018
    assert kernels.extension_devices() == before
