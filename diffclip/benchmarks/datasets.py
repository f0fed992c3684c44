"""What to evaluate on: a suite is a plain dict of folders, written as YAML or found by a folder's layout.

    classification: {NAME: {folder: PATH, metric: accuracy, classnames: FILE, templates: FILE, torchvision: SET}}
    shifts:         {NAME: {folder: PATH, of: CLASSIFICATION NAME}}
    retrieval:      {NAME: {path: PATH}}
    mmvp:           {folder: PATH}

Paths are relative to the data root; all but folder and path may be left out. `torchvision` says that the folder is
torchvision's root for that set. Folders called n01440764 and the like are ImageNet's classes and need no names.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffclip.benchmarks.images import (
    Captioned,
    Pictures,
    class_folders,
    labelled_files,
    read_captioned,
    read_class_folders,
    read_json,
    read_labelled,
)
from diffclip.benchmarks.mmvp import Pairs, read_mmvp
from diffclip.benchmarks.torchvision_sets import read_torchvision
from diffclip.benchmarks.zero_shot import templates as read_templates
from diffclip.errors import InputError

KEYS = {
    "classification": {"folder", "metric", "classnames", "templates", "torchvision"},
    "shifts": {"folder", "of"},
    "retrieval": {"path"},
}
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
# The probe's metric in the paper's protocol; all other sets use accuracy.
MEAN_PER_CLASS = {"aircraft", "caltech101", "flowers", "pets"}
WNID = re.compile(r"n\d{8}")  # WordNet's number of an ImageNet class

Suite = dict[str, Any]


class Classification(NamedTuple):
    """A labelled set: label c means classnames[c]; `splits` holds test and, if there are, train and val."""

    classnames: list[str]
    labels: dict[str, int]  # of each class folder, its name in lower case with spaces
    templates: list[str] | None  # its own prompts, with {c}
    metric: str  # of the linear probe
    splits: dict[str, Pictures]


class Shift(NamedTuple):
    """Other pictures of (some of) the classes of a classification set, with that set's labels."""

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
        inside = sorted(entry.name for entry in (root / "retrieval").iterdir() if not entry.name.startswith("."))
        single = any(name.endswith((".tar", ".parquet", ".json")) for name in inside) or not inside
        names = {"": "retrieval"} if single else {name: f"retrieval/{name}" for name in inside}
        suite["retrieval"] = {name: {"path": path} for name, path in names.items()}
    if (root / "mmvp").is_dir():
        suite["mmvp"] = {"folder": "mmvp"}
    if not suite:
        raise InputError(f"{root} holds none of classification/, shifts/, retrieval/, mmvp/")
    return suite


