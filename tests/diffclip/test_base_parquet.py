"""The one door for parquet: what it reads is what was written, and what strangers write is refused by name."""

import os

import pyarrow
import pyarrow.parquet
import pytest

from diffclip.base import parquet
from diffclip.base.errors import InputError


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_rows_batches_and_tables_hold_what_was_written(tmp_path):
    path = write(tmp_path / "a.parquet", name=[str(i) for i in range(150)], number=range(150))
    assert parquet.schema(path).names == ["name", "number"] and parquet.row_count(path) == 150
    assert [row["number"] for row in parquet.rows(path)] == [*range(150)]
    assert [*parquet.rows(path, ["name"])][149] == {"name": "149"}
    assert [len(batch) for batch in parquet.batches(path, size=100)] == [100, 50]
    assert parquet.read(path, ["number"]).to_pydict() == {"number": [*range(150)]}


def many(path):
    write(path, name=pyarrow.nulls(30_000_000))


def doubled(path):
    table = pyarrow.table({"a": [1]})
    pyarrow.parquet.write_table(table.append_column("a", table["a"]), path)


def cut(path):
    write(path, name=["a"] * 100)
    path.write_bytes(path.read_bytes()[:-30])


HOSTILE = {
    "no such file": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "is no file"),
    "a pipe": (os.mkfifo, "is no file"),
    "empty": (lambda path: path.touch(), "cannot be read as parquet"),
    "cut": (cut, "cannot be read as parquet"),
    "very many rows": (many, "claims 30,000,000 rows of"),
    "a name twice": (doubled, "has two columns of the name a"),
    "another column": (lambda path: write(path, other=["a"]), "has no column name, but other"),
    "text that is not UTF-8": (
        lambda path: write(path, name=pyarrow.array([b"\xff"]).view(pyarrow.utf8())),
        "cannot be read as parquet",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_by_name(kind, tmp_path):
    make, words = HOSTILE[kind]
    make(path := tmp_path / "a.parquet")
    with pytest.raises(InputError, match=words) as error:
        list(parquet.rows(path, ["name"]))
    assert str(error.value).startswith(f"{path}: ")
