"""Tables 1 to 5 and the six tasks as the paper lays them out: a model a row, a benchmark a column, deltas in brackets.

Sets that the paper has stand under its names and in its order, others behind them by their own.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from diffclip.base.schema import POPE_SPLITS
from stages.report.cells import DASH, Table, distinct, number, percent, score
from stages.report.data import Arms
from stages.report.paper import PAPER_SETS
from stages.report.significance import difference, items

SHIFTS = ("v2", "a", "r", "sketch")  # in the paper's order, whatever was shifted
NONE = "(no set)"  # a column where there is nothing to show
SIGN = "*"  # behind a difference whose 95 % interval leaves zero out


class Column(NamedTuple):
    """A column of scores under the metric `key`, which ends in "/" where no run wrote one of this kind."""

    title: str
    key: str


def sets_of(arms: Arms, pattern: str, published: dict[str, str], average: str) -> list[Column]:
    """The columns of a group: every set that `pattern` finds, the paper's first, then their average."""
    named = {m[1] or "": key for key in arms.metric_names() if (m := re.fullmatch(pattern, key)) and m[1] != "average"}
    order = [*(name for name in published if name in named), *(n for n in named if n not in published)]
    columns = [Column(published.get(name, name or "held-out pairs"), named[name]) for name in order]
    if len(columns) > 1:
        columns.append(Column("Avg.", average))
    return columns or [Column(NONE, f"{pattern.split('/')[0]}/")]


def rows_of(arms: Arms, table: Table, columns: Sequence[Column]) -> list[list[str]]:
    """One row a model: score, and from the second model on the difference from the first in brackets."""
    return [[model, *(cell(arms, table, model, column.key) for column in columns)] for model in arms.models]


def table_of(arms: Arms, name: str, title: str, columns: Sequence[Column]) -> Table:
    table = Table(["Model", *(column.title for column in columns)], name=name, title=title)
    table.rows = [*rows_of(arms, table, columns), *items_row(arms, columns)]
    return table


def items_row(arms: Arms, columns: Sequence[Column]) -> list[list[str]]:
    """A row of how many test items each column's scores rest on; none where no run says so."""
    counts = [items(arms, column.key) for column in columns]
    return [["test items", *(DASH if n is None else number(n) for n in counts)]] if any(counts) else []


def cell(arms: Arms, table: Table, model: str, key: str) -> str:
    """ "61.3 (+1.3*)", "61.3 ± 0.4 (+1.3)", or a dash with a note."""
    return score(arms, table, model, key) + delta(arms, model, key)


def delta(arms: Arms, model: str, key: str) -> str:
    """ " (+1.3*)": how far a model is from the first; "" for the first itself and where they have no seed in common."""
    first = arms.models[0]
    if model == first or (found := difference(arms, first, model, key)).mean is None:
        return ""
    return f" ({percent([found.mean], sign=True)}{SIGN if found.significant else ''})"


def absent(published: dict[str, str], columns: Sequence[Column]) -> str:
    """Which of the paper's sets are not among the columns, in a sentence."""
    missing = [name for name in published.values() if name not in [column.title for column in columns]]
    if len(missing) == len(published) > 1:
        return f"None of the paper's sets ({', '.join(missing)}) was evaluated here."
    return f"Not evaluated here: {', '.join(missing)}." if missing else ""


def table1(arms: Arms) -> Table:
    """Linear probing and few-shot classification."""
    published = PAPER_SETS["classification"]
    groups = [
        ("Linear probing", sets_of(arms, r"linear_probe/(.+)/accuracy", published, "linear_probe/average/accuracy")),
        ("Few-shot", sets_of(arms, r"few_shot/(.+)/accuracy", published, "few_shot/average/accuracy")),
    ]
    titles = list(dict.fromkeys(c.title for _, columns in groups for c in columns if c.title not in ("Avg.", NONE)))
    titles = titles or [NONE]
    if any(c.title == "Avg." for _, columns in groups for c in columns):
        titles.append("Avg.")
    table = Table(["Model", *titles], name="table1", title="Table 1. Classification: linear probing and few-shot")
    for heading, columns in groups:
        by_title = {c.title: c for c in columns}
        kind = columns[0].key.split("/")[0]
        table.rows.append([heading])
        every = [by_title.get(t, Column(t, f"{kind}/{t}/accuracy")) for t in titles]
        table.rows += [*rows_of(arms, table, every), *items_row(arms, every)]
    table.caption = captioned("Accuracy in percent.", arms, absent(published, groups[0][1]))
    return table


def table2(arms: Arms) -> Table:
    """Retrieval at 5 and zero-shot classification."""
    ways = [("Image retrieval (R@5)", "text_to_image"), ("Text retrieval (R@5)", "image_to_text")]
    published = PAPER_SETS["retrieval"]
    groups = [
        (heading, sets_of(arms, rf"retrieval/(?:(.+)/)?{way}/R@5", published, f"retrieval/average/{way}/R@5"))
        for heading, way in ways
    ]
    zero = sets_of(arms, r"zero_shot/(.+)/top1", PAPER_SETS["zero_shot"], "zero_shot/average/top1")
    groups.append(("Zero-shot", zero))
    columns = [c for _, group in groups for c in group]
    table = table_of(arms, "table2", "Table 2. Retrieval and zero-shot classification", columns)
    table.groups = [("", 1), *((heading, len(group)) for heading, group in groups)]
    directions = "Image retrieval is text to image, text retrieval image to text; R@1 and R@10 are among all scores."
    missing = (absent(published, groups[0][1]), absent(PAPER_SETS["zero_shot"], zero))
    table.caption = captioned(directions, arms, *missing)
    return table


