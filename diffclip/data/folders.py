"""A folder of images, each with its captions in a file of the same stem beside it (img2dataset's `files`)."""

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffclip.base.errors import InputError
from diffclip.base.images import decode
from diffclip.data.captions import parse_captions
from diffclip.data.shards import IMAGE_SUFFIXES, image_rank

LITTER = ("__MACOSX", "@eaDir")  # folders of file managers, as are those with a dot in front


@dataclass
class Files:
    """The pairs of a folder: `files[i]` -> (image, captions)."""

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


def read_folder(folder: str, member: str) -> Files:
    """All pairs at any depth; of several images of one stem the first of `IMAGE_SUFFIXES` is taken.

    Args:
        member: the suffix of the files of captions, "txt" or "json".

    Raises:
        InputError: there is no pair.
    """
    images: dict[str, str] = {}
    captions: dict[str, str] = {}
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above, or a second one to the same
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in LITTER and not name.startswith("."))
        for name in sorted(names, key=_stem_and_rank):
            stem, suffix = os.path.splitext(os.path.join(where, name))
            if name.startswith("."):
                continue
            if suffix.lower() == f".{member}":
                captions[stem] = stem + suffix
            elif suffix.lower() in IMAGE_SUFFIXES:
                images.setdefault(stem, stem + suffix)
    pairs = [(image, captions[stem]) for stem, image in images.items() if stem in captions]
    if not pairs:
        raise InputError(
            f"{folder}: holds neither shards, nor a saved dataset, nor images ({', '.join(IMAGE_SUFFIXES)}) with a "
            f".{member} of the same name beside them; set caption_member, or name the files in it"
        )
    problems = [(image, f"no .{member} caption") for stem, image in images.items() if stem not in captions]
    problems += [(captions[stem], "no image") for stem in sorted(captions.keys() - images.keys())]
    return Files(folder, pairs, member, problems)


def _stem_and_rank(name: str) -> tuple[str, int]:
    stem, suffix = os.path.splitext(name)
    return stem, image_rank(suffix)
