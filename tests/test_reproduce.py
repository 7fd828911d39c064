"""REPRODUCE.md's commands: each is parsed, and what it resolves to is held against the paper's settings."""
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ablate
import claims
import curves
import data
import distill
import evaluate
import kernels
import sample
import train_flow
import training
from console import InputError
from model import PRESETS, UNet, network_config, save_release
from pictures import read_image

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_flow.py": train_flow, "distill.py": distill, "evaluate.py": evaluate, "sample.py": sample, "curves.py": curves, "ablate.py": ablate}
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", (ROOT / "REPRODUCE.md").read_text(), re.S) for line in block.replace("\\\n", " ").splitlines() if line]

# From the paper: Sec. 4.1, Appendix E, Tables 7 to 9 and 13. div2k's rate is the published configuration's.
# (sigma_p, sigma_n, H, scale, side, crop, loss, horizontal and vertical flips), then (batch, updates, rate) of stage 1 and of stage 2.
PAPER = {
    "ffhq": ((0.1, 0, "bicubic", 4, 256, "center", "l1", 0.5, 0.06), (32, 100_000, 1e-4), (32, 20_000, 1e-4)),
    "ffhq_noisy": ((0.5, 0.05, "avgpool", 4, 256, "center", "l1", 0.5, 0.06), (32, 100_000, 1e-4), (32, 20_000, 1e-4)),
    "div2k": ((0.2, 0, "bicubic", 4, 256, "random", "l1", 0.5, 0.06), (32, 100_000, 1e-5), (32, 20_000, 1e-5)),
    "imagenet": ((0.2, 0, "bicubic", 4, 256, "center", "l1", 0.5, 0.06), (32, 100_000, 1e-4), (32, 50_000, 1e-4)),
    "ffhq_x8": ((0.1, 0, "bicubic", 8, 256, "center", "l1", 0.5, 0.06), (32, 30_000, 1e-4), (16, 10_000, 1e-4)),
    "ffhq512_x4": ((0.1, 0, "bicubic", 4, 512, "center", "l1", 0.5, 0.06), (32, 30_000, 1e-4), (16, 10_000, 1e-4)),
    "ffhq512_x8": ((0.1, 0, "bicubic", 8, 512, "center", "l1", 0.5, 0.06), (32, 30_000, 1e-4), (16, 10_000, 1e-4)),
    "realsr": ((0.2, 0, "real", 4, 256, "center", "l1", 0.5, 0.06), (32, 100_000, 1e-4), (32, 20_000, 1e-4)),  # sigma_p and these are ours: the paper does not say
    "realsr512 --teacher": ((0.2, 0, "real", 4, 512, "random", "l1", 0.5, 0.06), None, (32, 20_000, 1e-4)),  # from DiT4SR, which has no sigma_p; batch, length and rate are ours
    "imagenet --teacher": ((0.2, 0, "bicubic", 4, 256, "center", "l1", 0.5, 0.06), None, (32, 5_000, 1e-4)),  # Table 9, from ResShift
    "ffhq_uncond": ((1.0, 0, "bicubic", 4, 256, "center", "l2", 0, 0), (32, 100_000, 1e-4), None),
    "ffhq_uncond --loss": ((1.0, 0, "bicubic", 4, 256, "center", "l1", 0, 0), (32, 100_000, 1e-4), None),
}
NETWORKS = {"imagenet": "imagenet", "ffhq512_x4": "ffhq512", "ffhq512_x8": "ffhq512", "realsr": "resshift"}  # of stage 1, the others': ffhq
DISTILLATION = {"solver": "midpoint", "dt": 0.05, "lambda_align": 0.01, "lambda_bc": 0.1, "t_min": 0.01, "t_max": 0.99}


