"""README.md's gallery: parts of photographs as people have them, enlarged 4 times, before and after.

    python assets/gallery.py         # assets/figures/gallery.jpg, from assets/real/
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))
from assets.before_after import crop, label
from sample import upscale

ASSETS = Path(__file__).parent
PARTS = {"china.jpg": (200, 100, 300, 175), "flower.jpg": (268, 180, 368, 255), "hopper.jpg": (180, 160, 280, 235)}  # left, top, right, bottom
COLUMNS = {"before (bicubic)": None, "--model clean --t 0.5": dict(model="clean", t=0.5), "--model real --t 0": dict(model="real", t=0), "--t 1": dict(model="real", t=1)}


def main(out=ASSETS / "figures" / "gallery.jpg"):
    width, height, head = 404, 304, 44
    figure = Image.new("RGB", (width * len(COLUMNS) - 4, head + height * len(PARTS) - 4), "white")
    draw = ImageDraw.Draw(figure)
    for column, (text, how) in enumerate(COLUMNS.items()):
        label(draw, width * column + 200, head // 2, text)
        for row, (name, box) in enumerate(PARTS.items()):
            path = ASSETS / "real" / name
            picture = Image.open(path).convert("RGB")
            big = picture.resize((4 * picture.width, 4 * picture.height), Image.BICUBIC) if how is None else Image.fromarray(upscale(path, **how))
            figure.paste(crop(big, box), (width * column, head + height * row))
    figure.save(out, quality=90)


if __name__ == "__main__":
    main()
