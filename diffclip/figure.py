"""Figure 2 of the paper for any images, texts and models: what speaks for the text, model beside model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from diffclip import checkpoints
from diffclip.attention_maps import enlarged, relevance, seen_part, upsample
from diffclip.base.errors import InputError
from diffclip.base.images import open_image
from diffclip.base.overlay import overlay
from diffclip.benchmarks.comparison import model_names


def figure(images: Sequence[str | Path], queries: Sequence[str], models: Sequence[str | Path], out: str | Path) -> None:
    """Draw one row per image and query, one column per model, and write it to `out` (PNG, PDF or SVG).

    InputError for an image or model that cannot be read, or counts of images and queries that do not match.
    """
    if len(queries) not in (1, len(images)):
        raise InputError(f"{len(queries)} queries for {len(images)} images: give one for all, or one for each")
    titles = model_names([str(name) for name in models])
    texts = list(queries) * (len(images) if len(queries) == 1 else 1)
    opened = [open_image(path) for path in images]
    canvas = Figure(figsize=(2.2 * (1 + len(models)), 2.35 * len(images)), layout="constrained")
    axes = canvas.subplots(len(images), 1 + len(models), squeeze=False)
    for column, name in enumerate(models, 1):
        model, transform, tokenizer = checkpoints.load(name)
        try:
            heats = relevance(model, torch.stack([transform(image) for image in opened]), tokenizer(texts))
            seen = seen_part(transform)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        for row, (image, heat) in enumerate(zip(opened, heats)):
            pixels = np.asarray(enlarged(seen(image)))
            axes[row, column].imshow(overlay(pixels, upsample(heat[None], pixels.shape[:2])[0].numpy()))
            axes[row, 0].imshow(pixels)
        axes[0, column].set_title(titles[column - 1], fontsize=9)
    for row, text in enumerate(texts):
        axes[row, 0].set_title(f'"{text}"', fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    canvas.savefig(out, dpi=200)