def words(command):
    """(module, flags, processes) of a command line."""
    parts = shlex.split(command)
    at = next(i for i, word in enumerate(parts) if word in SCRIPTS)
    start = parts[:at]
    assert start in (["python"], ["torchrun", "--nproc_per_node", "4"]), command
    return SCRIPTS[parts[at]], parts[at + 1 :], 4 if start[0] == "torchrun" else 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, tmp_path, monkeypatch):
    """Parsed as its script parses it; a training's settings are the paper's, whatever its name, on four processes and on one."""
    monkeypatch.chdir(tmp_path)
    module, flags, world = words(command)
    args = module.parse_args(flags)
    if module is evaluate:
        evaluate.check_flags(args)
    if module not in (train_flow, distill):
        return
    task, stage = data.resolve_task(args), "flow" if module is train_flow else "distill"
    expected, *stages = next(PAPER[key] for key in sorted(PAPER, reverse=True) if key.split()[0] == args.dataset and set(key.split()[1:]) <= set(flags))
    assert (task.sigma_p, task.sigma_n, task.degradation, task.scale, task.image_size, task.crop, task.loss, task.hflip, task.vflip) == expected
    assert module is distill or task.model == NETWORKS.get(args.dataset, "ffhq")
    training.fill_in(args, data.RECIPES[task.name][stage], world)
    assert (args.batch_size * world, args.max_iters, args.learning_rate) == stages[stage == "distill"]
    assert (args.warmup_iters, args.ema, args.optimizer, args.lr_decay) == (1000, 0.9999, "adam", "none")
    assert module is train_flow or {name: getattr(args, name) for name in DISTILLATION} == DISTILLATION


def test_a_dry_run_needs_neither_data_nor_a_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    distill.main(["--dataset", "ffhq512_x4", "--teacher", "out/none/ckpt.pt", "--dry_run"])
    said = capsys.readouterr().out
    assert "no folder data/ffhq512_x4" in said and "93,567,366 parameters" in said and "max_iters=10000" in said and "global batch 16" in said
    distill.main(["--loss", "perceptual", "--dataset", "div2k", "--init_from", "none.pt", "--dry_run"])
    assert "learning_rate=1e-05" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no checkpoint at out/none/ckpt.pt"):
        distill.main(["--dataset", "ffhq512_x4", "--teacher", "out/none/ckpt.pt"])


def test_the_global_batch_is_the_tasks_whatever_the_number_of_processes():
    for world, accumulate, each in ((1, 1, 32), (4, 1, 8), (8, 2, 2)):
        args = train_flow.parse_args(["--dataset", "ffhq", "--gradient_accumulation_steps", str(accumulate)])
        training.fill_in(args, data.RECIPES["ffhq"]["flow"], world)
        assert args.batch_size == each
    args = train_flow.parse_args(["--dataset", "ffhq", "--batch_size", "5", "--max_iters", "7", "--learning_rate", "0"])
    training.fill_in(args, data.RECIPES["ffhq"]["flow"], 3)
    assert (args.batch_size, args.max_iters, args.learning_rate) == (5, 7, 0)
    with pytest.raises(InputError, match="a batch of 32 cannot be shared by 3"):
        training.fill_in(train_flow.parse_args(["--dataset", "ffhq"]), data.RECIPES["ffhq"]["flow"], 3)


def test_the_rows_of_the_ablations_are_the_papers():
    """Tables 7, 8 and 11: every row's flags parse, and say what the paper's row says; Table 8's batch is 8 over all processes."""
    flow = {name: train_flow.parse_args(flags) for name, flags in ablate.TABLES["table7"][1].items()}
    assert [a.sigma_p for a in flow.values()] == [0, 0.001, 0.01, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 0.1, 0.1]
    assert [a.condition for a in flow.values()][-2:] == [False, None] and [a.loss for a in flow.values()][-2:] == [None, "l2"]
    assert [train_flow.parse_args(f).sigma_p for f in ablate.TABLES["table11"][1].values()] == [0, 0.1, 0.3, 0.5, 1]
    student = [distill.parse_args(flags) for flags in ablate.TABLES["table8"][1].values()]
    row = [(a.objective, a.solver, a.dt, a.lambda_align, a.lambda_bc, a.batch_size) for a in student]
    assert row == [*(("oftsr", "euler", dt, 0, 0, 8) for dt in (0.001, 0.01, 0.02, 0.05, 0.1)), ("boot", "euler", 0.05, 0, 0, 8), ("pinn", "euler", 0.05, 0, 0, 8),
                   ("oftsr", "euler", 0.05, 0, 0.1, 8), *(("oftsr", s, 0.05, 0.01, 0.1, 8) for s in ("euler", "heun", "ralston", "midpoint")),
                   ("oftsr", "midpoint", 0.05, 0.01, 0.1, 32)]
    args, rest = ablate.parse_args(["table8", "--dataset", "ffhq", "--nproc", "4", "--max_iters", "9"])
    command = ablate.train_command(args, rest, "boot")
    made = distill.parse_args(command[command.index(str(ROOT / "distill.py")) + 1 :])
    assert (made.batch_size, made.max_iters, made.teacher) == (2, 9, "out/ffhq_flow/ckpt.pt") and "torch.distributed.run" in command
    with pytest.raises(InputError, match="table7 has no row 'boot'"):
        ablate.parse_args(["table7", "--rows", "boot"])


def test_a_broken_table_of_a_row_is_one_line(tmp_path):
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "weights.safetensors").touch()  # the row is trained
    for raw in (b'{"rows": [{"nfe": 1, "psnr_r\xe7b": 20', b"[]", b'{"rows": [{"nfe": "x", "psnr_rgb": 20}]}'):
        (tmp_path / "boot" / "scores.json").write_bytes(raw)
        with pytest.raises(InputError, match="scores.json is broken: take it away"):
            ablate.main(["table8", "--rows", "boot", "--out_dir", str(tmp_path)])


def test_the_published_presets_forget_a_tenth_while_they_train():
    """Dropout .1 in training alone, drawn anew each update, and after a resume as before it."""
    assert all(PRESETS[name]["dropout"] == 0.1 for name in ("ffhq", "ffhq512", "imagenet")) and PRESETS["ffhq512"]["attention"] == (32,)
    torch.manual_seed(0)
    model = UNet(channels=32, mults=(1,), blocks=1, patch=2, dropout=0.1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t = torch.randn(1, 6, 16, 16), torch.tensor([0.5])
    state = SimpleNamespace(optimizers=[], step=3)
    run = SimpleNamespace(args=SimpleNamespace(seed=1), world=1, rank=0)

    def draw(step):
        state.step = step
        training.before_update(run, state)
        return model(x, t)

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    model.eval()
    assert torch.equal(draw(3), draw(4))


def test_an_unconditional_flow_draws_pictures(tmp_path, capsys):
    """Files of the training size and a grid of them, the same from the same seed, however many are drawn; and not from a flow that restores."""
    torch.manual_seed(0)
    task = asdict(replace(data.TASKS["ffhq_uncond"], image_size=32, model="plain"))
    net = UNet(**network_config("plain", condition=False, sigma_p=1.0))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.03)
    save_release(tmp_path / "uncond.safetensors", net, dict(stage="flow", step=1, task=task))
    for name, count in (("a", 5), ("b", 2)):
        assert sample.main(["--generate", str(count), "--ckpt", str(tmp_path / "uncond.safetensors"), "--solver", "euler", "--steps", "2", "-o", str(tmp_path / name)]) == 0
    assert "5 pictures drawn" in (said := capsys.readouterr().out) and "2 evaluations each" in said
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [f"{i:04d}.png" for i in range(5)]
    assert read_image(tmp_path / "a_grid.png").shape == (64, 96, 3) and read_image(tmp_path / "a" / "0001.png").shape == (32, 32, 3)
    one, two = (read_image(tmp_path / "a" / f"000{i}.png") for i in (0, 1))
    assert (one != two).any() and (two == read_image(tmp_path / "b" / "0001.png")).all()
    with pytest.raises(InputError, match="holds drawn pictures already"):
        sample.main(["--generate", "1", "--ckpt", str(tmp_path / "uncond.safetensors"), "-o", str(tmp_path / "a")])
    with pytest.raises(InputError, match="unconditional"):
        sample.main(["--generate", "1", "-o", str(tmp_path / "c")])
    for flags in (["--t", "1"], ["--steps", "8"]):  # rk45's, which is --generate's own
        with pytest.raises(SystemExit):
            sample.main(["--generate", "1", *flags])


