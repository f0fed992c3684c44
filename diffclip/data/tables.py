"""Pairs that are in no shards, with one way to a row of each source: CSV and TSV, parquet, folders and Hub data sets of
`datasets`, and folders of images, each with its captions in a file of the same stem beside it (img2dataset's `files`).
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.csv
from PIL import Image
from pyarrow import compute

from diffclip.base.errors import InputError, first_line
from diffclip.base.files import utf8_remedy
from diffclip.base.images import decode
from diffclip.data.captions import not_empty, parse_captions, texts
from diffclip.data.shards import IMAGE_SUFFIXES, image_rank

IMAGE_COLUMNS = ("image", "jpg", "png", "filepath", "image_path", "file_name", "jpeg", "webp", "img")
CAPTION_COLUMNS = ("caption", "text", "txt", "title", "captions", "alt_text", "alt", "TEXT")
SEPARATORS = (",", "\t", ";", "|")


@dataclass
class Columns:
    """A table file: one image column (encoded, or a path beside the file) and one caption column."""

    path: str
    rows: datasets.Dataset
    image: str
    caption: str
    numbers: np.ndarray | None = None  # (rows,) their places in the file, where some are left out
    notices: list[tuple[str, str]] = field(default_factory=list)
    problems: tuple = ()

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """The name of a row, `file:row`."""
        return f"{self.path}:{row if self.numbers is None else self.numbers[row]}"

    def __getitem__(self, row: int) -> tuple[Image.Image, list[str]]:
        values = self.rows[row]
        image = values[self.image]
        if isinstance(image, dict):  # an undecoded image of `datasets`: its bytes, or where they lie
            image = image["bytes"] or image["path"]
        if image is None:
            raise ValueError("no image")
        if isinstance(image, str):
            image = Path(self.path).parent / image
        return decode(image), not_empty(texts(values[self.caption]))


def read_table(path: str) -> Columns:
    """A .csv, .tsv or .parquet file, a folder that `datasets` saved, or `hf:owner/name`.

    InputError for another kind of file, one that cannot be read, or no column of images or of captions.
    """
    suffix = Path(path).suffix
    if suffix not in (".csv", ".tsv", ".parquet") and not path.startswith("hf:") and not os.path.isdir(path):
        raise InputError(f"{path}: unknown kind of data; use .tar shards, .csv, .tsv, .parquet or a dataset folder")
    if suffix in (".csv", ".tsv"):
        return _read_csv(path)
    try:
        if suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=path, split="train")
        elif path.startswith("hf:"):
            rows = datasets.load_dataset(path.removeprefix("hf:"), split="train")
        else:
            rows = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path}: `datasets` cannot read it ({first_line(error)})") from None
    if isinstance(rows, datasets.DatasetDict):
        raise InputError(f"{path}: holds the splits {', '.join(rows)}: name one, e.g. {path}/{next(iter(rows))}")
    image, caption = _chosen(path, rows.column_names)
    if not isinstance(rows.features[image], datasets.Value):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    failed = _failed_downloads(rows, image)
    if not failed.any():
        return Columns(path, rows, image, caption)
    rest = np.flatnonzero(~failed)
    notice = (path, f"{int(failed.sum())} rows whose download failed (their status says so) are no pairs")
    return Columns(path, rows.select(rest, keep_in_memory=True), image, caption, rest, [notice])


def _chosen(path: str, names: Sequence[str]) -> tuple[str, str]:
    image = next((c for c in IMAGE_COLUMNS if c in names), None)
    caption = next((c for c in CAPTION_COLUMNS if c in names), None)
    if image is None or caption is None:
        raise InputError(
            f"{path}: needs an image column ({', '.join(IMAGE_COLUMNS)}) and a caption column "
            f"({', '.join(CAPTION_COLUMNS)}), found {', '.join(names)}; rename them"
        )
    return image, caption


def _failed_downloads(rows: datasets.Dataset, image: str) -> np.ndarray:
    """(rows,) bool: img2dataset says in `status` that there is no image because it could not be had."""
    status = rows.data.column("status") if "status" in rows.column_names else None
    if status is None or len(status) != len(rows) or status.type not in (pyarrow.string(), pyarrow.large_string()):
        return np.zeros(len(rows), dtype=bool)
    images = rows.data.column(image)
    if pyarrow.types.is_struct(images.type):
        images = compute.struct_field(images, "bytes")
    failed = compute.fill_null(compute.starts_with(status, "failed"), False)
    return compute.and_(failed, compute.is_null(images)).to_numpy()


def _read_csv(path: str) -> Columns:
    """Every cell as the text that it is; the separator is told from the header line.

    InputError if it is not UTF-8, a row has more or fewer cells than the header, or a quote swallows rows.
    """
    with open(path, "rb") as f:
        head = f.readline()
    try:
        line = head.decode("utf-8-sig")
    except UnicodeDecodeError:
        _refuse_encoding(path)
        raise
    usual = "\t" if path.endswith(".tsv") else ","
    try:
        headers = {s: next(csv.reader([line], delimiter=s), []) for s in (usual, *SEPARATORS)}
    except csv.Error as error:  # lines that end as on old Macs are one
        raise InputError(f"{path}: its first line cannot be read ({error}); end its lines with \\n") from None
    separator = next(
        (s for s, names in headers.items() if {*names} & {*IMAGE_COLUMNS} and {*names} & {*CAPTION_COLUMNS}), usual
    )
    image, caption = _chosen(path, headers[separator])
    quotes = usual == ","
    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=False),  # so that messages have the row
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=separator, quote_char='"' if quotes else False, newlines_in_values=quotes
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=[image, caption],
                column_types=dict.fromkeys((image, caption), pyarrow.string()),
                strings_can_be_null=False,
            ),
        )
    except (pyarrow.ArrowException, OSError) as error:
        _refuse_encoding(path)
        raise InputError(f"{path}: cannot be read as a table ({first_line(error)}); mend that row") from None
    rows = rf'\.(?i:jpe?g|png|webp|gif|bmp|tiff?)"?({re.escape(separator)}|\r?\n)'
    text = table[caption]
    swallowed = compute.and_(compute.match_substring(text, "\n"), compute.match_substring_regex(text, rows))
    if compute.any(swallowed).as_py():
        first = table[image].filter(swallowed)[0].as_py()
        raise InputError(
            f"{path}: the caption of {first} begins with a quote that is not closed, and swallows the lines behind it: "
            "double the quotes inside captions, or write a .tsv, in which quotes are text"
        )
    return Columns(path, datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="csv"), image, caption)


def _refuse_encoding(path: str) -> None:
    """InputError with the first line that is not UTF-8, if there is one."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}:{number}: not UTF-8; {utf8_remedy(path)}") from None


