"""Pictures in and out, the order of training, the degradations, the table of tasks."""
import argparse
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import data
import kernels
from console import InputError
from degradations import H_T, H, degrade, to_float
from pictures import list_images, read_image, write_picture


def picture(height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(picture(seed=i)).save(tmp_path / f"{i % 2}" / f"{i:02}.png")
    return tmp_path


def test_table_has_the_papers_rows():
    """Section 4.1 and Appendix E: degradations, noise, perturbation, sizes, crops."""
    rows = {n: (t.degradation, t.scale, t.sigma_n, t.sigma_p, t.image_size, t.crop, t.loss) for n, t in data.TASKS.items()}
    assert rows["ffhq"] == ("bicubic", 4, 0, 0.1, 256, "center", "l1")
    assert rows["ffhq_noisy"] == ("avgpool", 4, 0.05, 0.5, 256, "center", "l1")
    assert rows["ffhq_x8"][1] == 8 and rows["ffhq512_x4"][4] == 512 and rows["ffhq512_x8"][1] == 8
    assert rows["div2k"] == ("bicubic", 4, 0, 0.2, 256, "random", "l1")
    assert rows["imagenet"] == ("bicubic", 4, 0, 0.2, 256, "center", "l1")
    assert rows["ffhq_uncond"][3] == 1.0 and rows["ffhq_uncond"][6] == "l2"
    assert data.TASKS["ffhq_uncond"].condition is False and data.TASKS["ffhq_uncond"].hflip == 0
    assert all((t.hflip, t.vflip) == (0.5, 0.06) for n, t in data.TASKS.items() if n != "ffhq_uncond")
    assert data.TASKS["imagenet"].model == "imagenet" and data.TASKS["div2k"].model == "ffhq"
    assert data.TASKS["ffhq"].train_files == 60000


def test_flags_override_cells():
    p = argparse.ArgumentParser()
    data.add_task_flags(p)
    task = data.resolve_task(p.parse_args(["--dataset", "ffhq", "--sigma_p", "0", "--scale", "8"]))
    assert (task.name, task.sigma_p, task.scale, task.model) == ("ffhq", 0.0, 8, "ffhq")
    with pytest.raises(InputError, match="multiple of --scale"):
        data.resolve_task(p.parse_args(["--image_size", "90"]))
    for bad in (["--sigma_p", "1.5"], ["--scale", "0"], ["--hflip", "nan"]):
        with pytest.raises(SystemExit):
            p.parse_args(bad)


def test_validation_files_are_held_out(folder, tmp_path):
    task = data.TASKS["photos"]
    train, val = data.find_data(task, folder)
    assert len(val) == 1 and len(train) == 19 and not set(train) & set(val)
    (folder / "val").mkdir()
    for i in range(3):
        Image.fromarray(picture()).save(folder / "val" / f"v{i}.png")
    train, val = data.find_data(task, folder)
    assert [p.name for p in val] == ["v0.png", "v1.png", "v2.png"] and len(train) == 20
    names = (data.ASSETS / "ffhq_val_100.txt").read_text().split()
    assert len(names) == len(set(names)) == 100
    for name in names[:2]:
        Image.fromarray(picture()).save(folder / name)
    train, val = data.find_data(data.TASKS["ffhq"], folder)  # the task's list comes before val/
    assert sorted(p.name for p in val) == sorted(names[:2]) and len(train) == 23
    (folder / names[0]).rename((folder / names[0]).with_suffix(".JPEG"))
    assert len(data.find_data(data.TASKS["ffhq"], folder)[1]) == 2  # whatever the endings
    train, _ = data.find_data(data.TASKS["ffhq_uncond"], folder)
    assert len(train) == 25  # Appendix F trains on everything
    train, _ = data.find_data(data.replace(data.TASKS["ffhq"], train_files=5), folder)
    assert len(train) == 5


def test_no_data_is_one_line(tmp_path):
    for path, says in ((tmp_path / "missing", "no folder"), (tmp_path, "no pictures in")):
        with pytest.raises(InputError, match=says) as e:
            data.find_data(data.TASKS["photos"], path)
        assert str(path) in str(e.value)


def test_read_image_kinds(tmp_path):
    rgb = picture()
    path = tmp_path / "a.png"
    Image.fromarray(rgb).save(path)
    assert np.array_equal(read_image(path), rgb)
    gray = rgb[..., 0]
    Image.fromarray(gray).save(path)
    assert np.array_equal(read_image(path), np.stack([gray] * 3, axis=-1))
    Image.fromarray(gray.astype(np.uint16) * 257).save(path)
    assert np.array_equal(read_image(path), np.stack([gray] * 3, axis=-1))
    alpha = np.full_like(gray, 255)
    alpha[:, :20] = 0  # transparent: white, whatever colour lies below
    Image.fromarray(np.dstack([rgb, alpha])).save(path)
    out = read_image(path)
    assert (out[:, :20] == 255).all() and np.array_equal(out[:, 20:], rgb[:, 20:])
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match="float.tif cannot be read .* 8 or 16 bits"):
        read_image(tmp_path / "float.tif")
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn a quarter clockwise
    Image.fromarray(rgb).save(path, exif=exif)
    assert np.array_equal(read_image(path), np.rot90(rgb, -1))


