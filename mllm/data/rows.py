"""Rows of LLaVA's JSON: read in any layout, checked once, and kept memory-mapped.

What a user can get wrong is told before any training: missing images, turns, control tokens.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from datasets import Dataset, Features, Value, disable_progress_bars, enable_progress_bars, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow.parquet import ParquetFile

from diffclip.base.errors import InputError
from diffclip.base.files import parse_json, read_jsonl, read_text
from mllm.conversation import IMAGE, QWEN_CONTROL, pair_turns, render, text_problem
from mllm.data.images import IMAGE_KEYS, ImagePlace, filled, find_place, row_images, row_places

FORMAT = 2  # raise it when what `load_rows` keeps changes its meaning
OTHER_MEDIA = ("video", "videos", "video_path", "audio", "audios", "audio_path", "sound", "speech")
MEDIA_FILE = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|mpe?g|wav|mp3|flac|ogg|m4a)$", re.IGNORECASE
)


class Row(NamedTuple):
    """One conversation: where it came from, its turns, its images."""

    key: str  # "file.json: row 17 (id abc)"
    conversation: list[dict[str, str]]
    images: list[ImagePlace]


class Rows(Sequence[Row]):
    """Checked rows in an Arrow file that is mapped into memory: any number of them opens at once and is shared."""

    def __init__(self, table: Dataset, image_root: str | Path) -> None:
        self.table, self.image_root = table, os.path.abspath(image_root)
        self._texts = table.select_columns(["conversation", "images"])

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = self.table[index]
        images = []
        for name, content in zip(row["images"], row["contents"]):
            place = find_place(self.image_root, name, content)
            if place is None:
                raise InputError(f"{row['key']}: image {name} is no longer under {self.image_root}")
            images.append(place)
        return Row(row["key"], json.loads(row["conversation"]), images)

    def texts(self) -> Iterator[tuple[list[list[dict[str, str]]], list[int]]]:
        """Conversations and numbers of images of all rows, 4096 at a time, without looking for the images."""
        for rows in self._texts.iter(4096):
            yield [json.loads(text) for text in rows["conversation"]], [len(names) for names in rows["images"]]


def load_rows(
    files: Sequence[str | Path],
    image_root: str | Path,
    *,
    image_prefix: str = "",
    template: str = "vicuna",
    control: Sequence[str] = QWEN_CONTROL,
) -> Rows:
    """Read rows `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}` and check them all.

    What was checked is kept in the cache folder of `datasets`, so the same files open in a moment the next time, and
    in every other process. Images that rows hold themselves are kept there too.

    Args:
        files: JSON arrays, JSONL, parquet, or folders of `datasets.save_to_disk`; several make a mixture, in order.
        image_root: folder that the rows' `image` paths start from. A path that is no file there is looked for
            in the tars of its folder: `shots/train/7.jpg` as member `7.jpg` of a tar in `shots/train/`; where several
            hold one, the row names it: `shots/train/00000.tar/7.jpg`. `images` and `image_path` are read like `image`,
            and hold paths, `data:` URIs or encoded images (`datasets`' {"bytes", "path"}), one or a list.
        image_prefix: keep only rows whose image path starts with this; "coco/" is LLaVA-665K's COCO subset.
        template: the conversation format that the rows are to be written in, which decides how many images show.
        control: tokens that no text may contain, from `mllm.conversation.control_tokens`.

    Raises:
        InputError: unreadable file, missing image, video or sound, turns out of order, empty answer, control tokens
            in a text, more or fewer images than the conversation shows; names the row.
    """
    sources = [(str(Path(path).resolve()), _state(Path(path))) for path in files]
    settings = {"sources": json.dumps(sources), "image_root": str(Path(image_root).resolve()), "version": FORMAT}
    settings |= {"image_prefix": image_prefix, "template": template, "control": tuple(control)}
    texts = {"key": Value("string"), "conversation": Value("string")}
    features = Features({**texts, "images": [Value("string")], "contents": [Value("large_binary")]})
    disable_progress_bars()
    try:
        table = Dataset.from_generator(_checked_rows, features=features, gen_kwargs=settings, writer_batch_size=100)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise (InputError(str(cause)) if isinstance(cause, InputError) else cause) from None
    finally:
        enable_progress_bars()
    return Rows(table, image_root)


def _state(path: Path) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file is written, or any in a folder."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a LLaVA JSON or JSONL file")
    files = [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]
    stats = ((str(file.relative_to(path)), file.stat()) for file in files)
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]


def _checked_rows(
    sources: str, image_root: str, image_prefix: str, template: str, control: tuple[str, ...], version: int
) -> Iterator[dict]:
    """What `load_rows` keeps; raises InputError at the end if any row has a fault."""
    files = [path for path, _ in json.loads(sources)]
    problems, count = [], 0
    examined = examine(files, image_root, image_prefix=image_prefix, template=template, control=control)
    for key, row, places, problem in examined:
        count += 1
        if problem:
            problems.append(f"{key}: {problem}")
            continue
        yield {
            "key": key,
            "conversation": json.dumps(row["conversations"]),
            "images": [name for name, _ in places],
            "contents": [place.content for _, place in places if place],
        }
    if not count:
        only = f" with an image path that starts with `{image_prefix}`" if image_prefix else ""
        raise InputError(f"{', '.join(files)}: no rows{only}; check the file and image_prefix")
    if problems:
        rest = f" ({len(problems) - 1} more rows have problems: diffclip check)" if len(problems) > 1 else ""
        raise InputError(problems[0] + rest)


def examine(
    files: Sequence[str | Path],
    image_root: str | Path,
    *,
    image_prefix: str = "",
    template: str = "vicuna",
    control: Sequence[str] = QWEN_CONTROL,
) -> Iterator[tuple[str, dict, list[tuple[str, ImagePlace | None]], str]]:
    """Every row with its name, its images by name, and what is wrong with it or ""; arguments as in `load_rows`."""
    for path in files:
        for number, row in enumerate(read_rows(path)):
            key = f"{path}: row {number} (id {row.get('id', '?')})".encode(errors="backslashreplace").decode()
            try:
                if image_prefix and not any(name.startswith(image_prefix) for name, _ in row_images(row)):
                    continue
                places = row_places(row, image_root)
            except InputError as error:
                yield key, row, [], str(error)
                continue
            if missing := [name for name, place in places if place is None]:
                problem = f"image {missing[0]} is not under {image_root}, nor in a tar there; check image_root"
            else:
                problem = media_problem(row, bool(places)) or _turn_problem(row.get("conversations"), control)
            yield key, row, places, problem or _count_problem(row["conversations"], len(places), template)


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


def read_rows(path: str | Path) -> Iterator[dict]:
    """The rows of a file or folder, one at a time; InputError for what holds none."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        yield from _table_rows(path)
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a LLaVA JSON or JSONL file")
    with open(path, "rb") as f:
        head = f.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    rows = parse_json(read_text(path), str(path)) if head == b"[" else (row for _, row in read_jsonl(path))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is no JSON object; expected id, image and conversations")
        yield row


def _table_rows(path: Path) -> Iterator[dict]:
    """Rows of a parquet file or a `datasets` folder, images in them still encoded."""
    try:
        if path.is_dir():
            table = load_from_disk(str(path)).with_format("arrow")
            names, batches = table.column_names, table.iter(64)
        else:
            file = ParquetFile(path)
            names, batches = file.schema_arrow.names, file.iter_batches(64)
        for batch in batches if "conversations" in names else ():
            yield from batch.to_pylist()
    except Exception as error:
        # any of a dozen kinds, by what is broken
        raise InputError(f"{path}: cannot be read as a `datasets` folder or parquet file ({error})") from error
    if "conversations" not in names:
        raise InputError(f"{path}: has no column conversations; LLaVA's rows have id, image and conversations")
