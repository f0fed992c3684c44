"""Image-text pairs for contrastive training, as one random-access table over any of the usual sources.

webdataset tars are read by offset (`diffclip.data.shards`); rows of files and of `datasets` through
`diffclip.data.tables`, folders of images through `diffclip.data.folders`, all with the same random access. What cannot
be read raises `BadSample`; `diffclip.data.training_pairs` decides what then.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from diffclip.base.archives import TAR_SUFFIXES
from diffclip.base.errors import InputError
from diffclip.base.images import BROKEN, decode
from diffclip.data.columns import Columns
from diffclip.data.folders import Files, read_folder, sources_in
from diffclip.data.layout import Layout, split_named, split_of
from diffclip.data.row_splits import of_one_split
from diffclip.data.shards import Shard, index_shards
from diffclip.data.sources import expand_one
from diffclip.data.tables import is_saved, read_table

Part = Shard | Columns | Files
Decoded = TypeVar("Decoded")


class BadSample(InputError):
    """A pair that cannot be used: `key` says where it is, `reason` what is wrong with it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: unreadable pair ({reason}); remove it from the data")
        self.key, self.reason = key, reason


class PairTable:
    """All pairs of several sources: `len(table)`, `table[i]` -> (image, list of captions), `table.key(i)`.

    `table.ranges` has the (start, end) of each source's pairs, `table.problems` what was left out as
    (key, reason): samples that lack an image or a caption, shards that end early; `table.notices`, in the same form,
    what is no fault, but was read in one way of several.
    """

    def __init__(self, sources: Sequence[str], caption_member: str | Sequence[str] = "txt", **settings: Any) -> None:
        """
        Args:
            sources: patterns as in `diffclip.data.sources.expand`, of tar shards, tables (`diffclip.data.tables`),
                `datasets` directories, or folders of any of these, or of images with a file of captions beside each.
            caption_member: members of a webdataset sample that hold the text, "txt" or "json".
            settings: the other fields of `diffclip.data.layout.Layout`.
        """
        layout = Layout(caption_member=caption_member, **settings)
        notices: list[tuple[str, str]] = []
        groups = [
            [file for path in expand_one(pattern) for file in _files(path, layout, notices)] for pattern in sources
        ]
        paths = [path for group in groups for path in group]
        if not paths:
            raise InputError("no training data given: set train_data to shards, a CSV or a parquet file")
        tars = list(dict.fromkeys(path for path in paths if path.lower().endswith(TAR_SUFFIXES)))
        shards = dict(zip(tars, index_shards(tars, layout)))
        parts = [[shards[path] if path in shards else _read(path, layout) for path in group] for group in groups]
        self.parts: list[Part] = [
            part for each, source in zip(parts, sources) for part in _of_split(each, layout, str(source))
        ]
        for part in self.parts if layout.split else ():
            _refuse_other_split(part, layout)
        if layout.split and not any(map(_has_splits, self.parts)):
            listed = ", ".join(map(str, sources))
            raise InputError(f"setting `split` {layout.split}: {listed[:200]} holds no splits; leave it out")
        self.ends = np.cumsum([len(part) for part in self.parts])
        ends = self.ends[np.cumsum([len(group) for group in groups]) - 1].tolist()
        self.ranges = list(zip([0, *ends[:-1]], ends))
        self.problems = [problem for part in self.parts for problem in part.problems]
        self.notices = [*notices, *(notice for part in self.parts for notice in part.notices)]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        return decoded(self, index, decode)

    def encoded(self, index: int) -> tuple[bytes | Path, list[str]]:
        """The image of a pair as its file's bytes or path, and its captions; BadSample where it lacks one."""
        part, row = self.locate(index)
        try:
            return part.read(row)
        except BROKEN as error:
            raise BadSample(part.key(row), str(error) or type(error).__name__) from None

    def key(self, index: int) -> str:
        """Where a pair comes from: `shard.tar/key`, or `file:row`."""
        part, row = self.locate(index)
        return part.key(row)

    def captions(self, index: int) -> list[str]:
        """The captions of a pair; BadSample where there is none."""
        part, row = self.locate(index)
        try:
            return part.captions(row)
        except BROKEN as error:
            raise BadSample(part.key(row), str(error) or type(error).__name__) from None

    def images(self) -> list[list[int]]:
        """The pairs of each image: those rows of tables that name one file, or hold the same one, are its captions."""
        same: dict[object, list[int]] = {}
        for part, end in zip(self.parts, self.ends.tolist()):
            rows = range(end - len(part), end)
            for row, image in zip(rows, part.same_images() if isinstance(part, Columns) else rows):
                same.setdefault(image, []).append(row)
        return list(same.values())

    def locate(self, index: int) -> tuple[Part, int]:
        """The part of the table that holds a pair, and its row there."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], int(index - (self.ends[part - 1] if part else 0))


def decoded(table: Any, index: int, by: Callable[[bytes | Path], Decoded]) -> tuple[Decoded, list[str]]:
    """The image of a table's pair as `by` decodes it, and its captions; BadSample where one of them cannot be read."""
    image, captions = table.encoded(index)
    return of_row(table, index, by, image), captions


def of_row(table: Any, index: int, read: Callable[..., Decoded], *given: Any) -> Decoded:
    """What `read` makes of what was given, which is a table's pair's; BadSample where that fails."""
    try:
        return read(*given)
    except BROKEN as error:
        raise BadSample(table.key(index), str(error) or type(error).__name__) from None


def _files(path: str, layout: Layout, notices: list[tuple[str, str]]) -> list[str]:
    if path.startswith("hf:") or not os.path.isdir(path):
        return [path]
    files, left_out = sources_in(path, layout)
    notices += left_out
    return files


def _of_split(parts: list[Part], layout: Layout, source: str) -> list[Part]:
    """The parts of a source, their tables with the rows of one split."""
    tables = [part for part in parts if isinstance(part, Columns)]
    kept = iter(of_one_split(tables, layout, source))
    return [next(kept) if isinstance(part, Columns) else part for part in parts]


def _told_inside(part: Part) -> bool:
    """Whether a column, lists of images, or `datasets` told the split of a part."""
    told = isinstance(part, Columns) and (part.has_splits or part.path.startswith("hf:") or is_saved(part.path))
    return bool(told)


def _has_splits(part: Part) -> bool:
    """Whether anything told the split of a part: the names of its files, or what they hold."""
    if _told_inside(part):
        return True
    file = part.pairs[0][0] if isinstance(part, Files) and part.pairs else part.path
    return split_of(os.path.dirname(file) + "/_") is not None or split_of(os.path.basename(part.path)) is not None


def _refuse_other_split(part: Part, layout: Layout) -> None:
    """InputError if a file's name says that it is of another split than the one that is asked for."""
    split = None if isinstance(part, Files) or _told_inside(part) else split_of(os.path.basename(part.path))
    if split and split != (split_named(layout.split) or layout.split):
        raise InputError(
            f"{part.path}: is of the split {split} by its name, and `split` says {layout.split}; leave one of them out"
        )


def _read(path: str, layout: Layout) -> Part:
    return read_folder(path, layout) if os.path.isdir(path) and not is_saved(path) else read_table(path, layout)
