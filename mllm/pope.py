"""POPE (Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models"): files, scores and
controls. Answers meet labels by (split, picture, question), never by their place in a file: a wrong order of lines
gives a perfect model 50 %, and looks like a model that hallucinates.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from diffclip.errors import InputError

SPLITS = ("random", "popular", "adversarial")
SCORES = ("accuracy", "precision", "recall", "f1", "yes_rate", "invalid_rate")


class Question(NamedTuple):
    """One yes/no question about one picture."""

    split: str  # random, popular or adversarial: how its negatives were chosen
    image: str  # file name of the picture it asks about
    text: str  # without LLaVA's "Answer the question using a single word or phrase."
    label: str  # "yes", "no", or "" where the file has no labels
    question_id: str
    shown: str  # file name of the picture the model sees; differs from `image` only in controls

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a question one and the same in any file."""
        return self.split, self.image, self.text


Keyed = TypeVar("Keyed")


def read(path: str | Path) -> list[Question]:
    """Read POPE questions.

    Args:
        path: a folder with the official three files (one JSON object `{question_id, image, text, label}` a
            line, the split in the file's name), or LLaVA's single JSONL file, whose lines have a `category` and
            no label.

    Raises:
        InputError: a split is missing or there twice, a bad line, an unknown label, a question asked twice.
    """
    path = Path(path)
    if path.is_file():
        questions = list(_lines(path, split=None))
    elif path.is_dir():
        questions = [q for split in SPLITS for q in _lines(_file_of(path, split), split)]
    else:
        raise InputError(f"{path}: no such file or folder; give POPE's folder of three files, or LLaVA's file")
    if not questions:
        raise InputError(f"{path}: holds no questions")
    index(questions, lambda q: q.key, str(path))
    return questions


def index(items: Iterable[Keyed], key: Callable[[Keyed], tuple], name: str) -> dict[tuple, Keyed]:
    """Items by key; InputError if two share one."""
    result: dict[tuple, Keyed] = {}
    for item in items:
        if key(item) in result:
            raise InputError(f"{name}: asked twice: {' | '.join(map(str, key(item)))}; drop one of the lines")
        result[key(item)] = item
    return result


def join(
    questions: Sequence[Question],
    others: Iterable[Keyed],
    key: Callable[[Keyed], tuple] = lambda other: other.key,
    name: str = "the answers",
) -> list[Keyed]:
    """`others` in the order of `questions`, matched by `Question.key`.

    Raises:
        InputError: a key is missing, left over, or there twice.
    """
    found = index(others, key, name)
    wanted = {q.key for q in questions}
    missing, extra = wanted - found.keys(), found.keys() - wanted
    if missing or extra:
        example = " | ".join(map(str, min(missing or extra)))
        raise InputError(
            f"{name} do not fit the questions: {len(missing)} missing, {len(extra)} left over "
            f"(e.g. {example}); use files of one and the same POPE version"
        )
    return [found[q.key] for q in questions]


def with_labels(questions: Sequence[Question], labelled: Iterable[Question]) -> list[Question]:
    """Questions of LLaVA's file with the labels of the official files."""
    matched = join(questions, labelled, name="the labelled files")
    return [q._replace(label=m.label) for q, m in zip(questions, matched)]


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


# Controls: what a score is worth without looking.


def blind(questions: Sequence[Question], folds: int = 5, seed: int = 0) -> list[str]:
    """Predictions of the best rule that sees no picture: the usual answer to this question, in this split.

    Pictures are divided into folds; the answers for one fold come from the others. A question that these never
    ask gets the answer that is more common among them.
    """
    pictures = sorted({q.image for q in questions})
    random.Random(seed).shuffle(pictures)
    fold_of = {picture: i % folds for i, picture in enumerate(pictures)}
    predictions = [""] * len(questions)
    for fold in range(folds):
        votes: dict[tuple[str, ...], int] = Counter()  # yes minus no
        for q in questions:
            if fold_of[q.image] != fold:
                vote = 1 if q.label == "yes" else -1
                votes[q.split, q.text] += vote
                votes[q.split,] += vote
        for i, q in enumerate(questions):
            if fold_of[q.image] == fold:
                usual = votes[q.split, q.text] or votes[q.split,]
                predictions[i] = "yes" if usual >= 0 else "no"
    return predictions


def always_yes(questions: Sequence[Question]) -> list[str]:
    """Predictions of a model that says yes to everything."""
    return ["yes"] * len(questions)


def shuffle_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions shown with other pictures: no picture stays in its place, each is used for another."""
    pictures = sorted({q.image for q in questions})
    if len(pictures) < 2:
        raise InputError("shuffling needs questions about at least two pictures")
    random.Random(seed).shuffle(pictures)
    other = dict(zip(pictures, [*pictures[1:], pictures[0]]))  # one cycle, so nothing stays in place
    return [q._replace(shown=other[q.image]) for q in questions]


def plain(text: str) -> str:
    """A question without LLaVA's instruction on the next line."""
    return text.split("\n")[0].strip()


def _file_of(folder: Path, split: str) -> Path:
    pattern = re.compile(rf"(^|[^a-z]){split}([^a-z]|$)")
    found = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".jsonl") and pattern.search(p.stem)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise InputError(f"{folder}: needs exactly one *{split}*.json file, found {names}")
    return found[0]


def _lines(path: Path, split: str | None) -> Iterator[Question]:
    """Questions of one file; `split` None means that each line has a `category` and may lack a label."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Mapping = json.loads(line)
            question = Question(
                split=split or row["category"],
                image=row["image"],
                text=plain(row["text"]),
                label=row["label"] if split else row.get("label", ""),
                question_id=str(row["question_id"]),
                shown=row["image"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}:{number}: not a POPE question ({error!r}); see mllm.pope.read") from None
        if question.split not in SPLITS:
            raise InputError(f"{path}:{number}: unknown category `{question.split}`; use {', '.join(SPLITS)}")
        if question.label not in ("yes", "no") and (split or question.label):
            raise InputError(f'{path}:{number}: label is `{question.label}`; it must be "yes" or "no"')
        yield question
