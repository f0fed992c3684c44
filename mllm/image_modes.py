"""How an image that is not square becomes what the vision tower takes; the choice is saved with the processor."""

from collections.abc import Iterable
from typing import Any

from PIL import Image
from transformers import BaseImageProcessor, LlavaImageProcessor

from diffclip.base.errors import InputError
from diffclip.base.images import cut_strip, to_rgb

MODES = ("crop", "squash", "pad")
LONGEST = 9459  # pixels; a square of it has as many as PIL lets an image have


def with_mode(image_processor: Any, mode: str) -> BaseImageProcessor:
    """Return the processor of a tower with another way to make images square.

    Args:
        image_processor: a `BaseImageProcessor` of any CLIP-like tower, with a square `crop_size` or `size`.
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


def bounded(images: Iterable[Image.Image], image_processor: BaseImageProcessor) -> list[Image.Image]:
    """Images in RGB for an image processor, those changed that it would make gigabytes of.

    A centre crop gets the middle of a strip, which is all that it keeps; a strip that would be padded to a square of
    more pixels than any image may have is made smaller first.
    """
    images = [to_rgb(image) for image in images]
    if getattr(image_processor, "do_pad", False):
        return [_smaller(image) for image in images]
    size = getattr(image_processor, "size", None) or {}
    if getattr(image_processor, "do_center_crop", False) and dict(size).get("shortest_edge"):
        return [cut_strip(image) for image in images]
    return images


def _smaller(image: Image.Image) -> Image.Image:
    scale = LONGEST / max(image.size)
    if scale >= 1:
        return image
    return image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.BICUBIC)
