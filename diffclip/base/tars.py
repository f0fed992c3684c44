"""Tars that are never unpacked: the places of their members, found in one walk, and the bytes that lie there."""

import os
import shlex
import tarfile
from pathlib import Path

from diffclip.base.errors import InputError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
UNPACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
NO_END = "ends early (no end-of-archive block)"  # all members may be whole nevertheless


def members(path: str | Path) -> tuple[list[tarfile.TarInfo], str]:
    """All whole members of an uncompressed tar, with `offset_data` and `size`, and why it ends early, or "".

    Raises:
        InputError: the file is not a tar, or is compressed, which leaves its members without places.
    """
    whole: list[tarfile.TarInfo] = []
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError as error:
                    return whole, f"ends early ({error})"
                if member is None:  # tarfile takes a cut header for the end
                    return whole, NO_END if size < tar.offset + tarfile.BLOCKSIZE else ""
                if member.isfile() and member.offset_data + member.size > size:
                    return whole, f"ends early, within {printable(member.name)}"
                whole.append(member)
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, tarfile.TarError):
            _refuse_compressed(str(path))
        raise InputError(f"{path}: not a readable tar file ({error}); download or write it again") from None


def read_at(path: str | Path, *places: tuple[int, int]) -> list[bytes]:
    """The bytes at each (offset, size); OSError when the file is gone or shorter than it was."""
    handle = os.open(path, os.O_RDONLY)  # not kept: a thousand shards are more than a process may hold open
    try:
        contents = [os.pread(handle, size, offset) for offset, size in places]
    finally:
        os.close(handle)
    if any(len(content) != size for content, (_, size) in zip(contents, places)):
        raise OSError(f"{Path(path).name} has become shorter since it was indexed")
    return contents


def printable(name: str | bytes) -> str:
    """A member's name as text that can be printed and written, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _refuse_compressed(path: str) -> None:
    with open(path, "rb") as f:
        start = f.read(8)
    unpack = next((command for magic, command in UNPACKERS.items() if start.startswith(magic)), None)
    if unpack is None:
        return
    suffix = max((s for s in TAR_SUFFIXES if path.endswith(s)), key=len, default="")
    unpacked = path.removesuffix(suffix) + (".unpacked.tar" if suffix == ".tar" else ".tar")
    raise InputError(
        f"{path}: is compressed, and tars are read at offsets: unpack it by "
        f"`{unpack} -c {shlex.quote(path)} > {shlex.quote(unpacked)}` and name {unpacked}"
    )
