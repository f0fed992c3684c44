"""Retrieval sets: images with their captions, from whatever `diffclip.data` reads for training."""

from pathlib import Path
from typing import Any, NamedTuple

from diffclip.base.archives import TAR_SUFFIXES
from diffclip.base.errors import InputError
from diffclip.base.images import BROKEN
from diffclip.benchmarks.images import Images, TarSlice
from diffclip.data.columns import ROWLESS
from diffclip.data.layout import FILE_IMAGES
from diffclip.data.pairs import PairTable, Part
from diffclip.data.shards import EMPTY, Shard
from diffclip.data.tables import KINDS

READERS = (".tar", *KINDS)  # suffixes of what a folder of a retrieval set may hold


class Captioned(NamedTuple):
    """A retrieval set: images, all captions, and for each caption the row of its image."""

    images: Images
    captions: list[str]
    owner: list[int]


def read_captioned(path: Path, **settings: Any) -> Captioned:
    """Read the test rows of a retrieval set in any form that training reads (`diffclip.data.pairs.PairTable`).

    `path` is a folder or one file: webdataset shards (KEY.png + KEY.txt with one caption a line, as clip-benchmark has
    them), parquet, what `datasets` saved, JSON (Karpathy's, COCO's, a list, {file: captions}), or a table, where rows
    of one image are captions of it. Splits are told by a column or key `split`, and by names of folders and files
    (test-00000.parquet). InputError: none of these, an image without a caption or the other way round, or several
    splits and none of them test. `settings` are the fields of `diffclip.data.layout.Layout`.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give shards, a parquet file or a captions file")
    if path.is_file() and not path.name.lower().endswith((*TAR_SUFFIXES, *READERS, ".gz")):
        raise InputError(f"{path} is not a .tar, .parquet or .json (or .csv, .tsv) file with captions")
    table = PairTable([str(path)], **{"image_member": FILE_IMAGES, "prefer": ("test",), **settings})
    for key, reason in table.problems:
        if reason not in (EMPTY, ROWLESS):
            raise InputError(f"{key} cannot be scored ({reason}): each image of a retrieval set needs a caption")
    images: list[tuple[str, Path | TarSlice | bytes]] = []
    captions: list[str] = []
    owner: list[int] = []
    for part, rows in table.images():
        try:
            found = [text.strip() for row in rows for text in part.captions(row)]
        except BROKEN as error:
            raise InputError(f"{part.key(rows[0])} has no caption that can be read ({error}): write it again") from None
        captions += found
        owner += [len(images)] * len(found)
        source = _image(part, rows[0])
        images.append((str(source) if isinstance(source, Path) else part.key(rows[0]), source))
    if not images:
        raise InputError(f"{path} holds no images with captions; write it again")
    return Captioned(Images(*zip(*images)), captions, owner)


def _image(part: Part, row: int) -> Path | TarSlice | bytes:
    """Where the image lies, not its bytes as long as it is in a file."""
    if isinstance(part, Shard):
        return TarSlice(Path(part.path), *part.place(row).image)
    try:
        return part.read(row)[0]
    except BROKEN as error:
        raise InputError(f"{part.key(row)} holds no image that can be read ({error}): mend or remove the row") from None