def test_the_speedrun_is_a_script_whose_stages_parse():
    text = (ROOT / "speedrun.sh").read_text()
    assert subprocess.run(["sh", "-n", str(ROOT / "speedrun.sh")]).returncode == 0
    stages = re.findall(r"^(?:stage|python) (\S+\.py) (.*)$", text.replace("\\\n", " "), re.M)
    common = shlex.split(re.search(r'common="(.*)"', text)[1].replace("$data", "DIR"))
    made = [SCRIPTS[script].parse_args([*(common if script != "evaluate.py" else []), *shlex.split(flags)[script != "evaluate.py":]]) for script, flags in stages]
    assert [script for script, _ in stages] == ["train_flow.py", "distill.py", "distill.py", "evaluate.py"]
    assert made[0].max_iters == 2600 and made[1].teacher == made[2].teacher == "$out/flow/weights.safetensors" and made[2].objective == "perceptual"
    without = subprocess.run(["sh", str(ROOT / "speedrun.sh")], capture_output=True, text=True)
    assert without.returncode != 0 and "name a folder of photographs" in without.stderr


def test_the_weights_are_made_by_one_script(tmp_path):
    """Six trainings that parse, each from what those before it left; given again, only what is not finished."""
    for name in ("torchrun", "python"):  # in place of the trainings: writes its arguments down, and a file of weights
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\n(echo {name}; for a in "$@"; do echo "$a"; done) | tr "\\n" "\\t" >> "$CALLS"; echo >> "$CALLS"\n'
                        'while [ $# -gt 0 ]; do [ "$1" = --out_dir ] && mkdir -p "$2" && touch "$2/weights.safetensors"; shift; done; exit 0\n')
        stub.chmod(0o755)
    out, calls = tmp_path / "out", tmp_path / "calls"
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "SHARE": "0.01"}
    run = lambda *args: subprocess.run(["sh", str(ROOT / "weights" / "make.sh"), *args], capture_output=True, text=True, env=env)
    assert "name a folder of photographs" in run().stderr
    assert run("DIR", str(out)).returncode == 0
    lines = [line.split("\t")[:-1] for line in calls.read_text().splitlines()]
    made = [SCRIPTS[line[3]].parse_args(line[4:]) for line in lines if line[0] == "torchrun"]
    assert [m.dataset for m in made] == ["photos", "photos_real", "photos", "photos", "photos_real", "photos_real"]
    assert [m.max_iters for m in made] == [320, 160, 20, 20, 20, 20]
    assert made[1].init_from == f"{out}/clean_flow/weights.safetensors" and made[5].init_from == f"{out}/real_distill/weights.safetensors" and made[5].objective == "perceptual"
    assert all((out / f"{name}.safetensors").exists() for name in ("photos_x4", "photos_x4_flow", "photos_real_x4", "photos_real_x4_flow"))
    assert [SCRIPTS[line[1]].parse_args(line[2:]).ckpt for line in lines if line[0] == "python"] == [[f"{out}/photos_x4.safetensors"], [f"{out}/photos_real_x4.safetensors"]]
    (out / "real_flow" / "weights.safetensors").unlink()
    (out / "real_flow" / "ckpt.pt").touch()
    calls.unlink()
    assert run("DIR", str(out)).returncode == 0
    again = [line.split("\t") for line in calls.read_text().splitlines() if line.startswith("torchrun")]
    assert len(again) == 1 and again[0][again[0].index("--init_from") + 1] == "resume"


