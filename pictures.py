"""Picture files in and out, and nothing of a picture harmed on the way.

    picture = read_picture("photo.jpg")                  # .pixels (H, W, C) uint8 or uint16, upright, sRGB; EXIF, dpi, XMP kept
    write_picture("larger.png", pixels, like=picture)    # in the format that the ending names, tagged sRGB, whole or not at all

C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha); alpha is straight. What happens to pixels is in colour.py, how they get
into a file in writers.py. The file's mode decides what a picture is,
never its largest value. Pillow reads and writes the formats and their tags; imagecodecs and tifffile read what is common, faster, and what Pillow would
round to 8 bits, and convert colours in 16: OpenCV, the other kept library that reads 16 bits, drops profiles and gray's alpha.
No torch; what is heavy is imported where it is used.
"""
import io
import json
import logging
import math
import os
import re
import struct
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, UnidentifiedImageError

import shards
import writers
from colour import BAND, rgb8, to_srgb
from console import InputError, atomic_path, refusals

MAX_PIXELS = 300_000_000  # telephones take pictures of 200 megapixels

EXTENSIONS = set(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .tif .tiff .bmp .dib .gif .avif .heic .heif .hif .jxl .jp2 .j2k .j2c .jpc .jpf .jpx "
    ".ppm .pgm .pbm .pnm .tga .psd .qoi .ico .icns .pcx .sgi .dds".split())
FOREIGN = {  # what a folder of pictures may hold, too, and nothing here reads
    **dict.fromkeys(".cr2 .cr3 .nef .nrw .arw .dng .raf .orf .rw2 .pef .srw".split(), "a camera's raw file: develop it first, to a 16-bit TIFF say"),
    **dict.fromkeys(".exr .hdr .pfm".split(), "pixels of an unknown range: save it with 8 or 16 bits"),
    **dict.fromkeys(".svg .svgz .eps .pdf .ai".split(), "a drawing, not pixels: save it as PNG first"),
    **dict.fromkeys(".xcf .kra .jxr .wdp".split(), "a format that is not read here: save it as PNG or TIFF first"),
}
LOSSLESS = {"PNG", "TIFF", "BMP", "DIB", "GIF", "PPM", "TGA", "PSD", "QOI", "ICO", "PCX", "SGI"}
WRITERS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"), ".webp": "WEBP", ".avif": "AVIF",
           **dict.fromkeys((".jp2", ".j2k", ".jpx"), "JPEG2000"), ".bmp": "BMP", ".gif": "GIF", ".tga": "TGA", ".ppm": "PPM", ".heic": "HEIF"}
MOST_PIXELS = {"WEBP": 16383, "JPEG": 65500, "AVIF": 65535, "HEIF": 16384, "GIF": 65535, "TGA": 65535}  # a side
PLUGINS = {"heif": ("pillow_heif", "HEIC pictures need pillow-heif"), "jxl": ("pillow_jxl", "JPEG XL pictures need pillow-jxl-plugin")}

# Tags of EXIF and TIFF
ORIENTATION, EXIF_IFD, INTEROP_IFD, PROCESSING_SOFTWARE = 0x0112, 0x8769, 0xA005, 0x000B
# What a TIFF says about its own bytes, and what has a place of its own in a Picture (resolution, XMP, ICC profile)
STRUCTURE = {254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 277, 278, 279, 280, 281, 282, 283, 284, 288, 289, 290, 291, 292, 293, 296, 301,
             317, 320, 321, 322, 323, 324, 325, 330, 332, 336, 338, 339, 340, 341, 347, 512, 513, 514, 529, 530, 531, 532, 559, 700, 33723, 34377, 34675, 37724, 50341}


@dataclass
class Picture:
    pixels: np.ndarray  # (H, W, C) uint8 or uint16, sRGB, upright
    format: str = ""  # Pillow's name of the file's format
    exif: bytes = b""  # as in a file, without thumbnail
    dpi: tuple | None = None
    xmp: bytes = b""
    lossless: bool = True
    quality: float | None = None  # of a JPEG file, by its quantisation tables
    full_chroma: bool = True  # colour as fine as brightness (4:4:4)
    notes: list = field(default_factory=list)  # what the user should know, a line each