def test_broken_pictures(folder, capsys):
    train = list_images(folder)
    whole = train[3].read_bytes()
    train[3].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=train[3].name):
        read_image(train[3])
    task = data.replace(data.TASKS["photos"], image_size=32)
    with pytest.raises(InputError, match="1 of 20 training pictures"):
        data.Pictures(train, task, 0)[3, 0]  # 5 % are broken
    many = train * 10
    x, n = data.Pictures(many, task, 0)[3, 7]
    assert x.shape == (3, 32, 32) and n == 7 and train[3].name in capsys.readouterr().err
    with pytest.raises(InputError, match="smaller than the 48 crop"):
        data.Pictures(train, data.replace(task, image_size=48), 0)[0, 0]


def test_write_picture_is_whole_or_not_at_all(tmp_path):
    with pytest.raises(InputError, match="no picture format"):
        write_picture(tmp_path / "a.xyz", picture())
    with pytest.raises(InputError, match="uint8 or uint16"):
        write_picture(tmp_path / "a.png", picture().astype(np.float64))
    assert list(tmp_path.iterdir()) == []


def test_write_picture_names_the_formats_limit(tmp_path):
    for ending, side in (("webp", 16383), ("jpg", 65500)):
        path = tmp_path / f"x.{ending}"
        with pytest.raises(InputError, match=f"at most {side} pixels"):
            write_picture(path, np.zeros((1, side + 1, 3), np.uint8))
        assert not list(tmp_path.iterdir())
        write_picture(path, np.zeros((1, side, 3), np.uint8))
        path.unlink()


@pytest.mark.parametrize("scale, size, expected", [(4, 96, 288), (3, 96, 288), (4, 256, 256), (8, 512, 512)])
def test_validation_pictures_fit_the_scale_and_the_network(scale, size, expected, tmp_path):
    Image.fromarray(picture(300, 320)).save(tmp_path / "a.png")
    task = data.replace(data.TASKS["photos"], scale=scale, image_size=size)
    x = data.validation_pictures([tmp_path / "a.png"], task, 1)
    assert x.shape == (1, 3, expected, expected)
    assert degrade(to_float(x), task, torch.tensor([0])).shape == x.shape


def test_order_is_permutations_shared_by_the_processes():
    def take(n, **how):
        return list(itertools.islice(data.Order(10, seed=3, **how), n))
    alone = take(20)
    assert sorted(i for i, _ in alone[:10]) == sorted(i for i, _ in alone[10:]) == list(range(10))
    assert [i for i, _ in alone[:10]] != [i for i, _ in alone[10:]]  # another order each epoch
    assert [n for _, n in alone] == list(range(20))
    assert take(8, start=12) == alone[12:]  # to resume is to start there
    two = [take(10, rank=r, world=2) for r in range(2)]
    assert sorted(two[0] + two[1], key=lambda item: item[1]) == alone


def test_crops_and_flips_depend_on_seed_and_number_only(folder):
    task = data.replace(data.TASKS["photos"], image_size=16)
    paths = list_images(folder)
    a, b = (data.Pictures(paths, task, seed=5)[2, 11][0] for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, data.Pictures(paths, task, seed=5)[2, 12][0])
    assert not torch.equal(a, data.Pictures(paths, task, seed=6)[2, 11][0])
    source = read_image(paths[2])
    crops = {source[y : y + 16, x : x + 16][:, ::f].tobytes() for y in range(25) for x in range(41) for f in (1, -1)}
    still = data.Pictures(paths, data.replace(task, vflip=0.0), seed=5)
    assert all(still[2, n][0].numpy().transpose(1, 2, 0).tobytes() in crops for n in range(20))


