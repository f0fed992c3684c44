"""Vision towers of open_clip by name, with their weights, for LLaVA.

`vision_tower: open_clip:ViT-B-16@laion2b_s34b_b88k` names one, and so does whatever else `diffclip.sources` knows.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from diffclip.base.errors import InputError
from diffclip.checkpoints import load
from diffclip.hf import DiffCLIPVisionModel, image_processor, vision_config
from diffclip.hf.open_clip_vision import OPTIONS, OpenClipVisionConfig, OpenClipVisionModel, has_tokens, stages
from diffclip.models import papers
from mllm.processing import with_mode


@torch.no_grad()
def load_tower(name: str | Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the vision half of any dual encoder that `diffclip.load` reads, and its image processor.

    A tower of the paper's make is a `DiffCLIPVisionModel`, any other an `OpenClipVisionModel`.

    InputError for what that refuses, and for a tower that a saved directory could not give back.
    """
    model, _, _ = load(name)
    config = model.model_config
    if papers(config):
        ours = DiffCLIPVisionModel(vision_config(config))
        ours.trunk.load_state_dict(model.visual.trunk.state_dict())
        return ours.eval(), image_processor(config)
    model_cfg, cfg = config["model_cfg"], config["preprocess_cfg"]
    mode = {"shortest": "crop", "squash": "squash"}.get(cfg.get("resize_mode", "shortest"))
    if mode is None or not isinstance(cfg["size"], int):
        raise InputError(
            f"{name}: prepares images by resize_mode {cfg['resize_mode']} to size {cfg['size']}; only squares that are "
            "cropped or squashed are supported"
        )
    options = {key: config["diffclip"][key] for key in OPTIONS if key in config["diffclip"]}
    tower = wrap(
        model.visual.float().eval(),
        model_cfg["embed_dim"],
        {**model_cfg["vision_cfg"], "image_size": cfg["size"]},
        model_cfg.get("quick_gelu", False),
        options,
    )
    return tower, with_mode(image_processor(config), mode)


@torch.no_grad()
def wrap(
    visual: Any,
    embed_dim: int,
    vision_cfg: dict[str, Any],
    quick_gelu: bool = False,
    options: dict[str, Any] | None = None,
) -> OpenClipVisionModel:
    """Make a transformers model of an open_clip tower, having proved that its configuration gives the same tower back.

    Raises:
        InputError: it does not.
    """
    side = vision_cfg["image_size"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    if has_tokens(visual):
        trunk = getattr(visual, "trunk", visual)
        states = visual.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"]
        count = len(trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks)
    else:
        states = stages(visual, pixels, None, final=True)
        count = len(states)
    _, width, rows, _ = states[-1].shape
    shape = {"hidden_size": width, "image_size": side, "patch_size": side // rows, "num_hidden_layers": count}
    config = OpenClipVisionConfig(
        embed_dim=embed_dim, vision_cfg=vision_cfg, quick_gelu=quick_gelu, options=options, **shape
    )
    tower, again = OpenClipVisionModel(config, visual).eval(), OpenClipVisionModel(config).eval()
    again.load_state_dict(tower.state_dict())
    if not torch.equal(tower(pixels).last_hidden_state, again(pixels).last_hidden_state):
        raise InputError("this open_clip tower is not the one that its configuration describes; it cannot be saved")
    return tower
