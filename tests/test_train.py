"""Both training scripts from their command lines: exact resume, several processes, signals, bad input."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import distill
import teachers
import train_flow
from console import InputError
from checkpoints import load_checkpoint
from model import load_model, save_release
from test_model import tiny

ROOT = Path(__file__).parent.parent
SMALL = ["--model", "tiny", "--image_size", "16", "--batch_size", "2", "--eval_pictures", "1", "--eval_steps", "1",
         "--log_interval", "2", "--warmup_iters", "2", "--device", "cpu", "--learning_rate", "1e-3"]


@pytest.fixture(autouse=True)
def signals():
    """The scripts take signals over; give them back."""
    kept = {s: signal.getsignal(s) for s in train_flow.data.STOPPING}
    yield
    for s, handler in kept.items():
        signal.signal(s, handler)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Smooth pictures with an edge: something that can be learned."""
    folder = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[:64, :64]
    for i in range(8):
        picture = np.stack([127 + 100 * np.sin((x * (i + 1) + y * c) / 9.0) * (x > 8 * i) for c in range(3)], axis=-1)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "flow.safetensors"
    task = dict(asdict(train_flow.data.TASKS["photos"]), model="tiny")
    save_release(path, tiny(sigma_p=0.1), dict(stage="flow", step=1, task=task))
    return path


def run(script, photos, out, *flags):
    args = [*SMALL, "--data_dir", str(photos), "--out_dir", str(out), *map(str, flags)]
    script.main(args)
    return load_checkpoint(out / "ckpt.pt")


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "args")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("script, optimizer, loss", [(train_flow, "adam", "l1"), (train_flow, "muon", "l1"), (distill, "muon", "oftsr"), (distill, "adam", "perceptual")],
                         ids=["flow", "flow-muon", "distill-muon", "perceptual"])
def test_resume_is_exact(script, optimizer, loss, photos, teacher, tmp_path, monkeypatch):
    """2N steps, and N steps then N more: every weight, average and optimizer moment the same to the bit."""
    monkeypatch.chdir(tmp_path)
    extra = ["--optimizer", optimizer, "--loss", loss, *(["--teacher", teacher] if script is distill else [])]
    start = ["--init_from", "teacher"] if script is distill else []
    whole = run(script, photos, tmp_path / "whole", "--max_iters", 8, "--eval_interval", 4, *start, *extra)
    run(script, photos, tmp_path / "parts", "--max_iters", 4, "--eval_interval", 4, *start, *extra)
    parts = run(script, photos, tmp_path / "parts", "--max_iters", 8, "--eval_interval", 4, "--init_from", "resume", *extra)
    assert whole["step"] == 8 and same(whole, parts)
    strip = lambda log: [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in log]
    assert strip(log_of(tmp_path / "whole")) == strip(log_of(tmp_path / "parts"))
    other = run(script, photos, tmp_path / "other", "--max_iters", 8, "--eval_interval", 4, "--seed", 1, *start, *extra)
    assert not same(whole["params"], other["params"])
    with pytest.raises(InputError, match="sigma_p 0.1, not 0.3"):
        run(script, photos, tmp_path / "parts", "--max_iters", 9, "--sigma_p", 0.3, "--init_from", "resume", *extra)
    with pytest.raises(InputError, match=f"trained with --optimizer {optimizer}"):
        run(script, photos, tmp_path / "parts", *extra, "--optimizer", "adam" if optimizer == "muon" else "muon", "--init_from", "resume")


def gradient(checkpoint):
    """Of a run of one step: Adam's first moment is a tenth of it. (The weights would not do: Adam's first step is a sign.)"""
    assert checkpoint["step"] == 1
    return 10 * torch.cat([state["exp_avg"].flatten() for state in checkpoint["optimizers"][0]["state"].values()])


def test_a_share_of_the_pictures_is_trained_at_zero(photos, tmp_path, monkeypatch):
    """Of 80 pictures half; the others are spread over [0, 1) evenly."""
    seen, pair = [], train_flow.kernels.flow_training_pair
    monkeypatch.setattr(train_flow.kernels, "flow_training_pair", lambda x_1, x_lr, t, *rest: (seen.append(t), pair(x_1, x_lr, t, *rest))[1])
    run(train_flow, photos, tmp_path, "--max_iters", 8, "--batch_size", 10, "--t0_share", 0.5)
    t = torch.cat(seen)
    assert len(t) == 80 and abs((t == 0).sum().item() - 40) <= 2 and t.max() > 0.95
    assert abs((t < 0.1).sum().item() - 44) <= 2 and abs((t > 0.5).sum().item() - 20) <= 2


