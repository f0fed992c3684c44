"""The report's figures: which there are, in the paper's order, and how they are drawn, saved and put into the page.

A chart never rests on colour alone: bars carry their numbers, curves their own dashes, controls their own marks.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Drawing

from diffclip.base.files import whole, write_whole
from diffclip.base.schema import POPE_SPLITS, STAGES
from stages.report import figures_bars, figures_curves, figures_maps
from stages.report.beyond import costs
from stages.report.data import Arms
from stages.report.figures_style import COLOURS, GRID, INK, MUTED, PAPER, STYLE
from stages.report.layout import Column, mmvp_columns, shift_columns, six_tasks
from stages.report.maps import Map, attention_maps

LONG = f"; logs of more than {figures_curves.MOST_POINTS} lines are averaged over neighbouring ones"
PAIRS_SHOWN = 2  # images of figure 2, as in the paper; the others make figure 6
ATTENTION = "Where each model looks for a text: the patches that speak for it, by gradient, in the last layer"


@dataclass
class Figure:
    """A figure on the page and its files; `absent` says why there is none."""

    name: str
    title: str
    caption: str
    svg: str = ""
    absent: str = ""

    @property
    def anchor(self) -> str:
        """Its id on the page, where tables have names like "pope" too."""
        return self.name if self.name.startswith("figure") else f"figure-{self.name}"


@dataclass
class Plan:
    """A figure to draw, or the reason that it cannot be drawn."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Drawing] | None
    why: str = ""


def figures(arms: Arms, directory: Path) -> list[Figure]:
    """Draw every figure that the runs have numbers for, also as SVG and PNG files (300 dpi) in `directory`."""
    matplotlib.use("Agg")
    drawn = []
    with plt.rc_context(STYLE):  # type: ignore[arg-type] # it wants a Literal of all of matplotlib's keys
        for plan in plans(arms):
            if plan.draw is None:
                drawn.append(Figure(plan.name, plan.title, plan.caption, absent=plan.why))
                continue
            figure = plan.draw()
            try:
                svg = io.StringIO()
                figure.savefig(svg, format="svg", metadata={"Date": None})
                text = numbered(svg.getvalue())
                figure.set_layout_engine("none")  # it is laid out now
                write_whole(directory / f"{plan.name}.svg", text)
                with whole(directory / f"{plan.name}.png") as path:
                    figure.savefig(path, dpi=300)
            finally:
                plt.close(figure)
            drawn.append(Figure(plan.name, plan.title, plan.caption, inline(text, plan.name)))
    return drawn


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
    for colour, variable in [(INK, "ink"), (MUTED, "muted"), (GRID, "grid"), (PAPER, "paper")]:
        svg = svg.replace(colour, f"var(--{variable})")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--model-{i})")
    return re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)


def plans(arms: Arms) -> list[Plan]:
    """Every figure in the paper's order, then those that the paper does not have."""
    maps = attention_maps(arms)
    return [*_of_the_paper(arms, maps), *_of_pope(arms), *_beyond(arms)]


