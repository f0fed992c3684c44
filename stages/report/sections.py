"""The report's sections: what stands under which heading, in the paper's order, then what the paper does not have."""

from dataclasses import dataclass, field

from stages.report import chair
from stages.report.beyond import cost, cost_verdict, localisation
from stages.report.cells import Table
from stages.report.data import Arms
from stages.report.figures import Figure
from stages.report.layout import mmvp, table1, table2, table3, table4, table5
from stages.report.methods import methods
from stages.report.paper import paper_figure4, paper_table1, paper_table2, paper_table3
from stages.report.pope import pope, pope_pairs, pope_verdict
from stages.report.setup import checks, setup
from stages.report.tables import comparison, headline, others, result, tally
from stages.report.tasks import names, task_scores, verdict, yes_no

# settings, raw numbers, and what repeats a figure
FOLDED = {"appendix", "more-attention", "curves", "cost-part", "methods", "run", "all-scores", "other", "details"}


@dataclass
class Section:
    """A heading of the report and what stands under it, in this order."""

    anchor: str
    short: str
    title: str
    text: str = ""
    verdicts: list[tuple[bool | None, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    beside: int = 0  # so many of the tables stand beside the figures where there is room
    folded: bool = False  # opens when its heading is chosen
    paste: str = ""  # text to take into a paper


def sections(arms: Arms, figure: dict[str, Figure]) -> list[Section]:
    """The result, the report in the paper's order, what the paper does not have; settings and raw numbers folded."""
    curves = [f for name, f in figure.items() if name.startswith("loss-") or name in ("lambda", "logit-scale")]
    rest = others(arms)
    fold_raw = [pope(arms), *filter(None, [pope_pairs(arms)])]
    for table in fold_raw:
        table.folded = True
    failed = [check for check in checks(arms) if check[0] is False]
    verdicts = [pope_verdict(arms, model) for model in arms.models]
    parts = [
        Section("result", "Result", "Result", headline(arms), [*verdicts, *failed], tables=[result(arms)]),
        Section(
            "glance",
            "Fig. 1, 2",
            "At a glance",
            "\n".join(tally(arms)),
            figures=[figure["figure1"], figure["figure2"]],
        ),
        Section("classification", "Tab. 1", "Linear probing and few-shot", tables=[table1(arms), paper_table1()]),
        Section("retrieval", "Tab. 2", "Retrieval and zero-shot", tables=[table2(arms), paper_table2()]),
        Section(
            "robustness",
            "Fig. 3, 4",
            "Out of distribution, and fine-grained vision",
            figures=[figure["figure3"], figure["figure4"]],
            tables=[mmvp(arms), paper_figure4()],
        ),
        Section(
            "variants",
            "Fig. 5",
            "Variants",
            figures=[figure["figure5"]],
            folded=bool(figure["figure5"].absent),
        ),
        Section(
            "hallucination",
            "Tab. 3",
            "Object hallucination: POPE",
            "Does the model see an object, or guess from its name? A model that looks at the image beats the blind "
            "rule, the best answer for each object's name without any image, and loses its lead when the images "
            "are shuffled among the questions.",
            figures=[figure["pope"]],
            tables=[table3(arms), paper_table3(), *fold_raw],
            beside=2,
        ),
        *captions(arms),
        *other_tasks(arms),
        Section("appendix", "Tab. 4, 5", "The numbers behind Figures 3 and 5", tables=[table4(arms), table5(arms)]),
        Section("more-attention", "Fig. 6", "More attention maps", figures=[figure["figure6"]]),
        Section(
            "localisation-part",
            "Localisation",
            "Localisation, measured",
            figures=[figure["localisation"]],
            tables=[localisation(arms)],
            beside=1,
        ),
        Section("curves", "Curves", "Training curves", figures=curves),
        Section("cost-part", "Cost", "Cost", cost_verdict(arms), figures=[figure["cost"]], tables=[cost(arms)]),
        Section("examples", "Examples", "Examples"),
        Section("methods", "Methods", "A methods paragraph to paste", paste=methods(arms)),
        Section("run", "Runs", "What was run", tables=[setup(arms)]),
        Section("all-scores", "Scores", "All scores", tables=[comparison(arms)]),
    ]
    parts += [Section("other", "Other", "Other numbers", tables=[rest])] if rest.rows else []
    text = "What learnt, what was frozen, fingerprints of the weights before and after, digests of the inputs."
    parts.append(Section("details", "Each run", "Every run", text))
    for part in parts:
        part.folded |= part.anchor in FOLDED
    return parts


def captions(arms: Arms) -> list[Section]:
    """What CHAIR says of free captions, if any were scored."""
    if not chair.there(arms):
        return []
    verdicts = [found for model in arms.models if (found := chair.verdict(arms, model))]
    title = "Object hallucination in captions: CHAIR"
    return [Section("captions", "CHAIR", title, verdicts=verdicts, tables=[chair.chair_scores(arms)])]


def other_tasks(arms: Arms) -> list[Section]:
    """What lmms-eval's tasks say, if any were run."""
    if not names(arms, "tasks"):
        return []
    asked = list(names(arms, "tasks_yes_no"))
    verdicts = [found for task in asked for model in arms.models if (found := verdict(arms, model, task))]
    tables = [task_scores(arms), *([yes_no(arms)] if asked else [])]
    return [Section("tasks", "Tasks", "Other tasks of lmms-eval", verdicts=verdicts, tables=tables)]