@pytest.mark.parametrize("t_min, t_max, whole_steps", [(0.01, 0.99, 0.8), (-0.2, 0.8, 0.8), (0, 0.8, 1.0)])
def test_the_steps_of_distillation_end_everywhere(t_min, t_max, whole_steps, photos, teacher, tmp_path, monkeypatch):
    """s = min(t + dt, 1), t >= 0. With t from -dt to 1 - dt, s is uniform in [0, 1]; from 0 on, no s lies in (0, dt)."""
    seen, losses = [], distill.distillation_losses
    monkeypatch.setattr(distill, "distillation_losses", lambda student, teacher, x_in, t, s, *rest: (seen.append((t, s)), losses(student, teacher, x_in, t, s, *rest))[1])
    monkeypatch.chdir(tmp_path)
    run(distill, photos, tmp_path, "--max_iters", 10, "--batch_size", 10, "--dt", 0.2, "--t_min", t_min, "--t_max", t_max, "--teacher", teacher)
    t, s = (torch.cat(x) for x in zip(*seen))
    assert (t >= 0).all() and (s > t).all() and (s <= 1).all() and (s - t < 0.2 + 1e-6).all()
    assert (s - t > 0.2 - 1e-6).float().mean().item() == pytest.approx(whole_steps, abs=0.03)
    assert (s < 0.2).float().mean().item() == pytest.approx(0.2 if t_min < 0 else 0, abs=0.03)


def test_the_truth_for_a_published_network_in_two_processes(photos, tmp_path):
    """No preconditioning, attention, six channels out; bfloat16, and batches that are summed."""
    network = tiny(precond=None, attention=(2,), head_channels=32, out_channels=6)
    task = dict(asdict(train_flow.data.TASKS["photos"]), model="tiny")
    for stage in ("flow", "distill"):
        save_release(tmp_path / f"{stage}.safetensors", network, dict(stage=stage, step=1, task=task))
    done = torchrun(2, "distill.py", *SMALL, "--data_dir", photos, "--out_dir", tmp_path / "out", "--loss", "perceptual", "--teacher", tmp_path / "flow.safetensors",
                    "--init_from", tmp_path / "distill.safetensors", "--max_iters", 2, "--gradient_accumulation_steps", 2, "--dtype", "bfloat16", "--learning_rate", 1e-7)
    assert done.returncode == 0, done.stderr
    log = log_of(tmp_path / "out")[0]
    assert {"looks", "truth", "line", "grid", "adv"} <= set(log) and log["critic"] == pytest.approx(2, abs=0.5)
    assert 0 < log["looks"] < 2 and log["truth"] > 1  # its start is one of random weights: worse than saying nothing
    assert load_model(tmp_path / "out" / "ckpt.pt")[0].config["out_channels"] == 6


ONE_STEP = ["--max_iters", 1, "--log_interval", 1, "--dtype", "float32"]


def test_accumulation_is_the_larger_batch(photos, tmp_path):
    one = gradient(run(train_flow, photos, tmp_path / "one", *ONE_STEP, "--batch_size", 4))
    two = gradient(run(train_flow, photos, tmp_path / "two", *ONE_STEP, "--batch_size", 2, "--gradient_accumulation_steps", 2))
    assert one.norm() > 1e-3 and (one - two).norm() < 1e-4 * one.norm()


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_flow_learns(optimizer, photos, tmp_path):
    run(train_flow, photos, tmp_path, "--max_iters", 120, "--eval_interval", 20, "--batch_size", 4, "--optimizer", optimizer)
    few = [e["psnr_few"] for e in log_of(tmp_path) if "psnr_few" in e]
    assert len(few) == 6 and few[-1] > few[0] + 1  # dB
    assert (tmp_path / "val_0000120.png").exists()
    scores = log_of(tmp_path)[-1]
    assert load_model(tmp_path / "weights.safetensors")[1]["scores"] == {k: v for k, v in scores.items() if k != "step"}
    model, meta = load_model(tmp_path / "ckpt.pt")
    assert meta["stage"] == "flow" and meta["task"]["sigma_p"] == 0.1
    assert torch.equal(next(model.parameters()), load_checkpoint(tmp_path / "ckpt.pt")["ema"]["shadow_params"][0])


