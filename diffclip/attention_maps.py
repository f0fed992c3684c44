"""Where a model looks: its attention maps, and which patches speak for a text (figure 2 of the paper).

python -m diffclip.attention_maps mug.jpg street.jpg --query "a mug" "a bicycle" \
    --models runs/clip/pretrain runs/diffclip/pretrain --out fig.png
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffclip.attention import DifferentialAttention, attention_scores, softmax_maps
from diffclip.attention_v2 import DifferentialAttentionV2
from diffclip.errors import InputError, exit_on_input_error
from diffclip.pictures import open_picture

if TYPE_CHECKING:
    import numpy as np


def both_maps(
    attention: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (A1, A2, lambda) of an attention module for its input x (batch, tokens, dim).

    Args:
        attention: differential attention of either version, or timm's `Attention`.

    Returns:
        A1, A2: softmax maps (batch, maps, tokens, tokens), with heads / 2 maps in version 1 and one per head
        otherwise; lambda broadcasts to them. A2 and lambda are None for ordinary attention.
    """
    if isinstance(attention, DifferentialAttention):
        q, k, _ = attention.project(x)
        first, second = softmax_maps(q, k, attn_mask, is_causal)
        return first, second, attention.compute_lambda().to(q.dtype)
    if isinstance(attention, DifferentialAttentionV2):
        q, k, _ = attention.project(x)
        maps = attention.softmax_maps(q, k, attn_mask, is_causal)
        return maps[:, 0::2], maps[:, 1::2], attention.compute_lambda(x)
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = attention_scores(attention.q_norm(q), attention.k_norm(k), attn_mask, is_causal)
    return scores.softmax(dim=-1), None, None


