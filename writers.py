"""What puts a picture's rows into a file of each format, from the top down: PNG and TIFF as they come, others when all are there.

pictures.open_writer makes these. tags: what goes with the pixels, dict(exif: Image.Exif, dpi, xmp: bytes, note: dict or None).
"""
import json
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from colour import as_rgb, on_white, srgb_profile, to_depth
from console import InputError, refusals

IN_MEMORY = 2**28  # bytes up to which a canvas that waits for its encoder is kept in memory; beyond, in a file
OPAQUE = {"JPEG", "PPM", "BMP", "GIF"}  # no alpha, or none that most programs see
EXIF_IFD, MAKER_NOTE = 0x8769, 0x927C


class Writer:
    """What the three kinds of writers share: `rows`, how many came; put(rows) is each kind's own."""

    def __init__(self, path, name, file, shape, dtype, tags):
        self.path, self.name, self.file, self.shape, self.dtype, self.tags, self.rows = path, name, file, shape, dtype, tags, 0
        self.start()

    def write(self, rows):
        """The next rows, (n, width, channels) of the writer's dtype."""
        if rows.shape[1:] != self.shape[1:] or rows.dtype != self.dtype or self.rows + len(rows) > self.shape[0]:
            raise ValueError(f"rows should be (n, {self.shape[1]}, {self.shape[2]}) {self.dtype}, {self.shape[0] - self.rows} at most, not {rows.shape} {rows.dtype}")
        self.rows += len(rows)
        if len(rows):
            with refusals(self.path):
                self.put(np.ascontiguousarray(rows))


