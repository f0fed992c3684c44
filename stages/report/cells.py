"""The report's tables as plain rows of text, so that HTML, Markdown, LaTeX, CSV and the console show the same.

Scores are percentages with one decimal, mean ± sample standard deviation over seeds; a dash carries the number of
the note that says why the score is missing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from diffclip.base import lines
from stages.report.data import Arms, is_number, mean_sd

MINUS, DASH = "\u2212", "\u2013"


@dataclass
class Table:
    """Rows of text under `columns`; a row with one cell is a heading. The first column is text, others numbers."""

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # "[1]" in a cell is notes[0]
    prose: bool = False  # the other columns are text as well
    name: str = ""  # of its files, e.g. "table1"
    title: str = ""
    caption: str = ""
    groups: list[tuple[str, int]] = field(default_factory=list)  # headings over the columns: (text, how many columns)
    published: bool = False  # the paper's numbers, not ours
    folded: bool = False  # raw numbers: opens when its title is chosen

    def note(self, text: str) -> int:
        """The number of the note `text`, from 1."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1

    def missing(self, text: str) -> str:
        """A dash with the note that says why there is no number."""
        return f"{DASH} [{self.note(text)}]"

    def named_columns(self) -> list[str]:
        """The columns, each with its group's heading before it, for places that have one line of headings only."""
        over = [text for text, count in self.groups for _ in range(count)] or [""] * len(self.columns)
        return [f"{group}: {column}" if group else column for group, column in zip(over, self.columns)]


def percent(values: Iterable[float], sign: bool = False) -> str:
    """Percentages as "78.1 ± 1.2" (mean and sd) or "78.1"; with `sign`, points as "+0.4"."""
    mean, sd = mean_sd(list(values))
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    text = {"-0.0": "0.0", "+0.0": "0.0"}.get(text, text).replace("-", MINUS)
    return text if sd is None else f"{text} ± {sd:.1f}"


def score(arms: Arms, table: Table, model: str, key: str) -> str:
    """The cell of `model` under `key`; missing seeds are explained in the table's notes."""
    values = arms.scores(model, key)
    missing = [s for s in arms.seeds(model) if s not in values]
    notes = sorted({table.note(arms.why_missing(model, seed, key)) for seed in missing})
    marks = "".join(f" [{n}]" for n in notes)
    return (percent(values.values()) if values else DASH) + marks


def p_value(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def distinct(values: Iterable[str]) -> str:
    """The different values in order, or a dash."""
    return ", ".join(dict.fromkeys(v for v in values if v)) or DASH


def number(value: Any) -> str:
    return f"{value:,}" if is_number(value) else str(value)


def duration(seconds: Any) -> str:
    """Seconds as "48 s", "3.4 min" or "2.1 h"; a dash for what is no number."""
    return lines.duration(seconds) if is_number(seconds) else DASH
