"""Image-text pairs for contrastive training, as one random-access table over any of the usual sources.

webdataset tars are read by offset (`diffclip.data.shards`); CSV/TSV, parquet and `datasets` go through `datasets`,
which gives the same random access. What cannot be read raises `BadSample`; `diffclip.data.training_pairs` decides what
then.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import braceexpand
import numpy as np
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.base.images import BROKEN, decode
from diffclip.data.shards import IMAGE_SUFFIXES, TAR_SUFFIXES, Shard, cache_dir, index_shards

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = ("image", "jpg", "png", "filepath", "image_path", "file_name", "jpeg", "webp", "img")
CAPTION_COLUMNS = ("caption", "text", "txt", "title", "captions", "alt_text", "alt", "TEXT")
SEPARATORS = (",", "\t", ";", "|")


class BadSample(InputError):
    """A pair that cannot be used: `key` says where it is, `reason` what is wrong with it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: unreadable pair ({reason}); remove it from the data")
        self.key, self.reason = key, reason


def expand(patterns: Sequence[str]) -> list[str]:
    """Local paths of all sources that the patterns name, sorted per pattern.

    A pattern is a path with globs and `{00000..00012}` braces (a folder stands for the shards in it), an http(s)
    address with braces (downloaded once into `diffclip.data.shards.cache_dir`), or `hf:owner/name`, a dataset of the
    Hub, which stays as it is.

    Raises:
        InputError: a pattern matches nothing, or a download fails.
    """
    return [path for pattern in patterns for path in expand_one(pattern)]


def expand_one(pattern: str) -> list[str]:
    """`expand` of a single pattern."""
    paths: list[str] = []
    for part in braceexpand.braceexpand(str(pattern)):
        if part.startswith("hf:"):
            paths.append(part)
            continue
        if part.startswith(("http://", "https://")):
            paths.append(downloaded(part))
            continue
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part] if os.path.exists(part) else []
        if not found:
            raise InputError(f"{part}: no such file (from the data setting `{pattern}`)")
        for one in found:
            shards = sorted(glob.glob(os.path.join(glob.escape(one), "*.tar"))) if os.path.isdir(one) else []
            paths += shards or [one]
    return paths


def downloaded(url: str) -> str:
    """The local copy of a file on the web; of several processes one downloads and the others wait."""
    import hashlib

    from filelock import FileLock

    from diffclip.base.download import download

    name = url.split("?")[0].rsplit("/", 1)[-1]
    path = cache_dir() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            download(url, path)
    return str(path)


class PairTable:
    """All pairs of several sources: `len(table)`, `table[i]` -> (image, list of captions), `table.key(i)`.

    `table.ranges` has the (start, end) of each source's pairs, `table.problems` what was left out as
    (key, reason): samples that lack an image or a caption, shards that end early; `table.notices`, in the same form,
    what is no fault, but was read in one way of several.
    """

    def __init__(self, sources: Sequence[str], caption_member: str = "txt") -> None:
        """
        Args:
            sources: patterns as in `expand`, of tar shards, .csv/.tsv/.parquet files, `datasets` directories, or
                folders of images with a file of captions beside each.
            caption_member: member of a webdataset sample that holds the text, "txt" or "json".
        """
        groups = [expand_one(pattern) for pattern in sources]
        paths = [path for group in groups for path in group]
        if not paths:
            raise InputError("no training data given: set train_data to shards, a CSV or a parquet file")
        self.caption_member = caption_member
        tars = [path for path in paths if path.endswith(TAR_SUFFIXES)]
        shards = dict(zip(tars, index_shards(tars, caption_member)))
        self.parts = [shards[path] if path in shards else _table(path, caption_member) for path in paths]
        self.ends = np.cumsum([len(part) for part in self.parts])
        last = np.cumsum([len(group) for group in groups]) - 1
        ends = [int(self.ends[i]) for i in last]
        self.ranges = list(zip([0, *ends[:-1]], ends))
        self.problems = [problem for part in self.parts for problem in part.problems]
        self.notices = [notice for part in self.parts for notice in part.notices]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        part, row = self._find(index)
        try:
            if isinstance(part, Shard):
                image, text = part.read(row)
                return decode(image), parse_captions(text, self.caption_member)
            return part[row]
        except BROKEN as error:
            raise BadSample(part.key(row), str(error) or type(error).__name__) from None

    def key(self, index: int) -> str:
        """Where a pair comes from: `shard.tar/key`, or `file:row`."""
        part, row = self._find(index)
        return part.key(row)

    def _find(self, index: int) -> tuple["Shard | Columns | Files", int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], int(index - (self.ends[part - 1] if part else 0))


@dataclass
class Columns:
    """A table file: one image column (encoded, or a path beside the file) and one caption column."""

    path: str
    rows: "Dataset"
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
        return decode(image), _not_empty(texts(values[self.caption]))


@dataclass
class Files:
    """A folder of images, each with its captions in a file of the same stem beside it (img2dataset's `files`)."""

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


