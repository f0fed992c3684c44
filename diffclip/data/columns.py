"""Rows of any table as pairs: one column of images, one or more of captions, as the layout or their names say."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from pyarrow import compute

from diffclip.base.errors import InputError
from diffclip.data.captions import cell_texts, not_empty
from diffclip.data.layout import Layout
from diffclip.data.named_images import NamedImages

# names in any case, the first that is there counts
IMAGE_COLUMNS: tuple[str, ...] = (
    "image",
    "jpg",
    "png",
    "filepath",
    "image_path",
    "file_name",
    "jpeg",
    "webp",
    "img",
    "filename",
)
IMAGE_COLUMNS += ("image_name", "image_file", "img_path", "file", "path", "picture", "photo", "image_bytes")
CAPTION_COLUMNS: tuple[str, ...] = (
    "caption",
    "text",
    "txt",
    "title",
    "captions",
    "alt_text",
    "alt",
    "comment",
    "sentences",
    "sentence",
)
CAPTION_COLUMNS += ("description", "raw")
NUMBERED = re.compile(r"(caption|text|comment|sentence)s?_?\d+$", re.IGNORECASE)  # caption_0 ... caption_4
ROWLESS = "the table holds no rows"


@dataclass
class Columns:
    """A table: images (encoded, or paths) and captions; `rows` has these columns and all others."""

    path: str
    rows: datasets.Dataset
    image: str
    caption: Sequence[str]
    image_root: str = ""
    numbers: np.ndarray | None = None  # (rows,) their places in the file, where some are left out
    notices: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    has_splits: bool = False  # of which one was chosen

    def __post_init__(self) -> None:
        self._texts = self.rows.select_columns([*self.caption])
        self._pairs = self.rows.select_columns([*{self.image, *self.caption}])
        self._names = {  # class names of columns that hold their numbers
            name: feature.int2str
            for name in self.caption
            if isinstance(feature := self.rows.features[name], datasets.ClassLabel)
        }
        self.named = NamedImages(self.path, self.image_root)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """The name of a row, `file:row`."""
        return f"{self.path}:{row if self.numbers is None else self.numbers[row]}"

    def captions(self, row: int) -> list[str]:
        """The captions of a row; ValueError where there is none."""
        return self._captions(self._texts[row])

    def image_of(self, row: int) -> bytes | Path:
        """The image of a row, encoded or its path; OSError or ValueError where it has none."""
        return self._image(self._pairs[row])

    def read(self, row: int) -> tuple[bytes | Path, list[str]]:
        """The image of a row and its captions; OSError or ValueError where it lacks one."""
        values = self._pairs[row]
        return self._image(values), self._captions(values)

    def _image(self, values: dict[str, Any]) -> bytes | Path:
        image = _encoded(values[self.image])
        if image is None or image == "":
            raise ValueError("no image")
        return self.named.find(image) if isinstance(image, str) else image

    def _captions(self, values: dict[str, Any]) -> list[str]:
        return not_empty([text for name in self.caption for text in self._named(name, values[name])])

    def same_images(self) -> Iterable[object]:
        """What is equal for rows of one image: its path, or a digest of its bytes."""
        home = os.path.dirname(self.path)
        for batch in self.rows.select_columns([self.image]).iter(1000):
            for image in map(_encoded, batch[self.image]):
                if isinstance(image, str):
                    yield os.path.normpath(os.path.join(home, image))
                else:
                    yield hashlib.blake2b(image, digest_size=16).digest() if image else object()

    def _named(self, name: str, value: object) -> list[str]:
        if name in self._names and isinstance(value, int):
            return [self._names[name](value)]
        return cell_texts(value)


def table_of(path: str, rows: datasets.Dataset, layout: Layout) -> Columns:
    """The pairs of a table, of all its splits: columns chosen, failed downloads left out.

    InputError: no column of images or of captions, or one that holds something else.
    """
    image, captions, notices = chosen_columns(path, rows.column_names, layout)
    kind = rows.features[image]
    if isinstance(kind, datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    elif not _holds_images(kind):
        raise InputError(
            f"{path}: column {image} holds {kind}, which is neither one encoded image a row nor a path; set "
            "image_column to the one that does"
        )
    keep = ~_failed_downloads(rows, image)
    if not keep.all():
        notices.append((path, f"{int((~keep).sum())} rows whose download failed (their status says so) are no pairs"))
    numbers = np.flatnonzero(keep) if not keep.all() else None
    rows = rows if numbers is None else rows.select(numbers, keep_in_memory=True)
    problems = [] if len(rows) else [(path, ROWLESS)]
    return Columns(path, rows, image, captions, layout.image_root, numbers, notices, problems)


def _encoded(image: Any) -> Any:
    """The bytes or the path of a cell; an undecoded image of `datasets` has both in a dict."""
    return image.get("bytes") or image.get("path") if isinstance(image, dict) else image


def holds_paths(kind: object) -> bool:
    """Whether values of this feature are text."""
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def _holds_images(kind: object) -> bool:
    """Whether values of this feature are paths, encoded images, or {"bytes", "path"}."""
    if isinstance(kind, dict):
        return "bytes" in kind or "path" in kind
    return holds_paths(kind) or (isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary"))


def chosen_columns(path: str, names: Sequence[str], layout: Layout) -> tuple[str, list[str], list[tuple[str, str]]]:
    """(column of images, columns of captions, notices); InputError if there is none, or one name is there twice."""
    if doubled := next((name for name in names if list(names).count(name) > 1), None):
        raise InputError(f"{path}: has two columns called {doubled}; rename one")
    lower = {name.strip().lower(): name for name in reversed(names)}
    found = [lower[name] for name in CAPTION_COLUMNS if name in lower]
    numbered = [name for name in names if NUMBERED.match(name.strip())]
    if odd := next((name for name in names if "\0" in name), None):
        remedy = "mend its first line, or set `encoding` to what it is, e.g. utf-16-le"
        raise InputError(f"{path}: {odd[:60]!r} is no name of a column; {remedy}")
    if not any(names):
        raise InputError(f"{path}: is empty; leave it out, or write it again")
    image = layout.image_column or next((lower[name] for name in IMAGE_COLUMNS if name in lower), "")
    captions = list(layout.caption_column) or found[:1] or numbered
    if image not in names or not captions or not {*captions} <= {*names}:
        if not image and {"url", "status"} <= {*lower}:
            raise InputError(
                f"{path}: is img2dataset's record of a download and holds no images: name the shards alone"
            )
        if not image and "url" in lower:
            raise InputError(f"{path}: holds addresses, no images: fetch them by `diffclip data pairs`")
        gone = next((name for name in [layout.image_column, *layout.caption_column] if name and name not in names), "")
        reason = f"there is no column {gone}" if gone else "their names do not tell which is which"
        if len(names) == 1:
            reason += " (if this is more than one column, set separator)"
        raise InputError(
            f"{path}: needs an image column ({', '.join(IMAGE_COLUMNS[:6])}, ...) and a caption column "
            f"({', '.join(CAPTION_COLUMNS[:6])}, ...), found {', '.join(names)[:300]}: {reason}; set image_column and "
            "caption_column, or rename them"
        )
    notices = []
    others = [] if layout.caption_column else [name for name in (*found, *numbered) if name not in captions]
    if others:
        reason = f"captions are read from the column {captions[0]}, not from {', '.join(others)}"
        notices.append((path, f"{reason}; the setting caption_column names others, or several"))
    return image, captions, notices


def may_be_needed(name: str, layout: Layout) -> bool:
    """Whether `chosen_columns` could choose a column, or its rows tell splits."""
    lower = name.strip().lower()
    known = lower in (*IMAGE_COLUMNS, *CAPTION_COLUMNS, "split") or NUMBERED.match(lower)
    return bool(known) or name in (layout.image_column, *layout.caption_column)


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
