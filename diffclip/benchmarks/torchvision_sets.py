"""The nine classification sets as torchvision unpacks or downloads them, and rules for those it does not split.

Splits, beside TensorFlow Datasets' (TFDS), which the official evaluation reads:

- food101, aircraft, flowers, dtd (partition 1) and pets: the authors' own, as in TFDS; only the order within a split
  may differ, on which few-shot episodes depend and nothing else.
- cifar10, cifar100: the authors' own, all 50,000 images in train.
- caltech101: 30 images a class to train on and the rest to test, as in TFDS, but other images (TFDS draws them with
  numpy's generator), and without TFDS's 102nd class, the background clutter.
- sun397: 70 / 10 / 20 % of each class; TFDS ships a random list in these shares of the whole.

The rule for the last two: within each class images are ordered by the SHA-256 of their path below the set's folder,
so the split depends neither on the order of the files nor on any library's random numbers. Sets without a
validation split have a fifth of train set aside by `linear_probe.hold_out`.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torchvision import datasets

from diffclip.base.errors import InputError, in_one_line
from diffclip.benchmarks import TORCHVISION
from diffclip.benchmarks.images import Images

OWN_SPLITS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "food101": (datasets.Food101, ("train", "test")),
    "aircraft": (datasets.FGVCAircraft, ("train", "val", "test")),
    "dtd": (datasets.DTD, ("train", "val", "test")),
    "pets": (datasets.OxfordIIITPet, ("trainval", "test")),
    "flowers": (datasets.Flowers102, ("train", "val", "test")),
}


def read_torchvision(name: str, root: Path, *, download: bool = False) -> tuple[list[str], dict[str, Images]]:
    """The class names in the order of the labels, and the images of each split.

    Args:
        name: a key of `TORCHVISION`.
        root: torchvision's root folder.
        download: fetch what is missing by torchvision's own links and check it by its digests.

    Raises:
        InputError: unknown name, files missing or damaged, or a failed download.
    """
    if name not in TORCHVISION:
        raise InputError(f"torchvision set {name!r} is unknown: use one of {', '.join(TORCHVISION)}")
    found: dict[str, Any]
    try:
        match name:
            case "cifar10" | "cifar100":
                kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
                found = {s: kind(root, s == "train", download=download) for s in ("train", "test")}
                return _spaced(found["train"].classes), {s: _cifar(rows, f"{name} {s}") for s, rows in found.items()}
            case "sun397":
                whole = datasets.SUN397(root, download=download)
                return _spaced(whole.classes), _split(root / "SUN397", whole._image_files, whole._labels, _shares)
            case "caltech101":
                whole = datasets.Caltech101(root, download=download)
                base = root / TORCHVISION[name]
                files = [base / whole.categories[c] / f"image_{n:04d}.jpg" for c, n in zip(whole.y, whole.index)]
                return _spaced(whole.categories), _split(base, files, whole.y, _thirty)
            case _:
                reader, splits = OWN_SPLITS[name]
                found = {s.replace("trainval", "train"): reader(root, s, download=download) for s in splits}
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = in_one_line(error, None)
        raise InputError(
            f"{root / TORCHVISION[name]} cannot be read as torchvision's {name} ({reason}): download it again with "
            f"diffclip benchmark data download {name} --data_root {root}"
        ) from error
    images = {}
    for split, rows in found.items():
        files = list(map(Path, rows._images if name == "pets" else rows._image_files))
        images[split] = Images(list(map(str, files)), files, rows._labels)
    return _spaced(found["train"].classes), images


def _cifar(data: Any, name: str) -> Images:
    """CIFAR's images are rows of an array: each becomes a file in memory in the plainest format there is."""
    height, width = data.data.shape[1:3]
    sources = [b"P6 %d %d 255\n" % (width, height) + pixels.tobytes() for pixels in data.data]
    return Images([f"{name} image {n}" for n in range(len(sources))], sources, data.targets)


def _split(
    base: Path, files: Sequence[str | Path], labels: Sequence[int], cut: Callable[[int], dict[str, int]]
) -> dict[str, Images]:
    """Split by the rule of this module; `cut` says how many of a class's n images each split gets, in order."""
    classes = defaultdict(list)
    for file, label in zip(map(Path, files), labels):
        digest = hashlib.sha256(file.relative_to(base).as_posix().encode()).digest()
        classes[int(label)].append((digest, file))
    chosen: dict[str, list[tuple[str, Path, int]]] = defaultdict(list)
    for label, members in sorted(classes.items()):
        ordered = iter([file for _, file in sorted(members)])
        for split, count in cut(len(members)).items():
            chosen[split] += [(str(file), file, label) for file in sorted(islice(ordered, count))]
    return {split: Images(*zip(*rows)) for split, rows in chosen.items()}


def _shares(n: int) -> dict[str, int]:
    valid, test = n // 10, n // 5
    return {"train": n - valid - test, "val": valid, "test": test}


def _thirty(n: int) -> dict[str, int]:
    return {"train": min(30, n - 1), "test": n - min(30, n - 1)}


def _spaced(names: Sequence[str]) -> list[str]:
    return [re.sub(r"[\s_/]+", " ", name).strip() for name in names]
