"""Benchmark images: a data set of files, slices of shards and encoded bytes, and its plainest form, class folders.

Nothing is decoded before it is asked for.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from diffclip.base.archives import read_at
from diffclip.base.errors import InputError
from diffclip.base.images import open_image

# of two images under one key of a shard the first in this order counts: the photo, not its mask
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".ppm", ".gif", ".tif", ".tiff")


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

    `digest` changes whenever an image, its label or the order may have changed: it covers names, labels, and
    size and modification time of the files (the content itself where it is held as bytes).
    """

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Path | TarSlice | bytes],
        labels: Sequence[int] | None = None,
    ) -> None:
        self.names = list(names)
        self.sources = list(sources)
        self.labels = list(labels) if labels is not None else [-1] * len(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        source = self.sources[index]
        encoded = source.read if isinstance(source, TarSlice) else source
        return open_image(encoded, self.names[index]), self.labels[index]

    @property
    def digest(self) -> str:
        state: dict[Path, tuple[int, int]] = {}
        digest = hashlib.sha256()
        for name, source, label in zip(self.names, self.sources, self.labels):
            if isinstance(source, bytes):
                content: object = hashlib.sha256(source).hexdigest()
            else:
                path, *place = source if isinstance(source, TarSlice) else (source,)
                if path not in state:
                    stat = path.stat()
                    state[path] = (stat.st_size, stat.st_mtime_ns)
                content = (str(path.resolve()), state[path], place)
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
    """Return the names of the class folders below `folder`, sorted; hidden ones are left out."""
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

    Raises:
        InputError: no such folder, a class folder without images, or one that `labels` does not know.
    """
    files, targets = [], []
    for name in class_folders(folder):
        if name not in labels:
            raise InputError(
                f"{folder / name} has no prompt name: add {name!r} to classnames.json or remove the folder"
            )
        found = images_in(folder / name)
        if not found:
            raise InputError(f"{folder / name} holds no images: add some or remove the empty class folder")
        files += found
        targets += [labels[name]] * len(found)
    return Images([str(path) for path in files], files, targets)
