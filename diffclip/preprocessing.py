"""From captions to token ids and from images to pixels, as a model config says: the two ends before the encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import regex as re  # open_clip's tokenizer needs its classes of letters and digits
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from diffclip.base.backbones import HFTokenizer, PreprocessCfg, image_transform_v2, open_clip
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.images import DECODING, cut_strip, rgb_by, to_rgb, widened
from diffclip.weights import refuse_auto_map

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")
PLAIN = re.compile(r"[ -%'-~]*")


def tokenizer(
    model_config: dict[str, Any], legacy: bool = False, directory: str | Path | None = None
) -> Callable[[str | list[str]], Tensor]:
    """Return a model's tokenizer: str or list of str -> ids (n, context_length), int64, padded.

    It is CLIP's byte-pair tokenizer, where the config names no other of transformers; that one is read from
    `directory`, or without one from the Hub's cache. A caption that is too long is cut so that it still ends in the
    end token, at which CLIP's embedding is read. `legacy` reproduces the tokenizer of SLIP and the official DiffCLIP,
    which loses that end token.

    Raises:
        InputError: a tokenizer that is not there, or could not be read without running code of its own.
    """
    text_cfg = model_config["model_cfg"]["text_cfg"]
    length, options = text_cfg.get("context_length", 77), text_cfg.get("tokenizer_kwargs") or {}
    if legacy:
        return LegacyTokenizer(context_length=length)
    if not (name := text_cfg.get("hf_tokenizer_name")):
        return open_clip.SimpleTokenizer(context_length=length, **options) if options else _of_clip(length)
    source = name
    if directory and any((Path(directory) / file).is_file() for file in TOKENIZER_FILES):
        refuse_auto_map(Path(directory) / "tokenizer_config.json", "AutoTokenizer")
        source = str(directory)
    try:
        mode = text_cfg.get("tokenizer_mode")
        return HFTokenizer(source, length, tokenizer_mode=mode, **{**options, "trust_remote_code": False})
    except Exception as error:  # transformers raises whatever its loaders do
        reason = in_one_line(error, 200)
        where = f"nor in {directory}" if directory and source == name else f"({type(error).__name__}: {reason})"
        raise InputError(f"the model's tokenizer {source} cannot be read, {where}: put its files there") from None


@lru_cache
def _of_clip(length: int) -> Any:
    """CLIP's own tokenizer, whose 49,408 tokens take a tenth of a second to be read."""
    made = open_clip.SimpleTokenizer(context_length=length)
    made.clean_fn = partial(_clean, made.clean_fn)
    return made


def _clean(clean: Callable[[str], str], text: str) -> str:
    """`clean` of a caption, which mends broken Unicode and HTML: printable ASCII without an & has neither."""
    return " ".join(text.split()).lower() if PLAIN.fullmatch(text) else clean(text)


class LegacyTokenizer(open_clip.SimpleTokenizer):
    """SLIP's tokenizer: over-long captions lose their end token, and OpenAI's names mark start and end."""

    pat: Any  # regex's pattern for special tokens and words

    def __init__(self, context_length: int) -> None:
        super().__init__(context_length=context_length)
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        pattern = self.pat.pattern
        for old, new in names.items():
            self.encoder[new] = self.encoder.pop(old)
            self.cache[new] = new
            pattern = pattern.replace(old, re.escape(new))
        self.pat = re.compile(pattern, re.IGNORECASE)
        self.decoder = {index: token for token, index in self.encoder.items()}

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Return ids (n, context_length), int64, cut without care for the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), context_length or self.context_length, dtype=torch.long)
        for row, text in zip(ids, texts):
            tokens = [self.sot_token_id, *self.encode(text), self.eot_token_id][: len(row)]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def transforms(
    model_config: dict[str, Any], train: bool, crop_scale: tuple[float, float] = (0.5, 1.0), normalized: bool = True
) -> Callable[..., Tensor]:
    """Return the transform from a PIL image to a normalised (3, size, size) float tensor.

    Training: a random crop of `crop_scale` of the area, no flip, as in SLIP, in the model's interpolation; it takes
    what `diffclip.base.jpegs.decode_for_crops` gives as well, and resizes by torch's kernel for uint8, which is within
    one of 255 levels of PIL's (two in some of a million bicubic pixels) and takes a third to a half of its time.
    Otherwise, where the model's `resize_mode` is "shortest": the shorter side to `size`, then the centre; for other
    modes, what open_clip does. With `normalized` False the tensor is uint8, and `normalize` does the rest for a whole
    batch.
    """
    cfg = model_config["preprocess_cfg"]
    rgb = rgb_by(model_config.get("diffclip", {}).get("decoding", DECODING))
    if not train and (cfg.get("resize_mode", "shortest") != "shortest" or not isinstance(cfg["size"], int)):
        return decoding(image_transform_v2(PreprocessCfg(**cfg), is_train=False), rgb)
    interpolation = InterpolationMode(cfg.get("interpolation", "bicubic").replace("random", "bicubic"))
    if train:
        size = [cfg["size"]] * 2 if isinstance(cfg["size"], int) else [*cfg["size"]]
        last = partial(normalize, model_config) if normalized else None
        return RandomCrop(size, crop_scale, interpolation, rgb, last)
    finish = [T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])] if normalized else [T.PILToTensor()]
    return T.Compose(
        [rgb, cut_strip, T.Resize(cfg["size"], interpolation=interpolation), T.CenterCrop(cfg["size"]), *finish]
    )


