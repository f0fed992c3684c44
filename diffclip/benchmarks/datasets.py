"""What to evaluate on: a suite is a plain dict of folders, written as YAML or found by a folder's layout.

    classification: {NAME: {folder: PATH, metric: accuracy, classnames: FILE, templates: FILE, torchvision: SET}}
    shifts:         {NAME: {folder: PATH, of: CLASSIFICATION NAME}}
    retrieval:      {NAME: {path: PATH}}
    mmvp:           {folder: PATH}

Paths are relative to the data root; all but folder and path may be left out. `torchvision` says that the folder is
torchvision's root for that set. Folders called n01440764 and the like are ImageNet's classes and need no names.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_text, read_yaml
from diffclip.benchmarks.images import (
    SPLITS,
    Captioned,
    Pictures,
    class_folders,
    labelled_files,
    read_captioned,
    read_class_folders,
    read_labelled,
    schema_classnames,
    split_named,
    visible,
)
from diffclip.benchmarks.mmvp import Pairs, read_mmvp
from diffclip.benchmarks.torchvision_sets import read_torchvision
from diffclip.benchmarks.zero_shot import templates as read_templates

KEYS = {
    "classification": {"folder", "metric", "classnames", "templates", "torchvision"},
    "shifts": {"folder", "of"},
    "retrieval": {"path"},
}
# The probe's metric in the paper's protocol; all other sets use accuracy.
MEAN_PER_CLASS = {"aircraft", "caltech101", "flowers", "pets"}
WNID = re.compile(r"n\d{8}")  # WordNet's number of an ImageNet class

Suite = dict[str, Any]


class Classification(NamedTuple):
    """A labelled set: label c means classnames[c]; `splits` holds test and, if there are, train and val."""

    classnames: list[str]
    labels: dict[str, int]  # of each class folder
    templates: list[str] | None  # its own prompts, with {c}
    metric: str  # of the linear probe
    splits: dict[str, Pictures]
    notes: list[str]  # what a reader of the scores should know, in sentences


class Shift(NamedTuple):
    """Other images of (some of) the classes of a classification set, with that set's labels."""

    of: str
    pictures: Pictures


class Data(NamedTuple):
    """A suite after reading: every file is listed, none decoded."""

    classification: dict[str, Classification]
    shifts: dict[str, Shift]
    retrieval: dict[str, Captioned]  # the name is "" for a single set without one
    mmvp: Pairs | None


def suite_from_folder(root: Path) -> Suite:
    """Describe what lies under `root`: classification/*, shifts/*, retrieval or retrieval/*, mmvp.

    Raises:
        InputError: no such folder, or none of these in it.
    """
    if not root.is_dir():
        raise InputError(f"{root} does not exist: give the folder that holds the benchmark data")
    suite: Suite = {}
    for part in ("classification", "shifts"):
        if (root / part).is_dir():
            suite[part] = {name: {"folder": f"{part}/{name}"} for name in class_folders(root / part)}
    if (root / "retrieval").is_dir():
        inside = visible((root / "retrieval").iterdir())
        single = any(path.suffix.lower() in (".tar", ".parquet", ".json", ".csv", ".tsv") for path in inside)
        sets = [path.name for path in inside if path.is_dir()]
        names = {"": "retrieval"} if single or not sets else {name: f"retrieval/{name}" for name in sets}
        suite["retrieval"] = {name: {"path": path} for name, path in names.items()}
    if (root / "mmvp").is_dir():
        suite["mmvp"] = {"folder": "mmvp"}
    if not suite:
        raise InputError(f"{root} holds none of classification/, shifts/, retrieval/, mmvp/")
    return suite


def read_suite_file(path: Path) -> Suite:
    """Read a suite from YAML; `read` checks its keys."""
    suite = read_yaml(path)
    if not isinstance(suite, dict):
        raise InputError(f"suite {path} needs classification, shifts, retrieval or mmvp at its top level")
    return suite


