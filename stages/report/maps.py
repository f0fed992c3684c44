"""The attention maps that evaluate runs kept, read forgivingly: attention.jsonl with its images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffclip.base import schema
from diffclip.base.images import BROKEN, decode
from diffclip.base.overlay import overlay
from stages.report.data import Arms
from stages.report.reading import read_lines

LARGEST_GRID = 64  # patches a side; more is no map of a vision transformer


@dataclass
class Map:
    """One image and query, and each model's grid of relevance (rows of 0 to 255)."""

    name: str  # of the image
    query: str
    image: Image.Image
    heat: dict[str, list[list[int]]] = field(default_factory=dict)

    def pixels(self, side: int) -> np.ndarray:
        """The image as (side, side, 3) uint8."""
        return np.asarray(self.image.resize((side, side), Image.Resampling.NEAREST))

    def overlaid(self, model: str, side: int) -> np.ndarray:
        """The image under the model's relevance, as (side, side, 3) uint8."""
        heat = Image.fromarray(np.asarray(self.heat[model], dtype=np.uint8))
        smooth = np.asarray(heat.resize((side, side), Image.Resampling.BILINEAR), dtype=float)
        return overlay(self.pixels(side).astype(float), smooth, top=255)


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
    name, query = str(row.get("file") or row.get("image")), str(row.get("query"))[:200]
    if heat is None:
        return
    known = maps.get((name, query))
    if known is None:
        image = open_inside(folder, str(row.get("image")))
        if image is None:
            return
        known = maps[name, query] = Map(name, query, image)
    known.heat[model] = heat


def grid(value: Any) -> list[list[int]] | None:
    """Rows of numbers from 0 to 255, all of one length; None for anything else."""
    if not isinstance(value, list) or not 0 < len(value) <= LARGEST_GRID:
        return None
    for row in value:
        if not isinstance(row, list) or len(row) != len(value[0]) or not 0 < len(row) <= LARGEST_GRID:
            return None
        try:
            bytes(row)
        except (TypeError, ValueError):
            return None
    return value


def open_inside(folder: Path, name: str) -> Image.Image | None:
    """The image `name` inside `folder` as RGB; None if it is elsewhere or cannot be read."""
    path = (folder / name).resolve()
    if not name or folder.resolve() not in path.parents:
        return None
    try:
        return decode(path)
    except BROKEN:
        return None
