"""Write the built-in world to a folder: each part beside its place and then renamed, scenes.json last."""

import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, write_json
from diffclip.scenes.drawing import COLORS, SHAPES
from diffclip.scenes.options import PARTS, Options
from diffclip.scenes.parts import CLASSES, SHIFTS, WRITERS
from diffclip.scenes.text import MMVP_CATEGORIES

VERSION = 5  # raised whenever the same options give other files


def export(directory: Path, options: Options, parts: Collection[str] = PARTS) -> None:
    """Write those of the parts that are not there yet; InputError if another world is there."""
    made = {"version": VERSION, **asdict(options)}
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a folder to write the scenes to")

    record, done = directory / "scenes.json", []
    if record.exists():
        before = read_json(record)
        differ = [k for k, v in made.items() if before["options"].get(k) != v]
        if differ:
            there = ", ".join(f"{k}={before['options'].get(k)}" for k in differ)
            wanted = ", ".join(f"{k}={made[k]}" for k in differ)
            raise InputError(
                f"{record} was made with {there} but {wanted} was asked for: name another folder or delete it"
            )
        done = before["parts"]
    missing = [part for part in PARTS if part in parts and part not in done]
    if not missing:
        print(f"{directory}: complete")
        return

    directory.mkdir(parents=True, exist_ok=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(TextColumn("scenes: {task.description}"), *columns) as progress:
        task = progress.add_task(missing[0], total=sum(_steps(part, options) for part in missing), rate="")
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
            WRITERS[part](partial, options, tick)
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
    print(f"{directory}: wrote {', '.join(missing)}")


def _steps(part: str, options: Options) -> int:
    return {
        "pretrain": options.pairs,
        "retrieval": options.retrieval,
        "classification": len(CLASSES) * (options.class_train + options.class_val + options.class_test),
        "shifts": len(SHIFTS) * options.class_test,
        "llava": max(options.align, options.conversations) + options.texts,
        "pope": options.pope,
        "mmvp": options.mmvp * len(MMVP_CATEGORIES),
        "segmentation": options.segmentation,
    }[part]
