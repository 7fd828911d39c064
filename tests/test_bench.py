"""bench.py: its cases agree with their references, and its commands run through, small. gpu_report.py as far as it can be shown without a card."""
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import bench
import gpu_report
import kernels
import machine
import model
import sample
import train_flow


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
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel(dtype, capsys, monkeypatch):
    monkeypatch.setattr(bench, "product_speed", lambda *_: 1e6)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e6)
    bench.main(["kernels", "--device", "cpu", "--size", "32", "--dtype", dtype])
    said = capsys.readouterr().out
    assert "all results match" in said
    assert all(f"\n{name} " in said for name in ("noise_augment", "distill_loss", "to_uint8", "dopri5_error")) and ("\nconv " in said) == (dtype == "float32" or torch.ops.oftsr.multiplies_in_bf16())


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
    assert all(name in out for name in ("stage 1, as published", "stage 1, ours", "stage 2, ours", *bench.PARTS)) and "times as fast as published" in out and "peak memory of all of it" in out


def test_the_loader(tmp_path, capsys, monkeypatch):
    """Files, tars and PIL in plain form give the same pictures; a folder of the user's; and a difference is found."""
    monkeypatch.setattr(bench.example_pictures, "__defaults__", (2,))
    threads = torch.get_num_threads()
    bench.main(["data", "--size", "32", "--workers", "1"])
    said = capsys.readouterr().out
    assert said.count("all results match") == said.count("ours, files") == said.count("PIL in plain form") == said.count("ours, tars  ") == said.count("ours, tars, 1 processes") == 3
    assert "an update of ffhq (stage 1) takes 3 x 2 x " in said and "pictures a second: with 8 cores a card" in said
    (tmp_path / "a.png").write_bytes((bench.data.ASSETS / "cat.png").read_bytes())
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    bench.main(["data", "--size", "32", "--model", "tiny", "--data_dir", str(tmp_path / "train.tar")])
    said = capsys.readouterr().out
    assert "ours, tars" in said and "PIL" not in said and "an update of tiny" in said
    monkeypatch.setattr(bench.PlainPictures, "__getitem__", lambda self, key: (torch.zeros(3, 32, 32, dtype=torch.uint8), key[1]))
    with pytest.raises(SystemExit, match="the results do not match: JPEG 500 x 375"):
        bench.main(["data", "--size", "32"])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("script, flags", [("bench.py", ["data"]), ("examples/train_resshift.py", [])])
def test_a_wrong_folder_is_one_line(script, flags, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # which would hold for the tests that follow
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *flags, "--data_dir", "nowhere"])
    with pytest.raises(SystemExit, match=f"{Path(script).name}: no folder nowhere"):
        runpy.run_path(str(Path(bench.__file__).parent / script), run_name="__main__")


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


# --- the page about a card ---


def test_a_machine_without_a_card_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, driver, words in (("13.0", None, "sees no card, and no NVIDIA driver answers"), ("13.0", "GPU 0", "PyTorch cannot use it"), (None, None, "built without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(gpu_report, "answer", lambda *_, driver=driver: driver)
        with pytest.raises(SystemExit, match=f"^bench.py gpu: no NVIDIA card to report on: .*{words}.*--device cpu") as said:
            bench.main(["gpu"])
        assert "\n" not in str(said.value)


def test_the_commands_of_a_card_are_ours(monkeypatch, tmp_path):
    """Every part that only a card can run: its flags are known, its files are there."""
    called = []
    for name in ("kernels", "model", "train"):
        monkeypatch.setattr(bench, f"bench_{name}", lambda *args, name=name: called.append((name, args[0])))
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: name)
    parts = {title: command for title, command, _ in gpu_report.parts("cuda", tmp_path)}
    for command in parts.values():
        script = next(i for i, word in enumerate(command) if word.endswith(".py"))
        assert Path(command[script]).is_file()
        if command[script].endswith("bench.py"):
            bench.main(command[script + 1:])
        elif command[script].endswith("train_flow.py"):
            assert train_flow.parse_args(command[script + 1:]).device == "cuda"
        elif command[script].endswith("sample.py"):
            assert sample.parse_args(command[script + 1:]).device == "cuda"
    assert called == [("kernels", "cuda")] * 6 + [("model", "cuda")] + [("train", "cuda")] * 2
    assert [title for title in parts if "sanitizer" in title] == [f"compute-sanitizer {tool}" for tool in gpu_report.SANITIZERS]


def test_the_page(monkeypatch, tmp_path, capsys):
    """Real parts on a CPU, and one that fails, which does not end the others."""
    monkeypatch.chdir(tmp_path)
    real = gpu_report.parts
    failing = ("a part that fails", [sys.executable, "-c", "print('so far', flush=True); raise SystemExit('and no further')"], 60)
    hanging = ("a part that hangs", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    monkeypatch.setattr(gpu_report, "parts", lambda *how: [*(part for part in real(*how) if part[0] in ("tests of the kernels", "training")), failing, hanging])
    with pytest.raises(SystemExit) as left:
        bench.main(["gpu", "--device", "cpu"])
    page = capsys.readouterr().out
    assert left.value.code == 1 and (tmp_path / "out" / "gpu_report.md").read_text() == page.removesuffix("\n")
    assert "| tests of the kernels | ok |" in page and "| a part that fails | FAILED |" in page and "| a part that hangs | FAILED |" in page and "| training | ok |" in page
    assert " passed" in page and "so far\nand no further" in page and "not done after 1 s" in page and "step 5  loss" in page and str(tmp_path) not in page
