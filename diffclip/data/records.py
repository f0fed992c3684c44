"""Rows of files that are no sheets: JSON in its usual forms, Flickr's lines of captions, lists of a split's images."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import MOST_ROW, open_file, opened, parse_json, utf8_remedy
from diffclip.data.layout import split_of

TOKEN = re.compile(r"(\S.*)#\d+\t(.*)")  # Flickr's 1000092795.jpg#0<tab>Two young guys ...
MOST_LISTS = 20  # files of a split's images beside a table; more .txt are captions of images


def json_rows(path: str, lines: bool) -> Iterable[dict[str, Any]]:
    """{column: value} of the rows of a JSON file in any of the usual forms.

    JSON lines or a list of {"image", "caption"}; {"file": ["caption", ...]}; Karpathy's
    {"images": [{"filename", "sentences": [{"raw"}]}]}; COCO's {"images", "annotations"}; or columns of lists.

    Raises:
        InputError: another form, a key that stands twice in one object, or an entry that lacks a part.
    """
    if lines:
        for number, raw in enumerate(lines_of(path), 1):
            if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                yield _mapping(_parsed(raw, f"{path}:{number}", path), f"{path}:{number}")
        return
    data = _parsed(b"".join(lines_of(path)), path, path)
    try:
        if isinstance(data, dict) and isinstance(data.get("annotations"), list) and "images" in data:
            yield from _coco(path, data)
        elif isinstance(data, dict) and isinstance(data.get("images"), list) and _dicts(data["images"]):  # Karpathy
            for row in data["images"]:
                file = os.path.join(row.get("filepath") or "", row["filename"])
                yield {"image": file, "caption": row["sentences"], "split": row.get("split")}
        elif isinstance(rows := data.get("annotations") if isinstance(data, dict) else data, list) and _dicts(rows):
            for number, row in enumerate(rows):
                yield _mapping(row, f"{path}: row {number}")
        elif isinstance(data, dict) and data and _columns(data):
            for values in zip(*data.values()):
                yield dict(zip(data, values))
        elif isinstance(data, dict) and _captions_of_files(data):
            for name, captions in data.items():
                yield {"image": name, "caption": captions}
        else:
            raise InputError(
                f"{path}: needs the form [{{image, caption}}], {{file: [captions]}} or COCO's {{images, annotations}}"
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: an entry lacks its image or its captions ({in_one_line(error)})") from None


def _coco(path: str, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """COCO's images, each with all captions about it."""
    said: dict[Any, list] = {image["id"]: [] for image in data["images"]}
    if len(said) < len(data["images"]):
        raise InputError(f"{path}: two images have one id: give each its own")
    for annotation in data["annotations"]:
        if annotation["image_id"] not in said:
            raise InputError(f"{path}: has a caption of image {annotation['image_id']}, which it does not list")
        said[annotation["image_id"]].append(annotation["caption"])
    for image in data["images"]:
        yield {"image": image["file_name"], "caption": said[image["id"]]}


def _dicts(values: list) -> bool:
    return all(isinstance(value, dict) for value in values)


def _columns(data: dict) -> bool:
    """Whether {"image": [...], "caption": [...]} holds columns: lists of one length, of names that no files have."""
    lengths = {len(value) if isinstance(value, list) else -1 for value in data.values()}
    return len(lengths) == 1 and -1 not in lengths and not any("." in name for name in data)


def _captions_of_files(data: dict) -> bool:
    """Whether {"1.jpg": "a cat", "2.jpg": [...]} names files, which have a dot."""
    return any("." in name for name in data) and all(isinstance(value, list | str) for value in data.values())


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object with an image and a caption, not {str(row)[:60]}")
    return row


def _parsed(raw: bytes, where: str, path: str) -> Any:
    try:
        return parse_json(raw.decode("utf-8-sig"), where, unique=True)
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8; {utf8_remedy(path)}") from None


def is_token(line: str) -> bool:
    """Whether a line is one of Flickr's: image, number and caption."""
    return bool(TOKEN.fullmatch(line))


def token_rows(path: str, encoding: str) -> Iterator[dict[str, Any]]:
    """{column: value} of Flickr's lines; InputError with the line that is none, or for another encoding."""
    try:
        with open_file(path) as f:
            text = f.read().decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        remedy = f"{utf8_remedy(path)}, or set `encoding` to what it is"
        raise InputError(f"{path}: not {encoding} (byte {error.start}); {remedy}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            if not (found := TOKEN.fullmatch(line.rstrip("\r"))):
                raise InputError(f"{path}:{number}: is not image#number, a tab and a caption: {line[:80]!r}")
            yield {"image": found[1], "caption": found[2]}


def split_lists(table: str) -> list[Path]:
    """The lists of a split's images beside a table, as Flickr_8k.testImages.txt."""
    here = Path(table)
    found = [path for path in here.parent.glob("*.txt") if path.name != here.name and split_of(path.name)]
    return sorted(found) if len(found) <= MOST_LISTS else []


def listed_splits(lists: Iterable[Path], names: Iterable[str]) -> dict[str, str]:
    """The split of each file of these names that a list has; InputError if lists of two splits have it."""
    found, asked = dict[str, str](), {*names}
    for path in lists:
        split = str(split_of(path.name))
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        for name in asked & {os.path.basename(line.strip()) for line in lines}:
            if found.setdefault(name, split) != split:
                raise InputError(
                    f"{path}: {name[:80]} is in the list of {found[name]}, too; remove it from one of them"
                )
    return found


def lines_of(path: str) -> Iterator[bytes]:
    """The lines of a file, unpacked where it is gzip; InputError if it cannot be read."""
    with opened(path) as f:
        while line := f.readline(MOST_ROW + 1):
            if len(line) > MOST_ROW:
                raise InputError(f"{path}: has a line of over {MOST_ROW:,} bytes; write it again")
            yield line