@pytest.mark.parametrize("objective", ["oftsr", "boot", "pinn"])
def test_distillation_starts_from_the_teacher_and_lowers_its_loss(objective, photos, teacher, tmp_path):
    run(distill, photos, tmp_path, "--teacher", teacher, "--loss", objective, "--max_iters", 200, "--log_interval", 40, "--learning_rate", 1e-3,
        "--eval_interval", 200, "--solver", "euler", "--dt", 0.2)
    log = [e for e in log_of(tmp_path) if "loss" in e]
    assert log[-1]["distill"] < 0.9 * log[0]["distill"]
    for file in ("ckpt.pt", "weights.safetensors"):
        model, meta = load_model(tmp_path / file)
        assert meta["stage"] == "distill" and model.one_step


def test_a_student_goes_on_with_the_truth(photos, teacher, tmp_path):
    bent = tiny(sigma_p=0.1, one_step=True)
    bent.time_embed["2"].weight *= 10  # no longer smooth in t
    save_release(tmp_path / "bent.safetensors", bent, dict(load_model(teacher)[1], stage="distill"))
    run(distill, photos, tmp_path, "--loss", "perceptual", "--teacher", teacher, "--init_from", tmp_path / "bent.safetensors",
        "--max_iters", 180, "--log_interval", 20, "--eval_interval", 180, "--learning_rate", 3e-4, "--batch_size", 4)
    log = [e for e in log_of(tmp_path) if "loss" in e]
    assert all(log[-1][part] < 0.9 * log[0][part] for part in ("looks", "truth", "line", "critic"))
    model, meta = load_model(tmp_path / "weights.safetensors")
    assert meta["stage"] == "distill" and model.one_step


def test_the_teacher_is_the_newest_of_its_task(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        run(train_flow, photos, tmp_path / "out" / name, "--max_iters", 1, *(["--dataset", "div2k", "--sigma_p", "0.2"] if name == "c" else []))
        os.utime(tmp_path / "out" / name / "ckpt.pt", (0, {"a": 200, "b": 100, "c": 300}[name]))
    for name, foreign in (("list", [1, 2]), ("dict", dict(stage="flow", task=None)), ("text", dict(stage="flow", task="a", args=["b"]))):  # somebody else's, and newer
        (tmp_path / "out" / name).mkdir()
        torch.save(foreign, tmp_path / "out" / name / "ckpt.pt")
    capsys.readouterr()
    assert teachers.newest("photos", "flow") == str(Path("out/a/ckpt.pt"))
    assert capsys.readouterr().err == f"teacher: {Path('out/a/ckpt.pt')}, the newest of photos under out/ (--teacher names another)\n"
    with pytest.raises(InputError, match="not a checkpoint of this script"):
        run(distill, photos, tmp_path / "out" / "dict", "--init_from", "resume")
    assert teachers.newest("div2k", "flow") == str(Path("out/c/ckpt.pt"))
    with pytest.raises(InputError, match="no teacher for ffhq: none under out/ .train_flow.py --dataset ffhq"):
        teachers.newest("ffhq", "flow")
    with pytest.raises(InputError, match="no student for div2k: none under out/ .distill.py --dataset div2k"):
        teachers.newest("div2k", "distill")
    student = run(distill, photos, tmp_path / "out" / "s", "--max_iters", 1, "--dataset", "div2k")
    assert student["task"]["sigma_p"] == 0.2  # nobody types it twice
    perceptual = run(distill, photos, tmp_path / "out" / "t", "--max_iters", 1, "--dataset", "div2k", "--loss", "perceptual")
    assert perceptual["args"]["init_from"] == str(Path("out/s/ckpt.pt")) and teachers.newest("div2k", "distill") == str(Path("out/s/ckpt.pt"))
    with pytest.raises(InputError, match="distilled student"):
        run(distill, photos, tmp_path / "x", "--teacher", tmp_path / "out" / "s" / "ckpt.pt")


def torchrun(processes, script, *flags):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(ROOT / script), *map(str, flags)],
                          capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("processes", (2, 4))
