"""Picture files in and out.

A picture is uint8 (H, W, 3), RGB, on its way between a file and the network.
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from console import InputError, atomic_write

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def rgb_array(im):
    """A PIL picture as RGB, uint8 (H, W, 3): EXIF rotation applied, alpha composited on white, 16 bits brought to 8. Raises InputError for floats."""
    im = ImageOps.exif_transpose(im)
    if im.mode.startswith("I;16") or im.mode == "I":
        im = Image.fromarray(np.clip(np.round(np.asarray(im, np.float32) / 257), 0, 255).astype(np.uint8))
    if im.mode == "F":
        raise InputError("its pixels are floats of an unknown range: save it with 8 or 16 bits")
    if im.has_transparency_data:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return np.array(im.convert("RGB"))


def read_image(path):
    """A picture file as RGB, uint8 (H, W, 3). Raises InputError, in one line that names the file, if it cannot be read."""
    try:
        with Image.open(path) as im:
            return rgb_array(im)
    except FileNotFoundError:
        raise InputError(f"no picture at {path}") from None
    except Exception as e:  # Pillow raises whatever a broken file leads it to: struct.error, SyntaxError, ...
        raise InputError(f"{path} cannot be read as a picture: {e}") from None


def picture_format(path):
    """The format that Pillow would write to a file of that ending, or None."""
    name = Image.registered_extensions().get(Path(path).suffix.lower())
    return name if name in Image.SAVE else None


def check_fits(path, height, width):
    """Raises InputError if a picture of that size does not fit the format that path's ending names."""
    most = {"WEBP": 16383, "JPEG": 65500}.get(picture_format(path), 2**31 - 1)
    if max(height, width) > most:
        raise InputError(f"cannot write {path}: {width} x {height}, and {Path(path).suffix} has at most {most} pixels a side (use .png)")


def write_image(path, array, **options):
    """Write uint8 (H, W, 3) to path, in the format its ending names; whole or not at all. options go to Pillow. Raises InputError."""
    image_format = picture_format(path)
    if image_format is None:
        raise InputError(f"cannot write {path}: the ending names no picture format (use .png, .jpg or .webp)")
    check_fits(path, *array.shape[:2])
    atomic_write(path, lambda tmp: Image.fromarray(array).save(tmp, format=image_format, **options))


def is_picture(path):
    """Whether path is a file that looks like a picture by its name, and not one of the system's hidden ones."""
    return path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")


def list_images(folder):
    """Every picture below folder, sorted by path. Raises InputError if there is no folder or no picture in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    paths = sorted(p for p in folder.rglob("*") if is_picture(p))
    if not paths:
        raise InputError(f"no pictures in {folder} (looked for {' '.join(sorted(EXTENSIONS))})")
    return paths
