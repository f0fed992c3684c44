"""Our dual encoders in transformers' files: configurations, weights under their names, processors."""

from typing import Any

from transformers.image_utils import PILImageResampling

from diffclip.hf.images import DiffCLIPImageProcessor
from diffclip.hf.vision import DiffCLIPVisionConfig
from diffclip.warm_start import layer_lambda_inits


def vision_config(model_config: dict[str, Any]) -> DiffCLIPVisionConfig:
    """Return the vision tower's part of a model config of `diffclip.models`."""
    vision_cfg, options = model_config["model_cfg"]["vision_cfg"], model_config["diffclip"]
    layers, lambda_init = vision_cfg["layers"], None
    if "vision" in options["towers"]:
        lambda_init = layer_lambda_inits(options["lambda_init"], options["schedule_base"], layers)
    return DiffCLIPVisionConfig(
        hidden_size=vision_cfg["width"],
        num_hidden_layers=layers,
        num_attention_heads=vision_cfg["width"] // vision_cfg["head_width"],
        mlp_ratio=vision_cfg["mlp_ratio"],
        image_size=vision_cfg["image_size"],
        patch_size=vision_cfg["patch_size"],
        layer_norm_eps=options["vision_norm_eps"],
        lambda_init=lambda_init,
        attention_version=options.get("version", 1),
    )


def image_processor(model_config: dict[str, Any]) -> DiffCLIPImageProcessor:
    """Return the processor that does what `transforms(model_config, train=False)` does."""
    cfg = model_config["preprocess_cfg"]
    return DiffCLIPImageProcessor(
        size={"shortest_edge": cfg["size"]},
        crop_size={"height": cfg["size"], "width": cfg["size"]},
        resample=getattr(PILImageResampling, cfg["interpolation"].upper()),
        image_mean=cfg["mean"],
        image_std=cfg["std"],
    )