@dataclass(frozen=True)
class Probe:
    width: int  # upright
    height: int
    format: str
    frames: int
    deep: bool  # more than 8 bits


# --- reading ---


def probe(path, max_pixels=MAX_PIXELS):
    """What a picture file says of itself, no pixel decoded: a Probe. Raises InputError if it is no picture, or larger than max_pixels."""
    with _open(path, max_pixels) as (im, head, *_):
        width, height = im.size
        orientation = im.getexif().get(ORIENTATION, 1)
        if (orientation >= 5) != (im.format == "TIFF" and im.tag_v2.get(ORIENTATION, 1) >= 5):  # of a TIFF Pillow gives the size upright
            width, height = height, width
        return Probe(width, height, im.format, getattr(im, "n_frames", 1), _depth(im, head) > 8)


def read_picture(path, max_pixels=MAX_PIXELS, metadata=True):
    """A picture file as a Picture: upright, in sRGB, 8 bits as uint8 and more as uint16. Raises InputError in one line that names the file.

    metadata=False: the pixels alone, faster.
    """
    with _open(path, max_pixels) as (im, head, told, file):
        frames = getattr(im, "n_frames", 1)
        profile, orientation, depth = im.info.get("icc_profile"), im.getexif().get(ORIENTATION, 1), _depth(im, head)
        picture = Picture(None, im.format, lossless=_lossless(im, head), quality=_quality(im), full_chroma=_full_chroma(im, head))
        if frames > 1:
            what = {"TIFF": "pages", "MPO": "pictures"}.get(im.format, "frames")
            picture.notes.append(f"the first of its {frames} {what} is taken")
        profile = profile or _profile_by_exif(im)
        if depth > 8 or not im.mode:
            pixels, space = _decode_deep(file, im, head, depth, picture.notes)
        elif (pixels := _decode_fast(file, im, head, metadata)) is not None:
            space = "gray" if pixels.shape[2] < 3 else "rgb"
        else:
            pixels, space = _decode(im)
            if im.format == "TIFF":
                orientation = 1  # Pillow has turned it
        if metadata:  # some of it may follow the pixels
            picture.exif, picture.dpi, picture.xmp = _exif(im, picture.notes), _dpi(im), _xmp(im)
        picture.pixels = _upright(to_srgb(pixels, space, profile, picture.notes), orientation)
        picture.notes += dict.fromkeys("it is damaged: " + " ".join(str(w.message).split()) for w in told if issubclass(w.category, UserWarning))
        return picture


def from_pil(im):
    """A PIL picture of any mode as a Picture, upright and in sRGB, as it is from a file. Raises InputError for pixels of an unknown range."""
    notes = []
    exif = _exif(im, notes)
    pixels, space = _decode(im)
    pixels = to_srgb(pixels, space, im.info.get("icc_profile"), notes)
    return Picture(_upright(pixels, im.getexif().get(ORIENTATION, 1)), im.format or "", exif, _dpi(im), _xmp(im), quality=_quality(im), notes=notes)


def as_picture(image):
    """A Picture of a path, a PIL picture, or an array (H, W) or (H, W, 1 to 4) of uint8 or uint16, which is taken as sRGB. Raises InputError."""
    if isinstance(image, (str, os.PathLike)):
        return read_picture(image)
    if isinstance(image, Image.Image):
        return from_pil(image)
    array = np.asarray(image)
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3) or array.ndim == 3 and not 1 <= array.shape[2] <= 4 or not array.size:
        raise InputError(f"an array should be uint8 or uint16, (H, W) or (H, W, 1 to 4), not {array.dtype} {array.shape}")
    return Picture(array.reshape(*array.shape[:2], -1))


def read_image(path):
    """A picture file as RGB, uint8 (H, W, 3), to learn from or to measure: 16 bits rounded, transparency laid on white. Raises InputError."""
    return rgb8(read_picture(path, metadata=False).pixels)


