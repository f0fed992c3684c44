"""What evaluate leaves for the report about attention: heat maps for queries, and their scores against masks.

A map is the gradient relevance of `diffclip.attention_maps` in the dual encoder's vision tower, beside it the maps that
differential attention subtracts; each is a grid of numbers from 0 to 255, so that the report needs no model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffclip.attention_maps import enlarged, layer_maps, relevance, seen_part, vision_attention
from diffclip.base.errors import InputError
from diffclip.base.files import json_line, write_json, write_whole
from diffclip.base.images import open_image
from diffclip.base.schema import ATTENTION, LOCALISATION
from diffclip.benchmarks.mask_scores import SCORES, localise

IMAGES = 8  # of the attention figures, two queries each
SIDE = 224  # pixels of the stored images
OUTLINE = 64  # pixels a side of the stored masks, at most
ASKED = re.compile(r"^\s*is there (?:(an?|the|any) )?(.+?) in (?:the|this) (?:image|picture|photo)\b", re.IGNORECASE)
GRID = list[list[int]]


class Encoder(NamedTuple):
    """What `diffclip.load` returns."""

    model: nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]


def query_of(question: str) -> str:
    """ "a red car" for "Is there a red car in the image?"; "" if the question asks for no object."""
    match = ASKED.match(question)
    if not match:
        return ""
    article, name = match.groups()
    return f"{article.lower() if article and article.lower().startswith('a') and article != 'any' else 'a'} {name}"


def heat_maps(
    encoder: Encoder, images: Sequence[Image.Image], queries: Sequence[str], batch_size: int = 64
) -> list[GRID]:
    """One grid for each image and query, its largest value 255 (all 0 where nothing speaks for the query)."""
    device = next(encoder.model.parameters()).device
    grids: list[GRID] = []
    for start in range(0, len(images), batch_size):
        batch = torch.stack([encoder.transform(image) for image in images[start : start + batch_size]]).to(device)
        texts = encoder.tokenizer(list(queries[start : start + batch_size])).to(device)
        heat = relevance(encoder.model, batch, texts)  # (images, rows, columns)
        top = heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        grids += (255 * heat / top).round().int().tolist()
    return grids


def why_no_maps(encoder: Encoder) -> str:
    """Why no attention maps can be drawn for this model, "" where they can."""
    try:
        vision_attention(encoder.model, -1)
        seen_part(encoder.transform)
    except InputError as error:
        return str(error)
    return ""


@torch.no_grad()
def both_maps(encoder: Encoder, image: Image.Image) -> dict[str, GRID]:
    """A1, A2 and their difference in the last layer, means over heads; {} for attention that has no two maps.

    A1 and A2 go from 0 to 255 on one scale; the difference has its zero at 128.
    """
    device = next(encoder.model.parameters()).device
    maps = layer_maps(encoder.model, encoder.transform(image)[None].to(device))
    if "A2" not in maps:
        return {}
    first, second, difference = (maps[name][0].float().mean(0) for name in ("A1", "A2", "difference"))
    top = 255 / max(first.max(), second.max()).clamp(min=1e-12)
    signed = 128 + 127 * difference / difference.abs().max().clamp(min=1e-12)
    grids = {"A1": first * top, "A2": second * top, "difference": signed}
    return {name: grid.round().int().tolist() for name, grid in grids.items()}


def outline_of(mask: np.ndarray | None, seen: Callable[[Image.Image], Image.Image]) -> GRID | None:
    """A mask (height, width) as the model's crop shows it, 0 or 255, at most OUTLINE pixels a side; None for none."""
    if mask is None:
        return None
    shown = seen(Image.fromarray(mask).convert("RGB")).convert("L")
    shown = shown.resize([min(OUTLINE, side) for side in shown.size], Image.Resampling.NEAREST)
    return (255 * (np.asarray(shown) > 127)).astype(int).tolist()


def keep_attention(
    encoder: Encoder, queries: Sequence[tuple[Path, Mapping[str, np.ndarray | None]]], folder: Path
) -> int:
    """Write attention.jsonl in `folder`, and each image as the model's crop shows it. Returns the number of maps.

    Args:
        queries: for each image its texts, with the mask (height, width) of what each asks for, if there is one.
    """
    seen, seen_mask = seen_part(encoder.transform), seen_part(encoder.transform, nearest=True)
    (folder / "attention").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    images, texts = [], []
    for number, (path, asked) in enumerate(queries):
        image = open_image(path)
        name = f"attention/{number:03d}.png"
        enlarged(seen(image), SIDE).save(folder / name)
        maps = both_maps(encoder, image)
        for query, mask in asked.items():
            rows.append({"image": name, "file": path.name, "query": query, "outline": outline_of(mask, seen_mask)})
            rows[-1] |= {"maps": maps} if maps else {}
            images.append(image)
            texts.append(query)
    grids = heat_maps(encoder, images, texts)
    lines = [json_line({**row, "heat": grid}) for row, grid in zip(rows, grids)]
    write_whole(folder / ATTENTION, "".join(lines))
    return len(rows)


def queries_from_masks(items: Sequence[tuple[Path, str, np.ndarray]]) -> list[tuple[Path, dict[str, np.ndarray]]]:
    """Two queries for each of the first images that hold two kinds of objects, with the masks; `read_masks` items."""
    named: dict[Path, dict[str, np.ndarray]] = {}
    for path, name, mask in items:
        named.setdefault(path, {})[f"a {name}"] = mask
    chosen = [(path, masks) for path, masks in named.items() if len(masks) >= 2][:IMAGES]
    return [(path, dict(list(masks.items())[:2])) for path, masks in chosen]


def localisation(encoder: Encoder, items: Sequence[tuple], folder: Path) -> dict[str, float]:
    """Scores of the maps against masks in percent, `localisation/...`; those of each object go to localisation.json."""
    scores = localise(*encoder, items)  # (objects, 4), NaN where the crop leaves an object out
    inside = ~np.isnan(scores).any(axis=1)
    names = (*SCORES, "area")
    record = {
        "pictures": [path.name for path, _, _ in items],
        "objects": [name for _, name, _ in items],
        "scores": {
            name: [None if np.isnan(v) else round(float(v), 4) for v in column] for name, column in zip(names, scores.T)
        },
    }
    write_json(folder / LOCALISATION, record)
    if not inside.any():
        return {}
    means = {f"localisation/{name}": float(mean) for name, mean in zip(names, scores[inside].mean(axis=0))}
    return means | {"localisation/objects": int(inside.sum())}
