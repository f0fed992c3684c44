"""Parquet files, which strangers write, opened in one place: what is wrong is an `InputError` that names the file."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet

from diffclip.base.errors import SURROUNDINGS, InputError, in_one_line

# A column of one value packs without end, so that a file of a few bytes may claim any number of rows. Text and images
# do not: honest tables have a byte or more for each row, and unpack to perhaps twenty times their size.
MOST_ROWS, MOST_UNPACKED = 1 << 20, 1 << 28  # rows, and bytes, that any file may have
ROWS_A_BYTE, TIMES = 10, 200  # and beyond these: rows for each byte of the file, and times its size


def schema(path: str | Path) -> pyarrow.Schema:
    """The columns and metadata; InputError if it is no parquet file, has a column twice, or claims too much."""
    return _opened(path).schema_arrow


def row_count(path: str | Path) -> int:
    """How many rows there are; InputError as `schema`."""
    return _opened(path).metadata.num_rows


def read(path: str | Path, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """These columns, or all, in memory; InputError as `schema`, if one is not there, or the data are broken."""
    file = _opened(path)
    _check_columns(path, file, columns)
    with readable(path, "parquet"):
        return file.read(columns if columns is None else list(columns))


def batches(path: str | Path, columns: Sequence[str] | None = None, size: int = 1024) -> Iterator[pyarrow.RecordBatch]:
    """The rows, `size` at a time; InputError as `read`."""
    file = _opened(path)
    _check_columns(path, file, columns)
    found = file.iter_batches(size, columns=columns if columns is None else list(columns))
    while True:
        with readable(path, "parquet"):
            if (batch := next(found, None)) is None:
                return
        yield batch


def rows(path: str | Path, columns: Sequence[str] | None = None, size: int = 64) -> Iterator[dict]:
    """The rows, one at a time, of which `size` are in memory; InputError as `read`, or for text that is not UTF-8."""
    for batch in batches(path, columns, size):
        with readable(path, "parquet"):
            decoded = batch.to_pylist()
        yield from decoded


@contextmanager
def readable(path: str | Path, kind: str) -> Iterator[None]:
    """Whatever a reader raises inside, of a dozen kinds by what is broken, as an InputError that names `path`.

    A full disk and the like stay what they are.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in SURROUNDINGS:
            raise
        raise InputError(f"{path}: cannot be read as {kind} ({in_one_line(error)}); write it again") from None


def _opened(path: str | Path) -> pyarrow.parquet.ParquetFile:
    if not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{path}: {'is no file' if os.path.exists(path) else 'no such file'}; name a parquet file")
    with readable(path, "parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        size, about = os.path.getsize(path), file.metadata
        unpacked = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        names = file.schema_arrow.names
    if about.num_rows > max(MOST_ROWS, ROWS_A_BYTE * size) or unpacked > max(MOST_UNPACKED, TIMES * size):
        raise InputError(
            f"{path}: claims {about.num_rows:,} rows of {unpacked:,} bytes in a file of {size:,}, which no table of "
            "text or images has; write it again"
        )
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{path}: has two columns of the name {doubled}; rename one")
    return file


def _check_columns(path: str | Path, file: pyarrow.parquet.ParquetFile, columns: Sequence[str] | None) -> None:
    if missing := [name for name in columns or () if name not in file.schema_arrow.names]:
        there = ", ".join(file.schema_arrow.names) or "none"
        raise InputError(f"{path}: has no column {', '.join(missing)}, but {there}; rename them")
