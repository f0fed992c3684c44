"""Rows as files hold them, whatever the layout: a JSON array, JSON lines, parquet, or a folder of `datasets`."""

from collections.abc import Iterator
from pathlib import Path

from datasets import load_from_disk
from pyarrow.parquet import ParquetFile

from diffclip.base.errors import InputError
from diffclip.base.files import parse_json, read_jsonl, read_text


def read_rows(path: str | Path) -> Iterator[dict]:
    """The rows of a file or folder, one at a time; InputError for what holds none."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        yield from _table_rows(path)
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a LLaVA JSON or JSONL file")
    with open(path, "rb") as f:
        head = f.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    rows = parse_json(read_text(path), str(path)) if head == b"[" else (row for _, row in read_jsonl(path))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is no JSON object; expected id, image and conversations")
        yield row


def _table_rows(path: Path) -> Iterator[dict]:
    """Rows of a parquet file or a `datasets` folder, images in them still encoded."""
    try:
        if path.is_dir():
            table = load_from_disk(str(path)).with_format("arrow")
            names, batches = table.column_names, table.iter(64)
        else:
            file = ParquetFile(path)
            names, batches = file.schema_arrow.names, file.iter_batches(64)
        for batch in batches if "conversations" in names else ():
            yield from batch.to_pylist()
    except Exception as error:
        # any of a dozen kinds, by what is broken
        raise InputError(f"{path}: cannot be read as a `datasets` folder or parquet file ({error})") from error
    if "conversations" not in names:
        raise InputError(f"{path}: has no column conversations; LLaVA's rows have id, image and conversations")
