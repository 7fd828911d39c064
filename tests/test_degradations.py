"""The real world's degradation: each stage against its definition and the published outputs, the whole in distribution, and its draws."""
import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import signal, stats

import data
import degradations
import train_flow
from console import InputError
import kernels
from degradations import Damage, Harm, add_noise, blur, blur_kernel, degrade, draw, jpeg, real, resize, sinc_kernel, taps, to_float, uniforms, unsharp_kernel
from partners import find_partners
from test_train import SMALL, photos, run, signals  # noqa: F401 (fixtures)

GOLDEN = Path(os.environ.get("OFTSR_GOLDEN", "golden")) / "degradation"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the published outputs are not at {GOLDEN} (OFTSR_GOLDEN names their folder)")


@pytest.fixture(scope="module")
def published():
    arrays = np.load(GOLDEN / "degradation.npz")
    return {k: torch.from_numpy(arrays[k]) for k in arrays}, json.loads((GOLDEN / "degradation.json").read_text())


def photograph(size=128, batch=1):
    """Crops of a photograph, (B, 3, size, size) in [0, 1]."""
    image = torch.from_numpy(np.array(Image.open(data.ASSETS / "astronaut.png").convert("RGB"))).permute(2, 0, 1).float() / 255
    return torch.stack([image[:, 8 * i : 8 * i + size, 60 : 60 + size] for i in range(batch)])


# --- the published outputs ---


@golden
def test_kernels_are_the_published(published):
    arrays, meta = published
    for i, k in enumerate(meta["kernels"]):
        if k["kind"] == "sinc":
            ours = sinc_kernel(k["size"], k["cutoff"])
        else:
            ours = blur_kernel(k["size"], k["kind"].replace("gaussian", ""), k["sig_x"], k["sig_y"], k["theta"], k["beta"] or 1)
        assert np.abs(ours - arrays[f"kernel{i}"].numpy()).max() < 1e-15


@golden
def test_blur_and_jpeg_are_the_published(published):
    arrays, _ = published
    x, sizes = arrays["jpeg_in"], torch.tensor([[128, 128]])
    assert (blur(x, sizes, [arrays["kernel1"].numpy()]) - arrays["filter2d"]).abs().max() < 1e-6
    for quality in (30, 50, 75, 95):  # to 1e-5 everywhere: no rounding of a coefficient fell otherwise
        assert (jpeg(x, sizes, [quality]) - arrays[f"jpeg_{quality}"]).abs().max() < 1e-5
    assert (jpeg(x[..., :117, :99], torch.tensor([[117, 99]]), [60]) - arrays["jpeg_odd_60"]).abs().max() < 1e-5


def unclamped_noise(x, damage):
    """The noise itself: drawn at the strength of a thousandth, where nothing is clamped, and made large again."""
    y = 0.5 * x + 0.25 if damage.gaussian else x.clamp(1e-3, 1 - 1e-3)  # the same 8-bit values
    n = add_noise(y, torch.tensor([x.shape[2:]]), [replace(damage, noise=1e-3)], torch.tensor([5]), 3).double() - y
    return n * (damage.noise / 1e-3)


@golden
@pytest.mark.parametrize("gaussian, amount", [(True, 10 / 255), (False, 0.05), (False, 1.0), (False, 3.0)])
@pytest.mark.parametrize("gray", [False, True])
def test_noises_have_the_published_deviation(gaussian, amount, gray, published):
    """A gray noise of 128 x 128 draws is known to 1/180 of its deviation: within four of these."""
    arrays, meta = published
    x = torch.full((1, 3, 128, 128), 0.4) if gaussian else arrays["jpeg_in"]
    n = unclamped_noise(x, Damage(gaussian=gaussian, noise=amount, gray=gray))
    expected = meta["noise"][("gaussian_sigma10" if gaussian else f"poisson_{amount}") + "_gray" * gray]
    expected = expected[0] if isinstance(expected, list) else expected
    assert n.std().item() == pytest.approx(expected, rel=4 / 180 * (1 if gray else 3**-0.5) + 4 / 180)  # theirs is a draw too
    assert abs(n.mean().item()) < 4 * expected / 128
    assert gray == ((n[:, 0] - n[:, 1]).abs().max() < 0.01 * expected).item()


