"""The report's figures: which there are, in the paper's order, and how they are saved and put into the page."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Drawing

from diffclip.base.files import whole, write_whole
from diffclip.base.schema import POPE_SPLITS, STAGES
from stages.report import charts
from stages.report.beyond import LOCALISATION, costs
from stages.report.charts import COLOURS, GRID, INK, MUTED, PAPER, STYLE
from stages.report.data import Arms
from stages.report.examples import attention_maps
from stages.report.layout import Column, mmvp_columns, shift_columns, six_tasks
from stages.report.methods import jumps

DPI = 300  # of PNGs, as journals ask for
PAIRS_SHOWN = 2  # images of figure 2, as in the paper; the others make figure 6


@dataclass
class Figure:
    """A figure on the page and its files."""

    name: str
    title: str
    caption: str
    absent: str  # why it cannot be drawn; "" if it can
    draw: Callable[[], Drawing]
    svg: str = ""

    @property
    def anchor(self) -> str:
        """Its id on the page, where tables have names like "pope" too."""
        return self.name if self.name.startswith("figure") else f"figure-{self.name}"


def figures(arms: Arms, directory: Path) -> dict[str, Figure]:
    """Draw every figure that the runs have numbers for, also as SVG and PNG files (300 dpi) in `directory`; by name."""
    matplotlib.use("Agg")
    drawn = {figure.name: figure for figure in [*of_the_paper(arms), *beyond_the_paper(arms)]}
    with plt.rc_context(STYLE):  # type: ignore[arg-type] # it wants a Literal of all of matplotlib's keys
        for name, figure in drawn.items():
            if not figure.absent:
                figure.svg = inline(save(figure.draw(), directory / name), name)
    return drawn


def save(drawing: Drawing, path: Path) -> str:
    """Write a drawing to `path` with .svg and .png behind it, and close it; returns the SVG."""
    try:
        svg = io.StringIO()
        drawing.savefig(svg, format="svg", metadata={"Date": None})
        text = numbered(svg.getvalue())
        drawing.set_layout_engine("none")  # it is laid out now
        write_whole(path.with_suffix(".svg"), text)
        with whole(path.with_suffix(".png")) as temporary:
            drawing.savefig(temporary, dpi=DPI)
    finally:
        plt.close(drawing)
    return text


def numbered(svg: str) -> str:
    """The SVG with its hashed ids counted instead: they come from the last bits of a layout, which do not repeat."""
    ids = dict.fromkeys(re.findall(r'\bid="([a-z]*[0-9a-f]{10})"', svg))
    numbers = {old: f"part{number}" for number, old in enumerate(ids)}
    return re.sub(r'(?<=[#"])([a-z]*[0-9a-f]{10})(?=[")])', lambda m: numbers.get(m[1], m[1]), svg)


def inline(svg: str, name: str) -> str:
    """matplotlib's SVG for use inside a page: ids of its own, the page's fonts, colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<image [^>]*?)\bid="[^"]*"', r"\1", svg)  # equal images have equal ones; nothing points at them
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    variables = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
    for colour, variable in (variables | {colour: f"model-{i}" for i, colour in enumerate(COLOURS)}).items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)


