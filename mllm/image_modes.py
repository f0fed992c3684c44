"""How a picture that is not square becomes what the vision tower takes; the choice is saved with the processor."""

from typing import Any

from transformers import LlavaImageProcessor

from diffclip.errors import InputError

MODES = ("crop", "squash", "pad")


def with_mode(image_processor: Any, mode: str) -> Any:
    """Return the processor of a tower with another way to make pictures square.

    Args:
        image_processor: of any CLIP-like tower, with a square `crop_size` or `size`.
        mode: "crop" cuts off what is beyond the middle square (as the tower was trained, unchanged here), "squash"
            shows all of it in other proportions, "pad" all of it between bars of the mean colour (LLaVA-1.5's way).

    Raises:
        InputError: unknown mode.
    """
    if mode not in MODES:
        raise InputError(f"image_mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if mode == "crop":
        return image_processor
    crop = dict(getattr(image_processor, "crop_size", None) or {})
    side = crop.get("height") or dict(image_processor.size).get("height")
    settings = {
        "resample": image_processor.resample,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "crop_size": {"height": side, "width": side},
    }
    if mode == "squash":
        return type(image_processor)(size={"height": side, "width": side}, do_center_crop=False, **settings)
    return LlavaImageProcessor(do_pad=True, size={"shortest_edge": side}, **settings)
