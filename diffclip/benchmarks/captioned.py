"""Retrieval sets: images with their captions, from shards, parquet, JSON or tables."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_text
from diffclip.benchmarks.images import (
    Images,
    TarSlice,
    parquet_rows,
    row_splits,
    shard_samples,
    split_named,
    split_of,
    two_columns,
    visible,
)
from diffclip.data.captions import caption_lines

CAPTION_COLUMNS = ("caption", "captions", "text")


class Captioned(NamedTuple):
    """A retrieval set: images, all captions, and for each caption the row of its image."""

    images: Images
    captions: list[str]
    owner: list[int]


# name for messages, image, captions, and the split that the file gives the row
Rows = Iterable[tuple[str, Path | TarSlice | bytes, list[str], str | None]]


def read_captioned(path: Path) -> Captioned:
    """Read the test rows of a retrieval set in any of the usual forms.

    `path` is a folder of these files, or one of them: webdataset shards (KEY.png + KEY.txt with one caption a line, as
    clip-benchmark has them); parquet with image and caption columns; JSON beside its images, as Karpathy's
    ({"images": [{"filename", "sentences": [{"raw"}]}]}), COCO's ({"images", "annotations"}), a list of
    {"image", "caption"}, or {"file": ["caption", ...]}; or a table (Flickr30k's results.csv) of image and caption.
    Splits are told by a column or key `split`, and by files called train-..., test-... . InputError: none of these, an
    image without a caption, or several splits and none of them test.
    """
    if path.is_dir():
        places = [place for place in (path, path / "test", path / "data") if place.is_dir()]
        found = (visible(place.glob(f"*{suffix}")) for suffix in READERS for place in places)
        files = next((files for files in found if files), [])
        if not files:
            raise InputError(f"{path} holds no .tar, .parquet or .json (or .csv, .tsv) file with captions")
        wanted = _test_split([split_of(file) for file in files], path)
        files = [file for file in files if split_of(file) == wanted]
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path} does not exist: give shards, a parquet file or a captions file")
    if files[0].suffix.lower() not in READERS:
        raise InputError(f"{path} is not a .tar, .parquet or .json (or .csv, .tsv) file with captions")

    rows = [row for file in files for row in READERS[file.suffix.lower()](file)]
    wanted = _test_split([split for *_, split in rows], path)
    images: list[tuple[str, Path | TarSlice | bytes]] = []
    captions: list[str] = []
    owner: list[int] = []
    for name, source, texts, split in rows:
        if split != wanted:
            continue
        texts = [text.strip() for text in texts if text.strip()]  # an empty caption is no query
        if not texts:
            raise InputError(f"{name} has no caption: each image of a retrieval set needs at least one")
        captions += texts
        owner += [len(images)] * len(texts)
        images.append((name, source))
    if not images:
        raise InputError(f"{path} holds no images with captions")
    return Captioned(Images(*zip(*images)), captions, owner)


def _test_split(splits: Iterable[str | None], path: Path) -> str | None:
    """Test where it is among them, or the only one that there is."""
    names = set(splits)
    if len(names) > 1 and "test" not in names:
        listed = ", ".join(sorted(map(str, names)))
        raise InputError(f"{path} has the splits {listed} and no test: keep the one to score")
    return "test" if "test" in names else next(iter(names), None)


def _texts(value: Any, name: str) -> list[str]:
    """Captions as they are stored: one, or a list; null is none."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(text, dict | list) for text in values):
        raise InputError(f"{name}: a caption must be text, not {str(values)[:60]}")
    return [str(text) for text in values if text is not None]


def _tar(path: Path) -> Rows:
    for key, image, text in shard_samples(path, ".txt"):
        if image is None:
            raise InputError(f"{path}: {key}.txt has no image beside it")
        try:
            yield f"{path}:{key}", image, caption_lines(str(text or b"", "utf-8-sig")), None
        except UnicodeDecodeError:
            raise InputError(f"{path}: {key}.txt is not UTF-8: write it again") from None


def _parquet(path: Path) -> Rows:
    splits = row_splits(path)
    wanted = [split == "test" or "test" not in splits for split in splits]
    for name, image, texts, number in parquet_rows(path, CAPTION_COLUMNS, wanted):
        yield name, image, _texts(texts, name), splits[number]


def _table(path: Path) -> Rows:
    """Rows of image and caption, several rows an image; the separator is told from the header."""
    lines = read_text(path).split("\n")
    separator = max("|\t;,", key=lines[0].count)
    try:  # results.csv of Flickr30k, parted by |, does not quote: a quotation mark is text there
        header, *rows = csv.reader(
            (f"{line}\n" for line in lines),
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if separator in ",;" else csv.QUOTE_NONE,
            strict=True,
        )
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error})") from None
    columns = [column.strip().lower() for column in header]
    files = ("image", "image_name", "filename", "file_name", "filepath", "file")
    names = two_columns(path, columns, (*CAPTION_COLUMNS, "comment", "title"), files)
    image, text = map(columns.index, names)
    split = columns.index("split") if "split" in columns else None
    images: dict[str, tuple[list[str], str | None]] = {}
    for number, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(columns) == 3 and len(row) == 2 and (both := re.fullmatch(r"\s*(\d+)\s+(.+)", row[1])):
            row = [row[0], *both.groups()]  # the published results.csv lacks a separator in one row
        if len(row) != len(columns):
            raise InputError(f"{path}: row {number} has {len(row)} columns and not {len(columns)}: {str(row)[:80]}")
        own_split = split_named(row[split]) if split is not None else None
        images.setdefault(row[image].strip(), ([], own_split))[0].append(row[text])
    return _beside(path, [(name, *entry) for name, entry in images.items()])