def test_the_photographs_are_credited_from_their_manifest(tmp_path):
    """Training pictures alone, counted by licence; who is to be named stands by name with each picture; a row without licence, or no manifest, ends in a line."""
    manifest = tmp_path / "manifest.tsv"
    rows = [("split", "file", "source", "path", "licence", "author", "link"), ("train", "a.jpg", "one@1", "a b.jpg", "CC-BY-4.0", "Ann", "https://x.org/a"),
            ("train", "b.jpg", "one@1", "c.jpg", "CC-BY-4.0", "", ""), ("train", "c.jpg", "two@2", "d.jpg", "CC0-1.0", "Ben", ""), ("val", "d.jpg", "three@3", "e.jpg", "CC-BY-4.0", "Cid", "")]
    write = lambda rows: manifest.write_text("\n".join("\t".join(row) for row in rows) + "\n", encoding="utf-8")
    run = lambda: subprocess.run([sys.executable, str(ROOT / "weights" / "credits.py"), str(manifest)], capture_output=True, text=True)
    write(rows)
    text = run().stdout
    assert text.startswith("# The photographs behind the weights\n\n3 squares") and "| CC-BY-4.0 | one@1 | 2 |" in text and "| CC0-1.0 | two@2 | 1 |" in text
    assert "- Ann: [a b.jpg](https://x.org/a)" in text and "- its authors: c.jpg" in text and "Ben" in text and "Cid" not in text
    for wrong, words in ((rows + [("train", "e.jpg", "four@4", "f.jpg", "", "", "")], "no licence for f.jpg"), ([("name", "size"), ("a", "b")], "no column split")):
        write(wrong)
        said = run()
        assert said.returncode == 1 and words in said.stderr and said.stderr.count("\n") == 1 and not said.stdout
    shipped = (ROOT / "weights" / "CREDITS.md").read_text(encoding="utf-8")
    assert shipped.count("| github.com/") == 28 and sum(int(n) for n in re.findall(r"\| (\d+) \|$", shipped, re.M)) == int(re.search(r"^(\d+) squares", shipped, re.M)[1])


def test_the_claims_are_read_off_the_numbers(capsys):
    """Two seeds whose numbers are made up: each claim's verdict, and in the second seed one LPIPS and one PSNR that break it."""
    def scores(break_it):
        dial = {f"t {t:g}": [30 - t - (2 if break_it and t == 0 else 0), 0.5 - 0.1 * t] for t in claims.DIAL}
        steps = {f"{n} steps": [30, 0.4 - 0.01 * n] for n in claims.STEPS}
        last = lambda lpips: {"16 steps": [30, lpips]}
        return {"sigma_p 0": {**last(0.1 if break_it else 0.5), "S": 0.1}, claims.TEACHER: {**steps, **dial, "S": 0.2}, "sigma_p .5": {**last(0.3), "S": 0.3},
                "sigma_p 1": {**last(0.3), "S": 0.4}, "no condition": last(0.2), "midpoint": dial,
                **{name: {"t 1": [30, lpips]} for name, lpips in (("Eq. (9)", 0.4), ("BOOT", 0.5), ("PINN", 0.45), ("dt .001", 0.39))}}
    claims.report([scores(False), scores(True)])
    verdict = {line[:64].strip(): line[64:].strip() for line in capsys.readouterr().out.splitlines()}
    assert len(verdict) == 12
    starts = {"LPIPS: better with sigma_p": "appears under 1 of 2 seeds", "LPIPS: better with the condition": "does not appear", "S: straighter": "appears  ",
              "LPIPS at t = 1: dt": "does not appear", "PSNR of the student": "appears under 1 of 2", "LPIPS falls with more": "appears  "}
    for start, said in starts.items():
        (found,) = [v for claim, v in verdict.items() if claim.startswith(start)]
        assert f"{found}  ".startswith(said) if said.endswith("  ") else found.startswith(said), (start, found)
    assert "0.4000 ±0.0000, 0.4000 ±0.0000" in next(v for c, v in verdict.items() if "midpoint" in c)


def test_straightness_and_the_estimates_along_a_path_in_closed_form():
    """A field that is the truth is straight; half of it leaves a quarter of the square; under a constant field every estimate is the end."""
    seeds, x_1 = torch.tensor([3, 4]), torch.randn(2, 3, 8, 8).clamp(-1, 1)
    zero = torch.zeros_like(x_1)
    truth = lambda share: lambda x_in, t: share * (x_1 - x_in[:, :3]) / (1 - t.view(-1, 1, 1, 1))  # x_1 - x_0 from x_t
    assert claims.straightness(truth(1), x_1, zero, 0.5, seeds) < 1e-9
    x_0 = kernels.noise_augment(zero, 0.5, seeds)[:, :3]
    assert claims.straightness(truth(0.5), x_1, zero, 0.5, seeds) == pytest.approx(0.25 * (x_1 - x_0).square().mean().item(), rel=1e-4)
    estimates = claims.path_estimates(lambda x_in, t: torch.full_like(x_in[:, :3], 0.25), torch.zeros(1, 6, 8, 8))
    assert list(estimates) == list(claims.DIAL) and all(torch.allclose(x, torch.full_like(x, 0.25)) for x in estimates.values())
