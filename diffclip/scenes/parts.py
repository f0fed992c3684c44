"""One function for each part of an export, which writes its files in the format that everything downstream reads.

webdataset shards, image folders, LLaVA JSON, POPE JSON lines, MMVP-VLM's table and COCO instances.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffclip.base.files import json_line, write_json, write_whole
from diffclip.base.lines import csv_text
from diffclip.base.schema import POPE_SPLITS
from diffclip.scenes.drawing import COLORS, SHAPES, Scene, draw, make_scene, masks, one_object, stream_rng
from diffclip.scenes.options import Options
from diffclip.scenes.questions import align_conversation, instruct_conversation, pope_questions, simple_line, text_line
from diffclip.scenes.text import MMVP_CATEGORIES, captions, mmvp_pair

Tick = Callable[[], None]  # called after each scene

SHARD = 1000  # pairs per tar
SHIFTS = ("v2", "a", "r", "sketch")
EASY_CONVERSATIONS = 0.6  # the share, the first ones, that ask for presence alone
MIXED = 0.3  # of the conversations after that: captions, counting and all other kinds
EASY_TEXTS = 0.7  # the share of lines, the first ones, that ask for presence alone
TEMPLATES = {
    "shape": ["a {c}.", "a picture of a {c}.", "a large {c}.", "a small {c}.", "there is a {c}.", "only a {c}."],
    "color": ["a {c} shape.", "a picture of a {c} object.", "a {c} circle.", "a {c} square.", "a {c} star."],
    "shape_color": ["a {c}.", "a picture of a {c}.", "a large {c}.", "a small {c}.", "there is a {c}."],
}
CLASSES = {
    "shape": list(SHAPES),
    "color": list(COLORS),
    "shape_color": [f"{color} {shape}" for shape in SHAPES for color in COLORS],
}


def class_sets(options: Options) -> dict[str, list[str]]:
    """The classes of each classification set; captions of a simple world say nothing of colours."""
    return {what: names for what, names in CLASSES.items() if what == "shape" or not options.simple}


def png(scene: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw(scene, size)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_png(folder: Path, index: int, scene: Scene, size: int) -> str:
    """Returns the file's name."""
    name = f"{index:06d}.png"
    (folder / name).write_bytes(png(scene, size))
    return name


def _write_shards(folder: Path, count: int, sample: Callable[[int], dict[str, bytes]], tick: Tick) -> None:
    """`sample(i)` {"png": …, "txt": …} as webdataset tars with fixed times: equal options give equal bytes."""
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, count, SHARD)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as shard:
            for i in range(start, min(start + SHARD, count)):
                for extension, content in sample(i).items():
                    entry = tarfile.TarInfo(f"{i:09d}.{extension}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
                tick()


# ---------------------------------------------------------------- the scenes of each part


def pope_scene(seed: int, index: int) -> Scene:
    """At least three distinct shapes, so that every image has three positive questions."""
    return make_scene(seed, "pope", index, min_shapes=3)


def retrieval_scene(seed: int, index: int) -> Scene:
    """At least two distinct shapes: captions of single objects fit too many images."""
    return make_scene(seed, "retrieval", index, min_shapes=2)


def class_scene(seed: int, what: str, split: str, index: int, role: str = "") -> tuple[Scene, str]:
    """One object of class `index` modulo the number of classes, so that classes are balanced; its name."""
    name = CLASSES[what][index % len(CLASSES[what])]
    shape = name if what == "shape" else name.split()[1] if what == "shape_color" else ""
    color = "" if what == "shape" else name.split()[0]
    return one_object(seed, split, index, shape, color, role), name


# ---------------------------------------------------------------- one function per part


def write_pretrain(folder: Path, options: Options, tick: Tick) -> None:
    def sample(i: int) -> dict[str, bytes]:
        scene = make_scene(options.seed, "pretrain", i)
        rng = stream_rng(options.seed, "pretrain/captions", i)
        texts = captions(scene, rng, options.captions, simple=options.simple)
        about = {"key": f"{i:09d}", "caption": texts[0], "captions": texts}
        return {"png": png(scene, options.size), "txt": texts[0].encode(), "json": json.dumps(about).encode()}

    _write_shards(folder, options.pairs, sample, tick)


def write_retrieval(folder: Path, options: Options, tick: Tick) -> None:
    def sample(i: int) -> dict[str, bytes]:
        scene = retrieval_scene(options.seed, i)
        texts = captions(scene, stream_rng(options.seed, "retrieval/captions", i), 5, 1.0, options.simple)
        return {"png": png(scene, options.size), "txt": "\n".join(texts).encode()}

    _write_shards(folder, options.retrieval, sample, tick)


def _write_classes(
    folder: Path, count: int, what: str, stream: str, options: Options, tick: Tick, role: str = ""
) -> None:
    for i in range(count):
        scene, name = class_scene(options.seed, what, stream, i, role)
        (folder / name).mkdir(parents=True, exist_ok=True)  # of fewer images than classes some have none
        _write_png(folder / name, i, scene, options.size)
        tick()


def write_classification(folder: Path, options: Options, tick: Tick) -> None:
    for what, names in class_sets(options).items():
        for split in ("train", "val", "test"):
            count = getattr(options, f"class_{split}")
            _write_classes(folder / what / split, count, what, f"classification/{what}/{split}", options, tick)
        write_json(folder / what / "classnames.json", names)
        write_json(folder / what / "templates.json", TEMPLATES[what])


def write_shifts(folder: Path, options: Options, tick: Tick) -> None:
    for role in SHIFTS:
        _write_classes(folder / role, options.class_test, "shape", f"shifts/{role}", options, tick, role)


def write_llava(folder: Path, options: Options, tick: Tick) -> None:
    (folder / "images").mkdir(parents=True)
    align, instruct = [], []
    for i in range(max(options.align, options.conversations)):
        scene = make_scene(options.seed, "llava", i)
        image = _write_png(folder / "images", i, scene, options.size)
        if i < options.align:
            turns = align_conversation(scene, stream_rng(options.seed, "llava/align", i), options.simple)
            align.append({"id": f"align_{i:06d}", "image": image, "conversations": turns})
        if i < options.conversations:
            rng = stream_rng(options.seed, "llava/instruct", i)
            late = i >= EASY_CONVERSATIONS * options.conversations
            mixed = late and not options.simple and rng.random() < MIXED
            turns = instruct_conversation(scene, rng, options.rounds, any_request=mixed)
            instruct.append({"id": f"instruct_{i:06d}", "image": image, "conversations": turns})
        tick()
    write_json(folder / "align.json", align)
    write_json(folder / "instruct.json", instruct)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for i in range(options.texts):
            rng, late = stream_rng(options.seed, "text/words", i), i >= EASY_TEXTS * options.texts
            scene = make_scene(options.seed, "text", i)
            text = simple_line(scene, rng) if options.simple else text_line(scene, rng, any_request=late)
            file.write(json_line({"text": text}))
            tick()


def write_pope(folder: Path, options: Options, tick: Tick) -> None:
    (folder / "images").mkdir(parents=True)
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in POPE_SPLITS}
    for i in range(options.pope):
        scene = pope_scene(options.seed, i)
        image = _write_png(folder / "images", i, scene, options.size)
        for split, rows in splits.items():
            # the same generator for each: the positive questions are the same in all three files
            for text, label in pope_questions(scene, split, stream_rng(options.seed, "pope/questions", i)):
                rows.append({"question_id": len(rows) + 1, "image": image, "text": text, "label": label})
        tick()
    for split, rows in splits.items():
        write_whole(folder / f"scenes_pope_{split}.json", "".join(map(json_line, rows)))