@golden
def test_the_whole_is_the_published_in_distribution(published):
    """Kolmogorov-Smirnov on three statistics of the degraded picture; all 1,500 draws: LOG.md."""
    arrays, _ = published
    x_1 = to_float(arrays["picture_256"])
    y = real(x_1.expand(250, -1, -1, -1), torch.arange(250), 4, 1.0) * 0.5 + 0.5
    reduced = degradations.H(x_1, "bicubic", 4) * 0.5 + 0.5
    laplace = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None].float()
    ours = dict(psnr_to_bicubic=-10 * torch.log10((y - reduced).square().mean((1, 2, 3))), mean=y.mean((1, 2, 3)),
                laplacian_std=F.conv2d(y.mean(1, keepdim=True), laplace).std((1, 2, 3)))
    for name, values in ours.items():
        assert stats.ks_2samp(values.numpy(), arrays[name].numpy()).pvalue > 1e-3, name
    wrong = stats.ks_2samp(ours["laplacian_std"].numpy() * 1.2, arrays["laplacian_std"].numpy())
    assert wrong.pvalue < 1e-3  # the test can tell


# --- each stage against its definition ---


@pytest.mark.parametrize("size", [(24, 40), (31, 17), (5, 3)])
def test_blur_is_the_correlation_of_the_reflected_picture(size):
    x = torch.rand(2, 3, *size)
    filters = [blur_kernel(9, "plateau", 2.0, 0.7, 0.5, 1.3), np.random.default_rng(0).random((5, 5))]
    sizes = torch.tensor([size, size])
    y = blur(x, sizes, filters)
    for i, k in enumerate(filters):
        r = len(k) // 2
        for c in range(3):
            wide = np.pad(x[i, c].double().numpy(), r, mode="reflect")
            assert np.abs(y[i, c].numpy() - signal.correlate(wide, k, "valid")).max() < 1e-5
    assert torch.equal(blur(x, sizes, [None, filters[1]])[0], x[0])


def test_kernels_sum_to_one_and_say_what_they_are():
    for k in (blur_kernel(21, "generalized", 3, 1, 1, 0.5), sinc_kernel(13, 2.0), unsharp_kernel(0.7, 1.0)):
        assert k.sum() == pytest.approx(1)
    k = blur_kernel(21, "", 2.0, 1.0, math.pi / 2)  # turned by a quarter: the long axis is the rows'
    y, x = np.mgrid[:21, :21] - 10
    assert (k * y * y).sum() == pytest.approx(4, rel=0.01) and (k * x * x).sum() == pytest.approx(1, rel=0.01)
    flat = np.abs(np.fft.fft2(sinc_kernel(21, 1.5), (64, 64)))[0]  # passes what is slower than its cutoff, stops the rest
    assert flat[:10].min() > 0.8 and flat[22:33].max() < 0.2  # 1.5 radians a pixel: place 15.3 of 64


@pytest.mark.parametrize("method", degradations.METHODS)
@pytest.mark.parametrize("target", [0.37, 1.33, (11, 50)])
def test_resize_is_pytorchs(method, target):
    x = torch.rand(2, 3, 40, 56)
    how = dict(size=target) if isinstance(target, tuple) else dict(scale_factor=target)
    y, sizes = resize(x, torch.tensor([[40, 56], [33, 20]]), [target, (7, 60)], [method, "area"])
    for i, right in enumerate((F.interpolate(x[:1], mode=method, **how), F.interpolate(x[1:, :, :33, :20], size=(7, 60), mode="area"))):
        h, w = sizes[i]
        assert (y[i : i + 1, :, :h, :w] - right).abs().max() < 2e-6


def test_the_antialiased_reduction_is_pytorchs():
    x = torch.rand(1, 3, 96, 50)
    y, _ = resize(x, torch.tensor([[96, 50]]), [(24, 17)], ["antialiased"])
    assert (y - F.interpolate(x, size=(24, 17), mode="bicubic", antialias=True)).abs().max() < 2e-6


