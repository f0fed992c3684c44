"""Where a model looks: its attention maps, and which patches speak for a text (figure 2 of the paper)."""

import runpy
import sys

if __name__ == "__main__":  # `python -m diffclip.attention_maps`: the command, before anything heavy is imported
    runpy.run_module("diffclip.maps", run_name="__main__")
    sys.exit()

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T

from diffclip.attention import Differential
from diffclip.attention.maps import Attention, apply_map, attention_map, both_maps
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError


def vision_attention(model: open_clip.CLIP, layer: int) -> Attention:
    """Return the attention module of one layer (negative ones count from the last) of a model's vision tower.

    InputError if there is no such layer, or no class token that looks at patches (ResNet, CoCa, SigLIP).
    """
    visual = model.visual
    if hasattr(visual, "trunk"):  # timm's, and so ours
        trunk = visual.trunk
        blocks = getattr(trunk, "blocks", None)
        token = getattr(trunk, "global_pool", "") == "token" and getattr(trunk, "num_prefix_tokens", 0) > 0
    else:  # open_clip's
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        token = getattr(visual, "pool_type", "") == "tok" and visual.attn_pool is None
    blocks = list(blocks or ())
    attention = getattr(blocks[-1], "attn", None) if blocks else None
    if not token or not (isinstance(attention, Differential | nn.MultiheadAttention) or _is_timms(attention)):
        kind = type(getattr(visual, "trunk", visual)).__name__
        raise InputError(f"no attention maps for this model: its {kind} is no vision transformer with a class token")
    if not -len(blocks) <= layer < len(blocks):
        raise InputError(f"layer {layer} of {len(blocks)}: there is none")
    return blocks[layer].attn


def _is_timms(attention: nn.Module | None) -> bool:
    """Whether it is timm's plain `Attention`, of which others (with rotary positions, or gates) are no cases."""
    kind = type(attention)
    timms = kind.__name__ == "Attention" and kind.__module__.startswith("timm.")
    return timms and getattr(attention, "gate", None) is None


@contextmanager
def recorded(attention: Attention) -> Iterator[dict[str, Tensor]]:
    """Within, the module writes its map out: {"input": x, "map": ...} of the last call, part of the graph."""
    seen: dict[str, Tensor] = {}

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        seen["input"], seen["map"] = x, attention_map(attention, x)
        out = apply_map(attention, x, seen["map"])
        return (out, None) if isinstance(attention, nn.MultiheadAttention) else out

    attention.forward = forward  # type: ignore[assignment, method-assign] # of this one, for a while
    try:
        yield seen
    finally:
        del attention.forward  # the class's own is found again


@torch.no_grad()
def layer_maps(model: open_clip.CLIP, images: Tensor, layer: int = -1) -> dict[str, Tensor]:
    """Return how much the class token attends to each patch of images (batch, 3, size, size), normalised, in one layer.

    "A1", "A2" and "difference" = A1 - lambda A2, each (batch, maps, rows, columns); "A1" alone for ordinary attention.
    """
    attention, inputs = vision_attention(model, layer), []
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        model.encode_image(images)
    finally:
        hook.remove()
    first, second, lambda_ = both_maps(attention, inputs[0])
    maps = {"A1": first}
    if second is not None and lambda_ is not None:
        maps |= {"A2": second, "difference": first - lambda_ * second}
    return {name: patch_grid(map_[:, :, 0], model) for name, map_ in maps.items()}


def relevance(model: open_clip.CLIP, images: Tensor, texts: Tensor, layer: int = -1) -> Tensor:
    """Return how much each patch speaks for a text, by gradient (Chefer et al. 2021, arXiv 2103.15679, equation 5).

    The map A that multiplies the values in one layer, times the gradient of the cosine similarity of image and
    text by it, negative products left out, averaged over heads; of this, the class token's row. For differential
    attention A is the difference, signed, and so a negative weight with a negative gradient counts for the text.

    Images (batch, 3, size, size), normalised, and token ids (batch, context_length), one text for each image, give
    (batch, rows, columns), float32, not negative.
    """
    attention = vision_attention(model, layer)
    with torch.no_grad():
        queries = model.encode_text(texts, normalize=True)
    with torch.enable_grad(), recorded(attention) as seen:
        similarity = (model.encode_image(images, normalize=True) * queries).sum()
        (gradient,) = torch.autograd.grad(similarity, seen["map"])
    relevant = (seen["map"] * gradient).clamp(min=0).mean(dim=1)  # (batch, tokens, tokens)
    return patch_grid(relevant[:, 0], model).float().detach()


def patch_grid(row: Tensor, model: open_clip.CLIP) -> Tensor:
    """Turn (..., 1 + patches), a class token's row, into (..., rows, columns)."""
    visual = model.visual
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