def read_suite_file(path: Path) -> Suite:
    """Read a suite from YAML; `read` checks its keys."""
    import yaml

    try:
        suite = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"suite {path} does not exist") from None
    except yaml.YAMLError as error:
        raise InputError(f"suite {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(suite, dict):
        raise InputError(f"suite {path} needs classification, shifts, retrieval or mmvp at its top level")
    return suite


def read(root: Path, suite: Suite) -> Data:
    """List all pictures and captions of a suite, so that what is missing shows before anything is encoded.

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
    numbered = {alias: files for alias in sum(SPLITS.values(), ()) if (files := labelled_files(folder, alias))}
    if "torchvision" in entry:
        classnames, pictures = read_torchvision(entry["torchvision"], folder)
        if "classnames" in entry:
            classnames = _numbered_classnames(root, folder, entry)
        labels = _numbered(classnames)
    elif numbered:
        classnames = _numbered_classnames(root, folder, entry)
        pictures = {
            split: read_labelled(numbered[alias])
            for split, aliases in SPLITS.items()
            for alias in aliases
            if alias in numbered
        }
        labels = {name: label for label, name in enumerate(classnames)}
        beyond = max(label for split in pictures.values() for label in split.labels)
        if beyond >= len(classnames):
            raise InputError(f"{folder}: label {beyond} has no prompt name, there are {len(classnames)}")
    else:
        splits = {
            split: folder / alias for split, aliases in SPLITS.items() for alias in aliases if (folder / alias).is_dir()
        } or {"test": folder}
        found = {split: class_folders(path) for split, path in splits.items()}
        names = sorted(set().union(*found.values()))
        classes = root / entry["classnames"] if "classnames" in entry else folder / "classnames.json"
        if "classnames" in entry or classes.is_file():
            classnames, labels = _classnames(classes, names)
        elif all(WNID.fullmatch(name) for name in names):
            classnames, labels = _imagenet()
        else:
            classnames, labels = [_spaced(folder_name) for folder_name in names], _numbered(names)
        pictures = {split: read_class_folders(path, labels) for split, path in splits.items()}
    if "test" not in pictures:  # sets whose test labels are withheld are scored on val
        if "val" not in pictures:
            raise InputError(f"{folder} has neither test/ nor val/: nothing to score")
        pictures["test"] = pictures.pop("val")
    unseen = set(pictures["test"].labels) - set(pictures["train"].labels) if "train" in pictures else set()
    if unseen:
        raise InputError(f"{folder}: train has no pictures of {classnames[min(unseen)]!r}, but the test set has")
    by_name = {_plain(name): label for name, label in labels.items()}
    return Classification(classnames, by_name, templates, metric, pictures)


def _templates(root: Path, folder: Path, entry: Mapping[str, str]) -> list[str] | None:
    """A set's own prompts: the file that is named, templates.json, or clip-benchmark's list; None without any."""
    own = root / entry["templates"] if "templates" in entry else folder / "templates.json"
    if "templates" in entry or own.is_file():
        return read_templates(own)
    lines = folder / "zeroshot_classification_templates.txt"
    return [line for line in lines.read_text("utf-8").splitlines() if "{c}" in line] if lines.is_file() else None


def _numbered_classnames(root: Path, folder: Path, entry: Mapping[str, str]) -> list[str]:
    """Prompt names in the order of the labels, for sets whose labels are numbers."""
    listed = folder / "classnames.txt"  # clip-benchmark's
    if "classnames" not in entry and listed.is_file():
        return [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
    path = root / entry["classnames"] if "classnames" in entry else folder / "classnames.json"
    if not path.is_file():
        raise InputError(f"{folder} has numbers as labels: put their names, in order, into classnames.json or .txt")
    return _classnames(path, [])[0]


def _classnames(path: Path, folders: list[str]) -> tuple[list[str], dict[str, int]]:
    """Read prompt names, a list in label order or {class folder: name}, and find the label of each folder."""
    content = read_json(path)
    if isinstance(content, list):
        names = content
        keys = [_plain(name) if isinstance(name, str) else "" for name in names]
    elif isinstance(content, dict):
        names, keys = list(content.values()), [_plain(key) for key in content]
    else:
        raise InputError(f"{path} needs a list of class names or an object from class folder to name")
    for key, name in zip(keys, names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{path}: class {key or names.index(name)} has no prompt name")
    if len(set(keys)) != len(keys):
        raise InputError(f"{path}: {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    labels = {key: label for label, key in enumerate(keys)}
    # folders without a name are left out here and reported by `read_class_folders` with their path
    return names, {folder: labels[_plain(folder)] for folder in folders if _plain(folder) in labels}


def _shift(folder: Path, of: str | None, labelled: dict[str, Classification]) -> Shift:
    numbered = labelled_files(folder, "test")
    folders = _numbered_classnames(folder, folder, {}) if numbered else class_folders(folder)
    if of is not None and of not in labelled:
        raise InputError(f"suite: {folder} is said to be a shift of {of}, which is not a classification set")
    candidates = {}
    for name, base in labelled.items() if of is None else [(of, labelled[of])]:
        known = base.labels
        if len(base.classnames) == 1000 and WNID.fullmatch(folders[0]):
            known = _imagenet()[1]
        elif all(one.isdecimal() for one in folders):  # ImageNet-V2 numbers its folders
            known = _numbered([str(label) for label in range(len(base.classnames))])
        candidates[name] = {one: known[_plain(one)] for one in folders if _plain(one) in known}
    covering = [name for name, labels in candidates.items() if len(labels) == len(folders)]
    if not covering and of is None:
        raise InputError(f"{folder}: no classification set has all of its classes ({', '.join(folders[:3])}, ...)")
    of = of or min(covering, key=lambda name: len(labelled[name].classnames))
    if not numbered:
        return Shift(of, read_class_folders(folder, candidates[of]))
    pictures = read_labelled(numbered)
    pictures.labels = [candidates[of][folders[label]] for label in pictures.labels]
    return Shift(of, pictures)


def _imagenet() -> tuple[list[str], dict[str, int]]:
    """The 1,000 classes of ImageNet: OpenAI's prompt names, and the label of each WordNet number."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return list(IMAGENET_CLASSNAMES), _numbered(ImageNetInfo().label_names())


def _spaced(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip()


def _plain(name: str) -> str:
    return _spaced(name).lower()


def _numbered(names: list[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}
