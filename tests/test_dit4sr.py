"""DiT4SR as a teacher: its transformer against published outputs, folders whole and broken, a student of adapters from training to a picture."""
import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import bench
import distill
import evaluate
import sample
import teachers
import training
from checkpoints import load_tensors
from console import InputError
from distill import distillation_losses
from flow import integrate
from model import load_model, save_release

dit4sr = pytest.importorskip("dit4sr", reason="diffusers and peft are not here (pip install -e '.[sd3]')", exc_type=(ImportError, InputError))

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


# --- a folder as it is published, of random weights ---

TINY_VAE = dict(dit4sr.VAE, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 16], layers_per_block=1,
                norm_num_groups=4, sample_size=32)
SMALL, TOKENS = dict(TINY, pos_embed_max_size=64), 5


def unread(config):
    """Tensors of the names that a published file holds and nobody reads."""
    dim = config["attention_head_dim"] * config["num_attention_heads"]
    return {f"transformer_blocks.{i}.attn{n}.to_k_control.weight": torch.zeros(dim, dim) for i, n in ((0, ""), (0, "2"), (1, ""), (2, ""))} | {
        f"transformer_blocks.{config['num_layers'] - 1}.attn.add_q_proj.weight": torch.zeros(dim, dim)}


@pytest.fixture
def folder(tmp_path):
    """DIR of dit4sr:DIR: the transformer in two parts with their index, the autoencoder as diffusers writes it, and the prompt."""
    torch.manual_seed(0)
    net = dit4sr.Transformer(**SMALL)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {**net.state_dict(), **unread(SMALL)}
    where = tmp_path / "DiT4SR" / "transformer"
    where.mkdir(parents=True)
    (where / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", "sample_size": 16, "out_channels": 16, "caption_projection_dim": 32, **SMALL}))
    names, files = sorted(state), [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({name: state[name] for name in names[i::2]}, where / file)
    (where / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}))
    dit4sr.AutoencoderKL(**TINY_VAE).save_pretrained(where.parent / "vae")
    save_file({f"{sign}{name}": torch.randn(shape) for sign in ("", "negative_") for name, shape in (("prompt_embeds", (1, TOKENS, 24)), ("pooled_prompt_embeds", (1, 20)))},
              where.parent / "prompt.safetensors")
    return where.parent


def flags(**over):
    return argparse.Namespace(**{"autoencoder": None, "prompt": None, "guidance": 3.0, "lora": 4, **over})


def open_teacher(folder, **over):
    return teachers.load_family(f"dit4sr:{folder}", flags(**over))[0]


def test_the_teacher_is_the_network_turned_round_and_guided(folder):
    """v = -(what the network says), of both prompts in one batch of twice the size, and counted so; latents as Stable Diffusion scales them."""
    teacher = open_teacher(folder)
    assert (teacher.latent_channels, teacher.factor, teacher.multiple, teacher.evaluations) == (16, 2, 4, 2)
    x_lr, seeds = torch.rand(2, 3, 24, 16) * 2 - 1, torch.arange(2)
    z_lr = teacher.to_latents(x_lr)
    assert torch.allclose(z_lr, (teacher.autoencoder.encode(x_lr).latent_dist.mean - 0.0609) * 1.5305) and teacher.to_pixels(z_lr).shape == x_lr.shape
    x_in = teacher.start(z_lr, 0.2, seeds)
    assert x_in.shape == (2, 32, 12, 8) and torch.equal(x_in[:, 16:], z_lr) and x_in[:, :16].std() == pytest.approx(1, abs=0.1)  # pure noise, whatever the task's sigma_p
    calls, t = [], torch.tensor([0.25, 0.75])
    teacher.net.register_forward_hook(lambda net, given, out: calls.append(given))
    v = teacher(x_in, t)
    assert len(calls) == 1 and torch.equal(calls[0][4], torch.tensor([750.0, 250, 750, 250]))
    said = [teacher.net(x_in[:, :16], z_lr, teacher.prompt[i].expand(2, -1, -1), teacher.pooled[i].expand(2, -1), 1000 * (1 - t)) for i in (0, 1)]
    assert torch.allclose(v, -(said[0] + 3 * (said[1] - said[0])), atol=1e-5) and not torch.allclose(said[0], said[1], atol=1e-3)
    assert integrate(teacher, x_in, "midpoint", 2)[1] == 8
    assert open_teacher(folder, guidance=1.0).evaluations == 1


