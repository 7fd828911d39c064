"""Training that survives: kills, signals, broken and hostile files, full disks, restarts, other numbers of processes."""
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import warnings
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import folders
import metrics
import runs
import teachers
import train_flow
import training
from checkpoints import load_checkpoint, load_tensors, save_checkpoint
from console import InputError, read_lines
from degradations import degrade, to_float
from kernels import to_uint8
from machine import join_processes
from metrics import psnr_rgb
from model import Stage, load_model, network_of, save_release
from teachers import read_state
from test_model import tiny
from test_train import ROOT, SMALL, gradient, log_of, photos, run, same, signals, teacher, torchrun  # noqa: F401, fixtures

TASK = replace(data.TASKS["photos"], image_size=16)
FLOW = ["--eval_interval", 4, "--log_interval", 1]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):  # noqa: F811
    """A run of 8 steps, undisturbed: its checkpoint."""
    return run(train_flow, photos, tmp_path_factory.mktemp("whole"), "--max_iters", 8, *FLOW)


def command(photos, out, *flags):  # noqa: F811
    return [sys.executable, str(ROOT / "train_flow.py"), *SMALL, "--data_dir", str(photos), "--out_dir", str(out), *map(str, flags)]


def flip(path, place):
    """Flip a bit in the middle of a byte, at that share of the file."""
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * place)] ^= 0x10
    path.write_bytes(raw)


# --- signals ---


def test_a_signal_to_the_whole_group_saves_though_loaders_run(photos, tmp_path):  # noqa: F811
    """As torchrun, timeout, systemd and Slurm send it: to the processes that load, too."""
    with subprocess.Popen(command(photos, tmp_path, "--max_iters", 100_000, "--num_workers", 2), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("step 4 "):
                os.killpg(process.pid, signal.SIGTERM)
                break
        rest = process.stdout.read()
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert process.returncode == 143 and step >= 4 and f"stopped by a signal at step {step}" in rest


def test_a_signal_during_a_validation_finds_everything_saved(photos, tmp_path, monkeypatch, whole):  # noqa: F811
    """Saved before, looked for between pictures; the validation that was broken off is the first thing that a resumed run does."""
    degraded, pictures = training.degrade, data.validation_pictures
    monkeypatch.setattr(data, "validation_pictures", lambda *args: pictures(*args).repeat(2, 1, 1, 1))
    monkeypatch.setattr(training, "degrade", lambda *args: (os.kill(os.getpid(), signal.SIGUSR1), degraded(*args))[1])
    with pytest.raises(SystemExit) as e:
        run(train_flow, photos, tmp_path, "--max_iters", 8, *FLOW)
    assert e.value.code == 128 + signal.SIGUSR1 and load_checkpoint(tmp_path / "ckpt.pt")["step"] == 4
    assert not any("psnr_lr" in entry for entry in log_of(tmp_path))
    monkeypatch.setattr(training, "degrade", degraded)
    monkeypatch.setattr(data, "validation_pictures", pictures)
    parts = run(train_flow, photos, tmp_path, "--max_iters", 8, "--init_from", "auto", *FLOW)
    assert same(parts, whole) and [e["step"] for e in log_of(tmp_path) if "psnr_lr" in e] == [4, 8]


def test_a_terminal_that_goes_away_is_no_reason_to_end(tmp_path):
    training.Tolerant(None).write("there was none, after >&-\n")
    read, write = os.pipe()
    os.close(read)
    stream = training.Tolerant(os.fdopen(write, "w", buffering=1))
    stream.write("lost\n")
    stream.write("lost too\n")
    stream.flush()
    stream.close()


def test_an_ignored_signal_stays_ignored():
    """nohup's."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    training.Signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL


def test_a_program_that_ends_while_others_load_for_it_ends(photos):  # noqa: F811
    """They ignore SIGTERM, by which multiprocessing ends what is left at exit, to wait for it then."""
    code = ("import sys, data\nfrom pathlib import Path\n"
            "loader = data.training_batches(sorted(Path(sys.argv[1]).glob('*')), data.replace(data.TASKS['photos'], image_size=16), 0, 1, 0, 0, 1, 2)\n"
            "print([*next(loader)[0].shape], [process.pid for process in data.multiprocessing.active_children()])")
    done = subprocess.run([sys.executable, "-c", code, photos], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("[1, 3, 16, 16] [") and "Error" not in done.stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in json.loads(done.stdout.split("] ", 1)[1]))


# --- one command that starts and goes on ---


def test_the_same_command_starts_and_goes_on(photos, tmp_path, whole, monkeypatch, capsys):  # noqa: F811
    """And a loader's process that is killed, as by a full /dev/shm, costs no step."""
    item = data.Pictures.__getitem__

    def killed(self, key):
        if key[1] == 11 and torch.utils.data.get_worker_info():  # of the sixth step
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, key)
    monkeypatch.setattr(data.Pictures, "__getitem__", killed)
    same_command = ["--max_iters", 8, "--num_workers", 1, "--init_from", "auto", "--eval_interval", 100, "--log_interval", 1]
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run(train_flow, photos, tmp_path, *same_command)
    step = load_checkpoint(tmp_path / "ckpt.pt")["step"]
    assert 2 <= step <= 5 and f"saved step {step}" in capsys.readouterr().out  # the loader is some batches ahead
    monkeypatch.setattr(data.Pictures, "__getitem__", item)
    for again in range(2):  # the second time it is finished: nothing to do
        assert same(run(train_flow, photos, tmp_path, *same_command)["params"], whole["params"])
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [s["step"] for s in starts] == [0, step, 8] and starts[0]["settings"]["seed"] == 1337 and "torch" in starts[0]["versions"]


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_loader_that_dies_while_it_hands_over_is_a_dead_loader(error):
    def loader():
        raise error
        yield
    with pytest.raises(RuntimeError, match="DataLoader worker exited"):
        training.next_batch(SimpleNamespace(), loader())


