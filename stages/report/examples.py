"""What evaluate runs kept of single images: questions with every model's answer and attention, and attention maps.

The page's script shows the questions (examples.jsonl); what it gets is bounded, so that ten thousand of them make no
page that freezes. The maps (attention.jsonl) are for the figures.
"""

import base64
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageFilter

from diffclip.base import schema
from diffclip.base.images import BROKEN, decode
from diffclip.base.overlay import overlay
from diffclip.base.schema import POPE_SPLITS
from stages.report.data import Arms, as_dict, read_lines

MOST_TEXT = 5_000_000  # characters of all examples without their images
MOST_IMAGES = 8_000_000  # characters of all images
LONGEST = 300  # characters of a question or an answer
# up to so many images are shown with so many pixels a side
SIDES = ((60, 320), (300, 224), (1200, 128))
SMALLEST = 96
LARGEST_GRID = 64  # patches a side; more is no map of a vision transformer

PARTS = ("A1", "A2", "difference")  # of differential attention

Rows = dict[str, tuple[dict[str, Any], Path]]  # model: line of examples.jsonl, its run's directory


@dataclass
class Gallery:
    """What the page's script gets: `items` as `item` makes them, `images` as {u: data URI, w, h}."""

    models: list[str]
    seed: str = ""
    stored: int = 0
    items: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    without_image: int = 0  # left out for the size of the page

    def script_data(self) -> str:
        """JSON that may stand inside a script element: nothing in it can end the element."""
        data = {"models": self.models, "items": self.items, "images": self.images}
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        for character in "<>&\u2028\u2029":
            text = text.replace(character, f"\\u{ord(character):04x}")
        return text


def examples(arms: Arms) -> Gallery:
    """The questions of the first seed that stored any, all of them as far as the page's size allows.

    What has to be left out is left out evenly in every split, so not by outcome.
    """
    for seed in dict.fromkeys(s for model in arms.models for s in arms.seeds(model)):
        rows: dict[tuple, Rows] = {}
        for model in arms.models:
            for run in arms.of("evaluate", model, seed):
                for row in read_lines(run.path / schema.EXAMPLES):
                    # the text belongs to the key: ids may be numbered afresh in every file
                    key = tuple(_text(row, name) for name in ("split", "question_id", "question", "label"))
                    rows.setdefault(key, {})[model] = (row, run.path)
        if rows:
            return _gallery(arms, seed, rows)
    return Gallery(arms.models)


def _gallery(arms: Arms, seed: str, rows: dict[tuple, Rows]) -> Gallery:
    result = Gallery(arms.models, seed, len(rows))
    items = {key: item(arms.models, key, lines) for key, lines in rows.items()}
    size = sum(len(json.dumps(one, ensure_ascii=False)) for one in items.values())
    chosen = spread(list(items), len(items) if size <= MOST_TEXT else int(len(items) * MOST_TEXT / size))
    places_of = {
        key: [(folder, name) for row, folder in rows[key].values() if (name := _text(row, "image"))] for key in chosen
    }
    count = len({places[0] for places in places_of.values() if places})
    side = next((side for most, side in SIDES if count <= most), SMALLEST)
    numbers: dict[tuple[Path, str], int] = {}
    used = 0
    for key in chosen:
        places = places_of[key]
        if not places:
            continue
        if places[0] not in numbers:
            if used > MOST_IMAGES:
                result.without_image += 1
                continue
            image = next((i for folder, name in places if (i := image_data(folder, name, side))), None)
            numbers[places[0]] = len(result.images) if image else -1
            if image:
                result.images.append(image)
                used += len(image["u"])
        items[key]["p"] = numbers[places[0]]
    result.items = [items[key] for key in chosen]
    return result


def spread(keys: Sequence[tuple], count: int) -> list[tuple]:
    """Up to `count` keys in their order, evenly spaced in every split: neighbours often share an image."""
    by_split: dict[str, list[tuple]] = {split: [] for split in POPE_SPLITS}
    for key in keys:
        by_split.setdefault(key[0], []).append(key)
    chosen: list[tuple] = []
    for group in by_split.values():
        share = -(-len(group) * count // max(1, len(keys)))
        chosen += [group[i * len(group) // share] for i in range(min(share, len(group)))]
    return chosen


def item(models: Sequence[str], key: tuple, rows: Rows) -> dict[str, Any]:
    """One question for the script: s(plit), q(uestion), l(abel), t(ext of the query), p(icture's number), and for
    each model, or null, in a(nswers) [answer, answer with another image, right or not] and in h(eat) [columns,
    values in base64].
    """
    split, _, question, label = key
    answers: list[list | None] = []
    heats: list[list | None] = []
    query = ""
    for model in models:
        if model not in rows:
            answers.append(None)
            heats.append(None)
            continue
        row, _ = rows[model]
        answer = _text(row, "answer")
        # as the scores take it: anything but the very word is wrong
        right = answer.strip().lower() == label.strip().lower()
        answers.append([answer, _text(row, "answer_shuffled"), right])
        heat = grid(row.get("heat"))
        values = base64.b64encode(bytes(v for line in heat for v in line)).decode() if heat else ""
        heats.append([len(heat[0]), values] if heat else None)
        query = query or _text(row, "query")
    return {"s": split, "q": question, "l": label, "t": query, "p": -1, "a": answers, "h": heats}


def image_data(directory: Path, name: str, side: int = SIDES[0][1]) -> dict[str, Any] | None:
    """{u: data URI, w, h} of an image inside `directory`; None if it is elsewhere or unreadable."""
    image = open_inside(directory, name)
    if image is None:
        return None
    image.thumbnail((side, side))
    kind = "png" if max(image.size) <= 64 else "jpeg"  # small drawings keep their pixels
    data = io.BytesIO()
    image.save(data, kind, quality=80)
    uri = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"u": uri, "w": image.width, "h": image.height}


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else str(value)[:LONGEST]


# --- attention maps ---------------------------------------------------------------------------------------------


@dataclass
class Map:
    """One image and query, and each model's grids (rows of 0 to 255): relevance, and A1, A2 and their difference."""

    name: str  # of the image
    query: str
    image: Image.Image
    heat: dict[str, list[list[int]]] = field(default_factory=dict)
    parts: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    outline: list[list[int]] | None = None  # 255 where the object asked for is

    def pixels(self, side: int) -> np.ndarray:
        """The image as (side, side, 3) uint8."""
        return np.asarray(self.image.resize((side, side), Image.Resampling.NEAREST))

    def overlaid(self, heat: list[list[int]], side: int) -> np.ndarray:
        """The image under a grid, as (side, side, 3) uint8."""
        return overlay(self.pixels(side).astype(float), _enlarged(heat, side), top=255)

    def tinted(self, signed: list[list[int]], side: int) -> np.ndarray:
        """The image under a grid whose zero is 128, red above it and blue below, as (side, side, 3) uint8."""
        colour = 255 * colormaps["coolwarm"](_enlarged(signed, side) / 255)[:, :, :3]
        return (0.3 * self.pixels(side) + 0.7 * colour).clip(0, 255).astype(np.uint8)

    def outlined(self, pixels: np.ndarray) -> np.ndarray:
        """(side, side, 3) with the edge of the object asked for, white inside and black outside."""
        if self.outline is None:
            return pixels
        mask = Image.fromarray(np.asarray(self.outline, dtype=np.uint8))
        mask = mask.resize(pixels.shape[:2], Image.Resampling.NEAREST)
        outer, inner = (
            np.asarray(mask.filter(edge(3))) > 127 for edge in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
        )
        inside, shown = np.asarray(mask) > 127, pixels.copy()
        shown[inside & ~inner], shown[outer & ~inside] = 255, 0
        return shown


def _enlarged(grid: list[list[int]], side: int) -> np.ndarray:
    image = Image.fromarray(np.asarray(grid, dtype=np.uint8))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), dtype=float)


def attention_maps(arms: Arms) -> list[Map]:
    """The maps of the first seed that has any, models side by side by image and query."""
    for seed in dict.fromkeys(s for model in arms.models for s in arms.seeds(model)):
        maps: dict[tuple[str, str], Map] = {}
        for model in arms.models:
            for run in arms.of("evaluate", model, seed):
                for row in read_lines(run.path / schema.ATTENTION):
                    add_map(maps, model, row, run.path)
        if maps:
            return list(maps.values())
    return []


def add_map(maps: dict[tuple[str, str], Map], model: str, row: dict[str, Any], folder: Path) -> None:
    """Put one line of attention.jsonl to the others; a line that is damaged or without its image is left out."""
    heat = grid(row.get("heat"))
    key = str(row.get("file") or row.get("image")), str(row.get("query"))[:200]
    if heat and key not in maps and (image := open_inside(folder, str(row.get("image")))):
        maps[key] = Map(*key, image)
    if not heat or key not in maps:
        return
    one, parts = maps[key], as_dict(row.get("maps"))
    one.heat[model], one.outline = heat, one.outline or grid(row.get("outline"))
    grids = {name: grid(parts.get(name)) for name in PARTS}
    if all(grids.values()):
        one.parts[model] = {name: found for name, found in grids.items() if found}


def grid(value: Any) -> list[list[int]] | None:
    """Rows of numbers from 0 to 255, all of one length; None for anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= LARGEST_GRID:
        return None
    try:
        widths = {len(bytes(row)) if isinstance(row, list) else 0 for row in value}
    except (TypeError, ValueError):  # something that is no number from 0 to 255
        return None
    return value if len(widths) == 1 and 0 < widths.pop() <= LARGEST_GRID else None


def open_inside(folder: Path, name: str) -> Image.Image | None:
    """The image `name` inside `folder` as RGB; None if it is elsewhere or cannot be read."""
    path = Path(os.path.realpath(folder / name))
    if not name or Path(os.path.realpath(folder)) not in path.parents:
        return None
    try:
        return decode(path)
    except BROKEN:
        return None
