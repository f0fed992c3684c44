"""Archives of strangers, unpacked whole or not at all, and never outside of their folder."""

import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.paths import inside

MOST_UNPACKED = 100  # times the archive's size; images are packed once over, text perhaps twenty times
BROKEN = (  # RuntimeError: encrypted; NotImplementedError: a compression that Python does not know
    *(zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error),
    *(lzma.LZMAError, RuntimeError, NotImplementedError, ValueError),
)


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
    print(f"  unpacking {archive.name}")
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                files = [info for info in packed.infolist() if not info.is_dir()]
                _check_members(archive, temporary, ((info.filename, info.file_size) for info in files))
                packed.extractall(temporary, files)
        else:
            with tarfile.open(archive) as tar:
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


def _check_members(archive: Path, folder: Path, members: Iterable[tuple[str, int]]) -> None:
    """InputError for (name, size) of a member that leads outside, or at which they all become too much."""
    packed, room, total = archive.stat().st_size, shutil.disk_usage(folder).free, 0
    for name, size in members:
        inside(folder, name, f"{archive}: member", writing=True)
        total += size
        if total > max(MOST_UNPACKED * packed, 1 << 20):
            raise InputError(f"{archive}: unpacks to over {MOST_UNPACKED} times its size: not unpacked; delete it")
        if total > room:
            raise InputError(f"{archive}: unpacks to more than the {room:,} bytes that are free; make room")
