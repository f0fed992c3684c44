"""Write the built-in world as the formats that everything downstream reads, and nothing else.

webdataset shards, image folders, LLaVA JSON, POPE JSON lines, MMVP-VLM's table and COCO instances. Each part
is written beside its place and renamed, and scenes.json comes last.
"""

import csv
import io
import json
import os
import shutil
import tarfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffclip.base.errors import InputError
from diffclip.scenes import drawing as scenes
from diffclip.scenes import questions as scenes_questions
from diffclip.scenes import text as scenes_text
from diffclip.scenes.drawing import COLORS, SHAPES, Scene, make_scene, one_object, stream_rng

VERSION = 5  # raised whenever the same options give other files
SHARD = 1000  # pairs per tar
SHIFTS = ("v2", "a", "r", "sketch")
POPE_WAYS = ("random", "popular", "adversarial")
EASY_CONVERSATIONS = 0.6  # the share, the first ones, that ask for presence alone
MIXED = 0.3  # of the conversations after that: captions, counting and all other kinds
EASY_TEXTS = 0.7  # the share of lines, the first ones, that ask for presence alone
TEMPLATES = {
    "shape": [
        "a {c}.",
        "a picture of a {c}.",
        "a large {c}.",
        "a small {c}.",
        "there is a {c}.",
        "only a {c}.",
    ],
    "color": ["a {c} shape.", "a picture of a {c} object.", "a {c} circle.", "a {c} square.", "a {c} star."],
    "shape_color": ["a {c}.", "a picture of a {c}.", "a large {c}.", "a small {c}.", "there is a {c}."],
}
CLASSES = {
    "shape": list(SHAPES),
    "color": list(COLORS),
    "shape_color": [f"{color} {shape}" for shape in SHAPES for color in COLORS],
}


