"""Stage 5: report. One page, one Markdown file and one CSV table from any set of run directories.

Every directory with a run.json at or below the given paths is read and grouped by model and seed. Partial runs are
welcome: what is missing is shown as a dash with the reason. Nothing is computed anew, so it takes seconds.

    python -m stages.report runs/quickstart --out report/
"""

import argparse
import csv
import io
from pathlib import Path

from diffclip.errors import InputError, exit_on_input_error
from stages.report_data import Arms, gather, mean_sd, write_text
from stages.report_tables import (
    Table,
    checks,
    comparison,
    comparison_keys,
    details,
    evidence,
    others,
    paired_differences,
    pope,
    pope_verdict,
    setup,
    stand_in,
)


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
    """Write index.html, report.md, table.csv and figures/ into `out` from all run directories at or below `runs`.

    Returns:
        The path of index.html.

    Raises:
        InputError: a path does not exist, no run.json lies below any, or `out` is a file.
    """
    return write_report(gather(runs), out)


def write_report(arms: Arms, out: Path) -> Path:
    """The files of `build_report`, each written whole or not at all."""
    from stages.figures import figures
    from stages.report_html import page

    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give --out a directory")
    drawn = figures(arms, out / "figures")
    write_text(out / "table.csv", csv_table(arms))
    write_text(out / "report.md", markdown(arms, [(name, caption) for name, caption, _ in drawn]))
    write_text(out / "index.html", page(arms, title(arms), subtitle(arms), drawn))
    return out / "index.html"


def title(arms: Arms) -> str:
    return " and ".join(arms.models)


def subtitle(arms: Arms) -> str:
    """Dates and counts in one line."""
    started = sorted(str(run.record["started"])[:10] for run in arms.runs if run.record.get("started"))
    days = " to ".join(dict.fromkeys([started[0], started[-1]])) if started else "at an unknown time"
    seeds = sorted({seed for model in arms.models for seed in arms.seeds(model)}, key=lambda s: (len(s), s))
    return f"{len(arms.runs)} runs, started {days}; seed{'s' * (len(seeds) != 1)} {', '.join(seeds) or 'unknown'}."


def markdown(arms: Arms, figures: list[tuple[str, str]]) -> str:
    """The report without its examples, for places where only text goes."""
    verdicts = [pope_verdict(arms, model)[1] for model in arms.models]
    parts = [f"# {_escape(title(arms))}", _escape(subtitle(arms)), f"**{_escape(evidence(arms))}**"]
    if stand_in(arms):
        parts.append("**The language model is a stand-in taught on a little text; it is not Qwen2.5-0.5B-Instruct.**")
    parts += ["## What was run", _table(setup(arms))]
    parts.append(
        "\n".join(
            f"- {'ok' if ok else 'unknown' if ok is None else 'CAUTION'}: {_escape(text)}" for ok, text in checks(arms)
        )
    )
    if arms.problems:
        parts.append("\n".join(f"- {_escape(problem)}." for problem in arms.problems))
    parts += ["## Comparison", "Percentages; differences in points.", _table(comparison(arms))]
    parts += ["## POPE with its controls", "\n".join(f"- {_escape(v)}" for v in verdicts), _table(pope(arms))]
    if figures:
        parts += ["## Figures", "\n\n".join(f"![{caption}](figures/{name}.svg)" for name, caption in figures)]
    if (rest := others(arms)).rows:
        parts += ["## Other numbers", _table(rest)]
    parts.append("## Every run")
    for run in arms.runs:
        parts += [f"### {_escape(run.name)}", _table(details(run))]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    """A Markdown table; headings inside it are bold rows, notes follow it."""
    rule = ["---"] + ["---" if table.prose else "--:"] * (len(table.columns) - 1)
    lines = [[_escape(c) for c in table.columns], rule]
    for row in table.rows:
        cells = [_escape(c) for c in row]
        lines.append([f"**{cells[0]}**"] + [""] * (len(table.columns) - 1) if len(row) == 1 else cells)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    notes = "\n".join(f"{i}. {_escape(note)}." for i, note in enumerate(table.notes, 1))
    return f"{text}\n\n{notes}" if notes else text


def _escape(text: str) -> str:
    """Text of a run as Markdown that shows it literally."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*_[]|#":
        text = text.replace(character, "\\" + character)
    return text


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
    shown = RichTable(title="Comparison (%)", title_justify="left")
    if len(arms.models) == 2:
        table.columns[-1] = "difference"  # leaves room on a narrow terminal
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


if __name__ == "__main__":
    with exit_on_input_error():
        main()
