"""Where things are kept that can be made again: indices, orders, digests, downloads.

A checksum ends each file, so that one that a disk, a kill or a hand has changed is made again instead of believed.
"""

import os
import stat
import tempfile
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from diffclip.base.errors import InputError
from diffclip.base.files import parse_json, refuse_pipe, whole

NOWHERE = Path(os.devnull) / "diffclip"  # nothing can be written there
CHECKSUM = 4  # bytes of one
START = 0x6B657074  # "kept"


def cache_dir() -> Path:
    """$DIFFCLIP_CACHE, or ~/.cache/diffclip; without a home that can be written, a folder of the user's in the
    temporary one. It need not exist, and writing in it may fail, which must end no command.
    """
    named = os.environ.get("DIFFCLIP_CACHE")
    try:
        folder = Path(named or "~/.cache/diffclip").expanduser()
    except RuntimeError:  # no HOME, and a user without a name
        return _temporary()
    return folder if named or _can_be_written(folder) else _temporary()


def checksum(*contents: bytes | memoryview) -> bytes:
    """`CHECKSUM` bytes that change with contents; those of nothing are no small number, as in a file of them."""
    total = START
    for content in contents:
        total = crc32(content, total)
    return total.to_bytes(CHECKSUM, "little")


def keep(path: Path, content: bytes | memoryview) -> bool:
    """Write a file of the cache, whole; False where there is no room, or it is not ours to write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary, open(temporary, "wb") as f:
            f.write(content)
            f.write(checksum(content))
    except OSError:
        return False
    return True


def kept(path: Path) -> bytes | None:
    """What `keep` wrote; None if it is not there, or the file has changed since."""
    return None if (content := _mapped(path)) is None else content.tobytes()


def kept_json(path: Path) -> Any:
    """The value whose JSON `keep` wrote; None as `kept`."""
    return None if (content := kept(path)) is None else parse_json(content, str(path))


def kept_array(path: Path) -> np.ndarray | None:
    """The int32 numbers that `keep` wrote, (n,), mapped into memory; None as `kept`."""
    content = _mapped(path)
    return None if content is None or len(content) % 4 else content.view(np.int32)


def _mapped(path: Path) -> np.ndarray | None:
    try:
        refuse_pipe(path)
        file = np.memmap(path, np.uint8, "r")
    except (InputError, OSError, ValueError):  # ValueError: of an empty file
        return None
    content = file[:-CHECKSUM]
    return content if checksum(content.data) == file[-CHECKSUM:].tobytes() else None


def _can_be_written(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """A folder that no other user can write into, since what it holds is believed; else `NOWHERE`."""
    try:
        folder = Path(tempfile.gettempdir()) / f"diffclip-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError:
        return NOWHERE
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if ours else NOWHERE
