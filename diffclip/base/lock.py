"""One writer of a directory at a time: a lock that the system takes back when its holder dies, however it dies."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from diffclip.base.errors import InputError

NAME = ".lock"
_held: dict[str, int] = {}  # the open lock files of this process, by directory


def hold(directory: str | Path) -> None:
    """Take the lock of a directory until `release` or the end of this process; again is no matter.

    It is a record lock of the system (fcntl), on network file systems too: those who inherit our files do not inherit
    it, and a killed holder leaves nothing that is to be removed. Where the file system has no locks, there is none.

    Raises:
        InputError: another process holds it; named with its host and the time.
    """
    key = os.path.realpath(directory)
    path = os.path.join(key, NAME)
    while key not in _held:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 500, 0).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"{directory}: is being written by {holder or 'another process'}: wait for it, end it, or choose "
                    "another --output_dir"
                ) from None
            return
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(path))
        except FileNotFoundError:
            same = False
        if not same:  # its holder has just removed it
            os.close(handle)
            continue
        os.ftruncate(handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
        _held[key] = handle


def release(directory: str | Path) -> None:
    """Give the lock back, and leave no file of it."""
    key = os.path.realpath(directory)
    if key in _held:
        Path(key, NAME).unlink(missing_ok=True)  # before it is free: who waits for it looks again
        os.close(_held.pop(key))
