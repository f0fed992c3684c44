"""Benchmark images and the files that they lie in: class folders, samples of a shard, rows of a parquet file.

Nothing is decoded before it is asked for.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.ipc
from PIL import Image
from torch.utils.data import Dataset

from diffclip.base import parquet
from diffclip.base.archives import read_at
from diffclip.base.errors import InputError
from diffclip.base.images import open_image
from diffclip.base.paths import inside
from diffclip.data.layout import FILE_IMAGES, split_named
from diffclip.data.shards import walk

# of two images under one key of a shard the first in this order counts: the photo, not its mask
IMAGE_SUFFIXES = tuple(f".{suffix}" for suffix in FILE_IMAGES)
IMAGE_COLUMNS = ("image", "img", "jpg", "webp", "png")


class TarSlice(NamedTuple):
    """One image inside an uncompressed tar file: read at its offset, never unpacked."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded image; OSError if it cannot be read."""
        return read_at(self.path, (self.offset, self.size))[0]


class Images(Dataset):
    """Images by name, each a file, a slice of a tar file, or encoded bytes; items are (RGB image, label).

    `border` pixels are cut off each side.

    `digest` changes whenever an image, its label or the order may have changed: it covers names, labels, and
    size and modification time of the files (the content itself where it is held as bytes).
    """

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Path | TarSlice | bytes],
        labels: Sequence[int] | None = None,
        *,
        border: int = 0,
    ) -> None:
        self.names = list(names)
        self.sources = list(sources)
        self.labels = list(labels) if labels is not None else [-1] * len(self.names)
        self.border = border

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        source = self.sources[index]
        encoded = source.read if isinstance(source, TarSlice) else source
        image = open_image(encoded, self.names[index])
        if cut := self.border:
            image = image.crop((cut, cut, max(cut + 1, image.width - cut), max(cut + 1, image.height - cut)))
        return image, self.labels[index]

    @property
    def digest(self) -> str:
        state: dict[Path, tuple[int, int]] = {}
        digest = hashlib.sha256(str(self.border or "").encode())
        for name, source, label in zip(self.names, self.sources, self.labels):
            if isinstance(source, bytes):
                content: object = hashlib.sha256(source).hexdigest()
            else:
                path, *place = source if isinstance(source, TarSlice) else (source,)
                if path not in state:
                    try:
                        stat = path.stat()
                    except OSError as error:
                        reason = error.strerror or type(error).__name__
                        raise InputError(f"{path} cannot be read ({reason}): replace or remove it") from None
                    state[path] = (stat.st_size, stat.st_mtime_ns)
                content = (os.path.realpath(path), state[path], place)
            digest.update(repr((name, label, content)).encode())
        return digest.hexdigest()


def visible(entries: Iterable[Path]) -> list[Path]:
    """Sort, and leave out what file managers and notebooks drop beside data: `.DS_Store`, `._1.jpg`, `__MACOSX`."""
    return sorted(path for path in entries if not path.name.startswith((".", "__MACOSX", "@eaDir")))


def images_in(folder: Path) -> list[Path]:
    """Return all image files below a folder, sorted by path; hidden files and folders are left out."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [path.name for path in visible(Path(root) / name for name in folders)]
        found += visible(Path(root) / name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    return sorted(found)


def class_folders(folder: Path) -> list[str]:
    """The names of the class folders below `folder`, sorted; hidden ones are left out."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: give a folder that holds one folder of images per class")
    names = [entry.name for entry in visible(folder.iterdir()) if entry.is_dir()]
    if not names:
        raise InputError(
            f"{folder} has no class folders: expected {folder}/<class name>/*.png, or files called test-*.tar or "
            "test-*.parquet, or any .parquet with train, val or test in a column split"
        )
    return names


def read_class_folders(folder: Path, labels: Mapping[str, int]) -> Images:
    """Read `folder`/<class>/*.png with `labels[class]` as targets, sorted by class folder and file name.

    InputError: no such folder, a class folder without images, or one that `labels` does not know.
    """
    files, targets = [], []
    for name in class_folders(folder):
        place = folder / name
        if name not in labels:
            raise InputError(f"{place} has no prompt name: add {name!r} to classnames.json or remove the folder")
        if not (images := images_in(place)):
            raise InputError(f"{place} holds no images: add some or remove the empty class folder")
        files += images
        targets += [labels[name]] * len(images)
    return Images([str(path) for path in files], files, targets)


def shard_samples(path: Path, text: str) -> list[tuple[str, TarSlice | None, bytes | None]]:
    """(key, image, what has the suffix `text`) of a shard's samples, as training reads them; or InputError."""
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
            found.append((key, image, members[text].read() if text in members else None))
    return found


ROWS = (".parquet", ".arrow")  # tables; arrow is what `datasets` saves to disk


def table_schema(path: Path) -> pyarrow.Schema:
    """The columns and metadata of a table; InputError if it is none."""
    return read_table(path, []).schema if path.suffix.lower() == ".arrow" else parquet.schema(path)


def read_table(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """These columns of a parquet file, or of a file that `datasets` saved; InputError if it cannot be read."""
    if path.suffix.lower() != ".arrow":
        return parquet.read(path, columns)
    with parquet.readable(path, "arrow"):
        whole = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    return whole.select(list(columns)) if columns else whole


def row_splits(path: Path) -> list[str | None]:
    """Return what the column `split` gives each row of a table: all None where it names no split, or is not."""
    if "split" not in table_schema(path).names:
        arrow = path.suffix.lower() == ".arrow"  # mapped, not read
        return [None] * (len(read_table(path, [])) if arrow else parquet.row_count(path))
    values = read_table(path, ["split"])["split"].to_pylist()
    named = [split_named(value) for value in values]
    if None in named and any(named):
        unknown = values[named.index(None)]
        raise InputError(f"{path}: the column split holds {unknown!r}; write train, val or test in every row")
    return named


def table_rows(path: Path, columns: Sequence[str], wanted: Sequence[bool]) -> Iterator[tuple[str, bytes | Path, Any]]:
    """(name for messages, encoded image, value of the first of `columns` that is there) of wanted rows."""
    image, value = _two_columns(path, table_schema(path).names, columns)
    table = read_table(path, [image, value]).filter(pyarrow.array(wanted, pyarrow.bool_()))
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    for number, row in zip(itertools.compress(itertools.count(), wanted), rows):
        name, encoded = f"{path} row {number}", row[image]
        if isinstance(encoded, dict):  # the Hub's {bytes, path}; the path is relative to the file
            encoded = encoded.get("bytes") or encoded.get("path")
        if isinstance(encoded, str) and encoded:
            if not (file := inside(path.parent, encoded, f"{name}: image")).is_file():
                raise InputError(f"{name}: its image {encoded[:200]} is not beside the file: put it there")
            encoded = file
        if not isinstance(encoded, bytes | Path):
            raise InputError(f"{name} holds no image: remove the row")
        yield name, encoded, row[value]


def _two_columns(path: Path, found: Sequence[str], labels: Sequence[str]) -> tuple[str, str]:
    """The column of images, and that of labels: the first of these names that is there."""
    image, label = (next((name for name in wanted if name in found), None) for wanted in (IMAGE_COLUMNS, labels))
    if image is None or label is None:
        others, names = ", ".join((*IMAGE_COLUMNS[1:], *labels[1:])), ", ".join(found)
        raise InputError(f"{path} needs the columns image and {labels[0]} (or {others}), has {names}: rename them")
    return image, label
