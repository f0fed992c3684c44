"""Write the built-in world to a folder, each part beside its place and then renamed, scenes.json last; or show it."""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import textwrap
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, write_json
from diffclip.base.lines import print_line
from diffclip.base.orphans import PARENT, as_parent, end_with
from diffclip.base.threads import cores
from diffclip.scenes.drawing import COLORS, SHAPES, draw, make_scene
from diffclip.scenes.options import PARTS, Options
from diffclip.scenes.parts import SHIFTS, WRITERS, Tick, class_scene, class_sets
from diffclip.scenes.text import MMVP_CATEGORIES, caption, mmvp_pair

VERSION = 5  # raised whenever the same options give other files
SEVERAL_FROM = 5_000  # scenes, from which several processes pay


def export(directory: Path, options: Options, parts: Collection[str] = PARTS) -> None:
    """Write those of the parts that are not there yet; InputError if another world is there."""
    made = {"version": VERSION, **asdict(options)}
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a folder to write the scenes to")

    record, done = directory / "scenes.json", []
    if record.exists():
        before = read_json(record)
        had = {"simple": 0, **before["options"]}  # worlds from before that option have none
        if differ := [k for k, v in made.items() if had.get(k) != v]:
            there = ", ".join(f"{k}={had.get(k)}" for k in differ)
            wanted = ", ".join(f"{k}={made[k]}" for k in differ)
            raise InputError(
                f"{record} was made with {there} but {wanted} was asked for: name another folder or delete it"
            )
        done = before["parts"]
    if not (missing := [part for part in PARTS if part in parts and part not in done]):
        print_line(f"{directory}: complete")
        return

    directory.mkdir(parents=True, exist_ok=True)
    write_parts(directory, options, missing)
    about = {
        "options": made,
        "parts": [part for part in PARTS if part in done or part in missing],
        "shapes": list(SHAPES),
        "colors": list(COLORS),
        "classes": {what: len(names) for what, names in class_sets(options).items()},
        "mmvp_categories": list(MMVP_CATEGORIES),
    }
    write_json(record, about)
    print_line(f"{directory}: wrote {', '.join(missing)}")


def write_parts(directory: Path, options: Options, parts: Sequence[str]) -> None:
    """Write parts, several at a time where they are large, with a progress bar over the scenes of all of them.

    Raises:
        InputError: the system has ended a process that wrote one.
    """
    sizes = {part: WRITERS[part][1](options) for part in parts}
    processes = min(cores(), len(parts)) if sum(sizes.values()) >= SEVERAL_FROM else 1
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    progress = Progress(TextColumn("{task.description}"), *columns)
    task = progress.add_task("scenes", total=sum(sizes.values()), rate="")

    def update(count: int) -> None:
        speed = progress.tasks[0].speed
        progress.update(task, completed=count, rate=f"{speed:.0f}/s" if speed else "")

    if processes == 1:
        written = itertools.count(1)

        def tick() -> None:
            if (count := next(written)) % 100 == 0:
                update(count)

        with progress:
            for part in parts:
                _write_part(directory, options, part, tick)
            update(next(written) - 1)
        return
    counter = multiprocessing.Value("q")
    pool = ProcessPoolExecutor(processes, initializer=_share, initargs=(counter, as_parent()[PARENT]))
    try:  # the largest first; begun before the bar, whose thread a forked process would be without
        largest = sorted(parts, key=lambda part: -sizes[part])
        writing = [pool.submit(_write_part, directory, options, part) for part in largest]
        with progress:
            while not any(future.done() and future.exception() for future in writing):
                left = wait(writing, timeout=0.2, return_when=FIRST_EXCEPTION).not_done
                update(counter.get_obj().value)  # without its lock, with which a process may have been killed
                if not left:
                    break
        for future in writing:
            if future.done():  # all, unless one has failed
                future.result()
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.kill()
        if not isinstance(error, BrokenProcessPool):
            raise
        raise InputError(
            f"a process that wrote scenes to {directory} has ended, as where memory runs out: free some, and start "
            "the same command again"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _write_part(directory: Path, options: Options, part: str, tick: Tick | None = None) -> None:
    partial, final = directory / f".{part}.partial", directory / part
    shutil.rmtree(partial, ignore_errors=True)
    WRITERS[part][0](partial, options, tick or _tick)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def _share(counter: Any, parent: str) -> None:
    """Have a process that writes parts count its scenes where all of them do, and end with the one that asked."""
    global _tick
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that asked ends this one
    end_with(parent)

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    _tick = tick


def _tick() -> None: ...


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
