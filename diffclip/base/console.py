"""Tables on the console."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffclip.base.lines import printable

WIDE = 200  # characters; for files and pipes, where nothing wraps


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", notes: Sequence[str] = ()
) -> None:
    """Print a table, the first column to the left and numbers to the right, and lines below it.

    Args:
        columns: the header; none is shown where all of it is empty.
        rows: cells of text, whose line ends stay inside the cell; a row of one cell is a heading with a line above
            it, an empty row is a line.
    """
    table = Table(title=_text(title) if title else None, title_justify="left", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(_text(column, keep="\n"), justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        if len(row) <= 1:
            table.add_section()
        if row:
            table.add_row(*(_text(cell, keep="\n", style="bold" if len(row) == 1 else "") for cell in row))
    console = Console() if Console().is_terminal else Console(width=WIDE)
    console.print(table)
    for note in notes:
        console.print(_text(note))


def _text(text: str, keep: str = "", style: str = "") -> Text:
    return Text(printable(text, keep), style=style)
