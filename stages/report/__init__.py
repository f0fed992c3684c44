"""Stage 5: report. The paper's tables and figures, and what lies behind them, from any set of run directories.

Every directory with a run.json at or below the given paths is read and grouped by model and seed. Partial runs are
welcome: what is missing is shown as a dash with the reason. No model is run, so it takes seconds. Written are
index.html (one self-contained page), report.md, figures/ (SVG, PNG), tables/ (CSV, LaTeX) and table.csv.

    python -m stages.report runs/quickstart --out report/
"""

import argparse
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from diffclip.base.errors import InputError
from stages.report.data import Arms, gather, mean_sd, write_text
from stages.report.pope import pope_verdict
from stages.report.setup import checks, details, stand_in
from stages.report.tables import comparison, comparison_keys, evidence, paired_differences

if TYPE_CHECKING:
    from stages.report.html import Section


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stages.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("report"), help="directory to write (default: report)")
    arguments = parser.parse_args(argv)
    arms = gather(arguments.runs)
    index = write_report(arms, arguments.out)
    print_table(arms)
    print(f"Report: {index}")


def build_report(runs: list[Path], out: Path) -> Path:
    """Write the report of all run directories at or below `runs` into `out`.

    Returns:
        The path of index.html.

    Raises:
        InputError: a path does not exist, no run.json lies below any, or `out` is a file.
    """
    return write_report(gather(runs), out)


def write_report(arms: Arms, out: Path) -> Path:
    """The files of `build_report`, each written whole or not at all."""
    from stages.report.export import write_tables
    from stages.report.figures import figures
    from stages.report.html import page, sections

    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give --out a directory")
    parts = sections(arms, figures(arms, out / "figures"))
    write_tables([table for part in parts for table in part.tables], out / "tables")
    write_text(out / "table.csv", csv_table(arms))
    write_text(out / "report.md", markdown(arms, parts))
    write_text(out / "index.html", page(arms, title(arms), subtitle(arms), parts))
    return out / "index.html"


def title(arms: Arms) -> str:
    *others, last = arms.models
    return f"{', '.join(others)} and {last}" if others else last


def subtitle(arms: Arms) -> str:
    """Dates and counts in one line."""
    started = sorted(str(run.record["started"])[:10] for run in arms.runs if run.record.get("started"))
    days = " to ".join(dict.fromkeys([started[0], started[-1]])) if started else "at an unknown time"
    seeds = sorted({seed for model in arms.models for seed in arms.seeds(model)}, key=lambda s: (len(s), s))
    runs = f"{len(arms.runs)} run{'s' * (len(arms.runs) != 1)}"
    return f"{runs}, started {days}; seed{'s' * (len(seeds) != 1)} {', '.join(seeds) or 'unknown'}."


def markdown(arms: Arms, parts: list["Section"]) -> str:
    """The report without its examples, for places where only text goes."""
    from stages.report.export import as_markdown
    from stages.report.export import markdown as escape

    text = [f"# {escape(title(arms))}", escape(subtitle(arms)), f"**{escape(evidence(arms))}**"]
    if stand_in(arms):
        text.append("**The language model is a stand-in taught on a little text; it is not Qwen2.5-0.5B-Instruct.**")
    for part in parts:
        if part.anchor == "examples":
            continue
        text.append(f"## {escape(part.title)}")
        text += [escape(part.text).replace("\n", "\n\n")] if part.text else []
        text += ["\n".join(f"- {escape(sentence)}" for _, sentence in part.verdicts)] if part.verdicts else []
        for figure in part.figures:
            shown = f"![{escape(figure.caption)}](figures/{figure.name}.svg)"
            text += [f"### {escape(figure.title)}", f"Not drawn: {escape(figure.absent)}." if figure.absent else shown]
        for table in part.tables:
            text += [f"### {escape(table.title)}{' (not ours)' if table.published else ''}", as_markdown(table)]
        if part.anchor == "run":
            marks = {True: "ok", False: "CAUTION", None: "unknown"}
            text.append("\n".join(f"- {marks[ok]}: {escape(sentence)}" for ok, sentence in checks(arms)))
            text += ["\n".join(f"- {escape(problem)}." for problem in arms.problems)] if arms.problems else []
    for run in arms.runs:
        text += [f"### {escape(run.name)}", as_markdown(details(run))]
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


def print_table(arms: Arms) -> None:
    """The comparison and what must be said with it, on the console."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = comparison(arms)
    shown = RichTable(title="Scores (%)", title_justify="left")
    if len(arms.models) == 2:
        table.columns[3] = "difference"  # leaves room on a narrow terminal
    for i, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="right" if i else "left")
    for row in table.rows:
        if len(row) == 1:
            shown.add_section()
        shown.add_row(*(Text(cell, style="bold" if len(row) == 1 else "") for cell in row))
    console = Console()
    console.print(shown)
    for number, note in enumerate(table.notes, 1):
        console.print(Text(f"[{number}] {note}."))
    for model in arms.models:
        console.print(Text(pope_verdict(arms, model)[1]))
    console.print(Text(evidence(arms)))
