"""bench.py: its cases agree with their references, and its commands run through, small."""
import pytest
import torch

import bench
import kernels
import model


def once(functions, sets, device, **_):
    for f in functions:
        f(*sets[0])
    return [(1.0, 1.0, 1.0)] * len(functions)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """No compiler, and one call instead of seconds of them."""
    if not kernels.extension_devices():
        pytest.skip("no fused kernels to measure here: no compiler, or OFTSR_KERNELS=torch")
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(bench, "clock", once)
    monkeypatch.setattr(model, "keep_freed_memory", lambda: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel(dtype, capsys, monkeypatch):
    monkeypatch.setattr(bench, "product_speed", lambda device: 1e6)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e6)
    bench.main(["kernels", "--device", "cpu", "--size", "32", "--dtype", dtype])
    said = capsys.readouterr().out
    assert "all results match" in said
    assert all(f"\n{name} " in said for name in ("noise_augment", "distill_loss", "to_uint8", "dopri5_error")) and ("\nconv " in said) == (dtype == "float32")


def test_a_wrong_kernel_is_found(monkeypatch):
    right = kernels.euler_step_
    monkeypatch.setattr(kernels, "euler_step_", lambda x_in, v, dt: right(x_in, v, 1.01 * dt))
    with pytest.raises(SystemExit, match="euler_step_ does not match its reference"):
        bench.main(["kernels", "--device", "cpu", "--size", "16", "--only", "euler_step_"])


def test_the_network(capsys, monkeypatch):
    monkeypatch.setitem(model.PRESETS, "ffhq", dict(channels=64, mults=(1, 2), blocks=1, attention=(2,), out_channels=6))
    bench.main(["model", "--device", "cpu", "--size", "32"])
    said = capsys.readouterr().out
    assert "all results match" in said and "float32, as published" in said


def test_the_training_table_has_its_rows(capsys):
    bench.main(["train", "--device", "cpu", "--size", "32", "--model", "tiny", "--batch", "1", "--steps", "1"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("stage 1, as published", "stage 1, ours", "stage 2, ours", *bench.PARTS)) and "times as fast as published" in out


def test_other_runtimes(weights, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    bench.main(["infer", "--size", "32", "--ckpt", str(weights / "distill.safetensors")])
    said = capsys.readouterr().out
    assert "all results match" in said and "GMAC/s" in said
    assert ("onnxruntime" in said) and ("OpenVINO" in said)  # measured, or named as missing
    v = torch.ones(1, 3, 32, 32)
    monkeypatch.setattr(bench, "infer_rows", lambda *_: [("ours", lambda: v, 0), ("another", lambda: 1.001 * v, 1e-4)])
    with pytest.raises(SystemExit, match="do not match"):
        bench.main(["infer", "--size", "32", "--ckpt", str(weights / "distill.safetensors")])


def test_the_degradation_beside_opencv(capsys, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    bench.main(["degradation", "--device", "cpu", "--size", "64"])
    said = capsys.readouterr().out
    assert "the results match" in said and "64 x 64 to 16, strength 1, one CPU thread" in said
    lines = {line[:40].strip(): line[40:].split() for line in said.splitlines()}
    assert lines["ours"] == lines["OpenCV, NumPy and a codec, one core"] == ["64000", "64000", "64000"] and said.endswith("\n1.00x\n")  # 64 pictures in a clock of 1 ms
    right = bench.real
    monkeypatch.setattr(bench, "real", lambda x, *args: right(x.flip(0), *args))
    with pytest.raises(SystemExit, match="the results do not match"):
        bench.main(["degradation", "--device", "cpu", "--size", "64"])
