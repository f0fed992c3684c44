"""Tables of pairs: CSV and TSV, parquet, and folders and Hub data sets of `datasets`, with one way to a row of each."""

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
from diffclip.data.captions import not_empty, texts

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

    Raises:
        InputError: another kind of file, one that cannot be read, or no column of images or of captions.
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
    none = np.zeros(len(rows), dtype=bool)
    if "status" not in rows.column_names or rows.data.num_rows != len(rows):
        return none
    status, images = rows.data.column("status"), rows.data.column(image)
    if not (pyarrow.types.is_string(status.type) or pyarrow.types.is_large_string(status.type)):
        return none
    if pyarrow.types.is_struct(images.type):
        images = compute.struct_field(images, "bytes")
    failed = compute.fill_null(compute.starts_with(status, "failed"), False)
    return compute.and_(failed, compute.is_null(images)).to_numpy()


def _read_csv(path: str) -> Columns:
    """Every cell as the text that it is; the separator is told from the header line.

    Raises:
        InputError: not UTF-8, a row with more or fewer cells than the header, a quote that swallows rows.
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
    quotes = not path.endswith(".tsv")
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
    swallowed = compute.and_(
        compute.match_substring(table[caption], "\n"), compute.match_substring_regex(table[caption], rows)
    )
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
