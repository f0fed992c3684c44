"""How pairs lie in their files, as far as that is not told from the files: the settings that all readers share."""

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffclip.base.errors import InputError

TAR_IMAGES = ("jpg", "jpeg", "png", "webp")  # of several images under one key the first of these counts
FILE_IMAGES = (*TAR_IMAGES, "jfif", "avif", "bmp", "gif", "tif", "tiff", "ppm")  # the same of files in a folder

SPLITS = {  # and what folders, files, and the column `split` call them, in any case
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Layout:
    """What a user may say about the layout of pairs; what is empty is told from the file.

    Lists may be given as one text; of several members the first that a sample has counts.
    """

    image_member: Sequence[str] | str = ()  # suffixes of members of a shard, and of files of a folder
    caption_member: Sequence[str] | str = ("txt",)  # the same; one that ends in json is read as JSON
    image_column: str = ""
    caption_column: Sequence[str] | str = ()  # of several each row has them all; also the key of a JSON member
    separator: str = ""  # of .csv and .tsv
    encoding: str = "utf-8"  # of .csv, .tsv and .txt
    image_root: str = ""  # where paths in tables start; empty: beside the table
    split: str = ""  # of a source that holds several
    prefer: Sequence[str] = ("train",)  # which split where none is named: what the pairs are for

    def __post_init__(self) -> None:
        for name in ("image_member", "caption_member", "caption_column"):
            value = getattr(self, name)
            values = [value] if isinstance(value, str) else value
            if not isinstance(values, Sequence) or not all(isinstance(each, str) for each in values):
                raise InputError(f"setting `{name}`: {str(value)[:80]} is neither a text nor a list of texts")
            if name != "caption_column":  # ".JPG" and "jpg;png", as webdataset writes it
                values = [part.strip().lstrip(".").lower() for each in values for part in each.split(";")]
            object.__setattr__(self, name, tuple(each for each in values if each))
        object.__setattr__(self, "separator", {"tab": "\t", "\\t": "\t"}.get(self.separator, self.separator))
        if not self.caption_member:
            raise InputError("setting `caption_member`: is empty; name the members that hold captions, e.g. txt")
        if len(self.separator) > 1:
            raise InputError(f"setting `separator`: {self.separator!r} is not one character; use , ; | or tab")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise InputError(
                f"setting `encoding`: there is no {self.encoding!r}; utf-8, cp1252 and utf-16 are"
            ) from None


def split_named(name: object) -> str | None:
    """train, val or test for any of its names, None for another word."""
    return next((split for split, names in SPLITS.items() if str(name).strip().lower() in names), None)


def split_of(path: str | Path) -> str | None:
    """The split that a relative path names by a folder, or by a word of its file's name.

    As cc3m-train-0000.tar, captions_val2017.json and Flickr_8k.testImages.txt; None for words of several.
    """
    *folders, name = Path(path).parts
    if named := next(filter(None, map(split_named, reversed(folders))), None):
        return named
    found = {split for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name) if (split := split_named(word))}
    return found.pop() if len(found) == 1 else None


def chosen_split(names: Iterable[str | None], layout: Layout, where: str, remedy: str = "") -> str | None:
    """Which of the splits that a source holds is read: the named one, a preferred one, or the only one.

    Names are compared as `split_named` does. None among them stands for what belongs to no split.

    Raises:
        InputError: the named split is not there, or there are several and none that is preferred.
    """
    found = list(dict.fromkeys(names))
    if layout.split and found != [None]:
        wanted = split_named(layout.split) or layout.split
        if match := next((name for name in found if name and (split_named(name) or name) == wanted), None):
            return match
        listed = ", ".join(str(name) for name in found if name)
        raise InputError(f"{where}: has no split {layout.split}, but {listed}; set `split` to one that is there")
    if len(found) == 1:
        return found[0]
    known = {split_named(name): name for name in reversed(found)}
    if None not in found or "test" in layout.prefer:  # an evaluation takes test, whatever else there is
        for name in layout.prefer:
            if name in known:
                return known[name]
    listed = ", ".join("others without a name" if name is None else name for name in found)
    remedy = remedy or f"set `split` to one of them, or name its files, as in {where}/{found[0] or found[-1]}*"
    raise InputError(f"{where}: holds several splits ({listed}): {remedy}")
