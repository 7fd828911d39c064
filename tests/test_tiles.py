"""Any size through the network: tiles, windows, bands, memory."""
import numpy as np
import pytest
import torch
from PIL import Image

import kernels
import sample
import tiles
from data import TASKS
from degradations import H_T
from colour import to_planes
from pictures import Picture
from test_model import tiny
from model import UNet
from tiles import feathered_tiles, lr_window, official_tiles, reflect_to, resampled, restore, restore_rows, smaller_tile, tile_spans


def x_lr(B, height, width, seed=0):
    return torch.rand(B, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def photo(height, width, channels=3, dtype=np.uint8):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), channels), dtype=np.uint8)
    planes = [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height))) for c in range(channels)]
    return np.stack(planes, axis=-1).astype(dtype) * dtype(np.iinfo(dtype).max // 255)


class Local(torch.nn.Module):
    """A network that looks at one pixel and its noise: any tiling gives the picture made in one piece."""
    multiple, width = 4, 8
    start, to_latents, to_pixels = UNet.start, UNet.to_latents, UNet.to_pixels

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3), requires_grad=False)

    def forward(self, x_in, t):
        return self.weight * x_in[:, :3].tanh() + x_in[:, 3:]


# --- tiles ---


@pytest.mark.parametrize("length, tile, overlap, multiple", [
    (100, 40, 8, 1), (41, 40, 8, 1), (40, 40, 8, 1), (16, 40, 8, 1), (1000, 96, 64, 1), (1000, 96, 64, 8), (104, 64, 2, 8), (72, 64, 62, 8), (16000, 768, 64, 8)])
def test_tiles_cover_and_their_weights_sum_to_one(length, tile, overlap, multiple):
    total, spans = torch.zeros(length), tile_spans(length, tile, overlap, multiple)
    side = len(spans[0][1])
    assert side <= min(tile, length) and side % multiple == 0 or side == length
    assert len(spans) * (side - multiple) < length + (len(spans) - 1) * overlap  # no larger than so many have to be
    for (a, _), (b, _) in zip(spans, spans[1:]):
        assert 0 < b - a <= side - overlap + multiple  # what starts are rounded by
    for start, weights in spans:
        assert start >= 0 and start + len(weights) <= length and len(weights) == side and start % multiple == 0
        total[start : start + len(weights)] += weights
    assert torch.allclose(total, torch.ones(length), atol=1e-6)