def of_the_paper(arms: Arms) -> list[Figure]:
    """The paper's figures in its order."""
    scored = [task for task in six_tasks(arms) if not task.key.endswith("/")]
    unscored = "" if scored else "no evaluate run has scores of the dual encoder"
    pair = arms.models[:2]
    few = f"there {'are' if len(pair) > 1 else 'is'} only {' and '.join(pair)} here, as in Figure 1; variants are "
    few += "compared from three models on"
    maps = attention_maps(arms)
    images = list(dict.fromkeys(m.name for m in maps))
    first = [m for m in maps if m.name in images[:PAIRS_SHOWN]]
    rest = [m for m in maps if m.name in images[PAIRS_SHOWN : PAIRS_SHOWN + 4]]
    reasons = [str(r.record["attention"]) for r in arms.runs if r.stage == "evaluate" and r.record.get("attention")]
    why = "no evaluate run kept attention maps (attention.jsonl): "
    why = reasons[-1] if reasons else why + "it needs a dual encoder and segmentation/ in clip_data"
    no_more = "no more images were kept" if maps else f"{why}, with more than {PAIRS_SHOWN} images"
    divided, edges = charts.with_parts(arms, maps), any(one.outline for one in maps)
    more = " The line is the edge of what the text names." if edges else ""
    if divided:
        more += (
            f" A1 and A2, on one scale, are the two attention maps of {divided}'s last layer, means over heads, and "
            "A1 \u2212 \u03bbA2, red above zero and blue below, is what multiplies the values; the text has no part "
            "in these three."
        )
    shifts = [column for column in shift_columns(arms) if not column.key.endswith("/")]
    patterns = mmvp_columns(arms)
    return [
        Figure(
            "figure1",
            f"Figure 1. {' and '.join(pair)} on six tasks",
            "Percent, with the difference from the first model in brackets; retrieval is R@5, sets are averaged.",
            unscored,
            lambda: charts.bars(arms, scored, pair),
        ),
        Figure(
            "figure2",
            "Figure 2. Attention maps for queries",
            "Where each model looks for a text: the patches that speak for it, by gradient, in the last layer. Bright "
            f"is much, each map against its own maximum. Images are the first with two kinds of objects.{more}",
            "" if first else why,
            lambda: charts.attention(arms, first),
        ),
        Figure(
            "figure3",
            "Figure 3. Out of distribution",
            "Zero-shot accuracy on shifted versions of the test set.",
            "" if shifts else "no evaluate run has scores on distribution shifts",
            lambda: charts.bars(arms, shifts, arms.models),
        ),
        Figure(
            "figure4",
            "Figure 4. MMVP-VLM",
            "Share of pairs with both images right, by visual pattern.",
            "" if patterns else "no evaluate run has MMVP-VLM scores",
            lambda: charts.radar(arms, patterns) if len(patterns) > 2 else charts.bars(arms, patterns, arms.models),
        ),
        Figure(
            "figure5",
            "Figure 5. Variants on the six tasks",
            "As Figure 1, for every variant.",
            unscored if len(arms.models) > 2 else few,
            lambda: charts.bars(arms, scored, arms.models),
        ),
        Figure(
            "figure6",
            "Figure 6. More attention maps",
            "As Figure 2, for the images after it.",
            "" if rest else no_more,
            lambda: charts.attention(arms, rest),
        ),
    ]


def beyond_the_paper(arms: Arms) -> list[Figure]:
    """POPE, localisation, curves of training, cost."""
    asked = any(arms.scores(m, f"pope/{split}/accuracy") for m in arms.models for split in POPE_SPLITS)
    located = [Column(label.capitalize(), f"localisation/{name}") for name, label in LOCALISATION.items()][:-1]
    has_masks = any(arms.scores(m, column.key) for m in arms.models for column in located)
    logged = {(r.stage, key) for r in arms.runs for line in r.curve for key in line}
    ran = {run.stage for run in arms.runs}
    averaged = f"; logs of more than {charts.MOST_POINTS} lines are averaged over neighbouring ones"
    losses = [
        Figure(
            f"loss-{stage}",
            f"Training loss of {stage}",
            f"Each run is a line{averaged}.{jumps(arms, stage)}",
            ""
            if (stage, "loss") in logged
            else f"the {stage} runs hold no metrics.jsonl with steps in it"
            if stage in ran
            else f"no {stage} run was found",
            partial(charts.curves, arms, stage, "loss"),
        )
        for stage in STAGES[:-1]
    ]
    return [
        Figure(
            "pope",
            "POPE with its controls",
            "Accuracy (bars) beside its controls (marks); the dotted line is a yes to every question.",
            "" if asked else "no evaluate run has POPE scores",
            lambda: charts.pope_bars(arms),
        ),
        Figure(
            "localisation",
            "Localisation",
            "Relevance against the masks of the objects; the dashed line is what a map of noise has.",
            "" if has_masks else "no evaluate run compared attention with masks: it needs segmentation/ in clip_data",
            lambda: charts.bars(arms, located, arms.models, baseline="localisation/area"),
        ),
        *losses,
        Figure(
            "lambda",
            "Lambda by layer in pretraining",
            "The weight of the second attention map; faint is the first layer, strong the last. One seed a "
            f"model{averaged}.",
            "" if charts.runs_with_lambda(arms) else "no pretrain run logged lambda/… (plain CLIP has none)",
            lambda: charts.lambdas(arms),
        ),
        Figure(
            "logit-scale",
            "Logit scale in pretraining",
            f"The inverse temperature, clamped at 100{averaged}.",
            "" if any(key == "logit_scale" for _, key in logged) else "no pretrain run logged logit_scale",
            lambda: charts.curves(arms, "pretrain", "logit_scale"),
        ),
        Figure(
            "cost",
            "Cost",
            "Wall-clock time of each stage, means over seeds.",
            "" if any(c.seconds for c in costs(arms)) else "no run has finished",
            lambda: charts.cost_bars(arms),
        ),
    ]