def _json(path: Path) -> Rows:
    data = read_json(path)
    entries: list[tuple[str, Any, str | None]] = []  # file, captions, split
    try:
        if isinstance(data, dict) and isinstance(data.get("annotations"), list):  # COCO
            texts: dict[Any, list] = {image["id"]: [] for image in data["images"]}
            for annotation in data["annotations"]:
                texts[annotation["image_id"]].append(annotation["caption"])
            entries = [(image["file_name"], texts[image["id"]], None) for image in data["images"]]
        elif isinstance(data, dict) and isinstance(data.get("images"), list):  # Karpathy: all splits together
            for row in data["images"]:
                file, captions = os.path.join(row.get("filepath", ""), row["filename"]), row["sentences"]
                entries.append((file, [caption["raw"] for caption in captions], split_named(row.get("split"))))
        elif isinstance(data, list):
            for row in data:
                entries.append((row["image"], row.get("captions", row.get("caption")), split_named(row.get("split"))))
        elif isinstance(data, dict) and all(isinstance(texts, list | str) for texts in data.values()):
            entries = [(name, texts, None) for name, texts in data.items()]
        else:
            raise InputError(f"{path} needs the form {{images: [...]}}, [{{image, caption}}] or {{file: [captions]}}")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: an entry lacks its image or its captions ({error})") from None
    return _beside(path, entries)


def _beside(path: Path, entries: Sequence[tuple[str, Any, str | None]]) -> Rows:
    """Find the images of a captions file beside it, in images/, or in the folder that its name ends in (val2017)."""
    folders = (path.parent, path.parent / "images", path.parent / path.stem.rsplit("_", 1)[-1])
    wanted = _test_split([split for *_, split in entries], path)
    for name, texts, split in entries:
        if split != wanted:
            continue  # the others' images need not be there
        file = next((folder / str(name) for folder in folders if (folder / str(name)).is_file()), None)
        if file is None:
            raise InputError(f"{path}: image {name} is neither beside the file nor in images/")
        yield str(file), file, _texts(texts, f"{path}: {name}"), split


READERS = {".tar": _tar, ".parquet": _parquet, ".json": _json, ".csv": _table, ".tsv": _table}
