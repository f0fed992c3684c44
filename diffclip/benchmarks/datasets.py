"""What to evaluate on: a suite is a plain dict of folders, written as YAML or found by a folder's layout.

    classification: {NAME: {folder: PATH, metric: accuracy, classnames: FILE, templates: FILE, torchvision: SET}}
    shifts:         {NAME: {folder: PATH, of: CLASSIFICATION NAME}}
    retrieval:      {NAME: {path: PATH, image_column: NAME, caption_column: NAME, split: NAME, ...}}, as in pretraining
    mmvp:           {folder: PATH}, as every other part that a protocol reads itself

Paths are relative to the data root; all but folder and path may be left out. `torchvision` says that the folder is
torchvision's root for that set. Folders called n01440764 and the like are ImageNet's classes and need no names.
"""

import unicodedata
from collections.abc import Mapping, Set
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import read_yaml
from diffclip.benchmarks import PROTOCOLS, TORCHVISION, prompts
from diffclip.benchmarks.captioned import Captioned, is_captioned, read_captioned
from diffclip.benchmarks.flat_val import read_flat
from diffclip.benchmarks.images import IMAGE_SUFFIXES, Images, class_folders, read_class_folders, visible
from diffclip.benchmarks.labelled import labelled_files, read_labelled
from diffclip.benchmarks.objectnet import read_objectnet
from diffclip.benchmarks.paper import MEAN_PER_CLASS
from diffclip.benchmarks.protocol import Classification, Data, Shift, load
from diffclip.benchmarks.torchvision_sets import read_torchvision
from diffclip.data.layout import SPLITS, Layout, split_named

KEYS = {
    "classification": {"folder", "metric", "classnames", "templates", "torchvision"},
    "shifts": {"folder", "of"},
    "retrieval": {"path", *(field.name for field in fields(Layout))} - {"prefer"},
}
OWN = {entry.part: name for name, entry in PROTOCOLS.items() if entry.part not in KEYS}  # part -> who reads it
PARTS = (*KEYS, *OWN)

Suite = dict[str, Any]


def suite_from_folder(root: Path) -> Suite:
    """Describe what lies under `root`: classification/*, shifts/*, retrieval or retrieval/*, mmvp; or InputError."""
    if not root.is_dir():
        raise InputError(f"{root} does not exist: give the folder that holds the benchmark data")
    suite: Suite = {}
    for part in ("classification", "shifts"):
        if (root / part).is_dir():
            suite[part] = {name: {"folder": f"{part}/{name}"} for name in class_folders(root / part)}
    for name, entry in suite.get("classification", {}).items():
        if unpacked := next(
            (kind for kind, path in TORCHVISION.items() if (root / entry["folder"] / path).is_dir()), ""
        ):
            suite["classification"][name] = {**entry, "torchvision": unpacked}
    if (root / "retrieval").is_dir():
        inside = visible((root / "retrieval").iterdir())
        sets = [path.name for path in inside if path.is_dir()]
        single = any(map(is_captioned, inside)) or any(split_named(name) or name == "annotations" for name in sets)
        names = {"": "retrieval"} if single or not sets else {name: f"retrieval/{name}" for name in sets}
        suite["retrieval"] = {name: {"path": path} for name, path in names.items()}
    suite |= {part: {"folder": part} for part in OWN if (root / part).is_dir()}
    if not suite:
        raise InputError(f"{root} holds none of {', '.join(f'{part}/' for part in PARTS)}")
    return suite


def read_suite_file(path: Path) -> Suite:
    """Read a suite from YAML; `read` checks its keys."""
    suite = read_yaml(path)
    if not isinstance(suite, dict):
        raise InputError(f"suite {path} needs {', '.join(PARTS[:-1])} or {PARTS[-1]} at its top level")
    return suite


def read(root: Path, suite: Suite) -> Data:
    """List all images and captions of a suite, so that what is missing shows before anything is encoded.

    InputError: an unknown key, a missing or empty folder, a class without a prompt name.
    """
    for part, entries in suite.items():
        if part not in PARTS:
            raise InputError(f"suite: unknown key {part}; use {', '.join(PARTS)}")
        for name, entry in {"": entries}.items() if part in OWN else entries.items():
            unknown = set(entry) - KEYS.get(part, {"folder"})
            needed = "path" if part == "retrieval" else "folder"
            if unknown or needed not in entry:
                problem = f"unknown key {min(unknown)}" if unknown else f"{needed} is missing"
                raise InputError(f"suite: {part} {name}: {problem}")

    labelled = {name: _classification(root, name, entry) for name, entry in suite.get("classification", {}).items()}
    shifts = {name: _shift(root, entry, labelled) for name, entry in suite.get("shifts", {}).items()}
    captioned = {name: _captioned(root, entry) for name, entry in suite.get("retrieval", {}).items()}
    readers = {part: load(name).read for part, name in OWN.items() if part in suite}
    own = {part: reader(root / suite[part]["folder"]) for part, reader in readers.items() if reader}
    return Data(labelled, shifts, captioned, own)