def test_a_killed_rank_brings_the_job_back(photos, tmp_path):  # noqa: F811
    """torchrun --max-restarts 1: rank 1 is killed (-9) in the first life; the end is that of an undisturbed run with the same global batch."""
    script = tmp_path / "once.py"
    script.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_flow, training
def update(run, state, update=training.update):
    if run.rank == 1 and state.step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(run, state)
training.update = update
training.program(train_flow.main, "once.py")
""")
    flags = [*SMALL, "--data_dir", photos, "--max_iters", 8, "--dtype", "float32", *FLOW]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", str(script),
                           *map(str, flags), "--batch_size", "1", "--out_dir", str(tmp_path / "two"), "--init_from", "auto"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "two" / "starts.jsonl").read_text().splitlines()) == 2
    one, two = run(train_flow, photos, tmp_path / "one", *flags[len(SMALL) + 2:]), load_checkpoint(tmp_path / "two" / "ckpt.pt")
    assert two["step"] == 8 and list((tmp_path / "two").glob(".*")) == []
    for a, b in zip(one["ema"]["shadow_params"], two["ema"]["shadow_params"], strict=True):
        assert (a - b).abs().max() < 1e-4  # sums in another order, of which Adam makes a little more


def test_another_number_of_processes_goes_on_with_the_same_pictures(photos, tmp_path, capsys):  # noqa: F811
    """Four steps of one process, then four of two: batch_size halves by itself, and what comes out is the run of one process."""
    flags = ["--batch_size", 4, "--dtype", "float32", *FLOW]
    one = run(train_flow, photos, tmp_path / "one", "--max_iters", 8, *flags)
    run(train_flow, photos, tmp_path / "two", "--max_iters", 4, *flags)
    done = torchrun(2, "train_flow.py", *SMALL, "--data_dir", photos, "--out_dir", tmp_path / "two", "--max_iters", 8, *flags, "--init_from", "resume")
    assert done.returncode == 0, done.stderr
    assert "2 processes, not 1: --batch_size 2 --gradient_accumulation_steps 1 keep the global batch of 4" in done.stdout
    assert "resumed at step 4\n" in done.stdout
    two = load_checkpoint(tmp_path / "two" / "ckpt.pt")
    assert two["step"] == 8 and two["seen"] == one["seen"] == 32
    assert [e["loss"] for e in log_of(tmp_path / "two") if "loss" in e] == pytest.approx([e["loss"] for e in log_of(tmp_path / "one") if "loss" in e], rel=1e-3)
    for a, b in zip(one["ema"]["shadow_params"], two["ema"]["shadow_params"], strict=True):
        assert (a - b).abs().max() < 1e-4
    for steps in (10, 12):  # and again: the same flags ask for what they asked for at first, however it was shared out since
        again = run(train_flow, photos, tmp_path / "two", *flags, "--max_iters", steps, "--init_from", "resume")
        assert again["seen"] == 4 * steps and (again["args"]["batch_size"], again["args"]["gradient_accumulation_steps"]) == (4, 1)
    other = run(train_flow, photos, tmp_path / "two", *flags, "--batch_size", 3, "--max_iters", 13, "--init_from", "resume")  # others ask for something else
    assert other["seen"] == 4 * 12 + 3


@pytest.mark.parametrize("lives", [(1, 2, 2, 4, 1), (2, 1, 1, 2, 4)], ids=str)
def test_the_global_batch_outlives_every_change_of_processes(lives, capsys):
    """One command, --batch_size 4, in lives of so many processes: an update has the pictures that it had in the first."""
    was = None
    for world in lives:
        args = training.argparse.Namespace(batch_size=4, gradient_accumulation_steps=1)
        life = training.Run("flow", None, args, None, 0, world, world, None, None, {**vars(args), "asked": [4, 1], "world": world})
        if was:
            training.keep_global_batch(life, was)
        assert life.per_step == 4 * lives[0] and life.settings["batch_size"] * life.settings["gradient_accumulation_steps"] * world == life.per_step
        was = life.settings


def test_the_list_is_made_once_for_all_processes(monkeypatch):
    """In the first process, whose list and whose refusal are then everybody's: a folder that changes meanwhile, or looks otherwise there, changes nothing."""
    sent = []
    monkeypatch.setattr(training.dist, "broadcast_object_list", lambda box, **_: box.__setitem__(slice(None), sent) if sent else sent.extend(box))
    first, second = (SimpleNamespace(world=2, master=rank == 0) for rank in range(2))

    def never():
        raise AssertionError("listed again")

    def refused():
        raise InputError("no folder DIR")
    assert training.from_first(first, lambda: ([1, 2], [3])) == training.from_first(second, never) == ([1, 2], [3])
    sent.clear()
    for process, make in ((first, refused), (second, never)):
        with pytest.raises(InputError, match="^no folder DIR$"):
            training.from_first(process, make)