@contextmanager
def _open(path, max_pixels):
    """(Pillow's picture, the file's first bytes, the warnings so far, the file: a path, or the bytes of a tar's member), every failure an InputError that names the file."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is below, with the way to raise it
    file = path
    try:
        file = shards.source(path)
        with _stream(file) as f:
            head = f.read(65536)
        _plug_in(_kind(head))
        with warnings.catch_warnings(record=True) as told, _pillow(file, head) as im:
            warnings.simplefilter("always")
            if im.width * im.height > max_pixels:
                raise InputError(f"{path} would have {im.width} x {im.height} pixels, more than {max_pixels / 1e6:g} million: "
                                 "if you trust it, raise --max_pixels (max_pixels in Python)")
            yield im, head, told, file
    except FileNotFoundError:
        raise InputError(f"no picture at {path}") from None
    except MemoryError:
        raise
    except InputError as e:
        raise InputError(str(e) if str(path) in str(e) else f"{path} cannot be read as a picture: {e}") from None
    except Exception as e:  # Pillow raises whatever a broken file leads it to: struct.error, SyntaxError, ...
        raise InputError(f"{path} cannot be read as a picture: {_why(file, e)}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _openable(file):
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _stream(file):
    return _openable(file) if isinstance(file, bytes) else open(file, "rb")


def _bytes(file):
    return file if isinstance(file, bytes) else Path(file).read_bytes()


def _pillow(file, head):
    """Image.open, and for the TIFFs that Pillow does not know (16 bits with alpha, 12 bits) their tags in a picture's stead."""
    try:
        im = Image.open(_openable(file))
        if im.format == "PNG" and not {"exif", "Raw profile type exif"} & set(im.info):
            im.info["exif"] = _png_exif(file)  # which may follow the pixels: Pillow would decode them to get at it
        return im
    except UnidentifiedImageError:
        if head[:4] not in (b"II*\0", b"MM\0*"):
            raise
    tags = Image.Exif()
    tags.load(_bytes(file))
    width, height = (tags[256], tags[257])[:: -1 if tags.get(ORIENTATION, 1) >= 5 else 1]
    info = dict(icc_profile=tags.get(34675), xmp=tags.get(700), dpi=(tags.get(282), tags.get(283)) if tags.get(296, 2) == 2 else None)
    return nullcontext(SimpleNamespace(format="TIFF", mode="", width=width, height=height, size=(width, height), info=info, tag_v2=tags, getexif=lambda: tags))


def _png_exif(file):
    with _stream(file) as f:
        f.seek(8)
        while len(start := f.read(8)) == 8:
            length, name = struct.unpack(">I4s", start)
            if name == b"eXIf":
                return f.read(length)
            f.seek(length + 4, os.SEEK_CUR)
    return b""


def _kind(head):
    """What a file's first bytes say it is, where that needs a plug-in: "heif", "jxl" or None."""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1") and b"avif" not in head[8:64]:
        return "heif"
    return "jxl" if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else None


def _plug_in(kind):
    """Have Pillow open that kind, or raise InputError with the command that makes it possible."""
    if kind is None:
        return
    module, sentence = PLUGINS[kind]
    try:
        plugin = __import__(module)
    except ImportError:
        raise InputError(f"{sentence}: pip install 'oftsr[{kind}]'") from None
    if kind == "heif":
        plugin.register_heif_opener()


def _why(file, error):
    suffix = "" if isinstance(file, bytes) else Path(file).suffix.lower()
    if suffix in FOREIGN:
        return FOREIGN[suffix]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if len(file) == 0 if isinstance(file, bytes) else os.path.getsize(file) == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "its bytes are no picture, or of a format that is not known here"
    return (str(error) or type(error).__name__).splitlines()[0]


def _depth(im, head):
    """Bits of a sample as the file has them; Pillow's mode does not say, as it opens most of what is deeper as 8 bits."""
    if im.format == "PNG":
        return head[24]
    if im.format == "TIFF":
        bits = im.tag_v2.get(258, 1)
        return max(bits) if isinstance(bits, tuple) else bits
    if im.format == "JPEG2000" and (at := head.find(b"\xff\x4f\xff\x51")) >= 0:  # the SIZ marker
        return (head[at + 42] & 127) + 1
    if im.format == "PPM" and (found := _PNM.match(head)):
        return int(found[4]).bit_length()
    return 16 if im.mode.startswith("I") else im.info.get("bit_depth", 8)  # pillow-heif says it there