def attention_map(attention: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return the map that multiplies the values in this module, given its input x (batch, tokens, dim).

    Returns:
        (batch, maps, tokens, tokens): signed, with rows summing to 1 - lambda, for differential attention.
    """
    first, second, lambda_ = both_maps(attention, x, attn_mask, is_causal)
    return first if second is None else first - lambda_ * second


def apply_map(attention: nn.Module, x: Tensor, map_: Tensor) -> Tensor:
    """Return what the module makes of x (batch, tokens, dim) with `map_` in the place of its own map."""
    if isinstance(attention, DifferentialAttention):
        mixed = attention.diff_norm(map_ @ attention.project(x)[2])
    elif isinstance(attention, DifferentialAttentionV2):
        mixed = map_ @ attention.project(x)[2]
    else:
        mixed = map_ @ attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)[2]
    mixed = mixed.transpose(1, 2).flatten(2)
    return attention.proj(mixed) if hasattr(attention, "proj") else attention.out_proj(mixed)


def vision_attention(model: nn.Module, layer: int) -> nn.Module:
    """Return the attention module of one layer (negative ones count from the last) of a model's vision tower."""
    try:
        return model.visual.trunk.blocks[layer].attn
    except AttributeError:
        raise InputError(
            f"{type(model.visual).__name__} is not a timm vision transformer: maps are drawn for models of "
            "diffclip.build and diffclip.load, and open_clip models with a timm tower"
        ) from None
    except IndexError:
        raise InputError(f"layer {layer} of {len(model.visual.trunk.blocks)}: there is none") from None


@contextmanager
def recorded(attention: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within, the module writes its map out: {"input": x, "map": ...} of the last call, part of the graph."""
    seen: dict[str, Tensor] = {}

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen["input"], seen["map"] = x, attention_map(attention, x)
        return apply_map(attention, x, seen["map"])

    attention.forward = forward
    try:
        yield seen
    finally:
        del attention.forward  # the class's own is found again


@torch.no_grad()
def layer_maps(model: nn.Module, images: Tensor, layer: int = -1) -> dict[str, Tensor]:
    """Return how much the class token attends to each patch, in one layer of the vision tower.

    Args:
        images: (batch, 3, size, size), normalised.

    Returns:
        "A1", "A2" and "difference" = A1 - lambda A2, each (batch, maps, rows, columns); "A1" alone for
        ordinary attention.
    """
    attention, inputs = vision_attention(model, layer), []
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        model.encode_image(images)
    finally:
        hook.remove()
    first, second, lambda_ = both_maps(attention, inputs[0])
    maps = {"A1": first}
    if second is not None:
        maps |= {"A2": second, "difference": first - lambda_ * second}
    return {name: patch_grid(map_[:, :, 0], model) for name, map_ in maps.items()}


def relevance(model: nn.Module, images: Tensor, texts: Tensor, layer: int = -1) -> Tensor:
    """Return how much each patch speaks for a text, by gradient (Chefer et al. 2021, arXiv 2103.15679, equation 5).

    The map A that multiplies the values in one layer, times the gradient of the cosine similarity of picture and
    text by it, negative products left out, averaged over heads; of this, the class token's row. For differential
    attention A is the difference, signed, and so a negative weight with a negative gradient counts for the text.

    Args:
        images: (batch, 3, size, size), normalised.
        texts: (batch, context_length) token ids, one text for each image.

    Returns:
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


def patch_grid(row: Tensor, model: nn.Module) -> Tensor:
    """Turn (..., 1 + patches), a class token's row, into (..., rows, columns)."""
    rows, columns = model.visual.trunk.patch_embed.grid_size
    return row[..., -rows * columns :].unflatten(-1, (rows, columns))


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps (batch, rows, columns) bilinearly at size (height, width), as the overlays and scores see them."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


# ---------------------------------------------------------------- the figure


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return the picture (height, width, 3) uint8, darkened where heat (height, width) is low against its maximum."""
    from matplotlib import colormaps

    share = (heat / max(heat.max(), 1e-12))[:, :, None]
    colour = 255 * colormaps["inferno"](share[:, :, 0])[:, :, :3]
    return ((1 - 0.65 * share) * (0.55 * picture + 60) + 0.65 * share * colour).clip(0, 255).astype("uint8")


def figure(images: Sequence[str | Path], queries: Sequence[str], models: Sequence[str | Path], out: str | Path) -> None:
    """Draw one row per image and query, one column per model, and write it to `out` (PNG, PDF or SVG).

    Raises:
        InputError: for an image or model that cannot be read, or counts of images and queries that do not match.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from torchvision import transforms as T

    from diffclip import checkpoints

    if len(queries) not in (1, len(images)):
        raise InputError(f"{len(queries)} queries for {len(images)} images: give one for all, or one for each")
    rows = list(zip(images, list(queries) * (len(images) if len(queries) == 1 else 1)))
    pictures = [open_picture(path, str(path)) for path, _ in rows]
    canvas = Figure(figsize=(2.2 * (1 + len(models)), 2.35 * len(rows)), layout="constrained")
    axes = canvas.subplots(len(rows), 1 + len(models), squeeze=False)
    for column, name in enumerate(models, 1):
        model, transform, tokenizer = checkpoints.load(name)
        size = model.model_config["preprocess_cfg"]["size"]
        heats = relevance(model, torch.stack([transform(p) for p in pictures]), tokenizer([query for _, query in rows]))
        seen = T.Compose([T.Resize(size), T.CenterCrop(size), T.Resize(max(size, 224), T.InterpolationMode.NEAREST)])
        for row, (picture, heat) in enumerate(zip(pictures, heats)):
            shown = np.asarray(seen(picture))
            axes[row, column].imshow(overlay(shown, upsample(heat[None], shown.shape[:2])[0].numpy()))
            axes[row, 0].imshow(shown)
        axes[0, column].set_title(model_title(name, model), fontsize=9)
    for row, (_, query) in enumerate(rows):
        axes[row, 0].set_title(f'"{query}"', fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    canvas.savefig(out, dpi=200)


def model_title(name: str | Path, model: nn.Module) -> str:
    """Return the variant, and the directory's name where that is not the variant's."""
    variant = model.model_config["diffclip"]["variant"]
    return variant if variant in str(name) else f"{variant}\n{Path(name).name}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="diffclip.attention_maps"
    )
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--query", nargs="+", required=True, help="one text for all pictures, or one for each")
    parser.add_argument("--models", nargs="+", required=True, help="run directories, checkpoints or Hub ids")
    parser.add_argument("--out", required=True, help="PNG, PDF or SVG file to write")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        figure(args.images, args.query, args.models, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