def _captioned(root: Path, entry: Mapping[str, Any]) -> Captioned:
    return read_captioned(root / entry["path"], **{key: value for key, value in entry.items() if key != "path"})


def _classification(root: Path, name: str, entry: Mapping[str, str]) -> Classification:
    folder = root / entry["folder"]
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: expected class folders or train/, val/, test/ of such")
    metric = entry.get("metric", "mean_per_class" if name in MEAN_PER_CLASS else "accuracy")
    if metric not in ("accuracy", "mean_per_class"):
        raise InputError(f"suite: classification {name}: metric {metric} is neither accuracy nor mean_per_class")
    files = {split: found for split in SPLITS if (found := labelled_files(folder, split))}
    notes: list[str] = []
    if "torchvision" in entry:
        classnames, images = read_torchvision(entry["torchvision"], folder)
        classnames = prompts.numbered_classnames(root, folder, entry) if "classnames" in entry else classnames
        labels = prompts.numbered(classnames)
    elif files:
        classnames = prompts.numbered_classnames(root, folder, entry, [*chain(*files.values())])
        images = {split: read_labelled(paths, split) for split, paths in files.items()}
        labels = prompts.numbered(classnames)
        if (beyond := max(label for split in images.values() for label in split.labels)) >= len(classnames):
            raise InputError(f"{folder}: label {beyond} has no prompt name, there are {len(classnames)}")
    elif mapped := read_objectnet(folder, notes):
        classnames, labels, images = mapped[0], prompts.numbered(mapped[0]), {"test": mapped[1]}
    else:
        flat = read_flat(folder)
        splits = _split_folders(folder)
        if flat:  # whose test set has no labels
            splits = {split: path for split, path in splits.items() if split == "train"}
        splits = splits or ({} if flat else {"test": _of_classes(folder)})
        classnames, labels = _folder_classes(root, folder, entry, splits, {wnid for _, wnid in flat}, notes)
        images = {split: read_class_folders(path, labels) for split, path in splits.items()}
        if flat:
            images["val"] = Images(
                [str(file) for file, _ in flat], [file for file, _ in flat], [labels[wnid] for _, wnid in flat]
            )
    _choose_test(folder, images, notes)
    if "train" in images and (unseen := set(images["test"].labels) - set(images["train"].labels)):
        raise InputError(f"{folder}: train has no images of {classnames[min(unseen)]!r}, but the test set has")
    if (present := len(set(images["test"].labels))) < len(classnames):
        notes.append(f"{len(classnames):,} classes compete, {present:,} of them have images to score")
    return Classification(classnames, labels, _templates(root, folder, entry), metric, images, notes)


def _folder_classes(
    root: Path,
    folder: Path,
    entry: Mapping[str, str],
    splits: Mapping[str, Path],
    more: Set[str],
    notes: list[str],
) -> tuple[list[str], dict[str, int]]:
    """Prompt names and the label of each class folder, and of `more` that have none, by a file, ImageNet's numbers, or
    the folders' own names.
    """
    names = sorted({name for path in splits.values() for name in class_folders(path)} | more)
    own = root / entry["classnames"] if "classnames" in entry else prompts.first_file(folder, "classnames")
    if own:
        return prompts.folder_classnames(own, names)
    if names and all(split_named(name) for name in names):
        raise InputError(
            f"{folder}: the images in {' and '.join(names)} have no classes: sort them into folders of classes, or "
            "give them with their labels as parquet"
        )
    by_number = [name for name in names if prompts.WNID.fullmatch(name)]
    if 0 < len(by_number) < len(names):
        other = next(name for name in names if name not in by_number)
        raise InputError(
            f"{folder}: {other}/ is no WordNet number as {by_number[0]}/ is: remove it, or name all in classnames.json"
        )
    if {*names} == {str(label) for label in range(1000)}:  # ImageNet-V2 numbers its folders
        order = prompts.imagenet_subset(folder, list(prompts.imagenet_labels()))[0]
        return order, {name: int(name) for name in names}
    if by_number:
        if len(names) < 1000:
            notes.append(f"{len(names)} of ImageNet's 1,000 classes are there, and only these compete")
        return prompts.imagenet_subset(folder, names)
    # one class, where systems write its letters in two of Unicode's forms (macOS: accents apart)
    composed = {name: unicodedata.normalize("NFC", name) for name in names}
    numbers = prompts.numbered(sorted(set(composed.values())))
    return [prompts.spaced(form) for form in numbers], {name: numbers[form] for name, form in composed.items()}


