"""Figure 2 of the paper for any images, texts and models: what speaks for the text, model beside model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from diffclip.attention_maps import enlarged, relevance, seen_part, upsample
from diffclip.base.errors import InputError
from diffclip.base.files import check_output
from diffclip.base.images import open_image
from diffclip.base.overlay import overlay
from diffclip.benchmarks.comparison import model_names
from diffclip.mapped_models import load_with_maps


def figure(images: Sequence[str | Path], queries: Sequence[str], models: Sequence[str | Path], out: str | Path) -> None:
    """Draw one row per image and query, one column per model, and write it to `out` (PNG, PDF or SVG).

    One image with several queries has a row for each. InputError, before the work, for an `out` that cannot be
    written, an image or model that cannot be read, a model without maps, or counts that do not match.
    """
    check_output(out, (".png", ".pdf", ".svg"))
    if 1 not in (len(images), len(queries)) and len(queries) != len(images):
        raise InputError(
            f"{len(queries)} queries for {len(images)} images: give one for all, one for each, or one image for all"
        )
    rows = max(len(images), len(queries))
    texts = list(queries) * (rows if len(queries) == 1 else 1)
    opened = [open_image(path) for path in images] * (rows if len(images) == 1 else 1)
    titles = model_names([str(name) for name in models])
    canvas = Figure(figsize=(2.2 * (1 + len(models)), 2.35 * rows), layout="constrained")
    axes = canvas.subplots(rows, 1 + len(models), squeeze=False)
    for column, (model, transform, tokenizer) in enumerate(load_with_maps(models), 1):
        heats = relevance(model, torch.stack([transform(image) for image in opened]), tokenizer(texts))
        seen = seen_part(transform)
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
