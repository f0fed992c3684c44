"""Which open_clip architecture a model has: found out for models that open_clip made, and changed in image size."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffclip import variants
from diffclip.base.backbones import (
    OpenClipVisionTransformer,
    QuickGELU,
    get_model_config,
    open_clip,
    resize_pos_embed,
    resize_text_pos_embed,
)
from diffclip.base.errors import InputError
from diffclip.models import DualEncoder, build
from diffclip.warm_start import attention_of


def unwrapped(model: nn.Module) -> Any:
    """The dual encoder inside torch.compile's, DistributedDataParallel's and averaging wrappers."""
    while (inner := model._modules.get("_orig_mod", model._modules.get("module"))) is not None:
        model = inner
    return model


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A state dict on the CPU, contiguous, without the names that wrapped or compiled parts put in between."""
    state = {}
    for name, tensor in model.state_dict().items():
        parts = [part for part in name.split(".") if part not in ("_orig_mod", "module")]
        state[".".join(parts)] = tensor.detach().cpu().contiguous()
    return state


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a dual encoder: its own, or, of a model that open_clip made, one that is proven to give it back.

    Raises:
        InputError: no architecture of open_clip's has these weights' names and shapes and computes the same.
    """
    if config := getattr(model, "model_config", None):
        return config
    name = f"this {type(model).__name__}"
    if not isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP | open_clip.CoCa):
        raise InputError(f"cannot save {name}: it is no dual encoder of diffclip.load, diffclip.build or open_clip's")
    state = plain_state(model)
    shapes = {key: tensor.shape for key, tensor in state.items()}
    for config in _candidates(model):
        try:
            with torch.device("meta"):
                same = {key: tensor.shape for key, tensor in build(config).state_dict().items()} == shapes
            if same and _computes_alike(model, state, config):
                return config
        except InputError:  # of another architecture's
            continue
    raise InputError(
        f"cannot save {name}: it is no architecture that open_clip.list_models() names, whole and unchanged but for "
        "diffclip.differentiate; register its config with open_clip.add_model_config first"
    )


def _candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Configs of open_clip's architectures that a model may have, with what a caller may have set differently."""
    visual, text = model.visual, getattr(model, "text", model)
    trunk = getattr(visual, "trunk", None)
    timm_name = (getattr(trunk, "pretrained_cfg", None) or {}).get("architecture")
    attention = attention_of(model)
    for name in open_clip.list_models():
        cfg = get_model_config(name)
        vision_cfg, text_cfg = cfg["vision_cfg"], cfg["text_cfg"]
        if str(vision_cfg.get("timm_model_name", "")).partition(".")[0] != (timm_name or ""):
            continue
        if isinstance(visual, OpenClipVisionTransformer):
            width = vision_cfg.get("width", 768)  # open_clip's defaults stand in no file
            patch = (vision_cfg.get("patch_size", 16),) * 2
            if visual.conv1.out_channels != width or visual.conv1.kernel_size != patch:
                continue
        size = visual.image_size
        vision_cfg["image_size"] = size[0] if isinstance(size, tuple) and size[0] == size[1] else size
        if (length := getattr(text, "context_length", None)) and "multimodal_cfg" not in cfg:
            text_cfg["context_length"] = length
        if cfg.get("multimodal_cfg") is None or hasattr(model, "text_decoder"):
            cfg["quick_gelu"] = any(isinstance(module, QuickGELU) for module in model.modules())
            cfg["custom_text"] = not isinstance(model, open_clip.CLIP)
            cfg["nonscalar_logit_scale"] = model.logit_scale.ndim > 0
            if model.logit_bias is not None:
                cfg.setdefault("init_logit_bias", -10)
            yield {
                "model_cfg": cfg,
                "preprocess_cfg": {**preprocess_cfg_of(model), "size": vision_cfg["image_size"]},
                "diffclip": {"variant": variants.variant_name(attention), "attention": attention},
            }


def preprocess_cfg_of(model: Any) -> dict[str, Any]:
    """How a model of open_clip's wants its images: its `preprocess_cfg`, with one number for a square size."""
    cfg = json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model)))  # tuples become lists, as in files
    size = cfg["size"]
    return {**cfg, "size": size[0] if isinstance(size, list) and size[0] == size[1] else size}


@torch.no_grad()
def _computes_alike(model: Any, state: dict[str, Tensor], config: dict[str, Any]) -> bool:
    """Whether the config with these weights gives the embeddings of the model, in float32."""
    again = build(config)
    again.load_state_dict(state)
    size = config["model_cfg"]["vision_cfg"]["image_size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, height, width, generator=generator)
    length = config["model_cfg"]["text_cfg"].get("context_length", 77)
    text = torch.randint(1, 50, (1, length), generator=generator)
    theirs = copy.deepcopy(model).cpu().float().eval()
    return all(
        torch.allclose(getattr(again.eval(), encode)(given), getattr(theirs, encode)(given), rtol=1e-4, atol=1e-5)
        for encode, given in (("encode_image", pixels), ("encode_text", text))
    )


def with_image_size(model: DualEncoder, size: int) -> DualEncoder:
    """Return the model for images of another size: its position table resampled, its config in step.

    Raises:
        InputError: a tower that cannot take that size.
    """
    patches = getattr(getattr(model.visual, "trunk", model.visual), "patch_embed", model.visual)
    patch = getattr(patches, "patch_size", 1)
    if any(size % side for side in (patch if isinstance(patch, tuple) else (patch,))):
        raise InputError(f"images of {size} pixels are no whole number of patches of {patch} pixels")
    config = copy.deepcopy(model.model_config)
    config["model_cfg"]["vision_cfg"]["image_size"] = config["preprocess_cfg"]["size"] = size
    resized = build(config)
    state = model.state_dict()
    if hasattr(model.visual, "trunk"):
        source = copy.deepcopy(model.visual)
        try:
            source.set_input_size(size)
        except Exception as error:  # timm raises whatever its towers do
            raise InputError(f"this vision tower takes no images of {size} pixels: {error}") from None
        state |= {f"visual.{key}": tensor for key, tensor in source.state_dict().items()}
    else:
        resize_pos_embed(state, resized)
        resize_text_pos_embed(state, resized)
    resized.load_state_dict(state)
    return resized.train(model.training)
