"""Archives: unpacked whole or not at all, and never outside of their folder; and tars that are never unpacked: the
places of their members, found in one walk, and the bytes that lie there.
"""

import lzma
import math
import os
import re
import shlex
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import open_file
from diffclip.base.lines import print_line
from diffclip.base.paths import inside

MOST_UNPACKED = 100  # times the archive's size; images are packed once over, text perhaps twenty times
HEADERS = (  # what stands before a member and holds its name and times
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
LONGEST_HEADER = 1 << 20  # bytes
BROKEN = (  # RuntimeError: encrypted; NotImplementedError: a compression that Python does not know
    *(zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error),
    *(lzma.LZMAError, RuntimeError, NotImplementedError, ValueError),
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
UNPACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
NO_END = "ends early (no end-of-archive block)"  # all members may be whole nevertheless


def unpack(archive: Path, into: Path) -> None:
    """Unpack the files of a zip or tar into a folder beside and move it into `into`; then delete the archive.

    Links and devices are left out.

    Raises:
        InputError: a member would land outside, the archive is broken, or it would unpack to more than
            `MOST_UNPACKED` times its size or than the disk has room for; nothing is in `into` then.
    """
    temporary = archive.with_name(f"{archive.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    print_line(f"  unpacking {archive.name}")
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                files = [info for info in packed.infolist() if not info.is_dir()]
                _check_members(archive, temporary, ((info.filename, info.file_size) for info in files))
                packed.extractall(temporary, files)
        else:
            with tarfile.open(archive, tarinfo=_Header) as tar:
                _check_members(archive, temporary, ((m.name, m.size) for m in tar if m.isfile()))
                safe: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # it came with Python 3.11.4
                tar.extractall(temporary, [m for m in tar if m.isfile()], **safe)
        shutil.copytree(temporary, into, dirs_exist_ok=True, copy_function=shutil.move)
    except BROKEN as error:
        full = isinstance(error, OSError) and error.errno is not None
        remedy = "make room or mend the folder, and start again" if full else "delete it and start again"
        raise InputError(f"{archive}: not unpacked ({error or type(error).__name__}); {remedy}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    unpacked_mark(archive).touch()
    archive.unlink()


def unpacked_mark(archive: Path) -> Path:
    """The empty file that `unpack` leaves in place of the archive."""
    return archive.with_name(f".{archive.name}.unpacked")


class _Header(tarfile.TarInfo):
    """A member whose long names and PAX records are names and records: tarfile would take memory for any length."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADERS and not 0 <= self.size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _check_members(archive: Path, folder: Path, members: Iterable[tuple[str, int]]) -> None:
    """InputError for (name, size) of a member that leads outside, or at which they all become too much."""
    most, room, total = max(MOST_UNPACKED * archive.stat().st_size, 1 << 20), shutil.disk_usage(folder).free, 0
    for name, size in members:
        inside(folder, name, f"{archive}: member", writing=True)
        total += size
        if total > most:
            raise InputError(f"{archive}: unpacks to over {MOST_UNPACKED} times its size: not unpacked; delete it")
        if total > room:
            raise InputError(f"{archive}: unpacks to more than the {room:,} bytes that are free; make room")


def check_arrays(path: Path) -> None:
    """InputError for an .npy or .npz file that would be unpickled, or takes far more memory than it has bytes."""
    total, most = 0, max(MOST_UNPACKED * path.stat().st_size, 1 << 20)
    try:
        if path.suffix == ".npy":
            with open_file(path) as f:
                total = _array_bytes(f)
        else:
            with open_file(path) as f, zipfile.ZipFile(f) as packed:
                for info in packed.infolist():
                    with packed.open(info) as member:
                        total += max(_array_bytes(member), info.file_size)
    except InputError:
        raise
    except Exception as error:  # numpy raises whatever its parser of headers does
        reason = in_one_line(error, 200)
        raise InputError(f"{path}: cannot be read as arrays of numbers ({reason}); download it again") from None
    if total > most:
        raise InputError(f"{path}: its arrays would take over {MOST_UNPACKED} times its size; download it again")


def _array_bytes(f: Any) -> int:
    """What the array of an open .npy file takes in memory; ValueError if it holds objects, or is no such file."""
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(f)
    if kind.hasobject:
        raise ValueError("it holds pickled objects, and these are never read")
    return math.prod(shape) * kind.itemsize


# ---------------------------------------------------------------- tars that are never unpacked


def members(path: str | Path) -> tuple[list[tarfile.TarInfo], str]:
    """All whole members of an uncompressed tar, with `offset_data` and `size`, and why it ends early, or "".

    Tars that were joined by `cat` are read to the last one. InputError if the file is not a tar, or is compressed,
    which leaves its members without places.
    """
    whole: list[tarfile.TarInfo] = []
    size = os.path.getsize(path)
    try:
        with open_file(path) as f:
            while True:
                try:
                    with tarfile.open(fileobj=f, mode="r:", tarinfo=_Header) as tar:
                        member = tar.next()
                        while member is not None:
                            here = 0 if member.issparse() or not member.isfile() else member.size
                            if member.size < 0 or member.offset_data + here > size:
                                return whole, f"ends early, within {as_text(member.name)}"
                            whole.append(member)
                            member = _plain(f, tar, size) or tar.next()
                except tarfile.ReadError as error:
                    if not whole:
                        raise
                    return whole, f"ends early ({error})"
                if size < tar.offset + tarfile.BLOCKSIZE:  # tarfile takes a cut header for the end
                    return whole, NO_END
                f.seek(tar.offset)
                if any(f.read(tarfile.BLOCKSIZE)):  # nor does it say that a header is none
                    return whole, "ends early (what follows is no member of a tar)"
                if not _at_next(f, tar.offset):
                    return whole, ""
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, tarfile.TarError):
            _refuse_compressed(str(path))
        raise InputError(f"{path}: not a readable tar file ({error}); download or write it again") from None


# The header of a file as all writers of today write it: mode, uid, gid, size, time, checksum, and the type of a file or
# of a PAX header from byte 100, that is no link, and the numbers of a device from byte 329.
HEADER = re.compile(rb"(?:[0-7]{7}\0){3}([0-7]{11})\0[0-7]{11}\0([0-7]{6})\0 ([0x])\0")
DEVICE = re.compile(rb"(?:[0-7]{7}\0|\0{8}){2}")
HARMLESS = re.compile(rb"(?:mtime|atime|ctime|uid|gid|uname|gname)=[^\n]*")  # records of PAX headers


def _plain(f: BinaryIO, tar: tarfile.TarFile, size: int) -> tarfile.TarInfo | None:
    """The next member if its headers say nothing that needs tarfile, which takes four times as long; else None.

    Its name, size and offsets are what tarfile makes of it. `tar` moves on behind it.
    """
    if tar.pax_headers or tar.offset >= size:
        return None
    start, at = tar.offset, tar.offset
    header, kind, length = _header(f, at)
    if kind == b"x" and length > LONGEST_HEADER:
        return None
    if kind == b"x":
        body = os.pread(f.fileno(), length, at + tarfile.BLOCKSIZE)
        if not _harmless(body, length):
            return None
        at += tarfile.BLOCKSIZE + _blocks(length)
        header, kind, length = _header(f, at)
    name = header[:100].partition(b"\0")[0]
    if kind != b"0" or name.endswith(b"/"):
        return None
    if prefix := header[345:500].partition(b"\0")[0]:
        name = prefix + b"/" + name
    member = tarfile.TarInfo(os.fsdecode(name))
    member.offset, member.offset_data, member.size = start, at + tarfile.BLOCKSIZE, length
    tar.offset = member.offset_data + _blocks(length)
    return member


def _header(f: BinaryIO, offset: int) -> tuple[bytes, bytes, int]:
    """A block, and the type and size that it tells as a header; the type is empty where it is none that is plain."""
    block = os.pread(f.fileno(), tarfile.BLOCKSIZE, offset)
    found = HEADER.match(block, 100) if len(block) == tarfile.BLOCKSIZE else None
    if not found or not DEVICE.match(block, 329):
        return b"", b"", 0
    filled = block.translate(None, b"\0")  # most of it is empty, and the sum is what takes long
    if sum(filled) - sum(block[148:156]) + 8 * ord(" ") != int(found[2], 8):
        return b"", b"", 0
    return block, found[3], int(found[1], 8)


def _harmless(body: bytes, length: int) -> bool:
    """Whether the records of a PAX header, each "LENGTH KEY=VALUE", say nothing about name, size or contents."""
    at = 0
    while at < length:
        digits = body[at : at + 20].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else at
        start = at + len(digits) + 1
        if not start < end <= len(body) or body[end - 1 : end] != b"\n" or not HARMLESS.fullmatch(body, start, end - 1):
            return False
        at = end
    return at > 0


def _blocks(size: int) -> int:
    """Bytes of the blocks that hold so many."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _at_next(f: BinaryIO, offset: int) -> bool:
    """Seek to the first block behind `offset` that is not zero, the start of another tar; False if there is none."""
    f.seek(offset)
    while chunk := f.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            f.seek(offset + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE)
            return True
        offset += len(chunk)
    return False


def read_at(path: str | Path, *places: tuple[int, int]) -> list[bytes]:
    """The bytes at each (offset, size); OSError when the file is gone or shorter than it was."""
    handle = os.open(path, os.O_RDONLY)  # not kept: a thousand shards are more than a process may hold open
    try:
        end = os.fstat(handle).st_size
        if any(offset + size > end for offset, size in places):  # before memory is taken for it
            raise OSError(f"{Path(path).name} is shorter than its index says")
        contents = [os.pread(handle, size, offset) for offset, size in places]
    finally:
        os.close(handle)
    if any(len(content) != size for content, (_, size) in zip(contents, places)):
        raise OSError(f"{Path(path).name} has become shorter since it was indexed")
    return contents


def as_text(name: str | bytes) -> str:
    """A member's name as text that can be printed and written, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _refuse_compressed(path: str) -> None:
    with open(path, "rb") as f:
        start = f.read(8)
    if not (command := next((command for magic, command in UNPACKERS.items() if start.startswith(magic)), None)):
        return
    suffix = max((s for s in TAR_SUFFIXES if path.endswith(s)), key=len, default="")
    unpacked = path.removesuffix(suffix) + (".unpacked.tar" if suffix == ".tar" else ".tar")
    raise InputError(
        f"{path}: is compressed, and tars are read at offsets: unpack it by "
        f"`{command} -c {shlex.quote(path)} > {shlex.quote(unpacked)}` and name {unpacked}"
    )
