"""The vision tower of the paper, as timm builds it: timm suffices, for copies of this that are saved with models."""

from functools import partial
from typing import Any

from torch import nn

from diffclip.base.timm_vit import Block, TimmVisionTransformer

TRUNK_OPTIONS = ("class_token", "global_pool", "act_layer")  # of towers of another make, beside open_clip's keys


def vision_trunk(
    vision_cfg: dict[str, Any], norm_eps: float, block: type[Block] = Block, **options: Any
) -> TimmVisionTransformer:
    """Return a timm vision transformer with a class token, pooled at that token after the final norm.

    `vision_cfg` has open_clip's keys; `norm_eps` of its layer norms is 1e-6 in timm and SLIP, 1e-5 in the official
    DiffCLIP. `options` are timm's own (`TRUNK_OPTIONS`).
    """
    return TimmVisionTransformer(
        img_size=vision_cfg["image_size"],
        patch_size=vision_cfg["patch_size"],
        embed_dim=vision_cfg["width"],
        depth=vision_cfg["layers"],
        num_heads=vision_cfg["width"] // vision_cfg["head_width"],
        mlp_ratio=vision_cfg["mlp_ratio"],
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        num_classes=0,
        block_fn=block,
        **options,
    )
