"""Vision towers of open_clip by name, with their weights, for LLaVA.

`vision_tower: open_clip:ViT-B-16@laion2b_s34b_b88k` names one: an architecture of open_clip and a pretrained tag or
file of weights; or `open_clip:hf-hub:ORG/NAME`, `open_clip:local-dir:FOLDER`, which carry their weights.
"""

from typing import Any

import torch
from transformers import BaseImageProcessor

from diffclip.base.backbones import QuickGELU, get_model_config, open_clip
from diffclip.base.errors import InputError
from diffclip.hf import image_processor
from diffclip.hf.open_clip_vision import OpenClipVisionConfig, OpenClipVisionModel, has_tokens, stages
from diffclip.weights import refuse_foreign_code
from mllm.processing import with_mode

PREFIX = "open_clip:"


@torch.no_grad()
def from_open_clip(name: str) -> tuple[OpenClipVisionModel, BaseImageProcessor]:
    """Load the vision half of an open_clip model and its image processor.

    Args:
        name: "open_clip:ARCHITECTURE@PRETRAINED" with a tag or a file, or "open_clip:hf-hub:ORG/NAME" or
            "open_clip:local-dir:FOLDER".

    Raises:
        InputError: open_clip cannot load it, or it is a tower that a saved directory could not give back.
    """
    architecture, _, pretrained = name.removeprefix(PREFIX).partition("@")
    if not pretrained and not architecture.startswith(("hf-hub:", "local-dir:")):
        raise InputError(f"{name}: names no weights; write {PREFIX}{architecture}@TAG or @FILE")
    try:
        config = get_model_config(architecture)
        if config is not None:  # if it is, open_clip says which names it knows
            refuse_foreign_code(config, name)
        model = open_clip.create_model(architecture, pretrained=pretrained or None, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # open_clip raises whatever its loaders do
        raise InputError(f"{name}: open_clip cannot load it ({' '.join(str(error).split())[:300]})") from None
    cfg = open_clip.get_model_preprocess_cfg(model)
    mode = {"shortest": "crop", "squash": "squash"}.get(cfg["resize_mode"])
    if mode is None:
        raise InputError(f"{name}: prepares images by resize_mode {cfg['resize_mode']}, which is not supported")
    side = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    visual = model.visual.float().eval()
    quick_gelu = any(isinstance(module, QuickGELU) for module in visual.modules())  # a tag may have decided it
    vision_cfg = {**config["vision_cfg"], "image_size": side, "timm_model_pretrained": False}
    tower = wrap(visual, config["embed_dim"], vision_cfg, quick_gelu)
    return tower, with_mode(image_processor({"preprocess_cfg": {**cfg, "size": side}}), mode)


@torch.no_grad()
def wrap(visual: Any, embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False) -> OpenClipVisionModel:
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
    config = OpenClipVisionConfig(embed_dim=embed_dim, vision_cfg=vision_cfg, quick_gelu=quick_gelu, **shape)
    tower, again = OpenClipVisionModel(config, visual).eval(), OpenClipVisionModel(config).eval()
    again.load_state_dict(tower.state_dict())
    if not torch.equal(tower(pixels).last_hidden_state, again(pixels).last_hidden_state):
        raise InputError("this open_clip tower is not the one that its configuration describes; it cannot be saved")
    return tower
