"""POPE (Li et al. 2023): parsers of answers, scores with intervals, and controls, which tell what a score is worth."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from diffclip.base.errors import InputError
from diffclip.base.statistics import percentiles, resampled_sums
from mllm.pope.questions import SPLITS, Question

if TYPE_CHECKING:
    from PIL.Image import Image

SCORES = ("accuracy", "precision", "recall", "f1", "yes_rate", "invalid_rate")
GREY = "grey"  # what a control of `grey_images` shows


# Parsers: the model's words -> "yes", "no" or "invalid".


def parse_lmms_eval(answer: str) -> str:
    """lmms-eval's rule: the whole answer, stripped and in lower case, is yes or no ("Yes." is invalid)."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else "invalid"


def parse_strict(answer: str) -> str:
    """One word, yes or no, whatever its case and closing punctuation."""
    return parse_lmms_eval(answer.strip().rstrip(".,!"))


def parse_official(answer: str) -> str:
    """The rule of POPE's own script: no if a word of the first sentence is No, no or not; all else is yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


PARSERS: dict[str, Callable[[str], str]] = {
    "lmms_eval": parse_lmms_eval,
    "strict": parse_strict,
    "official": parse_official,
}


def parse(answers: Iterable[str | None], parser: str = "lmms_eval") -> list[str]:
    """Answers as yes, no or invalid by one of `PARSERS`; None, which is no answer, is invalid by each of them."""
    return ["invalid" if answer is None else PARSERS[parser](answer) for answer in answers]


def score(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Scores in [0, 1], yes being the positive class; an invalid prediction is wrong and is no "yes".

    Args:
        predictions: "yes", "no" or "invalid".
        labels: "yes" or "no", one for each prediction.

    Returns:
        accuracy, precision, recall, f1 (0 where undefined), yes_rate and invalid_rate of the predictions, n.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")
    pairs = Counter(zip(predictions, labels))
    true_yes, said_yes = pairs["yes", "yes"], pairs["yes", "yes"] + pairs["yes", "no"]
    is_yes = sum(label == "yes" for label in labels)
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / is_yes if is_yes else 0.0
    return {
        "accuracy": (true_yes + pairs["no", "no"]) / len(labels),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes_rate": said_yes / len(labels),
        "invalid_rate": sum(p not in ("yes", "no") for p in predictions) / len(labels),
        "n": len(labels),
    }


def score_splits(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, dict[str, float]]:
    """`score` for every split that occurs, and under "mean" their plain average."""
    groups: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for question, prediction in zip(questions, predictions, strict=True):
        groups[question.split][0].append(prediction)
        groups[question.split][1].append(question.label)
    table = {split: score(*groups[split]) for split in SPLITS if split in groups}
    mean = {name: sum(row[name] for row in table.values()) / len(table) for name in SCORES}
    return {**table, "mean": {**mean, "n": len(questions)}}


def intervals(
    questions: Sequence[Question],
    predictions: Sequence[str],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Percentile intervals of accuracy and f1 for every split and their mean, resampling images.

    An image's questions stand or fall together, in all splits, so images are drawn and not questions (the cluster
    bootstrap of Davison and Hinkley 1997, section 3.8).

    Returns:
        {split or "mean": {"accuracy" or "f1": (lower, upper)}}.
    """
    import numpy as np

    pictures = {name: i for i, name in enumerate(sorted({q.image for q in questions}))}
    splits = [split for split in SPLITS if any(q.split == split for q in questions)]
    counts = np.zeros(
        (len(pictures), len(splits), 4)
    )  # questions, right, said yes and is yes, said yes or is yes (sum)
    for q, said in zip(questions, predictions, strict=True):
        both = (said == "yes") + (q.label == "yes")
        counts[pictures[q.image], splits.index(q.split)] += (1, said == q.label, both == 2, both)
    drawn = resampled_sums(counts.reshape(len(counts), -1), resamples, seed).reshape(resamples, *counts.shape[1:])
    total, right, both_yes, any_yes = np.moveaxis(drawn, -1, 0)  # (resamples, splits) each
    scores = {"accuracy": right / np.maximum(total, 1), "f1": 2 * both_yes / np.maximum(any_yes, 1)}
    table: dict[str, dict[str, tuple[float, float]]] = {split: {} for split in (*splits, "mean")}
    for name, values in scores.items():
        for split, column in zip((*splits, "mean"), (*values.T, values.mean(1))):
            table[split][name] = percentiles(column, level)
    return table


# Controls: what a score is worth without looking.


def blind(questions: Sequence[Question], folds: int = 5, seed: int = 0) -> list[str]:
    """Predictions of the best rule that sees no image: the usual answer to this question, in this split.

    Images are divided into folds; the answers for one fold come from the others. A question that these never
    ask gets the answer that is more common among them.
    """
    fold_of = fold_of_pictures(questions, folds, seed)
    predictions = [""] * len(questions)
    for fold in range(folds):
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


def fold_of_pictures(questions: Sequence[Question], folds: int, seed: int) -> dict[str, int]:
    """A fold for each image, drawn by the seed."""
    pictures = sorted({q.image for q in questions})
    random.Random(seed).shuffle(pictures)
    return {picture: i % folds for i, picture in enumerate(pictures)}


def grey_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions, each shown with one and the same grey image."""
    return [q._replace(shown=GREY) for q in questions]


def grey_picture() -> "Image":
    """What `grey_images` shows."""
    from PIL import Image

    return Image.new("RGB", (224, 224), (128, 128, 128))


def no_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions, asked without any image."""
    return [q._replace(shown="") for q in questions]


def always_yes(questions: Sequence[Question]) -> list[str]:
    """Predictions of a model that says yes to everything."""
    return ["yes"] * len(questions)


def shuffle_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions shown with other images: no image stays in its place, each is used for another."""
    pictures = sorted({q.image for q in questions})
    if len(pictures) < 2:
        raise InputError("shuffling needs questions about at least two images")
    random.Random(seed).shuffle(pictures)
    other = dict(zip(pictures, [*pictures[1:], pictures[0]]))  # one cycle, so nothing stays in place
    return [q._replace(shown=other[q.image]) for q in questions]
