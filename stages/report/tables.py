"""Every score that was written, by benchmark, with the differences between the models and what they are worth."""

import re
import textwrap

from diffclip.base.schema import POPE_SPLITS
from diffclip.benchmarks import PROTOCOLS
from stages.report.cells import DASH, MINUS, Table, distinct, number, p_value, percent, score
from stages.report.chair import KEY as CHAIR_KEYS
from stages.report.data import Arms, is_number, mean_sd
from stages.report.layout import SHIFTS, SIGN, six_tasks
from stages.report.pope import POPE_KEYS, SPLITS
from stages.report.significance import difference, items, paired_differences
from stages.report.tasks import KEY as TASK_KEYS

SMALLEST = "smallest to be shown"
LABEL = 24  # characters of a row's name on the console
PAPER_ORDER = ("linear_probe", "few_shot", "zero_shot", "retrieval", "shift", "mmvp")  # other protocols stand behind
# (heading, pattern of the metric's key, whether its absence is worth a line). The pattern's groups make the row's
# name; a key without any is an average.
SECTIONS = (
    *(
        (heading, pattern, name in PAPER_ORDER)
        for name in dict.fromkeys((*PAPER_ORDER, *PROTOCOLS))
        for heading, pattern in PROTOCOLS[name].tables.items()
    ),
    ("POPE, accuracy", r"pope/(random|popular|adversarial|mean)/accuracy", True),
    ("POPE, F1", r"pope/(random|popular|adversarial|mean)/f1", False),
)


def comparison_keys(arms: Arms) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(heading, [(key, row name)])] of what the paper's tables hold; headings without a number stay, empty."""
    sections = []
    for heading, pattern, expected in SECTIONS:
        matches = [(k, m) for k in arms.metric_names() if (m := re.fullmatch(pattern, k))]
        rows = [(k, ", ".join(g for g in m.groups() if g) or "average") for k, m in matches]
        if rows or expected:
            sections.append((heading, sorted(rows, key=lambda row: _place(row[1]))))
    return sections


def _place(name: str) -> tuple:
    """Published order of POPE's splits and of the shifts, R@10 after R@5, else by name; averages last."""
    known = (*POPE_SPLITS, *SHIFTS)
    short = name.removeprefix("imagenet-")
    fixed = known.index(short) if short in known else len(known)
    return name.startswith(("average", "mean")), fixed, re.sub(r"\d+", lambda digits: digits[0].zfill(4), name)


def comparison(arms: Arms) -> Table:
    """Benchmarks by models, and each model's difference from the first, paired by seed, with what it is worth."""
    first, *others = arms.models
    table = Table(["Benchmark", *arms.models], name="scores", title="All scores")
    table.caption = "Percentages; higher is better. Differences are in percentage points."
    for other in others:
        table.columns += [f"{other} {MINUS} {first}", "95 % interval", "p", SMALLEST]
    table.columns.append("test items")
    for heading, keys in comparison_keys(arms):
        table.rows.append([heading])
        group = {h: pattern for h, pattern, _ in SECTIONS}[heading].split("/")[0]
        for key, label in keys or [(f"{group}/", "(no numbers)")]:
            cells = [score(arms, table, model, key) for model in arms.models]
            for other in others:
                cells += [*difference_cells(arms, table, first, other, key), smallest(arms, first, other, key)]
            table.rows.append([label, *cells, counted(arms, key)])
    return table


def result(arms: Arms) -> Table:
    """The six tasks and POPE, a row each, with what their differences are worth."""
    first, *others = arms.models
    table = Table(["", *arms.models], name="summary", title="Six tasks and POPE")
    for other in others:
        table.columns += [f"{other} {MINUS} {first}", "95 % interval", SMALLEST]
    table.columns.append("test items")
    for title, key in [*six_tasks(arms), ("POPE", "pope/mean/accuracy")]:
        cells = [score(arms, table, model, key) for model in arms.models]
        for other in others:
            cells += [*difference_cells(arms, table, first, other, key)[:2], smallest(arms, first, other, key)]
        table.rows.append([title, *cells, counted(arms, key)])
    table.caption = "Percentages, averaged over sets and splits; retrieval is R@5."
    if others:
        table.caption += (
            f" {SMALLEST.capitalize()} is the true difference, in points, that a comparison of this size finds four "
            "times in five: a smaller one may be there and not show."
        )
    return table


def headline(arms: Arms) -> str:
    """The result in one sentence."""
    first, *others = arms.models
    rows = [*six_tasks(arms), ("POPE", "pope/mean/accuracy")]
    parts = []
    for other in others:
        tests = [(title, difference(arms, first, other, key)) for title, key in rows]
        known = [(title, test) for title, test in tests if test.mean is not None]
        shown = {sign: [t for t, d in known if d.significant and (d.mean or 0) * sign > 0] for sign in (1, -1)}
        words = [f"{word} on {_listed(shown[sign])}" for sign, word in ((1, "better"), (-1, "worse")) if shown[sign]]
        open_ = len(known) - len(shown[1]) - len(shown[-1])
        if not known:
            parts.append(f"{other} and {first} have no score of the six tasks and POPE in common yet")
        elif not words:
            parts.append(f"no difference between {other} and {first} is shown on any of {len(known)} tasks")
        else:
            rest = f"; on the other {open_} of {len(known)} no difference is shown" if open_ else ""
            parts.append(f"{other} is {' and '.join(words)} than {first}{rest}")
    if not parts:
        return f"{first} stands alone, so nothing is compared."
    one_seed = all(difference(arms, first, other, key).seeds == 1 for other in others for _, key in rows)
    return f"{'On the test items of one seed' if one_seed else 'Over the seeds'}, {'; '.join(parts)}."