def read(root: Path, suite: Suite) -> Data:
    """List all images and captions of a suite, so that what is missing shows before anything is encoded.

    Raises:
        InputError: an unknown key, a missing or empty folder, a class without a prompt name.
    """
    for part, entries in suite.items():
        if part != "mmvp" and part not in KEYS:
            raise InputError(f"suite: unknown key {part}; use {', '.join([*KEYS, 'mmvp'])}")
        for name, entry in {"": entries}.items() if part == "mmvp" else entries.items():
            unknown = set(entry) - KEYS.get(part, {"folder"})
            needed = "path" if part == "retrieval" else "folder"
            if unknown or needed not in entry:
                problem = f"unknown key {min(unknown)}" if unknown else f"{needed} is missing"
                raise InputError(f"suite: {part} {name}: {problem}")

    labelled = {name: _classification(root, name, entry) for name, entry in suite.get("classification", {}).items()}
    shifts = {
        name: _shift(root / entry["folder"], entry.get("of"), labelled)
        for name, entry in suite.get("shifts", {}).items()
    }
    captioned = {name: read_captioned(root / entry["path"]) for name, entry in suite.get("retrieval", {}).items()}
    mmvp = read_mmvp(root / suite["mmvp"]["folder"]) if "mmvp" in suite else None
    return Data(labelled, shifts, captioned, mmvp)


def _classification(root: Path, name: str, entry: Mapping[str, str]) -> Classification:
    folder = root / entry["folder"]
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: expected class folders or train/, val/, test/ of such")
    metric = entry.get("metric", "mean_per_class" if name in MEAN_PER_CLASS else "accuracy")
    if metric not in ("accuracy", "mean_per_class"):
        raise InputError(f"suite: classification {name}: metric {metric} is neither accuracy nor mean_per_class")
    templates = _templates(root, folder, entry)
    numbered = {split: files for split in SPLITS if (files := labelled_files(folder, split))}
    notes: list[str] = []
    if "torchvision" in entry:
        classnames, pictures = read_torchvision(entry["torchvision"], folder)
        if "classnames" in entry:
            classnames = _numbered_classnames(root, folder, entry)
        labels = _numbered(classnames)
    elif numbered:
        classnames = _numbered_classnames(root, folder, entry, [path for files in numbered.values() for path in files])
        pictures = {split: read_labelled(files, split) for split, files in numbered.items()}
        labels = _numbered(classnames)
        beyond = max(label for split in pictures.values() for label in split.labels)
        if beyond >= len(classnames):
            raise InputError(f"{folder}: label {beyond} has no prompt name, there are {len(classnames)}")
    else:
        splits = _split_folders(folder) or {"test": folder}
        found = {split: class_folders(path) for split, path in splits.items()}
        names = sorted(set().union(*found.values()))
        own = root / entry["classnames"] if "classnames" in entry else _first_file(folder, "classnames")
        if own:
            classnames, labels = _classnames(own, names)
        elif all(WNID.fullmatch(name) for name in names):
            classnames, labels = _imagenet_subset(folder, names)
            if len(names) < 1000:
                notes.append(f"{len(names)} of ImageNet's 1,000 classes are there, and only these compete")
        else:
            # one class, where systems write its letters in two of Unicode's forms (macOS: accents apart)
            composed = {folder_name: unicodedata.normalize("NFC", folder_name) for folder_name in names}
            numbers = _numbered(sorted(set(composed.values())))
            labels = {folder_name: numbers[form] for folder_name, form in composed.items()}
            classnames = [_spaced(form) for form in numbers]
        pictures = {split: read_class_folders(path, labels) for split, path in splits.items()}
    if "test" in pictures and max(pictures["test"].labels) < 0:
        if "val" not in pictures:
            raise InputError(f"{folder}: all labels of test are withheld (-1) and there is no val: nothing to score")
        del pictures["test"]
        notes.append("the test labels are withheld (-1): scored on validation")
    for split, rows in pictures.items():
        if min(rows.labels) < 0:
            raise InputError(f"{folder}: all labels of {split} are withheld (-1): remove its files")
    if "test" not in pictures:  # sets whose test labels are withheld are scored on val
        if "val" not in pictures:
            raise InputError(f"{folder} has neither test/ nor val/: nothing to score")
        pictures["test"] = pictures.pop("val")
    unseen = set(pictures["test"].labels) - set(pictures["train"].labels) if "train" in pictures else set()
    if unseen:
        raise InputError(f"{folder}: train has no images of {classnames[min(unseen)]!r}, but the test set has")
    present = len(set(pictures["test"].labels))
    if present < len(classnames):
        notes.append(f"{len(classnames):,} classes compete, {present:,} of them have images to score")
    return Classification(classnames, labels, templates, metric, pictures, notes)


def _split_folders(folder: Path) -> dict[str, Path]:
    """train/, val/ and test/ by any of their names; a folder of images alone is a class that is called so."""
    found: dict[str, Path] = {}
    for path in visible(folder.iterdir()):
        split = split_named(path.name)
        if split and path.is_dir() and any(inner.is_dir() for inner in visible(path.iterdir())):
            if split in found:
                raise InputError(f"{folder} has {found[split].name}/ and {path.name}/: keep one of them")
            found[split] = path
    return found


