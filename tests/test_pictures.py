"""Picture files in and out: what a file holds comes back as it was, or the user hears of it."""
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

import pictures
import writers
from colour import as_rgb, from_planes, on_white, resized, smooth_stairs, split_alpha, srgb_profile, to_depth, to_planes
from console import InputError
from pictures import from_pil, list_images, losses, open_writer, probe, read_image, read_note, read_picture, scan, write_picture

ROOT = Path(__file__).parent.parent
D65, D50 = [0.3127, 0.3290, 1.0], [0.3457, 0.3585, 1.0]
SRGB = [0.64, 0.33, 1, 0.30, 0.60, 1, 0.15, 0.06, 1]
WIDE = {  # white point, primaries, gamma
    "Display P3": (D65, [0.680, 0.320, 1, 0.265, 0.690, 1, 0.150, 0.060, 1], 2.2),
    "Adobe RGB": (D65, [0.64, 0.33, 1, 0.21, 0.71, 1, 0.15, 0.06, 1], 563 / 256),
    "ProPhoto": (D50, [0.7347, 0.2653, 1, 0.1596, 0.8404, 1, 0.0366, 0.0001, 1], 1.8),
}


def profile(name):
    white, primaries, gamma = WIDE[name]
    return imagecodecs.cms_profile("rgb", whitepoint=white, primaries=primaries, gamma=gamma)


def photo(channels=3, dtype=np.uint8, height=41, width=58):
    """A piece of a photograph with that many channels; 16 bits carry detail that 8 would lose."""
    base = np.asarray(Image.open(ROOT / "assets" / "coffee.png").convert("RGB"))[100 : 100 + height, 200 : 200 + width]
    pixels = np.concatenate([base[..., : 3 if channels > 2 else 1], base[..., 1:2]][: 1 + (channels in (2, 4))], axis=-1)
    if dtype == np.uint16:
        return (pixels.astype(np.uint16) * 255 + np.random.default_rng(0).integers(0, 500, pixels.shape)).astype(np.uint16)
    return pixels


