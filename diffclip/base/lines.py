"""Lines for terminals, logs and spreadsheets: what a stranger named is shown there and never obeyed.

Names of files, keys, columns, models and members of archives hold whatever their author liked: escape sequences that
move the cursor or retitle the window, newlines that forge a line of a log, marks that turn a line around, formulas.
"""

import csv
import html
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

# C0, DEL and C1; the line ends that other readers see; marks that turn the order of a line; halves of surrogate pairs
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# with its deviation and notes, as reports have it
NUMBER = re.compile(r"[-+]?[\d.,]+(?:e[-+]?\d+)?(?: ± [\d.]+)?\*?(?: \[\d+\])*")


def printable(text: object, keep: str = "") -> str:
    """One line of text: control characters as their escapes, `\\x1b` and `\\n`, but for those in `keep`."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return HIDDEN.sub(escaped, str(text))


def markdown(text: object, keep: str = "") -> str:
    """Text as Markdown that shows it literally; `keep` as in `printable`."""
    return re.sub(r"[\\`*_\[\]|#]", r"\\\g<0>", html.escape(printable(text, keep), quote=False))


def print_line(text: object = "", *, keep: str = "", end: str = "\n", error: bool = False) -> None:
    """Print one line at once, on stderr with `error`; what the stream's encoding lacks is written as its escape.

    `keep` as in `printable`, for text of several lines of which none is a stranger's.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = printable(text, keep).encode(encoding, errors="backslashreplace").decode(encoding)
    print(line, end=end, file=stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds as "48 s", "3.4 min" or "2.1 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Plain:
    """A stream to a terminal that obeys nothing which is written through it: for libraries that print by themselves."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text, keep="\n\t"))

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, a line each, in which no cell is a formula: `'` goes before what a spreadsheet would compute."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _cell(value: object) -> str:
    text = printable(value)
    formula = text.lstrip().startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠"))
    return f"'{text}" if formula and not NUMBER.fullmatch(text) else text


def guard_terminal() -> None:
    """From now on tracebacks, warnings and log records of any library are printed as `printable` text.

    What they tell in several lines stays several, of which none but the first begins at the edge.
    """
    sys.excepthook = _print_traceback
    warnings.formatwarning = _warning
    logging.setLogRecordFactory(_Record)


def _print_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    for part in traceback.format_exception(kind, error, where):
        told = not part.startswith((" ", "\n", "Traceback"))  # by the error itself, not by Python
        print_line(_indented(part.rstrip("\n")) if told else part, keep="\n", end="\n" if told else "", error=True)


def _warning(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"{printable(filename)}:{lineno}: {category.__name__}: {printable(message)}\n"


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(_indented(super().getMessage()), keep="\n\t")


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")
