"""Files of rows as tables: CSV and its kin, parquet, the rows of `diffclip.data.records`, what `datasets` saves."""

import codecs
import csv
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import pyarrow
import pyarrow.csv
from pyarrow import compute

from diffclip.base import parquet
from diffclip.base.errors import InputError, first_line
from diffclip.base.files import refuse_pipe, utf8_remedy
from diffclip.data.captions import texts
from diffclip.data.columns import Columns, chosen_columns, may_be_needed, table_of
from diffclip.data.layout import Layout, chosen_split
from diffclip.data.records import is_token, json_rows, lines_of, token_rows

SEPARATORS = (",", "\t", ";", "|")
LONGEST_HEADER = 10_000  # characters
SEP = re.compile('"?sep=(.)"?')  # with which Excel says what separates
KINDS = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".token", ".txt")
PACKED = (".json", ".jsonl", ".csv", ".tsv")  # also with .gz behind it
SAVED = ("dataset_info.json", "dataset_dict.json")  # of which a folder that `datasets` saved holds one


def kind_of(path: str) -> str:
    """The suffix that says what a file is, without .gz; "" for what is no table."""
    kinds = {f"{kind}.gz": kind for kind in PACKED} | {kind: kind for kind in KINDS}
    return next((kind for suffix, kind in kinds.items() if path.lower().endswith(suffix)), "")


def is_saved(path: str) -> bool:
    """Whether `datasets` saved this folder."""
    return any(os.path.isfile(os.path.join(path, name)) for name in SAVED)


def column_names(path: str) -> list[str]:
    """The columns of a table, of JSON those of its first row; [] of all else. InputError as `read_table`."""
    kind = kind_of(path)
    if is_saved(path):
        rows = saved(path)
        return next(iter(rows.values())).column_names if isinstance(rows, datasets.DatasetDict) else rows.column_names
    if os.path.isdir(path):
        return []
    if kind == ".parquet":
        return parquet.schema(path).names
    return list(next(iter(json_rows(path, kind == ".jsonl")), {})) if kind in (".json", ".jsonl") else []


def holds_captions(path: str, layout: Layout) -> bool:
    """Whether a table has columns of images and captions, or a text's first line is one of Flickr's."""
    kind = kind_of(path)
    try:
        if kind in (".parquet", ".arrow", ".json", ".jsonl"):
            return kind == ".arrow" or _fits(path, column_names(path), layout)
        line = _header(path, _by_mark(path, layout))[0].strip()[:LONGEST_HEADER]
        separated = [next(csv.reader([line], delimiter=separator), []) for separator in SEPARATORS]
    except (InputError, csv.Error):  # another text
        return False
    return is_token(line) or any(_fits(path, names, layout) for names in separated)


def read_table(path: str, layout: Layout) -> Columns:
    """A table file of `KINDS`, a folder that `datasets` saved, or `hf:owner/name`, of which /SPLIT may name a split.

    InputError for another kind of file, one that cannot be read, or no column of images or of captions.
    """
    kind = kind_of(path)
    if path.startswith("hf:") or is_saved(path):
        return table_of(path, _of_datasets(path, layout), layout)
    if kind in (".token", ".txt", ".csv", ".tsv"):
        layout = _by_mark(path, layout)
        if kind in (".csv", ".tsv") or not is_token(_header(path, layout)[0].strip("\r\n")):
            return _read_csv(path, layout)
        return table_of(path, _dataset(path, token_rows(path, layout.encoding), layout), layout)
    if kind in (".json", ".jsonl"):
        return table_of(path, _dataset(path, json_rows(path, kind == ".jsonl"), layout), layout)
    if kind in (".parquet", ".arrow"):
        return table_of(path, _parquet(path) if kind == ".parquet" else _arrow(path), layout)
    raise InputError(
        f"{path}: unknown kind of data; use .tar shards, {', '.join(KINDS)}, a dataset folder or one of images"
    )


def _parquet(path: str) -> datasets.Dataset:
    if parquet.row_count(path):  # `datasets` takes no file without any
        with parquet.readable(path, "parquet"):
            try:
                return datasets.load_dataset("parquet", data_files=path, split="train")
            except (OSError, datasets.exceptions.DatasetGenerationError) as error:
                if not isinstance(error.__cause__ or error, OSError):
                    raise
    # nor is there room for its cache, or it is not ours to write: the rows stay in memory then
    table = parquet.read(path)
    with parquet.readable(path, "parquet"):
        return datasets.Dataset(datasets.table.InMemoryTable(table))


def _arrow(path: str) -> datasets.Dataset:
    """A single file of those that `datasets` saves or keeps in its cache."""
    with parquet.readable(path, "arrow"):
        refuse_pipe(path)
        return datasets.Dataset.from_file(path)