# ---------------------------------------------------------------- folders

LITTER = ("__MACOSX", "@eaDir")  # folders of file managers, as are those with a dot in front


@dataclass
class Files:
    """The pairs of a folder: `files[i]` -> (image, captions)."""

    path: str
    pairs: list[tuple[str, str]]  # image and captions
    member: str
    problems: list[tuple[str, str]]
    notices: tuple = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def key(self, row: int) -> str:
        """The name of a pair: its image's path."""
        return self.pairs[row][0]

    def __getitem__(self, row: int) -> tuple[Image.Image, list[str]]:
        image, captions = self.pairs[row]
        return decode(image), parse_captions(Path(captions).read_bytes(), self.member)


def read_folder(folder: str, member: str) -> Files:
    """All pairs at any depth; of several images of one stem the first of `IMAGE_SUFFIXES` is taken.

    `member` is the suffix of the files of captions, "txt" or "json". InputError if there is no pair.
    """
    images, captions, seen = dict[str, str](), dict[str, str](), set[str]()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above, or a second one to the same
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in LITTER and not name.startswith("."))
        for name in sorted(names, key=_stem_and_rank):
            stem, suffix = os.path.splitext(os.path.join(where, name))
            if name.startswith("."):
                continue
            if suffix.lower() == f".{member}":
                captions[stem] = stem + suffix
            elif suffix.lower() in IMAGE_SUFFIXES:
                images.setdefault(stem, stem + suffix)
    pairs = [(image, captions[stem]) for stem, image in images.items() if stem in captions]
    if not pairs:
        raise InputError(
            f"{folder}: holds neither shards, nor a saved dataset, nor images ({', '.join(IMAGE_SUFFIXES)}) with a "
            f".{member} of the same name beside them; set caption_member, or name the files in it"
        )
    problems = [(image, f"no .{member} caption") for stem, image in images.items() if stem not in captions]
    problems += [(captions[stem], "no image") for stem in sorted(captions.keys() - images.keys())]
    return Files(folder, pairs, member, problems)


def _stem_and_rank(name: str) -> tuple[str, int]:
    stem, suffix = os.path.splitext(name)
    return stem, image_rank(suffix)
