"""Fuzzing, a bounded run: files with bytes changed, flags drawn at random. `python tests/test_fuzz.py COUNT [SEED]` is the long one."""
import io
import random
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
import shards
import train_flow
from checkpoints import save_checkpoint
from console import InputError
from model import load_model, save_release
from pictures import read_image
from test_model import tiny

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def mutate(raw, rng):
    """A file with one to eight of its bytes changed, a piece cut out or doubled, or its end cut off."""
    raw = bytearray(raw)
    place = rng.randrange(len(raw))
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(min(len(raw), rng.choice((64, 4096, len(raw)))))] = rng.randrange(256)
    elif kind == 1:
        del raw[place : place + rng.randint(1, 4096)]
    elif kind == 2:
        raw[place:place] = raw[place : place + rng.randint(1, 4096)]
    else:
        del raw[place:]
    return bytes(raw)


def originals(folder):
    """The files that are mutated: (name, bytes)."""
    net = tiny()
    save_release(folder / "a.safetensors", net, dict(stage="flow", step=1, task=None))
    save_checkpoint(folder / "a.pt", dict(stage="flow", task=None, step=1, model=net.config, ema=dict(shadow_params=list(net.parameters()))))
    return [(name, (folder / name).read_bytes()) for name in ("a.safetensors", "a.pt")]


def fuzz(folder, count, seed):
    """Load `count` mutated files of weights: (how many were refused in one line, how many loaded and were the original's weights)."""
    rng, refused, same, files = random.Random(seed), 0, 0, originals(folder)
    weights = [[p.clone() for p in load_model(folder / name)[0].parameters()] for name, _ in files]
    for i in range(count):
        which = i % len(files)
        name, raw = files[which]
        (folder / name).write_bytes(mutate(raw, rng))
        try:
            net, _ = load_model(folder / name)
        except InputError as e:
            assert name in str(e) and "\n" not in str(e)
            refused += 1
        else:
            assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights[which], strict=True)), f"{name}, mutation {i} of seed {seed}, loaded as another network"
            same += 1
    return refused, same


def test_mutated_weights_are_refused_in_one_line_or_are_the_same(tmp_path):
    refused, same = fuzz(tmp_path, 120, 0)
    assert refused + same == 120 and refused > 100


def original_pictures(folder):
    """The pictures that are mutated: (name, bytes), in every mode that has a reading of its own."""
    rng, found = np.random.default_rng(0), []
    gray, wide = rng.integers(0, 256, (24, 40), dtype=np.uint8), rng.integers(0, 65536, (24, 40), dtype=np.uint16)
    rgb, rgba = (rng.integers(0, 256, (24, 40, c), dtype=np.uint8) for c in (3, 4))
    for name, pixels in (("a.png", rgb), ("b.png", rgba), ("c.png", wide), ("d.jpg", rgb), ("e.jpg", gray), ("f.webp", rgb), ("g.tif", rgb), ("h.tif", wide), ("i.bmp", rgb)):
        Image.fromarray(pixels).save(folder / name)
        found.append((name, (folder / name).read_bytes()))
    return found


def fuzz_pictures(folder, count, seed):
    """Read `count` mutated pictures: (how many were refused in one line, how many were read)."""
    rng, refused, files = random.Random(seed), 0, original_pictures(folder)
    for i in range(count):
        name, raw = files[i % len(files)]
        (folder / name).write_bytes(mutate(raw, rng))
        try:
            image = read_image(folder / name)
        except InputError as e:
            assert name in str(e) and "\n" not in str(e)
            refused += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size, f"{name}, mutation {i} of seed {seed}: {image.shape}"
    return refused, count - refused


def test_mutated_pictures_are_refused_in_one_line_or_are_pictures(tmp_path):
    refused, read = fuzz_pictures(tmp_path, 450, 0)
    assert refused > 100 and read > 50  # both happen