def test_shared_out_weights_are_the_same_training(photos, tmp_path, whole):  # noqa: F811
    """--shard (FSDP) in two processes, resumed by two, and by one without it: the checkpoints are the same kind, and hold the run of one process."""
    flags = ["--dtype", "float32", "--gradient_accumulation_steps", 2, *FLOW]
    one = run(train_flow, photos, tmp_path / "one", "--max_iters", 6, *flags)
    for steps in (2, 4):
        done = torchrun(2, "train_flow.py", *SMALL, "--data_dir", photos, "--out_dir", tmp_path / "two", "--init_from", "auto", "--max_iters", steps, *flags, "--batch_size", 1, "--shard")
        assert done.returncode == 0, done.stderr
    two = run(train_flow, photos, tmp_path / "two", "--max_iters", 6, *flags, "--init_from", "resume")
    assert two["params"].keys() == one["params"].keys() and two["seen"] == one["seen"]
    assert [e["loss"] for e in log_of(tmp_path / "two") if "loss" in e] == pytest.approx([e["loss"] for e in log_of(tmp_path / "one") if "loss" in e], rel=1e-2)
    for a, b in zip(one["ema"]["shadow_params"], two["ema"]["shadow_params"], strict=True):
        assert (a - b).abs().mean() < 2e-5  # roundings; moments read in another order would make 6e-4
    with pytest.raises(InputError, match="start them with torchrun"):
        run(train_flow, photos, tmp_path / "three", "--shard")


def test_a_global_batch_that_does_not_divide_is_refused(photos, tmp_path, monkeypatch):  # noqa: F811
    run(train_flow, photos, tmp_path, "--max_iters", 1)
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    checkpoint["args"]["world"] = 3
    save_checkpoint(tmp_path / "ckpt.pt", checkpoint)
    resumed = run(train_flow, photos, tmp_path, "--max_iters", 2, "--init_from", "resume")
    assert (resumed["args"]["batch_size"], resumed["args"]["gradient_accumulation_steps"]) == (2, 3)
    fake = training.Run("flow", None, training.argparse.Namespace(batch_size=1, gradient_accumulation_steps=1), tmp_path, 0, 2, 2, None, None, dict(asked=[1, 1]))
    with pytest.raises(InputError, match="the 3 pictures an update do not divide among 2 processes"):
        training.keep_global_batch(fake, dict(batch_size=1, gradient_accumulation_steps=1, world=3))


def test_what_is_not_as_it_was_is_named(photos, tmp_path, capsys):  # noqa: F811
    run(train_flow, photos, tmp_path, "--max_iters", 2, "--lr_decay", "linear")
    capsys.readouterr()
    run(train_flow, photos, tmp_path, "--max_iters", 3, "--lr_decay", "linear", "--init_from", "resume", "--grad_clip", 2)
    assert "resumed at step 2, not as before: --grad_clip 2.0, not 1.0; --max_iters 3, not 2\n" in capsys.readouterr().out


# --- the folder ---


