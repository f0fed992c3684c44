"""The images of a row: under which keys it names them, and where their bytes lie.

They are opened when they are needed; they may be plain files, members of webdataset tars, or held by the row itself.
"""

import base64
import binascii
import os
import re
import time
import urllib.parse
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffclip.base import archives
from diffclip.base.errors import InputError
from diffclip.base.files import file_content
from diffclip.base.images import open_image
from diffclip.base.paths import inside

PLAIN = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}/)*[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")  # leads nowhere else
IMAGE_KEYS = ("image", "images", "image_path")


class ImagePlace(NamedTuple):
    """Where an image's bytes lie: a whole file (size 0), a stretch of a tar, or the row itself (content)."""

    file: str
    offset: int = 0
    size: int = 0
    content: bytes | None = None

    def read(self) -> bytes:
        """The encoded image; OSError if it cannot be read."""
        if self.content is not None:
            return self.content
        return archives.read_at(self.file, (self.offset, self.size))[0] if self.size else file_content(self.file)

    def open(self, key: str = "") -> Image.Image:
        """Decode to RGB; InputError naming the row that shows it, if given, and the file when that fails."""
        return open_image(self.read, f"{key}: {self.file}" if key else self.file)


def row_images(row: dict) -> list[tuple[str, bytes | None]]:
    """A row's images: (path, None), or (what to call it, the encoded image) of one that the row holds itself.

    Raises:
        InputError: more than one key holds images, or something is no image.
    """
    given = [key for key in IMAGE_KEYS if filled(row.get(key))]
    if len(given) > 1:
        raise InputError(f"has images in `{given[0]}` and in `{given[1]}`; keep one of them")
    if not given:
        return []
    return value_images(row[given[0]], given[0])


def value_images(value: object, key: str) -> list[tuple[str, bytes | None]]:
    """`row_images` of what stands under `key`: a path, file:// or data: URI, encoded image, or a list of these."""
    return [_row_image(image, key) for image in (value if isinstance(value, list) else [value])]


def find_place(root: str | Path, name: str, content: bytes | None = None) -> ImagePlace | None:
    """Where an image lies: in the row itself (`content`), or under `root` as a file or a member of a tar in its folder.

    Raises:
        InputError: the name is an address or leads outside `root`, several tars of the folder hold it, or a tar cannot
            be read.
    """
    if content is not None:
        return ImagePlace(name, content=content)
    if PLAIN.fullmatch(name):  # as nearly all are, and hundreds of thousands
        path = os.path.join(os.path.abspath(root), name)
    elif re.match(r"\w{2,}://", name):
        raise InputError(f"image {name[:200]} is an address, which is not fetched; give the path of a copy")
    else:
        path = os.path.abspath(inside(root, name, "image"))
    if os.path.isfile(path):
        return ImagePlace(path)
    folder, base = os.path.split(path)
    tar = path[: path.find(".tar/") + 4]
    place = tar if os.path.isfile(tar) else folder  # only where files are missing
    members = _tar_members(place, _tars(place, int(time.monotonic() / 5))).get(base, {})
    if len(members) > 1 and path not in members:
        known = " and ".join(os.path.relpath(member, os.path.abspath(root)) for member in sorted(members)[:2])
        raise InputError(f"image {name} is in {len(members)} places, {known}; write in the row which of them it is")
    found = members.get(path) or next(iter(members.values()), [])
    if len(found) > 1 and len({place.read() for place in found}) > 1:
        raise InputError(
            f"image {name} is {len(found)} times in {found[0].file}, each another one; write the tar anew with one of "
            "them, or unpack it and rename the others"
        )
    return found[0] if found else None


def present(root: str | Path, name: str, content: bytes | None = None) -> ImagePlace:
    """`find_place` of an image that was there before; InputError if it is no longer."""
    if (place := find_place(root, name, content)) is None:
        raise InputError(f"image {name} is no longer under {root}; put it back")
    return place


def _row_image(value: object, key: str) -> tuple[str, bytes | None]:
    name = f"image in `{key}`"
    if isinstance(value, dict):  # as `datasets` keeps images
        given = value
        value = given.get("bytes") or given.get("path")
        if isinstance(given.get("path"), str) and given["path"]:
            name = given["path"].encode(errors="backslashreplace").decode()
    if isinstance(value, bytes):
        return name, value
    if not isinstance(value, str) or not value:
        raise InputError(
            f"`{key}` holds {str(value)[:40]}, which is no path of an image; give a path, or a list of them"
        )
    if value.startswith("file://"):
        value = urllib.parse.unquote(value.removeprefix("file://localhost").removeprefix("file://"), errors="strict")
    if not value.startswith("data:"):
        if len(value) > 1000 or value != value.encode(errors="ignore").decode():
            raise InputError(
                f"`{key}` holds {value[:40]!a}..., which is no path of an image; give one, or data:image/png;base64,"
            )
        return value, None
    head, _, content = value.partition(",")
    try:
        return f"{head[:40]} in `{key}`", base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"`{key}` holds a {head[:40]} that is not base64 ({error}); write it again") from None


def filled(value: object) -> bool:
    """Whether a key holds something; NaN is nothing, as pandas writes it."""
    return value is not None and value == value and value not in ("", [])


@lru_cache(maxsize=256)
def _tars(folder: str, moment: int) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the tars in a folder, or of the one tar that it is; looked at anew at each moment."""
    if os.path.isfile(folder):
        paths = [Path(folder)]
    else:
        paths = sorted(Path(folder).glob("*.tar")) if os.path.isdir(folder) else []
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


@lru_cache(maxsize=64)
def _tar_members(folder: str, state: tuple[tuple[str, int, int], ...]) -> dict[str, dict[str, list[ImagePlace]]]:
    """Members of the tars of `_tars` by file name, each with all its places by tar and name in it."""
    by_name: dict[str, dict[str, list[ImagePlace]]] = {}
    for path, *_ in state:
        members, ends_early = archives.members(path)
        if ends_early and ends_early != archives.NO_END:
            raise InputError(f"{path}: {ends_early}; download or write it again")
        for member in members:
            if member.isfile():
                place = ImagePlace(path, member.offset_data, member.size)
                name = os.path.normpath(member.name)
                by_name.setdefault(os.path.basename(name), {}).setdefault(f"{path}/{name}", []).append(place)
    return by_name