def _table(path: str, member: str) -> Columns | Files:
    import datasets

    suffix = Path(path).suffix
    if os.path.isdir(path) and not _saved_dataset(path):
        return _files(path, member)
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
        raise InputError(f"{path}: `datasets` cannot read it ({_first_line(error)})") from None
    if isinstance(rows, datasets.DatasetDict):
        raise InputError(f"{path}: holds the splits {', '.join(rows)}: name one, e.g. {path}/{next(iter(rows))}")
    image, caption = _chosen(path, rows.column_names)
    if not isinstance(rows.features[image], datasets.Value):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    failed = _failed_downloads(rows, image)
    if not failed.any():
        return Columns(path, rows, image, caption)
    kept = np.flatnonzero(~failed)
    notice = (path, f"{int(failed.sum())} rows whose download failed (their status says so) are no pairs")
    return Columns(path, rows.select(kept, keep_in_memory=True), image, caption, kept, [notice])


def _chosen(path: str, names: Sequence[str]) -> tuple[str, str]:
    image = next((c for c in IMAGE_COLUMNS if c in names), None)
    caption = next((c for c in CAPTION_COLUMNS if c in names), None)
    if image is None or caption is None:
        raise InputError(
            f"{path}: needs an image column ({', '.join(IMAGE_COLUMNS)}) and a caption column "
            f"({', '.join(CAPTION_COLUMNS)}), found {', '.join(names)}; rename them"
        )
    return image, caption


def _failed_downloads(rows: "Dataset", image: str) -> np.ndarray:
    """(rows,) bool: img2dataset says in `status` that there is no image because it could not be had."""
    import pyarrow
    from pyarrow import compute

    none = np.zeros(len(rows), dtype=bool)
    if "status" not in rows.column_names or rows.data.num_rows != len(rows):
        return none
    status, images = rows.data.column("status"), rows.data.column(image)
    if not (pyarrow.types.is_string(status.type) or pyarrow.types.is_large_string(status.type)):
        return none
    if pyarrow.types.is_struct(images.type):
        images = compute.struct_field(images, "bytes")
    said = compute.fill_null(compute.starts_with(status, "failed"), False)
    return compute.and_(said, compute.is_null(images)).to_numpy()


def _saved_dataset(folder: str) -> bool:
    """Whether `datasets` wrote the folder by `save_to_disk`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_info.json", "dataset_dict.json"))


def _files(folder: str, member: str) -> Files:
    images, captions, litter, seen = {}, {}, ("__MACOSX", "@eaDir"), set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above, or a second one to the same
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in litter and not name.startswith("."))
        for name in sorted(names, key=lambda name: (os.path.splitext(name)[0], _image_rank(name))):
            stem, suffix = os.path.splitext(os.path.join(where, name))
            if name.startswith("."):
                continue
            if suffix.lower() == f".{member}":
                captions[stem] = stem + suffix
            elif suffix.lower() in IMAGE_SUFFIXES:
                images.setdefault(stem, stem + suffix)
    found = [(image, captions[stem]) for stem, image in images.items() if stem in captions]
    if not found:
        raise InputError(
            f"{folder}: holds neither shards, nor a saved dataset, nor images ({', '.join(IMAGE_SUFFIXES)}) with a "
            f".{member} of the same name beside them; set caption_member, or name the files in it"
        )
    problems = [(image, f"no .{member} caption") for stem, image in images.items() if stem not in captions]
    problems += [(captions[stem], "no image") for stem in sorted(captions.keys() - images.keys())]
    return Files(folder, found, member, problems)


def _image_rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return IMAGE_SUFFIXES.index(suffix) if suffix in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES)


def _read_csv(path: str) -> Columns:
    """Every cell as the text that it is; the separator is told from the header line.

    Raises:
        InputError: not UTF-8, a row with more or fewer cells than the header, a quote that swallows rows.
    """
    import datasets
    import pyarrow.csv
    from pyarrow import compute

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
        raise InputError(f"{path}: cannot be read as a table ({_first_line(error)}); mend that row") from None
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
                encoding = "utf-16" if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
                remedy = f"`iconv -f {encoding} -t utf-8 {path} > new{Path(path).suffix}`"
                raise InputError(f"{path}:{number}: not UTF-8; convert it, e.g. by {remedy}") from None


def parse_captions(raw: bytes, member: str) -> list[str]:
    """Captions of one sample: the lines of a .txt, or a .json's `captions` (else `caption`), or a list in it."""
    if member != "json":
        return _not_empty(caption_lines(raw.decode("utf-8-sig")))
    values = json.loads(raw)
    if isinstance(values, dict):
        if "captions" not in values and "caption" not in values:
            raise ValueError(f"the .json has neither `captions` nor `caption`, but {', '.join(values) or 'nothing'}")
        values = values.get("captions") or values.get("caption")
    elif not isinstance(values, list):
        raise ValueError("the .json is neither an object with `captions` nor a list of them")
    return _not_empty(texts(values))


def caption_lines(text: str) -> list[str]:
    """The captions of a .txt, one a line as in clip-benchmark's shards; U+2028 and its like end no line."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def texts(value: object) -> list[str]:
    """Captions in a cell or JSON value: text, bytes of UTF-8, a number as text, {"raw": ...}, or a list of these."""
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in texts(one)]
    if isinstance(value, dict):
        return texts(next((value[key] for key in ("raw", "caption", "text") if key in value), None))
    if value is None:
        return []
    text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    return [text] if text.strip() else []


def _not_empty(captions: list[str]) -> list[str]:
    if not captions:
        raise ValueError("empty caption")
    return captions


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
