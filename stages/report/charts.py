"""How the report's figures are drawn, in one look: colour-blind safe, and small enough to be read on a phone.

A chart never rests on colour alone: bars carry their numbers, curves their own dashes, controls their own marks.
"""

import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from diffclip.base.schema import STAGES
from stages.report.beyond import costs
from stages.report.cells import duration
from stages.report.data import Arms, RunDir, is_number, mean_sd
from stages.report.examples import Map
from stages.report.layout import Column, delta
from stages.report.pope import CONTROLS, SPLITS

# After Okabe and Ito, darkened to a contrast of 3 on white; the page swaps them for lighter ones in the dark.
COLOURS = ("#0072b2", "#d55e00", "#00846a", "#b4508c", "#6b6b00", "#6a51a3")
Dashes = Literal["-", "--", "-.", ":"]
DASHES: tuple[Dashes, ...] = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P")
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
ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.3, "fontsize": 8}
WIDTH = 5.0  # inches; 360 units in the page
MOST_POINTS = 400  # a line; more make files of megabytes that look the same
SIDE = 168  # pixels of an attention map


def colour_of(arms: Arms, model: str) -> str:
    return COLOURS[arms.models.index(model) % len(COLOURS)]


def dashes_of(arms: Arms, model: str) -> Dashes:
    return DASHES[arms.models.index(model) % len(DASHES)]


def short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def legend(axes: Axes, arms: Arms, models: Sequence[str], marks: Sequence[Line2D] = (), lines: bool = False) -> None:
    """Models, and further marks with their labels, above the plot."""
    looks = [(short(m, 30), colour_of(arms, m), dashes_of(arms, m)) for m in models]
    own = [Line2D([], [], c=c, ls=d, label=text) if lines else Patch(fc=c, label=text) for text, c, d in looks]
    axes.legend(handles=[*own, *marks], **ABOVE, ncols=2, handlelength=1.6, columnspacing=1.2)


def bars(arms: Arms, rows: Sequence[Column], models: Sequence[str], baseline: str = "") -> Figure:
    """Horizontal bars, one a model and row, whiskers of one sd, the number and the difference at the end.

    A dashed line marks the score under the key `baseline`.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 0.55 + len(rows) * (0.2 + 0.19 * len(models))))
    height = 0.8 / len(models)
    for j, model in enumerate(models):
        for i, row in enumerate(rows):
            y = i + (j - (len(models) - 1) / 2) * height
            values = list(arms.scores(model, row.key).values())
            if not values:
                axes.text(1, y, "no number", va="center", fontsize=7.5, color=MUTED)
                continue
            mean, sd = mean_sd(values)
            axes.barh(y, mean, height * 0.9, color=colour_of(arms, model))
            if sd is not None:
                axes.errorbar(mean, y, xerr=sd, color=INK, linewidth=1, capsize=2)
            label = f"{mean:.1f}{delta(arms, model, row.key)}"
            axes.text(mean + (sd or 0) + 1.5, y, label, va="center", fontsize=7.5)
    if values := [v for model in models for v in arms.scores(model, baseline).values()]:
        axes.axvline(mean_sd(values)[0], color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [textwrap.fill(short(row.title, 40), 20) for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 121), xticks=range(0, 101, 20))
    axes.set_xlabel("%", x=100 / 121)
    axes.grid(axis="x", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    legend(axes, arms, models)
    return figure


def pope_bars(arms: Arms) -> Figure:
    """POPE accuracy by split, each bar with the marks of its controls."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.1))
    count = len(arms.models)
    width = 0.8 / count
    marks = {  # of the controls that were run, by their group
        group: Line2D([], [], marker=shape, ls="", ms=4.5, mfc=PAPER, color=INK, label=label)
        for (group, label), shape in zip(CONTROLS.items(), ("D", "o", "s", "^"))
        if any(arms.scores(model, f"{group}/{split}/accuracy") for model in arms.models for split in SPLITS)
    }
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
            for k, (group, mark) in enumerate(marks.items()):
                control = list(arms.scores(model, f"{group}/{split}/accuracy").values())
                if control:  # beside each other, since controls at chance would hide one another
                    place = x + (k - (len(marks) - 1) / 2) * width * 0.8 / max(2, len(marks))
                    axes.plot(place, mean_sd(control)[0], str(mark.get_marker()), ms=4.5, mfc=PAPER, color=INK)
    axes.axhline(50, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(SPLITS)), SPLITS)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.set(ylim=(0, 109), yticks=range(0, 101, 25), ylabel="accuracy, %")
    axes.grid(axis="y", linewidth=0.6)
    legend(axes, arms, arms.models, list(marks.values()))
    return figure


