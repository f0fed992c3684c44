"""From captions to token ids and from images to pixels, as a model config says: the two ends before the encoders."""

from collections.abc import Callable
from typing import Any

import regex as re  # open_clip's tokenizer needs its classes of letters and digits
import torch
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms.functional import InterpolationMode

from diffclip.base.backbones import open_clip
from diffclip.base.images import cut_strip, to_rgb


def tokenizer(model_config: dict[str, Any], legacy: bool = False) -> Callable[[str | list[str]], Tensor]:
    """Return CLIP's byte-pair tokenizer: str or list of str -> ids (n, context_length), int64, padded with 0.

    A caption that is too long is cut so that it still ends in the end token, at which its embedding is read.
    `legacy` reproduces the tokenizer of SLIP and the official DiffCLIP, which loses that end token.
    """
    kind = LegacyTokenizer if legacy else open_clip.SimpleTokenizer
    return kind(context_length=model_config["model_cfg"]["text_cfg"]["context_length"])


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

    Training: a random crop of `crop_scale` of the area, bilinear, no flip, as in SLIP.
    Otherwise: the shorter side to `size`, bilinear, then the centre.
    With `normalized` False the tensor is uint8, and `normalize` does the rest for a whole batch.
    """
    cfg = model_config["preprocess_cfg"]
    interpolation = InterpolationMode(cfg["interpolation"])
    if train:
        crop = [T.RandomResizedCrop(cfg["size"], scale=crop_scale, interpolation=interpolation)]
    else:
        crop = [cut_strip, T.Resize(cfg["size"], interpolation=interpolation), T.CenterCrop(cfg["size"])]
    last = [T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])] if normalized else [T.PILToTensor()]
    return T.Compose([to_rgb, *crop, *last])


def decoding(transform: T.Compose) -> T.Compose:
    """open_clip's transform with the rules of `diffclip.base.images` in front, for any PIL image and for strips."""
    crops = any(isinstance(step, T.CenterCrop) for step in transform.transforms)
    return T.Compose([to_rgb, *([cut_strip] if crops else []), *transform.transforms])


def normalize(model_config: dict[str, Any], pixels: Tensor) -> Tensor:
    """Return floats for a batch of uint8 pixels (batch, 3, size, size), bit for bit what `transforms` gives one by one.

    Batches travel between processes, and to a device, in a quarter of the bytes.
    """
    cfg = model_config["preprocess_cfg"]
    mean, std = (torch.tensor(cfg[key], device=pixels.device)[:, None, None] for key in ("mean", "std"))
    return pixels.float().div_(255).sub_(mean).div_(std)
