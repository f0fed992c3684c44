"""The named models as plain open_clip configs, without importing torch: `MODELS` by name, and what their parts are."""

import copy
from pathlib import Path
from typing import Any

from diffclip.base.commands import closest
from diffclip.base.errors import InputError
from diffclip.base.files import read_json

# What is differential in each variant (section 3 and table 1 of the paper); the baseline has nothing. V2 is not the
# paper's: it has Microsoft's second version of differential attention.
VARIANTS: dict[str, dict[str, Any]] = {
    "CLIP": {"towers": []},
    "DiffCLIP": {"towers": ["vision", "text"], "lambda_init": 0.8, "schedule_base": 0},
    "DiffCLIP-star": {"towers": ["vision", "text"], "lambda_init": "schedule", "schedule_base": 0},
    "DiffCLIP-dagger": {"towers": ["vision"], "lambda_init": 0.8, "schedule_base": 0},
    "DiffCLIP-V2": {"towers": ["vision", "text"], "lambda_init": 0.5, "schedule_base": 0, "version": "v2"},
}
IMAGENET_PREPROCESS: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bilinear",
    "resize_mode": "shortest",
}
SIZES = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


def _named_config(variant: str, size: str) -> dict[str, Any]:
    config = read_json(SIZES[size])
    # timm's epsilon for every variant, so that arms trained here differ in nothing but the attention.
    config["diffclip"] = {"variant": variant, **copy.deepcopy(VARIANTS[variant]), "vision_norm_eps": 1e-6}
    return config


MODELS: dict[str, dict[str, Any]] = {
    f"{variant}-{size}": _named_config(variant, size) for size in SIZES for variant in VARIANTS
}


def named(name: str) -> dict[str, Any]:
    """Return a copy of the config of a name in `MODELS`, or raise InputError that says the nearest one."""
    if name not in MODELS:
        close = closest(name, MODELS)
        hint = f"did you mean {close}?" if close else f"choose one of {', '.join(MODELS)}"
        raise InputError(f"unknown model {name!r}: {hint}")
    return copy.deepcopy(MODELS[name])


def variant_name(towers: list[str], lambda_init: float | str | None, version: str = "v1") -> str:
    """Return the variant's name in `VARIANTS`, or "custom"."""
    for name, options in VARIANTS.items():
        same = options["towers"] == towers and options.get("version", "v1") == version
        if same and (not towers or options["lambda_init"] == lambda_init):
            return name
    return "custom"
