"""Image-text pairs for contrastive training, as one random-access table over any of the usual sources.

webdataset tars are read by offset (`diffclip.data.shards`); CSV/TSV, parquet and `datasets` go through `datasets`
(`diffclip.data.tables`), which gives the same random access. What cannot be read raises `BadSample`;
`diffclip.data.training_pairs` decides what then.
"""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffclip.base.archives import TAR_SUFFIXES
from diffclip.base.errors import InputError
from diffclip.base.images import BROKEN, decode
from diffclip.data.captions import parse_captions
from diffclip.data.shards import Shard, index_shards
from diffclip.data.sources import expand_one
from diffclip.data.tables import Columns, Files, read_folder, read_table


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

    def __init__(self, sources: Sequence[str], caption_member: str = "txt") -> None:
        """
        Args:
            sources: patterns as in `diffclip.data.sources.expand`, of tar shards, .csv/.tsv/.parquet files, `datasets`
                directories, or folders of images with a file of captions beside each.
            caption_member: member of a webdataset sample that holds the text, "txt" or "json".
        """
        groups = [expand_one(pattern) for pattern in sources]
        paths = [path for group in groups for path in group]
        if not paths:
            raise InputError("no training data given: set train_data to shards, a CSV or a parquet file")
        self.caption_member = caption_member
        tars = [path for path in paths if path.endswith(TAR_SUFFIXES)]
        shards = dict(zip(tars, index_shards(tars, caption_member)))
        self.parts: list[Shard | Columns | Files] = [
            shards[path] if path in shards else _read(path, caption_member) for path in paths
        ]
        self.ends = np.cumsum([len(part) for part in self.parts])
        ends = self.ends[np.cumsum([len(group) for group in groups]) - 1].tolist()
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

    def _find(self, index: int) -> tuple[Shard | Columns | Files, int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], int(index - (self.ends[part - 1] if part else 0))


def _read(path: str, member: str) -> Columns | Files:
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "dataset_dict.json"))
    return read_folder(path, member) if os.path.isdir(path) and not saved else read_table(path)
