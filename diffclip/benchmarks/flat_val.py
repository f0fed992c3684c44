"""ImageNet's validation images as they are unpacked: in one folder, with their classes in a file.

Of these files any will do: LOC_val_solution.csv (Kaggle's), a list of `FILE WNID` or `FILE LABEL` a line (val.txt of
Caffe, with labels in the order of WordNet's numbers; val_annotations.txt of Tiny ImageNet), a WordNet number a line
(imagenet_2012_validation_synset_labels.txt of TensorFlow), or the authors' ILSVRC2012_validation_ground_truth.txt. The
numbers of the last follow no order of names; what they mean says meta.mat or map_clsloc.txt of the devkit.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from diffclip.base.errors import InputError
from diffclip.base.files import read_text
from diffclip.benchmarks.images import IMAGE_SUFFIXES, visible
from diffclip.benchmarks.prompts import WNID, imagenet_labels
from diffclip.data.layout import SPLITS

NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
SOLUTIONS = ("LOC_val_solution.csv", "val_annotations.txt", "val.txt", "imagenet_2012_validation_synset_labels.txt")
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
FOLDERS = (*SPLITS["val"], "ILSVRC2012_img_val", "ILSVRC/Data/CLS-LOC/val")
DEVKITS = ("", "data", "devkit/data", "ILSVRC2012_devkit_t12/data", "ILSVRC/ImageSets/CLS-LOC")


def read_flat(folder: Path) -> list[tuple[Path, str]]:
    """The images of `folder`, or of val/ in it, with their WordNet numbers; nothing for another layout.

    InputError: ImageNet's images without a file of their classes, or an image that this does not know.
    """
    for place in (folder, *(folder / name for name in FOLDERS)):
        inner = place / "images" if (place / "val_annotations.txt").is_file() else place
        if not inner.is_dir():
            continue
        images = [path for path in visible(inner.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not images or not (inner != place or NUMBER.fullmatch(images[0].stem)):
            continue
        source, wnids = _truth(place, folder)
        if missing := next((image for image in images if image.stem not in wnids), None):
            raise InputError(f"{missing}: {source} has no class for it; use the file that belongs to these images")
        return [(image, wnids[image.stem]) for image in images]
    return []


def _truth(place: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """A file of the images' classes, and the WordNet number of each image by its name without suffix."""
    homes = [home / name for home in (place, folder, place.parent) for name in DEVKITS]
    for file in (home / name for home in homes for name in SOLUTIONS):
        if file.is_file():
            return file, dict(_listed(file))
    for file in (home / TRUTH for home in homes):
        if file.is_file():
            known = next((found for home in homes if (found := _devkit(home))), {})
            if not known:
                raise InputError(f"{file}: its numbers are the devkit's own; put meta.mat or map_clsloc.txt beside it")
            return file, dict(_numbered(file, read_text(file).split(), known))
    names = ", ".join((*SOLUTIONS, TRUTH))
    raise InputError(f"{place} holds ImageNet's images without their classes: put one of {names} into {folder}")


def _listed(file: Path) -> Iterator[tuple[str, str]]:
    """(image, WordNet number) of a list; labels are ImageNet's in the order of these numbers."""
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if all(WNID.fullmatch(line.strip()) for line in lines):
        yield from _numbered(file, lines, {wnid: wnid for wnid in imagenet_labels()})
        return
    ordered = list(imagenet_labels())
    for number, line in enumerate(lines, 1):
        image, *rest = re.split(r"[\s,]+", line.strip())
        if image == "ImageId":
            continue
        label = rest[0] if rest else ""
        if label.isdecimal() and int(label) < len(ordered):
            label = ordered[int(label)]
        if not WNID.fullmatch(label):
            raise InputError(f"{file} line {number}: {line[:60]!r} is not an image and its class")
        yield Path(image).name.split(".")[0], label


def _numbered(file: Path, lines: list[str], known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The classes of a file that has one a line, for image 1, 2, ..."""
    for number, label in enumerate(lines, 1):
        if label.strip() not in known:
            raise InputError(f"{file} line {number}: {label[:40]!r} is none of ImageNet's classes")
        yield f"ILSVRC2012_val_{number:08d}", known[label.strip()]


def _devkit(home: Path) -> dict[str, str]:
    """The WordNet number of each of the devkit's own, 1 to 1000; nothing where the devkit is not."""
    if (file := home / "map_clsloc.txt").is_file():
        return {number: wnid for wnid, number, *_ in map(str.split, read_text(file).splitlines())}
    if not (file := home / "meta.mat").is_file():
        return {}
    import scipy.io  # slow to import

    try:
        synsets = scipy.io.loadmat(file, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    except Exception as error:  # scipy raises whatever its readers do
        raise InputError(f"{file}: is not the devkit's ({type(error).__name__}): take it from there again") from None
