"""Bars: scores of several models side by side, POPE with its controls, what the stages cost."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from diffclip.base.schema import STAGES
from stages.report.beyond import costs
from stages.report.cells import duration, percent
from stages.report.data import Arms, mean_sd
from stages.report.figures_style import ABOVE, COLOURS, GRID, INK, MUTED, PAPER, WIDTH, colour_of, legend, short
from stages.report.layout import SIGN, Column
from stages.report.pope import CONTROLS, SPLITS
from stages.report.significance import difference

SHAPES = ("D", "o", "s", "^")  # of POPE's controls


def bars(arms: Arms, rows: Sequence[Column], models: Sequence[str] | None = None, baseline: str = "") -> Figure:
    """Horizontal bars, one a model and row, whiskers of one sd, the number and the difference at the end.

    Args:
        rows: columns of a table that have a key.
        models: those to show, the first being the reference; all by default.
        baseline: key of a score that a dashed line marks.
    """
    models = models or arms.models
    count = len(models)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.55 + len(rows) * (0.2 + 0.19 * count)))
    height = 0.8 / count
    for j, model in enumerate(models):
        for i, row in enumerate(rows):
            y = i + (j - (count - 1) / 2) * height
            values = list(arms.scores(model, row.key).values())
            if not values:
                axes.text(1, y, "no number", va="center", fontsize=7.5, color=MUTED)
                continue
            mean, sd = mean_sd(values)
            axes.barh(y, mean, height * 0.9, color=colour_of(arms, model))
            if sd is not None:
                axes.errorbar(mean, y, xerr=sd, color=INK, linewidth=1, capsize=2)
            text = f"{mean:.1f}{_delta(arms, models[0], model, row.key)}"
            axes.text(mean + (sd or 0) + 1.5, y, text, va="center", fontsize=7.5)
    if baseline:
        found = [v for model in models for v in arms.scores(model, baseline).values()]
        if found:
            axes.axvline(mean_sd(found)[0], color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [textwrap.fill(short(row.title, 40), 20) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 121)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("%", x=100 / 121)
    axes.grid(axis="x", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    legend(axes, arms, models)
    return figure


def _delta(arms: Arms, first: str, model: str, key: str) -> str:
    if model == first:
        return ""
    found = difference(arms, first, model, key)
    if found.mean is None:
        return ""
    return f" ({percent([found.mean], sign=True)}{SIGN if found.significant else ''})"


def pope_bars(arms: Arms) -> Figure:
    """POPE accuracy by split, each bar with the marks of its controls."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.1))
    count = len(arms.models)
    width = 0.8 / count
    groups = [
        (group, label, shape)
        for (group, label), shape in zip(CONTROLS, SHAPES)
        if any(arms.scores(model, f"{group}/{split}/accuracy") for model in arms.models for split in SPLITS)
    ]
    for j, model in enumerate(arms.models):
        for i, split in enumerate(SPLITS):
            x = i + (j - (count - 1) / 2) * width
            values = list(arms.scores(model, f"pope/{split}/accuracy").values())
            if values:
                mean, sd = mean_sd(values)
                axes.bar(x, mean, width * 0.9, color=colour_of(arms, model))
                if sd is not None:
                    axes.errorbar(x, mean, yerr=sd, color=INK, linewidth=1, capsize=2)
                if count <= 3:  # more would overlap; the table has them
                    axes.text(x, mean + (sd or 0) + 1.5, f"{mean:.1f}", ha="center", fontsize=7.5)
            for k, (group, _, shape) in enumerate(groups):
                control = list(arms.scores(model, f"{group}/{split}/accuracy").values())
                if control:  # beside each other, since controls at chance would hide one another
                    place = x + (k - (len(groups) - 1) / 2) * width * 0.8 / max(2, len(groups))
                    axes.plot(place, mean_sd(control)[0], shape, markersize=4.5, markerfacecolor=PAPER, color=INK)
    axes.axhline(50, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(SPLITS)), SPLITS)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", linewidth=0.6)
    marks = [
        Line2D([], [], marker=shape, linestyle="", markersize=4.5, markerfacecolor=PAPER, color=INK)
        for _, _, shape in groups
    ]
    legend(axes, arms, marks=marks, names=[label for _, label, _ in groups])
    return figure


def cost_bars(arms: Arms) -> Figure:
    """Wall-clock time of the stages, one bar a model, the stages behind each other."""
    known = [(c, c.seconds) for c in costs(arms) if c.seconds]
    names = list(dict.fromkeys(c.model for c, _ in known))
    unit, word = (3600, "hours") if max(seconds for _, seconds in known) > 6000 else (60, "minutes")
    figure, axes = plt.subplots(figsize=(WIDTH, 0.95 + 0.34 * len(names)))
    for i, name in enumerate(names):
        start = 0.0
        for c, seconds in known:
            if c.model == name:
                colour = COLOURS[STAGES.index(c.stage) % len(COLOURS)]
                axes.barh(i, seconds / unit, 0.62, left=start, color=colour, edgecolor=PAPER, linewidth=1)
                start += seconds / unit
        axes.annotate(duration(start * unit), (start, i), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(names)), [short(name, 24) or "shared" for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_xlabel(word)
    axes.grid(axis="x", linewidth=0.6, color=GRID)
    axes.tick_params(axis="y", length=0)
    stages = [s for s in STAGES if any(c.stage == s for c, _ in known)]
    patches = [Patch(facecolor=COLOURS[STAGES.index(s) % len(COLOURS)]) for s in stages]
    axes.legend(patches, stages, **ABOVE, ncols=5, handlelength=1.2, columnspacing=1.0)
    return figure
