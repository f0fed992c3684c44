"""Is a difference between two models more than chance? Over seeds where there are several, else over test items.

With one seed a model the doubt is in the sample of test items; with several it is also in the training, which is the
larger, so that the items are no longer asked.
"""

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from diffclip.base import schema
from diffclip.base.errors import InputError
from diffclip.base.ranges import check_header
from diffclip.base.schema import POPE_SPLITS
from diffclip.base.statistics import (
    bootstrap_mean,
    detectable,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    percentiles,
    resampled_sums,
)
from mllm.pope.parsers import parse
from mllm.pope.questions import Key, read_answers
from stages.report.data import AVERAGED, Arms, RunDir, as_dict, is_number, read_whole, sets_of_average

RESAMPLES = 4000
T = TypeVar("T")


class Difference(NamedTuple):
    """other - first in points, its 95 % interval and p; None, and `why`, where there is no test."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    why: str = ""
    seeds: int = 1  # that the interval is over; of one, it is over test items

    @property
    def smallest(self) -> float | None:
        """The smallest true difference, in points, that a run of this size finds four times in five."""
        if self.low is None or self.high is None or self.low == self.high:
            return None
        return detectable(self.low, self.high, self.seeds - 1 if self.seeds > 1 else None)

    @property
    def significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def difference(arms: Arms, first: str, other: str, key: str) -> Difference:
    """The difference under a metric's key, by the best test that the runs allow; resampled once for all tables."""
    asked = first, other, key
    if asked not in arms.differences:
        arms.differences[asked] = _difference(arms, *asked)
    return arms.differences[asked]


def _difference(arms: Arms, first: str, other: str, key: str) -> Difference:
    differences = paired_differences(arms, first, other, key)
    if not differences:
        return Difference(None, why="no seed that both models have")
    seed, mean = next(iter(differences.items()))
    if len(differences) > 1:
        if len(set(differences.values())) == 1:
            return Difference(mean, why="the differences of all seeds are the same, so they have no spread to test")
        return Difference(*over_seeds(list(differences.values())), seeds=len(differences))
    # the runs whose values `Arms.scores` shows
    ours, theirs = ([r for r in arms.of("evaluate", m, seed) if key in r.metrics][-1] for m in (first, other))
    if key.startswith("pope/"):
        return _pope(ours.path, theirs.path, key, mean)
    if key.startswith("localisation/"):
        return _localisation(ours.path, theirs.path, key, mean)
    return _items(ours, theirs, key, mean)


def paired_differences(arms: Arms, first: str, other: str, key: str) -> dict[str, float]:
    """{seed: other - first, in points} for every seed that both have."""
    a, b = arms.scores(first, key), arms.scores(other, key)
    return {seed: b[seed] - a[seed] for seed in b if seed in a}


def _items(ours: RunDir, theirs: RunDir, key: str, mean: float) -> Difference:
    """Paired bootstrap over the test items of a CLIP benchmark, and McNemar's exact test for right-or-wrong ones."""
    data = [as_dict(run.get("inputs").get("clip_data")).get("digest") for run in (ours, theirs)]
    if data[0] != data[1]:
        return Difference(mean, why="the models were not evaluated on the same items")
    first, second = (outcomes(run.path).get(key) for run in (ours, theirs))
    if first is None or second is None:
        return _average(ours, theirs, key, mean)
    if len(first) != len(second):
        return Difference(mean, why="the models were not evaluated on the same items")
    _, low, high = (100 * v for v in paired_bootstrap(first, second, resamples=RESAMPLES))
    binary = all(np.isin(values, (0, 1)).all() for values in (first, second))
    return Difference(mean, low, high, mcnemar(first, second) if binary else None)


