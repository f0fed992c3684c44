"""What evaluate leaves for the report about attention: heat maps for queries, and their scores against masks.

A map is the gradient relevance of `diffclip.attention_maps` in the dual encoder's vision tower, kept as a grid of
numbers from 0 to 255, so that the report can draw it without the model.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from diffclip.attention_maps import enlarged, relevance, seen_part, vision_attention
from diffclip.base.errors import InputError
from diffclip.base.files import json_line, write_json, write_whole
from diffclip.base.images import open_image
from diffclip.base.schema import ATTENTION, LOCALISATION
from diffclip.benchmarks.mask_scores import SCORES, localise

IMAGES = 8  # of the attention figures, two queries each
SIDE = 224  # pixels of the stored images
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


def keep_attention(encoder: Encoder, queries: Sequence[tuple[Path, list[str]]], folder: Path) -> int:
    """Write attention.jsonl in `folder`, and each image as the model's crop shows it. Returns the number of maps."""
    seen = seen_part(encoder.transform)
    (folder / "attention").mkdir(parents=True, exist_ok=True)
    rows, images, texts = [], [], []
    for number, (path, asked) in enumerate(queries):
        image = open_image(path)
        name = f"attention/{number:03d}.png"
        enlarged(seen(image), SIDE).save(folder / name)
        for query in asked:
            rows.append({"image": name, "file": path.name, "query": query})
            images.append(image)
            texts.append(query)
    grids = heat_maps(encoder, images, texts)
    lines = [json_line({**row, "heat": grid}) for row, grid in zip(rows, grids)]
    write_whole(folder / ATTENTION, "".join(lines))
    return len(rows)


def queries_from_masks(items: Sequence[tuple[Path, str, Any]]) -> list[tuple[Path, list[str]]]:
    """Two queries for each of the first images that hold two kinds of objects; items are those of `read_masks`."""
    named: dict[Path, list[str]] = {}
    for path, name, _ in items:
        named.setdefault(path, []).append(f"a {name}")
    return [(path, names[:2]) for path, names in named.items() if len(names) >= 2][:IMAGES]


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