def test_two_trainings_never_share_a_folder(photos, tmp_path, monkeypatch):  # noqa: F811
    held = subprocess.Popen([sys.executable, "-c", f"import fcntl; f = open({str(tmp_path / 'starts.jsonl')!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    held.stdout.readline()
    monkeypatch.setattr(training.time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match="another process trains into"):
        run(train_flow, photos, tmp_path, "--max_iters", 1)
    held.kill()
    held.wait()
    run(train_flow, photos, tmp_path, "--max_iters", 1)


def test_what_another_run_saved_meanwhile_is_not_overwritten(photos, tmp_path, monkeypatch):  # noqa: F811
    """Of two that start at once the second waits for the lock, while the first trains and ends: what it found before, nothing or a checkpoint, is not what is there."""
    take = training.take

    def train(steps):
        train_flow.main([*map(str, (*SMALL, "--data_dir", photos, "--out_dir", tmp_path, "--init_from", "auto", "--max_iters", steps))])
    for steps in (1, 2):
        def wait(file, folder, steps=steps):
            monkeypatch.setattr(training, "take", take)
            train(steps)
            take(file, folder)
        monkeypatch.setattr(training, "take", wait)
        with pytest.raises(InputError, match="another process has trained into"):
            train(9)
        assert load_checkpoint(tmp_path / "ckpt.pt")["step"] == steps


def test_processes_that_read_different_checkpoints_do_not_train_together(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "from_first", lambda run, make: 7)
    with pytest.raises(InputError, match="process 1 read step 4, the first one step 7"):
        training.open_folder(SimpleNamespace(out_dir=tmp_path, rank=1, world=2), SimpleNamespace(step=4))


def test_ranks_do_not_outlive_torchrun(photos, tmp_path):  # noqa: F811
    """kill -9 of the launcher, which cannot tell them: they save and stop by themselves."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", *command(photos, tmp_path, "--max_iters", 100_000)[1:]]
    with subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 4 "):
                process.kill()
                break
        rest = process.stdout.read()  # ends when the last of them has ended
    assert f"stopped by a signal at step {load_checkpoint(tmp_path / 'ckpt.pt')['step']}" in rest


def test_a_rank_whose_launcher_ended_before_the_loop_stops(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(training.signal, "signal", lambda *_: None)
    assert training.Signals().agreed(SimpleNamespace(world=1)) == 0
    monkeypatch.setattr(training, "PARENT", os.getppid() + 1)
    assert training.Signals().agreed(SimpleNamespace(world=1)) == signal.SIGTERM


def test_an_old_log_is_set_aside(photos, tmp_path, capsys):  # noqa: F811
    """And one that was set aside before stays."""
    for name in ("log_before", "log_before2"):
        old = f'{{"step": 7, "loss": 1, "of": "{name}"}}\n'
        (tmp_path / "log.jsonl").write_text(old)
        run(train_flow, photos, tmp_path, "--max_iters", 1)
        assert f"it is now {name}.jsonl" in capsys.readouterr().out
        (tmp_path / "ckpt.pt").unlink()
    assert '"of": "log_before"' in (tmp_path / "log_before.jsonl").read_text() and (tmp_path / "log_before2.jsonl").read_text() == old


def test_the_checkpoint_before_is_not_overwritten_by_another_training(photos, tmp_path):  # noqa: F811
    run(train_flow, photos, tmp_path, "--max_iters", 4, "--eval_interval", 2)
    (tmp_path / "ckpt.pt").unlink()
    with pytest.raises(InputError, match="holds a training already"):
        run(train_flow, photos, tmp_path, "--max_iters", 2)
    assert load_checkpoint(tmp_path / "ckpt_before.pt")["step"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, a disk that is always full")
def test_a_log_on_a_full_disk_is_named_and_the_training_goes_on(tmp_path, capsys):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    fake = training.Run("flow", None, None, tmp_path, 0, 1, 1, None, None, {})
    training.log(fake, dict(step=1, loss=0.5))
    out = capsys.readouterr().out
    assert f"cannot write {tmp_path}/log.jsonl: No space left on device" in out and "step 1  loss 0.5" in out


def test_a_damaged_log_costs_its_line_alone(photos, tmp_path):  # noqa: F811
    """A flipped bit, a line that was cut short: the training goes on, --keep_best compares what is left, and runs.py shows it."""
    run(train_flow, photos, tmp_path, "--max_iters", 4, "--eval_interval", 2)
    log = tmp_path / "log.jsonl"
    raw = bytearray(log.read_bytes())
    raw[5] ^= 0x80
    log.write_bytes(bytes(raw) + b"[" * 100_000 + b'\n{"step": 4, "psnr_one": 1')
    lines = len(read_lines(log))
    assert lines == raw.count(b"\n") - 1 and runs.read_run(tmp_path).looks
    best = max(line["psnr_one"] for line in read_lines(log) if "psnr_one" in line)
    for score, kept in ((best - 1, False), (best, True)):
        training.keep_best(SimpleNamespace(args=SimpleNamespace(keep_best="psnr_one"), out_dir=tmp_path), {"psnr_one": score})
        assert (tmp_path / "ckpt_best.pt").exists() == kept
    assert run(train_flow, photos, tmp_path, "--max_iters", 5, "--init_from", "resume")["step"] == 5 and len(log_of(tmp_path)) > lines


def test_lpips_is_not_the_judge_of_pictures_that_it_does_not_take():
    judge = SimpleNamespace(master=True, args=SimpleNamespace(keep_best="lpips_one"))
    for pictures in (torch.zeros(2, 3, 16, 16), [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 4, 4)]):
        with pytest.raises(InputError, match="LPIPS takes no pictures below 32 x 32, and those to validate are 16 x 16"):
            training.check_best(judge, object(), pictures)
    training.check_best(judge, object(), torch.zeros(2, 3, 64, 64))
    with pytest.raises(InputError, match="whose AlexNet is not here"):
        training.check_best(judge, None, torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("encoding", ("ascii", "utf-8"))
def test_a_name_that_the_console_cannot_show(tmp_path, encoding):
    """Another alphabet's, or bytes that are no text: shown as escapes, in the one line that says what is wrong."""
    name = os.fsencode(str(tmp_path)) + (b"/d\xc3\xa9" if encoding == "ascii" else b"/d\xff")
    done = subprocess.run([sys.executable, str(ROOT / "train_flow.py"), "--data_dir", name, "--out_dir", str(tmp_path / "out")], capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 1 and "Traceback" not in done.stderr and ("d\\xe9" if encoding == "ascii" else "d\\udcff") in done.stderr


@pytest.mark.parametrize("part, edit", [
    ("task", lambda c: dict(scale=4)), ("task", lambda c: dict(c["task"], sigma_p="x")), ("data", lambda c: dict(c["data"], train_names="AAA")),
    ("data", lambda c: dict(c["data"], how=5)), ("data", lambda c: dict(c["data"], train="x"))], ids=("no name", "sigma_p", "base64", "how", "train"))
def test_what_a_checkpoint_says_of_itself_is_checked(photos, tmp_path, part, edit):  # noqa: F811
    run(train_flow, photos, tmp_path, "--max_iters", 1)
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    save_checkpoint(tmp_path / "odd.pt", {**checkpoint, part: edit(checkpoint)})
    args = evaluate.parse_args(["--ckpt", str(tmp_path / "odd.pt"), "--dataset", "photos"])
    with pytest.raises(InputError, match="odd.pt"):
        evaluate.load_network(tmp_path / "odd.pt", "cpu", args)
    save_checkpoint(tmp_path / "odd.pt", {**checkpoint, "task": dict(name="photos")})  # what is not said is as the task has it
    assert evaluate.load_network(tmp_path / "odd.pt", "cpu", args).task.sigma_p == TASK.sigma_p


@pytest.mark.parametrize("settings", (None, [1], dict(teacher=5), dict(teacher=["a"]), dict(teacher="x.pt", chain="4")), ids=str)
def test_settings_that_are_none_name_their_checkpoint(tmp_path, settings):
    save_checkpoint(tmp_path / "ckpt.pt", dict(args=settings))
    with pytest.raises(InputError, match="ckpt.pt is not a checkpoint of a training: its settings are none"):
        teachers.load_teacher(SimpleNamespace(init_from="resume", teacher=None), tmp_path)


def test_a_list_of_names_that_is_no_text(tmp_path):
    (tmp_path / "list.txt").write_bytes("d\xe9.png\n".encode("latin-1"))
    with pytest.raises(InputError, match="list.txt is not a list of names: it is no text in UTF-8"):
        folders.read_list(str(tmp_path / "list.txt"))


# --- numbers that are none ---


def test_a_loss_that_is_no_number_names_step_and_pictures(photos, tmp_path, monkeypatch):  # noqa: F811
    loss, calls = train_flow.flow_loss, []

    def broken(*args):
        calls.append(0)
        return loss(*args) * (float("nan") if len(calls) == 6 else 1)
    monkeypatch.setattr(train_flow, "flow_loss", broken)
    with pytest.raises(InputError) as e:
        run(train_flow, photos, tmp_path, "--max_iters", 20, "--eval_interval", 4, "--log_interval", 10)
    paths = data.find_data(TASK, photos)[0]
    numbers = list(training.itertools.islice(data.Order(len(paths), 1337, 10), 2))
    assert f"not finite at step 6, of the pictures {paths[numbers[0][0]]}, {paths[numbers[1][0]]}: " in str(e.value)
    assert "ckpt.pt keeps step 4" in str(e.value) and load_checkpoint(tmp_path / "ckpt.pt")["step"] == 4


def test_an_average_that_is_no_number_is_not_saved(photos, tmp_path, monkeypatch):  # noqa: F811
    update = training.EMA.update

    def broken(self, model):
        update(self, model)
        if self.num_updates == 6:
            self.shadow_params[3].fill_(float("nan"))
    monkeypatch.setattr(training.EMA, "update", broken)
    with pytest.raises(InputError, match="averaged weights are not finite at step 8.* keeps step 4"):
        run(train_flow, photos, tmp_path, "--max_iters", 8, *FLOW)


def test_weights_that_are_ruined_but_finite_are_not_saved(photos, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="the loss rose from .*; nothing was saved yet"):
        run(train_flow, photos, tmp_path, "--max_iters", 8, "--learning_rate", 1e3, "--warmup_iters", 0, "--eval_interval", 3, "--log_interval", 50)
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_checkpoint_that_may_be_ruined_itself_is_not_called_good(photos, tmp_path):  # noqa: F811
    """The ruinous update may be the last before a save: then nothing has judged what was saved, and the file before it is the one to trust."""
    flags = ["--warmup_iters", 0, "--eval_interval", 1, "--log_interval", 50]
    run(train_flow, photos, tmp_path, "--max_iters", 2, *flags)
    with pytest.raises(InputError, match="the loss rose from .*ckpt.pt keeps step 3, which may be ruined itself: ckpt_before.pt is the one before it"):
        run(train_flow, photos, tmp_path, "--max_iters", 8, *flags, "--init_from", "resume", "--learning_rate", 1e3)
    assert load_checkpoint(tmp_path / "ckpt_before.pt")["step"] == 2


def test_a_loss_of_next_to_nothing_may_rise_to_a_small_one(tmp_path):
    """As that of a student which begins as its teacher, and a teacher that has learned little: 6e-10 at first."""
    here = SimpleNamespace(out_dir=tmp_path)
    meter = lambda loss: SimpleNamespace(total=torch.tensor([loss, 1.0]), first=torch.tensor(loss))
    state = SimpleNamespace(bad_step=torch.tensor(math.inf), least=math.inf, step=50, saved=0)
    for loss in (6e-10, 1e-4, 5e-3):
        training.check(here, state, meter(loss), [])
    assert state.least == pytest.approx(6e-10)
    with pytest.raises(training.Diverged, match="the loss rose from 6e-10 to 0.02"):
        training.check(here, state, meter(0.02), [])



# --- broken and hostile files ---


def test_a_full_disk_is_called_that(tmp_path):
    """Here a limit on the length of files: torch.save itself says that it is at an unexpected position."""
    resource = pytest.importorskip("resource")
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, kept[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*ckpt.pt: File too large"):
            save_checkpoint(tmp_path / "ckpt.pt", dict(ema=torch.zeros(10**6)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_found_and_the_checkpoint_before_takes_over(photos, tmp_path, whole, capsys):  # noqa: F811
    run(train_flow, photos, tmp_path, "--max_iters", 8, *FLOW)
    good = (tmp_path / "ckpt.pt").read_bytes()
    for place in np.linspace(0.02, 0.98, 25):
        (tmp_path / "ckpt.pt").write_bytes(good)
        flip(tmp_path / "ckpt.pt", place)
        with pytest.raises(InputError, match="ckpt.pt is broken"):
            load_checkpoint(tmp_path / "ckpt.pt")
    again = run(train_flow, photos, tmp_path, "--max_iters", 8, "--init_from", "resume", *FLOW)
    assert "going on from the one before it, ckpt_before.pt" in capsys.readouterr().err
    assert same(again, whole) and (tmp_path / "ckpt_broken.pt").exists()


def test_a_checkpoint_that_may_not_be_read_is_not_called_broken(user):
    """Root trained in a container, and somebody else goes on: the one before does not take its place, which is newer and whole."""
    folder, rights = user
    for step in (1, 2):
        save_checkpoint(folder / "ckpt.pt", dict(step=step))
    save_release(folder / "w.safetensors", tiny(), dict(stage="flow", step=7, task=None))
    load_tensors(folder / "w.safetensors")
    for name in ("ckpt.pt", "w.safetensors"):
        (folder / name).chmod(0)
    with rights():
        assert load_checkpoint(folder / "ckpt_before.pt")["step"] == 1
        for read in (load_checkpoint, lambda path: training.open_checkpoint(path.parent)):
            with pytest.raises(InputError, match="cannot read .*ckpt.pt: Permission denied"):
                read(folder / "ckpt.pt")
        with pytest.raises(InputError, match="cannot read .*w.safetensors: Permission denied"):
            load_tensors(folder / "w.safetensors")


def test_a_flipped_bit_in_a_release_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    save_release(path, tiny(), dict(stage="flow", step=7, task=None))
    good = path.read_bytes()
    for place in np.linspace(0.001, 0.999, 25):
        path.write_bytes(good)
        flip(path, place)
        with pytest.raises(InputError, match="w.safetensors is broken"):
            load_tensors(path)


class Code:
    def __reduce__(self):
        return os.mkdir, (str(Path(__file__).parent / "it_ran"),)


def test_hostile_checkpoints_are_one_line_and_cost_no_memory(tmp_path):
    path = tmp_path / "h.pt"
    torch.save(dict(ema=Code()), path)
    with pytest.raises(InputError, match="it would run code"):
        load_model(path)
    assert not (Path(__file__).parent / "it_ran").exists()
    for content in (b"no weights at all", bytes(range(128, 256)), b"", pickle.dumps(dict(ema=[1]), 4)[:-3]):  # which would not
        path.write_bytes(content)
        with pytest.raises(InputError, match="h.pt is broken or not a checkpoint .torch.save writes no such bytes.$"), warnings.catch_warnings():
            warnings.simplefilter("error")
            load_model(path)
    with pytest.MonkeyPatch.context() as m, pytest.raises(InputError, match="h.pt is broken or not a checkpoint .there is not enough memory for what it holds"):
        m.setattr(torch, "load", lambda *_, **__: torch.empty(2**60))
        load_model(path)
    torch.save(dict(ema=torch.zeros(10)), path)
    with zipfile.ZipFile(path) as z:
        records = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as z:  # 256 MiB in 256 kB
        for name, content in records.items():
            z.writestr(name, bytes(2**28) if name.endswith("data/0") else content)
    assert (tmp_path / "bomb.pt").stat().st_size < 2**19
    with pytest.raises(InputError, match="its records are compressed"):
        load_model(tmp_path / "bomb.pt")


def circle():
    held = []
    held.append(held)
    return held


def nested(times):
    held = [0]
    for _ in range(times):
        held = [held] * 10
    return held


@pytest.mark.parametrize("part, says", [
    (torch.zeros(1).expand(10**5, 10**5), "whose numbers are not in it"), (torch.ones(1, dtype=torch.bfloat16).expand(10**6, 10**5), "whose numbers are not in it"),
    (torch.eye(3).to_sparse(), "whose numbers are not in it"), (torch.ones(3, device="meta"), "whose numbers are not in it"),
    (nested(30), "more than its bytes can say"), (circle(), "more than 50 deep")])
@pytest.mark.parametrize("reader", [load_model, read_state, lambda path: training.open_checkpoint(path.parent), metrics.load_lpips])
def test_what_says_that_it_is_larger_than_its_file_is_one_line(part, says, reader, tmp_path):
    """A kilobyte that says it is 40 GB, or a list of ten lists of ten lists: whoever copies, compares or prints them would take all memory."""
    torch.save({"ema": {"shadow_params": [part]}, "features.0.weight": part, "step": part}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=says):
        reader(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("change", [
    dict(blocks=100_000), dict(blocks=True), dict(channels=31), dict(channels="32"), dict(channels=10**9), dict(mults=[]), dict(mults=[1] * 50), dict(mults=7),
    dict(groups=5), dict(groups=0), dict(patch=1.5), dict(attention=[1], head_channels=48), dict(precond=dict(sigma_p=1)), dict(precond="yes"),
    dict(precond=dict(sigma_p=float("nan"), sigma_d=1.0)), dict(condition=None), dict(surprise=1)])
def test_a_file_that_describes_no_network_is_one_line(change):
    with pytest.raises(InputError, match="describes no network of this project"):
        network_of({**tiny().config, **change}, "x.pt")


def test_edited_releases_are_one_line(tmp_path):
    """What the header says of the file is as hostile as the rest of it."""
    from safetensors.torch import save_file
    with open(tmp_path / "long.safetensors", "wb") as f:  # 64 GB that take no place on the disk
        f.write((2**40).to_bytes(8, "little"))
        f.truncate(2**36)
    with pytest.raises(InputError, match="its header would be too large"):
        load_model(tmp_path / "long.safetensors")
    tensors = {n: p.clone() for n, p in tiny().state_dict().items()}
    good = dict(stage="flow", task=None, step=1, model=tiny().config)
    first = next(iter(tensors))
    for meta, state in ((json.dumps([1]), tensors), ("{", tensors), (json.dumps({**good, "stage": 5}), tensors), (json.dumps({**good, "task": "photos"}), tensors),
                        (json.dumps({**good, "model": [3]}), tensors), (json.dumps({**good, "step": {}}), tensors), (json.dumps({**good, "step": 10**4000}), tensors), ("[" * 100_000, tensors),
                        (json.dumps(good), {**tensors, first: tensors[first].long()}), (json.dumps(good), {**tensors, first: tensors[first].to(torch.float8_e4m3fn)}), (json.dumps(good), {**tensors, first: tensors[first] / 0}),
                        (json.dumps(good), {k: v for k, v in tensors.items() if k != first}), (None, tensors)):
        save_file(state, tmp_path / "e.safetensors", metadata={"oftsr": meta} if meta else {"sha256": "0" * 64})
        with pytest.raises(InputError) as e:
            load_model(tmp_path / "e.safetensors")
        assert "e.safetensors" in str(e.value) and "\n" not in str(e.value)


def test_edited_checkpoints_are_one_line(photos, tmp_path):  # noqa: F811
    run(train_flow, photos, tmp_path, "--max_iters", 1)
    good = load_checkpoint(tmp_path / "ckpt.pt")
    adam = good["optimizers"][0]
    edits = [{k: v} for k in good if k not in ("scores", "data", "seen", "least") for v in (None, "x", 3.5)]
    edits += [dict(data="x"), dict(data={**good["data"], "train_names": 5}), dict(data={**good["data"], "before": b"x"}), dict(seen=-1), dict(ema={**good["ema"], "num_updates": -10}),
              dict(args={**good["args"], "world": "2"}), dict(args={**good["args"], "world": 10**12}), dict(optimizers=[{**adam, "state": {**adam["state"], 0: {**adam["state"][0], "step": torch.ones(4)}}}])]
    edits += [dict(params={}), dict(params={**good["params"], "out.2.bias": torch.zeros(5)}), dict(model={**good["model"], "blocks": 2}), dict(ema={**good["ema"], "shadow_params": [1]}),
              dict(optimizers=[]), dict(optimizers=[{}]), dict(optimizers=[{**adam, "state": {}}]), dict(optimizers=[{**adam, "state": {**adam["state"], 0: dict(exp_avg=torch.ones(3))}}]),
              dict(task={**good["task"], "scale": 1000}), dict(args={})]
    for edit in edits:
        torch.save({**good, **edit}, tmp_path / "ckpt.pt")
        with pytest.raises(InputError) as e:
            run(train_flow, photos, tmp_path, "--max_iters", 2, "--init_from", "resume")
        assert "ckpt.pt" in str(e.value) and "\n" not in str(e.value), edit


@pytest.mark.parametrize("change", [dict(scale=1000), dict(degradation="fog"), dict(crop="left"), dict(loss="l3"), dict(scale="4"), dict(surprise=1), dict(image_size=-1), dict(condition=1), dict(sigma_p=float("nan")), dict(hflip=None)])
def test_a_file_made_for_no_task_is_one_line(change):
    cells = {**asdict(data.TASKS["photos"]), **change}
    with pytest.raises(InputError, match="x.pt was made for a task"):
        data.saved_task(cells, "x.pt")
    assert data.saved_task(asdict(data.TASKS["photos"]), "x.pt") == data.TASKS["photos"]


def test_what_is_made_again_is_the_same_gradient_with_less_kept():
    torch.manual_seed(0)
    net, x_in, t = tiny().requires_grad_(True), torch.randn(2, 6, 32, 32), torch.rand(2)
    gradients, kept = [], []
    for again in (False, True):
        for stage in (m for m in net.modules() if isinstance(m, Stage)):
            stage.recompute = again
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept[-1].append(tensor.nbytes), tensor)[1], lambda tensor: tensor):
            loss = net(x_in, t).square().mean()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert sum(kept[1]) < 0.5 * sum(kept[0])


def test_a_network_is_not_trained_under_another_name(photos, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="holds the network 'photos', not 'tiny': say --model photos"):
        run(train_flow, photos, tmp_path, "--init_from", ROOT / "weights" / "photos_x4_flow.safetensors")


def test_broken_pictures_are_counted_over_all_loaders(photos, tmp_path):  # noqa: F811
    pictures = data.Pictures(data.find_data(TASK, photos)[0], TASK, 0)
    next(iter(torch.utils.data.DataLoader(Marker(pictures), batch_size=None, num_workers=1)))
    assert pictures.broken.tolist()[2] and not pictures.broken.tolist()[1]


class Marker(torch.utils.data.Dataset):
    """Finds picture 2 to be broken, in whatever process asks for an item."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return 1

    def __getitem__(self, i):
        self.pictures.skip(2, self.pictures.broken, "a test")
        return i


def test_validation_during_training_scores_what_predict_makes():
    task, x_1 = data.TASKS["photos"], torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = []

    def predict(x_lr, seeds):
        given.append((x_lr, seeds.tolist()))
        return {"same": x_lr, "gray": torch.zeros_like(x_lr)}
    scores, grid = training.look(predict, x_1, task, None, torch.device("cpu"))
    x_lr = degrade(to_float(x_1), task, torch.arange(5))
    assert scores["psnr_same"] == scores["psnr_lr"] == pytest.approx(psnr_rgb(to_uint8(x_lr).permute(0, 3, 1, 2), x_1).mean().item())
    assert scores["psnr_gray"] == pytest.approx(psnr_rgb(torch.full_like(x_1, 128), x_1).mean().item())
    assert "lpips_same" not in scores and torch.equal(given[1][0][0], x_lr[1]) and given[1][1] == [1]
    assert grid.shape == (4 * 32, 4 * 32, 3) and np.array_equal(grid[32:64, 96:], x_1[1].permute(1, 2, 0).numpy())


def test_a_port_in_use_is_one_line(photos, tmp_path, monkeypatch):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken.getsockname()[1]).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(InputError, match="process 0 of 2 cannot join the others: .*(in use|EADDRINUSE)") as e:
            run(train_flow, photos, tmp_path)
        assert "\n" not in str(e.value)
        with pytest.raises(InputError, match="process 0 of 2 cannot join the others: .*(in use|EADDRINUSE)"):
            join_processes()  # as sample.py and evaluate.py do