def _of_classes(folder: Path) -> Path:
    """Where the class folders are: deeper, where a folder holds nothing but one with folders of images (images/)."""
    inner = visible(folder.iterdir())
    folders = [path for path in inner if path.is_dir()]
    if len(folders) != 1 or any(path.suffix.lower() in IMAGE_SUFFIXES for path in inner):
        return folder
    deeper = visible(folders[0].iterdir())
    has_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in deeper)
    return folder if has_images or not any(path.is_dir() for path in deeper) else _of_classes(folders[0])


def _choose_test(folder: Path, images: dict[str, Images], notes: list[str]) -> None:
    """Make val the test set where there is no test, or its labels are withheld (-1)."""
    if "test" in images and max(images["test"].labels) < 0:
        if "val" not in images:
            raise InputError(f"{folder}: all labels of test are withheld (-1) and there is no val: nothing to score")
        del images["test"]
        notes.append("the test labels are withheld (-1): scored on validation")
    for split, rows in images.items():
        if min(rows.labels) < 0:
            raise InputError(f"{folder}: all labels of {split} are withheld (-1): remove its files")
    if "test" not in images:
        if "val" not in images:
            raise InputError(f"{folder} has neither test/ nor val/: nothing to score")
        images["test"] = images.pop("val")


def _split_folders(folder: Path) -> dict[str, Path]:
    """train/, val/ and test/ by any of their names; a folder of images alone is a class that is called so."""
    splits: dict[str, Path] = {}
    for path in visible(folder.iterdir()):
        split = split_named(path.name)
        if split and path.is_dir() and any(inner.is_dir() for inner in visible(path.iterdir())):
            if split in splits:
                raise InputError(f"{folder} has {splits[split].name}/ and {path.name}/: keep one of them")
            splits[split] = path
    return splits


def _templates(root: Path, folder: Path, entry: Mapping[str, str]) -> list[str] | None:
    """A set's own prompts: the file that is named, templates.json or .txt, or clip-benchmark's; None without any."""
    own = root / entry["templates"] if "templates" in entry else prompts.first_file(folder, "templates")
    own = own or prompts.first_file(folder, "zeroshot_classification_templates")
    return prompts.templates(own) if own else None


def _shift(root: Path, entry: Mapping[str, str], labelled: Mapping[str, Classification]) -> Shift:
    folder, of = root / entry["folder"], entry.get("of")
    files = labelled_files(folder, "test")
    folders = prompts.numbered_classnames(folder, folder, {}, files) if files else class_folders(folder)
    if of is not None and of not in labelled:
        raise InputError(f"suite: {folder} is said to be a shift of {of}, which is not a classification set")
    candidates = {}
    for name, base in labelled.items() if of is None else [(of, labelled[of])]:
        known = base.labels
        if len(base.classnames) == 1000 and prompts.WNID.fullmatch(folders[0]):
            known = prompts.imagenet_labels()
        elif all(name.isdecimal() for name in folders):  # ImageNet-V2 numbers its folders
            known = prompts.numbered([str(label) for label in range(len(base.classnames))])
            if all(map(prompts.WNID.fullmatch, base.labels)):  # by ImageNet's numbers, of which some may be absent
                wnids = prompts.imagenet_labels()
                known = {str(wnids[wnid]): base.labels[wnid] for wnid in wnids.keys() & base.labels.keys()}
        candidates[name] = prompts.labels_of(folders, known)
    covering = [name for name, labels in candidates.items() if len(labels) == len(folders)]
    if not covering and of is None:
        raise InputError(f"{folder}: no classification set has all of its classes ({', '.join(folders[:3])}, ...)")
    of = of or min(covering, key=lambda name: len(labelled[name].classnames))
    if not files:
        return Shift(of, read_class_folders(folder, candidates[of]))
    images = read_labelled(files, "test")
    if min(images.labels) < 0 or max(images.labels) >= len(folders):
        raise InputError(f"{folder}: labels go from {min(images.labels)} to {max(images.labels)}, {len(folders)} names")
    images.labels = [candidates[of][folders[label]] for label in images.labels]
    return Shift(of, images)
