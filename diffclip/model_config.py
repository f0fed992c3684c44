"""Whether a model config, which may be a stranger's, has the form of one; what it means `diffclip.models` knows."""

from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.ranges import check_numbers
from diffclip.variants import TOWERS

CHOICES = {
    "interpolation": ("bilinear", "bicubic", "nearest", "nearest-exact", "lanczos", "box", "hamming", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}
HOW = {"kind", "lambda_init", "schedule_base"}  # what is said of a differential tower


def check_config(config: Any, name: str) -> None:
    """InputError, which begins with `name`, for a part that is no part of a config, or a number out of range."""
    check_numbers(config, name)
    model_cfg, preprocess, options = (
        _mapping(config, key, name) for key in ("model_cfg", "preprocess_cfg", "diffclip")
    )
    vision_cfg, _ = (_mapping(model_cfg, key, name) for key in ("vision_cfg", "text_cfg"))
    if "diffclip" not in config:  # open_clip's files say None where they say nothing
        preprocess = {key: value for key, value in preprocess.items() if value is not None}
    for key, known in CHOICES.items():
        if key in preprocess and preprocess[key] not in known:
            raise _wrong(name, f"preprocess_cfg.{key}", preprocess[key], f"one of {', '.join(known)}")
    for key in ("mean", "std"):
        if key in preprocess and not _numbers(preprocess[key], 3):
            raise _wrong(name, f"preprocess_cfg.{key}", preprocess[key], "three numbers")
    size, side = preprocess.get("size", 1), vision_cfg.get("image_size", 1)
    for place, value in (("preprocess_cfg.size", size), ("model_cfg.vision_cfg.image_size", side)):
        if not isinstance(value, int) and not _numbers(value, 2):
            raise _wrong(name, place, value, "one whole number, or height and width")
    for key in ("size", "mean", "std"):
        if "diffclip" in config and options.get("inputs") != "transformers" and key not in preprocess:
            raise _wrong(name, f"preprocess_cfg.{key}", None, "what the weights were trained with")
    if "diffclip" in config and "size" in preprocess and _pair(size) != _pair(side):
        raise _wrong(name, "preprocess_cfg.size", size, f"{side}, the image_size of vision_cfg")
    if "vision_norm_eps" in options and options["vision_norm_eps"] is None:
        raise _wrong(name, "diffclip.vision_norm_eps", None, "a number")
    for tower, how in _mapping(options, "attention", name).items():
        if tower not in TOWERS:
            raise _wrong(name, "a tower in diffclip.attention", tower, " or ".join(TOWERS))
        said = isinstance(how, dict) and how.keys() <= HOW and isinstance(how.get("kind"), str | int)
        if not said or how.get("lambda_init") is None or how.get("schedule_base", 0) not in (0, 1):
            raise _wrong(name, f"diffclip.attention.{tower}", how, "its kind, lambda_init, and schedule_base (0 or 1)")
    if not isinstance(decoding := options.get("decoding", 1), int) or decoding < 1:
        raise _wrong(name, "diffclip.decoding", decoding, "the number of a version, or nothing")


def _wrong(name: str, place: str, value: object, wanted: str) -> InputError:
    return InputError(f"{name}: {place} is {repr(value)[:100]}: write {wanted}")


def _mapping(part: Any, key: str, name: str) -> dict[str, Any]:
    """What stands under a key, {} where nothing does; InputError if it is no mapping."""
    value = part.get(key, {}) if isinstance(part, dict) else part
    if not isinstance(value, dict):
        raise _wrong(name, key, value, "a mapping, as in diffclip/configs/ or open_clip's")
    return value


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(isinstance(v, int | float) for v in value)


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
