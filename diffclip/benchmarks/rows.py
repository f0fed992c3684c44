"""Rows of the files that benchmark sets come in: the samples of a shard, the rows and splits of a parquet file."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from diffclip.base.errors import InputError
from diffclip.benchmarks.images import IMAGE_SUFFIXES, TarSlice
from diffclip.data.shards import walk

SPLITS = {  # and what folders, files and the column `split` call them, in any case
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
IMAGE_COLUMNS = ("image", "img", "jpg", "webp", "png")


def split_named(name: object) -> str | None:
    """Return train, val or test for any of its names, None for another word."""
    return next((split for split, names in SPLITS.items() if str(name).strip().lower() in names), None)


def split_of(file: Path) -> str | None:
    """The split that a file's name begins with: train-00000-of-00002.parquet."""
    return split_named(re.split(r"[-_.]", file.name)[0])


class Sample(NamedTuple):
    """One key of a shard; its image stays in the file."""

    key: str
    image: TarSlice | None
    text: bytes | None


def shard_samples(path: Path, text: str) -> list[Sample]:
    """Return a shard's samples, read as training reads them: the images, and what has the suffix `text`.

    Raises:
        InputError: it is no tar, or ends early.
    """
    walked, problems = walk(path)
    if problems:
        raise InputError(f"{path} cannot be read as a webdataset shard ({problems[0][1]}): download it again")
    found = []
    for key, places in walked:
        members: dict[str, TarSlice] = {}  # the first of each suffix
        for name, place in places.items():
            members.setdefault(f".{name.lower()}", TarSlice(path, *place))
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if image or text in members:
            found.append(Sample(key, image, members[text].read() if text in members else None))
    return found


def parquet_schema(path: Path) -> pyarrow.Schema:
    """Return the columns and metadata of a parquet file; InputError if it is none."""
    try:
        return pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error})") from error


def row_splits(path: Path) -> list[str | None]:
    """Return what the column `split` gives each row of a parquet file: all None where it names no split, or is not."""
    if "split" not in parquet_schema(path).names:
        return [None] * pyarrow.parquet.read_metadata(path).num_rows
    values = pyarrow.parquet.read_table(path, columns=["split"])["split"].to_pylist()
    named = [split_named(value) for value in values]
    unknown = next((value for value, split in zip(values, named) if split is None), None)
    if None in named and any(named):
        raise InputError(f"{path}: the column split holds {unknown!r}; write train, val or test in every row")
    return named


def parquet_rows(path: Path, columns: list[str], wanted: Sequence[bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return (number, row) of the rows that are wanted."""
    numbers = [number for number, is_wanted in enumerate(wanted) if is_wanted]
    try:
        table = pyarrow.parquet.read_table(path, columns=columns).filter(pyarrow.array(wanted, pyarrow.bool_()))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error})") from error
    yield from zip(numbers, (row for batch in table.to_batches() for row in batch.to_pylist()))


def two_columns(path: Path, found: Sequence[str], second: Sequence[str], image: Sequence[str]) -> tuple[str, str]:
    """Return the column of images, and that of labels or captions: the first of these names that is there."""
    first, other = (next((name for name in wanted if name in found), None) for wanted in (image, second))
    if first is None or other is None:
        others = ", ".join((*image[1:], *second[1:]))
        names = ", ".join(found)
        raise InputError(f"{path} needs the columns {image[0]} and {second[0]} (or {others}), has {names}: rename them")
    return first, other


def encoded_image(image: Any, path: Path, name: str) -> bytes | Path:
    """The image of a parquet row: bytes, or the Hub's {bytes, path}, whose path is relative to the file."""
    if isinstance(image, dict):
        file = image.get("path")
        image = image.get("bytes") or (path.parent / file if file else None)
    if not isinstance(image, bytes | Path):
        raise InputError(f"{name} holds no image: remove the row")
    return image