def _once(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """`read` of an evaluate run's folder, remembered until the run writes its metrics anew."""
    remembered = lru_cache(maxsize=64)(lambda folder, stamp: read(folder))

    @wraps(read)
    def reader(folder: Path) -> T:
        metrics = folder / schema.METRICS
        return remembered(folder.resolve(), metrics.stat().st_mtime_ns if metrics.exists() else 0)

    return reader


def _average(ours: RunDir, theirs: RunDir, key: str, mean: float) -> Difference:
    """The average over sets: the items of each set are resampled on their own, and the sets' means averaged."""
    sets = sets_of_average(theirs.metrics, key) if key in AVERAGED else []
    first, second = outcomes(ours.path), outcomes(theirs.path)
    differences = [second[k] - first[k] for k in sets if k in first and k in second and len(first[k]) == len(second[k])]
    if not sets or len(differences) < len(sets):
        return Difference(mean, why="outcomes of single items are not stored for it")
    generator = np.random.default_rng(0)
    drawn = np.zeros(RESAMPLES)
    for values in differences:
        drawn += resampled_sums(values[:, None], RESAMPLES, generator)[:, 0] / len(values) / len(sets)
    return Difference(mean, *percentiles(100 * drawn))


@_once
def outcomes(folder: Path) -> dict[str, np.ndarray]:
    """{key of a score: one number per test item} of an evaluate run; {} if it stored none that can be read."""
    file = folder / schema.CLIP_OUTCOMES
    try:
        check_header(file)
        return {key: value.astype(np.float64) for key, value in load_file(file).items()}
    except (OSError, SafetensorError, ValueError, TypeError, InputError):
        return {}


def items(arms: Arms, key: str) -> int | None:
    """How many test items a score of one seed rests on, an average on those of its sets; None where no run says so."""
    for model in arms.models:
        for run in reversed(arms.of("evaluate", model)):
            counted = _counted(run, key)
            if counted is not None:
                return counted
    return None


def _counted(run: RunDir, key: str) -> int | None:
    group, _, rest = key.partition("/")
    if group.startswith("pope"):
        splits = POPE_SPLITS if rest.startswith("mean/") else (rest.partition("/")[0],)
        counts = [run.metrics.get(f"pope/{split}/questions") for split in splits]
    elif group == "localisation":
        counts = [run.metrics.get("localisation/objects")]
    else:
        sets = sets_of_average(run.metrics, key) if key in AVERAGED else [key]
        stored = outcomes(run.path)
        counts = [len(stored[name]) if name in stored else None for name in sets]
    whole = [int(count) for count in counts if is_number(count) and count > 0]
    return sum(whole) if whole and len(whole) == len(counts) else None


# --- POPE: answers met by `Question.key` ------------------------------------------------------------------------


class Answers(NamedTuple):
    """One split, both models on the same questions, in one order."""

    first: np.ndarray  # right or wrong
    second: np.ndarray
    images: np.ndarray  # number of each question's image

    def interval(self) -> tuple[float, float]:
        """95 % interval of second - first in points, resampling images: their questions are not independent."""
        difference = 100 * (self.second.astype(float) - self.first)
        return bootstrap_mean(difference, self.images, resamples=RESAMPLES)[1:]


@_once
def pope_answers(folder: Path) -> dict[Key, bool]:
    """{question: right} of the model's own pass; anything but yes or no is wrong, as in lmms-eval."""
    try:
        answers = read_answers(folder / schema.POPE / schema.ANSWERS)
    except InputError:  # none, or damaged
        return {}
    return {answer.key: parse([answer.text]) == [answer.question.label] for answer in answers}


def paired_answers(first: Path, second: Path, split: str) -> Answers | None:
    """Both models' answers to a split ("mean": to all); None if they were not asked the same questions."""
    ours, theirs = pope_answers(first), pope_answers(second)
    splits = POPE_SPLITS if split == "mean" else (split,)
    keys = [key for key in ours if key[0] in splits]
    if not keys or set(keys) != {key for key in theirs if key[0] in splits}:
        return None
    _, images = np.unique([key[1] for key in keys], return_inverse=True)
    return Answers(np.array([ours[k] for k in keys]), np.array([theirs[k] for k in keys]), images)


def _pope(first: Path, second: Path, key: str, mean: float) -> Difference:
    """Bootstrap over images, McNemar's exact test."""
    split, name = key.split("/")[1:3]
    if name != "accuracy":
        return Difference(mean, why="only accuracies of POPE are tested, since they are means over questions")
    answers = paired_answers(first, second, split)
    if answers is None:
        return Difference(mean, why="pope/answers.jsonl with the same questions is not in both runs")
    if not math.isclose(100 * (answers.second.mean() - answers.first.mean()), mean, abs_tol=0.05):
        return Difference(mean, why="the stored answers do not give the stored scores")
    # the yes-questions of the mean stand in every split, so that it has no independent pairs to count
    return Difference(mean, *answers.interval(), None if split == "mean" else mcnemar(answers.first, answers.second))


# --- localisation: scores of single objects -------------------------------------------------------------------------


@_once
def object_scores(folder: Path) -> tuple[tuple[tuple[str, str], ...], dict[str, np.ndarray]]:
    """((image, object) of every item, {score: one number per item, NaN where there is none})."""
    record = as_dict(read_whole(folder / schema.LOCALISATION, []))
    images, objects = (_list(record.get(name)) for name in ("pictures", "objects"))
    items = tuple((str(image), str(name)) for image, name in zip(images, objects))
    scores = {
        name: np.array([float(v) if is_number(v) else math.nan for v in _list(values)])
        for name, values in as_dict(record.get("scores")).items()
        if len(_list(values)) == len(items)
    }
    return items, scores


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _localisation(first: Path, second: Path, key: str, mean: float) -> Difference:
    """Bootstrap over images."""
    (items, ours), (others, theirs) = object_scores(first), object_scores(second)
    name = key.split("/")[1]
    if not items or items != others or name not in ours or name not in theirs:
        return Difference(mean, why="scores of the same objects are not stored for both models (localisation.json)")
    differences = theirs[name] - ours[name]
    known = ~np.isnan(differences)
    _, images = np.unique([image for image, _ in items], return_inverse=True)
    return Difference(mean, *bootstrap_mean(differences[known], images[known], resamples=RESAMPLES)[1:])