def _of_datasets(path: str, layout: Layout) -> datasets.Dataset:
    if path.startswith("hf:"):
        name, _, split = path.removeprefix("hf:"), "", ""
        if name.count("/") == 2 and not os.path.isdir(name):
            name, _, split = name.rpartition("/")
        wanted = replace(layout, split=split or layout.split)
        try:
            splits = datasets.get_dataset_split_names(name)
        except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError):
            splits = [wanted.split or "train"]  # loading says what is wrong
        chosen = chosen_split(splits, wanted, path)
        try:
            return datasets.load_dataset(name, split=chosen)
        except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"{path}: `datasets` cannot read it ({first_line(error)})") from None
    rows = saved(path)
    if not isinstance(rows, datasets.DatasetDict):
        return rows
    if not layout.split and len(rows) > 1 and "train" in layout.prefer:
        listed = ", ".join(rows)
        raise InputError(f"{path}: holds the splits {listed}: name one, e.g. {path}/{next(iter(rows))}, or set `split`")
    return rows[str(chosen_split(rows, layout, path))]


def saved(path: str) -> datasets.Dataset | datasets.DatasetDict:
    """What `datasets.save_to_disk` wrote; InputError if it cannot be read."""
    with parquet.readable(path, "a folder that `datasets` saved"):
        for file in (os.path.join(where, name) for where, _, names in os.walk(path) for name in names):
            refuse_pipe(file)
        return datasets.load_from_disk(path)


# ---------------------------------------------------------------- CSV


def _read_csv(path: str, layout: Layout) -> Columns:
    """Every cell as the text that it is; the separator is told from the header line.

    InputError if it is not UTF-8, a row has more or fewer cells than the header, or a quote swallows rows.
    """
    line, skipped, declared = _header(path, layout)
    layout = replace(layout, separator=layout.separator or declared)
    usual = "\t" if kind_of(path) == ".tsv" else ","
    try:
        headers = {
            s: next(csv.reader([line], delimiter=s), [])
            for s in ([layout.separator] if layout.separator else (usual, *SEPARATORS))
        }
    except csv.Error as error:  # lines that end as on old Macs are one
        raise InputError(f"{path}: its first line cannot be read ({error}); end its lines with \\n") from None
    separator = next((s for s, names in headers.items() if _fits(path, names, layout)), layout.separator or usual)
    names = headers[separator]
    if separator == "|":  # Flickr30k's results.csv: quotes are text, spaces lie around the bars
        names = [name.strip() for name in names]
        return table_of(path, _dataset(path, _barred(path, names, layout), layout), layout)
    image, captions, _ = chosen_columns(path, names, layout)
    split = [name for name in names if name.strip().lower() == "split"]
    # in TSV quotes are text, unless the header itself stands in quotes
    quotes = usual == "," or line.startswith('"')
    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(  # one thread: messages have the row
                use_threads=False, encoding=layout.encoding, skip_rows=skipped
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=separator, quote_char='"' if quotes else False, newlines_in_values=quotes
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=[image, *captions, *split],
                column_types=dict.fromkeys((image, *captions, *split), pyarrow.string()),
                strings_can_be_null=False,
            ),
        )
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        _refuse_encoding(path, layout)
        remedy = f"; mend that row{f' (text that holds {separator!r} needs quotes)' if quotes else ''}"
        raise InputError(f"{path}: cannot be read as a table ({first_line(error)}){remedy}") from None
    while len(table) and not any(table[name][-1].as_py().strip() for name in (image, *captions)):
        table = table.slice(0, len(table) - 1)  # empty rows at the end, as Excel leaves them
    _refuse_swallowed(path, table, image, captions, separator)
    rows = datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint="csv")
    found = table_of(path, rows, replace(layout, image_column=image, caption_column=captions))
    found.notices[:0] = chosen_columns(path, names, layout)[2]
    return found


def _by_mark(path: str, layout: Layout) -> Layout:
    """The layout, with utf-16 where the mark at the beginning says so, as Excel writes it."""
    marked = next(iter(lines_of(path)), b"")[:2] in (b"\xff\xfe", b"\xfe\xff")
    return replace(layout, encoding="utf-16") if marked and layout.encoding == "utf-8" else layout


def _header(path: str, layout: Layout) -> tuple[str, int, str]:
    """The first line that is not empty; or, below Excel's `sep=;`, the next, lines to skip, and that separator."""
    if codecs.lookup(layout.encoding).name.startswith(("utf-16", "utf-32")):  # whose lines do not end at a byte
        lines = iter(b"".join(lines_of(path)).decode(layout.encoding, "replace").split("\n"))
    else:
        lines = map(partial(_decoded, path, layout), lines_of(path))
    skipped, separator = 0, ""
    for number, line in enumerate(lines, 1):
        if declared := SEP.fullmatch(line.strip("\ufeff\r\n")):
            skipped, separator = number, declared[1]
        elif line.strip():
            return line, skipped, separator
    return "", 0, ""