def png(scene: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scenes.draw(scene, size)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_shards(folder: Path, samples: Iterator[dict[str, bytes]]) -> None:
    """Samples {"png": …, "txt": …} as webdataset tars with fixed times: equal options give equal bytes."""
    folder.mkdir(parents=True)
    shard: tarfile.TarFile | None = None
    for i, sample in enumerate(samples):
        if i % SHARD == 0:
            if shard:
                shard.close()
            shard = tarfile.open(folder / f"{i // SHARD:05d}.tar", "w")  # noqa: SIM115
        for extension, content in sample.items():
            entry = tarfile.TarInfo(f"{i:09d}.{extension}")
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    if shard:
        shard.close()


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

Tick = Callable[[], None]


def write_pretrain(folder: Path, o: Namespace, tick: Tick) -> None:
    def samples() -> Iterator[dict[str, bytes]]:
        for i in range(o.pairs):
            scene = make_scene(o.seed, "pretrain", i)
            texts = scenes_text.captions(scene, stream_rng(o.seed, "pretrain/captions", i), o.captions)
            about = {"key": f"{i:09d}", "caption": texts[0], "captions": texts}
            yield {"png": png(scene, o.size), "txt": texts[0].encode(), "json": json.dumps(about).encode()}
            tick()

    _write_shards(folder, samples())


def write_retrieval(folder: Path, o: Namespace, tick: Tick) -> None:
    def samples() -> Iterator[dict[str, bytes]]:
        for i in range(o.retrieval):
            scene = retrieval_scene(o.seed, i)
            texts = scenes_text.captions(scene, stream_rng(o.seed, "retrieval/captions", i), 5, detail=1.0)
            yield {"png": png(scene, o.size), "txt": "\n".join(texts).encode()}
            tick()

    _write_shards(folder, samples())


def _write_classes(folder: Path, count: int, what: str, stream: str, o: Namespace, tick: Tick, role: str = "") -> None:
    for name in CLASSES[what]:
        (folder / name).mkdir(parents=True)
    for i in range(count):
        scene, name = class_scene(o.seed, what, stream, i, role)
        (folder / name / f"{i:06d}.png").write_bytes(png(scene, o.size))
        tick()


def write_classification(folder: Path, o: Namespace, tick: Tick) -> None:
    for what, names in CLASSES.items():
        for split in ("train", "val", "test"):
            count = getattr(o, f"class_{split}")
            _write_classes(folder / what / split, count, what, f"classification/{what}/{split}", o, tick)
        _dump(folder / what / "classnames.json", names)
        _dump(folder / what / "templates.json", TEMPLATES[what])


def write_shifts(folder: Path, o: Namespace, tick: Tick) -> None:
    for role in SHIFTS:
        _write_classes(folder / role, o.class_test, "shape", f"shifts/{role}", o, tick, role)


def write_llava(folder: Path, o: Namespace, tick: Tick) -> None:
    (folder / "images").mkdir(parents=True)
    align, instruct = [], []
    for i in range(max(o.align, o.conversations)):
        scene, image = make_scene(o.seed, "llava", i), f"{i:06d}.png"
        (folder / "images" / image).write_bytes(png(scene, o.size))
        if i < o.align:
            turns = scenes_questions.align_conversation(scene, stream_rng(o.seed, "llava/align", i))
            align.append({"id": f"align_{i:06d}", "image": image, "conversations": turns})
        if i < o.conversations:
            rng = stream_rng(o.seed, "llava/instruct", i)
            mixed = i >= EASY_CONVERSATIONS * o.conversations and rng.random() < MIXED
            turns = scenes_questions.instruct_conversation(scene, rng, o.rounds, any_request=mixed)
            instruct.append({"id": f"instruct_{i:06d}", "image": image, "conversations": turns})
        tick()
    _dump(folder / "align.json", align)
    _dump(folder / "instruct.json", instruct)
    with open(folder / "text.jsonl", "w") as file:
        for i in range(o.texts):
            rng, late = stream_rng(o.seed, "text/words", i), i >= EASY_TEXTS * o.texts
            text = scenes_questions.text_line(make_scene(o.seed, "text", i), rng, any_request=late)
            file.write(json.dumps({"text": text}) + "\n")
            tick()


def write_pope(folder: Path, o: Namespace, tick: Tick) -> None:
    (folder / "images").mkdir(parents=True)
    rows: dict[str, list[dict]] = {way: [] for way in POPE_WAYS}
    for i in range(o.pope):
        scene, image = pope_scene(o.seed, i), f"{i:06d}.png"
        (folder / "images" / image).write_bytes(png(scene, o.size))
        for way in POPE_WAYS:
            # the same generator for each way: the positive questions are the same in all three files
            for text, label in scenes_questions.pope_questions(scene, way, stream_rng(o.seed, "pope/questions", i)):
                row = {"question_id": len(rows[way]) + 1, "image": image, "text": text, "label": label}
                rows[way].append(row)
        tick()
    for way in POPE_WAYS:
        lines = "".join(json.dumps(row) + "\n" for row in rows[way])
        (folder / f"scenes_pope_{way}.json").write_text(lines)


def write_mmvp(folder: Path, o: Namespace, tick: Tick) -> None:
    rows, question = [], 0
    for category in scenes_text.MMVP_CATEGORIES:
        images = folder / "MMVP VLM Images" / category
        images.mkdir(parents=True)
        for i in range(o.mmvp):
            for scene, statement in scenes_text.mmvp_pair(category, o.seed, i):
                question += 1
                picture = Image.fromarray(scenes.draw(scene, o.size))
                picture.save(images / f"{question}.jpg", quality=95, subsampling=0)
                rows.append((question, category, statement))
            tick()
    with open(folder / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a (height, width) bool mask: columns first, zeros first."""
    flat = np.concatenate(([False], mask.ravel(order="F"), [not mask[-1, -1]]))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate(([0], edges))).tolist()


def write_segmentation(folder: Path, o: Namespace, tick: Tick) -> None:
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(o.segmentation):
        scene, name = make_scene(o.seed, "segmentation", i), f"{i:06d}.png"
        (folder / "images" / name).write_bytes(png(scene, o.size))
        images.append({"id": i + 1, "file_name": name, "width": o.size, "height": o.size})
        for thing, mask in zip(scene.things, scenes.masks(scene, o.size)):
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
                    "segmentation": {"size": [o.size, o.size], "counts": run_lengths(mask)},
                    "color": thing.color,
                }
            )
        tick()
    categories = [{"id": k + 1, "name": shape, "supercategory": "shape"} for k, shape in enumerate(SHAPES)]
    _dump(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})


PARTS: dict[str, Callable[[Path, Namespace, Tick], None]] = {
    "pretrain": write_pretrain,
    "retrieval": write_retrieval,
    "classification": write_classification,
    "shifts": write_shifts,
    "llava": write_llava,
    "pope": write_pope,
    "mmvp": write_mmvp,
    "segmentation": write_segmentation,
}


def _steps(part: str, o: Namespace) -> int:
    return {
        "pretrain": o.pairs,
        "retrieval": o.retrieval,
        "classification": len(CLASSES) * (o.class_train + o.class_val + o.class_test),
        "shifts": len(SHIFTS) * o.class_test,
        "llava": max(o.align, o.conversations) + o.texts,
        "pope": o.pope,
        "mmvp": o.mmvp * len(scenes_text.MMVP_CATEGORIES),
        "segmentation": o.segmentation,
    }[part]


def _dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------- commands

COUNTS = {
    "pairs": (20000, "image-text pairs in pretrain/"),
    "captions": (5, "captions per pair"),
    "retrieval": (1000, "images in retrieval/"),
    "class_train": (800, "training images of each classification set"),
    "class_val": (200, "validation images of each classification set"),
    "class_test": (800, "test images of each classification set and of each shifted set"),
    "align": (8000, "caption conversations in llava/align.json"),
    "conversations": (6000, "conversations in llava/instruct.json, on the first images of align.json"),
    "rounds": (6, "questions per conversation"),
    "texts": (20000, "lines in llava/text.jsonl"),
    "pope": (300, "images in pope/, six questions each in each of the three files"),
    "mmvp": (15, "pairs per category in mmvp/"),
    "segmentation": (300, "images in segmentation/"),
}


def export(directory: Path, options: Namespace) -> None:
    """Write the parts named in options.only (all by default); InputError if another world is there."""
    made = {"version": VERSION, "seed": options.seed, "size": options.size}
    made |= {name: getattr(options, name) for name in COUNTS}
    for name, value in made.items():
        if value < (32 if name == "size" else 0 if name == "seed" else 1):
            raise InputError(f"--{name} {value} is too small: give a larger number")
    if options.rounds > 20:
        raise InputError(f"--rounds {options.rounds} is too large: there are not that many questions, give at most 20")
    asked = options.only.split(",") if options.only else list(PARTS)
    if unknown := [part for part in asked if part not in PARTS]:
        raise InputError(f"--only {','.join(unknown)} is not a part of the export: choose from {', '.join(PARTS)}")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a folder to write the scenes to")

    record, done = directory / "scenes.json", []
    if record.exists():
        before = json.loads(record.read_text())
        differ = [k for k, v in made.items() if before["options"].get(k) != v]
        if differ:
            there = ", ".join(f"{k}={before['options'].get(k)}" for k in differ)
            wanted = ", ".join(f"{k}={made[k]}" for k in differ)
            raise InputError(
                f"{record} was made with {there} but {wanted} was asked for: name another folder or delete it"
            )
        done = before["parts"]
    parts = [part for part in PARTS if part in asked and part not in done]
    if not parts:
        print(f"{directory}: complete")
        return

    directory.mkdir(parents=True, exist_ok=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(TextColumn("scenes: {task.description}"), *columns) as progress:
        task = progress.add_task(parts[0], total=sum(_steps(part, options) for part in parts), rate="")
        for part in parts:
            progress.update(task, description=part)
            count = 0

            def tick() -> None:
                nonlocal count
                count += 1
                if count % 100 == 0:
                    speed = progress.tasks[0].speed
                    progress.update(task, advance=100, rate=f"{speed:.0f}/s" if speed else "")

            partial, final = directory / f".{part}.partial", directory / part
            shutil.rmtree(partial, ignore_errors=True)
            PARTS[part](partial, options, tick)
            progress.update(task, advance=count % 100)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
    about = {
        "options": made,
        "parts": [part for part in PARTS if part in done or part in parts],
        "shapes": list(SHAPES),
        "colors": list(COLORS),
        "classes": {what: len(names) for what, names in CLASSES.items()},
        "mmvp_categories": list(scenes_text.MMVP_CATEGORIES),
    }
    temporary = directory / ".scenes.json.partial"
    _dump(temporary, about)
    os.replace(temporary, record)
    print(f"{directory}: wrote {', '.join(parts)}")