_GAP = rb"(?:\s|#[^\n]*\n)+"
_PNM = re.compile(rb"P([56])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s")


def _decode(im):
    """A PIL picture's pixels, (H, W, C) uint8 or uint16, and their colour space: "gray", "rgb" or "cmyk"."""
    if im.mode == "F":
        raise InputError("its pixels are floats of an unknown range: save it with 8 or 16 bits")
    if im.mode.startswith("I"):
        pixels = np.asarray(im).astype(np.int64)
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
            raise InputError("its pixels are 32-bit numbers of an unknown range: save it with 8 or 16 bits")
        return pixels.astype(np.uint16)[..., None], "gray"
    if im.mode == "CMYK":
        return np.array(im), "cmyk"
    if im.mode == "LAB":
        from PIL import ImageCms
        im = ImageCms.profileToProfile(im, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    gray = im.mode in ("1", "L", "LA", "La")
    mode = ("LA" if gray else "RGBA") if im.has_transparency_data or im.mode == "La" else "L" if gray else "RGB"
    pixels = np.array(im if im.mode == mode else im.convert(mode))
    return pixels.reshape(*pixels.shape[:2], -1), "gray" if gray else "rgb"


def _decode_fast(file, im, head, metadata):
    """The pixels (H, W, C) uint8 of an ordinary JPEG or PNG by imagecodecs: to the bit Pillow's, 1.5 to 3.5 times as fast. None of what is left to Pillow, to read or to refuse."""
    if im.format == "JPEG":
        raw = _bytes(file) if im.mode in ("L", "RGB") else b""
        if not raw.endswith(b"\xff\xd9"):  # cut short, it may be: what is missing would be gray
            return None
    elif im.format == "PNG":
        if metadata or im.mode not in ("L", "LA", "RGB", "RGBA") or head[24] != 8 or "transparency" in im.info:  # metadata: Pillow finds it on its way through the pixels
            return None
        raw = _bare_png(_bytes(file))
    else:
        return None
    import imagecodecs
    try:
        pixels = (imagecodecs.jpeg8_decode if im.format == "JPEG" else imagecodecs.png_decode)(raw)
    except Exception:  # Pillow may forgive it, or says in its own words why not
        return None
    shape = im.height, im.width, len(im.getbands())
    return pixels.reshape(shape) if pixels.dtype == np.uint8 and pixels.shape in (shape, shape[:2]) and pixels.size == math.prod(shape) else None


def _bare_png(raw):
    """A PNG file's bytes with nothing but its pixels: of what else is odd libpng would speak on stderr."""
    parts, at = [raw[:8]], 8
    while at + 8 <= len(raw):
        length, name = struct.unpack_from(">I4s", raw, at)
        if name in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(raw[at : at + length + 12])
        at += length + 12
    return b"".join(parts)


def _decode_deep(file, im, head, depth, notes):
    """As _decode, of a file with more than 8 bits a sample: (H, W, C) uint16 of full range."""
    if im.format == "TIFF":
        return _decode_tiff(file, notes)
    if im.format in ("PNG", "JPEG2000"):
        import imagecodecs
        pixels = (imagecodecs.png_decode if im.format == "PNG" else imagecodecs.jpeg2k_decode)(_bytes(file))
        largest = 2**depth - 1
    elif im.format == "HEIF":
        import pillow_heif
        pixels = np.asarray(pillow_heif.open_heif(file, convert_hdr_to_8bit=False)) >> (16 - depth)
        largest = 2**depth - 1
    elif im.format == "PPM":
        found = _PNM.match(head)
        shape, largest = (im.height, im.width, 3 if found[1] == b"6" else 1), int(found[4])
        pixels = np.frombuffer(_bytes(file), ">u2", im.height * im.width * shape[2], offset=found.end()).reshape(shape)
    else:
        return _decode(im)
    pixels = _full_range(pixels.reshape(im.height, im.width, -1), largest)
    return pixels, "gray" if pixels.shape[2] < 3 else "rgb"


def _decode_tiff(file, notes):
    import tifffile
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it cannot read it raises, too
    with tifffile.TiffFile(_openable(file)) as tif:
        page = tif.pages[0]
        pixels = page.asarray()
        if page.sampleformat != 1 or page.bitspersample > 16:
            raise InputError("its pixels are floats, or numbers of an unknown range: save it with 8 or 16 bits")
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = _full_range(pixels.reshape(*pixels.shape[:2], -1) if page.axes in ("YX", "YXS") else pixels, 2**page.bitspersample - 1)
        name = page.photometric.name
        if name not in ("MINISBLACK", "MINISWHITE", "RGB", "SEPARATED") or pixels.ndim != 3:
            raise InputError(f"a 16-bit TIFF of the kind {name} is not read here: save it as RGB")
        if name == "MINISWHITE":
            pixels = ~pixels
        space = {"RGB": "rgb", "SEPARATED": "cmyk"}.get(name, "gray")
        colours = {"gray": 1, "rgb": 3, "cmyk": 4}[space]
        kind = (page.extrasamples or (0,))[0]  # 1: premultiplied alpha, 2: straight alpha
        alpha = pixels[..., colours : colours + 1] if kind in (1, 2) else None
        if pixels.shape[2] > colours + (alpha is not None):
            notes.append("its extra channels are left out")
        pixels = pixels[..., :colours]
        if kind == 1:
            pixels = _divided(pixels, alpha)
        return (pixels if alpha is None else np.concatenate([pixels, alpha], axis=-1)), space


def _divided(pixels, alpha):
    """Premultiplied colour (H, W, C) uint8 or uint16 as straight colour, alpha (H, W, 1)."""
    largest = np.iinfo(pixels.dtype).max
    return np.clip(np.rint(pixels / np.maximum(alpha, 1) * float(largest)), 0, largest).astype(pixels.dtype)


def _full_range(pixels, largest):
    """Whole numbers up to `largest` as uint8 where it is 255, else as uint16 up to 65535."""
    if largest == 255:
        return pixels.astype(np.uint8)
    return pixels.astype(np.uint16) if largest == 65535 else np.rint(pixels * (65535 / largest)).astype(np.uint16)


def _upright(pixels, orientation):
    """EXIF's orientation, 1 to 8, undone."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    down, across = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return np.ascontiguousarray(pixels[::down, ::across])


def _lossless(im, head):
    if im.format == "WEBP":
        return b"VP8L" in head[:64] or (head[12:16] == b"VP8X" and b"VP8L" in head)
    return im.format in LOSSLESS and not (im.format == "TIFF" and im.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"))


def _quality(im):
    """Of a JPEG, 1 to 100 as libjpeg counts it: from the sum of its first quantisation table, which does not depend on their order. None of others."""
    if not getattr(im, "quantization", None):
        return None
    scale = sum(im.quantization[min(im.quantization)]) / 3688  # of the standard table for brightness, quality 50
    return max(1.0, 100 - 50 * scale if scale <= 1 else 50 / scale)


def _full_chroma(im, head):
    if im.format in ("JPEG", "MPO"):
        from PIL.JpegImagePlugin import get_sampling
        return get_sampling(im) in (0, -1)
    return _lossless(im, head)


def _profile_by_exif(im):
    """Cameras mark Adobe RGB by EXIF's interoperability index alone."""
    exif = im.getexif()
    if im.mode != "RGB" or INTEROP_IFD not in exif.get_ifd(EXIF_IFD) or exif.get_ifd(INTEROP_IFD).get(1) != "R03":
        return None
    import imagecodecs
    return imagecodecs.cms_profile("rgb", whitepoint=[0.3127, 0.3290, 1.0], primaries=[0.64, 0.33, 1, 0.21, 0.71, 1, 0.15, 0.06, 1], gamma=563 / 256)


# --- metadata ---


def _dpi(im):
    try:
        x, y = (float(v) for v in im.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0 < x < 1e6 and 0 < y < 1e6 else None


def _xmp(im):
    xmp = im.info.get("xmp") or im.info.get("XML:com.adobe.xmp") or b""
    return xmp.encode() if isinstance(xmp, str) else bytes(xmp)


def _exif(im, notes):
    """EXIF as bytes, without what a TIFF says of its own bytes and without the thumbnail, which would be of another picture."""
    try:
        source = im.getexif()
        exif = Image.Exif()
        for tag in set(source) - STRUCTURE:
            value = source.get_ifd(tag) if tag in (EXIF_IFD, 0x8825) else source[tag]
            if value not in ({}, None):
                exif[tag] = dict(value) if isinstance(value, dict) else value
        if EXIF_IFD in exif and INTEROP_IFD in exif[EXIF_IFD]:
            exif[EXIF_IFD][INTEROP_IFD] = dict(source.get_ifd(INTEROP_IFD))
        return exif.tobytes() if len(exif) else b""
    except Exception as e:
        notes.append(f"its EXIF is broken and left out ({(str(e) or type(e).__name__).splitlines()[0]})")
        return b""


def _mended_exif(exif, height, width, dpi, note):
    """EXIF for a picture that is upright, in sRGB and of that size; note goes where its key tells of it."""
    old, new = Image.Exif(), Image.Exif()
    if exif:
        old.load(exif)
    for tag, value in old.items():
        new[tag] = dict(old.get_ifd(tag)) if tag in (EXIF_IFD, 0x8825) else value
    if ORIENTATION in new:
        new[ORIENTATION] = 1
    if EXIF_IFD in new:
        inner = new[EXIF_IFD]
        inner.update({0xA002: width, 0xA003: height, 0xA001: 1})  # 1: sRGB
        inner.pop(INTEROP_IFD, None)  # R03 said Adobe RGB
    if dpi and (len(new) or note):
        new[282], new[283], new[296] = *dpi, 2
    if note is not None:
        new[PROCESSING_SOFTWARE] = _note_text(note)
    return new


def _note_text(note):
    return "oftsr " + json.dumps(note)


def _mended_xmp(xmp, height, width):
    """XMP with the orientation and size of a picture that is upright and of that size."""
    for key, value in ((b"tiff:Orientation", 1), (b"tiff:ImageWidth", width), (b"tiff:ImageLength", height),
                       (b"exif:PixelXDimension", width), (b"exif:PixelYDimension", height), (b"exif:ColorSpace", 1)):
        xmp = re.sub(rb"(\b" + key + rb"\s*(?:=\s*[\"']|>\s*))\d+", rb"\g<1>%d" % value, xmp)
    return xmp


def read_note(path):
    """The note that write_picture left in a file, a dict, or None where there is none or no picture."""
    try:
        with _open(path, float("inf")) as (im, *_):
            text = im.info.get("oftsr") or str(im.getexif().get(PROCESSING_SOFTWARE, ""))
            note = json.loads(text.removeprefix("oftsr "))
            return note if isinstance(note, dict) and isinstance(note.get("input", ""), str) else None
    except (ValueError, RecursionError):  # InputError, and json's
        return None


# --- writing ---


def picture_format(path):
    """The format that would be written to a file of that ending, or None."""
    return WRITERS.get(Path(path).suffix.lower())


def check_fits(path, height, width):
    """Raises InputError if a picture of that size does not fit the format that path's ending names."""
    most = MOST_PIXELS.get(picture_format(path), 2**31 - 1)
    if max(height, width) > most:
        raise InputError(f"cannot write {path}: {width} x {height}, and {Path(path).suffix} has at most {most} pixels a side (use .png)")


def losses(path, channels, dtype):
    """What a file of that ending cannot hold of a picture of so many channels and that dtype: lines for the user, none where it holds all."""
    name, ending = picture_format(path), Path(path).suffix
    lines = []
    if dtype == np.uint16 and name not in ("PNG", "TIFF"):
        lines.append(f"{ending} holds 8 bits of its 16 (.png and .tif hold all)")
    if channels in (2, 4) and name in writers.OPAQUE:
        lines.append(f"{ending} has no transparency: laid on white (.png and .webp have it)")
    if name == "GIF":
        lines.append(".gif holds 256 colours (.png holds all)")
    return lines


def write_picture(path, pixels, like=None, quality=95, metadata=True, note=None):
    """Write (H, W, C) or (H, W) uint8 or uint16 to path, in the format that its ending names; whole or not at all.

    like: the Picture that it was made from, whose EXIF, dpi and XMP go with it (metadata=False: none do) and whose kind
    decides on 4:4:4 and lossless; quality 1 to 100, of lossy formats; note: a dict, kept in the file (read_note).
    16 bits stay in PNG and TIFF and are rounded elsewhere. pixels may be an np.memmap: it is read band by band. Raises InputError.
    """
    pixels = np.asanyarray(pixels)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4:
        raise InputError(f"cannot write {path}: pixels should be (H, W, 1 to 4) of uint8 or uint16, not {pixels.dtype} {pixels.shape}")
    with open_writer(path, *pixels.shape, pixels.dtype, like, quality, metadata, note) as writer:
        rows = max(1, BAND // max(1, pixels.shape[1]))
        for y in range(0, len(pixels), rows):
            writer.write(pixels[y : y + rows])


@contextmanager
def open_writer(path, height, width, channels, dtype=np.uint8, like=None, quality=95, metadata=True, note=None):
    """A picture written from top to bottom: `with open_writer(...) as w: w.write(rows)`, rows (n, width, channels) of dtype, any n.

    PNG and TIFF go straight to the file, in little memory; for others the canvas waits for its encoder, in a file if it is
    large. The file appears when the block ends well; after an error, or with rows missing, there is none. See write_picture.
    """
    name = picture_format(path)
    if name is None:
        raise InputError(f"cannot write {path}: the ending names no picture format (use .png, .jpg or .webp)")
    check_fits(path, height, width)
    if name == "HEIF":
        _plug_in("heif")
    like = like or Picture(None)
    dpi = like.dpi if metadata else None
    tags = dict(exif=_mended_exif(like.exif if metadata else b"", height, width, dpi, None if name == "PNG" else note), dpi=dpi,
                xmp=_mended_xmp(like.xmp if metadata else b"", height, width), note=note)
    kind = {"PNG": writers.PNG, "TIFF": writers.TIFF}.get(name, writers.Canvas)
    with atomic_path(path) as tmp:
        with refusals(path):
            file = open(tmp, "wb")
        with file:
            with refusals(path):
                writer = kind(path, name, file, (height, width, channels), np.dtype(dtype), tags)
            yield writer
            if writer.rows != height:
                raise InputError(f"cannot write {path}: {writer.rows} of {height} rows were given")
            with refusals(path):
                writer.finish(quality, like)
                file.flush()


# --- folders ---


def is_picture(path):
    """Whether path is a file that looks like a picture by its name, and not one of the system's hidden ones."""
    path = Path(path)
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def scan(folder, recursive=True):
    """The pictures in a folder (and below it), sorted, and what it holds that cannot be read: ([Path], [(Path, reason)]).

    Hidden files and folders are left out; a folder that links lead to is looked through once.
    """
    pictures, blocked, foreign = look_through(folder, recursive)
    return pictures, sorted(blocked + foreign)


def look_through(folder, recursive=True):
    """scan, with the folders that cannot be read apart from the files that are nothing for us: ([Path], [(Path, reason)], [(Path, reason)])."""
    pictures, blocked, foreign, seen = [], [], [], set()

    def unreadable(error):
        blocked.append((Path(error.filename), error.strerror))

    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        seen.add(os.path.realpath(here))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and os.path.realpath(os.path.join(here, f)) not in seen) if recursive else []
        try:
            for path in (Path(here, f) for f in files if not f.startswith(".")):
                if is_picture(path):
                    pictures.append(path)
                elif reason := FOREIGN.get(path.suffix.lower()):
                    foreign.append((path, reason))
        except PermissionError as e:  # its names can be read, and nothing else of it
            blocked.append((Path(here), e.strerror))
    return sorted(pictures), blocked, foreign


def list_images(folder):
    """Every picture below folder, sorted by path. Raises InputError if there is no folder or no picture in it, or if a folder below it cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    paths, blocked, _ = look_through(folder)
    if blocked:
        raise InputError(f"cannot read the folder {blocked[0][0]}: {blocked[0][1]}")
    if not paths:
        raise InputError(f"no pictures in {folder} (looked for {' '.join(sorted(EXTENSIONS))})")
    return paths
