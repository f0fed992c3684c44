"""Folders that are whole or not there: a record of every file's size and digest, and what has changed since.

A damaged disk, a copy that broke off or a careless hand changes files without a word; most formats load them all the
same.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from diffclip.base.files import file_sha256

Digests = dict[str, list]  # file, relative to the folder -> [bytes, sha256]


def seal(folder: str | Path, files: Iterable[str | Path]) -> Digests:
    """Sizes and digests of files of a folder, which are given by their paths or relative to it."""
    folder = Path(folder)
    given = (Path(file) for file in files)
    paths = sorted({(f.relative_to(folder) if f.is_relative_to(folder) else f).as_posix() for f in given})
    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        return dict(zip(paths, pool.map(lambda name: _digest(folder / name), paths)))


def files_of(folder: str | Path) -> list[Path]:
    """All files below a folder but hidden ones."""
    found = [Path(where, name) for where, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    return sorted(found)


def damage(folder: str | Path, sealed: Mapping[str, object]) -> str:
    """What is wrong with the first file that is not as it was sealed, in a few words; "" if all are."""
    return next(all_damage(folder, sealed), "")


def all_damage(folder: str | Path, sealed: Mapping[str, object]) -> Iterator[str]:
    """What is wrong with each file that is not as it was sealed; sizes first, since they are told at once."""
    folder, same_size = Path(folder), []
    for name, entry in sealed.items():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int)):
            yield f"the record of {name} is damaged"
        elif not (folder / name).is_file():
            yield f"{name} is missing"
        elif (size := os.path.getsize(folder / name)) != entry[0]:
            yield f"{name} has {size:,} bytes, and had {entry[0]:,} when it was written"
        else:
            same_size.append(name)
    with ThreadPoolExecutor(4) as pool:
        for name, digest in zip(same_size, pool.map(lambda name: _digest(folder / name), same_size)):
            if digest != sealed[name]:
                yield f"{name} is not what was written"


def _digest(path: Path) -> list:
    return [os.path.getsize(path), file_sha256(path)]
