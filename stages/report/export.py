"""The report as HTML, Markdown, CSV and LaTeX (booktabs), with all that comes from runs shown literally."""

import base64
import hashlib
import re
from importlib import resources

from jinja2 import Environment
from markupsafe import Markup, escape

from diffclip.base.lines import csv_text, markdown, printable
from stages.report.cells import MINUS, Table
from stages.report.data import Arms, mean_sd
from stages.report.examples import examples
from stages.report.sections import Section
from stages.report.setup import checks, details, stand_in
from stages.report.significance import paired_differences
from stages.report.tables import comparison_keys, evidence, headline

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{character: f"\\{character}" for character in "&%$#_"},
        MINUS: "$-$",
        "\u2013": "--",
        "±": r"$\pm$",
        "\u2192": r"$\rightarrow$",
        "[": "{[}",  # at the start of a row it would be an argument of the line before
        "*": "{*}",  # and so would this
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "×": r"$\times$",
    }
)


def as_csv(table: Table) -> str:
    """Rows as displayed; a heading inside the table becomes a column of its own, so that every row stands alone."""
    sectioned = any(len(row) == 1 for row in table.rows)
    lines = [[*["section"] * sectioned, *table.named_columns()]]
    heading = [""] * sectioned
    for row in table.rows:
        if len(row) == 1:
            heading = row
        else:
            lines.append([*heading, *row])
    return csv_text([*lines, *([f"[{number}] {note}"] for number, note in enumerate(table.notes, 1))])


def as_latex(table: Table) -> str:
    """A booktabs table with caption and notes; needs \\usepackage{booktabs}, for wide ones graphicx."""
    count = len(table.columns)
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(' '.join(filter(None, [f'{table.title}.', table.caption])))}}}",
        rf"\label{{tab:{table.name}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{('l' if table.prose else 'r') * (count - 1)}}}",
        r"\toprule",
    ]
    if table.groups:
        cells, rules, start = [], [], 1
        for text, width in table.groups:
            cells.append(rf"\multicolumn{{{width}}}{{c}}{{{latex(text)}}}" if text else " & " * (width - 1))
            rules += [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"] if text else []
            start += width
        lines += [" & ".join(cells) + r" \\", " ".join(rules)]
    lines += [" & ".join(latex(c) for c in table.columns) + r" \\", r"\midrule"]
    for row in table.rows:
        if len(row) == 1:
            lines.append(rf"\multicolumn{{{count}}}{{l}}{{\textbf{{{latex(row[0])}}}}} \\")
        else:
            lines.append(" & ".join(latex(cell) for cell in row) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines += [rf"\\{{\footnotesize [{i}] {latex(note)}.}}" for i, note in enumerate(table.notes, 1)]
    return "\n".join([*lines, r"\end{table}", ""])


def latex(text: str) -> str:
    """Text of a run that LaTeX prints literally."""
    return printable(text).translate(LATEX)


def as_markdown(table: Table) -> str:
    """A Markdown table; headings inside it are bold rows, caption and notes follow it."""
    rule = ["---"] + ["---" if table.prose else "--:"] * (len(table.columns) - 1)
    lines = [[markdown(c) for c in table.named_columns()], rule]
    for row in table.rows:
        cells = [markdown(c) for c in row]
        lines.append([f"**{cells[0]}**"] + [""] * (len(table.columns) - 1) if len(row) == 1 else cells)
    caption = table.caption and f"*{markdown(table.caption)}*"
    grid = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "\n".join(f"{i}. {markdown(note)}." for i, note in enumerate(table.notes, 1))
    return "\n\n".join(filter(None, [caption, grid, notes]))


def markdown_report(arms: Arms, title: str, subtitle: str, parts: list[Section]) -> str:
    """The report without its examples, for places where only text goes."""
    text = [f"# {markdown(title)}", markdown(subtitle), f"**{markdown(headline(arms))}** {markdown(evidence(arms))}"]
    if stand_in(arms):
        text.append("**The language model is a stand-in taught on a little text; it is not Qwen2.5-0.5B-Instruct.**")
    for part in parts:
        if part.anchor == "examples":
            continue
        text.append(f"## {markdown(part.title)}")
        if part.anchor != "result":  # whose sentence stands at the top
            text += [markdown(part.text, keep="\n").replace("\n", "\n\n"), markdown(part.paste)]
        text += ["\n".join(f"- {markdown(sentence)}" for _, sentence in part.verdicts)]
        for figure in part.figures:
            absent = f"Not drawn: {markdown(figure.absent)}."
            image = f"![{markdown(figure.caption)}](figures/{figure.name}.svg)"
            text += [f"### {markdown(figure.title)}", absent if figure.absent else image]
        for table in part.tables:
            text += [f"### {markdown(table.title)}{' (not ours)' if table.published else ''}", as_markdown(table)]
        if part.anchor == "run":
            marks = {True: "ok", False: "CAUTION", None: "unknown"}
            text.append("\n".join(f"- {marks[ok]}: {markdown(sentence)}" for ok, sentence in checks(arms)))
            text.append("\n".join(f"- {markdown(problem)}." for problem in arms.problems))
    for run in arms.runs:
        text += [f"### {markdown(run.name)}", as_markdown(details(run))]
    return "\n\n".join(filter(None, text)) + "\n"


def csv_table(arms: Arms) -> str:
    """The comparison for machines: percentages with four decimals, number of seeds, sd, differences."""
    first, *rest = arms.models
    columns = ["section", "benchmark", "metric"]
    columns += [f"{m} {what}" for m in arms.models for what in ("mean", "sd", "seeds")]
    columns += [f"{m} - {first} {what}" for m in rest for what in ("mean", "sd", "seeds")]
    rows = [columns]
    for heading, keys in comparison_keys(arms):
        for key, name in keys:
            groups = [list(arms.scores(model, key).values()) for model in arms.models]
            groups += [list(paired_differences(arms, first, model, key).values()) for model in rest]
            rows.append([heading, name, key, *(cell for values in groups for cell in _numbers(values))])
    return csv_text(rows)


def _numbers(values: list[float]) -> list[str]:
    if not values:
        return ["", "", "0"]
    mean, sd = mean_sd(values)
    return [f"{mean:.4f}", "" if sd is None else f"{sd:.4f}", str(len(values))]


def html_page(arms: Arms, title: str, subtitle: str, parts: list[Section]) -> str:
    """One self-contained page: inline style, figures and images, one script of its own, no network.

    The template escapes everything that comes from runs; only our own figures are passed through as markup. The page's
    policy lets no script run but ours, by its hash.
    """
    own = resources.files("stages.report")
    template, style, script = (own.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html.j2", "css", "js"))
    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["deltas"] = deltas
    page = environment.from_string(template).render(
        title=title,
        subtitle=subtitle,
        css=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        sections=parts,
        stand_in=stand_in(arms),
        evidence=evidence(arms),
        models=arms.models,
        checks=checks(arms),
        problems=arms.problems,
        gallery=examples(arms),
        details=[(run, details(run)) for run in arms.runs],
    )
    return page.replace("95 %", "95\u00a0%")  # not to be parted at the end of a line


def deltas(cell: str) -> str:
    """The cell, escaped, its difference in brackets coloured by its sign."""

    def coloured(match: re.Match) -> str:
        kind = {"+": "up", "\u2212": "down"}.get(match[1][0], "level")
        return f'<span class="{kind}">({match[1]})</span>'

    return Markup(re.sub(r"\(([+\u2212]?\d+\.\d+\*?)\)", coloured, str(escape(cell))))