# --- what is written comes back ---


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_modes_and_depths_come_back(ending, channels, dtype, tmp_path):
    """In our reading, and in that of the libraries that others use."""
    path, pixels = tmp_path / f"a.{ending}", photo(channels, dtype)
    write_picture(path, pixels)
    back = read_picture(path)
    assert back.pixels.dtype == dtype and np.array_equal(back.pixels, pixels) and back.lossless and not back.notes
    assert probe(path) == pictures.Probe(58, 41, "PNG" if ending == "png" else "TIFF", 1, dtype == np.uint16)
    other = (imagecodecs.png_decode(path.read_bytes()) if ending == "png" else tifffile.imread(path)).reshape(pixels.shape)
    assert np.array_equal(other, pixels)
    if dtype == np.uint8 and (ending, channels) != ("tif", 2):
        assert np.array_equal(np.asarray(Image.open(path)).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("ending", ["jpg", "webp", "avif", "jp2", "bmp", "ppm", "tga", "gif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_other_formats_keep_what_they_can_and_say_what_they_cannot(ending, channels, tmp_path):
    path, pixels = tmp_path / f"a.{ending}", photo(channels, np.uint16)
    write_picture(path, pixels, quality=100)
    back = read_picture(path).pixels
    assert back.dtype == np.uint8 and any("8 bits" in line for line in losses(path, channels, np.uint16))
    opaque = any("no transparency" in line for line in losses(path, channels, np.uint8))
    assert (back.shape[2] in (2, 4)) == (channels in (2, 4) and not opaque)
    expected = to_depth(pixels, np.uint8)
    expected = on_white(expected) if opaque else expected
    if back.shape[2] >= 3:
        expected = as_rgb(expected)
        if channels < 3 and ending != "gif":
            assert (back[..., 0] == back[..., 1]).all() and (back[..., 1] == back[..., 2]).all()  # gray stays gray
    error = np.abs(back.astype(int) - expected)
    assert error.max() <= {"gif": 255, "jpg": 8, "avif": 16}.get(ending, 0) and error.mean() < {"gif": 20}.get(ending, 1)


def test_a_ramp_of_sixteen_bits_keeps_every_step(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 1001).round().astype(np.uint16), (4, 1))
    for name, save in (("a.png", lambda p: Image.fromarray(ramp).save(p)), ("a.tif", lambda p: tifffile.imwrite(p, ramp)),
                       ("white.tif", lambda p: tifffile.imwrite(p, 65535 - ramp, photometric="miniswhite")),
                       ("a.pgm", lambda p: p.write_bytes(b"P5 # a remark\n1001 4\n65535\n" + ramp.astype(">u2").tobytes())),
                       ("a.jp2", lambda p: p.write_bytes(imagecodecs.jpeg2k_encode(ramp, level=0, codecformat="jp2", bitspersample=16)))):
        save(tmp_path / name)
        back = read_picture(tmp_path / name).pixels
        assert back.dtype == np.uint16 and np.array_equal(back[..., 0], ramp), name
        planes = to_planes(back)
        assert np.array_equal(from_planes(planes, 1, np.uint16), back) and planes.min() == -1 and planes.max() == 1


def test_sixteen_bit_colour_of_every_kind(tmp_path):
    """Planar, 12 bits, premultiplied alpha, CMYK; floats are refused in one line."""
    rgb = photo(4, np.uint16)
    tifffile.imwrite(tmp_path / "planar.tif", rgb[..., :3].transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_picture(tmp_path / "planar.tif").pixels, rgb[..., :3])
    tifffile.imwrite(tmp_path / "12.tif", rgb[..., :3] >> 4, photometric="rgb", bitspersample=12)
    twelve = read_picture(tmp_path / "12.tif").pixels
    assert np.abs(twelve.astype(int) - rgb[..., :3]).max() <= 16
    alpha = np.maximum(rgb[..., 3:], 20000)
    associated = np.rint(rgb[..., :3] * (alpha / 65535)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "pre.tif", np.concatenate([associated, alpha], -1), photometric="rgb", extrasamples=["assocalpha"])
    straight = read_picture(tmp_path / "pre.tif").pixels
    assert np.abs(straight[..., :3].astype(int) - rgb[..., :3]).max() <= 2 and np.array_equal(straight[..., 3:], alpha)
    tifffile.imwrite(tmp_path / "cmyk.tif", np.full((8, 8, 4), [0, 65535, 65535, 0], np.uint16), photometric="separated")
    assert read_picture(tmp_path / "cmyk.tif").pixels[0, 0].tolist() == [65535, 0, 0]
    for name, x in (("f.tif", np.ones((8, 8, 3), np.float32)), ("i.tif", np.ones((8, 8), np.int32)), ("h.tif", np.ones((8, 8, 3), np.float16))):
        tifffile.imwrite(tmp_path / name, x, photometric="rgb" if x.ndim == 3 else None)
        with pytest.raises(InputError, match=f"{name} cannot be read .*8 or 16 bits"):
            read_picture(tmp_path / name)


def test_palettes_and_transparency_by_key(tmp_path):
    im = Image.new("P", (6, 4), 1)
    im.putpalette([10, 20, 30, 200, 100, 50])
    im.save(tmp_path / "p.png")
    assert read_picture(tmp_path / "p.png").pixels[0, 0].tolist() == [200, 100, 50]
    im.putpixel((2, 1), 0)
    im.save(tmp_path / "t.png", transparency=0)
    assert read_picture(tmp_path / "t.png").pixels[1, 1:3].tolist() == [[200, 100, 50, 255], [10, 20, 30, 0]]
    Image.fromarray(photo()[..., 0]).save(tmp_path / "g.png", transparency=int(photo()[0, 0, 0]))
    gray = read_picture(tmp_path / "g.png").pixels
    assert gray.shape[2] == 2 and gray[0, 0, 1] == 0
    Image.new("1", (9, 9), 1).save(tmp_path / "one.png")
    assert read_picture(tmp_path / "one.png").pixels.tolist() == [[[255]] * 9] * 9
    for mode in ("YCbCr", "HSV", "LAB", "RGBX"):
        assert from_pil(Image.new(mode, (3, 3))).pixels.shape == (3, 3, 3)


# --- colour ---


def chart(name, dtype):
    """Colours that sRGB holds, 9 of each primary, as sRGB (1, N, 3) and in the profile, by lcms in 16 bits: (srgb, there), of dtype."""
    steps = np.linspace(0, 65535, 9).astype(np.uint16)
    srgb = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    there = imagecodecs.cms_transform(srgb, srgb_profile(), profile(name), colorspace="rgb", outcolorspace="rgb", intent=1, flags=256)
    return (to_depth(x, dtype) for x in (srgb, there))


def in_srgb(there, name):
    """By the definition: to linear light, through XYZ with Bradford's adaptation, to sRGB's curve; uint16 to uint16."""
    white, primaries, gamma = WIDE[name]
    light = (there / 65535) ** gamma @ (np.linalg.inv(matrix(D65, SRGB)) @ adaptation(white, D65) @ matrix(white, primaries)).T
    light = np.clip(light, 0, 1)
    return np.rint(65535 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(np.uint16)


def matrix(white, primaries):
    """Linear RGB of those primaries and white (x, y, Y) to XYZ."""
    xyz = np.array([[primaries[i], primaries[i + 1], 1 - primaries[i] - primaries[i + 1]] for i in (0, 3, 6)]).T
    return xyz * np.linalg.solve(xyz, white_xyz(white))


def white_xyz(white):
    return np.array([white[0], white[1], 1 - white[0] - white[1]]) / white[1]


def adaptation(source, target):
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    return np.linalg.inv(bradford) @ np.diag(bradford @ white_xyz(target) / (bradford @ white_xyz(source))) @ bradford


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("dtype, ending", [(np.uint8, "png"), (np.uint16, "png"), (np.uint16, "tif"), (np.uint8, "tif")])
def test_wide_gamuts_keep_their_colours(name, dtype, ending, tmp_path):
    srgb, there = chart(name, dtype)
    path = tmp_path / f"wide.{ending}"
    if ending == "png":
        path.write_bytes(with_profile(imagecodecs.png_encode(there), profile(name)))
    else:
        tifffile.imwrite(path, there, photometric="rgb", iccprofile=profile(name))
    seen = read_picture(path).pixels
    if dtype == np.uint8:  # a step of 8 bits in a wide profile is up to 18 steps of sRGB's darkest: the numbers in the file are the truth
        srgb = to_depth(in_srgb(to_depth(there, np.uint16), name), np.uint8)
    allowed = 257 if dtype == np.uint16 else 1
    assert np.abs(seen.astype(int) - srgb).max() <= allowed
    assert np.abs(there.astype(int) - srgb).max() > 40 * allowed  # the numbers did have to change
    write_picture(tmp_path / "out.png", seen, like=read_picture(path))
    tag = ImageCms.ImageCmsProfile(io.BytesIO(Image.open(tmp_path / "out.png").info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(tag)
    assert np.array_equal(read_picture(tmp_path / "out.png").pixels, seen)  # and read again, nothing changes


def with_profile(png, icc):
    """A PNG's bytes with an iCCP chunk after its header."""
    return png[:33] + chunk(b"iCCP", b"some\0\0" + zlib.compress(icc)) + png[33:]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_a_profile_that_says_srgb_moves_nothing_and_a_bad_one_is_said(tmp_path):
    rgb = photo()
    other = imagecodecs.cms_profile("srgb")
    Image.fromarray(rgb).save(tmp_path / "a.png", icc_profile=other)
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels, rgb)
    for bad in (b"no profile at all", profile("Adobe RGB")[:200], imagecodecs.cms_profile("gray", whitepoint=D65, gamma=1.0)):
        Image.fromarray(rgb).save(tmp_path / "bad.png", icc_profile=bad)
        back = read_picture(tmp_path / "bad.png")
        assert np.array_equal(back.pixels, rgb) and "profile" in back.notes[0]


def test_gray_profiles(tmp_path):
    linear = imagecodecs.cms_profile("gray", whitepoint=D65, gamma=1.0)
    for dtype in (np.uint8, np.uint16):
        x = np.linspace(0, np.iinfo(dtype).max, 256).astype(dtype)[None].repeat(2, 0)
        tifffile.imwrite(tmp_path / "g.tif", x, iccprofile=linear)
        seen = read_picture(tmp_path / "g.tif").pixels
        y = np.linspace(0, 1, 256)
        expected = np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)
        assert seen.shape == (2, 256, 1) and seen.dtype == dtype
        assert np.abs(seen[0, :, 0] / np.iinfo(dtype).max - expected).max() < 2 / 255
        write_picture(tmp_path / "again.tif", seen)
        assert np.abs(read_picture(tmp_path / "again.tif").pixels.astype(int) - seen).max() <= np.iinfo(dtype).max // 255  # tagged gray with sRGB's curve
    Image.fromarray(x.astype(np.uint8)).save(tmp_path / "p3.png", icc_profile=profile("Display P3"))  # gray with a colour profile
    assert read_picture(tmp_path / "p3.png").pixels.shape == (2, 256, 1)


def test_cmyk_without_a_profile_is_a_guess_and_said(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    back = read_picture(tmp_path / "c.jpg")
    assert np.abs(back.pixels[0, 0].astype(int) - [255, 0, 0]).max() <= 2 and "CMYK" in back.notes[0]


def test_cameras_that_mark_adobe_rgb_in_exif_alone(tmp_path):
    _, there = chart("Adobe RGB", np.uint8)
    exif = Image.Exif()
    exif[0x8769] = {0xA001: 65535, 0xA005: {1: "R03"}}
    Image.fromarray(there).save(tmp_path / "_DSC1.png", exif=exif)
    back = read_picture(tmp_path / "_DSC1.png")
    assert np.abs(back.pixels.astype(int) - to_depth(in_srgb(to_depth(there, np.uint16), "Adobe RGB"), np.uint8)).max() <= 1
    write_picture(tmp_path / "out.png", back.pixels, like=back)
    assert np.array_equal(read_picture(tmp_path / "out.png").pixels, back.pixels)


# --- metadata ---

XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
 xmlns:exif="http://ns.adobe.com/exif/1.0/" tiff:Orientation="6" tiff:ImageWidth="58"><exif:PixelXDimension>58</exif:PixelXDimension></rdf:Description></rdf:RDF></x:xmpmeta>"""


def camera_exif():
    exif = Image.Exif()
    exif.update({0x010F: "Maker", 0x0110: "Model", 0x0112: 6, 0x013B: "Zoë", 0x0132: "2024:05:06 07:08:09"})
    exif[0x8769] = {0x9003: "2024:05:06 07:08:09", 0x829D: 2.8, 0xA002: 58, 0xA003: 41, 0x927C: b"\1\2 maker's own"}
    exif[0x8825] = {1: "N", 2: (51.0, 30.0, 26.0), 3: "W", 4: (0.0, 7.0, 39.0)}
    return exif


@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("target", ["jpg", "png", "webp", "tif", "avif"])
def test_exif_dpi_and_xmp_go_with_the_picture(source, target, tmp_path):
    """Upright, so the orientation is 1; larger, so the size is the new one."""
    a, b = tmp_path / f"a.{source}", tmp_path / f"b.{target}"
    exif, info = camera_exif(), PngImagePlugin.PngInfo()
    exif.update({700: XMP} if source == "tif" else {})
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    Image.fromarray(photo()).save(a, exif=exif.tobytes(), dpi=(300, 300), **{"png": dict(pnginfo=info), "tif": {}}.get(source, dict(xmp=XMP)))
    picture = read_picture(a)
    assert picture.pixels.shape == (58, 41, 3) and (probe(a).width, probe(a).height) == (41, 58)
    if source not in ("jpg", "webp"):
        assert np.array_equal(picture.pixels, np.rot90(photo(), -1))
    write_picture(b, resized(picture.pixels, 116, 82), like=picture, note=dict(t=0.5))
    out = Image.open(b)
    exif = out.getexif()
    assert exif.get(0x0112, 1) == 1 and exif[0x010F] == "Maker" and exif[0x0132] == "2024:05:06 07:08:09"
    inner, gps = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert inner[0x9003] == "2024:05:06 07:08:09" and inner[0x829D] == 2.8 and inner[0x927C] == b"\1\2 maker's own"
    assert (inner[0xA002], inner[0xA003]) == (82, 116) and gps[2] == (51.0, 30.0, 26.0)
    if source != "webp":
        dpi = out.info["dpi"] if target in ("jpg", "png", "tif") else (exif[282], exif[283])
        assert np.allclose([float(x) for x in dpi], 300, atol=0.02)
    xmp = out.info.get("xmp") or out.info["XML:com.adobe.xmp"].encode()
    assert b'tiff:Orientation="6"' not in xmp and b'tiff:ImageWidth="82"' in xmp and b"<exif:PixelXDimension>82<" in xmp
    assert read_note(b) == dict(t=0.5)
    assert np.array_equal(np.asarray(out).shape, (116, 82, 3)) and read_picture(b).pixels.shape == (116, 82, 3)  # and nobody turns it again
    write_picture(b, picture.pixels, like=picture, metadata=False)
    bare = Image.open(b)
    assert not set(bare.getexif()) & {0x010F, 0x0132, 0x8769, 0x8825} and not bare.info.get("xmp") and read_note(b) is None


def test_thumbnails_do_not_outlive_their_picture(tmp_path):
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 12)).save(thumbnail, "JPEG")
    data = camera_exif().tobytes()
    # a second directory, with the thumbnail, linked from the first
    tiff = bytearray(data[6:])
    assert tiff[:2] == b"MM"
    at, n = len(tiff), struct.unpack_from(">H", tiff, 8)[0]
    struct.pack_into(">I", tiff, 10 + 12 * n, at)
    tiff += struct.pack(">HHHIIHHIII", 2, 513, 4, 1, at + 30, 514, 4, 1, thumbnail.tell(), 0) + thumbnail.getvalue()
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + bytes(tiff))
    assert Image.open(tmp_path / "a.jpg").getexif().get_ifd(-1)[514] == thumbnail.tell()
    picture = read_picture(tmp_path / "a.jpg")
    write_picture(tmp_path / "b.jpg", picture.pixels, like=picture)
    out = Image.open(tmp_path / "b.jpg").getexif()
    assert out[0x010F] == "Maker" and not out.get_ifd(-1) and thumbnail.getvalue() not in (tmp_path / "b.jpg").read_bytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        Image.fromarray(photo()).save(tmp_path / name, exif=exif)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
        assert np.array_equal(read_picture(tmp_path / name).pixels, upright), name
        assert (probe(tmp_path / name).height, probe(tmp_path / name).width) == upright.shape[:2]
    deep = photo(3, np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    assert np.array_equal(read_picture(tmp_path / "deep.tif").pixels, pictures._upright(deep, orientation))


# --- chroma and loss ---


def test_chroma_is_not_halved_where_it_was_whole(tmp_path):
    from PIL.JpegImagePlugin import get_sampling
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[..., 2], lines[::3] = 200, (255, 0, 0)
    for name, how in (("444.jpg", dict(subsampling=0)), ("420.jpg", dict(subsampling=2)), ("a.png", {})):
        Image.fromarray(lines).save(tmp_path / name, **how)
    for name, quality, sampling in (("444.jpg", 90, 0), ("420.jpg", 90, 2), ("a.png", 95, 0), ("420.jpg", 100, 0)):
        like = read_picture(tmp_path / name)
        write_picture(tmp_path / "out.jpg", like.pixels, like=like, quality=quality)
        assert get_sampling(Image.open(tmp_path / "out.jpg")) == sampling, (name, quality)
    for name, quality, exact in (("a.png", 95, True), ("420.jpg", 95, False), ("420.jpg", 100, True)):
        like = read_picture(tmp_path / name)
        write_picture(tmp_path / "out.webp", like.pixels, like=like, quality=quality)
        assert np.array_equal(read_picture(tmp_path / "out.webp").pixels, like.pixels) == exact
        assert read_picture(tmp_path / "out.webp").lossless == exact


# --- transparency ---


def disc(side, soft=0.0):
    """An orange disc whose edge is `soft` pixels wide, hidden magenta outside: straight RGBA (side, side, 4)."""
    y, x = np.mgrid[:side, :side] + 0.5
    r = np.hypot(x - side / 2, y - side / 2)
    alpha = np.clip((side * 0.35 - r) / max(soft, 1e-6) + 0.5, 0, 1)
    pixels = np.empty((side, side, 4), np.uint8)
    pixels[..., :3] = np.where(alpha[..., None] > 0, (240, 140, 20), (255, 0, 255))
    pixels[..., 3] = np.rint(255 * alpha)
    return pixels


@pytest.mark.parametrize("soft", [0, 1.5, 12])
def test_what_is_hidden_stays_hidden(soft):
    """Colour and alpha enlarged apart and laid on black, white and green: no fringe of what was under the alpha, no saw-teeth."""
    pixels = disc(64, soft)
    colour, alpha = split_alpha(pixels)
    assert colour.shape == (64, 64, 3) and alpha.shape == (64, 64, 1)
    assert np.array_equal(colour[pixels[..., 3] == 255], pixels[pixels[..., 3] == 255][:, :3])
    big, a = resized(colour, 256, 256).astype(float), resized(alpha, 256, 256) / 255.0
    truth = disc(256, 4 * soft)
    for ground in ((0, 0, 0), (255, 255, 255), (0, 255, 0)):
        ours, true = (c * x + np.array(ground) * (1 - x) for c, x in ((big, a), (truth[..., :3].astype(float), truth[..., 3:] / 255.0)))
        away = np.abs(np.hypot(*(np.mgrid[:256, :256] - 127.5)) - 256 * 0.35) > 2 * soft + 8  # pixels from the edge
        assert np.abs(ours - true)[away].max() < 3
    assert np.abs(big - (240, 140, 20)).max() < 3  # the same colour everywhere: nothing to make a fringe of
    edge = (a[..., 0] > 0.5).sum(1)[90:166]  # the half-way line runs smoothly: a chord's length changes little from row to row
    assert np.abs(np.diff(edge, n=2)).max() <= 2


def test_stairs_become_the_line_they_stand_for():
    hard, truth = disc(64)[..., 3:], disc(256)[..., 3:] > 127
    wrong = [((resized(x, 256, 256) > 127) != truth).sum() for x in (hard, smooth_stairs(hard))]
    assert wrong[1] < 0.7 * wrong[0], wrong
    square, line = np.zeros((32, 32, 1), np.uint16), np.zeros((32, 32, 1), np.uint8)
    square[8:24, 8:24] = 65535
    line[range(32), range(32)] = 255
    changed = smooth_stairs(square) != square
    assert changed.sum() <= 12 and not changed[10:22].any()  # its corners alone
    for same in (line, disc(64, 1.5)[..., 3:], photo(4)[..., 3:], np.full_like(line, 255)):
        assert np.array_equal(smooth_stairs(same), same)


def test_alpha_that_hides_nothing_and_alpha_that_hides_all():
    opaque = photo(4)
    opaque[..., 3] = 255
    colour, alpha = split_alpha(opaque)
    assert np.array_equal(colour, opaque[..., :3]) and (alpha == 255).all()
    nothing = photo(4, np.uint16)
    nothing[..., 3] = 0
    assert np.array_equal(split_alpha(nothing)[0], nothing[..., :3])
    assert split_alpha(photo(3))[1] is None


@pytest.mark.parametrize("size", [(164, 232), (30, 100), (41, 58)])
def test_resized_rows_are_those_of_the_whole(size):
    for dtype in (np.uint8, np.uint16):
        pixels = photo(2, dtype)
        whole = resized(pixels, *size)
        assert np.array_equal(np.concatenate([resized(pixels, *size, y, min(y + 7, size[0])) for y in range(0, size[0], 7)]), whole)
    assert np.abs(whole[..., 0].astype(int) - 257 * np.asarray(Image.fromarray((pixels[..., 0] // 257).astype(np.uint8)).resize(size[::-1], Image.BICUBIC)).astype(int)).max() < 600


# --- streams ---


@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_a_canvas_is_written_band_by_band(ending, tmp_path):
    pixels, path = photo(3), tmp_path / f"a.{ending}"
    with open_writer(path, *pixels.shape) as w:
        for y in (0, 1, 20, 40):
            w.write(pixels[y : {0: 1, 1: 20, 20: 40, 40: 41}[y]])
            assert not path.exists()
    write_picture(tmp_path / f"b.{ending}", pixels)
    assert path.read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
    for failing in (lambda w: w.write(pixels[:5]), lambda w: w.write(pixels[:, :5]), lambda w: w.write(np.concatenate([pixels, pixels]))):
        with pytest.raises(ValueError), open_writer(tmp_path / f"half.{ending}", *pixels.shape) as w:
            failing(w)
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / f"half.{ending}", *pixels.shape) as w:
        w.write(pixels[:3])
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="out of memory"), open_writer(tmp_path / f"half.{ending}", *pixels.shape) as w:
        raise RuntimeError("out of memory")  # the caller's own errors stay what they are
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a.{ending}", f"b.{ending}"]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_large_canvas_needs_little_memory(ending, tmp_path):
    canvas = np.memmap(tmp_path / "canvas", np.uint8, "w+", shape=(1500, 8000, 3))
    tracemalloc.start()
    write_picture(tmp_path / f"a.{ending}", canvas)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * canvas.nbytes and probe(tmp_path / f"a.{ending}").width == 8000


def test_a_canvas_that_waits_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "IN_MEMORY", 1000)
    write_picture(tmp_path / "a.webp", photo())
    assert np.array_equal(read_picture(tmp_path / "a.webp").pixels, photo()) and len(list(tmp_path.iterdir())) == 1


# --- files and folders ---


def test_animations_and_pages_are_said(tmp_path):
    frames = [Image.fromarray(np.roll(photo(), 5 * i, axis=1)) for i in range(3)]
    for name in ("a.gif", "a.webp", "a.tif", "a.png", "a.avif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert probe(tmp_path / name).frames == 3
        picture = read_picture(tmp_path / name)
        assert len(picture.notes) == 1 and "first of its 3" in picture.notes[0], name
        assert np.abs(picture.pixels[..., :3].astype(int) - photo()).mean() < 25


def test_every_format_that_opens_counts_in_a_folder(tmp_path):
    for ending in ("png", "jpg", "jfif", "webp", "avif", "gif", "bmp", "tif", "jp2", "ppm", "tga"):
        Image.fromarray(photo()).save(tmp_path / f"a.{ending}")
    (tmp_path / "b.HEIC").write_bytes(b"")
    (tmp_path / "raw.NEF").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "._a.jpg").write_bytes(b"")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "below").mkdir()
    for folder in (".hidden", "below"):
        Image.fromarray(photo()).save(tmp_path / folder / "c.png")
    (tmp_path / "below" / "round").symlink_to(tmp_path)
    found, problems = scan(tmp_path)
    assert len(found) == 13 and all(read_image(p).shape == (41, 58, 3) for p in found if p.suffix != ".HEIC")
    assert [p.name for p, _ in problems] == ["raw.NEF"] and "develop" in problems[0][1]
    assert found == list_images(tmp_path) and len(scan(tmp_path, recursive=False)[0]) == 12


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311])
def test_a_folder_that_cannot_be_read_is_named(mode, user):
    """Shut, its names alone, or all but its names: what measures does not take the rest for all, and what restores says what it left out."""
    folder, rights = user
    (folder / "shut").mkdir()
    for name in ("a.png", "shut/b.png"):
        Image.fromarray(photo()).save(folder / name)
    (folder / "shut").chmod(mode)
    with rights():
        found, problems = scan(folder)
        with pytest.raises(InputError, match="cannot read the folder .*shut: Permission denied"):
            list_images(folder)
    (folder / "shut").chmod(0o755)
    assert found == [folder / "a.png"] and problems == [(folder / "shut", "Permission denied")]
    assert len(list_images(folder)) == 2


def test_what_cannot_be_read_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "a.svg").write_text("<svg/>")
    write_picture(tmp_path / "half.png", photo(3, np.uint16))
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:400])
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)  # HEIC under another name
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name, words in (("empty.png", "empty"), ("text.jpg", "no picture"), ("a.svg", "drawing"), ("half.png", "cannot be read"), ("none.png", "no picture at"),
                        ("phone.jpg", r"pip install 'oftsr\[heif\]'"), (".", "directory")):
        for read in (read_picture, read_image) if name == "half.png" else (read_picture, probe):
            with pytest.raises(InputError, match=words) as e:
                read(tmp_path / name)
            assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_half_an_exif_is_a_note_and_no_warning(tmp_path, recwarn):
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=camera_exif().tobytes()[:60])
    back = read_picture(tmp_path / "a.jpg")
    assert back.pixels.ndim == 3 and any("damaged" in line for line in back.notes) and not recwarn.list and all("\n" not in line for line in back.notes)


def test_heic(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is an extra")
    write_picture(tmp_path / "a.heic", photo(), quality=100)
    back = read_picture(tmp_path / "a.heic")
    assert back.format == "HEIF" and np.abs(back.pixels.astype(int) - photo()).mean() < 2 and probe(tmp_path / "a.heic").width == 58
    deep = photo(3, np.uint16)
    pillow_heif.from_bytes("RGB;16", (58, 41), deep.tobytes()).save(tmp_path / "ten.heic", quality=100)  # 10 bits
    back = read_picture(tmp_path / "ten.heic").pixels
    assert probe(tmp_path / "ten.heic").deep and back.dtype == np.uint16 and np.abs(back.astype(int) - deep).mean() < 600 and len(np.unique(back)) > 256


def test_bombs_are_refused_and_large_photographs_are_not(tmp_path):
    Image.new("1", (2, 1)).save(tmp_path / "large.png")
    data = bytearray((tmp_path / "large.png").read_bytes())
    data[16:24] = struct.pack(">II", 20000, 10000)  # 200 megapixels, more than Pillow lets through
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "large.png").write_bytes(data)
    assert probe(tmp_path / "large.png").height == 10000
    tiny = Image.Exif()
    tiny[0x0112] = 6  # eXIf after the pixels, which are not there
    data = data[:33] + struct.pack(">I4s", 0, b"IDAT") + struct.pack(">I", zlib.crc32(b"IDAT")) + chunk(b"eXIf", tiny.tobytes()[6:]) + data[-12:]
    (tmp_path / "late.png").write_bytes(data)
    assert (probe(tmp_path / "late.png").width, probe(tmp_path / "late.png").height) == (10000, 20000)
    with pytest.raises(InputError, match="20000 x 10000 .* --max_pixels"):
        read_picture(tmp_path / "large.png", max_pixels=1e8)
    assert Image.MAX_IMAGE_PIXELS  # whoever imports this keeps Pillow's own guard


def test_two_programs_that_write_one_path_and_one_that_is_killed(tmp_path):
    code = ("import sys, time, console\nfrom pathlib import Path\n"
            "with console.atomic_path(sys.argv[1]) as tmp:\n    tmp.write_text(sys.argv[2])\n    print('there', flush=True)\n    time.sleep(float(sys.argv[3]))")
    start = lambda word, seconds: subprocess.Popen([sys.executable, "-c", code, tmp_path / "a.txt", word, str(seconds)], stdout=subprocess.PIPE, cwd=ROOT)
    killed = start("killed", 60)
    killed.stdout.readline()
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 1
    first, second = start("first", 0.5), start("second", 0.5)
    for p in (first, second):
        assert p.wait() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() in ("first", "second")


def test_windows(tmp_path, monkeypatch):
    """What Windows does otherwise: it syncs only what is open for writing, and some names are devices."""
    import fcntl
    real = os.fsync

    def fsync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(sys, "platform", "win32")
    write_picture(tmp_path / "a.png", photo())
    for name in ("con.png", "NUL.x4.png", "com1.jpg"):
        with pytest.raises(InputError, match="device"):
            write_picture(tmp_path / name, photo())
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Access is denied")))
    with pytest.raises(InputError, match="Access is denied"):
        write_picture(tmp_path / "a.png", photo())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_long_name_and_a_console_that_cannot_show_it(tmp_path):
    name = "ж" * 120 + ".png"
    write_picture(tmp_path / name, photo())
    code = "import console; console.Parser(); print('ж\\udcff')"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert out.returncode == 0 and out.stdout.strip() == b"\\u0436\\udcff"


def test_importing_is_cheap():
    code = "import sys, pictures; print(*(m for m in ('torch', 'tifffile', 'imagecodecs', 'cv2', 'PIL.ImageCms') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == ""


# --- through the network ---


def test_upscale_gives_back_the_kind_it_got(weights, tmp_path):
    """Gray with equal channels, alpha apart, 16 bits unrounded; paths, PIL pictures, arrays, and lists of these."""
    from sample import upscale
    how, shares = dict(t=1, ckpt=weights / "distill.safetensors", device="cpu"), []
    for channels in (1, 2, 3, 4):
        small = photo(channels, height=12, width=17)
        eight, sixteen = upscale(small, **how), upscale(to_depth(small, np.uint16), **how)
        assert eight.shape == sixteen.shape == (48, 68, channels) and (eight.dtype, sixteen.dtype) == (np.uint8, np.uint16)
        rounding = 0.51 if channels in (1, 3) else 2  # what lies under the alpha is rounded too
        assert np.abs(eight.astype(float) - sixteen / 257).max() <= rounding and (sixteen % 257).any()
        im = Image.fromarray(small[..., 0] if channels == 1 else small)
        assert upscale(im, **how).mode == im.mode and np.array_equal(np.asarray(upscale(im, **how)).reshape(eight.shape), eight)
        write_picture(tmp_path / f"{channels}.png", small)
    assert upscale(small[..., 0], **how).shape == (48, 68)
    mixed = [tmp_path / "1.png", str(tmp_path / "4.png"), small, Image.fromarray(small[..., :3])]
    several = upscale(mixed, progress=shares.append, outscale=2.5, **how)
    assert [np.asarray(x).shape for x in several] == [(30, 42, 1), (30, 42, 4), (30, 42, 4), (30, 42, 3)] and sum(shares) == pytest.approx(1)
    assert np.array_equal(several[1], several[2]) and np.array_equal(several[0], upscale(mixed[0], outscale=2.5, **how))
    for bad in (small / 255, small[None], np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(InputError, match="uint8 or uint16"):
            upscale(bad, **how)