class PNG(Writer):
    """PNG, row by row: each filtered by what makes it small, then compressed."""

    def start(self):
        H, W, C = self.shape
        self.file.write(b"\x89PNG\r\n\x1a\n")
        self.chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8 * self.dtype.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[C], 0, 0, 0))
        if C >= 3:
            self.chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(srgb_profile(), 9))
        else:
            self.chunk(b"sRGB", b"\1")  # relative colorimetric; a profile for gray is more than most programs understand
        exif, dpi = self.tags["exif"], self.tags["dpi"]
        if len(exif):
            self.chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        if dpi:
            self.chunk(b"pHYs", struct.pack(">IIB", *(round(x / 0.0254) for x in dpi), 1))
        if self.tags["xmp"]:
            self.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + self.tags["xmp"])
        if self.tags["note"] is not None:
            self.chunk(b"tEXt", b"oftsr\0" + json.dumps(self.tags["note"]).encode())
        self.above, self.deflate = np.zeros(W * C * self.dtype.itemsize, np.uint8), zlib.compressobj(5, strategy=zlib.Z_FILTERED)

    def chunk(self, name, data):
        self.file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name))))

    def put(self, rows):
        raw = rows.astype(rows.dtype.newbyteorder(">"), copy=False).view(np.uint8).reshape(len(rows), -1)
        n = max(1, 2**18 // raw.shape[1])  # rows at a time: what the filters compute stays in the processor's cache
        for y in range(0, len(raw), n):
            lines = png_filtered(raw[y : y + n], self.above, self.shape[2] * self.dtype.itemsize)
            self.above = raw[y : y + n][-1].copy()
            if data := self.deflate.compress(lines):
                self.chunk(b"IDAT", data)

    def finish(self, *_):
        self.chunk(b"IDAT", self.deflate.flush())
        self.chunk(b"IEND", b"")


def png_filtered(raw, above, bpp):
    """Rows of bytes (n, W) as PNG's filters leave them, (n, 1 + W): of Sub, Up, Average and Paeth the one with the smallest residues, row by row.

    above: the row before the first (W,); bpp: bytes of a pixel.
    """
    b = np.vstack([above[None], raw[:-1]])  # above, a: at the left, c: above that
    a, c = (np.pad(x, ((0, 0), (bpp, 0)))[:, : raw.shape[1]] for x in (raw, b))
    to_a, to_b = np.abs(b.astype(np.int16) - c), np.abs(a.astype(np.int16) - c)
    to_c = np.abs(a.astype(np.int16) + b - c - c)
    paeth = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    average = ((a.astype(np.uint16) + b) >> 1).astype(np.uint8)
    best, size = None, None
    for number, guess in ((1, a), (2, b), (3, average), (4, paeth)):
        line = np.empty((len(raw), raw.shape[1] + 1), np.uint8)
        line[:, 0], line[:, 1:] = number, raw - guess
        cost = np.abs(line[:, 1:].view(np.int8).astype(np.int16)).sum(1, dtype=np.int64)
        if best is None:
            best, size = line, cost
        else:
            better = cost < size
            best[better], size[better] = line[better], cost[better]
    return best


class TIFF(Writer):
    """TIFF in compressed strips; its directory, which Pillow writes, follows them: tifffile, which reads here, writes no EXIF and no bands."""

    def start(self):
        self.strip = max(1, min(self.shape[0], 2**18 // (self.shape[1] * self.shape[2] * self.dtype.itemsize)))  # rows: 256 KB
        self.waiting, self.offsets, self.counts = [], [], []
        self.file.write(b"II*\0\0\0\0\0")

    def put(self, rows):
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= self.strip:
            rows = np.concatenate(self.waiting)
            whole = len(rows) // self.strip * self.strip
            for y in range(0, whole, self.strip):
                self.put_strip(rows[y : y + self.strip])
            self.waiting = [rows[whole:].copy()]

    def put_strip(self, rows):
        if not len(rows):
            return
        rows = np.concatenate([rows[:, :1], np.diff(rows, axis=1)], axis=1)  # predictor 2
        data = zlib.compress(rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes(), 6)
        self.offsets.append(self.file.tell())
        self.counts.append(len(data))
        if self.offsets[-1] + len(data) > 2**32 - 2**20:
            raise InputError(f"cannot write {self.path}: a TIFF has at most 4 GB (use .png)")
        self.file.write(data)

    def finish(self, *_):
        from PIL.TiffImagePlugin import ImageFileDirectory_v2
        for rows in self.waiting:
            self.put_strip(rows)
        H, W, C = self.shape
        ifd = ImageFileDirectory_v2()
        for tag, value in self.tags["exif"].items():
            ifd[tag] = value
        x, y = self.tags["dpi"] or (1, 1)
        ifd.tagtype.update({273: 4, 279: 4, 700: 1, 34675: 7})  # types that the values do not tell
        ifd.update({256: W, 257: H, 258: (8 * self.dtype.itemsize,) * C, 259: 8, 262: 2 if C >= 3 else 1, 273: (0,) * len(self.offsets), 277: C, 278: self.strip,
                    279: tuple(self.counts), 282: x, 283: y, 284: 1, 296: 2 if self.tags["dpi"] else 1, 317: 2,
                    34675: srgb_profile("rgb" if C >= 3 else "gray")})
        if C in (2, 4):
            ifd[338] = 2  # straight alpha
        if self.tags["xmp"]:
            ifd[700] = self.tags["xmp"]
        self.file.write(b"\0" * (self.file.tell() % 2))
        at = self.file.tell()
        directory = bytearray(ifd.tobytes(at))
        # Pillow counts the strips' places from the directory's end: it expects them to follow. Ours are written here.
        entry = next(i for i in range(2, len(directory), 12) if directory[i : i + 2] == struct.pack("<H", 273))
        place = entry + 8 if len(self.offsets) == 1 else struct.unpack_from("<I", directory, entry + 8)[0] - at
        struct.pack_into(f"<{len(self.offsets)}I", directory, place, *self.offsets)
        self.file.write(directory)
        self.file.seek(4)
        self.file.write(struct.pack("<I", at))


class Canvas(Writer):
    """What Pillow encodes, in one piece: the rows wait in memory, or in a file where they are many."""

    def start(self):
        H, W, C = self.shape
        if self.name in OPAQUE:
            C -= C in (2, 4)
        if H * W * C <= IN_MEMORY:
            self.canvas = np.empty((H, W, C), np.uint8)
        else:
            self.canvas = np.memmap(tempfile.TemporaryFile(dir=Path(self.path).parent), np.uint8, "w+", shape=(H, W, C))

    def put(self, rows):
        rows = to_depth(rows, np.uint8)
        self.canvas[self.rows - len(rows) : self.rows] = rows if rows.shape[2] == self.canvas.shape[2] else on_white(rows)

    def finish(self, quality, like):
        exif, xmp, dpi, name = self.tags["exif"], self.tags["xmp"], self.tags["dpi"], self.name
        gray = self.canvas.shape[2] < 3
        if gray and name in ("WEBP", "AVIF", "HEIF"):
            self.canvas, gray = as_rgb(self.canvas), False
        options = dict(dpi=dpi) if dpi else {}
        if name in ("JPEG", "WEBP", "AVIF", "HEIF"):
            data = exif.tobytes() if len(exif) else b""
            if name == "JPEG" and len(data) > 65533:
                exif[EXIF_IFD].pop(MAKER_NOTE, None)  # the maker's note: JPEG has 64 KB for all
                data = exif.tobytes()
            options.update(**({"exif": data} if data else {}), quality=quality, icc_profile=srgb_profile("gray" if gray else "rgb"), **({"xmp": xmp} if xmp else {}))
        full = like.full_chroma or quality >= 98
        if name == "JPEG" and not gray:
            options["subsampling"] = "4:4:4" if full else "4:2:0"
        if name in ("AVIF", "HEIF") and full:
            options["subsampling" if name == "AVIF" else "chroma"] = "4:4:4" if name == "AVIF" else 444
        if name == "WEBP":
            options.update(lossless=like.lossless or quality == 100, exact=True)
        im = Image.fromarray(self.canvas[..., 0] if self.canvas.shape[2] == 1 else self.canvas)
        im.save(self.file, format=name, **options)
