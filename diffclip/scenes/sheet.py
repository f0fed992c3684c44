"""A contact sheet of the built-in world, to look at."""

import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from diffclip.scenes import drawing
from diffclip.scenes.drawing import make_scene
from diffclip.scenes.parts import SHIFTS, class_scene
from diffclip.scenes.text import MMVP_CATEGORIES, caption, mmvp_pair


def show(path: Path, seed: int, count: int = 20) -> None:
    """A contact sheet: images with a caption under each, then the shifted sets and MMVP-style pairs."""
    cells = []
    for i in range(count):
        scene = make_scene(seed, "pretrain", i)
        cells.append((scene, caption(scene, random.Random(i))))
    for role in SHIFTS:
        for i in range(5):
            scene, name = class_scene(seed, "shape", f"shifts/{role}", i + 2, role)
            cells.append((scene, f"shifts/{role}: {name}"))
    for category in MMVP_CATEGORIES:
        cells += [(scene, f"{category}: {line}") for scene, line in mmvp_pair(category, seed, 0)]
    columns, cell, height, zoom = 8, 200, 216, 2
    sheet = Image.new("RGB", (columns * cell, -(-len(cells) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (scene, text) in enumerate(cells):
        left, top = k % columns * cell + 10, k // columns * height + 8
        image = Image.fromarray(drawing.draw(scene, 64)).resize((64 * zoom,) * 2, Image.Resampling.NEAREST)
        sheet.paste(image, (left + 20, top))
        pen.text((left, top + 64 * zoom + 3), textwrap.fill(text, 30), "black", font_size=11)
    sheet.save(path)
    print(path)
