"""Where things are kept that can be made again: indices, orders, digests, downloads."""

import os
import stat
import tempfile
from pathlib import Path

import numpy as np

from diffclip.base.files import refuse_pipe, write_whole

NOWHERE = Path(os.devnull) / "diffclip"  # nothing can be written there


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


def keep(path: Path, content: bytes) -> bool:
    """Write a file of the cache, whole; False where there is no room, or it is not ours to write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError:
        return False
    return True


def kept_array(path: Path) -> np.ndarray | None:
    """An array of one dimension from a file of the cache, mapped into memory; None if it is not there or not whole.

    Nothing is unpickled, and no more of the header is read than numpy takes for one of plain numbers.
    """
    try:
        refuse_pipe(path)
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # numpy raises whatever its parser of headers does
        return None
    return array if array.ndim == 1 and array.dtype == np.int32 else None


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
