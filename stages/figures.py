"""The report's figures: matplotlib charts, small enough to be read on a phone, colour-blind safe.

A chart never rests on colour alone: bars carry their numbers, curves their own dashes, controls their own marks.
"""

import io
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.report_data import POPE_SPLITS, STAGES, Arms, is_number, mean_sd
from stages.report_tables import comparison_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito, darkened to a contrast of 3 on white; the page swaps them for lighter ones in the dark.
COLOURS = ("#0072b2", "#d55e00", "#00846a", "#b4508c", "#6b6b00", "#6a51a3")
DASHES = ("-", "--", "-.", ":")
INK, MUTED, GRID, PAPER = "#1d2127", "#5c6470", "#dcdfe4", "#fefefe"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,  # every figure keeps its width, so text has one size on the page
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
WIDTH = 5.0  # inches; 360 units in the page
TASKS = {  # the overview's rows: heading of the comparison table, label
    "Linear probe, accuracy": "Linear probe",
    "Few-shot, accuracy": "Few-shot",
    "Zero-shot classification, top-1": "Zero-shot",
    "Retrieval, text to image": "Text to image",
    "Retrieval, image to text": "Image to text",
    "Distribution shifts, zero-shot top-1": "Shifts",
    "MMVP-VLM, pairs right": "MMVP-VLM",
    "POPE, accuracy": "POPE",
}


def figures(arms: Arms, directory: Path) -> list[tuple[str, str, str]]:
    """Draw every figure that the runs have numbers for, also as SVG and PNG files in `directory`.

    Returns:
        [(name, caption, SVG text)] in the report's order.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    with plt.rc_context(STYLE):
        for name, caption, draw in _plans(arms):
            figure = draw()
            try:
                svg = io.StringIO()
                figure.savefig(svg, format="svg", metadata={"Date": None})
                directory.mkdir(parents=True, exist_ok=True)
                for suffix in ("svg", "png"):
                    temporary = directory / f"{name}.tmp"
                    figure.savefig(temporary, format=suffix, dpi=300, metadata=_no_date(suffix))
                    os.replace(temporary, directory / f"{name}.{suffix}")
            finally:
                plt.close(figure)
            drawn.append((name, caption, svg.getvalue()))
    return drawn


def inline(svg: str, name: str) -> str:
    """matplotlib's SVG for use inside a page: ids of its own, the page's fonts, colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in [(INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")]:
        svg = svg.replace(colour, f"var(--{variable})")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--model-{i})")
    return re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)


def colour_of(arms: Arms, model: str) -> str:
    return COLOURS[arms.models.index(model) % len(COLOURS)]


def _no_date(suffix: str) -> dict[str, None]:
    return {"Date": None} if suffix == "svg" else {}


def _plans(arms: Arms) -> Iterator[tuple[str, str, Callable[[], "Figure"]]]:
    sections = dict(comparison_keys(arms))
    tasks = []
    for heading, label in TASKS.items():
        if keys := sections.get(heading):
            key, row = next((pair for pair in keys if pair[1] in ("average", "mean")), keys[0])
            tasks.append((f"{label}, {row}" if heading.startswith("Retrieval") else label, key))
    if tasks:
        caption = "One number a task: the average over its sets, R@1 for retrieval."
        yield "tasks", caption, lambda: bars(arms, tasks)
    for heading, name, caption in (
        ("Distribution shifts, zero-shot top-1", "shifts", "Zero-shot accuracy on shifted versions of the test set."),
        ("MMVP-VLM, pairs right", "mmvp", "MMVP-VLM: share of pairs with both pictures right, by visual pattern."),
    ):
        if keys := sections.get(heading):
            yield name, caption, lambda keys=keys: bars(arms, [(label, key) for key, label in keys])
    if any(arms.scores(m, f"pope/{s}/accuracy") for m in arms.models for s in POPE_SPLITS):
        yield "pope", "POPE accuracy (bars) beside its controls (marks).", lambda: pope_bars(arms)
    for stage in STAGES:
        if any(r.curve for r in arms.runs if r.stage == stage):
            yield (
                f"loss-{stage}",
                f"Training loss of {stage}, each run a line.",
                lambda stage=stage: curves(arms, stage, "loss"),
            )
    if any("logit_scale" in line for r in arms.runs for line in r.curve):
        yield (
            "logit-scale",
            "Logit scale (inverse temperature) in pretraining.",
            lambda: curves(arms, "pretrain", "logit_scale"),
        )