def _decoded(path: str, layout: Layout, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if layout.encoding == "utf-8" else layout.encoding)
    except UnicodeDecodeError:
        _refuse_encoding(path, layout)
        raise InputError(f"{path}: its first line is not {layout.encoding}; set `encoding` to what it is") from None


def _fits(path: str, names: Sequence[str], layout: Layout) -> bool:
    try:
        chosen_columns(path, names, layout)
    except InputError:
        return False
    return True


def _refuse_swallowed(path: str, table: pyarrow.Table, image: str, captions: Sequence[str], separator: str) -> None:
    rows = rf'\.(?i:jpe?g|png|webp|gif|bmp|tiff?)"?({re.escape(separator)}|\r?\n)'
    for caption in captions:
        text = table[caption]
        swallowed = compute.and_(compute.match_substring(text, "\n"), compute.match_substring_regex(text, rows))
        if compute.any(swallowed).as_py():
            first = table[image].filter(swallowed)[0].as_py()
            raise InputError(
                f"{path}: the caption of {first} begins with a quote that is not closed, and swallows the lines behind "
                "it: double the quotes inside captions, or write a .tsv, in which quotes are text"
            )


def _refuse_encoding(path: str, layout: Layout) -> None:
    """InputError with the first line that is not UTF-8, if there is one."""
    if layout.encoding != "utf-8":
        return
    for number, line in enumerate(lines_of(path), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            remedy = utf8_remedy(path)
            remedy += f", or set `encoding` to {'utf-16' if 'utf-16' in remedy else 'what it is, e.g. latin1'}"
            raise InputError(f"{path}:{number}: not UTF-8; {remedy}") from None


def _barred(path: str, names: list[str], layout: Layout) -> Iterable[dict[str, Any]]:
    for number, raw in enumerate(lines_of(path), 1):
        try:
            line = raw.decode("utf-8-sig" if layout.encoding == "utf-8" else layout.encoding).strip("\r\n")
        except UnicodeDecodeError:
            _refuse_encoding(path, layout)
            raise InputError(f"{path}:{number}: not {layout.encoding}; set `encoding` to what it is") from None
        cells = [cell.strip() for cell in line.split("|")]
        if not line.strip() or cells == names:
            continue
        if len(names) == 3 and len(cells) == 2 and (both := re.fullmatch(r"(\d+)\s+(.+)", cells[1])):
            cells = [cells[0], *both.groups()]  # the published results.csv lacks a separator in one row
        if len(cells) != len(names):
            raise InputError(f"{path}: row {number} has {len(cells)} columns and not {len(names)}: {line[:80]}")
        yield dict(zip(names, cells))


# ---------------------------------------------------------------- rows of values of any type


def _dataset(path: str, records: Iterable[dict[str, Any]], layout: Layout) -> datasets.Dataset:
    """A table of rows whose values may differ in type: images and splits as text, captions as texts or lists of them.

    InputError as `chosen_columns`, or for an image that is no text.
    """
    names: dict[str, list] = {}  # of columns that may be needed their values, of others that they are there
    count = 0
    for count, row in enumerate(records, 1):
        for name, value in row.items():
            values = names.setdefault(name, [])
            if may_be_needed(name, layout):
                values += [None] * (count - 1 - len(values))
                values.append(value)
    image, captions, _ = chosen_columns(path, [*names], layout)
    try:
        columns = _columns(path, names, count, image, captions)
        return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(columns)), fingerprint="json")
    except UnicodeEncodeError as error:
        half = f"{error.object[error.start]!r}"
        raise InputError(f"{path}: holds half a character ({half}), which no UTF-8 has; write it again") from None


def _columns(
    path: str, names: dict[str, list], count: int, image: str, captions: Collection[str]
) -> dict[str, pyarrow.Array]:
    """Columns of `count` rows; UnicodeEncodeError for text that no UTF-8 has."""
    columns: dict[str, pyarrow.Array] = {}
    for name, values in names.items():
        values += [None] * (count - len(values))
        if name == image or name.strip().lower() == "split":
            odd = next((value for value in values if value is not None and not isinstance(value, str)), None)
            if odd is not None:
                raise InputError(f"{path}: {name} must be text, not {str(odd)[:60]}; write one path a row")
            columns[name] = pyarrow.array(values, pyarrow.string())
        elif name in captions and all(value is None or isinstance(value, str) for value in values):
            columns[name] = pyarrow.array(values, pyarrow.string())
        else:
            kept = map(texts, values) if name in captions else [None] * count
            columns[name] = pyarrow.array(kept, pyarrow.list_(pyarrow.string()))
    return columns
