"""Attention maps for queries (figures 2 and 6) and the radar of MMVP-VLM (figure 4)."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes

from stages.report.data import Arms, mean_sd
from stages.report.figures_style import DASHES, INK, MARKS, MUTED, PAPER, WIDTH, colour_of, short
from stages.report.layout import Column
from stages.report.maps import Map

SIDE = 168  # pixels of a map in the figure


def attention(arms: Arms, maps: Sequence[Map]) -> Figure:
    """One row an image and query: the query, the image, and each model's map over it."""
    models = [m for m in arms.models if any(m in one.heat for one in maps)]
    columns = 2 + len(models)
    share = 0.8
    cell = WIDTH / (share + columns - 1)
    figure, grid = plt.subplots(
        len(maps),
        columns,
        figsize=(WIDTH, 0.3 + cell * len(maps)),
        squeeze=False,
        width_ratios=[share] + [1] * (columns - 1),
    )
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, one in zip(grid, maps):
        text = textwrap.fill(short(one.query, 60), 13)
        row[0].text(0.98, 0.5, f"\u201c{text}\u201d", ha="right", va="center", fontsize=8.5, transform=row[0].transAxes)
        row[1].imshow(one.pixels(SIDE), interpolation="none")
        for axes, model in zip(row[2:], models):
            if model in one.heat:
                axes.imshow(one.overlaid(model, SIDE), interpolation="none")
            else:
                axes.text(0.5, 0.5, "not kept", ha="center", va="center", fontsize=8, color=MUTED)
    for axes, title in zip(grid[0][1:], ["image", *models]):
        axes.set_title(textwrap.fill(short(title, 40), max(6, int(13 * cell))), fontsize=8.5, color=INK)
    return figure


def radar(arms: Arms, columns: Sequence[Column]) -> Figure:
    """One axis a column, one closed line a model, means over seeds."""
    angles = [2 * math.pi * i / len(columns) for i in range(len(columns))]
    figure, axes = plt.subplots(figsize=(WIDTH, 4.3), subplot_kw={"projection": "polar"})
    assert isinstance(axes, PolarAxes)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    top = 0.0
    shown = []
    for i, model in enumerate(arms.models):
        found = [list(arms.scores(model, c.key).values()) for c in columns]
        points = [(a, mean_sd(values)[0]) for a, values in zip(angles, found) if values]
        if not points:
            continue
        shown.append(model)
        top = max(top, *(value for _, value in points))
        closed = [*points, points[0]] if len(points) == len(columns) else points
        look: dict[str, Any] = {"color": colour_of(arms, model), "marker": MARKS[i % len(MARKS)], "markersize": 4}
        axes.plot(*zip(*closed), DASHES[i % len(DASHES)], linewidth=1.6, **look)
        axes.fill(*zip(*points), color=colour_of(arms, model), alpha=0.1)
    step = next(s for s in (1, 2, 5, 10, 20, 25) if top <= 5 * s) if top <= 125 else 25
    limit = step * max(1, math.ceil(top / step))
    axes.set_ylim(0, limit)
    axes.set_yticks(
        [step * k for k in range(1, limit // step + 1)], [str(step * k) for k in range(1, limit // step + 1)]
    )
    axes.set_xticks(angles, [textwrap.fill(short(c.title, 44), 16) for c in columns], fontsize=8)
    axes.tick_params(axis="y", labelcolor=MUTED, labelsize=7.5)
    axes.tick_params(axis="x", labelcolor=INK, pad=7)
    axes.spines["polar"].set_visible(False)
    axes.grid(linewidth=0.6)
    axes.set_facecolor(PAPER)
    marks = [
        Line2D(
            [],
            [],
            color=colour_of(arms, m),
            linestyle=DASHES[arms.models.index(m) % len(DASHES)],
            marker=MARKS[arms.models.index(m) % len(MARKS)],
            markersize=4,
        )
        for m in shown
    ]
    figure.legend(marks, [short(m, 30) for m in shown], loc="outside upper left", ncols=2, fontsize=8, handlelength=2.2)
    return figure
