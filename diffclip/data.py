"""Image-text pairs for contrastive training, as one random-access table over any of the usual sources.

webdataset tars are indexed once (member offsets) and read with `pread`, so shuffling, splitting over ranks and
resuming at a step are arithmetic on indices: nothing is decoded twice, skipped over or shared between workers.
CSV/TSV, parquet and `datasets` directories go through `datasets`, which gives the same random access.
"""

import glob
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from diffclip.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_COLUMNS = ("image", "jpg", "png", "filepath", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "txt", "title", "captions")


def expand(patterns: Sequence[str]) -> list[str]:
    """Paths that match globs and `{00000..00012}` braces, sorted per pattern; InputError if one matches nothing."""
    paths: list[str] = []
    for pattern in patterns:
        for part in braceexpand.braceexpand(str(pattern)):
            found = sorted(glob.glob(part)) if glob.has_magic(part) else [part] if os.path.exists(part) else []
            if not found:
                raise InputError(f"{part}: no such file (from the data setting `{pattern}`)")
            paths += found
    return paths


@dataclass
class Shard:
    """One tar: its path and, per sample, (image offset, image bytes, caption offset, caption bytes)."""

    path: str
    keys: list[str]
    spans: np.ndarray  # (samples, 4) int64
    handle: int | None = field(default=None, repr=False)  # opened in the process that reads

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[bytes, bytes]:
        """Image bytes and caption bytes of one sample."""
        if self.handle is None:
            self.handle = os.open(self.path, os.O_RDONLY)
        image_at, image_size, text_at, text_size = (int(n) for n in self.spans[index])
        return os.pread(self.handle, image_size, image_at), os.pread(self.handle, text_size, text_at)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "handle": None}


