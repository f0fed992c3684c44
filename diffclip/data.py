"""Image-text pairs for contrastive training, as one random-access table over any of the usual sources.

webdataset tars are read by offset (`diffclip.shards`); CSV/TSV, parquet and `datasets` go through `datasets`, which
gives the same random access. What cannot be read raises `BadSample`; `diffclip.training_pairs` decides what then.
"""

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import braceexpand
import numpy as np
from PIL import Image

from diffclip.errors import InputError
from diffclip.pictures import BROKEN, open_image
from diffclip.shards import Shard, cache_dir, index_shards

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_COLUMNS = ("image", "jpg", "png", "filepath", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "txt", "title", "captions")


class BadSample(InputError):
    """A pair that cannot be used: `key` says where it is, `reason` what is wrong with it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: unreadable pair ({reason}); remove it from the data")
        self.key, self.reason = key, reason


def expand(patterns: Sequence[str]) -> list[str]:
    """Local paths of all sources that the patterns name, sorted per pattern.

    A pattern is a path with globs and `{00000..00012}` braces, an http(s) address with braces (downloaded once into
    `diffclip.shards.cache_dir`), or `hf:owner/name`, a dataset of the Hub, which stays as it is.

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
        paths += found
    return paths


def downloaded(url: str) -> str:
    """The local copy of a file on the web; of several processes one downloads and the others wait."""
    import hashlib

    from filelock import FileLock

    from diffclip.download import download

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
    (key, reason): samples that lack a picture or a caption, shards that end early.
    """

    def __init__(self, sources: Sequence[str], caption_member: str = "txt") -> None:
        """
        Args:
            sources: patterns as in `expand`, of tar shards, .csv/.tsv/.parquet files, or `datasets` directories.
            caption_member: member of a webdataset sample that holds the text, "txt" or "json".
        """
        groups = [expand_one(pattern) for pattern in sources]
        paths = [path for group in groups for path in group]
        if not paths:
            raise InputError("no training data given: set train_data to shards, a CSV or a parquet file")
        self.caption_member = caption_member
        tars = [path for path in paths if path.endswith(".tar")]
        shards = dict(zip(tars, index_shards(tars, caption_member)))
        self.parts = [shards[path] if path in shards else _columns(path) for path in paths]
        self.ends = np.cumsum([len(part) for part in self.parts])
        last = np.cumsum([len(group) for group in groups]) - 1
        ends = [int(self.ends[i]) for i in last]
        self.ranges = list(zip([0, *ends[:-1]], ends))
        self.problems = [problem for shard in shards.values() for problem in shard.problems]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        part, row = self._find(index)
        try:
            if isinstance(part, Shard):
                image, text = part.read(row)
                return open_image(image), parse_captions(text, self.caption_member)
            return part[row]
        except BROKEN as error:
            raise BadSample(part.key(row), str(error) or type(error).__name__) from None

    def key(self, index: int) -> str:
        """Where a pair comes from: `shard.tar/key`, or `file:row`."""
        part, row = self._find(index)
        return part.key(row)

    def _find(self, index: int) -> tuple["Shard | Columns", int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], int(index - (self.ends[part - 1] if part else 0))


@dataclass
class Columns:
    """A table file read by `datasets`: one image column (picture or path) and one caption column."""

    path: str
    rows: "Dataset"
    image: str
    caption: str

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """The name of a row, `file:row`."""
        return f"{self.path}:{row}"

    def __getitem__(self, row: int) -> tuple[Image.Image, list[str]]:
        values = self.rows[row]
        image, caption = values[self.image], values[self.caption]
        if isinstance(image, dict):  # an undecoded picture of `datasets`: its bytes, or where they lie
            image = image["bytes"] or image["path"]
        if image is None:
            raise ValueError("no picture")
        if isinstance(image, str):
            image = Path(self.path).parent / image
        captions = [caption] if isinstance(caption, str) else list(caption or [])
        return open_image(image), _not_empty(captions)


def _columns(path: str) -> Columns:
    import datasets

    kind = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(Path(path).suffix)
    if kind is None and not path.startswith("hf:") and not os.path.isdir(path):
        raise InputError(f"{path}: unknown kind of data; use .tar shards, .csv, .tsv, .parquet or a dataset folder")
    try:
        if kind:
            options = {"sep": "\t"} if path.endswith(".tsv") else {}
            rows = datasets.load_dataset(kind, data_files=path, split="train", **options)
        elif path.startswith("hf:"):
            rows = datasets.load_dataset(path.removeprefix("hf:"), split="train")
        else:
            rows = datasets.load_from_disk(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path}: `datasets` cannot read it ({_first_line(error)})") from None
    names = rows.column_names
    image = next((c for c in IMAGE_COLUMNS if c in names), None)
    caption = next((c for c in CAPTION_COLUMNS if c in names), None)
    if image is None or caption is None:
        raise InputError(
            f"{path}: needs an image column ({', '.join(IMAGE_COLUMNS)}) and a caption column "
            f"({', '.join(CAPTION_COLUMNS)}), found {', '.join(names)}"
        )
    if not isinstance(rows.features[image], datasets.Value):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return Columns(path, rows, image, caption)


def parse_captions(raw: bytes, member: str) -> list[str]:
    """Captions of one webdataset sample: the whole .txt, or the .json's `captions` (else `caption`)."""
    if member == "json":
        values = json.loads(raw)
        if not isinstance(values, dict):
            raise ValueError("the .json is not an object with `captions`")
        captions = values.get("captions") or [values.get("caption")]
        captions = [captions] if isinstance(captions, str) else captions
    else:
        captions = [raw.decode("utf-8").strip()]
    return _not_empty(captions)


def _not_empty(captions: Sequence[object]) -> list[str]:
    kept = [c for c in captions if isinstance(c, str) and c.strip()]
    if not kept:
        raise ValueError("empty caption")
    return kept


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
