"""Which of the paper's sets lie under a folder, and torchvision's download of those that it has."""

from collections.abc import Sequence
from pathlib import Path

from diffclip.base.console import print_table
from diffclip.benchmarks.captioned import read_captioned
from diffclip.benchmarks.images import images_in
from diffclip.benchmarks.labelled import labelled_files, read_labelled
from diffclip.benchmarks.paper import SETS, remedy, torchvision_root
from diffclip.benchmarks.rows import SPLITS
from diffclip.benchmarks.torchvision_sets import read_torchvision


def check(root: Path) -> list[tuple[str, str, int, int, str]]:
    """Return (name, "complete", "partial" or "missing", test images found, expected, remedy) of every set."""
    rows = []
    for name, about in SETS.items():
        unpacked = torchvision_root(name, root / name, root)
        count = len(read_torchvision(name, unpacked)[1]["test"]) if unpacked else count_test(root / name, about.part)
        state = "missing" if not count else "complete" if count >= about.test else "partial"
        rows.append((name, state, count, about.test, "" if state == "complete" else remedy(name, root).split(": ")[1]))
    return rows


def count_test(folder: Path, part: str) -> int:
    """Images of a set's test split, whatever its form; 0 if there is none."""
    if not folder.is_dir():
        return 0
    inner = next((folder / alias for alias in SPLITS["test"] if (folder / alias).is_dir()), folder)
    if part == "retrieval":
        return len(read_captioned(inner).images)
    files = labelled_files(folder, "test")
    return len(read_labelled(files, "test")) if files else len(images_in(inner))


def print_check(root: Path) -> None:
    """Print what is there, what is missing, and how to get it."""
    print_table(
        ("set", "classes", "scored by", "state", "test images", "how to get it"),
        [
            (name, str(SETS[name].classes or ""), SETS[name].metrics(name), state, f"{there:,} of {expected:,}", how)
            for name, state, there, expected, how in check(root)
        ],
        f"the paper's benchmarks in {root}",
    )


def download(names: Sequence[str], root: Path) -> None:
    """Let torchvision fetch sets into folders of their names."""
    for name in names:
        folder = torchvision_root(name, root / name, root) or root / name
        splits = read_torchvision(name, folder, download=True)[1]
        print(f"{name}: {', '.join(f'{len(rows):,} {split}' for split, rows in splits.items())}")