def write_mmvp(folder: Path, options: Options, tick: Tick) -> None:
    rows: list[tuple[int, str, str]] = []
    for category in MMVP_CATEGORIES:
        images = folder / "MMVP VLM Images" / category
        images.mkdir(parents=True)
        for i in range(options.mmvp):
            for scene, statement in mmvp_pair(category, options.seed, i):
                rows.append((len(rows) + 1, category, statement))
                image = Image.fromarray(draw(scene, options.size))
                image.save(images / f"{len(rows)}.jpg", quality=95, subsampling=0)
            tick()
    write_whole(folder / "Questions.csv", csv_text([("Question ID", "Type", "Statement"), *rows]))


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a (height, width) bool mask: columns first, zeros first."""
    flat = np.concatenate(([False], mask.ravel(order="F"), [not mask[-1, -1]]))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate(([0], edges))).tolist()


def write_segmentation(folder: Path, options: Options, tick: Tick) -> None:
    (folder / "images").mkdir(parents=True)
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for i in range(options.segmentation):
        scene = make_scene(options.seed, "segmentation", i)
        name = _write_png(folder / "images", i, scene, options.size)
        images.append({"id": i + 1, "file_name": name, "width": options.size, "height": options.size})
        for thing, mask in zip(scene.things, masks(scene, options.size)):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": SHAPES.index(thing.shape) + 1,
                    "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [options.size, options.size], "counts": run_lengths(mask)},
                    "color": thing.color,
                }
            )
        tick()
    categories = [{"id": k + 1, "name": shape, "supercategory": "shape"} for k, shape in enumerate(SHAPES)]
    write_json(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})


# each part's writer, and of how many scenes it draws images or writes lines
WRITERS: dict[str, tuple[Callable[[Path, Options, Tick], None], Callable[[Options], int]]] = {
    "pretrain": (write_pretrain, lambda o: o.pairs),
    "retrieval": (write_retrieval, lambda o: o.retrieval),
    "classification": (
        write_classification,
        lambda o: len(class_sets(o)) * (o.class_train + o.class_val + o.class_test),
    ),
    "shifts": (write_shifts, lambda o: len(SHIFTS) * o.class_test),
    "llava": (write_llava, lambda o: max(o.align, o.conversations) + o.texts),
    "pope": (write_pope, lambda o: o.pope),
    "mmvp": (write_mmvp, lambda o: o.mmvp * len(MMVP_CATEGORIES)),
    "segmentation": (write_segmentation, lambda o: o.segmentation),
}
