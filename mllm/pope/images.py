"""The images of POPE's questions: files below a folder, in COCO's names or others, or members of a parquet layout."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffclip.base import parquet
from diffclip.base.errors import InputError
from diffclip.base.files import write_whole
from diffclip.base.paths import inside
from mllm.data.images import ImagePlace, find_place
from mllm.pope.questions import Question, parquets

COCO_NAME = re.compile(r"COCO_(?:val|train)2014_(\d{12})$")
COCO_FOLDERS = ("", "val2014", "images", "val2017", "train2017", "train2014")


def find_images(questions: Sequence[Question], image_root: str | Path) -> dict[str, ImagePlace]:
    """Where the images that `questions` show lie: a `mllm.data.images.ImagePlace` for each name.

    COCO's names of 2014 and of 2017 stand for the same image, and its usual folders may lie under `image_root`.

    Raises:
        InputError: a name that leads outside `image_root`, or images that are not there, with the first of them.
    """
    places: dict[str, ImagePlace | None] = {}
    shown = {q.shown: q for q in questions if q.shown}
    for name in sorted(shown):
        inside(image_root, name, f"POPE, {shown[name].split} question {shown[name].question_id}: image")
        stem = os.path.splitext(name)[0]
        coco = COCO_NAME.search(stem)
        names = [name, f"{stem}.jpg", *([f"{coco[1]}.jpg"] if coco else [])]
        files = (os.path.join(image_root, folder, one) for folder in COCO_FOLDERS for one in names)
        file = next(filter(os.path.isfile, files), None)
        places[name] = ImagePlace(file) if file else find_place(image_root, name)
    if missing := [name for name, place in places.items() if place is None]:
        raise InputError(f"{len(missing)} images of POPE are not under {image_root}, e.g. {missing[0]}")
    return {name: place for name, place in places.items() if place}


def images_of(
    questions: Sequence[Question], path: str | Path, image_root: str | Path | None, unpack_to: str | Path
) -> dict[str, ImagePlace]:
    """`find_images` under `image_root` or, without it, among those that the files in `path` carry, put in `unpack_to`.

    Raises:
        InputError: there is neither, or an image is missing.
    """
    if not image_root and not parquets(Path(path)):
        raise InputError("--image_root is missing: the folder of POPE's images (val2014 for COCO)")
    return find_images(questions, image_root or unpack_images(path, unpack_to))


def unpack_images(path: str | Path, folder: str | Path) -> Path:
    """Write the images that a parquet layout carries as files, each once; returns `folder`.

    Raises:
        InputError: a row has no image, or a name that leads outside `folder`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = set()
    for table in parquets(Path(path)):
        for number, row in enumerate(parquet.rows(table, ["image_source", "image"])):
            where, name, image = f"{table}: row {number}", row["image_source"], row.get("image")
            inside(folder, name, f"{where}: image_source")
            file = inside(folder, f"{os.path.splitext(name)[0]}.jpg", f"{where}: image_source", writing=True)
            if file in done:
                continue
            done.add(file)
            content = image.get("bytes") if isinstance(image, Mapping) else image
            if not isinstance(content, bytes):
                raise InputError(f"{where}: carries no image; use a copy that does, or files and --image_root")
            if not file.is_file() or file.read_bytes() != content:  # perhaps of another set, of equal names
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, content)
    return folder