def ordinary_pictures():
    """What pictures._decode_fast reads: (name, bytes) of every kind of JPEG and 8-bit PNG that is common, smooth and rough."""
    rough = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(rough[:6, :8]).resize((61, 47), Image.BICUBIC))
    for pixels in (rough, smooth):
        for mode, options in (("RGB", dict(quality=95, subsampling=0)), ("RGB", dict(quality=75, subsampling=2)), ("RGB", dict(quality=90, subsampling=1, progressive=True)),
                              ("RGB", dict(quality=80, keep_rgb=True)), ("L", dict(quality=90)), *((mode, None) for mode in ("L", "LA", "RGB", "RGBA"))):
            raw = io.BytesIO()
            Image.fromarray(pixels).convert(mode).save(raw, "JPEG" if options else "PNG", **(options or {}))
            yield ("a.jpg" if options else "a.png"), raw.getvalue()


def test_both_decoders_see_the_same(tmp_path, monkeypatch):
    """imagecodecs' pixels are Pillow's to the bit, of whole files and of mutated ones; and what Pillow refuses is refused."""
    rng, fast, used = random.Random(0), pictures._decode_fast, []
    files = list(ordinary_pictures())
    todo = files + [(name, mutate(raw, rng)) for name, raw in files * 12]
    for i, (name, raw) in enumerate(todo):
        (tmp_path / name).write_bytes(raw)
        seen = []
        for decode in (lambda *args: used.append(fast(*args) is not None) or fast(*args), lambda *_: None):
            monkeypatch.setattr(pictures, "_decode_fast", decode)
            try:
                seen.append(read_image(tmp_path / name))
            except InputError as e:
                seen.append(str(e))
        same = np.array_equal(*seen) if all(isinstance(x, np.ndarray) for x in seen) else str(seen[0]) == str(seen[1])
        assert same, f"file {i}, {name}"
        assert i >= len(files) or used[-1]  # the whole ones are all ordinary
    assert 20 < sum(used) - len(files) < len(used) - 20  # of the mutated some are


def fuzz_tars(folder, count, seed):
    """List `count` mutated tars, and read what they list: (how many were refused in one line, how many were listed)."""
    rng, refused, raws, tar = random.Random(seed), 0, [], folder / "a.tar"
    for how in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tar, "w", format=how) as out:
            for name, raw in (*original_pictures(folder)[:2], ("x" * 60 + "/" + "ä" * 30 + ".png", b"none"), *([("b.tar", raws[0])] if raws else [])):
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                out.addfile(member, io.BytesIO(raw))
        raws.append(tar.read_bytes())
    huge = bytearray(raws[2])
    at = huge.index(b"././@PaxHeader") + 124
    huge[at : at + 12] = b"\x80" + b"\xff" * 11  # a header that says how very long it is
    for i in range(count):
        tar.write_bytes(mutate(raws[i % 3], rng) if i else bytes(huge))
        shards._index.cache_clear()
        try:
            for name in shards.members(tar):
                try:
                    read_image(tar / name)
                except InputError as e:
                    assert "a.tar" in str(e) and "\n" not in str(e)
        except InputError as e:
            assert "a.tar" in str(e) and "\n" not in str(e), f"mutation {i} of seed {seed}: {e}"
            refused += 1
    return refused, count - refused


def test_mutated_tars_are_refused_in_one_line_or_are_listed(tmp_path):
    refused, listed = fuzz_tars(tmp_path, 150, 0)
    assert refused > 20 and listed > 20


NUMBERS = st.one_of(st.integers(-3, 70), st.floats(-2, 300), st.sampled_from(("nan", "inf", "-1", "1e999", "", "x", "0x10", "١")))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(("image_size", "scale", "sigma_p", "sigma_n", "batch_size", "max_iters", "learning_rate", "warmup_iters", "ema", "t0_share", "hflip",
                                        "seed", "num_workers", "gradient_accumulation_steps", "eval_interval")), NUMBERS, max_size=3))
def test_any_flags_run_or_are_refused_in_one_line(flags):
    args = ["--model", "tiny", "--device", "cpu", "--dry_run", *(f"--{name}={value}" for name, value in flags.items())]
    try:
        train_flow.main(args)
    except InputError as e:
        assert "\n" not in str(e)
    except SystemExit as e:
        assert e.code == 2  # argparse's


if __name__ == "__main__":
    import tempfile
    from pathlib import Path
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else int(time.time())
    with tempfile.TemporaryDirectory() as folder:
        print("seed", seed, "pictures refused, read:", fuzz_pictures(Path(folder), count, seed))
        print("tars refused, listed:", fuzz_tars(Path(folder), count, seed))
        print("weights refused, the same:", fuzz(Path(folder), count, seed))
