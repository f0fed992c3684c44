"""POPE's scores (Li et al. 2023) of predictions, split by split, their intervals, and what they are worth.

Beside them stand a rule that sees no image, and the same questions with other images, a grey one, or none.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.base.statistics import percentiles, resampled_sums
from mllm.pope.questions import SPLITS, Question

SCORES = ("accuracy", "precision", "recall", "f1", "yes_rate", "invalid_rate")
FOLDS = 5  # of images, where a rule is learnt from others than it is tried on
GREY = "grey"  # the image of the control of that name


def score(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """`SCORES` in [0, 1] (0 where undefined) and n; yes is the positive class, and "invalid" is wrong and no "yes"."""
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    pairs = Counter(zip(predictions, labels))
    true_yes, predicted_yes = pairs["yes", "yes"], pairs["yes", "yes"] + pairs["yes", "no"]
    is_yes = sum(label == "yes" for label in labels)
    precision = true_yes / predicted_yes if predicted_yes else 0.0
    recall = true_yes / is_yes if is_yes else 0.0
    return {
        "accuracy": (true_yes + pairs["no", "no"]) / len(labels),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes_rate": predicted_yes / len(labels),
        "invalid_rate": sum(p not in ("yes", "no") for p in predictions) / len(labels),
        "n": len(labels),
    }


def score_splits(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, dict[str, float]]:
    """`score` for every split that occurs, and under "mean" their plain average."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question, prediction in zip(questions, predictions, strict=True):
        groups[question.split].append((prediction, question.label))
    table = {split: score(*zip(*groups[split])) for split in _splits(questions)}
    mean = {name: sum(row[name] for row in table.values()) / len(table) for name in SCORES}
    return {**table, "mean": {**mean, "n": len(questions)}}


def _splits(questions: Sequence[Question]) -> list[str]:
    """The splits that occur: POPE's in their order, then others, as tasks of lmms-eval have them."""
    there = dict.fromkeys(q.split for q in questions)
    return [split for split in dict.fromkeys((*SPLITS, *there)) if split in there]


def intervals(
    questions: Sequence[Question], predictions: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """Percentile intervals of 95 %, {split or "mean": {"accuracy" or "f1": (lower, upper)}}.

    An image's questions stand or fall together, in all splits, so images are drawn and not questions (the cluster
    bootstrap of Davison and Hinkley 1997, section 3.8).
    """
    rows = {name: i for i, name in enumerate(sorted({q.image for q in questions}))}
    splits = _splits(questions)
    # questions, right ones, those predicted yes that are yes, and the sum of predicted and true yes
    counts = np.zeros((len(rows), len(splits), 4))
    for q, prediction in zip(questions, predictions, strict=True):
        yes = (prediction == "yes") + (q.label == "yes")
        counts[rows[q.image], splits.index(q.split)] += (1, prediction == q.label, yes == 2, yes)
    drawn = resampled_sums(counts.reshape(len(counts), -1), resamples, seed).reshape(resamples, *counts.shape[1:])
    total, right, both_yes, any_yes = np.moveaxis(drawn, -1, 0)  # (resamples, splits) each
    scores = {"accuracy": right / np.maximum(total, 1), "f1": 2 * both_yes / np.maximum(any_yes, 1)}
    table: dict[str, dict[str, tuple[float, float]]] = {split: {} for split in (*splits, "mean")}
    for name, values in scores.items():
        for split, column in zip((*splits, "mean"), (*values.T, values.mean(1))):
            table[split][name] = percentiles(column)
    return table


def uses_image(model: Mapping[str, Mapping[str, float]], blind_rule: Mapping[str, Mapping[str, float]]) -> str:
    """One sentence: whether a model beats the best rule that sees no image."""
    own, other = 100 * model["mean"]["accuracy"], 100 * blind_rule["mean"]["accuracy"]
    verdict = "uses the image" if own > other else "does not use the image"
    return f"the model {verdict}: accuracy {own:.1f} against {other:.1f} of the best rule that sees no image"


def blind(questions: Sequence[Question], seed: int = 0) -> list[str]:
    """Predictions of the best rule that sees no image: the usual answer to this question, in this split.

    Images are divided into folds; the answers for one fold come from the others. A question that these never
    ask gets the answer that is more common among them.
    """
    fold_of = folds_of_images(questions, seed)
    predictions = [""] * len(questions)
    for fold in range(FOLDS):
        votes: dict[tuple[str, ...], int] = Counter()  # yes minus no
        for q in questions:
            if fold_of[q.image] != fold:
                vote = 1 if q.label == "yes" else -1
                votes[q.split, q.key[2]] += vote
                votes[q.split,] += vote
        for i, q in enumerate(questions):
            if fold_of[q.image] == fold:
                usual = votes[q.split, q.key[2]] or votes[q.split,]
                predictions[i] = "yes" if usual >= 0 else "no"
    return predictions


def folds_of_images(questions: Sequence[Question], seed: int) -> dict[str, int]:
    """A fold for each image, drawn by the seed."""
    return folds_of({q.image for q in questions}, seed)


def folds_of(names: Iterable[str], seed: int) -> dict[str, int]:
    """One of `FOLDS` for each name, drawn by the seed."""
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    return {name: i % FOLDS for i, name in enumerate(shuffled)}


def grey_image() -> Image.Image:
    """What `GREY` stands for."""
    return Image.new("RGB", (224, 224), (128, 128, 128))


def shuffle_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions shown with other images: no image stays in its place, each is used for another."""
    other = other_images({q.image for q in questions}, seed)
    return [q._replace(shown=other[q.image]) for q in questions]


def other_images(names: Iterable[str], seed: int) -> dict[str, str]:
    """Another image for each of at least two, in one cycle, so that none stays in its place; drawn by the seed."""
    shuffled = sorted(names)
    if len(shuffled) < 2:
        raise InputError("shuffling needs questions about at least two images")
    random.Random(seed).shuffle(shuffled)
    return dict(zip(shuffled, [*shuffled[1:], shuffled[0]]))


CONTROLS: dict[str, Callable[[Sequence[Question], int], list[Question]]] = {  # of questions and a seed
    "shuffled": shuffle_images,
    "grey": lambda questions, seed: [q._replace(shown=GREY) for q in questions],
    "no_image": lambda questions, seed: [q._replace(shown="") for q in questions],
}
