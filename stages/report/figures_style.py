"""How all figures look: colours, type, legends. Colour-blind safe, and small enough to be read on a phone."""

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stages.report.data import Arms

# After Okabe and Ito, darkened to a contrast of 3 on white; the page swaps them for lighter ones in the dark.
COLOURS = ("#0072b2", "#d55e00", "#00846a", "#b4508c", "#6b6b00", "#6a51a3")
DASHES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
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


def colour_of(arms: Arms, model: str) -> str:
    return COLOURS[arms.models.index(model) % len(COLOURS)]


def short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def legend(
    axes: Axes,
    arms: Arms,
    models: Sequence[str] | None = None,
    marks: Sequence = (),
    names: Sequence[str] = (),
    lines: bool = False,
) -> None:
    """Models, and further marks with their names, above the plot."""
    own = []
    for model in models or arms.models:
        dashes = DASHES[arms.models.index(model) % len(DASHES)]
        colour = colour_of(arms, model)
        own.append(Line2D([], [], color=colour, linestyle=dashes) if lines else Patch(facecolor=colour))
    labels = [short(m, 30) for m in models or arms.models] + [*names]
    axes.legend([*own, *marks], labels, **ABOVE, ncols=2, handlelength=1.6, columnspacing=1.2)