def cost_bars(arms: Arms) -> Figure:
    """Wall-clock time of the stages, one bar a model, the stages behind each other."""
    known = [(c, c.seconds) for c in costs(arms) if c.seconds]
    names = list(dict.fromkeys(c.model for c, _ in known))
    shades = {stage: 0.3 + 0.7 * i / (len(STAGES) - 1) for i, stage in enumerate(STAGES)}  # colours are the models'
    unit, word = (3600, "hours") if max(seconds for _, seconds in known) > 6000 else (60, "minutes")
    figure, axes = plt.subplots(figsize=(WIDTH, 0.95 + 0.34 * len(names)))
    for i, name in enumerate(names):
        start = 0.0
        for c, seconds in known:
            if c.model == name:
                look: dict[str, Any] = {"color": colour_of(arms, name) if name else MUTED, "alpha": shades[c.stage]}
                axes.barh(i, seconds / unit, 0.62, left=start, edgecolor=PAPER, linewidth=1, **look)
                start += seconds / unit
        axes.annotate(duration(start * unit), (start, i), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(names)), [short(name, 24) or "shared" for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set(xlim=(0, None), xlabel=word)
    axes.grid(axis="x", linewidth=0.6, color=GRID)
    axes.tick_params(axis="y", length=0)
    stages = {c.stage for c, _ in known}
    handles = [Patch(facecolor=MUTED, alpha=shade, label=stage) for stage, shade in shades.items() if stage in stages]
    axes.legend(handles=handles, **ABOVE, ncols=5, handlelength=1.2, columnspacing=1.0)
    return figure


def curves(arms: Arms, stage: str, key: str) -> Figure:
    """`key` of metrics.jsonl over the steps, one line a run, colour and dashes by model."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.5))
    for run in (r for r in arms.runs if r.stage == stage):
        colour, dashes = (colour_of(arms, run.model), dashes_of(arms, run.model)) if run.model else (MUTED, "-")
        plot_log(axes, run.curve, key, colour, dashes, alpha=0.9)
    step_axis(axes)
    axes.set_ylabel(key.replace("_", " "))
    if stage != "language":
        legend(axes, arms, arms.models, lines=True)
    return figure


def plot_log(axes: Axes, curve: list[dict[str, float]], key: str, colour: str, dashes: str, alpha: float) -> None:
    """`key` of metrics.jsonl over the steps; a dot where there is one point."""
    if points := points_of(curve, key):
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points), dashes, color=colour, linewidth=1.4, alpha=alpha, marker=marker)


def step_axis(axes: Axes, most: int = 6) -> None:
    """Few labels on the axis of steps, 25k for 25000, so that they never meet."""
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.grid(linewidth=0.6)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def points_of(curve: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) of a log, at most MOST_POINTS of them: means of neighbouring ones where there are more."""
    points = [(line["step"], line[key]) for line in curve if is_number(line.get(key))]
    width = -(-len(points) // MOST_POINTS)
    if width <= 1:
        return points
    parts = [points[i : i + width] for i in range(0, len(points), width)]
    return [(statistics.fmean(s for s, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def runs_with_lambda(arms: Arms) -> list[RunDir]:
    """The first pretraining run of each model that logged lambda, if any did."""
    first = (next((r for r in arms.latest("pretrain", m) if _layers(r.curve)), None) for m in arms.models)
    return [run for run in first if run is not None]


def lambdas(arms: Arms) -> Figure:
    """Lambda over the steps of pretraining, a row a model, a column a tower, a line a layer."""
    shown = [(run.model, run.curve, _layers(run.curve)) for run in runs_with_lambda(arms)]
    towers = list(dict.fromkeys(tower for _, _, layers in shown for tower in layers))
    size = (WIDTH, 0.35 + 2.0 * len(shown))
    figure, grid = plt.subplots(len(shown), len(towers), figsize=size, squeeze=False, sharey=True)
    for row, (model, curve, layers) in zip(grid, shown):
        for axes, tower in zip(row, towers):
            axes.set_title(f"{short(model, 24)}, {tower}", fontsize=8.5, loc="left", color=INK)
            step_axis(axes, 3)
            numbers = layers.get(tower, [])
            if not numbers:
                axes.text(0.5, 0.5, "plain attention", transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
            for place, number in enumerate(numbers):
                strength = 0.3 + 0.7 * (place + 1) / len(numbers)
                plot_log(axes, curve, f"lambda/{tower}.{number}", colour_of(arms, model), "-", strength)
        row[0].set_ylabel("lambda")
    return figure


def _layers(curve: list[dict[str, float]]) -> dict[str, list[int]]:
    """{tower: numbers of its layers that have a lambda}, from keys such as lambda/vision.0."""
    layers: dict[str, set[int]] = {}  # vision before text, as they are logged
    for key in (key for line in curve for key in line if is_number(line[key])):
        tower, _, layer = key.removeprefix("lambda/").partition(".")
        if key.startswith("lambda/") and layer.isdigit():
            layers.setdefault(tower, set()).add(int(layer))
    return {tower: sorted(numbers) for tower, numbers in layers.items()}


def attention(arms: Arms, maps: Sequence[Map]) -> Figure:
    """One row an image and query: the query, the image, each model's map over it, the two maps of a differential one.

    The edge of the object asked for is drawn on all of them, where it is known.
    """
    models = [m for m in arms.models if any(m in one.heat for one in maps)]
    divided = with_parts(arms, maps)
    titles = ["image", *models, *(["A1", "A2", "A1 \u2212 \u03bbA2"] if divided else [])]
    ratios = [0.8, *[1 for _ in titles]]  # of the columns' widths
    cell = WIDTH / sum(ratios)
    size = (WIDTH, 0.3 + cell * len(maps))
    figure, grid = plt.subplots(len(maps), len(ratios), figsize=size, squeeze=False, width_ratios=ratios)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, one in zip(grid, maps):
        text = textwrap.fill(short(one.query, 60), max(6, int(13 * cell)))
        row[0].text(0.98, 0.5, f"\u201c{text}\u201d", ha="right", va="center", fontsize=8.5, transform=row[0].transAxes)
        shown = [one.pixels(SIDE), *(one.overlaid(one.heat[m], SIDE) if m in one.heat else None for m in models)]
        if divided:
            first, second, difference = one.parts.get(divided, {}).values() or (None,) * 3
            shown += [None if heat is None else one.overlaid(heat, SIDE) for heat in (first, second)]
            shown.append(None if difference is None else one.tinted(difference, SIDE))
        for axes, pixels in zip(row[1:], shown):
            if pixels is not None:
                axes.imshow(one.outlined(pixels), interpolation="none")
            else:
                axes.text(0.5, 0.5, "not kept", ha="center", va="center", fontsize=8, color=MUTED)
    for axes, title in zip(grid[0][1:], titles):
        name = textwrap.fill(short(title, 40), max(6, int(13 * cell)), break_long_words=False)
        axes.set_title(name, fontsize=8.5, color=INK)
    return figure


def with_parts(arms: Arms, maps: Sequence[Map]) -> str:
    """The first model whose two maps were kept; "" if there is none."""
    return next((m for m in arms.models if any(m in one.parts for one in maps)), "")


def radar(arms: Arms, columns: Sequence[Column]) -> Figure:
    """One axis a column, one closed line a model, means over seeds."""
    angles = [2 * math.pi * i / len(columns) for i in range(len(columns))]
    figure, axes = plt.subplots(figsize=(WIDTH, 4.3), subplot_kw={"projection": "polar"})
    axes.set(theta_zero_location="N", theta_direction=-1, facecolor=PAPER)
    top = 0.0
    handles = []
    for i, model in enumerate(arms.models):
        values = [list(arms.scores(model, c.key).values()) for c in columns]
        points = [(angle, mean_sd(v)[0]) for angle, v in zip(angles, values) if v]
        if not points:
            continue
        top = max(top, *(value for _, value in points))
        closed = [*points, points[0]] if len(points) == len(columns) else points
        look: dict[str, Any] = {"color": colour_of(arms, model), "ls": dashes_of(arms, model)}
        look |= {"marker": MARKS[i % len(MARKS)], "markersize": 4}
        axes.plot(*zip(*closed), linewidth=1.6, **look)
        axes.fill(*zip(*points), color=look["color"], alpha=0.1)
        handles.append(Line2D([], [], label=short(model, 30), **look))
    step = next(s for s in (1, 2, 5, 10, 20, 25) if top <= 5 * s)  # a score may be 100 and a little
    limit = step * max(1, math.ceil(top / step))
    ticks = range(step, limit + 1, step)
    axes.set(ylim=(0, limit), yticks=ticks, yticklabels=[str(tick) for tick in ticks])
    axes.set_xticks(angles, [textwrap.fill(short(c.title, 44), 16) for c in columns], fontsize=8)
    axes.tick_params(axis="y", labelcolor=MUTED, labelsize=7.5)
    axes.tick_params(axis="x", labelcolor=INK, pad=7)
    axes.spines["polar"].set_visible(False)
    axes.grid(linewidth=0.6)
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=8, handlelength=2.2)
    return figure
