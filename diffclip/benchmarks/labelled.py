"""Sets whose labels are numbers: clip-benchmark's shards (KEY.webp + KEY.cls), or parquet (image, label)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import parse_json
from diffclip.benchmarks.images import (
    Images,
    TarSlice,
    parquet_rows,
    parquet_schema,
    row_splits,
    shard_samples,
    split_named,
    split_of,
    visible,
)

NUMBERED = re.compile(r"([A-Za-z]+)(?:-.*|[_.]\d.*)?")  # a split's files: test, test-00000-of-00002, test_0, test.0
LABEL_COLUMNS = ("label", "fine_label", "labels", "cls")


def labelled_files(folder: Path, split: str) -> list[Path]:
    """The shards or parquet files of train, val or test, in `folder` or in its data/, as the Hub has it.

    Their names: `SPLIT/*.tar`, `SPLIT/*.parquet`, `SPLIT.parquet`, `SPLIT-*.tar`, `SPLIT_0.parquet`, with the split by
    any of its names, in any case; or any name for parquet whose column `split` has rows of it. InputError: files by
    two of the split's names.
    """
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    for place in places:
        entries = visible(place.iterdir())
        for suffix in (".tar", ".parquet"):
            folders = [path for path in entries if split_named(path.name) == split and path.is_dir()]
            files = {file: path.name for path in folders for file in _with_suffix(path.iterdir(), suffix)}
            if not files:
                numbered = ((path, NUMBERED.fullmatch(path.stem)) for path in _with_suffix(entries, suffix))
                files = {path: found[1] for path, found in numbered if found and split_named(found[1]) == split}
            if len(words := sorted(set(files.values()))) > 1:
                raise InputError(f"{place} has {split} files as {' and as '.join(words)}: keep those of one name")
            if files:
                return list(files)
    for place in places:
        unnamed = [path for path in _with_suffix(place.iterdir(), ".parquet") if split_of(path) is None]
        if with_split := [path for path in unnamed if split in row_splits(path)]:
            return with_split
    return []


def _with_suffix(entries: Iterable[Path], suffix: str) -> list[Path]:
    return [path for path in visible(entries) if path.suffix.lower() == suffix and path.is_file()]


def read_labelled(files: Sequence[Path], split: str) -> Images:
    """Read a split; rows that a column `split` gives to another are left out.

    Labels that are withheld, as those of ImageNet's test set, are -1. InputError: a file that cannot be read, an
    image without a label, or a label that is no whole number.
    """
    rows: list[tuple[str, Path | TarSlice | bytes, int]] = []
    for file in files:
        rows += _labelled_tar(file) if file.suffix.lower() == ".tar" else _labelled_parquet(file, split)
    if not rows:
        raise InputError(f"{files[0]} holds no images of the split {split}")
    unlabelled = [name for name, _, label in rows if label < 0]
    if 0 < len(unlabelled) < len(rows):
        share = f"{len(unlabelled):,} of {len(rows):,}"
        raise InputError(f"{unlabelled[0]} has no label (-1), like {share} rows: remove them")
    return Images(*zip(*rows))


def _label(value: Any, name: str) -> int:
    if value is None:
        return -1
    with suppress(TypeError, ValueError, OverflowError):
        if int(value) == float(value):
            return int(value)
    raise InputError(f"{name}: label {str(value)[:40]!r} is no whole number: number the classes from 0")


def _labelled_tar(path: Path) -> Iterator[tuple[str, TarSlice, int]]:
    for key, image, label in shard_samples(path, ".cls"):
        if image is None:
            continue
        if label is None:
            raise InputError(f"{path}: image {key} has no .cls label beside it")
        name = f"{path}:{key}"
        yield name, image, _label(str(label, "utf-8", "replace").strip(), name)


def _labelled_parquet(path: Path, split: str) -> Iterator[tuple[str, bytes | Path, int]]:
    wanted = [named in (split, None) for named in row_splits(path)]
    for name, image, label, _ in parquet_rows(path, LABEL_COLUMNS, wanted):
        yield name, image, _label(label, name)


def schema_classnames(files: Sequence[Path]) -> list[str] | None:
    """The class names that the Hub's parquet files carry in their schema, None without any."""
    for path in files:
        if path.suffix.lower() == ".parquet" and b"huggingface" in (parquet_schema(path).metadata or {}):
            stored = parse_json(parquet_schema(path).metadata[b"huggingface"], f"{path}: its schema")
            features = stored.get("info", {}).get("features", {}) if isinstance(stored, dict) else {}
            for column in LABEL_COLUMNS:
                if isinstance(features.get(column), dict) and isinstance(features[column].get("names"), list):
                    return [str(name) for name in features[column]["names"]]
    return None
