"""Which rows of tables are read, where a column or lists tell their splits, and whether their images are there."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import datasets
import numpy as np
import pyarrow
from pyarrow import compute

from diffclip.base.errors import InputError
from diffclip.data.columns import Columns, holds_paths
from diffclip.data.layout import Layout, chosen_split, split_named
from diffclip.data.records import listed_splits, split_lists

LOOKED_AT = 64  # rows whose images are looked for before anything starts


def of_one_split(tables: Sequence[Columns], layout: Layout, where: str) -> list[Columns]:
    """The tables of one source with the rows of one split, which is the same for all; all rows where nothing tells it.

    Raises:
        InputError: several splits of which none is named or preferred, or none of the images that are looked for is
            there; images of other splits need not be.
    """
    splits = [_splits(table, layout) for table in tables]
    names = dict.fromkeys(name for each in splits if each for name in each if name != "")
    where = tables[0].path if len(tables) == 1 else where
    split = chosen_split(names, layout, where, "set `split` to one of them") if names else None
    kept = [table if each is None else _kept(table, each, split) for table, each in zip(tables, splits)]
    for table in kept:
        if len(table) and holds_paths(table.rows.features[table.image]):
            _look_for_images(table)
    return kept


def _splits(table: Columns, layout: Layout) -> list[str | None] | None:
    """The split of each row, by a column `split` or lists of images beside the table; None where nothing tells it.

    What is in none of the lists has "", and belongs to no split.
    """
    path, rows = table.path, table.rows
    if (name := next((name for name in rows.column_names if name.strip().lower() == "split"), None)) is None:
        lists = split_lists(path) if holds_paths(rows.features[table.image]) and os.path.isfile(path) else []
        images = rows.select_columns([table.image])[:][table.image] if lists else []
        files = [os.path.basename(image or "") for image in images]
        found = listed_splits(lists, files)
        return [found.get(file, "") for file in files] if found else None
    feature = rows.features[name]
    values = compute.cast(rows.select_columns([name]).with_format("arrow")[:][name], pyarrow.string())
    try:
        labels = [value if value and value.strip() else None for value in values.to_pylist()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: its column {name} is not UTF-8; write it again") from None
    if isinstance(feature, datasets.ClassLabel):
        labels = [None if label is None else feature.int2str(int(label)) for label in labels]
    names = dict.fromkeys(label for label in labels if label is not None)
    if not layout.split and not any(map(split_named, names)):  # names of something else
        if names:
            reason = f"its column {name} names no train, val or test ({next(iter(names))}, ...): all rows are read"
            table.notices.append((path, reason))
        return None
    unknown = next((name for name in names if not split_named(name)), None)
    if not layout.split and unknown is not None:
        raise InputError(
            f"{path}: the column split holds {unknown!r}; write train, val or test in every row, or set `split`"
        )
    same = {None: None} | {name: split_named(name) or name for name in names}
    return [same[label] for label in labels]


def _kept(table: Columns, splits: Sequence[str | None], split: str | None) -> Columns:
    """A table with its rows of one split."""
    keep = np.array([each == split for each in splits], dtype=bool)
    if keep.all():
        return replace(table, has_splits=True)
    rows = np.flatnonzero(keep)
    numbers = rows if table.numbers is None else table.numbers[rows]
    notice = (table.path, f"the {len(rows):,} rows of its split {split} are read, of {len(splits):,}")
    chosen = table.rows.select(rows, keep_in_memory=True)
    return replace(table, rows=chosen, numbers=numbers, notices=[*table.notices, notice], has_splits=True)


def _look_for_images(table: Columns) -> None:
    """InputError if none of some rows spread over the table names a file that is there."""
    column = table.rows.select_columns([table.image])
    rows = range(0, len(table), max(1, len(table) // LOOKED_AT))
    names = [name for name in column[list(rows)][table.image] if name]
    error = _missing(table, names)
    if isinstance(error, OSError) and not table.image_root:
        table.named.cut_to_fit((name for name in column[:][table.image] if name), names)
        error = _missing(table, names)
    if error:
        raise InputError(f"{table.path}: column {table.image}: {error}")


def _missing(table: Columns, names: Iterable[str]) -> Exception | None:
    """Why none of these images is found, None if one is."""
    error: Exception = OSError("no row names an image")
    for name in names:
        try:
            table.named.find(name)
            return None
        except (OSError, ValueError) as caught:
            error = caught
    return error