def test_several_processes_train_as_one(photos, tmp_path, processes):
    """torchrun: the same pictures, noise and times as one process with the whole batch, so the same gradient and loss."""
    done = torchrun(processes, "train_flow.py", *SMALL, *ONE_STEP, "--data_dir", photos, "--out_dir", tmp_path / "many")
    assert done.returncode == 0, done.stderr
    many = gradient(load_checkpoint(tmp_path / "many" / "ckpt.pt"))
    one = gradient(run(train_flow, photos, tmp_path / "one", *ONE_STEP, "--batch_size", 2 * processes))
    assert (one - many).norm() < 1e-4 * one.norm()
    losses = [log_of(tmp_path / d)[0]["loss"] for d in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_signal_stops_two_processes_together(photos, tmp_path):
    """Sent to both while they train, as torchrun does: one checkpoint, no process left waiting for the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train_flow.py"), *SMALL,
               "--data_dir", str(photos), "--out_dir", str(tmp_path), "--max_iters", "100000", "--eval_interval", "7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 8 "):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert f"stopped by a signal at step {step}" in rest and "Connection closed" not in rest


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_so(signum, photos, tmp_path):
    command = [sys.executable, str(ROOT / "train_flow.py"), *SMALL, "--data_dir", str(photos), "--out_dir", str(tmp_path), "--max_iters", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 4 "):
                process.send_signal(signum)
                break
        rest = process.stdout.read()
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert process.returncode == 128 + signum and step >= 4 and f"stopped by a signal at step {step}" in rest


def test_a_finished_training_is_not_overwritten(photos, tmp_path):
    before = run(train_flow, photos, tmp_path, "--max_iters", 1)
    with pytest.raises(InputError, match="holds a training already"):
        run(train_flow, photos, tmp_path, "--max_iters", 2)
    assert same(before, load_checkpoint(tmp_path / "ckpt.pt"))


def test_only_its_own_run_is_resumed(photos, teacher, tmp_path, capsys):
    run(distill, photos, tmp_path / "s", "--max_iters", 1, "--teacher", teacher)
    with pytest.raises(InputError, match="its stage is distill, not flow"):
        run(train_flow, photos, tmp_path / "s", "--init_from", "resume")
    with pytest.raises(InputError, match="is a distilled student"):
        run(train_flow, photos, tmp_path / "x", "--init_from", tmp_path / "s" / "ckpt.pt")
    with pytest.raises(InputError, match="was trained with --sigma_p"):
        run(train_flow, photos, tmp_path / "x", "--init_from", teacher, "--sigma_p", 0.5)
    with pytest.raises(InputError, match="say --dataset photos"):
        run(distill, photos, tmp_path / "x", "--teacher", teacher, "--dataset", "div2k")
    with pytest.raises(InputError, match="was trained with --sigma_p"):
        run(distill, photos, tmp_path / "x", "--teacher", teacher, "--sigma_p", 0.5)
    with pytest.raises(InputError, match="holds the network 'tiny', not 'photos'"):
        run(distill, photos, tmp_path / "x", "--teacher", teacher, "--model", "photos")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="is not a checkpoint"):
        run(distill, photos, tmp_path / "x", "--teacher", tmp_path / "list.pt")
    with pytest.raises(InputError, match="was trained with --loss oftsr"):
        run(distill, photos, tmp_path / "s", "--init_from", "resume", "--loss", "perceptual")
    capsys.readouterr()
    resumed = run(distill, photos, tmp_path / "s", "--max_iters", 2, "--init_from", "resume", "--dt", 0.1)  # the teacher is remembered
    assert resumed["args"]["teacher"] == str(teacher)
    assert "resumed at step 1, not as before: --dt" in capsys.readouterr().out
    with open(tmp_path / "s" / "log.jsonl", "a") as f:
        f.write('{"step": 2, "lo')  # a kill in the middle of a line
    run(distill, photos, tmp_path / "s", "--max_iters", 3, "--init_from", "resume", "--dt", 0.1, "--log_interval", 1)
    assert [e["step"] for e in log_of(tmp_path / "s")][-2:] == [3, 3]


def test_dry_run_of_the_big_networks_wants_no_data_and_no_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_flow.main(["--dataset", "imagenet", "--dry_run"])
    out = capsys.readouterr().out
    assert "552,820,998 parameters" in out and "no folder data/imagenet" in out and list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_flow.main(["--data_dir", str(photos), "--image_size", "64", "--dry_run"])
    out = capsys.readouterr().out
    assert "4,913,676 parameters" in out and "0.85 GMACs" in out and "sigma_p=0.1" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, says", [
    (["--data_dir", "missing"], "no folder missing"),
    (["--data_dir", "missing", "--dry_run"], "no folder missing"),
    (["--init_from", "resume"], "no checkpoint at"),
    (["--init_from", "missing.pt"], "no checkpoint at missing.pt"),
    (["--image_size", "20"], "not a multiple of 8"),
    (["--device", "cuda:99"], "no device"),
    (["--max_iter", "5"], "unrecognized arguments"),  # no abbreviations
    (["--learning_rate", "fast"], "not a number"),
    (["--batch_size", "0"], "out of range"),
    (["--sigma_p", "2"], "out of range: 0 to 1"),
    (["--sigma_p", "0"], "sigma_p > 0"),
    (["--scale", "1"], "nothing to restore"),
    (["--device", "meta"], "no device"),
    (["--seed", "99999999999999999999"], "out of range"),
    (["--out_dir", __file__], "cannot write"),
])
def test_bad_input_is_one_line_and_writes_nothing(flags, says, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, SystemExit)) as e:
        train_flow.main(["--data_dir", str(photos), "--image_size", "32", *flags])
    message = str(e.value) if e.type is InputError else capsys.readouterr().err.strip().splitlines()[-1]
    assert says in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, says", [
    (["--t_min", "0.5", "--t_max", "0.4"], "--t_min 0.5 is above --t_max 0.4"),
    (["--loss", "boot", "--t_max", "1"], "stay below 1"),
    (["--loss", "perceptual", "--look_min", "-0.1"], "out of range: 0 to 1"),
    (["--loss", "perceptual"], "no student for photos: none under out/"),
    (["--loss", "perceptual", "--init_from", str(teachers.TEACHER), "--model", "photos", "--sigma_p", "0.2"], "was trained with --sigma_p 0.1"),
    (["--loss", "perceptual", "--init_from", "OTHER"], "is not the teacher's network"),
    (["--loss", "perceptual", "--teacher", "UNCONDITIONAL", "--dataset", "ffhq_uncond"], "does not see"),
])
def test_bad_input_of_the_distillation_is_one_line_too(flags, says, photos, teacher, tmp_path_factory, tmp_path, monkeypatch, capsys):
    files = {"OTHER": teacher, "UNCONDITIONAL": tmp_path_factory.mktemp("flow") / "uncond.safetensors"}
    task = dict(asdict(train_flow.data.TASKS["ffhq_uncond"]), model="tiny")
    save_release(files["UNCONDITIONAL"], tiny(condition=False, precond=None), dict(stage="flow", step=1, task=task))
    flags = [str(files.get(flag, flag)) for flag in flags]
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, SystemExit)) as e:
        distill.main(["--data_dir", str(photos), "--image_size", "32", *flags])
    message = str(e.value) if e.type is InputError else capsys.readouterr().err.strip().splitlines()[-1]
    assert says in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_errors_reach_the_shell_as_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train_flow.py"), "--data_dir", str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"train_flow.py: no folder {tmp_path / 'none'}\n"


def test_a_diverging_run_stops_and_names_the_cure(photos, tmp_path):
    with pytest.raises(InputError, match="lower --learning_rate"):
        run(train_flow, photos, tmp_path, "--max_iters", 40, "--learning_rate", "1e30", "--grad_clip", 0)
    assert not (tmp_path / "ckpt.pt").exists()
    with pytest.raises(InputError, match="not finite at step [123], of the pictures .*nothing was saved yet"):  # between two lines of the log
        run(train_flow, photos, tmp_path, "--max_iters", 40, "--learning_rate", "1e30", "--grad_clip", 0, "--log_interval", 50, "--eval_interval", 3)
    assert not (tmp_path / "ckpt.pt").exists()