def _of_the_paper(arms: Arms, maps: list[Map]) -> list[Plan]:
    tasks = six_tasks(arms)
    scored = [t for t in tasks if not t.key.endswith("/")]
    pair = arms.models[:2]
    plans = [
        Plan(
            "figure1",
            f"Figure 1. {' and '.join(pair)} on six tasks",
            "Percent, with the difference from the first model in brackets; retrieval is R@5, sets are averaged.",
            (lambda: figures_bars.bars(arms, scored, pair)) if scored else None,
            "no evaluate run has scores of the dual encoder",
        )
    ]
    images = list(dict.fromkeys(m.name for m in maps))
    first = [m for m in maps if m.name in images[:PAIRS_SHOWN]]
    rest = [m for m in maps if m.name in images[PAIRS_SHOWN : PAIRS_SHOWN + 4]]
    why = (
        "no evaluate run kept attention maps (attention.jsonl): it needs a dual encoder and segmentation/ in clip_data"
    )
    said = [str(r.record["attention"]) for r in arms.runs if r.stage == "evaluate" and r.record.get("attention")]
    why = said[-1] if said else why
    note = "Bright is much, each map against its own maximum. Images are the first with two kinds of objects."
    plans.append(
        Plan(
            "figure2",
            "Figure 2. Attention maps for queries",
            f"{ATTENTION}. {note}",
            (lambda: figures_maps.attention(arms, first)) if first else None,
            why,
        )
    )
    shifts = [c for c in shift_columns(arms) if not c.key.endswith("/")]
    plans.append(
        Plan(
            "figure3",
            "Figure 3. Out of distribution",
            "Zero-shot accuracy on shifted versions of the test set.",
            (lambda: figures_bars.bars(arms, shifts)) if shifts else None,
            "no evaluate run has scores on distribution shifts",
        )
    )
    patterns = mmvp_columns(arms)
    chart = figures_maps.radar if len(patterns) > 2 else figures_bars.bars
    plans.append(
        Plan(
            "figure4",
            "Figure 4. MMVP-VLM",
            "Share of pairs with both images right, by visual pattern.",
            (lambda: chart(arms, patterns)) if patterns else None,
            "no evaluate run has MMVP-VLM scores",
        )
    )
    enough = len(arms.models) > 2
    plans.append(
        Plan(
            "figure5",
            "Figure 5. Variants on the six tasks",
            "As Figure 1, for every variant.",
            (lambda: figures_bars.bars(arms, scored)) if scored and enough else None,
            f"there {'are' if len(arms.models) > 1 else 'is'} only {' and '.join(arms.models)} here, as in Figure 1; "
            "variants are compared from three models on"
            if not enough
            else "no evaluate run has scores of the dual encoder",
        )
    )
    plans.append(
        Plan(
            "figure6",
            "Figure 6. More attention maps",
            "As Figure 2, for the images after it.",
            (lambda: figures_maps.attention(arms, rest)) if rest else None,
            f"{why}, with more than {PAIRS_SHOWN} images" if not maps else "no more images were kept",
        )
    )
    return plans


def _of_pope(arms: Arms) -> list[Plan]:
    scored = any(arms.scores(m, f"pope/{s}/accuracy") for m in arms.models for s in POPE_SPLITS)
    return [
        Plan(
            "pope",
            "POPE with its controls",
            "Accuracy (bars) beside its controls (marks); the dotted line is a yes to every question.",
            (lambda: figures_bars.pope_bars(arms)) if scored else None,
            "no evaluate run has POPE scores",
        )
    ]


def _beyond(arms: Arms) -> list[Plan]:
    """Localisation, curves of training, cost."""
    names = {"pointing": "Pointing game", "energy": "Energy inside", "precision": "Pixel average precision"}
    located = [Column(title, f"localisation/{name}") for name, title in names.items()]
    has_masks = any(arms.scores(m, c.key) for m in arms.models for c in located)
    plans = [
        Plan(
            "localisation",
            "Localisation",
            "Relevance against the masks of the objects; the dashed line is what a map of noise has.",
            (lambda: figures_bars.bars(arms, located, baseline="localisation/area")) if has_masks else None,
            "no evaluate run compared attention with masks: it needs segmentation/ in clip_data",
        )
    ]
    for stage in STAGES[:-1]:
        curve = any("loss" in line for r in arms.runs if r.stage == stage for line in r.curve)
        ran = any(r.stage == stage for r in arms.runs)
        title = f"Training loss of {stage}"
        why = f"the {stage} runs hold no metrics.jsonl with steps in it" if ran else f"no {stage} run was found"
        draw = (lambda stage=stage: figures_curves.curves(arms, stage, "loss")) if curve else None
        plans.append(Plan(f"loss-{stage}", title, f"Each run is a line{LONG}.", draw, why))
    plans.append(
        Plan(
            "lambda",
            "Lambda by layer in pretraining",
            "The weight of the second attention map; faint is the first layer, strong the last. One seed a "
            f"model{LONG}.",
            (lambda: figures_curves.lambdas(arms)) if figures_curves.runs_with_lambda(arms) else None,
            "no pretrain run logged lambda/… (plain CLIP has none)",
        )
    )
    scales = any("logit_scale" in line for r in arms.runs for line in r.curve)
    plans.append(
        Plan(
            "logit-scale",
            "Logit scale in pretraining",
            f"The inverse temperature, clamped at 100{LONG}.",
            (lambda: figures_curves.curves(arms, "pretrain", "logit_scale")) if scales else None,
            "no pretrain run logged logit_scale",
        )
    )
    timed = any(c.seconds for c in costs(arms))
    plans.append(
        Plan(
            "cost",
            "Cost",
            "Wall-clock time of each stage, means over seeds.",
            (lambda: figures_bars.cost_bars(arms)) if timed else None,
            "no run has finished",
        )
    )
    return plans
