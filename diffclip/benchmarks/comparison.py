"""Models side by side: mean and standard deviation over seeds, and which differences are more than chance.

A seed here is one that a model was pretrained with; the images and the few-shot episodes are the same for all. With
one seed a model the doubt is in the sample of test items, with several also in the training, and it is the larger.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from diffclip.base.schema import RECORD
from diffclip.base.statistics import mcnemar, over_seeds, paired_bootstrap

# ends of the names of scores that are compared
COMPARED = ("top1", "R@1", "R@5", "R@10", "accuracy", "average", "average_with_base", "average7")

Scores = Mapping[str, float]
Outcomes = Mapping[str, np.ndarray]


def model_groups(sources: Sequence[str]) -> dict[str, list[str]]:
    """Read `--model`: PATH, or NAME=PATH,PATH,... for the seeds of one model, as many for each, in the same order."""
    plain = [source for source in sources if "=" not in source or Path(source).exists()]
    named = dict(zip(plain, model_names(plain)))
    groups: dict[str, list[str]] = {}
    for source in sources:
        name, _, paths = (named[source], "", source) if source in named else source.partition("=")
        if name in groups:
            raise InputError(f"--model: two models are called {name}; write NAME=PATH to name them")
        groups[name] = [source] if source in named else paths.split(",")
    counts = {len(paths) for paths in groups.values()}
    if len(counts) > 1:
        raise InputError("--model: all models need the same number of seeds, since differences are taken seed by seed")
    return groups


def model_names(sources: Sequence[str]) -> list[str]:
    """A name for each model: the one in its run.json, else the last part of its path.

    Those that would be called alike are told apart by where their paths differ, as clip and diffclip are in
    runs/clip/pretrain and runs/diffclip/pretrain. InputError: the same model twice, or names that stay alike.
    """
    paths = [Path(os.path.realpath(source)) for source in sources]
    recorded = [_recorded_name(path) for path in paths]
    names = [name or path.name for name, path in zip(recorded, paths)]
    distinct = list(names)
    for row, name in enumerate(names):
        alike = [path.parts for path, other in zip(paths, names) if other == name]
        if len(alike) > 1:
            start = _in_common(alike)
            end = _in_common([parts[start:][::-1] for parts in alike])
            if start + end == min(map(len, alike)):  # one path is the beginning of another
                start -= 1
            differs = "-".join(paths[row].parts[start : len(paths[row].parts) - end])
            distinct[row] = "-".join(part for part in (recorded[row], differs) if part) or name
    if len(set(distinct)) < len(distinct):
        twice = next(name for name in distinct if distinct.count(name) > 1)
        raise InputError(f"two models are called {twice}: give each once, or NAME=PATH where the command takes that")
    return distinct


def _in_common(rows: Sequence[Sequence[str]]) -> int:
    """How many first parts all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))


def _recorded_name(path: Path) -> str:
    """The model's name that a run directory records, "" elsewhere."""
    if not (path / RECORD).is_file():
        return ""
    record = read_json(path / RECORD)
    return Path(str(record.get("model") or "")).name if isinstance(record, dict) else ""


def compare(scores: Mapping[str, Sequence[Scores]], outcomes: Mapping[str, Sequence[Outcomes]]) -> list[list[str]]:
    """Return a head and one row a score: the models' scores in percent, and after each model its lead on the first.

    One seed: the difference in points, its 95 % interval (paired bootstrap over test items), and for right-or-wrong
    items McNemar's p. Several: mean and sample standard deviation, and the 95 % interval of the mean difference of
    seeds (t distribution). "n.s." where the interval holds zero.
    """
    (reference, first), *others = scores.items()
    rows = [["percent", reference, *(cell for name, _ in others for cell in (name, f"{name} - {reference}"))]]
    for key in first[0]:
        if key.rsplit("/", 1)[-1] not in COMPARED:
            continue
        cells = [key, _mean_sd([seed[key] for seed in first])]
        for name, seeds in others:
            if len(seeds) > 1:
                lead = _interval(*over_seeds([b[key] - a[key] for a, b in zip(first, seeds)])[:3])
            else:
                lead = _of_items(outcomes[reference][0].get(key), outcomes[name][0].get(key))
            cells += [_mean_sd([seed[key] for seed in seeds]), lead]
        rows.append(cells)
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows of `compare` as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def _of_items(first: np.ndarray | None, second: np.ndarray | None) -> str:
    if first is None or second is None:  # an average of scores has no items of its own
        return ""
    text = _interval(*(100 * value for value in paired_bootstrap(first, second)))
    binary = all(np.isin(values, (0, 1)).all() for values in (first, second))
    return f"{text} p={mcnemar(first, second):.2g}" if binary else text


def _interval(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{' n.s.' if low <= 0 <= high else ''}"


def _mean_sd(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean
