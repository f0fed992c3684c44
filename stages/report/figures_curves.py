"""Curves of training: losses, logit scale, and lambda layer by layer."""

import statistics

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from stages.report.data import Arms, RunDir
from stages.report.figures_style import COLOURS, DASHES, INK, MUTED, WIDTH, colour_of, legend, short
from stages.report.reading import is_number

MOST_POINTS = 400  # a line; more make files of megabytes that look the same


def curves(arms: Arms, stage: str, key: str) -> Figure:
    """`key` of metrics.jsonl over the steps, one line a run, colour and dashes by model."""
    figure, axes = plt.subplots(figsize=(WIDTH, 2.5))
    for run in (r for r in arms.runs if r.stage == stage):
        points = points_of(run.curve, key)
        index = arms.models.index(run.model) if run.model else -1
        colour = COLOURS[index % len(COLOURS)] if run.model else MUTED
        dashes = DASHES[index % len(DASHES)] if run.model else "-"
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points), dashes, color=colour, linewidth=1.4, alpha=0.9, marker=marker) if points else None
    name_steps(axes)
    axes.set_ylabel(key.replace("_", " "))
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.grid(linewidth=0.6)
    if stage != "language":
        legend(axes, arms, lines=True)
    return figure


def name_steps(axes: Axes, most: int = 6) -> None:
    """Few labels on the axis of steps, 25k for 25000, so that they never meet."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def points_of(curve: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) of a log, at most MOST_POINTS of them: means of neighbouring ones where there are more."""
    points = [(line["step"], line[key]) for line in curve if is_number(line.get(key))]
    width = -(-len(points) // MOST_POINTS)
    parts = [points[i : i + width] for i in range(0, len(points), max(1, width))]
    if width <= 1:
        return points
    return [(statistics.fmean(s for s, _ in part), statistics.fmean(v for _, v in part)) for part in parts]


def runs_with_lambda(arms: Arms) -> list[RunDir]:
    """The first pretraining run of each model that logged lambda, if any did."""
    first = [next((r for r in arms.latest("pretrain", m) if _layers(r.curve)), None) for m in arms.models]
    return [run for run in first if run is not None]


def lambdas(arms: Arms) -> Figure:
    """Lambda over the steps of pretraining, a row a model, a column a tower, a line a layer."""
    shown = [(run.model, run.curve, _layers(run.curve)) for run in runs_with_lambda(arms)]
    towers = list(dict.fromkeys(tower for _, _, layers in shown for tower in layers))
    figure, grid = plt.subplots(
        len(shown), len(towers), figsize=(WIDTH, 0.35 + 2.0 * len(shown)), squeeze=False, sharey=True
    )
    for row, (model, curve, layers) in zip(grid, shown):
        for axes, tower in zip(row, towers):
            axes.set_title(f"{short(model, 24)}, {tower}", fontsize=8.5, loc="left", color=INK)
            axes.tick_params(axis="y", labelcolor=MUTED)
            axes.grid(linewidth=0.6)
            name_steps(axes, 3)
            numbers = layers.get(tower, [])
            if not numbers:
                axes.text(0.5, 0.5, "plain attention", transform=axes.transAxes, ha="center", color=MUTED, fontsize=8)
            for place, number in enumerate(numbers):
                key = f"lambda/{tower}.{number}"
                points = points_of(curve, key)
                strength = 0.3 + 0.7 * (place + 1) / len(numbers)
                marker = "o" if len(points) == 1 else ""
                axes.plot(*zip(*points), color=colour_of(arms, model), alpha=strength, linewidth=1.4, marker=marker)
        row[0].set_ylabel("lambda")
    return figure


def _layers(curve: list[dict[str, float]]) -> dict[str, list[int]]:
    """{tower: numbers of its layers that have a lambda}, from keys such as lambda/vision.0."""
    found: dict[str, set[int]] = {}
    for key in (key for line in curve for key in line if is_number(line[key])):
        tower, _, layer = key.removeprefix("lambda/").partition(".")
        if key.startswith("lambda/") and layer.isdigit():
            found.setdefault(tower, set()).add(int(layer))
    # vision before text, as they are logged
    return {tower: sorted(layers) for tower, layers in found.items()}
