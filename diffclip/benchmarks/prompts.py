"""Classes as text: their names, templates with a place for a name, and a unit vector for each class.

The vector follows CLIP (Radford et al. 2021, section 3.1.4): normalise each prompt, average, normalise. Names are those
of classnames.json or .txt, of ImageNet's numbers, or the folders' own.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffclip.base.backbones import ImageNetInfo, open_clip
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_text
from diffclip.benchmarks.labelled import declared_classnames

WNID = re.compile(r"n\d{8}")  # WordNet's number of an ImageNet class


def templates(name: str | Path) -> list[str]:
    """Prompt templates with `{c}` where the class name goes.

    `imagenet7` are SLIP's seven (open_clip calls them simple), `imagenet80` are OpenAI's, anything else is the path of
    a JSON list of strings, or of a text file with a prompt a line. There OpenAI's `{}` means the same as `{c}`.

    Raises:
        InputError: no such file, or a prompt without a place for the class name.
    """
    shipped = {"imagenet7": open_clip.SIMPLE_IMAGENET_TEMPLATES, "imagenet80": open_clip.OPENAI_IMAGENET_TEMPLATES}
    if name in shipped:
        return [template("{c}") for template in shipped[name]]
    path = Path(name)
    if not path.is_file():
        raise InputError(f"templates {name}: neither imagenet7, imagenet80 nor a file")
    read = read_json(path) if path.suffix == ".json" else [t.strip() for t in read_text(path).split("\n") if t.strip()]
    if not isinstance(read, list) or not read:
        raise InputError(f"{path} needs to be a list of strings that each hold {{c}} or {{}}")
    for number, text in enumerate(read, start=1):
        if not isinstance(text, str) or ("{c}" in text) + ("{}" in text) != 1:
            raise InputError(f"{path}: template {number}, {text!r}, needs {{c}} or {{}} where the class name goes")
        if re.match(r"""lambda\b|[rf]?(["']).*\1,$""", text):
            raise InputError(f"{path}: template {number}, {text!r}, is Python: write only the text between the quotes")
    return [template.replace("{}", "{c}") for template in read]


def prompts(classnames: Sequence[str], class_templates: Sequence[str]) -> list[str]:
    """All prompts, those of one class together: class 0 with each template, class 1, ..."""
    return [template.replace("{c}", name) for name in classnames for template in class_templates]


def class_means(features: Tensor) -> Tensor:
    """Turn prompt features (classes, prompts, width) into unit class vectors (classes, width)."""
    return F.normalize(F.normalize(features.float(), dim=-1).mean(dim=1), dim=-1)


@torch.no_grad()
def classifier(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    class_templates: Sequence[str],
    batch_size: int = 256,
) -> Tensor:
    """The text classifier (classes, width), float32 unit rows, on the model's device.

    The model stays in the mode it is in: call `model.eval()` first where dropout matters.
    """
    device = next(model.parameters()).device
    encode_text = cast(Callable[[Tensor], Tensor], model.encode_text)
    texts = prompts(classnames, class_templates)
    batches = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
    features = torch.cat([encode_text(tokenizer(batch).to(device)) for batch in batches])
    return class_means(features.unflatten(0, (len(classnames), len(class_templates))))


def first_file(folder: Path, name: str) -> Path | None:
    """NAME.json or NAME.txt in a folder, None without either."""
    return next(filter(Path.is_file, (folder / f"{name}.json", folder / f"{name}.txt")), None)


def _listed(path: Path) -> tuple[list[str], list[str]]:
    """Class folders and names of a file: a JSON object, or a list or lines of text, where both are the same."""
    lines = path.suffix != ".json"
    content = [line.strip() for line in read_text(path).rstrip().split("\n")] if lines else read_json(path, unique=True)
    if not isinstance(content, list | dict) or not content:
        raise InputError(f"{path} needs a list of class names or an object from class folder to name")
    folders = list(content)
    names = list(content.values()) if isinstance(content, dict) else folders
    for number, (folder, name) in enumerate(zip(folders, names), 1):
        if not isinstance(name, str) or not name.strip():
            where = f"number {number}" if names is folders else repr(folder)
            raise InputError(f"{path}: class {where} has no prompt name")
    return folders, names


def numbered_classnames(root: Path, folder: Path, entry: Mapping[str, str], files: Sequence[Path] = ()) -> list[str]:
    """Prompt names in the order of the labels, for sets whose labels are numbers."""
    own = (folder / "classnames.txt", folder / "classnames.json")  # the first is clip-benchmark's
    path = root / entry["classnames"] if "classnames" in entry else next(filter(Path.is_file, own), None)
    names = None
    if path:
        keys, names = _listed(path)
        if names is not keys and all(key.isdecimal() for key in keys):  # {"0": ..., "1": ...} in any order
            by_number = dict(zip(map(int, keys), names))
            if sorted(by_number) != list(range(len(keys))):
                raise InputError(f"{path}: its numbers need to be 0 to {len(keys) - 1}, as the labels are")
            names = [by_number[number] for number in range(len(keys))]
    names = names or declared_classnames(folder, files)
    if not names:
        raise InputError(f"{folder} has numbers as labels: put their names, in order, into classnames.json or .txt")
    return names


def folder_classnames(path: Path, folders: list[str]) -> tuple[list[str], dict[str, int]]:
    """Read prompt names, a list in label order or {class folder: name}, and find the label of each folder."""
    keys, names = _listed(path)
    if len(set(keys)) != len(keys):
        raise InputError(f"{path}: {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return names, labels_of(folders, numbered(keys))


def labels_of(folders: Iterable[str], labels: Mapping[str, int]) -> dict[str, int]:
    """The labels of class folders: by the name as it stands, else without regard to case, `_` and Unicode's forms.

    Folders for which that finds no class, or several, are left out; `read_class_folders` reports them with their path.
    """
    alike = defaultdict(set)
    for name, label in labels.items():
        alike[_plain(name)].add(label)
    found = {folder: {labels[folder]} if folder in labels else alike[_plain(folder)] for folder in folders}
    return {folder: min(candidates) for folder, candidates in found.items() if len(candidates) == 1}


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
    """A folder's name as a prompt has it."""
    return re.sub(r"[\s_]+", " ", name).strip()


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", spaced(name)).casefold()


def numbered(names: Iterable[str]) -> dict[str, int]:
    """The place of each name."""
    return {name: number for number, name in enumerate(names)}
