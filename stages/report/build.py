"""The report from end to end: read the runs, draw, write every file, print the comparison."""

import tempfile
from pathlib import Path

from diffclip.base.console import print_table
from diffclip.base.errors import InputError
from diffclip.base.files import write_whole
from diffclip.base.lines import print_line
from diffclip.base.sealed import files_of
from stages.report.data import Arms, gather
from stages.report.export import as_csv, as_latex, csv_table, html_page, markdown_report
from stages.report.figures import figures
from stages.report.pope import pope_verdict
from stages.report.sections import sections
from stages.report.tables import evidence, for_console

MARKS = {True: "\u2713", False: "\u2717", None: "?"}  # whether a verdict is good


def build_report(runs: list[Path], out: Path) -> Path:
    """Write the report of all run directories at or below `runs` into `out`, and print the comparison.

    An earlier report stays as it is until the new one is complete.

    Returns:
        The path of index.html.

    Raises:
        InputError: a path does not exist, no run.json lies below any, or `out` is a file.
    """
    arms = gather(runs)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give --output_dir a directory")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=out) as name:
        new = Path(name)
        write_all(arms, new)
        for file in files_of(new):
            place = out / file.relative_to(new)
            place.parent.mkdir(exist_ok=True)
            file.replace(place)
    print_scores(arms)
    print_line(f"Report: {out / 'index.html'}")
    return out / "index.html"


def write_all(arms: Arms, out: Path) -> None:
    """Write every file of a report into an empty folder."""
    for folder in ("figures", "tables"):
        (out / folder).mkdir()
    parts = sections(arms, figures(arms, out / "figures"))
    for table in (table for part in parts for table in part.tables):
        write_whole(out / "tables" / f"{table.name}.csv", as_csv(table))
        write_whole(out / "tables" / f"{table.name}.tex", as_latex(table))
    *others, last = arms.models
    title = f"{', '.join(others)} and {last}" if others else last
    write_whole(out / "table.csv", csv_table(arms))
    write_whole(out / "report.md", markdown_report(arms, title, subtitle(arms), parts))
    write_whole(out / "index.html", html_page(arms, title, subtitle(arms), parts))


def subtitle(arms: Arms) -> str:
    """Dates and counts in one line."""
    started = sorted(str(run.record["started"])[:10] for run in arms.runs if run.record.get("started"))
    days = " to ".join(dict.fromkeys([started[0], started[-1]])) if started else "at an unknown time"
    seeds = sorted({seed for model in arms.models for seed in arms.seeds(model)}, key=lambda s: (len(s), s))
    runs = f"{len(arms.runs)} run{'s' * (len(arms.runs) != 1)}"
    return f"{runs}, started {days}; seed{'s' * (len(seeds) != 1)} {', '.join(seeds) or 'unknown'}."


def print_scores(arms: Arms) -> None:
    """What may be said, and the scores, on the console."""
    for ok, verdict in (pope_verdict(arms, model) for model in arms.models):
        print_line(f"{MARKS[ok]} {verdict}")
    print_line(evidence(arms))
    table = for_console(arms)
    notes = [table.caption, *(f"[{number}] {note}." for number, note in enumerate(table.notes, 1))]
    print_table(table.columns, table.rows, "Scores (%)", [*filter(None, notes)])