@pytest.mark.parametrize("method", degradations.METHODS)
@pytest.mark.parametrize("n, m", [(1, 1), (3, 1), (1, 5), (100, 7), (7, 100)])
def test_a_resized_row_stays_in_its_row(method, n, m):
    index, weights = taps(method, n, m)
    assert index.min() >= 0 and index.max() < n and np.allclose(weights.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("N, level", [(256, 255), (256, 30), (64, 200), (16, 40), (4, 128)])
def test_photons_are_counted_as_poisson_has_it(N, level):
    """The counts of 400,000 normal draws against the Poisson law: mean, variance, and each probability to 4 thousandths."""
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    table = degradations.poisson_quantiles()[N.bit_length() - 1, level]
    k = table[((z + 6) * (len(table) / 12)).long()].float()
    expected = level * N / 255
    assert k.mean().item() == pytest.approx(expected, abs=5 * (expected / 4e5) ** 0.5 + 1e-3 * expected)
    assert k.var().item() == pytest.approx(expected, rel=0.015)
    counts = torch.bincount(k.long(), minlength=400).numpy() / 400_000
    assert np.abs(counts - stats.poisson.pmf(np.arange(len(counts)), expected)).max() < 4e-3


def test_jpeg_is_a_files_but_for_roundings():
    """Against Pillow's file at the same quality: closer to it than to the picture, in mean and in what is lost."""
    x = photograph()
    for quality in (30, 75, 90):
        file = io.BytesIO()
        Image.fromarray((x[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "jpeg", quality=quality, subsampling=2)
        theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
        ours = jpeg(x, torch.tensor([[128, 128]]), [quality])
        lost, off = (theirs - x).square().mean().sqrt(), (theirs - ours).square().mean().sqrt()
        assert off < 0.85 * lost and (ours - x).square().mean().sqrt() == pytest.approx(lost.item(), rel=0.15)


# --- what is drawn ---


def test_the_draws_follow_the_table():
    """4,000 pictures at strength 1: each chance within four of its deviations, each range filled to its ends."""
    harms = [draw(u, 1.0) for u in uniforms(torch.arange(4000), 100)]
    first, second = [h.rounds[0] for h in harms], [h.rounds[1] for h in harms if len(h.rounds) > 1]

    def share(items, p, of=4000):
        assert abs(sum(items) / of - p) < 4 * (p * (1 - p) / of) ** 0.5 + 1e-9

    share([len(h.rounds) == 2 for h in harms], 0.5)
    share([d.ratio > 1 for d in first], 0.2)
    share([d.ratio == 1 for d in first], 0.1)
    share([d.gaussian for d in first], 0.5)
    share([d.gray for d in first], 0.4)
    share([h.jpeg_last for h in harms], 0.5)
    share([h.kernel is not None for h in harms], 0.8)
    share([d.kernel is not None for d in second], 0.8, len(second))
    assert {len(d.kernel) for d in first} == set(range(3, 20, 2)) and all(h.quality and h.last_quality and h.strength == 1 for h in harms)
    for values, low, high in (([d.ratio for d in first], 0.15, 1.5), ([d.noise * 255 for d in first if d.gaussian], 1, 30),
                              ([d.noise for d in first if not d.gaussian], 0.05, 3), ([h.quality for h in harms], 30, 95),
                              ([d.ratio for d in second], 0.3, 1.2), ([d.noise * 255 for d in second if d.gaussian], 1, 25)):
        assert low <= min(values) < low + 0.02 * (high - low) and high - 0.02 * (high - low) < max(values) <= high
    assert {h.method for h in harms} == set(degradations.METHODS)


def test_a_picture_is_its_seeds_alone():
    """Alone, in a batch, in another order, at a corner of a larger canvas: the same bits. Another seed: another accident."""
    x_1, seeds = photograph(64, 6) * 2 - 1, torch.arange(6) * 2**32 + 7
    y = real(x_1, seeds, 4)
    assert torch.equal(y, torch.cat([real(x_1[i : i + 1], seeds[i : i + 1], 4) for i in range(6)]))
    assert torch.equal(y.flip(0), real(x_1.flip(0), seeds.flip(0), 4))
    assert not torch.equal(y, real(x_1, seeds + 1, 4))
    assert torch.equal(y, to_float(((y + 1) * 127.5).round()))  # 8 bits


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_the_kernels_make_the_references_pictures(strength, monkeypatch):
    """The extension and PyTorch: the same bits, over all kinds of harm that 24 pictures meet."""
    if "cpu" not in kernels.extension_devices():
        pytest.skip("no extension here")
    x_1, seeds = photograph(48, 24) * 2 - 1, torch.arange(24)
    y = real(x_1, seeds, 4, strength)
    monkeypatch.setattr(kernels, "_chosen", ())
    assert torch.equal(y, real(x_1, seeds, 4, strength))


@pytest.mark.parametrize("size", [(50, 70), (33, 41), (1, 9), (16, 64), (3, 2)])
def test_each_stage_alone_is_its_reference(size):
    """Filters of all sizes, one of them padded with zeros; every way to resize; noises; JPEG: on a picture of few and of odd pixels."""
    if "cpu" not in kernels.extension_devices():
        pytest.skip("no extension here")
    random = np.random.default_rng(0)
    damages = [Damage(kernel=random.standard_normal((k, k))) for k in range(3, 21, 2)] + [Damage(kernel=np.pad(random.random((5, 5)), 3)), Damage(kernel=np.zeros((7, 7)))]
    damages += [Damage(ratio=ratio, method=method) for ratio in (0.15, 0.37, 1.33, 3.0) for method in degradations.METHODS]
    damages += [Damage(noise=noise, gaussian=gaussian, gray=gray) for noise in (0.05, 2.0) for gaussian in (True, False) for gray in (True, False)]
    harms = [Harm(1.0, (d,), None, method, None, None, False) for d in damages for method in ("antialiased", "bicubic")]
    harms += [Harm(1.0, (Damage(),), quality, "area", None, None, False) for quality in (1, 30, 60.5, 99)]
    x_1, seeds = torch.rand(len(harms), 3, *size) * 2 - 1, torch.arange(len(harms))
    x_1[-1] = 0.25  # one level: its photons are counted with N = 1
    for ours, right, h in zip(degradations.harm_one_by_one(x_1, seeds, harms, 1), degradations.harm(x_1, seeds, harms, 1), harms):
        assert torch.equal(ours, right), h


def test_photons_in_a_smaller_table():
    steps, bins = degradations.poisson_steps().int(), torch.arange(16)
    assert torch.equal((steps >> 5)[..., None] + (bins >= (steps & 31)[..., None]).int(), degradations.poisson_quantiles().unflatten(2, (-1, 16)).int())


@pytest.mark.parametrize("stage, says", [((kernels.BLUR, 4, 0, 0, 0), "k odd"), ((kernels.BLUR, 5, 9, 0, 0), "lie in the 30 of filters"), ((kernels.RESIZE, 4, 8, 8, 0), "a method"),
                                         ((kernels.RESIZE, 0, 0, 8, 0), "a size or a ratio"), ((4, 0, 0, 0, 0), "kind 0 to 3, not 4"), ((kernels.RESIZE, 0, 9, 8, 0), "end at the size asked for")])
def test_bad_stages_are_one_line(stage, says):
    if "cpu" not in kernels.extension_devices():
        pytest.skip("no extension here")
    x, stages = torch.zeros(2, 3, 8, 8), torch.tensor([stage], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=says):
        kernels.damage(x, torch.arange(2), torch.tensor([0, 0, 1]), stages, torch.ones(30), degradations.poisson_steps(), 8, 8)
    with pytest.raises(RuntimeError, match="first must rise from 0"):
        kernels.damage(x, torch.arange(2), torch.tensor([0, 1, 0]), stages.new_tensor([[3, 1, 0, 0, 0]]), torch.ones(30), degradations.poisson_steps(), 8, 8)


def test_strength_is_a_scale_from_nothing_to_the_published():
    x_1, seeds = photograph(96).expand(40, -1, -1, -1) * 2 - 1, torch.arange(40)
    task = replace(data.TASKS["photos_real"], strength=0.0)
    assert torch.equal(degrade(x_1, task, seeds), degrade(x_1, data.TASKS["photos"], seeds))  # bicubic, 8 bits, nothing else
    clean = real(x_1, seeds, 4, 0.0)
    loss = [(real(x_1, seeds, 4, s) - clean).square().mean().item() for s in (0.01, 0.1, 0.3, 0.6, 1.0)]
    assert loss == sorted(loss) and loss[0] < 0.05 * loss[-1]  # JPEG at its best still halves the colours
    drawn = np.array([draw(u).strength for u in uniforms(torch.arange(4000), 100)])
    for share, p in ((drawn == 0, 0.15), (drawn == 1, 0.15), (drawn < 0.5, 0.5)):
        assert abs(share.mean() - p) < 4 * (p * (1 - p) / 4000) ** 0.5
    light = [draw(u, 0.2) for u in uniforms(torch.arange(1000), 100)]
    assert all(h.last_quality is None or 84 <= h.last_quality <= 98 for h in light)  # a good phone's
    sharpened = [h.kernel for h in light if h.kernel is not None and h.kernel.max() > 1]
    assert 0.25 < len(sharpened) / 1000 < 0.45 and max(k.max() for k in sharpened) < 1 + 0.8


def test_nine_accidents_to_look_at(tmp_path):
    picture = str(data.ASSETS / "cat.png")
    degradations.main([picture, "-o", str(tmp_path / "draws.png"), "--zoom", "1"])
    sheet = np.array(Image.open(tmp_path / "draws.png"))
    assert sheet.shape == (3 * 75, 3 * 112, 3) and not np.array_equal(sheet[:75, :112], sheet[75:150, :112])
    degradations.main([picture, "-o", str(tmp_path / "draws.png"), "--strength", "0", "--zoom", "1"])
    sheet = np.array(Image.open(tmp_path / "draws.png"))
    assert np.array_equal(sheet[:75, :112], sheet[150:, 224:])  # nothing happened to any of them


# --- the tasks ---


def test_the_tasks_of_the_real_world():
    rows = {n: (t.degradation, t.strength, t.scale, t.image_size, t.eight_bit) for n, t in data.TASKS.items() if t.degradation == "real"}
    assert rows == dict(photos_real=("real", -1, 4, 128, True), realsr=("real", 1, 4, 256, True), realsr512=("real", 1, 4, 512, True))


def test_bad_strengths_are_one_line(photos, tmp_path):  # noqa: F811
    for flags, says in ((["--dataset", "photos_real", "--strength", "-0.5"], "between 0 and 1, or be -1"), (["--strength", "1"], "of --degradation real, not of bicubic")):
        with pytest.raises(InputError, match=says):
            train_flow.main([*SMALL, *flags, "--data_dir", str(photos), "--out_dir", str(tmp_path / "out")])


def test_a_tiny_network_learns_and_is_distilled_on_it(photos, tmp_path, monkeypatch):  # noqa: F811
    import distill
    monkeypatch.chdir(tmp_path)
    task = ["--dataset", "photos_real"]
    checkpoint = run(train_flow, photos, tmp_path / "out" / "flow", *task, "--max_iters", 3)
    assert checkpoint["task"]["degradation"] == "real" and checkpoint["task"]["strength"] == -1
    student = run(distill, photos, tmp_path / "out" / "student", *task, "--max_iters", 2)
    assert student["stage"] == "distill" and student["task"] == checkpoint["task"]
    run(distill, photos, tmp_path / "out" / "truth", *task, "--loss", "perceptual", "--max_iters", 1)


# --- pairs from disk ---


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Eight pairs in RealSR's names, the low-resolution ones not what any H of ours makes: mirrored in their colours."""
    hr, lr = (tmp_path_factory.mktemp(name) for name in ("hr", "lr"))
    x = (photograph(64, 8) * 255).round()
    for i in range(8):
        Image.fromarray(x[i].byte().permute(1, 2, 0).numpy()).save(hr / f"Canon_{i}_HR.png")
        small = F.interpolate(255 - x[i : i + 1], size=(16, 16), mode="area")[0].round()
        Image.fromarray(small.byte().permute(1, 2, 0).numpy()).save(lr / f"Canon_{i}_LR4.png")
    return hr, lr


def test_pairs_are_cut_and_turned_together(pairs):
    hr, lr = pairs
    paths = sorted(hr.iterdir())
    low = find_partners(paths, lr)
    assert [p.name for p in low.values()] == [f"Canon_{i}_LR4.png" for i in range(8)]
    pictures = data.Pictures(paths, replace(data.TASKS["photos"], image_size=32, vflip=0.5), 0, low)
    for n in range(20):
        x_1, _, y = pictures[n % 8, n]
        assert x_1.shape == (3, 32, 32) and y.shape == (3, 8, 8)
        assert (F.avg_pool2d(255 - x_1.float()[None], 4)[0] - y).abs().max() <= 0.5  # the same place, the same way round
    mixed = find_partners([*paths, *low.values()], lr)  # both kinds in one list, as RealSR's test folders hold them
    assert mixed == low


def test_a_folder_of_low_resolution_pictures_may_repeat_the_true_ones_names(pairs, tmp_path):
    """a_HR.png with another folder's a_HR.jpg; where that has a_LR4.png too, with it; and never with itself."""
    hr, lr = pairs
    paths = sorted(hr.iterdir())
    for p in paths:
        Image.open(lr / p.name.replace("_HR", "_LR4")).save(tmp_path / f"{p.stem}.jpg")
    assert [p.name for p in find_partners(paths, tmp_path).values()] == [f"Canon_{i}_HR.jpg" for i in range(8)]
    (tmp_path / "Canon_0_LR4.png").write_bytes((lr / "Canon_0_LR4.png").read_bytes())
    assert find_partners(paths, tmp_path)[paths[0]].name == "Canon_0_LR4.png"
    with pytest.raises(InputError, match="has no partner Canon_0"):
        find_partners(paths, hr)


def test_pairs_train_distil_and_are_measured(pairs, tmp_path, monkeypatch, capsys):
    import distill
    import evaluate
    hr, lr = pairs
    monkeypatch.chdir(tmp_path)
    run(train_flow, hr, tmp_path / "out" / "flow", "--lr_dir", lr, "--max_iters", 2)
    run(distill, hr, tmp_path / "out" / "student", "--lr_dir", lr, "--max_iters", 2)
    monkeypatch.setattr(evaluate, "SHIPPED", ())
    arguments = ["--data_dir", str(hr), "--lr_dir", str(lr), "--trained_too", "--metrics", "psnr_rgb"]
    evaluate.main([*arguments, "--json", "scores.json"])
    (row,) = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert row["pictures"] == 8 and row["psnr_rgb"] < 12  # of a negative
    assert f"{lr}'s own" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "SHIPPED", (tmp_path / "out" / "student" / "weights.safetensors",))
    evaluate.main([*arguments, "--pictures", "1", "--seeds", "1", "--t", "0"])


@pytest.mark.parametrize("spoil, says", [("missing", "Canon_3_HR.png has no partner Canon_3"), ("size", "Canon_3_LR4.png is 15 x 16 .* should be 60 x 64"),
                                         ("two", "both of Canon_3")])
def test_bad_pairs_are_named(spoil, says, pairs, tmp_path, monkeypatch):
    import shutil

    import evaluate
    hr, lr = pairs
    shutil.copytree(lr, tmp_path / "lr")
    bad = tmp_path / "lr" / "Canon_3_LR4.png"
    if spoil == "missing":
        bad.unlink()
    elif spoil == "two":
        shutil.copy(bad, tmp_path / "lr" / "Canon_3.bmp")
    else:
        Image.open(bad).crop((0, 0, 15, 16)).save(bad)
    monkeypatch.setattr(evaluate, "SHIPPED", ())
    with pytest.raises(InputError, match=says):
        evaluate.main(["--data_dir", str(hr), "--lr_dir", str(tmp_path / "lr"), "--out_dir", str(tmp_path / "out")])
    with pytest.raises(InputError, match=says):
        run(train_flow, hr, tmp_path / "flow", "--lr_dir", tmp_path / "lr", "--max_iters", 2)
