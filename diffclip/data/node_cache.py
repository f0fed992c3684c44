"""Shards of object stores on a disk of the node: each is fetched once for all its processes, whole or not at all, and
those that nobody has read for the longest time make room for new ones.

A shard lies in a folder of its own, whose name has its size, so that what is being fetched counts too, and whose time
is that of the last use. Beside it lies its index, which goes with it. Locks are the system's: a kill frees them.
"""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from diffclip.base import objects
from diffclip.base.errors import InputError
from diffclip.base.files import whole

LOCKS = "locks"


class NodeCache:
    """Shards in `folder`, which take no more than `limit` bytes of the disk."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def fetched(self, shard: objects.Object, wait: bool = True) -> Path | None:
        """The local file of a shard, fetched if it is not there; None if another process fetches it and not `wait`.

        InputError where it cannot be fetched, or is of another size than it should be.
        """
        home = self._home(shard)
        file = home / Path(shard.url.partition("?")[0]).name
        if file.exists():
            return file
        try:
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock(home.name), blocking=wait):
                if not file.exists():
                    self._make_room(home)
                    for left in home.iterdir():  # by a process that was killed
                        left.unlink()
                    self._fetch(shard, file)
        except Timeout:
            return None
        except OSError as error:
            raise InputError(
                f"{error.filename or home}: cannot be written ({error.strerror}); make room, or set `shard_cache` to "
                "another place"
            ) from None
        return file

    def touch(self, shard: objects.Object) -> bool:
        """Say that a shard is needed; False if it is not there."""
        home = self._home(shard)
        if not (home / Path(shard.url.partition("?")[0]).name).exists():
            return False
        with suppress(OSError):
            os.utime(home)
        return True

    def _fetch(self, shard: objects.Object, file: Path) -> None:
        with whole(file) as temporary:
            objects.get(shard.url, temporary)
            arrived = temporary.stat().st_size
            if shard.size not in (None, arrived):
                raise InputError(
                    f"{shard.url}: has {arrived:,} bytes, and {shard.size:,} when it was listed or its manifest made: "
                    "make that again by `diffclip data index`"
                )

    def _home(self, shard: objects.Object) -> Path:
        size = shard.size if shard.size is not None else objects.size_on_the_web(shard.url)
        digest = hashlib.sha256(f"{shard.url}\n{size}\n{shard.version}".encode()).hexdigest()[:24]
        return self.folder / f"{digest}-{size}"

    def _lock(self, name: str) -> str:
        return str(self.folder / LOCKS / f"{name}.lock")

    def _make_room(self, home: Path) -> None:
        """Make the folder of a shard, and remove others, the longest unused first, until all fit."""
        with FileLock(self.folder / LOCKS / "room.lock"):
            home.mkdir(exist_ok=True)
            os.utime(home)
            others = [entry for entry in os.scandir(self.folder) if entry.name not in (LOCKS, home.name)]
            left = _size(home.name) + sum(_size(entry.name) for entry in others)
            for entry in sorted(others, key=lambda entry: entry.stat().st_mtime_ns):
                if left <= self.limit:
                    return
                with suppress(Timeout), FileLock(self._lock(entry.name), blocking=False) as lock:
                    shutil.rmtree(entry.path)
                    Path(lock.lock_file).unlink(missing_ok=True)
                    left -= _size(entry.name)


def _size(name: str) -> int:
    size = name.rpartition("-")[2]
    return int(size) if size.isdecimal() else 0
