"""The paper's benchmarks as one table: which sets, how they are scored, how large they are, and how to get them.

A set lies in a folder of its name below the data root or its part there (`classification/dtd`), in any form that
`diffclip.benchmarks.datasets` reads, or where torchvision puts it when its root is that folder or the data root. The
nine classification sets are those of the linear-probe and few-shot tables. `0_data.sh` fetches these and all others
in clip-benchmark's shards, whose splits are VTAB's for six of them: cifar10 and cifar100 train on 45,000 images
there, not 50,000, and caltech101, dtd, flowers and pets on other images than TensorFlow Datasets' default splits;
`torchvision_sets` is nearer to those.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffclip.base.console import print_table
from diffclip.base.lines import print_line
from diffclip.benchmarks import TORCHVISION
from diffclip.benchmarks.captioned import read_captioned
from diffclip.benchmarks.images import images_in, visible
from diffclip.benchmarks.labelled import labelled_files, read_labelled
from diffclip.benchmarks.torchvision_sets import read_torchvision
from diffclip.data.layout import SPLITS

# The probe's metric in the paper's protocol; all other sets use accuracy.
MEAN_PER_CLASS = {"aircraft", "caltech101", "flowers", "pets"}


class PaperSet(NamedTuple):
    """One set of the paper's."""

    part: str  # of a suite
    classes: int
    test: int  # images of its test split when it was published


SETS = {
    "food101": PaperSet("classification", 101, 25_250),
    "cifar10": PaperSet("classification", 10, 10_000),
    "cifar100": PaperSet("classification", 100, 10_000),
    "sun397": PaperSet("classification", 397, 21_750),
    "aircraft": PaperSet("classification", 100, 3_333),
    "dtd": PaperSet("classification", 47, 1_880),
    "pets": PaperSet("classification", 37, 3_669),
    "caltech101": PaperSet("classification", 102, 6_084),
    "flowers": PaperSet("classification", 102, 6_149),
    "imagenet": PaperSet("classification", 1000, 50_000),
    "imagenet-v2": PaperSet("shifts", 1000, 10_000),
    "imagenet-a": PaperSet("shifts", 200, 7_500),
    "imagenet-r": PaperSet("shifts", 200, 30_000),
    "imagenet-sketch": PaperSet("shifts", 1000, 50_889),
    "flickr30k": PaperSet("retrieval", 0, 1_000),
    "flickr8k": PaperSet("retrieval", 0, 1_000),
    "coco": PaperSet("retrieval", 0, 5_000),
    "mmvp": PaperSet("mmvp", 0, 270),
}


def folder_of(name: str, root: Path) -> Path | None:
    """Where a set lies, None where there is nothing of it: a download that failed may leave a hidden file."""
    folders = (root / name, root / SETS[name].part / name)
    return next((folder for folder in folders if folder.is_dir() and visible(folder.iterdir())), None)


def torchvision_root(name: str, root: Path) -> Path | None:
    """Where torchvision has unpacked the set, in a folder of its name or in `root`; None for nowhere."""
    folders = (root / name, root / SETS[name].part / name, root)
    return next((f for f in folders if name in TORCHVISION and (f / TORCHVISION[name]).is_dir()), None)


def remedy(name: str, root: Path) -> str:
    """One sentence on how to get a set."""
    other = f", or diffclip benchmark data download {name} --data_root {root}" if name in TORCHVISION else ""
    return f"{root / name} is missing: ./scripts/0_data.sh {name} --output_dir {root}{other}"


def suite(root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The suite of those sets that lie under `root`, and for each of the others how to get it."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, about in SETS.items():
        unpacked = torchvision_root(name, root)
        folder = unpacked or folder_of(name, root)
        if not folder:
            missing[f"{about.part}/{name}"] = remedy(name, root)
            continue
        where = {"folder": str(folder.relative_to(root))}
        if about.part == "classification":
            found.setdefault("classification", {})[name] = where | ({"torchvision": name} if unpacked else {})
        elif about.part == "retrieval":
            inner = folder / "test" if (folder / "test").is_dir() else folder
            found.setdefault("retrieval", {})[name] = {"path": str(inner.relative_to(root))}
        elif about.part == "mmvp":
            found["mmvp"] = where
        else:
            found.setdefault("shifts", {})[name] = where | {"of": "imagenet"}
    if "imagenet" not in found.get("classification", {}):
        for name in found.pop("shifts", {}):
            missing[f"shifts/{name}"] = f"needs imagenet for its class names: {remedy('imagenet', root)}"
    return found, missing


def check(root: Path) -> list[tuple[str, str, int, int, str]]:
    """(name, "complete", "partial" or "missing", test images found, expected, remedy) of every set."""
    rows = []
    for name, about in SETS.items():
        unpacked = torchvision_root(name, root)
        folder = folder_of(name, root)
        found = count_test(folder, about.part) if folder else 0
        count = len(read_torchvision(name, unpacked)[1]["test"]) if unpacked else found
        state = "missing" if not count else "complete" if count >= about.test else "partial"
        rows.append((name, state, count, about.test, "" if state == "complete" else remedy(name, root).split(": ")[1]))
    return rows


def count_test(folder: Path, part: str) -> int:
    """Images of a set's test split, whatever its form; 0 if there is none."""
    inner = next((folder / alias for alias in SPLITS["test"] if (folder / alias).is_dir()), folder)
    if part == "retrieval":
        return len(read_captioned(inner).images)
    files = labelled_files(folder, "test")
    return len(read_labelled(files, "test")) if files else len(images_in(inner))


def print_check(root: Path) -> None:
    """Print what is there, what is missing, and how to get it."""
    rows = [
        (name, str(SETS[name].classes or ""), reported(name), state, f"{there:,} of {expected:,}", how)
        for name, state, there, expected, how in check(root)
    ]
    columns = ("set", "classes", "scored by", "state", "test images", "how to get it")
    print_table(columns, rows, f"the paper's benchmarks in {root}")


def reported(name: str) -> str:
    """What the paper reports on a set."""
    match SETS[name].part:
        case "classification" if name != "imagenet":
            return f"linear probe: {'mean per class' if name in MEAN_PER_CLASS else 'accuracy'}; few-shot: accuracy"
        case "retrieval":
            return "R@1, 5, 10"
        case "mmvp":
            return "pairs right"
    return "top-1"


def download(names: Sequence[str], root: Path) -> None:
    """Let torchvision fetch sets into folders of their names."""
    for name in names:
        folder = torchvision_root(name, root) or root / name
        splits = read_torchvision(name, folder, download=True)[1]
        print_line(f"{name}: {', '.join(f'{len(rows):,} {split}' for split, rows in splits.items())}")
