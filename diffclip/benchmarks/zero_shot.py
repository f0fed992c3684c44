"""Zero-shot classification: an image goes to the class whose prompts' mean text feature is nearest."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffclip.benchmarks import prompts
from diffclip.benchmarks.images import Images
from diffclip.benchmarks.protocol import Classification, Evaluation, Protocol


class ZeroShot(NamedTuple):
    """Per-image outcomes; `metrics` turns them into percent."""

    predicted: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64
    top5: Tensor | None  # (N,) bool: the label is among the five best; None with fewer than five classes

    @property
    def correct(self) -> Tensor:
        return self.predicted == self.labels  # (N,) bool

    def metrics(self) -> dict[str, float]:
        """top1, top5 (absent with fewer than five classes) and mean_per_class, in percent."""
        return {name: 100 * values.double().mean().item() for name, values in self.outcomes().items()}

    def outcomes(self) -> dict[str, Tensor]:
        """What `metrics` are 100 times the mean of: (N,) each."""
        top5 = {} if self.top5 is None else {"top5": self.top5}
        return {"top1": self.correct, **top5, "mean_per_class": balanced(self.correct, self.labels)}


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
    """The mean over the classes present of the share of correct rows, in percent."""
    return 100 * balanced(correct.double(), labels).mean().item()


def balanced(correct: Tensor, labels: Tensor) -> Tensor:
    """Weigh outcomes (N,) so that their plain mean is the mean over the classes present: (N,) float64."""
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return correct * (len(labels) / (len(counts) * counts[inverse].double()))


def images(name: str, labelled: Classification) -> dict[str, Images]:
    return {f"{name} test": labelled.splits["test"]}


def score(evaluation: Evaluation, name: str, labelled: Classification) -> None:
    """Add zero_shot/NAME/{top1,top5,mean_per_class}."""
    test = evaluation.encoder.images(labelled.splits["test"], f"{name} test")
    found = classify(test.after, class_vectors(evaluation, name), test.labels)
    evaluation.add(f"zero_shot/{name}", found.metrics(), found.outcomes())


def class_vectors(evaluation: Evaluation, name: str) -> Tensor:
    """The text classifier (classes, width) of a classification set."""
    if name not in evaluation.classifiers:
        labelled = evaluation.data.classification[name]
        templates = evaluation.templates or labelled.templates or prompts.templates("imagenet7")
        features = evaluation.encoder.texts(prompts.prompts(labelled.classnames, templates), "prompts")
        by_class = features.unflatten(0, (len(labelled.classnames), len(templates)))
        evaluation.classifiers[name] = prompts.class_means(by_class)
    return evaluation.classifiers[name]


PROTOCOL = Protocol(images, score)
