"""Sets whose labels are numbers: clip-benchmark's shards (KEY.webp + KEY.cls), or parquet (image, label)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import parse_json, parse_yaml, read_json, read_text
from diffclip.benchmarks.images import (
    ROWS,
    Images,
    TarSlice,
    row_splits,
    shard_samples,
    table_rows,
    table_schema,
    visible,
)
from diffclip.data.layout import split_named

NUMBERED = re.compile(r"([A-Za-z]+)(?:-.*|[_.]\d.*)?")  # a split's files: test, test-00000-of-00002, test_0, test.0
LABEL_COLUMNS = ("label", "fine_label", "labels", "cls")


def labelled_files(folder: Path, split: str) -> list[Path]:
    """The shards or tables of train, val or test, in `folder`, in its data/, or in the folder of its one configuration,
    as the Hub has it.

    Their names: `SPLIT/*.tar`, `SPLIT/*.parquet`, `SPLIT.parquet`, `SPLIT-*.tar`, `SPLIT_0.parquet`, with the split by
    any of its names, in any case; or any name for a table whose column `split` has rows of it. InputError: files by
    two of the split's names, or in the folders of two configurations.
    """
    for place in (folder, folder / "data"):
        if files := _named_files(place, split):
            return files
    for place in (folder, folder / "data"):
        unnamed = [path for suffix in ROWS for path in _with_suffix(place, suffix) if _split_first(path) is None]
        if with_split := [path for path in unnamed if split in row_splits(path)]:
            return with_split
    configurations = {place.name: files for place in _folders(folder) if (files := _named_files(place, split))}
    if len(configurations) > 1:
        raise InputError(f"{folder} has the configurations {', '.join(configurations)}: keep one, or name its folder")
    return next(iter(configurations.values()), [])


def _named_files(place: Path, split: str) -> list[Path]:
    """Files that lie in a folder called like the split, or are called like it themselves."""
    for suffix in (".tar", *ROWS):
        folders = [path for path in _folders(place) if split_named(path.name) == split]
        files = {file: path.name for path in folders for file in _with_suffix(path, suffix)}
        if not files:
            numbered = ((path, NUMBERED.fullmatch(path.stem)) for path in _with_suffix(place, suffix))
            files = {path: found[1] for path, found in numbered if found and split_named(found[1]) == split}
        if len(words := sorted(set(files.values()))) > 1:
            raise InputError(f"{place} has {split} files as {' and as '.join(words)}: keep those of one name")
        if files:
            return list(files)
    return []


def _split_first(file: Path) -> str | None:
    """The split that a file's name begins with: train-00000-of-00002.parquet."""
    return split_named(re.split(r"[-_.]", file.name)[0])


def _folders(place: Path) -> list[Path]:
    return [path for path in visible(place.iterdir()) if path.is_dir()] if place.is_dir() else []


def _with_suffix(place: Path, suffix: str) -> list[Path]:
    entries = visible(place.iterdir()) if place.is_dir() else []
    return [path for path in entries if path.suffix.lower() == suffix and path.is_file()]


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
    for name, image, label in table_rows(path, LABEL_COLUMNS, wanted):
        yield name, image, _label(label, name)


def declared_classnames(folder: Path, files: Sequence[Path]) -> list[str] | None:
    """The class names that the Hub's files declare for the column of labels, None without any: those in the schema of
    tables, else those of dataset_info.json, dataset_infos.json or the head of README.md.

    InputError: several configurations of one of these files have other names.
    """
    columns: Sequence[str] = LABEL_COLUMNS
    for path in files:
        if path.suffix.lower() in ROWS:
            schema = table_schema(path)
            columns = [name for name in LABEL_COLUMNS if name in schema.names][:1]
            stored = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"), f"{path}: its schema")
            if names := _class_labels(stored, columns):
                return names[0]
    homes = dict.fromkeys((*(path.parent for path in files), folder, folder / "data"))
    for file in (home / name for home in homes for name in ("dataset_info.json", "dataset_infos.json", "README.md")):
        names = _class_labels(_declared(file), columns) if file.is_file() else []
        if any(other != names[0] for other in names):
            raise InputError(f"{file} declares class names for several configurations: write them into classnames.json")
        if names:
            return names[0]
    return None


def _declared(file: Path) -> Any:
    """What a file says of its data set: all of a JSON file, or `dataset_info` of a README's front matter."""
    if file.suffix == ".json":
        return read_json(file)
    found = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", read_text(file), re.DOTALL)
    head = parse_yaml(found[1], str(file)) if found else None
    return head.get("dataset_info") if isinstance(head, dict) else None


def _class_labels(declared: Any, columns: Sequence[str]) -> list[list[str]]:
    """The names of the labels of each configuration that is declared, at any depth: of the first of `columns`.

    `features` is {column: {"names": [...]}}; in a README [{name: column, dtype: {class_label: {names: {"0": ...}}}}].
    """
    if isinstance(declared, list):
        return [names for each in declared for names in _class_labels(each, columns)]
    if not isinstance(declared, dict):
        return []
    features = declared.get("features")
    if isinstance(features, list):
        kinds = {f.get("name"): f.get("dtype") for f in features if isinstance(f, dict)}
        features = {name: kind.get("class_label") for name, kind in kinds.items() if isinstance(kind, dict)}
    if not isinstance(features, dict):
        return [names for each in declared.values() for names in _class_labels(each, columns)]
    for column in columns:
        names = features[column].get("names") if isinstance(features.get(column), dict) else None
        if isinstance(names, dict) and all(str(number).isdecimal() for number in names):
            names = [names[number] for number in sorted(names, key=int)]
        if isinstance(names, list) and names:
            return [[str(name) for name in names]]
    return []
