"""runs.py and the boards: what a training's folder and others' boards show of it, resumed, too."""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import boards
import runs
import train_flow
import training
from console import InputError
from pictures import read_image
from test_train import ROOT, SMALL, log_of, photos, signals, teacher  # noqa: F401, fixtures

FLOW = ["--max_iters", "6", "--eval_interval", "2", "--log_interval", "1", "--dtype", "float32"]


def train(photos, out, *flags):  # noqa: F811
    train_flow.main([*SMALL, "--data_dir", str(photos), "--out_dir", str(out), *FLOW, *map(str, flags)])


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):  # noqa: F811
    """Two flows, the second resumed after 4 updates: their folders."""
    folder = tmp_path_factory.mktemp("out")
    train(photos, folder / "a")
    train(photos, folder / "b", "--learning_rate", 1e-4, "--max_iters", 4)
    train(photos, folder / "b", "--learning_rate", 1e-4, "--init_from", "resume")
    return folder


# --- what the folder holds ---


def test_where_a_run_stands_and_what_tells_two_apart(trained, capsys):
    runs.main([str(trained / "a"), str(trained / "b" / "log.jsonl")])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("a: step 6 of 6, loss") and "learning_rate: a 0.001, b 0.0001" in said
    assert not any(line.startswith(("out_dir", "init_from", "batch_size")) for line in said)
    best = max((line["psnr_one"], line["step"]) for line in log_of(trained / "a") if "psnr_one" in line)
    assert any(line.endswith(f"best {best[0]:.2f} at step {best[1]}") and "psnr_one" in line for line in said)
    assert [line.partition(" from ")[2][:7] for line in said if line.startswith("  started")] == ["step 0:", "step 0:", "step 4:"]


def test_every_start_notes_code_versions_and_machine(trained):
    first, second = runs.read_run(trained / "b").starts
    for start in (first, second):
        assert {"python", "torch", "numpy"} <= set(start["versions"]) and {"system", "cpus", "cpu", "threads", "gpu", "processes"} <= set(start["machine"])
        assert start["settings"]["learning_rate"] == 1e-4 and start["task"]["model"] == "tiny" and start["git"] == revision()
    assert (first["step"], second["step"]) == (0, 4)


def revision():
    """None where this is no git repository."""
    return subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True).stdout.strip() or None


def test_somebody_elses_repository_is_not_ours(tmp_path, monkeypatch):
    """Installed into a folder of another project, whose revision would be noted."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(training, "__file__", str(tmp_path / "lib" / "training.py"))
    run = SimpleNamespace(device=training.torch.device("cpu"), world=1, settings={}, task=train_flow.data.TASKS["photos"])
    assert training.about(run, SimpleNamespace(step=0))["git"] is None


def test_curves(trained, tmp_path, capsys):
    """Every number of both logs is drawn; the file is what its name says."""
    matplotlib = pytest.importorskip("matplotlib")
    seen = {}
    from matplotlib.axes import Axes
    drawn, Axes.plot = Axes.plot, lambda axes, x, y, *a, **k: (seen.setdefault(k.get("label"), []).append((list(x), list(y))), drawn(axes, x, y, *a, **k))[1]
    try:
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            runs.main([str(trained / "a"), str(trained / "b"), "--plot", str(tmp_path / "both.svg")])
    finally:
        Axes.plot = drawn
    for name in ("a", "b"):
        log = log_of(trained / name)
        assert ([1, 2, 3, 4, 5, 6], pytest.approx([line["loss"] for line in log if "loss" in line])) in seen[None]
        assert ([2, 4, 6], [line["psnr_few"] for line in log if "psnr_few" in line]) in seen[f"{name} few"]
        assert any(len(x) == 10 for x, _ in seen[name])  # the loss over t
    text = (tmp_path / "both.svg").read_text()
    assert all(word in text for word in ("loss by t, last fifth", "PSNR", "LPIPS", "images/s", "learning rate", ">a few<"))
    runs.main([str(trained / "b"), "--plot", str(tmp_path / "one.png")])
    assert read_image(tmp_path / "one.png").std() > 10


def test_a_students_curves(photos, teacher, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("matplotlib")
    import distill
    distill.main([*SMALL, "--data_dir", str(photos), "--out_dir", str(tmp_path / "s"), "--teacher", str(teacher), *FLOW])
    parts = []
    monkeypatch.setattr(runs, "by_part", lambda panel, run, colour, alone, draw=runs.by_part: (draw(panel, run, colour, alone), parts.extend(panel.get_legend_handles_labels()[1])))
    runs.main([str(tmp_path / "s"), "--plot", str(tmp_path / "s.png"), "--pictures", str(tmp_path / "p.png")])
    assert parts == ["distill", "align", "bc"] and (tmp_path / "s.png").stat().st_size > 10_000 and (tmp_path / "p.png").is_file()


def test_pictures_over_time(trained, tmp_path):
    """x_lr, the result of the first and of the last validation, x_1, each where it stands in val_STEP.png."""
    runs.main([str(trained / "a"), "--pictures", str(tmp_path / "p.png"), "--show", "one", "--columns", "2"])
    shown = read_image(tmp_path / "p.png")[runs.BAND:]
    first, last = (read_image(trained / "a" / f"val_{step:07d}.png") for step in (2, 6))
    side = first.shape[1] // 4  # lr, one, few, truth
    right = np.hstack([first[:, :side], first[:, side : 2 * side], last[:, side : 2 * side], first[:, 3 * side :]])
    assert np.array_equal(shown, right)
    with pytest.raises(InputError, match="--show t1: the validations of .* have lr, one, few"):
        runs.main([str(trained / "a"), "--pictures", str(tmp_path / "p.png"), "--show", "t1"])


@pytest.mark.parametrize("written, words", [(None, "holds no log.jsonl"), ("", "no line of a step yet"), ('{"step": 1, "psnr_lr": 3}\n{"st', "no line of a step yet"), ("[]\n7\n\xff", "no line")])
def test_a_folder_without_a_training(written, words, tmp_path):
    if written is not None:
        (tmp_path / "log.jsonl").write_text(written)
    with pytest.raises(InputError, match=words):
        runs.main([str(tmp_path)])


def test_a_log_that_is_being_written(trained, tmp_path, capsys):
    """The last line is cut short, there are no validations and no starts yet."""
    lines = [json.dumps(line) for line in log_of(trained / "a") if "loss" in line]
    (tmp_path / "log.jsonl").write_text("\n".join(lines)[:-20])
    runs.main([str(tmp_path)])
    assert f"step {len(lines) - 1}, loss" in capsys.readouterr().out
    with pytest.raises(InputError, match="no val_STEP.png"):
        runs.main([str(tmp_path), "--pictures", str(tmp_path / "p.png")])


# --- boards ---


def test_tensorboard_shows_what_the_log_does(photos, tmp_path):  # noqa: F811
    """Numbers and pictures, of a resumed run without what came twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(photos, tmp_path, "--tensorboard", "--max_iters", 4)
    train(photos, tmp_path, "--tensorboard", "--init_from", "resume")
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    log = log_of(tmp_path)
    for tag, name in (("training/loss", "loss"), ("psnr/one", "psnr_one")):
        assert [(e.step, e.value) for e in shown.Scalars(tag)] == [(line["step"], pytest.approx(line[name])) for line in log if name in line]
    assert [e.step for e in shown.Images("validation")] == [2, 4, 6] and len([t for t in shown.Tags()["scalars"] if t.startswith("loss_by_t/")]) == 10