def index_shard(path: str, caption: str = "txt") -> Shard:
    """List the pairs of an img2dataset/webdataset tar.

    Args:
        path: a local tar file.
        caption: which member holds the text: "txt", or "json" for its `captions` / `caption` entry.

    Raises:
        InputError: the file is not a tar, or holds no pair of an image and a caption.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, dot, suffix = os.path.basename(member.name).partition(".")
                if member.isfile() and dot:
                    kind = "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else suffix.lower()
                    name = os.path.join(os.path.dirname(member.name), key)
                    members.setdefault(name, {})[kind] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: not a readable tar file ({error}); download or write it again") from None
    pairs = {key: m for key, m in members.items() if "image" in m and caption in m}
    if not pairs:
        raise InputError(
            f"{path}: no sample has both an image and a .{caption} caption "
            f"({len(members)} keys in it); check the shard, or set caption_member"
        )
    spans = np.array([(*m["image"], *m[caption]) for m in pairs.values()], dtype=np.int64)
    return Shard(path, list(pairs), spans)


class PairTable:
    """All pairs of several sources: `len(table)`, `table[i]` -> (image, list of captions), `table.key(i)`."""

    def __init__(self, sources: Sequence[str], caption_member: str = "txt") -> None:
        """
        Args:
            sources: tar shards (globs and braces), .csv/.tsv/.parquet files, or a `datasets` directory.
            caption_member: member of a webdataset sample that holds the text, "txt" or "json".
        """
        paths = expand(sources)
        if not paths:
            raise InputError("no training data given: set train_data to shards, a CSV or a parquet file")
        self.caption_member = caption_member
        self.parts = [index_shard(p, caption_member) if p.endswith(".tar") else _columns(p) for p in paths]
        self.ends = np.cumsum([len(p) for p in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        part, row = self._find(index)
        try:
            if isinstance(part, Shard):
                image, text = part.read(row)
                return open_image(image), parse_captions(text, self.caption_member)
            return part[row]
        except (OSError, UnidentifiedImageError, UnicodeDecodeError, ValueError) as error:
            raise InputError(f"{self.key(index)}: unreadable pair ({error}); remove it from the data") from None

    def key(self, index: int) -> str:
        """Where a pair comes from: `shard.tar/key`, or `file:row`."""
        part, row = self._find(index)
        return f"{part.path}/{part.keys[row]}" if isinstance(part, Shard) else f"{part.path}:{row}"

    def _find(self, index: int) -> tuple["Shard | Columns", int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], int(index - (self.ends[part - 1] if part else 0))


@dataclass
class Columns:
    """A table file read by `datasets`: one image column (picture or path) and one caption column."""

    path: str
    rows: Dataset
    image: str
    caption: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Image.Image, list[str]]:
        values = self.rows[row]
        image, caption = values[self.image], values[self.caption]
        if isinstance(image, str):
            image = open_image(Path(self.path).parent / image)
        captions = [caption] if isinstance(caption, str) else list(caption or [])
        return image.convert("RGB"), _not_empty(captions)


def _columns(path: str) -> Columns:
    import datasets

    kind = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(Path(path).suffix)
    if kind is None and not os.path.isdir(path):
        raise InputError(f"{path}: unknown kind of data; use .tar shards, .csv, .tsv, .parquet or a dataset folder")
    if kind:
        options = {"sep": "\t"} if path.endswith(".tsv") else {}
        rows = datasets.load_dataset(kind, data_files=path, split="train", **options)
    else:
        rows = datasets.load_from_disk(path)
    names = rows.column_names
    image = next((c for c in IMAGE_COLUMNS if c in names), None)
    caption = next((c for c in CAPTION_COLUMNS if c in names), None)
    if image is None or caption is None:
        raise InputError(
            f"{path}: needs an image column ({', '.join(IMAGE_COLUMNS)}) and a caption column "
            f"({', '.join(CAPTION_COLUMNS)}), found {', '.join(names)}"
        )
    if not isinstance(rows.features[image], datasets.Value):
        rows = rows.cast_column(image, datasets.Image(decode=True))
    return Columns(path, rows, image, caption)


def open_image(source: bytes | str | Path) -> Image.Image:
    """Decode a picture to RGB; raises OSError when it is broken."""
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")


def parse_captions(raw: bytes, member: str) -> list[str]:
    """Captions of one webdataset sample: the whole .txt, or the .json's `captions` (else `caption`)."""
    if member == "json":
        values = json.loads(raw)
        captions = values.get("captions") or [values.get("caption")]
    else:
        captions = [raw.decode("utf-8").strip()]
    return _not_empty(captions)


def _not_empty(captions: list[str | None]) -> list[str]:
    kept = [c for c in captions if c and c.strip()]
    if not kept:
        raise ValueError("empty caption")
    return kept


class TrainingPairs(Dataset):
    """The whole training run as one sequence: item k is the k-th sample that the optimiser will see.

    Epoch e visits a fresh permutation of the table, drawn from (seed, e) and cut to whole global batches
    (drop_last). Crop and caption choice of item k are drawn from (seed, k). So the stream depends on nothing but
    the seed, and a resumed run, on any number of workers, sees the same pixels.
    """

    def __init__(
        self,
        table: PairTable,
        transform: Callable[[Image.Image], torch.Tensor],
        tokenizer: Callable[[list[str]], torch.Tensor],
        *,
        global_batch_size: int,
        epochs: int,
        seed: int,
    ) -> None:
        self.table, self.transform, self.tokenizer, self.seed = table, transform, tokenizer, seed
        self.per_epoch = len(table) // global_batch_size * global_batch_size
        if self.per_epoch == 0:
            raise InputError(
                f"{len(table)} pairs do not fill one batch of {global_batch_size}: lower global_batch_size"
            )
        self.epochs = epochs
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        epoch, position = divmod(k, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.table)))
        image, captions = self.table[int(self._order[1][position])]
        with seeded(self.seed * 1_000_003 + k):
            caption = captions[int(torch.randint(len(captions), ()))]
            return {"image": self.transform(image), "text": self.tokenizer([caption])[0]}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global CPU generator, from which torchvision draws its crops, start at `seed`; restore it after.

    `torch.manual_seed` would do, but records a stack trace for absent GPUs, a third of the cost of a small picture.
    """
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
