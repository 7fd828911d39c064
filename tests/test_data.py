"""Pictures in and out, the order of training, the degradations, the table of tasks."""
import argparse
import dataclasses
import itertools
import json
import os
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import data
import folders
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


# --- which pictures train, which validate ---


TINY = picture(8, 8)


def tree(root, *files):
    """Small pictures at those paths, each of another content."""
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.full((8, 8, 3), i % 256))).save(root / file)
    return root


@pytest.mark.parametrize("layout, train, val", (
    # ILSVRC as it unpacks: all of val/ stays out of training, whatever the task's list names of it
    (("train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG", "val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG"), 2, ["ILSVRC2012_val_00000001.JPEG"]),
    (("Data/CLS-LOC/train/n01/n01_1.JPEG", "Data/CLS-LOC/val/n01/ILSVRC2012_val_00000001.JPEG", "Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG"), 1, ["ILSVRC2012_val_00000001.JPEG"]),
    (("ILSVRC2012_img_train/n01/n01_1.JPEG", "ILSVRC2012_img_val/ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_img_val/x.JPEG"), 1, ["ILSVRC2012_val_00000001.JPEG"]),
))
def test_imagenet_as_it_unpacks(tmp_path, layout, train, val):
    split = data.find_split(data.TASKS["imagenet"], tree(tmp_path, *layout))
    assert (len(split.train), [f.split("/")[-1] for f in split.val]) == (train, val)
    assert sum(len(v) for v in split.left_out.values()) == len(layout) - train - len(val)


def test_div2k_as_distributed(tmp_path):
    names = [f"DIV2K_train_HR/{i:04}.png" for i in range(1, 6)] + [f"DIV2K_valid_HR/{i:04}.png" for i in (801, 802)]
    low = [f"DIV2K_train_LR_bicubic/X4/{i:04}x4.png" for i in range(1, 6)] + ["DIV2K_valid_LR_unknown/X2/0801x2.png"]
    tree(tmp_path, *names, *low)
    for task in ("div2k", "photos"):
        split = data.find_split(data.TASKS[task], tmp_path)
        assert (split.train, split.val) == (names[:5], names[5:]) and split.left_out == {"low-resolution partners": sorted(low)}
    flat = tree(tmp_path / "flat", "0800.png", "0801.png", "0900.png")
    split = data.find_split(data.TASKS["div2k"], flat)  # all in one folder: by their names
    assert split.train == ["0800.png"] and split.val == ["0801.png", "0900.png"]
    with pytest.raises(InputError, match="6 low-resolution partners: name the folder of the large ones"):
        data.find_split(data.TASKS["div2k"], tree(tmp_path / "DIV2K_train_LR_bicubic", "0007x4.png"))


@pytest.mark.parametrize("name", ("val", "valid", "Validation", "VAL", "test", "val256", "DIV2K_valid_HR", "my_test_images", "a/b/Val/c"))
def test_folders_that_validate(tmp_path, name):
    split = data.find_split(data.TASKS["photos"], tree(tmp_path, "a.png", "b.png", f"{name}/c.png"))
    assert split.train == ["a.png", "b.png"] and split.val == [f"{name}/c.png"] and split.marked


@pytest.mark.parametrize("name", ("test tube", "invalid", "valley", "contest", "evaluation-of-cats", "latest", "hdr", "lrx", "brain"))
def test_folders_that_only_sound_like_it(name):
    assert folders.role(name) is None


def test_a_test_set_beside_a_validation_set_is_neither(tmp_path):
    split = data.find_split(data.TASKS["photos"], tree(tmp_path, "train/a.png", "val/b.png", "test/c.png"))
    assert (split.train, split.val, list(split.left_out.values())) == (["train/a.png"], ["val/b.png"], [["test/c.png"]])


@pytest.mark.parametrize("task, root", (("imagenet", "imagenet/train"), ("photos", "train"), ("photos", "DIV2K_train_HR"), ("ffhq", "faces"), ("photos", "x/train/..")))
def test_a_training_set_alone_gives_nothing_away(tmp_path, task, root, capsys):
    (tmp_path / "x/train").mkdir(parents=True)
    files = [f"n{i % 3}/{i}.png" for i in range(40)]
    root = tree(tmp_path / root, *[f"train/{f}" for f in files] if root.endswith("..") else files)
    task = data.replace(data.TASKS[task], image_size=8)
    train, val = data.find_data(task, root)
    assert len(train) == 40 and set(val) <= set(train) and "scores during training are of pictures that it trains on" in capsys.readouterr().err
    assert not data.find_split(task, root).marked