def _listed(names: list[str]) -> str:
    names = [name if name.isupper() else name[0].lower() + name[1:] for name in names]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def smallest(arms: Arms, first: str, other: str, key: str) -> str:
    """The cell of the smallest difference that could have been shown."""
    found = difference(arms, first, other, key).smallest
    return DASH if found is None else f"{found:.1f}"


def counted(arms: Arms, key: str) -> str:
    """The cell of how many test items a score rests on."""
    found = items(arms, key)
    return DASH if found is None else number(found)


def for_console(arms: Arms) -> Table:
    """The comparison in at most 80 columns: a difference with its interval for two models, a star for more."""
    first, *others = arms.models
    table = Table(["", *(model.replace("-", "-\n") for model in arms.models)])
    if len(others) == 1:
        table.columns.append("difference\n[95 % interval]")
    for heading, keys in comparison_keys(arms):
        table.rows.append([textwrap.fill(heading, LABEL)])
        for key, label in keys:
            cells = [score(arms, table, model, key) for model in arms.models]
            tests = {other: difference(arms, first, other, key) for other in others}
            stars = {other: SIGN if test.significant else "" for other, test in tests.items()}
            if len(others) == 1:
                test = tests[others[0]]
                ends = f" [{_points(test.low)}, {_points(test.high)}]" if test.low is not None else ""
                cells.append(DASH if test.mean is None else f"{_points(test.mean)}{ends}{stars[others[0]]}")
            else:
                cells = [cell + stars.get(model, "") for model, cell in zip(arms.models, cells)]
            table.rows.append([textwrap.fill(label, LABEL), *cells])
        if not keys:
            table.rows.append(["(no numbers)", *[DASH] * (len(table.columns) - 1)])
    if others:
        table.caption = f"{SIGN} the 95 % interval of the difference from {first} leaves zero out."
    return table


def _points(value: float | None) -> str:
    return DASH if value is None else percent([value], sign=True)


def difference_cells(arms: Arms, table: Table, first: str, other: str, key: str) -> list[str]:
    """Three cells: the differences of the seeds, the interval, its p; where there is no test a note says why."""
    differences = paired_differences(arms, first, other, key)
    if not differences:
        return [DASH, DASH, DASH]
    mean = percent(differences.values(), sign=True)
    test = difference(arms, first, other, key)
    if test.low is None or test.high is None:
        return [mean, table.missing(test.why), DASH]
    ends = f"[{percent([test.low], sign=True)}, {percent([test.high], sign=True)}]"
    return [mean, ends if test.significant else f"{ends} n.s.", DASH if test.p is None else p_value(test.p)]


def tally(arms: Arms) -> list[str]:
    """For each model but the first: on how many single scores it is higher or lower, and of how many that is shown."""
    first, *others = arms.models
    rows = [row for _, rows in comparison_keys(arms) for row in rows]
    keys = [key for key, label in rows if not label.startswith(("average", "mean"))]
    sentences = []
    for other in others:
        every = [difference(arms, first, other, key) for key in keys]
        tests = [(test.mean, test.significant) for test in every if test.mean is not None]
        higher = [significant for mean, significant in tests if mean > 0]
        lower = [significant for mean, significant in tests if mean < 0]
        sentences.append(
            f"Of {len(tests)} scores, {other} is higher than {first} on {len(higher)} (on {sum(higher)} of them the "
            f"95 % interval leaves zero out) and lower on {len(lower)} (on {sum(lower)})."
            if tests
            else f"{other} and {first} have no score in common yet."
        )
    return [*sentences, "By chance alone one interval in twenty leaves zero out."] if sentences else []


def evidence(arms: Arms) -> str:
    """What the number of seeds allows to be said about differences."""
    if len(arms.models) < 2:
        return "There is one model, so nothing is compared."
    evaluated = [{r.seed for r in arms.of("evaluate", model) if r.metrics} for model in arms.models]
    common = min(len(evaluated[0] & other) for other in evaluated[1:])
    if common == 0:
        return "Not every model has been evaluated at a seed that the first model has, so the comparison has gaps."
    if common == 1:
        return (
            "With one seed, the differences between the arms are not significant evidence: another seed may turn "
            "their sign. The intervals are over test items only and know nothing of that. Run at least three seeds "
            "before reading anything into them."
        )
    return (
        "Scores are mean ± sample standard deviation over seeds; a difference is taken seed by seed, then averaged, "
        "and its interval is that of Student's t over the seeds. Where it holds zero (n.s.), nothing is shown."
    )


def others(arms: Arms) -> Table:
    """Numbers of the evaluate runs that no other table shows, as they were written."""
    known = {key for _, keys in comparison_keys(arms) for key, _ in keys}
    known |= {pattern.format(split) for pattern in POPE_KEYS for split in SPLITS}
    known |= {f"localisation/{name}" for name in ("pointing", "energy", "precision", "area", "objects")}
    table = Table(["Metric", *arms.models], name="others", title="Other numbers")
    table.caption = "Whatever else the evaluate runs wrote, as it stands there."
    shown = re.compile(f"{CHAIR_KEYS}|{TASK_KEYS}")
    for key in sorted(k for k in arms.metric_names() if k not in known and not shown.fullmatch(k)):
        cells = []
        for model in arms.models:
            values = list(arms.written(model, key).values())
            numbers = [v for v in values if is_number(v)]
            mean, sd = mean_sd(numbers) if numbers and len(numbers) == len(values) else (None, None)
            text = distinct(map(str, values)) if mean is None else f"{mean:.4g}"
            cells.append(text if sd is None else f"{text} ± {sd:.2g}")
        table.rows.append([key, *cells])
    return table
