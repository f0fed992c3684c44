"""Where a model looks: its attention maps, and which patches speak for a text (figure 2 of the paper)."""

import runpy
import sys

if __name__ == "__main__":  # `python -m diffclip.attention_maps`: the command, before anything heavy is imported
    runpy.run_module("diffclip.maps", run_name="__main__")
    sys.exit()

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T

from diffclip.attention import Differential
from diffclip.attention.maps import apply_map, attention_map, both_maps  # noqa: F401 - for those who look here
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.written_maps import can_be_written, written


class Readout(NamedTuple):
    """An attention module of a vision tower, and which of its queries lead to the image's embedding."""

    attention: nn.Module
    rows: slice


def readouts(model: open_clip.CLIP) -> list[Readout]:
    """Return a vision tower's attention modules in their order, a pooling head with attention as the last.

    The embedding is read from the class token's row where that is what the tower gives; from the query of the pooling
    head, if there is one (SigLIP, CoCa), and from all patches below it; from all patches where they are averaged.

    InputError for towers that are no vision transformers (ResNet, ConvNeXt, Swin), or whose attention tells no map.
    """
    visual: Any = model.visual
    name = type(getattr(visual, "trunk", visual)).__name__
    parts = _timm_parts(visual.trunk) if hasattr(visual, "trunk") else _open_clip_parts(visual)
    if parts is None:
        raise InputError(f"no attention maps for this model: its {name} is no vision transformer with known pooling")
    blocks, rows, head = parts
    found = [Readout(block.get_submodule("attn"), rows) for block in blocks]
    found += [head] if head else []
    if others := {type(one.attention).__name__ for one in found if not can_be_written(one.attention)}:
        kinds = ", ".join(sorted(others))
        raise InputError(f"no attention maps for this model: the attention of its {name} ({kinds}) tells none")
    return found


Parts = tuple[list[nn.Module], slice, Readout | None]  # blocks, their rows, and the pooling head


def _timm_parts(trunk: Any) -> Parts | None:
    """The parts of timm's vision transformers, and so of ours."""
    pool, patches = getattr(trunk, "global_pool", None), getattr(trunk, "patch_embed", None)
    blocks = list(getattr(trunk, "blocks", None) or ())
    if not blocks or not hasattr(blocks[-1], "attn") or getattr(patches, "grid_size", None) is None:
        return None
    rows = slice(0 if getattr(trunk, "pool_include_prefix", False) else trunk.num_prefix_tokens, None)
    if pool == "token":
        return blocks, slice(0, 1), None
    if pool == "map":
        return blocks, rows, Readout(trunk.attn_pool, slice(0, 1) if trunk.attn_pool.pool == "token" else slice(None))
    return (blocks, rows, None) if pool in ("avg", "avgmax", "max") else None


def _open_clip_parts(visual: Any) -> Parts | None:
    """The parts of open_clip's own vision transformers; its ResNets have none."""
    blocks = list(getattr(getattr(visual, "transformer", None), "resblocks", None) or ())
    if not blocks:
        return None
    rows = {"tok": slice(0, 1), "avg": slice(1, None)}.get(visual.pool_type)
    if visual.attn_pool is None:
        return None if rows is None else (blocks, rows, None)
    if rows is None or visual.attn_pool_contrastive is not None:
        return None
    return blocks, slice(None), Readout(visual.attn_pool.attn, rows)  # CoCa's; its other queries are for captions


def readout(model: open_clip.CLIP, layer: int) -> Readout:
    """Return one of `readouts`, negative numbers from the last; InputError if there is no such layer."""
    found = readouts(model)
    if not -len(found) <= layer < len(found):
        raise InputError(f"layer {layer} of {len(found)}: there is none")
    return found[layer]


def vision_attention(model: open_clip.CLIP, layer: int) -> nn.Module:
    """Return the attention module of one layer, see `readouts`."""
    return readout(model, layer).attention