def test_one_in_twenty_of_unmarked_pictures_whatever_comes_later(tmp_path):
    task = data.replace(data.TASKS["photos"], image_size=8)
    tree(tmp_path, *[f"{i % 3}/{i:03}.png" for i in range(300)])
    train, val = data.find_data(task, tmp_path)
    assert 8 <= len(val) <= 24 and len(train) + len(val) == 300 and not set(train) & set(val)
    tree(tmp_path, *[f"new/{i}.png" for i in range(300, 340)])
    more, later = data.find_data(task, tmp_path)
    assert set(train) <= set(more) and set(val) <= set(later)
    few, one = data.find_data(task, tree(tmp_path / "few", "a.png", "b.png"))
    assert len(few) == len(one) == 1 and set(few) != set(one)
    assert list(data.find_data(task, tree(tmp_path / "single", "a.png"))[0]) == [tmp_path / "single/a.png"]


def test_validation_pictures_alone_are_not_trained_on(tmp_path):
    tree(tmp_path / "val", "a.png", "b.png")
    assert data.find_split(data.TASKS["photos"], tmp_path / "val").val == ["a.png", "b.png"]
    for folder in (tmp_path, tmp_path / "val"):
        with pytest.raises(InputError, match="validation pictures alone"):
            data.find_data(data.TASKS["photos"], folder)


def test_ffhq_trains_on_the_first_files_that_its_list_does_not_name(tmp_path):
    names = (folders.ASSETS / "ffhq_val_100.txt").read_text().split()
    assert len(names) == len(set(names)) == 100
    tree(tmp_path, *[f"images1024x1024/69000/{n}" for n in (names[0], "69001.png")], f"images1024x1024/00000/{names[1]}".replace(".png", ".JPEG"),
         *[f"images1024x1024/00000/0000{i}.png" for i in range(4)], "thumbnails128x128/00000/00000.png")
    task = data.TASKS["ffhq"]
    split = data.find_split(task, tmp_path)  # whatever the endings
    assert [folders.stem_of(f) for f in split.val] == [folders.stem_of(names[1]), folders.stem_of(names[0])] and len(split.train) == 5
    assert [folders.stem_of(f) for f in data.find_split(data.replace(task, train_files=3), tmp_path).train] == ["00000", "00001", "00002"]
    assert len(data.find_split(data.TASKS["ffhq_uncond"], tmp_path).train) == 7  # Appendix F trains on everything
    assert data.find_split(data.replace(task, val_list="none"), tmp_path).how == folders.DRAWN
    with pytest.raises(InputError, match="no list of names nowhere.txt"):
        data.find_split(data.replace(task, val_list="nowhere.txt"), tmp_path)


def test_hidden_folders_copies_and_results_are_no_pictures(tmp_path):
    tree(tmp_path, "a.png", ".git/b.png", ".thumbnails/a.png", "__MACOSX/a.png", "@eaDir/a.png", ".hidden.png", "run/val_0001.png", "out/eval/hr/a.png")
    (tmp_path / "run/log.jsonl").touch()
    (tmp_path / "out/eval/evaluation.json").touch()
    assert folders.list_folder(tmp_path) == ["a.png"]


def test_links_are_followed_once(tmp_path):
    tree(tmp_path, "photos/pool/a.png", "photos/pool/b.png", "photos/pool/c.png", "elsewhere/held/d.png")
    root = tmp_path / "photos"
    (root / "again").symlink_to(root / "pool")  # another name of the same
    (root / "round").symlink_to(root)  # a circle
    (root / "gone.png").symlink_to(root / "nothing.png")
    assert folders.list_folder(root) == ["pool/a.png", "pool/b.png", "pool/c.png"]
    (root / "val").mkdir()
    (root / "val/b.png").symlink_to("../pool/b.png")  # a split made of links into the pool
    (root / "val/more").symlink_to(tmp_path / "elsewhere/held")
    split = data.find_split(data.TASKS["photos"], root)
    assert split.train == ["pool/a.png", "pool/c.png"] and split.val == ["val/b.png", "val/more/d.png"]


