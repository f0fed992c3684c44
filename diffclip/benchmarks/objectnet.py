"""ObjectNet (Barbu et al. 2019) as it is unpacked: images/CLASS/*.png with a red border, and mappings/ of the classes.

As usual (wise-ft, clip-benchmark), the 113 of its 313 classes are scored that are ImageNet's too, by their names in
small letters; the border is cut off.
"""

from pathlib import Path

from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from diffclip.benchmarks.images import Images, images_in

BORDER = 2  # pixels on each side
NAMES, OVERLAP = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"


def read_objectnet(folder: Path, notes: list[str]) -> tuple[list[str], Images] | None:
    """The prompt names and the images of the classes that ImageNet has too, in order; None for another layout.

    InputError: mappings that are not ObjectNet's, or a class without images.
    """
    homes = (folder, folder / "objectnet-1.0")
    mappings = next((m for home in homes for m in (home / "mappings", home) if (m / NAMES).is_file()), None)
    pictures = next((home / "images" for home in homes if (home / "images").is_dir()), None)
    if mappings is None or pictures is None:
        return None
    names, overlap = read_json(mappings / NAMES), read_json(mappings / OVERLAP)
    if not isinstance(names, dict) or not isinstance(overlap, dict):
        raise InputError(f"{mappings}: {NAMES} and {OVERLAP} need to be JSON objects: take them from ObjectNet again")
    classes = sorted(name for name, label in names.items() if label in overlap)
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        if not (images := images_in(pictures / name)):
            raise InputError(f"{pictures / name} holds no images, but {mappings / NAMES} lists the class")
        files += images
        labels += [number] * len(images)
    if not files:
        raise InputError(f"{mappings / OVERLAP} has none of the classes in {NAMES}: take both from ObjectNet again")
    notes.append(f"{len(classes)} of ObjectNet's {len(names)} classes are ImageNet's, and only these compete")
    return [str(names[name]).lower() for name in classes], Images(
        [str(file) for file in files], files, labels, border=BORDER
    )
