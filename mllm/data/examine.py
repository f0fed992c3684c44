"""What is wrong with a row: its images, its turns, and whether a template shows what it holds."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffclip.base.errors import InputError
from diffclip.base.lines import print_line
from mllm.conversation import IMAGE, pair_turns, segments_of, system_text, template_name, text_problem
from mllm.data.files import of_split, read_rows
from mllm.data.images import ImagePlace, find_place, row_images
from mllm.data.layouts import read_conversation
from mllm.literal import turns_as_text

STRETCH, BYTES = 100, 64 << 20  # rows that are handed on at a time, and bytes of the images that they hold
OTHER_TAG = re.compile(r"^<(?:video|audio|speech|sound)>$", re.MULTILINE)  # where the row's key is another, or lost


class Examined(NamedTuple):
    """A row as `examine` found it: its name, turns, images by name, and what is wrong with it or ""."""

    key: str
    conversation: list[dict[str, str]]
    images: list[tuple[str, ImagePlace | None]]
    problem: str


def examine(
    files: Sequence[str | Path],
    image_root: str | Path,
    *,
    image_prefix: str,
    split: str,
    template: str,
    control: Sequence[str],
    share: tuple[int, int] = (0, 1),
) -> Iterator[list[Examined]]:
    """The rows of files, STRETCH of them or BYTES of images at a time, each row with what is wrong with it or "".

    Arguments as in `load_rows`. `share` (i, n): of the stretches only every nth, from the ith, whole and also where no
    row is chosen of it; rows of the others are read and passed over.
    """
    index, shares = share
    read, size, found = 0, 0, list[Examined]()
    for path in files:
        others = 0
        for number, row in enumerate(read_rows(path, split)):
            mine = read // STRETCH % shares == index
            read += 1
            if not of_split(row, split):
                others += 1
            elif mine and (one := _examined(row, path, number, image_root, image_prefix, template, control)):
                found.append(one)
                size += sum(len(place.content or b"") for _, place in one.images if place)
            if mine and (read % STRETCH == 0 or (size > BYTES and shares == 1)):
                yield found
                size, found = 0, []
        if others and index == 0:
            print_line(f"{path}: {others:,} rows of other splits than {split or 'train'} are left out", error=True)
    if found:
        yield found


def _examined(
    row: dict,
    path: str | Path,
    number: int,
    image_root: str | Path,
    image_prefix: str,
    template: str,
    control: Sequence[str],
) -> Examined | None:
    """A row with what is wrong with it; None of one that `image_prefix` does not choose."""
    name = " ".join(str(row.get("id", row.get("question_id", "?")))[:100].split())
    key = f"{path}: row {number} (id {name})".encode(errors="backslashreplace").decode()
    turns: list[dict[str, str]] = []
    places: list[tuple[str, ImagePlace | None]] = []
    try:
        turns, images = read_conversation(row)
        turns = turns_as_text(turns, control)
        if image_prefix and not any(name.startswith(image_prefix) for name, _ in images):
            return None
        places = [(name, None) for name, _ in images]  # until they are found
        places = [(name, find_place(image_root, name, content)) for name, content in images]
        problem = conversation_problem(turns, places, image_root, template, control)
    except (InputError, ValueError) as error:
        if image_prefix and not places and _outside(row, image_prefix):
            return None
        problem = str(error)
    except RecursionError:
        problem = "is nested too deep; drop the row"
    problem = " ".join(problem.encode(errors="backslashreplace").decode().split())
    return Examined(key, turns, places, problem)


def _outside(row: dict, image_prefix: str) -> bool:
    """Whether a row whose turns cannot be read is none of those that `image_prefix` chooses."""
    try:
        names = [name for name, _ in row_images(row)]
    except InputError:
        return False
    return "conversations" in row and not any(name.startswith(image_prefix) for name in names)


def conversation_problem(
    turns: list[dict[str, str]],
    places: list[tuple[str, ImagePlace | None]],
    image_root: str | Path,
    template: str,
    control: Sequence[str],
) -> str:
    """What is wrong with turns and the images that they show, or ""; ValueError where the turns are out of order."""
    if missing := [name for name, place in places if place is None]:
        return f"image {missing[0][:200]} is not under {image_root}, nor in a tar there; check image_root"
    questions, answers = pair_turns(turns)
    if tag := next(filter(None, map(OTHER_TAG.search, questions)), None):
        return f"a question shows {tag[0].strip()}, which this model cannot see or hear; drop the row"
    if any(not answer.strip() for answer in answers):
        return "an answer is empty; drop the turn"
    system = system_text(turns)
    if problem := text_problem(questions, answers, control, system):
        return problem
    shown = sum(segment.text.count(IMAGE) for segment in segments_of(questions, answers, system, template))
    return "" if shown == len(places) else _count_problem(turns, len(places), shown, template)


def _count_problem(conversation: list[dict[str, str]], images: int, shown: int, template: str) -> str:
    """Why a template does not show each of a row's images once, in words."""
    tags = sum(turn["value"].count(IMAGE) for turn in conversation)
    if template == "plain":
        advice = "it shows one image before each answer: use template vicuna or chatml, or drop the row"
    elif template == "vicuna" and tags == images:
        advice = "it shows one image a question: use template chatml, or ask about each in a question of its own"
    elif not images:
        advice = f"give its images in `image`, or take {IMAGE} out of the questions"
    else:
        advice = f"put one {IMAGE} into a question for each image"
    return f"has {images} images, but its conversation shows {shown} in template `{template_name(template)}`; {advice}"