def test_a_split_of_links_to_folders(tmp_path):
    tree(tmp_path, "pool/one/a.png", "pool/two/b.png")
    for name, target in (("train", "one"), ("val", "two")):
        (tmp_path / name).symlink_to(tmp_path / "pool" / target)
    split = data.find_split(data.TASKS["photos"], tmp_path)
    assert split.train == ["pool/one/a.png"] and split.val == ["val/b.png"]


def test_low_resolution_files_beside_their_large_ones(tmp_path):
    split = data.find_split(data.TASKS["photos"], tree(tmp_path, "Canon/Train/4/Canon_001_HR.png", "Canon/Train/4/Canon_001_LR4.png", "Canon/Test/4/Canon_002_HR.png",
                                                       "Canon/Test/4/Canon_002_LR4.png", "Canon/Train/4/Nikon_LR7.png"))
    assert split.train == ["Canon/Train/4/Canon_001_HR.png", "Canon/Train/4/Nikon_LR7.png"] and split.val == ["Canon/Test/4/Canon_002_HR.png"]


def test_a_run_knows_what_it_was_trained_on(tmp_path):
    root = tree(tmp_path / "d", *[f"{i:02}.png" for i in range(40)])
    split = data.find_split(data.TASKS["photos"], root)
    memory = json.loads(json.dumps(folders.remember(split)))
    train, val = ([root / f for f in files] for files in (split.train, split.val))
    assert folders.trained_on([*train, *val], memory) == (train, [])
    tree(tmp_path / "e", *[f"{i:02}.png" for i in range(3, 43)])  # other pictures under the same names
    others = [p for p in sorted((tmp_path / "e").iterdir()) if folders.content_key(p) not in folders.unpack(memory["train_contents"])]
    seen, alike = folders.trained_on(others, memory)
    assert not seen and set(alike) == {p for p in others if p.name in {q.name for q in train}}
    copy = tmp_path / "renamed.png"
    copy.write_bytes(train[5].read_bytes())
    assert folders.trained_on([copy], memory) == ([copy], [])
    long = {**memory, "train_contents": ""}  # of a list too long for contents, the name decides
    assert folders.trained_on([*train, *val], long) == (train, []) and folders.trained_on(val, None) == ([], [])


def test_a_million_names_do_not_blow_up_a_checkpoint(tmp_path):
    split = folders.Split(tmp_path, [f"n{i // 1000:04}/n{i // 1000:04}_{i}.JPEG" for i in range(100_000)], [f"v{i}.png" for i in range(100)], {}, "")
    memory = folders.remember(split)
    assert len(json.dumps(memory)) < 7 * 100_000 and memory["train_contents"] == ""
    seen, _ = folders.trained_on([f"elsewhere/{f}" for f in split.train[::1000]] + [f"stranger_{i}.png" for i in range(1000)], memory)
    assert len(seen) == 100


def test_a_split_once_used_is_kept(tmp_path):
    tree(tmp_path, *[f"{i:02}.png" for i in range(40)])
    task = data.TASKS["photos"]
    split = data.find_split(task, tmp_path)
    memory = folders.remember(split)
    assert folders.keep_split(split, memory) == (split, "")
    (tmp_path / "val").mkdir()
    moved = split.train[3]
    (tmp_path / moved).rename(tmp_path / "val" / moved)  # from now on it would validate, and all else train
    tree(tmp_path, "val/new.png", "later.png")
    (tmp_path / split.train[0]).unlink()
    kept, changed = folders.keep_split(data.find_split(task, tmp_path), memory)
    assert sorted(kept.val) == sorted([*split.val, "val/new.png"]) and f"val/{moved}" in kept.train and "later.png" in kept.train
    assert "2 pictures are new, 1 are missing" in changed


