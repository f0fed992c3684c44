"""The report as text: Markdown, CSV and LaTeX (booktabs), with all that comes from runs shown literally."""

import csv
import io

from stages.report.cells import MINUS, Table
from stages.report.data import Arms, mean_sd
from stages.report.sections import Section
from stages.report.setup import checks, details, stand_in
from stages.report.tables import comparison_keys, evidence, paired_differences

LATEX = {
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
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
}


def as_csv(table: Table) -> str:
    """Rows as displayed; a heading inside the table becomes a column of its own, so that every row stands alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sectioned = any(len(row) == 1 for row in table.rows)
    writer.writerow([*(["section"] if sectioned else []), *table.named_columns()])
    heading = ""
    for row in table.rows:
        if len(row) == 1:
            heading = row[0]
        else:
            writer.writerow([_inert(c) for c in [*([heading] if sectioned else []), *row]])
    for number, note in enumerate(table.notes, 1):
        writer.writerow([f"[{number}] {note}"])
    return text.getvalue()


def _inert(cell: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{cell}" if cell[:1] in ("=", "@") else cell


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
    return "".join(LATEX.get(character, character) for character in text)


def as_markdown(table: Table) -> str:
    """A Markdown table; headings inside it are bold rows, caption and notes follow it."""
    rule = ["---"] + ["---" if table.prose else "--:"] * (len(table.columns) - 1)
    lines = [[markdown(c) for c in table.named_columns()], rule]
    for row in table.rows:
        cells = [markdown(c) for c in row]
        lines.append([f"**{cells[0]}**"] + [""] * (len(table.columns) - 1) if len(row) == 1 else cells)
    parts = ["\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    if table.notes:
        parts.append("\n".join(f"{i}. {markdown(note)}." for i, note in enumerate(table.notes, 1)))
    return "\n\n".join([*([f"*{markdown(table.caption)}*"] if table.caption else []), *parts])


def markdown(text: str) -> str:
    """Text of a run as Markdown that shows it literally."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*_[]|#":
        text = text.replace(character, "\\" + character)
    return text


def markdown_report(arms: Arms, title: str, subtitle: str, parts: list[Section]) -> str:
    """The report without its examples, for places where only text goes."""
    text = [f"# {markdown(title)}", markdown(subtitle), f"**{markdown(evidence(arms))}**"]
    if stand_in(arms):
        text.append("**The language model is a stand-in taught on a little text; it is not Qwen2.5-0.5B-Instruct.**")
    for part in parts:
        if part.anchor == "examples":
            continue
        text.append(f"## {markdown(part.title)}")
        text += [markdown(part.text).replace("\n", "\n\n")] if part.text else []
        text += ["\n".join(f"- {markdown(sentence)}" for _, sentence in part.verdicts)] if part.verdicts else []
        for figure in part.figures:
            absent = f"Not drawn: {markdown(figure.absent)}."
            image = f"![{markdown(figure.caption)}](figures/{figure.name}.svg)"
            text += [f"### {markdown(figure.title)}", absent if figure.absent else image]
        for table in part.tables:
            text += [f"### {markdown(table.title)}{' (not ours)' if table.published else ''}", as_markdown(table)]
        if part.anchor == "run":
            marks = {True: "ok", False: "CAUTION", None: "unknown"}
            text.append("\n".join(f"- {marks[ok]}: {markdown(sentence)}" for ok, sentence in checks(arms)))
            text += ["\n".join(f"- {markdown(problem)}." for problem in arms.problems)] if arms.problems else []
    for run in arms.runs:
        text += [f"### {markdown(run.name)}", as_markdown(details(run))]
    return "\n\n".join(text) + "\n"


def csv_table(arms: Arms) -> str:
    """The comparison for machines: percentages with four decimals, number of seeds, sd, differences."""
    first, *rest = arms.models
    columns = ["section", "benchmark", "metric"]
    columns += [f"{m} {what}" for m in arms.models for what in ("mean", "sd", "seeds")]
    columns += [f"{m} - {first} {what}" for m in rest for what in ("mean", "sd", "seeds")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for heading, keys in comparison_keys(arms):
        for key, name in keys:
            groups = [list(arms.scores(model, key).values()) for model in arms.models]
            groups += [paired_differences(arms, first, model, key) for model in rest]
            writer.writerow([heading, name, key, *(cell for values in groups for cell in _numbers(values))])
    return text.getvalue()


def _numbers(values: list[float]) -> list[str]:
    if not values:
        return ["", "", "0"]
    mean, sd = mean_sd(values)
    return [f"{mean:.4f}", "" if sd is None else f"{sd:.4f}", str(len(values))]