def _first_file(folder: Path, name: str) -> Path | None:
    return next((path for suffix in (".json", ".txt") if (path := folder / f"{name}{suffix}").is_file()), None)


def _templates(root: Path, folder: Path, entry: Mapping[str, str]) -> list[str] | None:
    """A set's own prompts: the file that is named, templates.json or .txt, or clip-benchmark's; None without any."""
    names = ("templates", "zeroshot_classification_templates")
    own = root / entry["templates"] if "templates" in entry else _first_file(folder, names[0])
    own = own or _first_file(folder, names[1])
    return read_templates(own) if own else None


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


def _numbered_classnames(root: Path, folder: Path, entry: Mapping[str, str], files: Sequence[Path] = ()) -> list[str]:
    """Prompt names in the order of the labels, for sets whose labels are numbers."""
    listed = folder / "classnames.txt"  # clip-benchmark's
    path = root / entry["classnames"] if "classnames" in entry else listed if listed.is_file() else None
    path = path or _first_file(folder, "classnames")
    if path is None:
        if names := schema_classnames(files):
            return names
        raise InputError(f"{folder} has numbers as labels: put their names, in order, into classnames.json or .txt")
    content = _listed(path)
    return list(content.values()) if isinstance(content, dict) else content


def _classnames(path: Path, folders: list[str]) -> tuple[list[str], dict[str, int]]:
    """Read prompt names, a list in label order or {class folder: name}, and find the label of each folder."""
    content = _listed(path)
    names = list(content.values()) if isinstance(content, dict) else content
    keys = list(content) if isinstance(content, dict) else names
    if len(set(keys)) != len(keys):
        raise InputError(f"{path}: {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    labels = _numbered(keys)
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


def _shift(folder: Path, of: str | None, labelled: dict[str, Classification]) -> Shift:
    numbered = labelled_files(folder, "test")
    folders = _numbered_classnames(folder, folder, {}, numbered) if numbered else class_folders(folder)
    if of is not None and of not in labelled:
        raise InputError(f"suite: {folder} is said to be a shift of {of}, which is not a classification set")
    candidates = {}
    for name, base in labelled.items() if of is None else [(of, labelled[of])]:
        known = base.labels
        if len(base.classnames) == 1000 and WNID.fullmatch(folders[0]):
            known = _imagenet()
        elif all(one.isdecimal() for one in folders):  # ImageNet-V2 numbers its folders
            known = _numbered([str(label) for label in range(len(base.classnames))])
            if all(WNID.fullmatch(one) for one in base.labels):  # by ImageNet's numbers, of which some may be absent
                known = {str(number): base.labels[one] for one, number in _imagenet().items() if one in base.labels}
        candidates[name] = {one: label for one in folders if (label := label_of(one, known)) is not None}
    covering = [name for name, labels in candidates.items() if len(labels) == len(folders)]
    if not covering and of is None:
        raise InputError(f"{folder}: no classification set has all of its classes ({', '.join(folders[:3])}, ...)")
    of = of or min(covering, key=lambda name: len(labelled[name].classnames))
    if not numbered:
        return Shift(of, read_class_folders(folder, candidates[of]))
    pictures = read_labelled(numbered, "test")
    if min(pictures.labels) < 0 or max(pictures.labels) >= len(folders):
        raise InputError(
            f"{folder}: labels go from {min(pictures.labels)} to {max(pictures.labels)}, {len(folders)} names"
        )
    pictures.labels = [candidates[of][folders[label]] for label in pictures.labels]
    return Shift(of, pictures)


def _imagenet() -> dict[str, int]:
    """The label of each WordNet number among ImageNet's 1,000 classes."""
    from diffclip.base.backbones import ImageNetInfo

    return _numbered(ImageNetInfo().label_names())


def _imagenet_subset(folder: Path, wnids: list[str]) -> tuple[list[str], dict[str, int]]:
    """OpenAI's prompt names of these of ImageNet's classes, in ImageNet's order, and their labels among themselves."""
    from diffclip.base.backbones import open_clip

    known = _imagenet()
    if unknown := [wnid for wnid in wnids if wnid not in known]:
        raise InputError(f"{folder}: {unknown[0]} is none of ImageNet's 1,000 classes: name it in classnames.json")
    ordered = sorted(wnids, key=known.__getitem__)
    return [open_clip.IMAGENET_CLASSNAMES[known[wnid]] for wnid in ordered], _numbered(ordered)


def _spaced(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip()


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", _spaced(name)).casefold()


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}
