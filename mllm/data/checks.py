"""What is wrong with a row, told before any training: images that are missing or not shown, turns, control tokens."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffclip.base.errors import InputError
from mllm.conversation import IMAGE, QWEN_CONTROL, pair_turns, render, text_problem
from mllm.data.images import IMAGE_KEYS, ImagePlace, filled, row_images, row_places
from mllm.data.layouts import read_rows

OTHER_MEDIA = ("video", "videos", "video_path", "audio", "audios", "audio_path", "sound", "speech")
MEDIA_FILE = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|mpe?g|wav|mp3|flac|ogg|m4a)$", re.IGNORECASE
)


def examine(
    files: Sequence[str | Path],
    image_root: str | Path,
    *,
    image_prefix: str = "",
    template: str = "vicuna",
    control: Sequence[str] = QWEN_CONTROL,
) -> Iterator[tuple[str, dict, list[tuple[str, ImagePlace | None]], str]]:
    """Every row with its name, its images by name, and what is wrong with it or "".

    Arguments as in `mllm.data.rows.load_rows`.
    """
    for path in files:
        for number, row in enumerate(read_rows(path)):
            name = f"{path}: row {number} (id {row.get('id', '?')})"
            key = name.encode(errors="backslashreplace").decode()
            places: list[tuple[str, ImagePlace | None]] = []
            try:
                images = row_images(row)
                if image_prefix and not any(name.startswith(image_prefix) for name, _ in images):
                    continue
                places = row_places(row, image_root)
            except InputError as error:
                yield key, row, places, str(error)
                continue
            missing = [name for name, place in places if place is None]
            problem = media_problem(row, bool(images)) or _turn_problem(row.get("conversations"), control)
            if missing:
                problem = f"image {missing[0]} is not under {image_root}, nor in a tar there; check image_root"
            yield key, row, places, problem or _count_problem(row["conversations"], len(images), template)


def media_problem(row: dict, shows: bool) -> str:
    """Why a row would be read without what its other keys show, or ""."""
    for key, value in row.items():
        if key in (*IMAGE_KEYS, "id", "conversations", "question") or not filled(value):
            continue
        if key in OTHER_MEDIA:
            return f"has a `{key}`, which this model cannot see or hear; drop the row"
        if not shows and _is_media(value):
            return f"names an image or film in `{key}`, which is not read; call it `image`, or drop the key or the row"
    return ""


def _is_media(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        return bool(first.get("bytes") or first.get("path"))
    return isinstance(first, bytes) or (isinstance(first, str) and bool(MEDIA_FILE.search(first)) and "\n" not in first)


def _turn_problem(conversation: object, control: Sequence[str]) -> str:
    """What is wrong with a conversation, or ""."""
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        return "`conversations` is no list of turns"
    try:
        questions, answers = pair_turns(conversation)
    except ValueError as error:
        return str(error)
    if any(not answer.strip() for answer in answers):
        return "an answer is empty; drop the turn"
    return text_problem(questions, answers, control)


def _count_problem(conversation: list[dict[str, str]], images: int, template: str) -> str:
    """Why a template does not show each of a row's images once, or ""."""
    shown = sum(segment.text.count(IMAGE) for segment in render(conversation, template))
    if shown == images:
        return ""
    tags = sum(turn["value"].count(IMAGE) for turn in conversation)
    if template == "plain":
        advice = "it shows one image before each answer: use template vicuna or chatml, or drop the row"
    elif template == "vicuna" and tags == images:
        advice = "it shows one image a question: use template chatml, or ask about each in a question of its own"
    elif not images:
        advice = f"give its images in `image`, or take {IMAGE} out of the questions"
    else:
        advice = f"put one {IMAGE} into a question for each image"
    return f"has {images} images, but its conversation shows {shown} in template `{template}`; {advice}"
