"""Text classifiers: templates with a place for the class name, and a unit vector for each class.

A class follows CLIP (Radford et al. 2021, section 3.1.4): normalise each prompt, average, normalise.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_text


def templates(name: str | Path) -> list[str]:
    """Return prompt templates with `{c}` where the class name goes.

    `imagenet7` are SLIP's seven (open_clip calls them simple), `imagenet80` are OpenAI's, anything else is the path of
    a JSON list of strings, or of a text file with a prompt a line. There OpenAI's `{}` means the same as `{c}`.

    Raises:
        InputError: no such file, or a prompt without a place for the class name.
    """
    shipped = {"imagenet7": open_clip.SIMPLE_IMAGENET_TEMPLATES, "imagenet80": open_clip.OPENAI_IMAGENET_TEMPLATES}
    if name in shipped:
        return [template("{c}") for template in shipped[name]]
    path = Path(name)
    if not path.is_file():
        raise InputError(f"templates {name}: neither imagenet7, imagenet80 nor a file")
    read = read_json(path) if path.suffix == ".json" else [t.strip() for t in read_text(path).split("\n") if t.strip()]
    if not isinstance(read, list) or not read:
        raise InputError(f"{path} needs to be a list of strings that each hold {{c}} or {{}}")
    for number, text in enumerate(read, start=1):
        if not isinstance(text, str) or ("{c}" in text) + ("{}" in text) != 1:
            raise InputError(f"{path}: template {number}, {text!r}, needs {{c}} or {{}} where the class name goes")
        if re.match(r"""lambda\b|[rf]?(["']).*\1,$""", text):
            raise InputError(f"{path}: template {number}, {text!r}, is Python: write only the text between the quotes")
    return [template.replace("{}", "{c}") for template in read]


def prompts(classnames: Sequence[str], class_templates: Sequence[str]) -> list[str]:
    """Return all prompts, those of one class together: class 0 with each template, class 1, ..."""
    return [template.replace("{c}", name) for name in classnames for template in class_templates]


def class_means(features: Tensor) -> Tensor:
    """Turn prompt features (classes, prompts, width) into unit class vectors (classes, width)."""
    return F.normalize(F.normalize(features.float(), dim=-1).mean(dim=1), dim=-1)


@torch.no_grad()
def classifier(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    class_templates: Sequence[str],
    batch_size: int = 256,
) -> Tensor:
    """Return the text classifier (classes, width), float32 unit rows, on the model's device.

    The model stays in the mode it is in: call `model.eval()` first where dropout matters.
    """
    device = next(model.parameters()).device
    encode_text = cast(Callable[[Tensor], Tensor], model.encode_text)
    texts = prompts(classnames, class_templates)
    batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
    features = torch.cat([encode_text(tokenizer(batch).to(device)) for batch in batches])
    return class_means(features.unflatten(0, (len(classnames), len(class_templates))))
