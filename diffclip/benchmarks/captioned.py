"""Retrieval sets: images with their captions, from whatever `diffclip.data` reads for training."""

from pathlib import Path
from typing import Any, NamedTuple

from diffclip.base.archives import TAR_SUFFIXES
from diffclip.base.errors import InputError
from diffclip.base.images import BROKEN
from diffclip.benchmarks.images import Images, TarSlice
from diffclip.data.captions import EMPTY as NO_CAPTION
from diffclip.data.columns import ROWLESS, Columns
from diffclip.data.layout import FILE_IMAGES, Layout
from diffclip.data.pairs import BadSample, PairTable
from diffclip.data.shards import EMPTY, Shard
from diffclip.data.tables import holds_captions, kind_of


class Captioned(NamedTuple):
    """A retrieval set: images, all captions, and for each caption the row of its image."""

    images: Images
    captions: list[str]
    owner: list[int]


def read_captioned(path: Path, **settings: Any) -> Captioned:
    """Read the test rows of a retrieval set in any form that training reads (`diffclip.data.pairs.PairTable`).

    Rows about one image are put together. Splits are told by a column or key `split`, by words in names of files and
    folders (test-00000.parquet, coco_karpathy_test.json), or by lists of images (Flickr_8k.testImages.txt).

    Args:
        path: a folder or one file.
        settings: fields of `diffclip.data.layout.Layout`.

    Raises:
        InputError: nothing that training reads, an image without a caption or the other way round, or several splits
            and none of them test.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give shards, a parquet file or a captions file")
    if path.is_file() and not kind_of(str(path)) and not path.name.lower().endswith(TAR_SUFFIXES):
        raise InputError(f"{path} is not a .tar, .parquet or .json (or .csv, .tsv, .txt) file with captions")
    table = PairTable([str(path)], **{"image_member": FILE_IMAGES, "prefer": ("test",), **settings})
    for key, reason in table.problems:
        if reason not in (EMPTY, ROWLESS):
            raise InputError(f"{key} cannot be scored ({reason}): each image of a retrieval set needs a caption")
    images: list[tuple[str, Path | TarSlice | bytes]] = []
    captions: list[str] = []
    owner: list[int] = []
    for rows in table.images():
        found = [text for row in rows for text in _captions(table, row)]
        if not found:
            raise InputError(
                f"{table.key(rows[0])} has no caption that can be read ({NO_CAPTION}): each image of a retrieval set "
                "needs one"
            )
        captions += found
        owner += [len(images)] * len(found)
        source = _image(table, rows[0])
        images.append((str(source) if isinstance(source, Path) else table.key(rows[0]), source))
    if not images:
        raise InputError(f"{path} holds no images with captions; write it again")
    return Captioned(Images(*zip(*images)), captions, owner)


def is_captioned(path: Path) -> bool:
    """Whether a file is one that holds captions, rather than a readme beside folders of such."""
    if not path.is_file():
        return False
    kind = kind_of(str(path))
    return path.name.lower().endswith(TAR_SUFFIXES) or (
        holds_captions(str(path), Layout()) if kind == ".txt" else bool(kind)
    )


def _captions(table: PairTable, row: int) -> list[str]:
    """What is said in a row; an empty caption is no query."""
    try:
        return [text.strip() for text in table.captions(row)]
    except BadSample as error:
        if error.reason == NO_CAPTION:
            return []
        raise InputError(f"{error.key} has no caption that can be read ({error.reason}): write it again") from None


def _image(table: PairTable, row: int) -> Path | TarSlice | bytes:
    """Where the image lies, not its bytes as long as it is in a file."""
    part, inner = table.locate(row)
    if isinstance(part, Shard):
        return TarSlice(Path(part.path), *part.place(inner).image)
    try:
        return part.image_of(inner) if isinstance(part, Columns) else Path(part.key(inner))
    except BROKEN as error:
        raise InputError(f"{table.key(row)} has no image that can be read ({error}): mend or remove the row") from None
