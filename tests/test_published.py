"""Files of others: published checkpoints, guided-diffusion's weights, and what becomes of them; the best checkpoint of a run."""
import copy
import json

import pytest
import torch

import model
from console import InputError
from model import PRESETS, UNet, load_model

CONFIG = {**PRESETS["plain"], "patch": 1, "mults": (1, 2), "out_channels": 6}


@pytest.fixture
def preset(monkeypatch):
    """A published network, small: six outputs, no preconditioning."""
    monkeypatch.setitem(PRESETS, "small", CONFIG)
    torch.manual_seed(0)
    net = UNet(**CONFIG)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    return net.eval()


def averages(net):
    return dict(decay=0.9999, num_updates=7, shadow_params=[p.detach() for p in net.parameters()])


def same(net, other):
    x, t = torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3])
    with torch.no_grad():
        return torch.equal(net(x, t), other(x, t))


def test_the_published_codes_full_checkpoint(preset, tmp_path):
    old = {k: torch.zeros_like(v) for k, v in preset.state_dict().items()}  # the weights of its last step: the averages count
    torch.save(dict(optimizer={"state": {}}, model=old, ema=averages(preset), step=20_000), tmp_path / "full.pth")
    torch.save(dict(ema=averages(preset), step=20_000), tmp_path / "list.pth")
    for name in ("full.pth", "list.pth"):
        net, meta = load_model(tmp_path / name, model="small")
        assert same(net, preset) and (meta["stage"], meta["task"], meta["step"]) == (None, None, 20_000)
        with pytest.raises(InputError, match="does not say which network it holds"):
            load_model(tmp_path / name)


def unconditional(net):
    """Weights as guided-diffusion keeps them: {name: tensor}, three channels in, half precision."""
    state = {k: v.half() for k, v in net.state_dict().items()}
    state["input_blocks.0.0.weight"] = state["input_blocks.0.0.weight"][:, :3].clone()
    return state


def test_an_unconditional_network_becomes_one_that_does_not_look_at_x_lr_yet(preset, tmp_path):
    torch.save(unconditional(preset), tmp_path / "uncond.pt")
    net, meta = load_model(tmp_path / "uncond.pt", model="small")
    x, t = torch.randn(1, 6, 16, 16), torch.tensor([0.3])
    blind = torch.cat([x[:, :3], torch.zeros(1, 3, 16, 16)], dim=1)
    with torch.no_grad():
        assert torch.equal(net(x, t), net(blind, t)) and torch.allclose(net(x, t), preset(blind, t), atol=0.02)
    assert meta["stage"] is None and net.config["condition"]


def test_a_published_flow_without_x_lr_draws_pictures(preset, tmp_path, capsys):
    """Appendix F's: a list of averages whose first convolution has three inputs. It draws; restoring, or starting a flow that sees x_lr, is refused."""
    import sample
    import train_flow
    net = UNet(**{**CONFIG, "condition": False})
    torch.save(dict(ema=averages(net), step=5), tmp_path / "uncond.pth")
    loaded, _ = load_model(tmp_path / "uncond.pth", model="small")
    assert not loaded.config["condition"] and same(loaded, net)
    flags = ["--ckpt", str(tmp_path / "uncond.pth"), "--preset", "small", "--dataset", "ffhq_uncond"]
    assert sample.main(["--generate", "1", *flags, "--solver", "euler", "--steps", "1", "-o", str(tmp_path / "drawn")]) == 0
    assert "1 pictures drawn" in capsys.readouterr().out
    with pytest.raises(InputError, match="does not see x_lr"):
        train_flow.main(["--dataset", "photos", "--model", "small", "--init_from", str(tmp_path / "uncond.pth"), "--image_size", "16", "--out_dir", str(tmp_path / "out")])


def test_outputs_not_in_use_go(preset, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "three", {**CONFIG, "out_channels": 3})
    torch.save(unconditional(preset), tmp_path / "uncond.pt")
    net, _ = load_model(tmp_path / "uncond.pt", model="three")
    assert torch.equal(net.out["2"].weight, preset.out["2"].weight[:3].half().float())


def test_what_does_not_match_is_listed(preset, tmp_path):
    state = unconditional(preset)
    state["label_emb.weight"] = torch.zeros(1000, 4)
    state["time_embed.0.bias"] = state["time_embed.0.bias"][:-1]
    del state["out.0.weight"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InputError, match="in 3 places") as e:
        load_model(tmp_path / "other.pt", model="small")
    for words in ("out.0.weight is missing", "label_emb.weight is none of ours", "time_embed.0.bias is (127,), not (128,)"):
        assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_convert_makes_a_release(preset, tmp_path, capsys):
    torch.save(dict(optimizer={}, model=preset.state_dict(), ema=averages(preset), step=9), tmp_path / "full.pth")
    flags = ["convert", str(tmp_path / "full.pth"), str(tmp_path / "net.safetensors"), "--model", "small"]
    model.PRESETS["small"] = CONFIG
    with pytest.raises(InputError, match="add --stage"):
        model.convert(flags)
    model.convert([*flags, "--stage", "distill", "--dataset", "ffhq"])
    assert "distill of ffhq" in capsys.readouterr().out
    net, meta = load_model(tmp_path / "net.safetensors")
    assert (meta["stage"], meta["task"]["name"], meta["step"]) == ("distill", "ffhq", 9)
    assert all(torch.equal(a.bfloat16().float(), b) for a, b in zip(preset.parameters(), net.parameters()))
    with pytest.raises(InputError, match="says that it is distill"):
        model.convert(["convert", str(tmp_path / "net.safetensors"), str(tmp_path / "again.safetensors"), "--stage", "flow"])
    with pytest.raises(InputError, match="should end in .safetensors"):
        model.convert([*flags[:2], "net.pt"])


