"""Names that data files, archives and lists give to files: below the folder that the user named, or refused; and the
files that a pattern names.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import braceexpand

from diffclip.base.errors import InputError
from diffclip.base.hub import dataset_copy

LONGEST = 255  # bytes of a folder's or file's name, on nearly all file systems


def walk_once(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` without hidden folders and files, sorted; links are followed, each folder once, wherever they lead.

    As with `os.walk`, what is taken out of the list of folders is not walked.
    """
    seen = set[str]()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link to a folder above, or a second one to the same
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield where, folders, sorted(name for name in names if not name.startswith("."))


def matching(patterns: Sequence[str]) -> list[str]:
    """Paths of the files and folders that patterns with globs and `{00000..00012}` braces name, sorted per pattern.

    A name without either stays as it is; `hf:owner/name`, or a file in it, is fetched from the Hub. InputError if a
    pattern matches nothing.
    """
    paths: list[str] = []
    for pattern in patterns:
        if pattern.startswith("hf:"):
            pattern = dataset_copy(pattern)
        for part in [pattern] if os.path.exists(pattern) else alternatives(pattern):
            matches = sorted(glob.glob(part)) if glob.has_magic(part) and not os.path.exists(part) else [part]
            if not matches:
                raise InputError(f"{pattern}: no such file; mend the pattern")
            paths += matches
    return paths


def alternatives(pattern: str) -> list[str]:
    """The paths and globs that a pattern with braces stands for. The folders that it begins with, as far as they are
    there by these names, stay as they are: `runs [2]/*.tar` is the tars in `runs [2]`.
    """
    start = os.path.dirname(pattern)
    while start and not os.path.isdir(start):
        start = os.path.dirname(start)
    return [glob.escape(start) + rest for rest in braceexpand.braceexpand(pattern[len(start) :])]


def folder_of(paths: Sequence[str]) -> str:
    """The folder in which files of data lie, or that they are, for `image_root`; InputError if there are several."""
    folders = {os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path)) for path in paths}
    if len(folders) > 1:
        raise InputError(f"the data lies in several folders, e.g. {sorted(folders)[0]}: give --image_root")
    return folders.pop()


def inside(root: str | Path, name: object, where: str, *, writing: bool = False) -> Path:
    """`root / name`, if the name cannot lead out of `root`.

    An absolute name is taken where it lies below `root` (so `--image_root /` takes any). Links below `root` are
    followed in reading, since people link their image folders, but never in writing.

    Args:
        name: what a stranger's file gave as a name, of any type.
        where: names the entry in messages, e.g. "rows.json: row 7".
        writing: the file is to be written.

    Raises:
        InputError: the name is no text or empty, leads outside, is written as on Windows, or no file can have it.
    """
    quoted = repr(name) if len(repr(name)) <= 120 else repr(name)[:120] + "…"
    if not isinstance(name, str) or not PurePosixPath(name).parts:
        raise InputError(f"{where}: {quoted} is no file name; give a name below {root}")
    if "\\" in name or PureWindowsPath(name).drive:
        raise InputError(f"{where}: {quoted} is a path as Windows writes it; give it relative to {root}, with /")
    path = PurePosixPath(name)
    try:
        unusable = "\0" in name or any(len(os.fsencode(part)) > LONGEST for part in path.parts)
    except UnicodeEncodeError:  # halves of surrogate pairs
        unusable = True
    if unusable:
        raise InputError(f"{where}: {quoted} cannot be the name of a file; rename the file and mend the entry")
    top = PurePosixPath(os.path.abspath(root))
    if ".." in path.parts or (path.is_absolute() and not path.is_relative_to(top)):
        raise InputError(f"{where}: {quoted} leads outside {root}; give a name below it, or a folder above both")
    if writing and not Path(os.path.realpath(Path(root, name))).is_relative_to(os.path.realpath(root)):
        raise InputError(f"{where}: {quoted} leads outside {root} through a link; remove the link")
    return Path(root, name)