@contextmanager
def recorded(attention: nn.Module) -> Iterator[dict[str, Any]]:
    """Within, the module writes its map out: {"input": x, "map": ...} of the last call, part of the graph."""
    seen: dict[str, Any] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        del attention.forward  # the class's own is found again, which `written` may call
        try:
            seen["input"] = args[0]
            seen["map"], out = written(attention, None, *args, **kwargs)
        finally:
            attention.forward = forward
        return out

    attention.forward = forward  # of this one, for a while
    try:
        yield seen
    finally:
        del attention.forward


@torch.no_grad()
def layer_maps(model: open_clip.CLIP, images: Tensor, layer: int = -1) -> dict[str, Tensor]:
    """Return how much an image's embedding attends to each patch of images (batch, 3, size, size), normalised.

    "A1", "A2" and "difference" = A1 - lambda A2, each (batch, maps, rows, columns); "A1" alone for ordinary attention
    and for dex. Of layers and rows see `readouts`; several rows are averaged.
    """
    attention, rows = readout(model, layer)
    with recorded(attention) as seen:
        model.encode_image(images)
    maps = {"A1": seen["map"]}
    if isinstance(attention, Differential):
        first, second, _ = attention.maps(seen["input"])
        if second is not None:
            maps = {"A1": first, "A2": second, "difference": seen["map"]}
    return {name: patch_grid(map_[:, :, rows].mean(2), model) for name, map_ in maps.items()}


def relevance(model: open_clip.CLIP, images: Tensor, texts: Tensor, layer: int = -1) -> Tensor:
    """Return how much each patch speaks for a text, by gradient (Chefer et al. 2021, arXiv 2103.15679, equation 5).

    The map A that multiplies the values in one layer, times the gradient of the cosine similarity of image and
    text by it, negative products left out, averaged over heads; of this, the rows of `readouts`, averaged: the class
    token's, a pooling head's query, or all patches, through which the others speak. (What a patch says of itself, past
    the attention, is the same for all in this rule, and so left out.) For differential attention A is the difference,
    signed, and so a negative weight with a negative gradient counts for the text.

    Images (batch, 3, size, size), normalised, and token ids (batch, context_length), one text for each image, give
    (batch, rows, columns), float32, not negative.
    """
    attention, rows = readout(model, layer)
    with torch.no_grad():
        queries = model.encode_text(texts, normalize=True)
    with torch.enable_grad(), recorded(attention) as seen:
        similarity = (model.encode_image(images, normalize=True) * queries).sum()
        (gradient,) = torch.autograd.grad(similarity, seen["map"])
    relevant = (seen["map"] * gradient).clamp(min=0).mean(dim=1)  # (batch, queries, keys)
    return patch_grid(relevant[:, rows].mean(1), model).float().detach()


def patch_grid(row: Tensor, model: open_clip.CLIP) -> Tensor:
    """Turn (..., others + patches), what one query gives to all tokens, into (..., rows, columns)."""
    visual: Any = model.visual
    rows, columns = visual.trunk.patch_embed.grid_size if hasattr(visual, "trunk") else visual.grid_size
    return row[..., -rows * columns :].unflatten(-1, (rows, columns))


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (batch, rows, columns) bilinearly at size (height, width), as the overlays and scores see them."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def seen_part(transform: Any, nearest: bool = False) -> Callable[[Image.Image], Image.Image]:
    """Return the part of a model's transform that resizes and crops: PIL image -> the PIL image that the model sees.

    `transform` is from `diffclip.load`: a `Compose` with ToTensor in it, or a `diffclip.hf_clip.ImageTransform`;
    InputError for others. `nearest`: take the nearest pixel when resizing, for masks.
    """
    if hasattr(transform, "seen"):
        return transform.seen(nearest)
    steps: list[Any] = []
    for step in getattr(transform, "transforms", ()):
        if isinstance(step, T.ToTensor | T.PILToTensor):
            return T.Compose(steps)
        if nearest and hasattr(step, "interpolation"):
            step = copy.copy(step)
            step.interpolation = T.InterpolationMode.NEAREST
        steps.append(step)
    raise InputError("no attention maps for this model: its transform does not tell how it resizes and crops")


def enlarged(image: Image.Image, side: int = 224) -> Image.Image:
    """Return a small image (a drawing for a tiny model) enlarged by a whole factor, its pixels as squares."""
    factor = max(1, round(side / min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
