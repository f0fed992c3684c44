"""The named models as plain open_clip configs, without importing torch: `MODELS` by name, and what their parts are."""

import copy
import math
from pathlib import Path
from typing import Any

from diffclip.base.commands import closest
from diffclip.base.errors import InputError
from diffclip.base.files import read_json

TOWERS = ("vision", "text")
PARTS = (*TOWERS, "logit_scale", "new")  # of what learns; "new" is what differential attention adds


def attention(kind: str, lambda_init: float | str | list[float], schedule_base: int = 0) -> dict[str, Any]:
    """How a tower is differential, as model configs hold it; `lambda_init` may have one value per layer."""
    return {"kind": kind, "lambda_init": lambda_init, "schedule_base": schedule_base}


# What is differential in each variant (section 3 and table 1 of the paper); the baseline has nothing. V2 is not the
# paper's: it has Microsoft's second version of differential attention.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "CLIP": {},
    "DiffCLIP": {tower: attention("v1", 0.8) for tower in TOWERS},
    "DiffCLIP-star": {tower: attention("v1", "schedule") for tower in TOWERS},
    "DiffCLIP-dagger": {"vision": attention("v1", 0.8)},
    "DiffCLIP-V2": {tower: attention("v2", 0.5) for tower in TOWERS},
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
    config["diffclip"] = {"variant": variant, "attention": copy.deepcopy(VARIANTS[variant]), "vision_norm_eps": 1e-6}
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


def variant_name(towers: dict[str, dict[str, Any]]) -> str:
    """Return the name in `VARIANTS` of what is differential in each tower, or "custom"."""

    def decisive(of: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, Any]]:
        return {tower: (how["kind"], how["lambda_init"]) for tower, how in of.items()}

    return next((name for name, of in VARIANTS.items() if decisive(of) == decisive(towers)), "custom")


def lambda_init_of(text: str) -> float | str | None:
    """What a text says of lambda_init: "schedule", or a finite number; None if it is neither."""
    if text == "schedule":
        return text
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def current(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a model config in today's form: earlier ones had one kind of attention for all their towers."""
    config = copy.deepcopy(config)
    options = config.get("diffclip")
    if isinstance(options, dict) and "towers" in options:
        towers, version = options.pop("towers"), options.pop("version", 1)
        lambda_init, base = options.pop("lambda_init", None), options.pop("schedule_base", 0)
        options["attention"] = {tower: attention(f"v{version}", lambda_init, base) for tower in towers}
    return config