def bars(arms: Arms, rows: list[tuple[str, str]]) -> "Figure":
    """Horizontal bars for (label, metric key) rows, one bar a model, whiskers of one sd, the number at its end."""
    import matplotlib.pyplot as plt

    count = len(arms.models)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.55 + len(rows) * (0.2 + 0.19 * count)))
    height = 0.8 / count
    for j, model in enumerate(arms.models):
        for i, (_, key) in enumerate(rows):
            y = i + (j - (count - 1) / 2) * height
            values = list(arms.scores(model, key).values())
            if not values:
                axes.text(1, y, "no number", va="center", fontsize=7.5, color=MUTED)
                continue
            mean, sd = mean_sd(values)
            axes.barh(y, mean, height * 0.9, color=colour_of(arms, model))
            if sd is not None:
                axes.errorbar(mean, y, xerr=sd, color=INK, linewidth=1, capsize=2)
            axes.text(mean + (sd or 0) + 1.5, y, f"{mean:.1f}", va="center", fontsize=7.5)
    axes.set_yticks(range(len(rows)), [textwrap.fill(_short(label, 40), 20) for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("%")
    axes.grid(axis="x", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    _legend(axes, arms)
    return figure


def pope_bars(arms: Arms) -> "Figure":
    """POPE accuracy by split, each bar with the marks of its blind and shuffled controls."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(figsize=(WIDTH, 3.0))
    count = len(arms.models)
    width = 0.8 / count
    splits = (*POPE_SPLITS, "mean")
    marks = (("pope_blind", "blind rule", "D"), ("pope_shuffled", "images shuffled", "o"))
    for j, model in enumerate(arms.models):
        for i, split in enumerate(splits):
            x = i + (j - (count - 1) / 2) * width
            values = list(arms.scores(model, f"pope/{split}/accuracy").values())
            if values:
                mean, sd = mean_sd(values)
                axes.bar(x, mean, width * 0.9, color=colour_of(arms, model))
                if sd is not None:
                    axes.errorbar(x, mean, yerr=sd, color=INK, linewidth=1, capsize=2)
                if count <= 3:  # more would overlap; the table has them
                    axes.text(x, 3, f"{mean:.1f}", ha="center", fontsize=7.5, color=PAPER)
            for group, _, shape in marks:
                control = list(arms.scores(model, f"{group}/{split}/accuracy").values())
                if control:
                    axes.plot(x, mean_sd(control)[0], shape, markersize=5, markerfacecolor=PAPER, color=INK)
    axes.axhline(50, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(splits)), splits)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.set_ylim(0, 103)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", linewidth=0.6)
    shapes = [
        Line2D([], [], marker=shape, linestyle="", markersize=5, markerfacecolor=PAPER, color=INK)
        for _, _, shape in marks
    ]
    _legend(axes, arms, shapes, [label for _, label, _ in marks])
    return figure


def curves(arms: Arms, stage: str, key: str) -> "Figure":
    """`key` of metrics.jsonl over the steps, one line a run, colour and dashes by model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(WIDTH, 2.5))
    for run in (r for r in arms.runs if r.stage == stage):
        points = [(line["step"], line[key]) for line in run.curve if is_number(line.get(key))]
        index = arms.models.index(run.model) if run.model else -1
        colour = COLOURS[index % len(COLOURS)] if run.model else MUTED
        dashes = DASHES[index % len(DASHES)] if run.model else "-"
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points), dashes, color=colour, linewidth=1.4, alpha=0.9, marker=marker) if points else None
    axes.set_xlabel("step")
    axes.set_ylabel(key.replace("_", " "))
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.grid(linewidth=0.6)
    if stage != "language":
        _legend(axes, arms, lines=True)
    return figure


def _legend(axes: "Axes", arms: Arms, marks: Sequence = (), names: Sequence[str] = (), lines: bool = False) -> None:
    """Models, and further marks with their names, above the plot."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    own = [
        Line2D([], [], color=colour_of(arms, m), linestyle=DASHES[i % len(DASHES)])
        if lines
        else Patch(facecolor=colour_of(arms, m))
        for i, m in enumerate(arms.models)
    ]
    labels = [_short(m, 30) for m in arms.models] + [*names]
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": 2, "borderaxespad": 0.3, "fontsize": 8}
    axes.legend([*own, *marks], labels, **place, handlelength=1.6, columnspacing=1.2)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"