def table3(arms: Arms) -> Table:
    """POPE: accuracy, precision and recall of each model, split by split."""
    measures = ("accuracy", "precision", "recall")
    columns = [measure.capitalize() for measure in measures]
    columns = [*columns * len(arms.models), "Questions"]
    table = Table(["POPE", *columns], name="table3", title="Table 3. POPE object hallucination")
    table.groups = [("", 1), *((model, len(measures)) for model in arms.models), ("", 1)]
    for split in (*POPE_SPLITS, "mean"):
        keys = [f"pope/{split}/{measure}" for measure in measures]
        cells = [cell(arms, table, model, key) for model in arms.models for key in keys]
        asked = items(arms, f"pope/{split}/accuracy")
        table.rows.append([split.capitalize(), *cells, DASH if asked is None else number(asked)])
    table.caption = captioned("The mean row is not in the paper.", arms)
    return table


def table4(arms: Arms) -> Table:
    """Distribution shifts, the numbers behind figure 3."""
    columns = shift_columns(arms)
    table = table_of(arms, "table4", "Table 4. Zero-shot accuracy out of distribution", columns)
    missing = absent(PAPER_SETS["shifts"], columns)
    table.caption = captioned("Top-1 in percent: the numbers behind Figure 3.", arms, missing)
    return table


def shift_columns(arms: Arms) -> list[Column]:
    """ImageNet itself where it was evaluated, its shifted versions, their average."""
    base = [Column("ImageNet", "zero_shot/imagenet/top1")] if "zero_shot/imagenet/top1" in arms.metric_names() else []
    shifts = sets_of(arms, r"shift/(.+)/top1", PAPER_SETS["shifts"], "shift/average")
    place = {f"shift/{prefix}{name}/top1": i for i, name in enumerate(SHIFTS) for prefix in ("", "imagenet-")}
    shifts.sort(key=lambda c: (c.title == "Avg.", place.get(c.key, len(SHIFTS))))
    with_base = "shift/average_with_base"
    more = [Column("Avg. with its base", with_base)] if with_base in arms.metric_names() else []
    return [*base, *shifts, *more]


def table5(arms: Arms) -> Table:
    """All variants on the six tasks, the numbers behind figures 1 and 5."""
    table = table_of(arms, "table5", "Table 5. Variants on the six tasks", six_tasks(arms))
    table.columns.insert(1, "Parameters")
    for row in table.rows[len(arms.models) :]:
        row.insert(1, "")
    for model, row in zip(arms.models, table.rows):
        sizes = [number(r.record["parameters"]) for r in arms.latest("pretrain", model) if "parameters" in r.record]
        row.insert(1, distinct(sizes) if sizes else table.missing(f"no pretrain run of {model} was found"))
    table.caption = captioned("The numbers behind Figures 1 and 5.", arms)
    return table


def six_tasks(arms: Arms) -> list[Column]:
    """Linear probing, few-shot, image and text retrieval, zero-shot and shifts: one score each, averaged over sets."""
    tasks = (
        ("Linear probing", r"linear_probe/(.+)/accuracy", "linear_probe/average/accuracy"),
        ("Few-shot", r"few_shot/(.+)/accuracy", "few_shot/average/accuracy"),
        ("Image retrieval", r"retrieval/(?:(.+)/)?text_to_image/R@5", "retrieval/average/text_to_image/R@5"),
        ("Text retrieval", r"retrieval/(?:(.+)/)?image_to_text/R@5", "retrieval/average/image_to_text/R@5"),
        ("Zero-shot", r"zero_shot/(.+)/top1", "zero_shot/average/top1"),
        ("Zero-shot OOD", r"shift/(.+)/top1", "shift/average"),
    )
    columns = [Column(title, sets_of(arms, pattern, {}, average)[-1].key) for title, pattern, average in tasks]
    imagenet = Column("Zero-shot ImageNet", "zero_shot/imagenet/top1")  # as in the paper
    return [imagenet if c.title == "Zero-shot" and imagenet.key in arms.metric_names() else c for c in columns]


def mmvp(arms: Arms) -> Table:
    """MMVP-VLM by visual pattern, the numbers behind figure 4."""
    columns = mmvp_columns(arms)
    averages = {"average": "Avg.", "average7": "Avg. of the paper's 7"}
    more = [Column(title, f"mmvp/{key}") for key, title in averages.items() if f"mmvp/{key}" in arms.metric_names()]
    columns = [*columns, *more] or [Column(NONE, "mmvp/")]
    table = table_of(arms, "mmvp", "MMVP-VLM, the numbers of Figure 4", columns)
    table.caption = captioned("Share of pairs with both images right, in percent.", arms)
    return table


def mmvp_columns(arms: Arms) -> list[Column]:
    """The visual patterns of MMVP-VLM, without averages."""
    keys = [k for k in arms.metric_names() if k.startswith("mmvp/") and not k.startswith("mmvp/average")]
    return [Column(key.split("/", 1)[1], key) for key in keys]


def captioned(text: str, arms: Arms, *more: str) -> str:
    """A caption with what the brackets mean, as far as there are any."""
    parts = [text]
    if len(arms.models) > 1:
        interval = f"with {SIGN} where its 95 % interval leaves zero out"
        parts.append(f"In brackets the difference from {arms.models[0]}, {interval}.")
    if any(len(arms.seeds(model)) > 1 for model in arms.models):
        parts.append("± is the standard deviation over seeds.")
    return " ".join([*parts, *filter(None, more)])