def test_convert_averages(weights, tmp_path):
    """IN and --average FILE[=SHARE]: each parameter is the weighted sum; shares too large or half given, and other networks, are refused."""
    first, meta = load_model(weights / "distill.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "c")]
    nets = []
    for i, file in enumerate(files):
        nets.append(copy.deepcopy(first))
        for p in nets[-1].parameters():
            p.data += (i + 1) * torch.linspace(-1, 1, p.numel()).view_as(p)
        model.save_release(file, nets[-1], meta)
    nets = [load_model(file)[0] for file in files]  # as rounded
    out = str(tmp_path / "mean.safetensors")
    for flags, shares in (([], (1 / 3, 1 / 3, 1 / 3)), (["=0.25", "=0.1"], (0.65, 0.25, 0.1))):
        model.convert(["convert", files[0], out, "--average", *[f + s for f, s in zip(files[1:], flags or ["", ""])]])
        mean, kept = load_model(out)
        assert kept["stage"] == "distill" and kept["task"] == meta["task"]
        for p, *parts in zip(mean.parameters(), *(net.parameters() for net in nets)):
            assert torch.equal(p, sum(share * part for share, part in zip(shares, parts)).bfloat16().float())
    for shares, words in ((("=0.6", "=0.6"), "sum to 1.2"), (("=0.6", ""), "every file a share"), (("=-1", "=0"), "out of range")):
        with pytest.raises((InputError, SystemExit), match=words if words != "out of range" else None):
            model.convert(["convert", files[0], out, "--average", *[f + s for f, s in zip(files[1:], shares)]])
    with pytest.raises(InputError, match="does not hold the network of"):
        model.convert(["convert", files[0], out, "--average", str(weights / "flow.safetensors")])


def test_convert_adds_what_a_flow_learnt(weights, tmp_path):
    """IN --add NEW OLD: a student's weights and NEW - OLD, still a student of its task; where nothing was learnt it stays as it is; another sigma_p is refused."""
    student, meta = load_model(weights / "distill.safetensors")
    old, flow_meta = load_model(weights / "flow.safetensors")
    new = copy.deepcopy(old)
    for p in new.parameters():
        p.data += torch.linspace(-1, 1, p.numel()).view_as(p)
    model.save_release(tmp_path / "new.safetensors", new, flow_meta)
    new, out = load_model(tmp_path / "new.safetensors")[0], str(tmp_path / "moved.safetensors")
    model.convert(["convert", str(weights / "distill.safetensors"), out, "--add", str(tmp_path / "new.safetensors"), str(weights / "flow.safetensors")])
    moved, kept = load_model(out)
    assert kept["stage"] == "distill" and kept["task"] == meta["task"] and moved.config == student.config
    for p, a, b, c in zip(moved.parameters(), student.parameters(), new.parameters(), old.parameters()):
        assert torch.equal(p, (a + b - c).bfloat16().float())
    model.convert(["convert", str(weights / "distill.safetensors"), out, "--add", str(weights / "flow.safetensors"), str(weights / "flow.safetensors")])
    assert same(load_model(out)[0], student)
    other = UNet(**{**old.config, "precond": {**old.config["precond"], "sigma_p": 0.3}})
    model.save_release(tmp_path / "other.safetensors", other, flow_meta)
    with pytest.raises(InputError, match="other.safetensors does not hold the network of"):
        model.convert(["convert", str(weights / "distill.safetensors"), out, "--add", str(tmp_path / "other.safetensors"), str(weights / "flow.safetensors")])


def test_a_flow_starts_from_it_and_keeps_its_best(preset, tmp_path, monkeypatch):
    """--init_from guided-diffusion's file; --keep_best by what log.jsonl says."""
    import train_flow
    from test_metrics import smooth
    from PIL import Image
    for i in range(4):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(smooth(i, 48, 48)).save(tmp_path / f"photos/{i}.png")
    torch.save(unconditional(preset), tmp_path / "uncond.pt")
    monkeypatch.chdir(tmp_path)
    train_flow.main(["--dataset", "photos", "--model", "small", "--init_from", "uncond.pt", "--data_dir", "photos", "--image_size", "16", "--batch_size", "1", "--max_iters", "4",
                     "--eval_interval", "1", "--eval_pictures", "1", "--eval_steps", "1", "--warmup_iters", "1", "--learning_rate", "0.003", "--device", "cpu", "--keep_best", "psnr_one"])
    entries = [json.loads(line) for line in (tmp_path / "out/photos_flow/log.jsonl").read_text().splitlines()]
    scores = {e["step"]: e["psnr_one"] for e in entries if "psnr_one" in e}
    assert len(scores) == 4
    best = torch.load(tmp_path / "out/photos_flow/ckpt_best.pt", weights_only=True)
    assert best["step"] == max(scores, key=scores.get)