def test_a_student_is_adapters_on_the_teachers_own_weights(folder):
    """Frozen weights lie in memory once; a student begins as its teacher, and what it learns leaves the teacher as it was; a file of it holds adapters and prompt alone."""
    teacher = open_teacher(folder, guidance=1.0)
    student = teacher.student()
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained) and {n.split(".lora_")[0].rsplit(".", 1)[1] for n in trained} == {
        "to_q", "to_k", "to_v", "to_q_control", "to_v_control", "0", "to_out_control", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj", "2"}
    average = copy.deepcopy(student)
    places = [{p.data_ptr() for n, p in net.named_parameters() if "lora_" not in n} for net in (teacher, student, average)]
    assert places[0] == places[1] == places[2]
    assert not {p.data_ptr() for n, p in student.named_parameters() if "lora_" in n} & {p.data_ptr() for n, p in average.named_parameters() if "lora_" in n}
    x_in, zero, s = torch.randn(2, 32, 8, 8), torch.zeros(2), torch.tensor([0.4, 0.7])
    before = teacher(x_in, zero)
    assert torch.allclose(student(x_in, zero), before, atol=1e-5)  # Eq. (11) holds from the start
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # at first lora_B's zeros hide lora_A from the loss
        distillation_losses(student, teacher, x_in, s - 0.1, s).sum().backward()
        optimizer.step()
    unreached = {n for n, p in student.named_parameters() if p.requires_grad and not p.grad.abs().sum()}
    assert not unreached, unreached
    assert torch.equal(teacher(x_in, zero), before) and not torch.allclose(student(x_in, zero), before, atol=1e-3)
    save_release(folder / "student.safetensors", student, dict(stage="distill", task=None, step=1))
    assert load_tensors(folder / "student.safetensors")[1].keys() == trained | {"prompt", "pooled"}
    again, meta = load_model(folder / "student.safetensors")
    assert again.one_step and again.evaluations == 1 and meta["model"]["family"] == "dit4sr"
    assert torch.allclose(again(x_in, s), student(x_in, s), atol=0.05) and not torch.allclose(again(x_in, s), teacher(x_in, s), atol=0.05)  # bfloat16
    assert torch.equal(again.student()(x_in, s), again(x_in, s))  # what --init_from starts from


def test_float16_is_read_as_bfloat16_and_computed_in_it(folder):
    for file in (folder / "transformer").glob("*.safetensors"):
        save_file({k: v.half() for k, v in load_tensors(file)[1].items()}, file)
    teacher = open_teacher(folder)
    student = teacher.student()
    assert {p.dtype for p in teacher.net.parameters()} == {torch.bfloat16} and {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    x_in, t = torch.randn(1, 32, 8, 8), torch.tensor([0.5])
    assert teacher(x_in, t).dtype == torch.float32
    student(x_in, t).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert student(x_in, t).isfinite().all()


def test_checkpointed_blocks_have_the_same_gradients(folder):
    student, x_in, grads = open_teacher(folder).student(), torch.randn(1, 32, 8, 8), []
    for again in (False, True):
        training.spare_memory(student, argparse.Namespace(args=argparse.Namespace(grad_checkpoint=again, shard=False)))
        student(x_in, torch.tensor([0.5])).square().mean().backward()
        grads.append([p.grad for p in student.parameters() if p.requires_grad])
        student.zero_grad(set_to_none=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    with pytest.raises(InputError, match="--shard"):
        training.spare_memory(student, argparse.Namespace(args=argparse.Namespace(grad_checkpoint=False, shard=True)))


def test_from_the_command_line_to_a_picture(folder, monkeypatch, capsys):
    """distill.py --lora, a stop and a resume, the release, sample.py and evaluate.py with it; then the folder moves."""
    monkeypatch.chdir(folder.parent)
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        Path("photos", part).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"photos/{part}/{part}{i}.png")
    command = ["--teacher", "dit4sr:DiT4SR", "--lora", "4", "--guidance", "3", "--data_dir", "photos", "--image_size", "32", "--batch_size", "2", "--eval_pictures", "1", "--eval_steps", "1",
               "--device", "cpu", "--warmup_iters", "0", "--learning_rate", "0.01", "--out_dir", "out"]
    distill.main([*command, "--max_iters", "2"])
    distill.main([*command, "--max_iters", "4", "--init_from", "resume", "--in_turn", "--grad_checkpoint"])
    said = capsys.readouterr().out
    assert "resumed at step 2" in said and "psnr_teacher" in said
    held = torch.load("out/ckpt.pt", weights_only=True)
    assert held["model"]["lora"] == 4 and held["step"] == 4 and all("lora_" in name for name in held["params"].keys() - {"prompt", "pooled"})
    assert any(value.abs().sum() for name, value in held["params"].items() if "lora_B" in name)
    Image.fromarray(rng.integers(0, 256, (8, 11, 3), dtype=np.uint8)).save("low.png")
    for ckpt in ("out/ckpt.pt", "out/weights.safetensors"):
        sample.main(["low.png", "-o", f"{Path(ckpt).stem}.png", "--ckpt", ckpt, "--device", "cpu", "--t", "1"])
        assert Image.open(f"{Path(ckpt).stem}.png").size == (44, 32)
    evaluate.main(["--ckpt", "out/weights.safetensors", "--data_dir", "photos", "--image_size", "32", "--t", "0,1", "--metrics", "psnr_rgb", "--device", "cpu", "--json", "table.json"])
    rows = json.loads(Path("table.json").read_text())["rows"]
    assert [row["nfe"] for row in rows if "weights" in str(row)][:2] == [1, 1]
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(InputError, match="which is not here: OFTSR_DIT4SR=DIR"):
        load_model("out/weights.safetensors")
    monkeypatch.setenv("OFTSR_DIT4SR", "elsewhere")
    assert load_model("out/weights.safetensors")[0].one_step
    part = next(Path("elsewhere/transformer").glob("*1-of*.safetensors"))
    save_file({k: v + 1 for k, v in load_tensors(part)[1].items()}, part)
    dit4sr.Base.opened.clear()
    with pytest.raises(InputError, match="another DiT4SR"):
        load_model("out/weights.safetensors")


def rewrite(path, change):
    tensors = load_tensors(path)[1]
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("damage, words", [
    (lambda d: shutil.rmtree(d), "no .*transformer.config.json: a DiT4SR is a folder"),
    (lambda d: shutil.rmtree(d / "vae"), "no .*vae.config.json"),
    (lambda d: (d / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "no weights at .*vae"),
    (lambda d: (d / "prompt.safetensors").unlink(), "no .*prompt.safetensors: the prompt's embeddings"),
    (lambda d: rewrite(d / "prompt.safetensors", lambda s: s.pop("negative_prompt_embeds")), "lacks negative_prompt_embeds .--guidance 1"),
    (lambda d: rewrite(d / "prompt.safetensors", lambda s: s.update(pooled_prompt_embeds=torch.zeros(1, 7))), "20 wide"),
    (lambda d: (d / "transformer" / "config.json").write_text("{"), "config.json is broken"),
    (lambda d: (d / "transformer" / "config.json").write_text("[]"), "holds a list"),
    (lambda d: (d / "transformer" / "config.json").write_text(json.dumps({**SMALL, "qk_norm": None})), "not by None"),
    (lambda d: (d / "transformer" / "config.json").write_text(json.dumps({**SMALL, "patch_size": "two"})), "describes none"),
    (lambda d: (d / "transformer" / "config.json").write_text("{}"), "does not say patch_size"),
    (lambda d: (d / "transformer" / "config.json").write_text(json.dumps({**SMALL, "num_layers": 2})), "does not hold DiT4SR's transformer"),
    (lambda d: (d / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}"), "lists no parts"),
    (lambda d: next((d / "transformer").glob("*2-of*")).unlink(), "no weights at .*2-of"),
    (lambda d: next((d / "transformer").glob("*2-of*")).write_bytes(b"nothing"), "broken or not a .safetensors"),
    (lambda d: rewrite(next((d / "transformer").glob("*1-of*")), lambda s: s.update({"context_embedder.bias": torch.zeros(3)})), "missing or of another shape, the first context_embedder.bias"),
    (lambda d: rewrite(next((d / "transformer").glob("*1-of*")), lambda s: s.update({"context_embedder.bias": torch.full((32,), torch.nan)})), "not finite")])
def test_a_broken_folder_is_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(InputError, match=words) as e:
        open_teacher(folder)
    assert "\n" not in str(e.value)


def test_a_dry_run_needs_no_folder(tmp_path, monkeypatch, capsys):
    """The real size, without weights: 2,504,337,536 of the published 2,716,814,144 are read; and places 226,492,416, autoencoder 83,819,683, adapters 115,605,504."""
    monkeypatch.chdir(tmp_path)
    distill.main(["--teacher", "dit4sr:nowhere", "--lora", "64", "--dataset", "realsr512", "--batch_size", "1", "--device", "cpu", "--dry_run"])
    assert "2,930,255,139 parameters" in capsys.readouterr().out
    with pytest.raises(InputError, match="no nowhere.transformer"):
        distill.main(["--teacher", "dit4sr:nowhere", "--dataset", "realsr512", "--device", "cpu"])


def test_without_the_libraries_it_is_one_line():
    code = "import sys; sys.modules['diffusers'] = None; from model import find_family; find_family('dit4sr')"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("console.InputError: a DiT4SR needs diffusers and peft: pip install -e '.[sd3]'")


def test_the_memory_is_what_autograd_keeps(folder, monkeypatch, capsys):
    """bench.py lora's count on shapes alone is that of a network that is there; its command runs through, small."""
    teacher = open_teacher(folder)
    student, kept = teacher.student(), []
    for batch in (1, 2):
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(bench.kept_bytes(student, lambda: student(torch.zeros(batch, 32, 16, 16), torch.full((batch,), 0.5))))
    counted = bench.lora_memory(dit4sr.DiT4SR(**{k: v for k, v in teacher.config.items() if k != "family"}), 32, frozen=torch.float32)
    assert counted[0] == kept[1] - kept[0] and 0 < counted[1] < counted[0] / 5
    monkeypatch.setattr(dit4sr, "MEDIUM", SMALL)
    monkeypatch.setattr(dit4sr, "VAE", TINY_VAE)
    bench.main(["lora", "--lora", "4", "--size", "32"])
    said = capsys.readouterr().out
    assert "adapters of rank 4" in said and said.count("--grad_checkpoint") == 2