def published_leaves(height, width):
    """The published protocol in its own words: for each pixel the window (top, left, height, width) that it is taken from."""
    def split(y, x, h, w, whole):
        out = np.zeros((h, w, 4), int)
        if h * w <= 256**2 or whole:
            out[:] = y, x, h, w
            return out
        qh, qw = (h // 2 // 32 + 1) * 32, (w // 2 // 32 + 1) * 32
        last = h * w <= 4 * 256**2
        a, b, c, d = (split(y + dy, x + dx, qh, qw, last) for dy in (0, h - qh) for dx in (0, w - qw))
        out[: h // 2, : w // 2] = a[: h // 2, : w // 2]
        out[: h // 2, w // 2 :] = b[: h // 2, w // 2 - w :]
        out[h // 2 :, : w // 2] = c[h // 2 - h :, : w // 2]
        out[h // 2 :, w // 2 :] = d[h // 2 - h :, w // 2 - w :]
        return out
    return split(0, 0, height, width, False)


@pytest.mark.parametrize("height, width", [(256, 256), (257, 256), (512, 512), (513, 700), (1356, 2040), (2040, 816)])
def test_official_tiles_are_the_published_quadrants(height, width):
    expected, got = published_leaves(height, width), np.zeros((height, width, 4), int)
    for y, x, wy, wx in official_tiles(height, width):
        assert set(wy.tolist()) | set(wx.tolist()) <= {0.0, 1.0}
        kept = (wy[:, None] * wx).bool().numpy()
        assert not got[y : y + len(wy), x : x + len(wx)][kept].any()  # nothing is written twice
        got[y : y + len(wy), x : x + len(wx)][kept] = y, x, len(wy), len(wx)
    assert np.array_equal(got, expected)


# --- windows ---


@pytest.mark.parametrize("task", [TASKS["photos"], TASKS["ffhq_noisy"], TASKS["ffhq_x8"]], ids=lambda task: task.name)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_window_of_x_lr_is_that_part_of_the_whole(task, dtype):
    colour = photo(37, 50, dtype=dtype)
    whole, window = H_T(torch.from_numpy(to_planes(colour))[None], task.degradation, task.scale), lr_window(colour, task)
    H, W = whole.shape[2:]
    for top, bottom, left, right in ((0, H, 0, W), (0, 9, 0, 7), (H - 5, H, W - 6, W), (40, 41, 100, 163), (77, 130, 3, 30)):
        assert torch.equal(window(top, bottom, left, right), whole[..., top:bottom, left:right])


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_reflection_goes_on_as_long_as_needed(n):
    x = torch.arange(float(n)).view(1, 1, 1, n)
    padded = reflect_to(x, 1, 11).flatten().numpy()
    assert np.array_equal(padded, np.pad(np.arange(n), (0, 11 - n), mode="reflect"))


# --- restoring ---


def test_tiles_change_nothing_for_a_local_network():
    x, seeds = x_lr(2, 50, 43), torch.tensor([3, 4])
    whole, _ = restore(Local(), x, 0.2, seeds)
    assert whole.shape == x.shape
    for tile in (16, 20, 48, "official"):
        tiled, _ = restore(Local(), x, 0.2, seeds, tile=tile, tile_pad=4)
        assert torch.allclose(tiled, whole, atol=1e-5)
    big = x_lr(1, 300, 530)
    assert torch.equal(restore(Local(), big, 0.2, seeds[:1], tile="official")[0], restore(Local(), big, 0.2, seeds[:1])[0])


def test_rows_come_in_order_and_progress_with_the_first_tile():
    x, said, got = x_lr(1, 200, 60), [], []
    window = lambda top, bottom, left, right: x[:, :, top:bottom, left:right]
    for rows, nfe in restore_rows(Local(), window, 200, 60, 0.2, 5, tile=40, tile_pad=4, progress=said.append):
        got.append(rows)
        assert nfe == 1 and len(said) < 2 * 6 or len(got) > 5  # the first rows come before the last tile
    assert len(got) == 6 and sum(said) == pytest.approx(1)
    assert torch.allclose(torch.cat(got, dim=1), restore(Local(), x, 0.2, torch.tensor([5]))[0][0], atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch():
    model, x, seeds = tiny(), x_lr(3, 20, 20), torch.tensor([5, 6, 7])
    together, _ = restore(model, x, 0.2, seeds)
    for i in (2, 0, 1):
        alone, _ = restore(model, x[i : i + 1], 0.2, seeds[i : i + 1])
        assert torch.equal(alone[0], together[i])
    other, _ = restore(model, x[:1], 0.2, torch.tensor([6]))
    assert not torch.allclose(other[0], together[0], atol=1e-3)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 7), (5, 3), (17, 30)])
def test_any_size_comes_out_exactly_scaled(height, width):
    picture = Picture(photo(height, width))
    big = np.concatenate([rows for rows, _ in sample.enlarge(tiny(), TASKS["photos"], picture, 0.5, 0, dtype=torch.float32)])
    assert big.shape == (4 * height, 4 * width, 3) and big.dtype == np.uint8


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tiles_of_gray_alpha_and_16_bits(channels):
    """In tiles as in one piece, and the alpha's the same; nothing is rounded to 8 bits on the way."""
    picture, task = Picture(photo(23, 31, channels, np.uint16)), TASKS["photos"]
    whole, tiled = (np.concatenate([rows for rows, _ in sample.enlarge(Local(), task, picture, 0.5, 0, tile=tile, dtype=torch.float32)]) for tile in (0, 72))
    assert whole.shape == (92, 124, channels) and whole.dtype == np.uint16
    assert np.abs(whole.astype(int) - tiled).max() <= 1 and len(np.unique(whole[..., 0] % 257)) > 100


def test_noise_of_the_canvas_is_the_crops_noise():
    """x_0 is keyed by position: what padding and tiling see is what the whole picture sees."""
    seeds = torch.tensor([9])
    assert torch.equal(kernels.normal(seeds, (1, 3, 40, 60))[..., :20, :30], kernels.normal(seeds, (1, 3, 20, 30)))


@pytest.mark.parametrize("size, new", [((96, 50), (60, 31)), ((50, 40), (50, 41)), ((40, 30), (133, 99)), ((64, 8), (1, 1)), ((1, 1), (3, 2))])
def test_resampling_in_bands_is_resampling_the_whole(size, new):
    planes = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
    whole = np.stack([np.asarray(Image.fromarray(p).resize(new[::-1], Image.LANCZOS)) for p in planes])
    for step in (1, 7, 64):
        bands = [planes[:, y : y + step] for y in range(0, size[0], step)]
        assert np.allclose(np.concatenate(list(resampled(bands, *size, *new)), axis=1), whole, atol=2e-5)


# --- memory ---


def test_the_tile_follows_the_memory_that_is_free(monkeypatch):
    model, free = tiny(), 2**40
    monkeypatch.setattr(tiles, "free_memory", lambda device: free)
    pick = lambda *size, dtype=torch.float32: tiles.pick_tile("auto", model, *size, dtype)
    assert pick(1280, 1280) == 0 and pick(1281, 1280) == tiles.TILE and pick(10**5, 10**5) == tiles.TILE
    per_pixel = tiles.bytes_per_pixel(model, torch.float32)
    free = 600**2 * per_pixel / 0.6 + 1
    assert pick(590, 590) == 0 and pick(1000, 1000) == tiles.TILE // 2
    free = 1
    assert tiles.LEAST_TILE <= pick(1000, 1000) < 2 * tiles.LEAST_TILE
    assert tiles.pick_tile(333, model, 9, 9) == 333 and tiles.pick_tile("official", model, 9, 9) == "official"


def test_a_tile_that_did_not_fit_is_halved_to_the_least():
    assert smaller_tile(0, 2000, 2000, 32) == tiles.TILE and smaller_tile(tiles.TILE, 9000, 9000, 32) == tiles.TILE // 2
    assert smaller_tile(0, 300, 200, 32) == 256 and smaller_tile(128, 1000, 1000, 32) is None
    assert smaller_tile(256, 1000, 1000, 80) is None  # 128 is less than twice the overlap


def test_free_memory_is_of_this_machine():
    free = tiles.free_memory(torch.device("cpu"))
    assert 2**24 < free < 2**46


def test_feathered_tiles_of_a_small_canvas_are_one():
    (y, x, wy, wx), = feathered_tiles(64, 48, 64, 8, 8)
    assert (y, x, wy.tolist(), wx.tolist()) == (0, 0, [1.0] * 64, [1.0] * 48)