def test_flip_rates(folder):
    task = data.replace(data.TASKS["ffhq"], image_size=8)
    paths = list_images(folder)[:1]
    plain = torch.from_numpy(np.asarray(data.center_crop(Image.fromarray(read_image(paths[0])), 8)).copy()).permute(2, 0, 1)
    counts = dict.fromkeys([(h, v) for h in (0, 1) for v in (0, 1)], 0)
    pictures, N = data.Pictures(paths, task, 0), 600
    for n in range(N):
        x = pictures[0, n][0]
        counts[next((h, v) for h, v in counts if torch.equal(x, plain.flip([2] * h + [1] * v)))] += 1
    assert abs((counts[1, 0] + counts[1, 1]) / N - 0.5) < 4 * (0.25 / N) ** 0.5
    assert abs((counts[0, 1] + counts[1, 1]) / N - 0.06) < 4 * (0.06 * 0.94 / N) ** 0.5


def test_center_crop_takes_the_middle():
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (16, 1, 3)))
    assert np.asarray(data.center_crop(image, 16))[0, :, 0].tolist() == list(range(24, 40))
    assert data.center_crop(image, 8).size == (8, 8)


@pytest.mark.parametrize("degradation", ["bicubic", "avgpool"])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_degradations_keep_constants_and_sizes(degradation, scale):
    x = torch.full((2, 3, 4 * scale, 6 * scale), 0.25)
    y = H(x, degradation, scale)
    assert y.shape == (2, 3, 4, 6) and torch.allclose(y, torch.full_like(y, 0.25), atol=1e-6)
    assert torch.allclose(H_T(y, degradation, scale), x, atol=1e-6)
    with pytest.raises(ValueError, match="not a multiple"):
        H(x[..., 1:], degradation, scale)


def test_avgpool_is_the_mean_and_its_transpose_repeats():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y = H(x, "avgpool", 2)
    assert y.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert H_T(y, "avgpool", 2)[0, 0].tolist() == [[2.5, 2.5, 4.5, 4.5]] * 2 + [[10.5, 10.5, 12.5, 12.5]] * 2


def test_bicubic_is_pillows():
    """An independent antialiased bicubic: Pillow's on float pictures."""
    x = picture(32, 48)[..., 0].astype(np.float32)
    ours = H(torch.from_numpy(x)[None, None], "bicubic", 4)[0, 0].numpy()
    assert np.abs(ours - np.asarray(Image.fromarray(x).resize((12, 8), Image.BICUBIC))).max() < 1e-2  # of 255


def test_measurement_noise_has_its_size_and_its_own_stream():
    task, seeds = data.TASKS["ffhq_noisy"], torch.arange(8)
    x_lr = degrade(torch.zeros(8, 3, 128, 128), task, seeds)
    noise = x_lr[..., ::4, ::4] / task.sigma_n
    assert torch.equal(x_lr, H_T(x_lr[..., ::4, ::4], "avgpool", 4))
    assert abs(noise.std() - 1) < 4 / noise.numel() ** 0.5 and abs(noise.mean()) < 4 / noise.numel() ** 0.5
    eps = kernels.normal(seeds, noise.shape)
    assert abs((noise * eps).mean()) < 4 / noise.numel() ** 0.5  # independent of the noise of x_0


def test_image_seeds_differ_by_run_and_picture():
    numbers = torch.arange(1000)
    assert len(torch.cat([data.image_seeds(s, numbers) for s in (0, 1, 2)]).unique()) == 3000


def test_sigma_d_is_the_deviation_of_the_residual(folder):
    task = data.replace(data.TASKS["photos"], image_size=32)
    measured = data.measure_sigma_d(list_images(folder), task, seed=0, count=64)
    assert 0.4 < measured < 0.65  # uniform bytes have deviation .577 on [-1, 1], nearly all of which bicubic loses


def test_times_are_even_and_depend_on_the_number_only():
    t = data.uniform_times(1337, torch.arange(1000))
    assert t.dtype == torch.float32 and 0 <= t.min() and t.max() < 1
    gaps = t.sort().values.diff()
    assert gaps.max() < 3 / 1000  # independent draws would leave gaps of about 7 / 1000
    assert torch.equal(data.uniform_times(1337, torch.arange(500, 510)), t[500:510])
    far = data.uniform_times(1337, torch.arange(10**9, 10**9 + 1000)).sort().values.diff()
    assert far.max() < 3 / 1000
    assert not torch.equal(data.uniform_times(1, torch.arange(10)), t[:10])
