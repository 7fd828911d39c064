"""Tars as folders of pictures: what is found in them, that it is the same to the byte, that a training on them is the same, and broken ones."""
import io
import json
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import folders
import shards
import train_flow
from console import InputError
from pictures import list_images, probe, read_image, write_picture

PHOTOS = data.TASKS["photos"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "oftsr" / "shards"


def png(seed=0, side=48):
    raw = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(raw, "PNG")
    return raw.getvalue()


def write_tar(path, files):
    """A tar of {name: bytes}; a None is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, raw in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.size = (tarfile.DIRTYPE, 0) if raw is None else (tarfile.REGTYPE, len(raw))
            tar.addfile(member, io.BytesIO(raw or b""))
    return path


def test_webdatasets_layout(tmp_path, capsys):
    """Members of one key and many endings; sets told apart by the names of the tars, or of folders in them."""
    write_tar(tmp_path / "train-000000.tar", {"a.jpg": png(1), "a.cls": b"7", "a.json": b"{}", "b.png": png(2), "._b.png": b"x", "d/.hidden/c.png": b"x"})
    write_tar(tmp_path / "train-000001.tar", {"./": None, "./n1/": None, "./n1/c.webp": png(3)})
    write_tar(tmp_path / "val-00000-of-00001.tar", {"d.png": png(4)})
    split = data.find_split(PHOTOS, tmp_path)
    assert split.train == ["train-000000.tar/a.jpg", "train-000000.tar/b.png", "train-000001.tar/n1/c.webp"] and split.val == ["val-00000-of-00001.tar/d.png"]
    one = data.find_split(PHOTOS, write_tar(tmp_path / "one" / "all.tar", {f"{part}/{i}.png": png(i) for i, part in enumerate(("train", "train", "val", "lr_x4", "__MACOSX"))}))
    assert (one.folder, one.train, one.val) == (tmp_path / "one", ["all.tar/train/0.png", "all.tar/train/1.png"], ["all.tar/val/2.png"])
    assert one.left_out == {"low-resolution partners": ["all.tar/lr_x4/3.png"]}
    data.main(["--data_dir", str(tmp_path / "one" / "all.tar"), "--image_size", "48"])
    said = capsys.readouterr().out
    assert "training    2 pictures" in said and "shards      1 tars, as all.tar" in said and f"sha256      {folders.list_hash(one)}" in said and "smallest 48 x 48" in said


def test_tars_by_braces(tmp_path, monkeypatch):
    for name in ("train-008", "train-009", "train-010", "train-011", "val-000"):
        write_tar(tmp_path / "shards" / f"{name}.tar", {f"{name}.png": png()})
    monkeypatch.chdir(tmp_path)
    split = data.find_split(PHOTOS, "shards/{train-{008..010},val-000}.tar")
    assert [f.split("/")[0] for f in split.train] == ["train-008.tar", "train-009.tar", "train-010.tar"] and split.val == ["val-000.tar/val-000.png"]
    assert all(read_image(split.folder / f).shape == (48, 48, 3) for f in split.train + split.val)
    with pytest.raises(InputError, match=r"^no file shards/train-012.tar, which shards/train-0\{10..999999999\}.tar names$"):
        data.find_split(PHOTOS, "shards/train-0{10..999999999}.tar")
    assert list(shards.braces("{8..10}{a,b}.tar")) == ["8a.tar", "8b.tar", "9a.tar", "9b.tar", "10a.tar", "10b.tar"]


def test_imagenet_as_it_is_downloaded(tmp_path):
    """A tar of tars, and one that lies there unpacked already."""
    inner = [write_tar(tmp_path / "x" / f"n{i}.tar", {f"n{i}_{j}.JPEG": png(10 * i + j) for j in range(2)}).read_bytes() for i in range(2)]
    write_tar(tmp_path / "in" / "ILSVRC2012_img_train.tar", {"n0.tar": inner[0], "n1.tar": inner[1]})
    write_tar(tmp_path / "in" / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": png(30), "x.JPEG": png(31)})
    split = data.find_split(data.TASKS["imagenet"], tmp_path / "in")
    assert split.train == [f"ILSVRC2012_img_train.tar/n{i}.tar/n{i}_{j}.JPEG" for i in range(2) for j in range(2)] and len(split.val) == 1
    assert (read_image(split.folder / split.train[3]) == np.asarray(Image.open(io.BytesIO(png(11))))).all()
    shutil.copytree(tmp_path / "in", tmp_path / "both")
    (tmp_path / "both" / "ILSVRC2012_img_train").mkdir()
    (tmp_path / "both" / "ILSVRC2012_img_train" / "a.png").write_bytes(png())
    assert data.find_split(data.TASKS["imagenet"], tmp_path / "both").train == ["ILSVRC2012_img_train/a.png"]


def test_a_tar_of_several_names_counts_once(tmp_path):
    real = write_tar(tmp_path / "blobs" / "3fe2", {"deep/a.png": png(), "deep/b.png": png(1)})  # as caches keep them
    (tmp_path / "data").mkdir()
    for name in ("train-0.tar", "val-0.tar"):
        (tmp_path / "data" / name).symlink_to(real)
    assert folders.list_folder(tmp_path / "data") == ["val-0.tar/deep/a.png", "val-0.tar/deep/b.png"]
    assert read_image(tmp_path / "data" / "val-0.tar/deep/b.png").shape == (48, 48, 3)


def test_what_is_read_is_the_same(tmp_path):
    """Every way in which a file is read: Pillow's, 16 bits, TIFF's own reader, headers alone, the key of its contents."""
    rgb, wide = (np.random.default_rng(0).integers(0, top, (20, 30, 3)).astype(kind) for top, kind in ((256, np.uint8), (65536, np.uint16)))
    (tmp_path / "f").mkdir()
    for ending, pixels in (("png", rgb), ("jpg", rgb), ("webp", rgb), ("bmp", rgb), ("16.png", wide), ("16.tif", wide), ("alpha16.tif", np.dstack([wide, wide[..., :1]])), ("tif", rgb), ("gif", rgb), ("jp2", rgb)):
        write_picture(tmp_path / "f" / f"a.{ending}", pixels)
    (tmp_path / "f" / "b.ppm").write_bytes(b"P6 30 20 65535\n" + wide.astype(">u2").tobytes())
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(rgb).save(tmp_path / "f" / "turned.png", exif=exif)
    files = list_images(tmp_path / "f")
    write_tar(tmp_path / "t.tar", {p.name: p.read_bytes() for p in files})
    assert len(files) == 12
    for p in files:
        inside = tmp_path / "t.tar" / p.name
        assert (read_image(inside) == read_image(p)).all() and probe(inside) == probe(p) and folders.content_key(inside) == folders.content_key(p)
    for name, says in (("nothing.png", "no picture at"), ("a.png/x.png", "no picture at")):
        with pytest.raises(InputError, match=says):
            read_image(tmp_path / "t.tar" / name)
    write_tar(tmp_path / "u.tar", {"empty.png": b"", "text.png": b"none"})
    for name, says in (("empty.png", "u.tar/empty.png cannot be read as a picture: the file is empty"), ("text.png", "its bytes are no picture")):
        with pytest.raises(InputError, match=says):
            read_image(tmp_path / "u.tar" / name)


def test_broken_tars_are_one_line(tmp_path):
    raw = write_tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2), "c.png": png(3)}).read_bytes()
    second = raw.index(b"b.png")
    bad = bytes(raw[:second]) + b"X" * 400 + bytes(raw[second + 400:])
    end = len(raw.rstrip(b"\0"))
    inner = {"in.tar": raw[:2000]}
    for name, content in {"empty": b"", "header": raw[:100], "data": raw[:1500], "last": raw[: end - 10], "between": raw[:second], "no end": raw[: -(-end // 512) * 512], "garbage": bad, "text": b"hello" * 1000}.items():
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(InputError, match="^the tar .*a.tar is broken or cut short") as e:
            folders.list_folder(tmp_path)
        assert "\n" not in str(e.value), name
    write_tar(tmp_path / "a.tar", inner)
    with pytest.raises(InputError, match="^the tar .*a.tar/in.tar is broken or cut short after a.png"):
        folders.list_folder(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "a.py")
    with pytest.raises(InputError, match="a.tar is compressed with gzip, so that nothing in it can be sought"):
        folders.list_folder(tmp_path)
    os.remove(tmp_path / "a.tar")
    (tmp_path / "a.tar").symlink_to("nowhere")
    with pytest.raises(InputError, match="no pictures in"):
        data.find_split(PHOTOS, tmp_path)


def test_the_index_is_kept_and_notices_a_change(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(shards, "CACHED_FROM", 2)
    tar, reads, walk = tmp_path / "a.tar", [], shards.walk
    monkeypatch.setattr(shards, "walk", lambda *args: reads.append(args[1]) or walk(*args))

    def look(age):
        shards._index.cache_clear()
        if age is not None:
            os.utime(tar, (os.path.getmtime(tar) - age,) * 2)
        return len(reads), shards.members(tar)
    write_tar(tar, {"b.png": png(1), "ä.png": png(2)})
    assert look(0) == (0, ["b.png", "ä.png"]) and len(reads) == 1 and not cache.exists()  # it was written a moment ago
    assert look(60)[1] == ["b.png", "ä.png"] and len(reads) == 2 and len(list(cache.iterdir())) == 1
    assert look(None)[1] == ["b.png", "ä.png"] and len(reads) == 2
    write_tar(tar, {"a.png": png(1), "ä.png": png(2)})  # the same size
    assert shards.members(tar) == ["a.png", "ä.png"] and len(reads) == 3  # without a new start
    look(60)
    kept, = cache.iterdir()
    for spoilt in (b"", b"none", kept.read_bytes()[:-40], kept.read_bytes().replace(b"stamp", b"stomp")):
        kept.write_bytes(spoilt)
        assert look(None)[1] == ["a.png", "ä.png"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert look(60)[1] == ["a.png", "ä.png"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(shards.Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert look(60)[1] == ["a.png", "ä.png"]


# --- a training, and a measurement ---


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same pictures as files, and in tars that the commands of README.md make of them."""
    root = tmp_path_factory.mktemp("both")
    for part, count in (("train", 7), ("val", 3)):
        for i in range(count):
            path = root / "DIR" / part / f"n{i % 2}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(i + 10 * count))
    readme = (folders.ASSETS.parent / "README.md").read_text()
    command = next(line for line in readme.splitlines() if "split -" in line and ".tar" in line).split("  #")[0]
    (root / "shards").mkdir()
    for part in ("train", "val"):
        subprocess.run(command.replace("train", part).replace("-l 10000", "-l 3"), shell=True, cwd=root, check=True)
    subprocess.run(next(line for line in readme.splitlines() if "tar --sort=name" in line).split("  #")[0], shell=True, cwd=root, check=True)
    return root


def train(folder, out, *flags):
    train_flow.main(["--model", "tiny", "--image_size", "32", "--batch_size", "2", "--device", "cpu", "--eval_interval", "2", "--log_interval", "1", "--eval_pictures", "2",
                     "--data_dir", str(folder), "--out_dir", str(out), *flags])
    return torch.load(out / "ckpt.pt", weights_only=True)


def test_shards_made_by_the_readmes_commands(both):
    split = data.find_split(PHOTOS, both / "shards")
    assert sorted(p.name for p in (both / "shards").iterdir()) == ["train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar"]
    assert [folders.stem_of(f) for f in split.train] == [folders.stem_of(f) for f in data.find_split(PHOTOS, both / "DIR").train] and len(split.val) == 3
    assert [f.removeprefix("all.tar/") for f in data.find_split(PHOTOS, both / "all.tar").train] == data.find_split(PHOTOS, both / "DIR").train


def test_a_training_on_shards_is_that_on_files(both, tmp_path, capsys):
    """To the bit, on 2 + 2 steps as on 4, with processes that read as without, and begun on files and gone on with on shards."""
    plain = train(both / "DIR", tmp_path / "files", "--max_iters", "4")
    train(both / "shards", tmp_path / "tars", "--max_iters", "2", "--num_workers", "2")
    halves = train(both / "shards", tmp_path / "tars", "--max_iters", "4", "--num_workers", "2", "--init_from", "resume")
    assert halves["data"]["train"] == 7 and halves["data"]["train_names"] == plain["data"]["train_names"] and halves["data"]["train_contents"] == plain["data"]["train_contents"]
    train(both / "DIR", tmp_path / "moved", "--max_iters", "2")
    capsys.readouterr()
    moved = train(both / "shards", tmp_path / "moved", "--max_iters", "4", "--init_from", "resume")
    assert "some lie elsewhere; each that was there keeps its part" in capsys.readouterr().err
    for other in (halves, moved):
        assert all(torch.equal(p, other["params"][name]) for name, p in plain["params"].items())
        assert all(map(torch.equal, plain["ema"]["shadow_params"], other["ema"]["shadow_params"]))


def test_shards_are_measured(both, tmp_path, weights, capsys):
    scores = []
    for folder in ("DIR", "shards"):
        evaluate.main(["--ckpt", str(weights / "distill.safetensors"), "--data_dir", str(both / folder), "--seeds", "1", "--t", "0", "--metrics", "psnr_rgb", "--device", "cpu",
                       "--out_dir", str(tmp_path / folder), "--json", str(tmp_path / f"{folder}.json")])
        scores.append([row["psnr_rgb"] for row in json.loads((tmp_path / f"{folder}.json").read_text())["rows"]])
    assert scores[0] == scores[1] and "3 validation pictures" in capsys.readouterr().out


def test_pairs_in_shards_are_those_in_folders(both, tmp_path, weights):
    """--lr_dir as tars, in a folder or named: trained and measured as the same files."""
    low = {p.name: write_low(p) for p in (both / "DIR").rglob("*.png")}
    for name, raw in low.items():
        (tmp_path / "low").mkdir(exist_ok=True)
        (tmp_path / "low" / name).write_bytes(raw)
    for i in range(2):
        write_tar(tmp_path / "tars" / f"{i}.tar", dict(list(low.items())[i::2]))
    lows = [tmp_path / "low", tmp_path / "tars", f"{tmp_path}/tars/{{0..1}}.tar"]
    nets = [train(both / folder, tmp_path / f"out{i}", "--max_iters", "2", "--lr_dir", str(lows[i]))["params"] for i, folder in enumerate(("DIR", "DIR", "shards"))]
    assert all(torch.equal(p, other[name]) for other in nets[1:] for name, p in nets[0].items())
    scores = []
    for i, folder in enumerate(lows):
        evaluate.main(["--ckpt", str(weights / "distill.safetensors"), "--data_dir", str(both / "DIR"), "--lr_dir", str(folder), "--seeds", "1", "--t", "0", "--metrics", "psnr_rgb",
                       "--device", "cpu", "--out_dir", str(tmp_path / f"measured{i}"), "--json", str(tmp_path / "scores.json")])
        scores.append([row["psnr_rgb"] for row in json.loads((tmp_path / "scores.json").read_text())["rows"]])
    assert scores[0] == scores[1] == scores[2]
    with pytest.raises(InputError, match="no file .*gone.tar"):
        train(both / "DIR", tmp_path / "none", "--lr_dir", str(tmp_path / "gone.tar"))


def write_low(path):
    raw = io.BytesIO()
    Image.open(path).resize((12, 12)).save(raw, "PNG")
    return raw.getvalue()


def test_files_are_a_list_of_paths(tmp_path):
    names = ["a.png", "b/ä.png", "c.tar/d.png", "\udcff.png"]
    files = folders.Files(tmp_path, names)
    assert list(files) == [tmp_path / name for name in names] and len(files) == 4 and files[-1] == tmp_path / names[-1] and len(folders.Files(tmp_path, [])) == 0
    with pytest.raises(IndexError):
        files[4]
