"""evaluate.py: what it measures, on what, and the table against its PNGs."""
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import figures
import folders
import metrics
from console import InputError
from degradations import to_float
from kernels import to_uint8
from model import UNet, count_macs, network_config, save_release
from pictures import read_image, write_picture
from test_metrics import batch, smooth

ROOT = Path(evaluate.__file__).parent


# --- pairs ---


def write(folder, **pictures):
    for name, x in pictures.items():
        write_picture(folder / name.replace("__", "/").replace("_png", ".png").replace("_bmp", ".bmp"), x)
    return folder


def run(monkeypatch, *argv):
    """evaluate.main without LPIPS, whatever this machine has; in a folder of results of its own."""
    argv = [str(a) for a in argv]
    evaluate.main([*([] if "--metrics" in argv else ["--metrics", "psnr_rgb,psnr_y,ssim_y"]), *argv])


def test_pairs_are_by_stem_and_the_mean_is_over_them(tmp_path, monkeypatch, capsys):
    x, y = smooth(8, 40, 40) // 2, smooth(9, 48, 40) // 2
    hr = write(tmp_path / "hr", a_png=x, sub__b_png=y)
    restored = write(tmp_path / "restored", sub__b_bmp=y + 8, a_png=x + 2)
    run(monkeypatch, "--pairs", restored, hr, "--json", tmp_path / "scores.json")
    (row,) = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert row["psnr_rgb"] == pytest.approx((20 * math.log10(255 / 2) + 20 * math.log10(255 / 8)) / 2)
    assert row["psnr_y"] == pytest.approx(row["psnr_rgb"] + 20 * math.log10(255 / 219))  # a gray error in limited range
    assert row["pictures"] == 2 and row["psnr_rgb_std"] is None
    assert f"{row['psnr_rgb']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("restored, hr, named", (
    (dict(a_png=0), dict(a_png=0, b_png=1), "b.png"),
    (dict(a_png=0, b_png=1), dict(a_png=0), "b.png"),
    (dict(a_png=0, sub__b_png=1), dict(a_png=0, other__b_png=1), "b.png"),
    (dict(a_png=0, a_bmp=0), dict(a_png=0), "differ only in their ending"),
    (dict(a_png=0), dict(a_png=1), "40 x 40"),
    (dict(a_png=2), dict(a_png=2), "24 x 24"),
    (dict(a_png=0), dict(), "no folder"),
))
def test_pictures_that_do_not_pair_are_named(tmp_path, monkeypatch, restored, hr, named):
    shapes = (smooth(0, 40, 40), smooth(1, 40, 44), smooth(2, 24, 24))
    for folder, files in (("restored", restored), ("hr", hr)):
        write(tmp_path / folder, **{name: shapes[i] for name, i in files.items()})
    with pytest.raises(InputError, match=named) as e:
        run(monkeypatch, "--pairs", tmp_path / "restored", tmp_path / "hr", "--json", tmp_path / "scores.json")
    assert "\n" not in str(e.value) and not (tmp_path / "scores.json").exists()


# --- the table ---


TASK = data.Task("photos", sigma_p=0.1, crop="random", image_size=32, model="tiny")


def save_network(path, stage, task=TASK):
    torch.manual_seed(len(str(stage)))
    net = UNet(**network_config("tiny", sigma_p=task.sigma_p, sigma_d=0.1), one_step=stage == "distill")
    with torch.no_grad():
        for p in net.parameters():  # a new network's last layer is zero: nothing would depend on t
            p += 0.05 * torch.randn_like(p)
    save_release(path, net, dict(stage=stage, task=asdict(task), step=7))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A student, a flow, and photographs of odd sizes of which two are for validation."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_network(folder / "student.safetensors", "distill")
    save_network(folder / "flow.safetensors", "flow")
    write(folder / "photos", val__a_png=smooth(1, 43, 50), val__deep__b_png=smooth(2, 48, 37), c_png=smooth(3, 60, 60))
    return folder


@pytest.fixture(scope="module")
def table(files):
    """One run of everything, and what it left: (rows by name, protocol, out_dir, the terminal)."""
    out = files / "out"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--", ROOT / "evaluate.py", "--ckpt", files / "student.safetensors",
         files / "flow.safetensors", "--data_dir", files / "photos", "--out_dir", out, "--seeds", "2", "--json", files / "scores.json",
         "--t", "0,1", "--solver", "midpoint,rk45", "--rtol", "0.1", "--atol", "0.1", "--pictures", "2", "--dtype", "float32", "--device", "cpu"],
        cwd=files, capture_output=True, text=True, timeout=300, env={**os.environ, "TORCH_HOME": str(files), "OFTSR_LPIPS_ALEX": ""})
    assert done.returncode == 0, done.stderr
    scores = json.loads((files / "scores.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    return {row["name"]: row for row in scores["rows"]}, scores["protocol"], out, done.stdout


def test_every_row_is_there_with_the_evaluations_counted(table):
    rows, protocol, _, text = table
    nfe = {name: row["nfe"] for name, row in rows.items()}
    assert nfe.pop("flow_rk45_t1") >= 8
    assert nfe == {"bicubic": 0, "student_t0": 1, "student_t1": 1, "flow_rk45_t0": 1,
                   **{f"flow_midpoint{k}_t0": 1 for k in (1, 2, 4, 8)}, **{f"flow_midpoint{k}_t1": 2 * k for k in (1, 2, 4, 8)}}
    lines = [line.split()[0] for line in text.splitlines() if line and "±" in line or line.startswith("bicubic")]
    assert lines == list(rows)
    assert "lpips" not in text and "2 validation pictures of" in text and protocol["networks"][0]["sha256"] in text


def test_unless_told_a_student_is_swept_over_t_and_a_flow_over_its_steps(files):
    args = evaluate.parse_args(["--solver", "midpoint,rk45"])
    rows = evaluate.plan_rows(evaluate.load_networks([files / f"{name}.safetensors" for name in ("student", "flow")], torch.device("cpu"), args), args)
    assert [row.name for row in rows] == ["bicubic", *(f"student_t{t}" for t in (0, 0.25, 0.5, 0.75, 1)),
                                          "flow_euler1", *(f"flow_midpoint{k}" for k in (1, 2, 4, 8)), "flow_rk45"]


def test_the_numbers_are_those_of_the_saved_pictures(table, files):
    rows, _, out, _ = table
    truths = {"val/a": (slice(40), slice(48)), "val/deep/b": (slice(48), slice(36))}  # right and bottom cut to multiples of 4
    for row in rows.values():
        means = []
        for seed in row["seeds"]:
            values = []
            for stem, cut in truths.items():
                truth = np.asarray(Image.open(files / "photos" / f"{stem}.png"))[cut].astype(float)
                restored = np.asarray(Image.open(out / row["name"] / f"seed{seed}" / f"{stem}.png")).astype(float)
                values.append(10 * np.log10(255**2 / np.mean((truth - restored) ** 2)))
            means.append(np.mean(values))
        assert row["psnr_rgb"] == pytest.approx(np.mean(means), abs=1e-9)
        if row["name"] == "bicubic":
            assert row["seeds"] == [0] and row["psnr_rgb_std"] is None
        else:
            assert row["psnr_rgb_std"] == pytest.approx(np.std(means, ddof=1), abs=1e-9) and row["psnr_rgb_std"] > 0
            assert 0 < row["seconds"] < 60


def test_bicubic_is_down_and_up_again(table, files):
    x = to_float(batch(read_image(files / "photos/val/a.png")[:40, :48]))
    y = torch.nn.functional.interpolate(torch.nn.functional.interpolate(x, (10, 12), mode="bicubic", antialias=True), (40, 48), mode="bicubic", antialias=True)
    expected = (y[0].clamp(-1, 1) * 127.5 + 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(read_image(table[2] / "bicubic/seed0/val/a.png") - expected).max() <= 1  # a value halfway may round either way


def test_noise_and_pixels_do_not_depend_on_the_other_pictures_nor_on_processes(table, files, tmp_path, monkeypatch):
    write(tmp_path / "photos", a_png=smooth(1, 43, 50), aa_png=smooth(4, 40, 40))
    run(monkeypatch, "--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out",
        "--t", "1", "--seeds", "2", "--dtype", "float32", "--device", "cpu")
    for seed in (0, 1):
        there, here = (read_image(folder / f"student_t1/seed{seed}" / name) for folder, name in ((table[2], "val/a.png"), (tmp_path / "out", "a.png")))
        assert np.abs(there.astype(int) - here).max() <= 1  # convolutions on more threads may sum in another order
    assert (there != read_image(tmp_path / "out/student_t1/seed0/a.png")).mean() > 0.1


def test_noisy_task_gives_bicubic_a_spread_and_a_picture_without_error_is_infinite(tmp_path, monkeypatch, capsys):
    write(tmp_path / "flat", a_png=np.full((40, 40, 3), 128, np.uint8))
    common = ("--data_dir", tmp_path / "flat", "--out_dir", tmp_path / "out", "--crop", "random", "--json", tmp_path / "scores.json")
    monkeypatch.setattr(evaluate, "SHIPPED", ())
    run(monkeypatch, "--dataset", "ffhq_noisy", *common)
    (row,) = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert row["seeds"] == [0, 1, 2] and row["psnr_rgb_std"] > 0
    assert 28 < row["psnr_rgb"] < 40  # noise of .05 in [-1, 1] is 6.4 in bytes, 32 dB, and bicubic softens it a little
    run(monkeypatch, "--dataset", "photos", *common)
    (row,) = json.loads((tmp_path / "scores.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))["rows"]
    assert row["psnr_rgb"] == "inf" and row["ssim_y"] == pytest.approx(1)
    assert " inf " in capsys.readouterr().out


def test_bicubic_of_a_pooled_picture_starts_from_its_pixels():
    x = to_float(batch(smooth(10, 40, 48)))
    task = data.TASKS["ffhq_noisy"]
    low = torch.nn.functional.avg_pool2d(x, 4)
    x_lr = low.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(evaluate.bicubic(x_lr, task), torch.nn.functional.interpolate(low, (40, 48), mode="bicubic", antialias=True), atol=1e-5, rtol=0)


def test_a_missing_result_is_never_averaged_over():
    record = dict(seed=0, nfe=1, seconds=None, psnr_rgb=30.0)
    with pytest.raises(RuntimeError, match="3 results"):
        evaluate.summarise([record, record, {**record, "seed": 1}], [0, 1], 2)


def test_plot_labels_t_and_evaluations(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    point = dict(t=None, nfe=1, psnr_rgb=25.0, lpips=0.4)
    rows = [{**point, "name": "bicubic", "curve": None}, *({**point, "name": "s", "curve": "student", "t": t, "lpips": 0.4 - t / 10} for t in (0, 0.5)),
            {**point, "name": "f", "curve": "flow", "nfe": 16}]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figures.tradeoff(tmp_path / "plot.svg", rows)
    text = (tmp_path / "plot.svg").read_text()
    for label in ("t 0<", "t 0.5<", "16 NFE<", "bicubic<", "student<", "flow<"):
        assert label in text


@pytest.mark.parametrize("flags, cells", (
    ((), dict(degradation="bicubic", scale=4, sigma_p=0.1, image_size=32)),  # the file's own
    (("--sigma_n", "0.1", "--crop", "center"), dict(sigma_n=0.1, crop="center", sigma_p=0.1, image_size=32)),
    (("--dataset", "ffhq_noisy"), dict(degradation="avgpool", sigma_n=0.05, image_size=256, sigma_p=0.1)),  # sigma_p is the network's
    (("--dataset", "ffhq_noisy", "--sigma_p", "0.3"), dict(degradation="avgpool", sigma_p=0.3)),
))
def test_the_task_is_the_file_s_unless_flags_say_otherwise(files, flags, cells):
    network = evaluate.load_network(files / "student.safetensors", torch.device("cpu"), evaluate.parse_args(list(flags)))
    assert {cell: getattr(network.task, cell) for cell in cells} == cells and network.step == 7


def test_a_file_that_does_not_say_its_stage_takes_it_from_the_flag(tmp_path):
    save_network(tmp_path / "net.safetensors", None)
    with pytest.raises(InputError, match="--stage"):
        evaluate.load_network(tmp_path / "net.safetensors", torch.device("cpu"), evaluate.parse_args([]))
    assert evaluate.load_network(tmp_path / "net.safetensors", torch.device("cpu"), evaluate.parse_args(["--stage", "distill"])).stage == "distill"


# --- what a user gets ---


def shipped_to(tmp_path, *names, **more):
    """Runs with a weights.safetensors each, as training leaves them."""
    for name in names:
        save_network(tmp_path / name / "weights.safetensors", "distill")
    return [tmp_path / name / "weights.safetensors" for name in names]


def rows_of(path):
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def test_two_runs_weights_are_told_apart_by_their_folders(tmp_path, files):
    args = evaluate.parse_args([])
    names = lambda paths: [n.name for n in evaluate.load_networks(paths, torch.device("cpu"), args)]
    assert names(shipped_to(tmp_path, "out/a", "out/b")) == ["a_weights", "b_weights"]
    assert names(shipped_to(tmp_path, "x/run", "y/run")) == ["x_run_weights", "y_run_weights"]
    assert names([files / "student.safetensors"]) == ["student"]


def test_the_low_resolution_picture_has_8_bits_unless_told(files, tmp_path, monkeypatch, capsys):
    x = to_float(batch(smooth(1, 40, 48)))
    write(tmp_path / "photos", a_png=smooth(1, 40, 48))
    low = torch.nn.functional.interpolate(x, (10, 12), mode="bicubic", antialias=True)
    rounded = (low.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    shown = {}
    for flags, y, words in (((), rounded, "x4 in 8 bits"), (("--float_lr",), low, "x4 in float")):
        run(monkeypatch, "--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--t", "0", "--seeds", "1", *flags)
        assert words in capsys.readouterr().out
        shown[flags] = read_image(tmp_path / "out/bicubic/seed0/a.png")
        up = torch.nn.functional.interpolate(y, (40, 48), mode="bicubic", antialias=True)
        expected = (up[0].clamp(-1, 1) * 127.5 + 127.5).round().permute(1, 2, 0).numpy()
        assert (np.abs(shown[flags] - expected) > 0).mean() < 0.002 and np.abs(shown[flags] - expected).max() <= 1  # halfway may round either way
    assert not np.array_equal(*shown.values())


def test_out_dir_is_of_one_run(files, tmp_path, monkeypatch):
    write(tmp_path / "photos", a_png=smooth(1, 40, 48), b_png=smooth(2, 40, 48))
    common = ("--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--seeds", "1")
    run(monkeypatch, *common, "--t", "0,1")
    run(monkeypatch, *common, "--t", "1", "--pictures", "1")
    left = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert left == ["bicubic/seed0/a.png", "hr/a.png", "student_t1/seed0/a.png"]
    run(monkeypatch, "--pairs", tmp_path / "out/student_t1/seed0", tmp_path / "out/hr")  # as many as were measured
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(InputError, match="holds mine.txt, which evaluate.py did not write"):
        run(monkeypatch, *common)
    (tmp_path / "album/hr").mkdir(parents=True)
    with pytest.raises(InputError, match="holds hr, which"):  # not marked as ours, whatever it is called
        run(monkeypatch, *common[:-4], "--out_dir", tmp_path / "album")


def test_two_at_once_do_not_share_a_folder(files, tmp_path, monkeypatch):
    from filelock import FileLock
    write(tmp_path / "photos", a_png=smooth(1, 40, 48))
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"), pytest.raises(InputError, match="another evaluate.py writes into"):
        run(monkeypatch, "--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out")


def test_rk45_counts_in_float32_unless_told(files, tmp_path, monkeypatch, capsys):
    write(tmp_path / "photos", a_png=smooth(1, 40, 48))
    seen = []
    monkeypatch.setattr(evaluate, "restore", lambda *a, dtype, **how: seen.append((how["solver"], dtype)) or (a[1], 1))
    monkeypatch.setattr(evaluate, "pick_dtype", lambda name, device: torch.bfloat16)
    common = ("--ckpt", files / "flow.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--solver", "rk45,euler", "--seeds", "1")
    run(monkeypatch, *common)
    assert seen[0] == ("rk45", torch.float32) and {d for s, d in seen[1:]} == {torch.bfloat16} and "rk45: rtol 0.001, atol 0.001, float32" in capsys.readouterr().out
    run(monkeypatch, *common, "--dtype", "bfloat16")
    assert {d for _, d in seen[5:]} == {torch.bfloat16}


def trained(path, split, before=()):
    """A student that remembers the lists of a folders.Split."""
    net = UNet(**network_config("tiny", sigma_p=0.1, sigma_d=0.1), one_step=True)
    save_release(path, net, dict(stage="distill", task=asdict(TASK), step=1, data={**folders.remember(split), "before": list(before)}))
    return path


def test_what_was_trained_on_is_not_measured_as_if_it_were_new(tmp_path, monkeypatch, capsys):
    """README's pair of commands: train on DIR, evaluate on DIR."""
    write(tmp_path / "photos", **{f"p{i:02}_png": smooth(i, 40, 40) for i in range(12)})
    split = data.find_split(TASK, tmp_path / "photos")
    student = trained(tmp_path / "s.safetensors", split)
    common = ("--ckpt", student, "--out_dir", tmp_path / "out", "--t", "0", "--seeds", "1")
    run(monkeypatch, *common, "--data_dir", tmp_path / "photos")
    assert sorted(p.name for p in (tmp_path / "out/hr").iterdir()) == split.val
    assert f"less {len(split.train)} trained on" in capsys.readouterr().out
    write(tmp_path / "copies", x_png=smooth(int(split.train[0][1:3]), 40, 40))  # one of them under another name
    with pytest.raises(InputError, match="all 1 pictures of .*copies were trained on by s: "):
        run(monkeypatch, *common, "--data_dir", tmp_path / "copies")
    run(monkeypatch, *common, "--data_dir", tmp_path / "copies", "--trained_too")
    out = capsys.readouterr().out
    assert "1 of them trained on" in out and f"trained on {len(split.train)} pictures, list {folders.list_hash(split)}" in out
    write(tmp_path / "namesakes", **{split.train[0].replace(".png", "_png"): smooth(99, 40, 40)})
    run(monkeypatch, *common, "--data_dir", tmp_path / "namesakes")
    assert "have the names of pictures that were trained on" in capsys.readouterr().err
    pupil = trained(tmp_path / "pupil.safetensors", folders.Split(tmp_path, [], [], {}, ""), [folders.remember(split)])  # what its teacher saw counts
    with pytest.raises(InputError, match="trained on by pupil"):
        run(monkeypatch, "--ckpt", pupil, *common[2:], "--data_dir", tmp_path / "copies")


def test_truth_is_not_enlarged(tmp_path, monkeypatch):
    write(tmp_path / "photos", a_png=smooth(0, 300, 300), b_png=smooth(1, 200, 240))
    with pytest.raises(InputError, match=r"b.png is 240 x 200, smaller than the 256 pixels of ffhq: truth is not enlarged"):
        run(monkeypatch, "--dataset", "ffhq", "--val_list", "none", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out")


def test_other_methods_are_rows_by_their_folders(files, tmp_path, monkeypatch, capsys):
    truth = {f"p{i}": smooth(i, 40, 48) for i in range(3)}
    write(tmp_path / "photos", **{f"{name}_png": x for name, x in truth.items()})
    write(tmp_path / "theirs", **{f"{name}_bmp": np.uint8(np.clip(x.astype(int) + 8, 0, 255)) for name, x in truth.items()})
    common = ("--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--t", "0", "--seeds", "1")
    run(monkeypatch, *common, "--methods", f"DDRM:20={tmp_path / 'theirs'}", "--json", tmp_path / "s.json", "--figure", tmp_path / "f.png", "--figure_pictures", "p1")
    row = rows_of(tmp_path / "s.json")["DDRM"]
    expected = [10 * np.log10(255**2 / np.mean((np.clip(x.astype(int) + 8, 0, 255) - x.astype(float)) ** 2)) for x in truth.values()]
    assert row["psnr_rgb"] == pytest.approx(np.mean(expected)) and (row["nfe"], row["seconds"], row["seeds"]) == (20, None, [0])
    assert Image.open(tmp_path / "f.png").size == (4 * 256, 552)  # bicubic, DDRM, the student, the truth
    assert (tmp_path / "theirs/p0.bmp").is_file() and not (tmp_path / "out/DDRM").exists()
    (tmp_path / "theirs/p1.bmp").rename(tmp_path / "theirs/q.bmp")
    for flags, words in (((), "DDRM has no p1"), (("--pictures", "1"), None)):
        try:
            run(monkeypatch, *common, "--methods", f"DDRM={tmp_path / 'theirs'}", *flags)
            assert words is None
        except InputError as e:
            assert words in str(e)
    (tmp_path / "theirs/q.bmp").rename(tmp_path / "theirs/p1.bmp")
    write(tmp_path / "theirs", extra_png=smooth(9, 40, 48))
    with pytest.raises(InputError, match="extra.png of DDRM has no true picture"):
        run(monkeypatch, *common, "--methods", f"DDRM={tmp_path / 'theirs'}")
    with pytest.raises(InputError, match="two rows would be called bicubic"):
        run(monkeypatch, *common, "--methods", f"bicubic={tmp_path / 'theirs'}")


def test_a_result_may_have_the_name_of_the_small_picture_it_was_made_from(tmp_path):
    for name in ("a_LR4", "b_LR4", "c"):
        write(tmp_path, **{f"{name}_png": smooth(0, 8, 8)})
    row, = evaluate.find_methods([("DDNM", 100, tmp_path)], ["a_HR", "b_HR", "c"], True, set())
    assert {stem: path.name for stem, path in row.results.items()} == {"a_HR": "a_LR4.png", "b_HR": "b_LR4.png", "c": "c.png"}
    with pytest.raises(InputError, match="DDNM has no d_HR"):
        evaluate.find_methods([("DDNM", 100, tmp_path)], ["a_HR", "b_HR", "c", "d_HR"], True, set())


def test_choosing_t():
    asked = []
    falling = lambda t: asked.append(t) or 31 - 3 * t**2
    assert abs(evaluate.choose_t(falling, 29.0) - (2 / 3) ** 0.5) <= 1 / 64 and len(asked) == 8
    assert evaluate.choose_t(falling, 20.0) == 1 and evaluate.choose_t(falling, 40.0) == 0  # beyond both ends: the nearer one
    assert abs(evaluate.choose_t(lambda t: (t - 0.7) ** 2) - 0.7) <= 1 / 32 and evaluate.choose_t(lambda t: t, lower=False) == 1
    assert abs(evaluate.choose_t(lambda t: 1 + t, 1.3) - 0.3) <= 1 / 64  # rising


def test_tune_t_finds_the_goal_on_the_pictures(files, tmp_path, monkeypatch, capsys):
    write(tmp_path / "photos", a_png=smooth(1, 40, 48))
    common = ("--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--seeds", "1", "--json", tmp_path / "s.json")
    run(monkeypatch, *common, "--t", "0,1")
    ends = [rows_of(tmp_path / "s.json")[f"student_t{t}"]["psnr_rgb"] for t in (0, 1)]
    goal = sum(ends) / 2
    capsys.readouterr()
    run(monkeypatch, *common, "--tune_t", f"psnr_rgb={goal:.4f}")
    out = capsys.readouterr().out
    t = float(out.split("student: --t ")[1].split()[0])
    rows = rows_of(tmp_path / "s.json")
    nearest = min(abs(r["psnr_rgb"] - goal) for n, r in rows.items() if n != "bicubic")
    assert abs(rows[f"student_t{t:g}"]["psnr_rgb"] - goal) == pytest.approx(nearest, abs=1e-9)  # several t may lie equally far off: this dial hardly turns
    for flags, words in ((("--tune_t", "lpips"), "is not among --metrics"), (("--tune_t", "psnr_rgb=25", "--t", "1"), "one or the other")):
        with pytest.raises(InputError, match=words):
            run(monkeypatch, *common, *flags)


def test_t_beyond_0_and_1_is_asked_of_students_alone_and_said(files, tmp_path, monkeypatch, capsys):
    write(tmp_path / "photos", a_png=smooth(1, 40, 48))
    common = ("--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--seeds", "1", "--t=-0.5,2", "--json", tmp_path / "s.json")
    run(monkeypatch, "--ckpt", files / "student.safetensors", *common)
    assert "t = -0.5, 2: no network was trained there" in capsys.readouterr().err and "student_t-0.5" in rows_of(tmp_path / "s.json")
    with pytest.raises(InputError, match="only a student"):
        run(monkeypatch, "--ckpt", files / "flow.safetensors", *common)


def test_another_factor_than_the_network_s(files, tmp_path, monkeypatch, capsys):
    """Fig. 17: trained on 4, asked for 3, at a size that 3 does not divide."""
    write(tmp_path / "photos", a_png=smooth(1, 40, 50))
    run(monkeypatch, "--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--seeds", "1", "--t", "0", "--scale", "3")
    assert read_image(tmp_path / "out/student_t0/seed0/a.png").shape == (39, 48, 3) and "H bicubic x3" in capsys.readouterr().out


def test_a_fraction_for_a_factor(files, tmp_path, monkeypatch, capsys):
    """Fig. 17: at 3.5 sides are multiples of 7, the low-resolution picture has 2/7 of each, and bicubic is PyTorch's there and back."""
    write(tmp_path / "photos", a_png=smooth(1, 40, 50))
    common = ("--ckpt", files / "student.safetensors", "--data_dir", tmp_path / "photos", "--out_dir", tmp_path / "out", "--seeds", "1", "--t", "0")
    run(monkeypatch, *common, "--scale", "3.5", "--float_lr", "--metrics", "psnr_rgb,consistency", "--json", tmp_path / "s.json")
    x = to_float(torch.from_numpy(smooth(1, 40, 50)[:35, :49]).permute(2, 0, 1)[None])
    low = F.interpolate(x, size=(10, 14), mode="bicubic", antialias=True)
    right = to_uint8(F.interpolate(low, size=(35, 49), mode="bicubic", antialias=True))[0].numpy()
    assert (read_image(tmp_path / "out/bicubic/seed0/a.png") == right).all()
    assert read_image(tmp_path / "out/student_t0/seed0/a.png").shape == (35, 49, 3) and "multiples of 7), H bicubic x3.5" in capsys.readouterr().out
    assert 0 < rows_of(tmp_path / "s.json")["bicubic"]["consistency"] < math.inf
    for flags, words in ((("--degradation", "avgpool"), "avgpool takes whole factors"), (("--lr_dir", tmp_path / "photos"), "a whole number of times smaller")):
        with pytest.raises(InputError, match=words):
            run(monkeypatch, *common, "--scale", "3.5", *flags)
    with pytest.raises(SystemExit):
        run(monkeypatch, *common, "--scale", "3.333")
    assert "more than two decimals" in capsys.readouterr().err


# --- what is wrong is said in one line, before any work ---


@pytest.mark.parametrize("flags, words", (
    (("--ckpt", "student.safetensors", "--steps", "4"), "--solver and --steps are for"),
    (("--ckpt", "flow.safetensors", "--solver", "rk45", "--steps", "4"), "without --steps"),
    (("--ckpt", "flow.safetensors", "--stage", "distill"), "its stage is flow"),
    (("--ckpt", "nothing.pt"), "at nothing.pt"),
    (("--ckpt", "student.safetensors", "student.safetensors"), "is named twice"),
    (("--ckpt", "student.safetensors", "x8.safetensors"), "scale 4 and 8"),
    (("--ckpt", "unknown.safetensors"), "--dataset"),
    (("--ckpt", "student.safetensors", "--data_dir", "nowhere"), "no folder nowhere"),
    (("--ckpt", "student.safetensors", "--data_dir", "small"), "small/a.png is 20 x 20"),
    (("--ckpt", "student.safetensors", "--data_dir", "broken"), "broken/b.png cannot be read"),
    (("--ckpt", "student.safetensors", "--out_dir", "photos"), "--out_dir photos"),
    (("--ckpt", "student.safetensors", "--tile", "64"), "twice --tile_pad"),
    (("--plot", "plot.gif"), ".png, .pdf or .svg"),
    (("--pairs", "photos", "photos", "--plot", "plot.png"), "without --plot"),
    (("--json", "photos"), "is a folder"),
))
def test_bad_input_is_one_line_and_leaves_nothing(files, tmp_path, monkeypatch, flags, words):
    for name in ("student.safetensors", "flow.safetensors", "photos"):
        (tmp_path / name).symlink_to(files / name)
    if "x8.safetensors" in flags:
        save_network(tmp_path / "x8.safetensors", "flow", data.Task("photos", scale=8, crop="random"))
    if "unknown.safetensors" in flags:
        save_release(tmp_path / "unknown.safetensors", UNet(**network_config("tiny", sigma_p=0.1, sigma_d=0.1)), dict(stage="flow", task=None))
    write(tmp_path / "small", a_png=smooth(0, 20, 20))
    write(tmp_path / "broken", a_png=smooth(0, 40, 40), b_png=smooth(0, 40, 40))
    (tmp_path / "broken/b.png").write_bytes((tmp_path / "broken/b.png").read_bytes()[:500])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words) as e:
        run(monkeypatch, *(() if "--data_dir" in flags or "--pairs" in flags else ("--data_dir", "photos")), *flags)
    assert "\n" not in str(e.value) and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags, words", ((("--solver", "midpoint,rk4"), "no solver 'rk4'"), (("--steps", "1,0"), "out of range"), (("--t", "half"), "is not a number"),
                                          (("--seeds", "0"), "out of range"), (("--see", "2"), "unrecognized")))
def test_a_bad_flag_is_refused_by_name(flags, words, capsys):
    with pytest.raises(SystemExit) as e:
        evaluate.main(list(flags))
    assert e.value.code == 2 and words in capsys.readouterr().err


def test_the_command_ends_with_its_own_name_and_an_error_code(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--data_dir", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "evaluate.py: no folder nowhere\n")


def test_multiply_accumulates_of_the_standard_layers_are_table_10s():
    with torch.device("meta"):
        net = UNet(**network_config("imagenet"))
    assert round(count_macs(net, 256, 256, standard=True) / 1e12, 2) == 1.11 and sum(p.numel() for p in net.parameters()) == 552_820_998
    with torch.device("meta"):
        small = UNet(**network_config("tiny", sigma_p=0.1, sigma_d=0.1))
    assert count_macs(small, 256, 256) < count_macs(small, 256, 256, standard=True)  # what UpConv saves


def test_frechet_distances_of_two_folders_need_no_pairs(tmp_path, monkeypatch, capsys):
    """FID of N drawn pictures against a folder (Appendix F), with features that are the pictures' means."""
    write(tmp_path / "drawn", a_png=smooth(1, 40, 40), b_png=smooth(2, 40, 40), c_png=smooth(3, 40, 40))
    write(tmp_path / "real", x_png=smooth(4, 40, 48), sub__y_png=smooth(5, 48, 40))
    features = lambda files: np.stack([read_image(f).mean(axis=(0, 1)) for f in files]).astype(np.float64)
    monkeypatch.setattr(metrics, "load_vgg16", lambda *a: features)
    run(monkeypatch, "--pairs", tmp_path / "drawn", tmp_path / "real", "--metrics", "fd_vgg16", "--json", tmp_path / "s.json")
    said = capsys.readouterr()
    assert "3 pictures of" in said.out and "against 2 of" in said.out and "fd_vgg16 of 2 pictures" in said.err
    expected = metrics.frechet_distance(features(sorted((tmp_path / "drawn").iterdir())), features(sorted((tmp_path / "real").rglob("*.png"))))
    assert json.loads((tmp_path / "s.json").read_text())["rows"][0]["fd_vgg16"] == pytest.approx(expected)


# --- the real world's table ---


@pytest.fixture
def without_networks(monkeypatch):
    """No LPIPS, no pyiqa, no Inception: what a bare machine measures."""
    monkeypatch.setattr(metrics, "load_lpips", lambda *_: None)

    def missing(name, *_):
        raise metrics.Missing("it is not here")
    monkeypatch.setattr(metrics, "load_pyiqa", missing)
    monkeypatch.setattr(metrics, "load_inception", missing)


def test_pairs_are_written_once_and_laid_out_as_table_4(files, tmp_path, monkeypatch, capsys, without_networks):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photos", val__a_png=smooth(4, 203, 210), val__deep__b_png=smooth(5, 208, 201), c_png=smooth(6, 200, 200))
    make = ["--dataset", "photos_real", "--strength", "0.5", "--data_dir", "photos", "--write_pairs", "pairs"]
    evaluate.main(make)
    first = {p: p.read_bytes() for p in Path("pairs").rglob("*") if p.is_file()}
    assert {str(p) for p in first} == {"pairs/pairs.json", *(f"pairs/{k}r/val_{n}_{k.upper()}R{'4' if k == 'l' else ''}.png" for k in "hl" for n in ("a", "deep_b"))}
    evaluate.main(make)
    said = capsys.readouterr().out.splitlines()
    digest = json.loads(Path("pairs/pairs.json").read_text())["sha256"][:12]
    assert "2 pairs written" in said[0] and "unchanged" in said[1] and digest in said[0] and digest in said[1]
    assert first == {p: p.read_bytes() for p in Path("pairs").rglob("*") if p.is_file()}

    nets = ["--ckpt", files / "flow.safetensors", files / "student.safetensors", "--seeds", "1", "--device", "cpu"]
    run(monkeypatch, "--dataset", "photos_real", "--strength", "0.5", "--data_dir", "photos", "--seeds", "1", "--metrics", "psnr_rgb", "--json", "there.json", "--ckpt", files / "student.safetensors")
    evaluate.main([*map(str, nets), "--table", "realsr", "--data_dir", "pairs/hr", "--lr_dir", "pairs/lr", "--json", "pairs.json"])
    out, told = capsys.readouterr()
    there, here = (json.loads(Path(f).read_text())["rows"] for f in ("there.json", "pairs.json"))
    assert here[0]["psnr_rgb"] == there[0]["psnr_rgb"] and digest in out  # the same accidents as where they are made on the way
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert table[0] == ["pairs/lr", "PSNR (↑)", "NIQE (↓)"]
    assert [row[0] for row in table[2:]] == ["bicubic", "flow-15s", *(f"student-1s (t = {t})" for t in ("1", "0.5", "0"))]
    best = max(here, key=lambda row: row["psnr_rgb"])
    assert [row[1] for row in table[2:] if "**" in row[1]] == [f"**{best['psnr_rgb']:.3f}**"]
    assert all(f"{name} is left out: it is not here" in told for name in ("fid_tf", "musiq", "maniqa", "clipiqa"))

    with pytest.raises(InputError, match="other pictures or another H"):
        evaluate.main([*make, "--strength", "1"])
    write_picture(Path("pairs/lr/val_a_LR4.png"), smooth(7, 50, 52))
    for again in (make, ["--table", "realsr", "--data_dir", "pairs/hr", "--lr_dir", "pairs/lr", *map(str, nets)]):
        with pytest.raises(InputError, match="does not hold the pairs that were written"):
            evaluate.main(again)


def test_pictures_without_truth_as_table_5(files, tmp_path, monkeypatch, capsys, without_networks):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "found", a_png=smooth(4, 51, 53), deep__b_png=smooth(5, 52, 50))
    write(tmp_path / "others", a_png=smooth(6, 204, 212), deep__b_png=smooth(7, 208, 200))
    flags = ["--ckpt", str(files / "student.safetensors"), "--no_truth", "found", "--seeds", "1", "--device", "cpu"]
    evaluate.main([*flags, "--table", "realsr", "--methods", "Others:4=others", "--json", "scores.json"])
    out, told = capsys.readouterr()
    rows = json.loads(Path("scores.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["bicubic", "Others", "student_t1", "student_t0.5", "student_t0"] and "liqe is left out" in told
    want = np.mean([metrics.niqe(metrics.luma(torch.from_numpy(read_image(Path("others") / n)).permute(2, 0, 1)[None])).item() for n in ("a.png", "deep/b.png")])
    assert rows[1]["niqe"] == pytest.approx(want, rel=1e-9)
    assert "| found | NIQE (↓) |" in out and "| Others-4s | " in out and Image.open("out/eval/student_t1/seed0/a.png").size == (212, 204)
    with pytest.raises(InputError, match="psnr_rgb needs true pictures"):
        evaluate.main([*flags, "--metrics", "niqe,psnr_rgb"])
    with pytest.raises(InputError, match="goes without --data_dir"):
        evaluate.main([*flags, "--data_dir", "others"])
    with pytest.raises(InputError, match="nothing is left to measure of --metrics fid"):
        evaluate.main(["--pairs", "others", "others", "--metrics", "fid", "--device", "cpu"])
    write(tmp_path / "found", small_png=smooth(8, 30, 47))
    with pytest.raises(InputError, match="found/small.png of 188 x 120 is too small"):  # 4 times larger; before any work
        evaluate.main([*flags, "--metrics", "niqe", "--out_dir", "untouched"])
    assert not Path("untouched").exists()
