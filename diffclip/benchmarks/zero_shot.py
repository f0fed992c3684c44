"""Zero-shot classification: a class is the mean of its prompts' text features, an image goes to the nearest.

The classifier follows CLIP (Radford et al. 2021, section 3.1.4): normalise each prompt, average, normalise.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_text


def templates(name: str | Path) -> list[str]:
    """Return prompt templates with `{c}` where the class name goes.

    `imagenet7` are SLIP's seven (open_clip calls them simple), `imagenet80` are OpenAI's, anything else is the path of
    a JSON list of strings, or of a text file with a prompt a line. There OpenAI's `{}` means the same as `{c}`.

    Raises:
        InputError: no such file, or a prompt without a place for the class name.
    """
    from diffclip.base.backbones import open_clip

    shipped = {"imagenet7": open_clip.SIMPLE_IMAGENET_TEMPLATES, "imagenet80": open_clip.OPENAI_IMAGENET_TEMPLATES}
    if name in shipped:
        return [template("{c}") for template in shipped[name]]
    path = Path(name)
    if not path.is_file():
        raise InputError(f"templates {name}: neither imagenet7, imagenet80 nor a file")
    read = read_json(path) if path.suffix == ".json" else [t.strip() for t in read_text(path).split("\n") if t.strip()]
    if not isinstance(read, list) or not read:
        raise InputError(f"{path} needs to be a list of strings that each hold {{c}} or {{}}")
    for number, one in enumerate(read, start=1):
        if not isinstance(one, str) or ("{c}" in one) + ("{}" in one) != 1:
            raise InputError(f"{path}: template {number}, {one!r}, needs {{c}} or {{}} where the class name goes")
        if re.match(r"""lambda\b|[rf]?(["']).*\1,$""", one):
            raise InputError(f"{path}: template {number}, {one!r}, is Python: write only the text between the quotes")
    return [one.replace("{}", "{c}") for one in read]


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
    texts = prompts(classnames, class_templates)
    batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
    features = torch.cat([model.encode_text(tokenizer(batch).to(device)) for batch in batches])
    return class_means(features.unflatten(0, (len(classnames), len(class_templates))))


class ZeroShot(NamedTuple):
    """Per-image outcomes; `metrics` turns them into percent."""

    predicted: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64
    top5: Tensor | None  # (N,) bool: the label is among the five best; None with fewer than five classes

    @property
    def correct(self) -> Tensor:
        return self.predicted == self.labels  # (N,) bool

    def metrics(self) -> dict[str, float]:
        """Return top1, top5 (absent with fewer than five classes) and mean_per_class, in percent."""
        scores = {"top1": 100 * self.correct.double().mean().item()}
        if self.top5 is not None:
            scores["top5"] = 100 * self.top5.double().mean().item()
        scores["mean_per_class"] = mean_per_class(self.correct, self.labels)
        return scores


@torch.no_grad()
def classify(image_features: Tensor, class_vectors: Tensor, labels: Tensor, block: int = 8192) -> ZeroShot:
    """Classify images (N, width) by cosine with class vectors (classes, width); labels (N,) int64.

    The scale of the logits does not matter for any score. Works in blocks, never on all N x classes logits.
    """
    k = min(5, len(class_vectors))
    class_vectors = F.normalize(class_vectors.float(), dim=-1).to(image_features.device)
    ranked = [
        (F.normalize(rows.float(), dim=-1) @ class_vectors.T).topk(k, dim=1).indices
        for rows in image_features.split(block)
    ]
    best = torch.cat(ranked).cpu()  # (N, k)
    labels = labels.cpu()
    top5 = (best == labels[:, None]).any(dim=1) if k == 5 else None
    return ZeroShot(best[:, 0], labels, top5)


def mean_per_class(correct: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes present of the share of correct rows, in percent."""
    return 100 * (correct.double() * balanced_weights(labels)).mean().item()


def balanced_weights(labels: Tensor) -> Tensor:
    """Return weights (N,) float64 under which a plain mean over rows is the mean over the classes present."""
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[inverse].double())
