"""README.md's first picture: a photograph before and after, and a part of it, twice as large, along the dial.

    python assets/before_after.py    # assets/figures/dial.png, from assets/cat.png
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))
from sample import upscale

ASSETS = Path(__file__).parent
FACE, FUR = (0, 8, 224, 132), (112, 16, 139, 40)  # of the small picture: left, top, right, bottom
INK, PAPER, KNOB = (40, 40, 40), "white", (232, 89, 12)


def crop(big, box):
    return big.crop([4 * side for side in box])


def label(draw, x, y, text, anchor="mm", fill=INK, size=26):
    draw.text((x, y), text, fill, ImageFont.load_default(size), anchor)


def main(out=ASSETS / "figures" / "dial.png"):
    small = Image.open(ASSETS / "cat.png").convert("RGB").resize((224, 150), Image.BICUBIC)
    before = small.resize((4 * small.width, 4 * small.height), Image.BICUBIC)
    after = {t: upscale(small, t=t) for t in (0, 0.5, 1)}
    face, width = crop(before, FACE), 4 * (FACE[2] - FACE[0])
    top, bottom = 4 * (FACE[3] - FACE[1]), 8 * (FUR[3] - FUR[1])
    figure = Image.new("RGB", (width, top + 100 + bottom), PAPER)
    draw = ImageDraw.Draw(figure)

    face.paste(crop(after[1], FACE).crop((width // 2, 0, width, top)), (width // 2, 0))
    figure.paste(face, (0, 0))
    draw.rectangle((width // 2 - 2, 0, width // 2 + 1, top), PAPER)
    for x, text in ((20, "before: 224 x 150"), (width // 2 + 20, "after: 896 x 600, t = 1")):
        draw.rectangle((x - 10, top - 46, x + 14 * len(text), top - 8), PAPER)
        label(draw, x, top - 27, text, "lm")

    panels = [(text, crop(big, FUR)) for text, big in (("before", before), *((f"t = {t}", big) for t, big in after.items()))]
    panels = [(text, panel.resize((2 * panel.width, 2 * panel.height), Image.NEAREST)) for text, panel in panels]
    step = (width - panels[0][1].width) // (len(panels) - 1)
    middles = [i * step + panels[0][1].width // 2 for i in range(len(panels))]
    draw.line((middles[1], top + 30, middles[-1], top + 30), INK, 5)
    for (text, panel), x in zip(panels, middles, strict=True):
        figure.paste(panel, (x - panel.width // 2, top + 100))
        if text != "before":
            draw.circle((x, top + 30), 12, KNOB)
        label(draw, x, top + 72, text + {"t = 0": ", faithful", "t = 1": ", realistic"}.get(text, ""))
    figure.save(out, optimize=True)


if __name__ == "__main__":
    main()