def test_data_py_says_what_it_found_and_what_it_missed(tmp_path, capsys):
    tree(tmp_path, "DIV2K_train_HR/0001.png", "DIV2K_valid_HR/0801.png", "DIV2K_train_LR_bicubic/X4/0001x4.png")
    data.main(["--dataset", "div2k", "--data_dir", str(tmp_path)])
    out = capsys.readouterr().out
    for words in ("training    1 pictures", "validation  1 pictures", "1 low-resolution partners", "smallest 8 x 8", "1 smaller than 256, not used",
                  "1 for training where 800 are expected", "no 0802 and 98 more of div2k_val_100.txt", "DIV2K_valid_HR/0801.png"):
        assert words in out, words
    data.main(["--data_dir", str(tmp_path)])
    assert "expected" not in capsys.readouterr().out  # any folder of photographs is a folder of photographs


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Whoever runs the tests: the administrator may read everything, so the system's refusal is a fake."""
    tree(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="cannot read the folder .*closed: Permission denied"):
        folders.list_folder(tmp_path)


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
    for crop in ("random", "center"):  # truth is not enlarged: 40 rows are not 48
        large = data.replace(task, image_size=48, crop=crop)
        with pytest.raises(InputError, match=r"0/00.png is 56 x 40, smaller than the 48 pixels of photos"):
            data.Pictures(train[:1], large, 0)[0, 0]
        with pytest.raises(InputError, match="smaller than the 48 pixels of photos, as .*: truth is not enlarged"):
            data.find_data(large, folder)
    assert data.Pictures(train[:1], data.replace(large, enlarge=True), 0)[0, 0][0].shape == (3, 48, 48)
    Image.fromarray(picture(60, 60)).save(train[1])
    x, _ = data.Pictures(train, large, 0)[0, 0]  # some are too small: the next one serves
    assert x.shape == (3, 48, 48) and "skipped: " in capsys.readouterr().err


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


@pytest.mark.parametrize("scale, size, expected", [(4, 96, 288), (3, 96, 288), (4, 256, 256), (8, 296, 296)])
def test_validation_pictures_fit_the_scale_and_the_network(scale, size, expected, tmp_path):
    Image.fromarray(picture(300, 320)).save(tmp_path / "a.png")
    task = data.replace(data.TASKS["photos"], scale=scale, image_size=size)
    x = data.validation_pictures([tmp_path / "a.png"], task, 1)
    assert x.shape == (1, 3, expected, expected)
    assert degrade(to_float(x), task, torch.tensor([0])).shape == x.shape


def test_validation_does_not_enlarge(tmp_path, capsys):
    task = data.TASKS["photos"]  # crops of 128, validated at 256 where the pictures have as much
    for i, side in enumerate((140, 150, 200, 130, 100)):
        Image.fromarray(picture(side, side + 20, seed=i)).save(tmp_path / f"{i}.png")
    x = data.validation_pictures(sorted(tmp_path.iterdir()), task, 5)
    assert x.shape == (4, 3, 128, 128) and "4.png is 120 x 100" in capsys.readouterr().err
    with pytest.raises(InputError, match="none of the validation pictures"):
        data.validation_pictures([tmp_path / "4.png"], task, 1)


def test_validation_keeps_one_whole_picture_at_a_time(tmp_path, monkeypatch):
    """A picture may have 300 million pixels, a validation any number of them."""
    read, alive = data.read_image, []

    def tracked(path):
        assert not any(ref() is not None for ref in alive), "the picture before is still there"
        image = np.array(read(path))
        alive.append(weakref.ref(image))
        return image

    monkeypatch.setattr(data, "read_image", tracked)
    for i in range(4):
        Image.fromarray(picture(300, 320, seed=i)).save(tmp_path / f"{i}.png")
    assert data.validation_pictures(sorted(tmp_path.iterdir()), data.TASKS["photos"], 4).shape == (4, 3, 256, 256)
    assert len(alive) == 4


def test_broken_pictures_are_counted_over_all_workers(tmp_path):
    """Three of 200 are more than 1 %, though neither of two workers meets more than two of them."""
    paths = [tmp_path / f"{i:03}.png" for i in range(200)]
    Image.fromarray(picture(16, 16)).save(paths[0])
    for path in paths[1:]:
        path.hardlink_to(paths[0])
    for index, n in itertools.islice(data.Order(200, 0), 3):  # batches of one go to the workers in turn
        paths[index].unlink()
        paths[index].write_bytes(b"none")
    task = dataclasses.replace(data.TASKS["photos"], image_size=16)
    with pytest.raises(InputError, match="3 of 200 training pictures cannot be used"):
        for _ in itertools.islice(data.training_batches(paths, task, 0, 1, 0, 0, 1, 2), 200):
            pass


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
