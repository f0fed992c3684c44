"""POPE with its controls: does a model see an object, or guess from its name? Is one model better than another?"""

import itertools
import math

from diffclip.base.schema import POPE_SPLITS
from diffclip.base.statistics import mcnemar
from stages.report.cells import DASH, Table, distinct, number, p_value, percent, score
from stages.report.data import Arms, is_number, mean_sd
from stages.report.significance import paired_answers

SPLITS = (*POPE_SPLITS, "mean")
CONTROLS = {
    "pope_blind": "blind rule",
    "pope_shuffled": "images shuffled",
    "pope_grey": "images grey",
    "pope_no_image": "no image",
}
# (row, pattern of the key, None or why it would be absent)
POPE_ROWS = (
    ("accuracy", "pope/{}/accuracy", None),
    ("precision", "pope/{}/precision", None),
    ("recall", "pope/{}/recall", None),
    ("F1", "pope/{}/f1", None),
    ("yes rate", "pope/{}/yes_rate", None),
    ("invalid rate", "pope/{}/invalid_rate", None),
    *((f"{label} (control)", f"{group}/{{}}/accuracy", label) for group, label in CONTROLS.items()),
    ("always yes (control)", "pope_always_yes/{}/accuracy", "always yes"),
    ("yes rate, images shuffled", "pope_shuffled/{}/yes_rate", None),
    ("yes rate, images grey", "pope_grey/{}/yes_rate", None),
    ("yes rate, no image", "pope_no_image/{}/yes_rate", None),
    ("exact scoring: accuracy", "pope_margin/{}/accuracy", "exact scoring by the margin of yes over no"),
    ("exact scoring: threshold tuned", "pope_margin/{}/accuracy_tuned", None),
    ("exact scoring: area under ROC", "pope_margin/{}/auc", None),
    ("exact scoring: average precision", "pope_margin/{}/ap", None),
)
ENDS = ("low", "high")  # of an interval, behind the measure
POPE_KEYS = (*(pattern for _, pattern, _ in POPE_ROWS), "pope/{}/questions")
POPE_KEYS += tuple(f"pope/{{}}/{measure}_{end}" for measure in ("accuracy", "f1") for end in ENDS)


def pope(arms: Arms) -> Table:
    """Every POPE measure and control, split by split, below each model's name."""
    table = Table(["", *SPLITS], name="pope", title="POPE with its controls")
    absent, rows = [], []
    for row in POPE_ROWS:
        written = any(arms.scores(model, row[1].format(split)) for model in arms.models for split in SPLITS)
        if written or row[1] in ("pope/{}/accuracy", "pope_blind/{}/accuracy", "pope_shuffled/{}/accuracy"):
            rows.append(row)
        elif row[2]:
            absent.append(row[2])
    for model in arms.models:
        table.rows.append([model])
        for label, pattern, _ in rows:
            table.rows.append([label, *(score(arms, table, model, pattern.format(split)) for split in SPLITS)])
            if pattern.startswith("pope/") and (ends := interval(arms, model, pattern)):
                table.rows.append([f"{label}, 95 % interval", *(ends.get(split, DASH) for split in SPLITS)])
        counts = [arms.written(model, f"pope/{split}/questions").values() for split in SPLITS]
        table.rows.append(["questions", *(distinct(map(number, c)) for c in counts)])
    table.caption = "Percentages; yes is the positive class, and an answer that is neither yes nor no is wrong."
    if absent:
        table.caption += f" Absent, since no evaluate run wrote it: {', '.join(absent)}."
    return table


def interval(arms: Arms, model: str, pattern: str) -> dict[str, str]:
    """{split: interval of the score} of a model with one seed, as far as written; with several, the ± says more."""
    intervals = {}
    for split in SPLITS:
        low, high = (arms.scores(model, f"{pattern.format(split)}_{end}").values() for end in ENDS)
        if len(low) == len(high) == 1:
            intervals[split] = f"[{percent(low)}, {percent(high)}]"
    return intervals


def pope_pairs(arms: Arms) -> Table | None:
    """Two models on the same questions: who was right where, McNemar's test; None if no two can be paired."""
    first, *others = arms.models
    columns = ["", "questions", "both right", f"only {first}", "only the other", "both wrong"]
    columns += ["difference", "95 % interval", "p"]
    table = Table(columns, name="pope-pairs", title="POPE, question by question")
    for other, seed in itertools.product(others, arms.seeds(first)):
        runs = [run for m in (first, other) for run in arms.of("evaluate", m, seed)[-1:]]
        rows = []
        for split in POPE_SPLITS:
            answers = paired_answers(runs[0].path, runs[1].path, split) if len(runs) == 2 else None
            if answers is not None:
                a, b = answers.first, answers.second
                counts = [len(a), (a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()]
                differences = (100 * (b.mean() - a.mean()), *answers.interval())
                mean, low, high = (percent([v], sign=True) for v in differences)
                p = p_value(mcnemar(a, b))
                rows.append([split, *(f"{int(c):,}" for c in counts), mean, f"[{low}, {high}]", p])
        table.rows += [[f"{other} against {first}, seed {seed}"], *rows] if rows else []
    table.caption = (
        "p is McNemar's exact test on the questions that just one of the two gets right; the interval resamples "
        "images, since the questions about one image are not independent. Both know nothing of other seeds."
    )
    return table if table.rows else None


def pope_verdict(arms: Arms, model: str) -> tuple[bool | None, str]:
    """(whether the model uses the image, None if that cannot be told; the sentence that says so).

    The mean accuracy must exceed both controls, and the blind one by two standard errors of a proportion over
    one split's questions (the splits share their positive questions, so they do not add up to more).
    """
    accuracy = arms.scores(model, "pope/mean/accuracy")
    blind = arms.scores(model, "pope_blind/mean/accuracy")
    shuffled = arms.scores(model, "pope_shuffled/mean/accuracy")
    seeds = [s for s in accuracy if s in blind]
    if not accuracy:
        return None, f"{model}: no POPE numbers for all three splits, so nothing is said about its use of the image."
    if not seeds:
        return None, f"{model}: no blind control, so it cannot be told whether it uses the image."
    ours, rule = (mean_sd([values[s] for s in seeds])[0] for values in (accuracy, blind))
    numbers = f"accuracy {ours:.1f} against {rule:.1f} for the best rule without the image"
    mixed = [shuffled[s] for s in seeds if s in shuffled]
    if mixed:
        numbers += f" and {mean_sd(mixed)[0]:.1f} with the images shuffled"
    if ours <= rule or (mixed and ours <= mean_sd(mixed)[0]):
        return False, f"{model} does not use the image: {numbers} (mean of the splits)."
    counts = [arms.written(model, f"pope/{split}/questions") for split in POPE_SPLITS]
    questions = min(sum(c[s] for s in seeds if is_number(c.get(s))) for c in counts)
    if questions > 0 and ours - rule < 2 * math.sqrt(ours * (100 - ours) / questions):
        return None, (
            f"{model}: {numbers}; over {questions:,} questions a split that lead is within sampling noise, so it is "
            "not shown that the model uses the image."
        )
    return True, f"{model} uses the image: {numbers} (mean of the splits)."