def as_pixels(image: Image.Image | Tensor, rgb: Callable[[Image.Image], Image.Image] = to_rgb) -> Tensor:
    """An image by the rules `rgb` as (3, height, width) uint8, channels last in memory; such a tensor as it is."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)


Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop of what `decode_for_crops` gives, with its draws and without its detours.

    The result is (3, *size) uint8, channels last in memory, then whatever `last` makes of it.
    """

    size: list[int]
    scale: tuple[float, float]
    interpolation: InterpolationMode
    rgb: Callable[[Image.Image], Image.Image] = to_rgb
    last: Callable[[Tensor], Tensor] | None = None

    def draw(self, height: int, width: int) -> Box:
        """The part of an image to keep, from torch's generator.

        All of a square is given without a draw: who goes on with the generator (training seeds each sample) has others.
        """
        if height == width and min(self.scale) == 1:  # of its ten draws none is another crop than all of it
            return 0, 0, height, width
        of_that_size = torch.empty(()).expand(height, width)
        return T.RandomResizedCrop.get_params(of_that_size, [*self.scale], [3 / 4, 4 / 3])

    def __call__(self, image: Image.Image | Tensor, box: Box | None = None) -> Tensor:
        pixels = as_pixels(image, self.rgb)
        top, left, height, width = box or self.draw(*pixels.shape[1:])
        part = pixels[:, top : top + height, left : left + width]
        # with a stride of the whole for the batch of one torch sees that channels are last, and saves a copy
        batch = part.as_strided((1, *part.shape), (pixels.numel(), *part.stride()), part.storage_offset())
        crop = F.resize_image(batch, self.size, interpolation=self.interpolation, antialias=True)[0]
        return self.last(crop) if self.last else crop


def decoding(transform: T.Compose, rgb: Callable[..., Any] = to_rgb) -> T.Compose:
    """open_clip's transform with rules of `diffclip.base.images` in front, for any PIL image and for strips."""
    first, steps = transform.transforms[0], transform.transforms
    bounds: list[Callable] = [cut_strip] if any(isinstance(step, T.CenterCrop) for step in steps) else []
    if getattr(first, "longest", 0) == 1:  # all of the image between bars
        bounds = [partial(widened, side=min(first.size))]
    return T.Compose([rgb, *bounds, *steps])


def normalize(model_config: dict[str, Any], pixels: Tensor) -> Tensor:
    """Return floats for a batch of uint8 pixels (batch, 3, size, size), bit for bit what `transforms` gives one by one.

    Batches travel between processes, and to a device, in a quarter of the bytes.
    """
    cfg = model_config["preprocess_cfg"]
    mean, std = (_by_channel(tuple(cfg[key]), pixels.device) for key in ("mean", "std"))
    floats = torch.empty(pixels.shape, device=pixels.device)
    one_by_one = pixels.ndim == 4 and pixels.device.type == "cpu"  # an image stays in a core's cache, a batch does not
    for into, part in zip(floats, pixels) if one_by_one else [(floats, pixels)]:
        into.copy_(part).div_(255).sub_(mean).div_(std)
    return floats


@lru_cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(channels, 1, 1) on the device: copied once, since each copy from the CPU's memory waits for a GPU."""
    return torch.tensor(values, device=device)[:, None, None]
