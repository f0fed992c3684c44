"""The attention maps that evaluate runs kept, read forgivingly: attention.jsonl with its images."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.report.data import Arms, read_lines

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LARGEST_GRID = 64  # patches a side; more is no map of a vision transformer


@dataclass
class Map:
    """One image and query, and each model's grid of relevance (rows of 0 to 255)."""

    picture: str
    query: str
    image: "Image"
    heat: dict[str, list[list[int]]] = field(default_factory=dict)

    def pixels(self, side: int) -> "np.ndarray":
        """The image as (side, side, 3)."""
        import numpy as np
        from PIL import Image

        return np.asarray(self.image.resize((side, side), Image.Resampling.NEAREST))


def attention_maps(arms: Arms) -> list[Map]:
    """The maps of the first seed that has any, models side by side by image and query."""
    for seed in dict.fromkeys(s for model in arms.models for s in arms.seeds(model)):
        found: dict[tuple[str, str], Map] = {}
        for model in arms.models:
            for run in arms.of("evaluate", model, seed):
                for row in read_lines(run.path / "attention.jsonl"):
                    add_map(found, model, row, run.path)
        if found:
            return list(found.values())
    return []


def add_map(found: dict[tuple[str, str], Map], model: str, row: dict[str, Any], folder: Path) -> None:
    """Put one line of attention.jsonl to the others; a line that is damaged or without its image is left out."""
    heat = grid(row.get("heat"))
    picture, query = str(row.get("file") or row.get("image")), str(row.get("query"))[:200]
    if heat is None:
        return
    one = found.get((picture, query))
    if one is None:
        image = open_inside(folder, str(row.get("image")))
        if image is None:
            return
        one = found[picture, query] = Map(picture, query, image)
    one.heat[model] = heat


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


def open_inside(folder: Path, name: str) -> "Image | None":
    """The image `name` inside `folder` as RGB; None if it is elsewhere or cannot be read."""
    from diffclip.base.images import BROKEN, decode

    path = (folder / name).resolve()
    if not name or folder.resolve() not in path.parents:
        return None
    try:
        return decode(path)
    except BROKEN:
        return None
