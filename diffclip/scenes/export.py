"""Write the built-in world to a folder, each part beside its place and then renamed, scenes.json last; or show it."""

import os
import random
import shutil
import textwrap
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, write_json
from diffclip.base.lines import print_line
from diffclip.scenes.drawing import COLORS, SHAPES, draw, make_scene
from diffclip.scenes.options import PARTS, Options
from diffclip.scenes.parts import CLASSES, SHIFTS, WRITERS, class_scene
from diffclip.scenes.text import MMVP_CATEGORIES, caption, mmvp_pair

VERSION = 5  # raised whenever the same options give other files


def export(directory: Path, options: Options, parts: Collection[str] = PARTS) -> None:
    """Write those of the parts that are not there yet; InputError if another world is there."""
    made = {"version": VERSION, **asdict(options)}
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a folder to write the scenes to")

    record, done = directory / "scenes.json", []
    if record.exists():
        before = read_json(record)
        if differ := [k for k, v in made.items() if before["options"].get(k) != v]:
            there = ", ".join(f"{k}={before['options'].get(k)}" for k in differ)
            wanted = ", ".join(f"{k}={made[k]}" for k in differ)
            raise InputError(
                f"{record} was made with {there} but {wanted} was asked for: name another folder or delete it"
            )
        done = before["parts"]
    if not (missing := [part for part in PARTS if part in parts and part not in done]):
        print_line(f"{directory}: complete")
        return

    directory.mkdir(parents=True, exist_ok=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(TextColumn("scenes: {task.description}"), *columns) as progress:
        total = sum(scenes(options) for _, scenes in (WRITERS[part] for part in missing))
        task = progress.add_task(missing[0], total=total, rate="")
        for part in missing:
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
            WRITERS[part][0](partial, options, tick)
            progress.update(task, advance=count % 100)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
    about = {
        "options": made,
        "parts": [part for part in PARTS if part in done or part in missing],
        "shapes": list(SHAPES),
        "colors": list(COLORS),
        "classes": {what: len(names) for what, names in CLASSES.items()},
        "mmvp_categories": list(MMVP_CATEGORIES),
    }
    write_json(record, about)
    print_line(f"{directory}: wrote {', '.join(missing)}")


def show(path: Path, seed: int) -> None:
    """A contact sheet: images with a caption under each, then the shifted sets and MMVP-style pairs."""
    scenes = [make_scene(seed, "pretrain", i) for i in range(20)]
    cells = [(scene, caption(scene, random.Random(i))) for i, scene in enumerate(scenes)]
    for role in SHIFTS:
        for i in range(5):
            scene, name = class_scene(seed, "shape", f"shifts/{role}", i + 2, role)
            cells.append((scene, f"shifts/{role}: {name}"))
    for category in MMVP_CATEGORIES:
        cells += [(scene, f"{category}: {line}") for scene, line in mmvp_pair(category, seed, 0)]
    columns, cell, height, zoom = 8, 200, 216, 2
    sheet = Image.new("RGB", (columns * cell, -(-len(cells) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (scene, text) in enumerate(cells):
        left, top = k % columns * cell + 10, k // columns * height + 8
        image = Image.fromarray(draw(scene, 64)).resize((64 * zoom,) * 2, Image.Resampling.NEAREST)
        sheet.paste(image, (left + 20, top))
        pen.text((left, top + 64 * zoom + 3), textwrap.fill(text, 30), "black", font_size=11)
    sheet.save(path)
    print_line(path)
