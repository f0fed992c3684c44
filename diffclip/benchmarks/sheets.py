"""Tables as authors and spreadsheets save them, row by row: Excel writes UTF-16, semicolons, tabs and blank lines."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import read_text

SEPARATORS = "|\t;,"


def read_sheet(path: Path, *, windows: bool = False, quoted: str = ",;") -> Iterator[tuple[int, list[str]]]:
    """Yield (line, stripped cells) of each row that holds something, the header first; it may have fewer cells.

    The separator is told from the header, which may follow Excel's `sep=;`. UTF-16 is told from its byte order mark.

    Args:
        windows: what is not UTF-8 is cp1252.
        quoted: the separators of tables in which quotes enclose cells; in others a quote is text.

    Raises:
        InputError: another encoding, a quote that is not closed, or a row with more cells than the header.
    """
    lines = [f"{line}\n" for line in re.split(r"\r\n|\r|\n", _text(path, windows))]
    skipped = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if declared := re.fullmatch(r'"?sep=(.)"?\n', lines[skipped]):
        skipped += 1
    head = lines[skipped] if skipped < len(lines) else ""
    separator = declared[1] if declared else max(SEPARATORS, key=head.count)
    quoting: Any = csv.QUOTE_MINIMAL if separator in quoted else csv.QUOTE_NONE
    reader = csv.reader(lines[skipped:], delimiter=separator, quoting=quoting, strict=True)
    width = 0
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            line = skipped + reader.line_num
            while width and len(cells) > width and not cells[-1]:  # separators at the end of a line
                cells.pop()
            if width and len(cells) > width:
                raise InputError(
                    f"{path} line {line}: more cells than columns, {len(cells)} and not {width}: put cells that hold "
                    f"{separator!r} into quotes: {str(row)[:80]}"
                )
            width = width or len(cells)
            yield line, cells
    except csv.Error as error:
        raise InputError(f"{path} line {skipped + reader.line_num}: cannot be read as a table ({error})") from None


def _text(path: Path, windows: bool) -> str:
    try:
        return read_text(path)
    except InputError:
        content = path.read_bytes() if path.is_file() else b""
        encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252" if windows and content else ""
        try:
            return content.decode(encoding)
        except LookupError:
            pass
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not {encoding} (byte {error.start}): save it as UTF-8") from None
        raise
