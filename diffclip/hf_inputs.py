"""Images and texts prepared by the files of a transformers directory: its image processor (on PIL) and tokenizer."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.images import DECODING, cut_strip, rgb_by
from diffclip.preprocessing import TOKENIZER_FILES
from diffclip.weights import from_pretrained, refuse_auto_map


def inputs(directory: Path, model_config: dict[str, Any]) -> tuple["ImageTransform", Callable, list[Any]]:
    """Return (transform, tokenizer, what has to be saved beside the model) of a transformers directory.

    InputError for an image processor or a tokenizer that cannot be followed.
    """
    text_cfg = model_config["model_cfg"]["text_cfg"]
    transform = image_transform(directory, model_config["model_cfg"]["vision_cfg"]["image_size"])
    texts = tokenizer(directory, text_cfg["context_length"], text_cfg["vocab_size"])
    theirs = [texts.args[0]] if isinstance(texts, partial) else []
    return transform, texts, [transform.processor, *theirs]


def preprocess_cfg(transform: "ImageTransform", side: int) -> dict[str, Any]:
    """What open_clip's `preprocess_cfg` can say of an image processor, for training's own crops."""
    processor = transform.processor
    normal, resample = processor.do_normalize, processor.resample
    return {
        "size": side,
        "mean": list(processor.image_mean) if normal else [0.0, 0.0, 0.0],
        "std": list(processor.image_std) if normal else [1.0, 1.0, 1.0],
        "interpolation": "bilinear" if resample == Image.Resampling.BILINEAR else "bicubic",
        "resize_mode": "shortest" if getattr(processor, "do_center_crop", False) else "squash",
    }


class ImageTransform:
    """A transformers image processor as a transform from a PIL image to (channels, height, width), float32."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __repr__(self) -> str:  # by which the cache of features tells transforms apart
        return f"ImageTransform({self.processor!r})"

    def __call__(self, image: Image.Image) -> Tensor:
        return self._pixels(image).float()

    def seen(self, nearest: bool = False) -> Callable[[Image.Image], Image.Image]:
        """Return what resizes and crops of it: PIL image -> PIL image; `nearest` for masks."""
        only: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
        only |= {"resample": Image.Resampling.NEAREST} if nearest else {}
        return lambda image: Image.fromarray(self._pixels(image, **only).byte().permute(1, 2, 0).numpy())

    def _pixels(self, image: Image.Image, **options: Any) -> Tensor:
        crops = getattr(self.processor, "do_center_crop", False)  # SigLIP's know no crop
        image = rgb_by(getattr(self.processor, "decoding", DECODING))(image)
        image = cut_strip(image) if crops else image
        return self.processor(image, return_tensors="pt", **options)["pixel_values"][0]


def image_transform(directory: Path, side: int) -> ImageTransform:
    """Return the directory's image processor as a transform from a PIL image to (3, side, side).

    InputError if it cannot be read without running its code, or makes images of another size than the tower takes.
    """
    names = [name for name in ("preprocessor_config.json", "processor_config.json") if (directory / name).is_file()]
    for name in names:
        refuse_auto_map(directory / name, "AutoImageProcessor")
        refuse_auto_map(directory / name, "AutoFeatureExtractor")
    try:
        if names:
            processor = _image_processor(directory)
        else:
            processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
            warnings.warn(f"{directory}: no preprocessor_config.json: images are prepared as CLIP's are", stacklevel=4)
        transform = ImageTransform(processor)
        for size in ((2 * side + 7, side + 3), (side + 3, 2 * side + 7)):
            made = tuple(transform(Image.new("RGB", size)).shape)
            if made != (3, side, side):
                raise InputError(
                    f"{directory / names[0]}: makes {made} of an image of {size[0]} x {size[1]} pixels, but the vision "
                    f"tower takes (3, {side}, {side}): correct its size, crop_size, do_resize or do_center_crop"
                )
    except InputError:
        raise
    except Exception as error:  # transformers raises whatever its processors do
        raise InputError(f"{directory}: its image processor cannot be used ({in_one_line(error)})") from None
    return transform


def _image_processor(directory: Path) -> Any:
    try:
        return from_pretrained(AutoImageProcessor, directory, backend="pil")
    except InputError as error:
        raise InputError(f"{directory}: its image processor cannot be used ({in_one_line(error)})") from None


def tokenizer(directory: Path, context_length: int, vocab_size: int) -> Callable[[str | list[str]], Tensor]:
    """Return the directory's tokenizer: str or list of str -> ids (n, context_length), int64; CLIP's if it has none.

    InputError if it cannot be read without running its code, or gives ids that the model has no embedding for.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        if vocab_size != 49408:
            raise InputError(f"{directory}: no tokenizer beside a vocabulary of {vocab_size}: add its tokenizer.json")
        warnings.warn(f"{directory}: no tokenizer: texts are read by CLIP's", stacklevel=4)
        return open_clip.SimpleTokenizer(context_length=context_length)
    refuse_auto_map(directory / "tokenizer_config.json", "AutoTokenizer")
    try:
        theirs = from_pretrained(AutoTokenizer, directory)
    except InputError as error:
        raise InputError(f"{directory}: its tokenizer cannot be read ({in_one_line(error)})") from None
    if max(theirs.get_vocab().values(), default=0) >= vocab_size:
        raise InputError(f"{directory}: its tokenizer has {len(theirs)} tokens, but the model embeds {vocab_size}")
    if theirs.padding_side != "right":
        raise InputError(f"{directory}: its tokenizer pads on the left, which would move a CLIP's positions")
    return partial(_ids, theirs, context_length)


def _ids(theirs: Any, context_length: int, texts: str | list[str]) -> Tensor:
    """Ids (n, context_length) of texts, cut and padded as a transformers tokenizer does."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = theirs(texts, truncation=True, max_length=min(context_length, theirs.model_max_length))["input_ids"]
    ids = torch.full((len(rows), context_length), theirs.pad_token_id or 0)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids
