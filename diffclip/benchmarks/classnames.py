"""Which class each label or folder is: from classnames.json or .txt, ImageNet's numbers, or the folders' own names."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diffclip.base.backbones import ImageNetInfo, open_clip
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_text
from diffclip.benchmarks.labelled import schema_classnames

WNID = re.compile(r"n\d{8}")  # WordNet's number of an ImageNet class


def first_file(folder: Path, name: str) -> Path | None:
    """Return NAME.json or NAME.txt in a folder, None without either."""
    return next((path for suffix in (".json", ".txt") if (path := folder / f"{name}{suffix}").is_file()), None)


def _listed(path: Path) -> list[str] | dict[str, str]:
    """Class names of a file: a JSON list or object, or text with one a line."""
    if path.suffix == ".json":
        content = read_json(path)
    else:
        content = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if not isinstance(content, list | dict) or not content:
        raise InputError(f"{path} needs a list of class names or an object from class folder to name")
    for number, (key, name) in enumerate(content.items() if isinstance(content, dict) else enumerate(content), 1):
        if not isinstance(name, str) or not name.strip():
            where = repr(key) if isinstance(content, dict) else f"number {number}"
            raise InputError(f"{path}: class {where} has no prompt name")
    return content


def numbered_classnames(root: Path, folder: Path, entry: Mapping[str, str], files: Sequence[Path] = ()) -> list[str]:
    """Prompt names in the order of the labels, for sets whose labels are numbers."""
    listed = folder / "classnames.txt"  # clip-benchmark's
    path = root / entry["classnames"] if "classnames" in entry else listed if listed.is_file() else None
    path = path or first_file(folder, "classnames")
    if path is None:
        if names := schema_classnames(files):
            return names
        raise InputError(f"{folder} has numbers as labels: put their names, in order, into classnames.json or .txt")
    content = _listed(path)
    return list(content.values()) if isinstance(content, dict) else content


def folder_classnames(path: Path, folders: list[str]) -> tuple[list[str], dict[str, int]]:
    """Read prompt names, a list in label order or {class folder: name}, and find the label of each folder."""
    content = _listed(path)
    names = list(content.values()) if isinstance(content, dict) else content
    keys = list(content) if isinstance(content, dict) else names
    if len(set(keys)) != len(keys):
        raise InputError(f"{path}: {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    labels = numbered(keys)
    # folders without a name are left out here and reported by `read_class_folders` with their path
    return names, {folder: label for folder in folders if (label := label_of(folder, labels)) is not None}


def label_of(folder: str, labels: Mapping[str, int]) -> int | None:
    """The label of a class folder: by its name as it stands, else without regard to case, `_` and Unicode's forms.

    None where that finds no class, or several.
    """
    if folder in labels:
        return labels[folder]
    alike = {label for name, label in labels.items() if _plain(name) == _plain(folder)}
    return alike.pop() if len(alike) == 1 else None


def imagenet_labels() -> dict[str, int]:
    """The label of each WordNet number among ImageNet's 1,000 classes."""
    return numbered(ImageNetInfo().label_names())


def imagenet_subset(folder: Path, wnids: list[str]) -> tuple[list[str], dict[str, int]]:
    """OpenAI's prompt names of these of ImageNet's classes, in ImageNet's order, and their labels among themselves."""
    known = imagenet_labels()
    if unknown := [wnid for wnid in wnids if wnid not in known]:
        raise InputError(f"{folder}: {unknown[0]} is none of ImageNet's 1,000 classes: name it in classnames.json")
    ordered = sorted(wnids, key=known.__getitem__)
    return [open_clip.IMAGENET_CLASSNAMES[known[wnid]] for wnid in ordered], numbered(ordered)


def spaced(name: str) -> str:
    """Return a folder's name as a prompt has it."""
    return re.sub(r"[\s_]+", " ", name).strip()


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", spaced(name)).casefold()


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Return the place of each name."""
    return {name: number for number, name in enumerate(names)}
