"""curves.py: closed forms of what it measures, and its three commands, small."""
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import curves
import data
from console import InputError
from model import UNet, load_model, network_config, save_release
from test_metrics import needs_alex, smooth


def start():
    return torch.randn(1, 6, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_straight_flow_has_no_bend_and_a_bent_one_its_own():
    d = torch.full((1, 3, 8, 8), 0.5)
    x_in = start()
    bend, gap = curves.straightness(lambda x, t: d, x_in, x_in[:, :3] + d, 10)
    assert bend == pytest.approx(0, abs=1e-12) and gap == pytest.approx(0, abs=1e-12)
    bend, _ = curves.straightness(lambda x, t: t.view(-1, 1, 1, 1) * torch.ones(1, 3, 8, 8), x_in, x_in[:, :3], 10)
    assert bend == pytest.approx(0.01 * (100 - 1) / 12, rel=1e-5)  # the variance of 0, .1 ... .9
    _, gap = curves.straightness(lambda x, t: 0 * d, x_in, x_in[:, :3] + d, 10)
    assert gap == pytest.approx(0.25, rel=1e-5)  # and of what the data wants


def test_the_estimates_along_a_path():
    """v = a - x_t decays to a: x_1^t = x_t + (1 - t) v, Eq. (13)'s for a student."""
    x_in, a = start(), torch.zeros(1, 3, 8, 8)
    x_0 = x_in[:, :3].clone()
    flow = SimpleNamespace(stage="flow", net=lambda x, t: a - x[:, :3])
    found = [(t, x.clone()) for t, x in curves.estimates(flow, x_in.clone(), 4)]
    assert [t for t, _ in found] == [0, 0.25, 0.5, 0.75, 1]
    for (t, x), k in zip(found, range(5)):
        x_t = x_0 * 0.75**k
        torch.testing.assert_close(x, x_t + (1 - t) * (a - x_t) if k < 4 else x_t)
    student = SimpleNamespace(stage="distill", net=lambda x, t: t.view(-1, 1, 1, 1) * torch.ones_like(x[:, :3]))
    for t, x in curves.estimates(student, x_in.clone(), 2):
        torch.testing.assert_close(x, x_0 + t)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    task = data.Task("photos", sigma_p=0.1, crop="random", image_size=32, model="tiny")
    for name, stage in (("student", "distill"), ("flow", "flow")):
        torch.manual_seed(1)
        net = UNet(**network_config("tiny", sigma_p=0.1, sigma_d=0.1), one_step=stage == "distill")
        with torch.no_grad():
            for p in net.parameters():
                p += 0.05 * torch.randn_like(p)
        save_release(folder / f"{name}.safetensors", net, dict(stage=stage, task=asdict(task), step=1))
    (folder / "photos").mkdir()
    for i in range(2):
        Image.fromarray(smooth(i, 40, 48)).save(folder / f"photos/{i}.png")
    return folder


def run(files, monkeypatch, capsys, what, *flags, ckpt=("student", "flow")):
    monkeypatch.setattr(curves, "load_lpips", lambda *a: lambda x, y: (x - y).abs().mean(dim=(1, 2, 3)))
    curves.main([what, "--ckpt", *(str(files / f"{name}.safetensors") for name in ckpt), "--data_dir", str(files / "photos"), "--steps", "2",
                 "--json", str(files / "c.json"), "--dtype", "float32", "--device", "cpu", *flags])
    return {row["name"]: row["values"] for row in json.loads((files / "c.json").read_text())["rows"]}, capsys.readouterr().out


def test_path_of_flow_and_student_in_one_plot(files, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    found, out = run(files, monkeypatch, capsys, "path", "--plot", str(files / "path.svg"))
    assert found.keys() == {"student", "flow"} and all(ts == [0, 0.5, 1] for ts, _, _ in found.values())
    assert "student  t 0.500  MSE " in out and "flow  t 1.000  MSE " in out and "in 8 bits" in out and (files / "path.svg").stat().st_size > 5000


def test_straightness_of_flows_alone(files, monkeypatch, capsys):
    found, out = run(files, monkeypatch, capsys, "straightness", ckpt=("flow",))
    sigma_p, path, gap = found["flow"]
    assert sigma_p == 0.1 and 0 < path < 1 and gap > 0 and "sigma_p 0.1  S " in out
    with pytest.raises(InputError, match="stage-1 flows alone"):
        run(files, monkeypatch, capsys, "straightness")


def test_the_second_dial_over_the_strength_of_damage(files, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    task = data.Task("photos_real", degradation="real", strength=-1.0, eight_bit=True, sigma_p=0.1, crop="random", image_size=32, model="tiny")
    net, _ = load_model(files / "student.safetensors")
    with torch.no_grad():
        net.out["2"].bias += 0.2  # a network that brightens
    save_release(files / "real.safetensors", net, dict(stage="distill", task=asdict(task), step=1))
    flags = ["--denoise", "0,0.5,1", "--strengths", "0,1", "--plot", str(files / "denoise.svg")]
    found, out = run(files, monkeypatch, capsys, "denoise", *flags, ckpt=("student", "real"))
    assert list(found) == ["denoise 0", "denoise 0.5", "denoise 1"] and all(strengths == [0, 1] for strengths, _, _ in found.values())
    for i in range(2):
        assert found["denoise 0"][1][i] > found["denoise 0.5"][1][i] > found["denoise 1"][1][i]  # PSNR falls as the brightness leaves the truth
        assert found["denoise 0"][2][i] < found["denoise 1"][2][i]
    assert found["denoise 0"][1][0] > found["denoise 0"][1][1] and "denoise 0.5  strength 1.00  PSNR " in out and (files / "denoise.svg").stat().st_size > 5000
    with pytest.raises(InputError, match="between two students, or two flows"):
        run(files, monkeypatch, capsys, "denoise")


def test_diversity_between_seeds(files, monkeypatch, capsys):
    found, _ = run(files, monkeypatch, capsys, "diversity", "--seeds", "3", "--plot", str(files / "grid.png"), ckpt=("student",))
    deviation, distance = found["student"]
    assert 0 < deviation < 255 and 0 < distance < 2
    grid = np.asarray(Image.open(files / "grid.png"))
    assert grid.shape == (80, 6 * 48, 3)  # two pictures: low resolution, three seeds, where they differ, truth
    a, b, c = (grid[:40, 48 * i : 48 * (i + 1)].astype(float) for i in (1, 2, 3))
    assert np.stack([a, b, c]).std(axis=0, ddof=1).mean() > 0
    with pytest.raises(InputError, match="--seeds 2 or more"):
        run(files, monkeypatch, capsys, "diversity", ckpt=("student",))


@needs_alex
def test_the_claims_are_killed_and_go_on(tmp_path):
    """README's claims.py with one update a network: kill -9 leaves no training behind; the same command goes on, keeps what was there, and prints every claim."""
    for part, count in (("train", 2), ("val", 1)):
        (tmp_path / part).mkdir()
        for i in range(count):
            Image.fromarray(smooth(i, 130, 130)).save(tmp_path / part / f"{i}.png")
    command = [sys.executable, str(Path(__file__).parent.parent / "claims.py"), "--data_dir", tmp_path, "--out_dir", tmp_path / "out", "--iters", "1", "--seeds", "1", "--workers", "1"]
    first = tmp_path / "out" / "iters1_seed0" / "sigma_p 0" / "weights.safetensors"
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while not first.exists() and process.poll() is None:
            time.sleep(0.1)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert first.exists() and workers
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < until, "a worker outlives the program that made it"
        time.sleep(0.2)
    written = first.stat().st_mtime_ns
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == written
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1 seeds, 1 updates a flow and 1 a student") and len(lines) == 13 and all("appear" in line for line in lines[1:])
