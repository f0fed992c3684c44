"""The halves of a processor, made fit for conversations about images: tokenizers, and images that are not square."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import BaseImageProcessor, LlavaImageProcessor, LlavaProcessor, PreTrainedTokenizerBase

from diffclip.base.errors import InputError
from diffclip.base.images import DECODING, STRIP, cut_strip, rgb_by
from mllm import own_template
from mllm.conversation import IMAGE, TEMPLATES

MODES = ("crop", "squash", "pad")
LONGEST = 9459  # pixels; a square of it has as many as PIL lets an image have
LONGEST_STRIP = 2048  # of an image that is little more than a line in the square


def with_mode(image_processor: Any, mode: str) -> BaseImageProcessor:
    """The processor of a tower with another way to make images square, which is saved with it.

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
    rgb = rgb_by(getattr(image_processor, "decoding", DECODING))
    images = [rgb(image) for image in images]
    if getattr(image_processor, "do_pad", False):
        return [_smaller(image) for image in images]
    size = getattr(image_processor, "size", None) or {}
    if getattr(image_processor, "do_center_crop", False) and dict(size).get("shortest_edge"):
        return [cut_strip(image) for image in images]
    return images


def _smaller(image: Image.Image) -> Image.Image:
    strip = max(image.size) > STRIP * min(image.size)
    scale = (LONGEST_STRIP if strip else LONGEST) / max(image.size)
    size = [max(1, round(scale * side)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC) if scale < 1 else image


def image_tokens(processor: LlavaProcessor) -> int:
    """How many placeholders the processor writes for one image."""
    pixels = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
    return processor.replace_image_token(pixels, 0).count(IMAGE)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str, path: str | Path) -> None:
    """Give the tokenizer `<image>`, a padding token, and as its eos the token that ends an answer.

    Its own chat template is kept for a later `template: auto`.
    """
    if template not in TEMPLATES:
        raise InputError(f"unknown template `{template}`: use one of {', '.join(TEMPLATES)}")
    if not tokenizer.is_fast:
        raise InputError(f"{path}: needs a fast tokenizer (tokenizer.json), which knows where tokens begin and end")
    never_cut(tokenizer)
    own_template.keep(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if "<|im_end|>" in tokenizer.get_vocab():  # base models have it too, but stop at another token
        tokenizer.eos_token = "<|im_end|>"
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has neither <|im_end|> nor an end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    before, behind = _added_tokens(tokenizer)
    if behind:  # an end token: a question would end before its answer begins
        _add_only(tokenizer, before)
    check_tokens(tokenizer, template, path)


def write_own_template(tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Fit the tokenizer to a source of `mllm.own_template`, which writes whole texts, their first token included.

    Returns:
        the ids of all tokens that end an answer; the first has become its eos.
    """
    ends = own_template.ends(source)
    ids: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in (*ends, tokenizer.eos_token)]
    tokenizer.eos_token = ends[0]
    if any(_added_tokens(tokenizer)):
        _add_only(tokenizer, [])
    return list(dict.fromkeys(ids))


def _add_only(tokenizer: PreTrainedTokenizerBase, before: list[str]) -> None:
    """Have the tokenizer put these special tokens before every text, and none behind."""
    for name in ("add_eos_token", "add_bos_token")[: 1 if before else 2]:
        if getattr(tokenizer, name, False):
            setattr(tokenizer, name, False)
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in before]
    only_before = TemplateProcessing(single=[*before, "$A"], special_tokens=specials)
    tokenizer.backend_tokenizer.post_processor = only_before


def check_tokens(tokenizer: PreTrainedTokenizerBase, template: str, path: str | Path) -> None:
    """Raise InputError unless the tokenizer can write the template, and ends no text by itself."""
    if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        raise InputError(f"{path}: template chatml needs the tokens <|im_start|> and <|im_end|>; use vicuna")
    _, behind = _added_tokens(tokenizer)
    if behind:
        raise InputError(
            f"{path}: its tokenizer writes {' '.join(behind)} behind every text, so that answers would begin behind "
            "the end; take it out of post_processor in tokenizer.json"
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer puts before and behind every text."""
    bare = len(tokenizer("yes", add_special_tokens=False)["input_ids"])
    marked = tokenizer("yes", return_special_tokens_mask=True)
    before = marked["special_tokens_mask"].index(0)
    tokens = list(tokenizer.convert_ids_to_tokens(marked["input_ids"]))
    return tokens[:before], tokens[before + bare :]


def never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a fast tokenizer neither cut texts nor fill them up, which a tokenizer.json may ask for.

    transformers hands such a length on to processors, so that questions would lose their ends without a word.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(name, None)