STAND_IN = """
import json, os, subprocess, sys
TAKE = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
class Image:
    def __init__(self, picture): self.shape = picture.shape
class Board:
    def __init__(self, **how): self.lines = open(os.path.join(how["dir"], "wandb.txt"), "a"); self.write(dict(init={k: how[k] for k in ("project", "name", "id", "resume")}, seed=how["config"]["seed"]))
    def write(self, x): print(json.dumps(x), file=self.lines, flush=True)
    def define_metric(self, name, step_metric): self.write([name, step_metric])
    def log(self, x):
        if x["step"] == 2: assert b"BlockingIOError" in subprocess.run([sys.executable, "-c", TAKE, os.path.join(os.path.dirname(self.lines.name), "starts.jsonl")], capture_output=True).stderr
        if x["step"] == int(os.environ.get("FAIL_AT", -1)): raise RuntimeError("no network")
        self.write({k: v.shape if isinstance(v, Image) else v for k, v in x.items()})
    def finish(self): self.write("finish")
init = lambda **how: Board(**how)
"""


def test_wandb(photos, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Through a stand-in of its interface: a resumed run is the same run there; a board that fails costs the training nothing. The folder stays taken meanwhile."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    train(photos, tmp_path / "out", "--wandb", "--max_iters", 4)
    train(photos, tmp_path / "out", "--wandb", "--init_from", "resume")
    told = [json.loads(line) for line in (tmp_path / "out" / "wandb.txt").read_text().splitlines()]
    first, second = (line["init"] for line in told if "init" in line)
    assert first == second and first["project"] == "oftsr" and first["name"] == "out" and first["resume"] == "allow" and told.count("finish") == 2
    assert [line["training/loss"] for line in told if "training/loss" in line] == [line["loss"] for line in log_of(tmp_path / "out") if "loss" in line]
    assert [line["step"] for line in told if "validation" in line] == [2, 4, 6]
    monkeypatch.setenv("FAIL_AT", "3")
    train(photos, tmp_path / "other", "--wandb")
    assert "a board is left out from here on: RuntimeError: no network" in capsys.readouterr().out and log_of(tmp_path / "other")[-1]["step"] == 6
    told = (tmp_path / "other" / "wandb.txt").read_text()
    assert '"step": 2,' in told and '"step": 3,' not in told and first["id"] not in told
    monkeypatch.delitem(sys.modules, "wandb")


@pytest.mark.parametrize("name", boards.MODULES)
def test_a_board_that_is_not_there_is_one_line(name, photos, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, boards.MODULES[name], None)
    with pytest.raises(InputError, match=f"--{name} needs {name}: pip install {name}"):
        train(photos, tmp_path / "out", f"--{name}")
    assert not (tmp_path / "out").exists()
