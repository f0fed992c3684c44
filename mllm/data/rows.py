"""Rows of LLaVA's JSON, checked once and kept memory-mapped; what a user can get wrong is found before training.

    python -m mllm.data check rows.json --image_root images     # every fault, by row
    python -m mllm.data stats rows.json --image_root images --model runs/align   # answers, lengths, what is supervised

Images are opened when they are needed; they may be plain files or members of webdataset tars.
"""

import base64
import binascii
import json
import os
import re
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import parse_json, read_jsonl, read_text
from diffclip.base.paths import inside
from mllm.conversation import IMAGE, QWEN_CONTROL, pair_turns, render, text_problem

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

FORMAT = 2  # raise it when what `load_rows` keeps changes its meaning
IMAGE_KEYS = ("image", "images", "image_path")
OTHER_MEDIA = ("video", "videos", "video_path", "audio", "audios", "audio_path", "sound", "speech")
MEDIA_FILE = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|mpe?g|wav|mp3|flac|ogg|m4a)$", re.IGNORECASE
)


class Picture(NamedTuple):
    """Where an image's bytes lie: a whole file (size 0), a stretch of a tar, or the row itself (content)."""

    file: str
    offset: int = 0
    size: int = 0
    content: bytes | None = None

    def read(self) -> bytes:
        """The encoded image; OSError if it cannot be read."""
        if self.content is not None:
            return self.content
        handle = os.open(self.file, os.O_RDONLY)
        try:
            return os.pread(handle, self.size or os.fstat(handle).st_size, self.offset)
        finally:
            os.close(handle)

    def open(self, key: str = "") -> "Image.Image":
        """Decode to RGB; InputError naming the row that shows it, if given, and the file when that fails."""
        from diffclip.base.images import open_image

        return open_image(self.read, f"{key}: {self.file}" if key else self.file)


class Row(NamedTuple):
    """One conversation: where it came from, its turns, its images."""

    key: str  # "file.json: row 17 (id abc)"
    conversation: list[dict[str, str]]
    pictures: list[Picture]


class Rows(Sequence[Row]):
    """Checked rows in an Arrow file that is mapped into memory: any number of them opens at once and is shared."""

    def __init__(self, table: "Dataset", image_root: str | Path) -> None:
        self.table, self.image_root = table, os.path.abspath(image_root)
        self.without_pictures = table.select_columns(["conversation", "images"])

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.table[index]
        pictures = [
            Picture(name, content=content) if content is not None else find_pictures(self.image_root, [name])[name]
            for name, content in zip(row["images"], row["contents"])
        ]
        if None in pictures:
            gone = row["images"][pictures.index(None)]
            raise InputError(f"{row['key']}: image {gone} is no longer under {self.image_root}")
        return Row(row["key"], json.loads(row["conversation"]), pictures)

    def texts(self, indices: Sequence[int]) -> tuple[list[list[dict[str, str]]], list[int]]:
        """Conversations and numbers of images of some rows, without looking for the images."""
        some = self.without_pictures[indices]
        return [json.loads(text) for text in some["conversation"]], [len(names) for names in some["images"]]


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
    from datasets import Dataset, Features, Value, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    sources = [(str(Path(path).resolve()), _state(Path(path))) for path in files]
    settings = {
        "sources": json.dumps(sources),
        "image_root": str(Path(image_root).resolve()),
        "image_prefix": image_prefix,
        "template": template,
        "control": tuple(control),
        "version": FORMAT,
    }
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
    problems, kept = [], 0
    examined = examine(files, image_root, image_prefix=image_prefix, template=template, control=control)
    for key, row, pictures, problem in examined:
        kept += 1
        if problem:
            problems.append(f"{key}: {problem}")
            continue
        yield {
            "key": key,
            "conversation": json.dumps(row["conversations"]),
            "images": [name for name, _ in pictures],
            "contents": [picture.content for _, picture in pictures if picture],
        }
    if not kept:
        only = f" with an image path that starts with `{image_prefix}`" if image_prefix else ""
        raise InputError(f"{', '.join(files)}: no rows{only}; check the file and image_prefix")
    if problems:
        rest = f" ({len(problems) - 1} more rows have problems: python -m mllm.data check)" if len(problems) > 1 else ""
        raise InputError(problems[0] + rest)


def examine(
    files: Sequence[str | Path],
    image_root: str | Path,
    *,
    image_prefix: str = "",
    template: str = "vicuna",
    control: Sequence[str] = QWEN_CONTROL,
) -> Iterator[tuple[str, dict, list[tuple[str, Picture | None]], str]]:
    """Every row with its name, its images by name, and what is wrong with it or ""; arguments as in `load_rows`."""
    for path in files:
        for number, row in enumerate(read_json_rows(path)):
            name = f"{path}: row {number} (id {row.get('id', '?')})"
            key = name.encode(errors="backslashreplace").decode()
            pictures: list[tuple[str, Picture | None]] = []
            try:
                images = row_images(row)
                if image_prefix and not any(name.startswith(image_prefix) for name, _ in images):
                    continue
                pictures = row_places(row, image_root)
            except InputError as error:
                yield key, row, pictures, str(error)
                continue
            missing = [name for name, place in pictures if place is None]
            problem = media_problem(row, bool(images)) or _turn_problem(row.get("conversations"), control)
            if missing:
                problem = f"image {missing[0]} is not under {image_root}, nor in a tar there; check image_root"
            yield key, row, pictures, problem or _count_problem(row["conversations"], len(images), template)


def find_pictures(root: str | Path, names: Iterable[str]) -> dict[str, Picture | None]:
    """Each name's place under `root`, as a file or as a member of a tar in its folder, or None.

    Raises:
        InputError: a name is an address or leads outside `root`, several tars of the folder hold it, or a tar cannot be
            read.
    """
    places: dict[str, Picture | None] = {}
    for name in names:
        if re.match(r"\w{2,}://", name):
            raise InputError(f"image {name[:200]} is an address, which is not fetched; give the path of a copy")
        path = os.path.abspath(inside(root, name, "image"))
        if os.path.isfile(path):
            places[name] = Picture(path)
            continue
        folder, base = os.path.split(path)
        tar = path[: path.find(".tar/") + 4]
        place = tar if os.path.isfile(tar) else folder  # only where files are missing
        found = _tar_members(place, _tars_state(place)).get(base, {})
        found = {path: found[path]} if path in found else found
        if len(found) > 1:
            known = " and ".join(os.path.relpath(place, os.path.abspath(root)) for place in sorted(found)[:2])
            raise InputError(f"image {name} is in {len(found)} places, {known}; write in the row which of them it is")
        places[name] = next(iter(found.values()), None)
    return places


def read_json_rows(path: str | Path) -> Iterator[dict]:
    """Rows of a JSON array or of a file with one JSON object a line; InputError for anything else."""
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
    from datasets import load_from_disk
    from pyarrow.parquet import ParquetFile

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


def row_images(row: dict) -> list[tuple[str, bytes | None]]:
    """A row's images: (path, None), or (what to call it, the encoded image) of one that the row holds itself.

    Raises:
        InputError: more than one key holds images, or something is no image.
    """
    given = [key for key in IMAGE_KEYS if _filled(row.get(key))]
    if len(given) > 1:
        raise InputError(f"has images in `{given[0]}` and in `{given[1]}`; keep one of them")
    if not given:
        return []
    value = row[given[0]]
    return [_row_image(one, given[0]) for one in (value if isinstance(value, list) else [value])]


def row_places(row: dict, image_root: str | Path) -> list[tuple[str, Picture | None]]:
    """`row_images` with their places: in the row itself, or as `find_pictures` finds them; None where there is none."""
    return [
        (name, Picture(name, content=content) if content is not None else find_pictures(image_root, [name])[name])
        for name, content in row_images(row)
    ]


def _row_image(value: object, key: str) -> tuple[str, bytes | None]:
    name = f"image in `{key}`"
    if isinstance(value, dict):  # as `datasets` keeps images
        value, name = value.get("bytes") or value.get("path"), value.get("path") or name
    if isinstance(value, bytes):
        return name, value
    if not isinstance(value, str) or not value:
        raise InputError(
            f"`{key}` holds {str(value)[:40]}, which is no path of an image; give a path, or a list of them"
        )
    if not value.startswith("data:"):
        if len(value) > 1000 or value != value.encode(errors="ignore").decode():
            raise InputError(
                f"`{key}` holds {value[:40]!a}..., which is no path of an image; give one, or data:image/png;base64,"
            )
        return value, None
    head, _, content = value.partition(",")
    try:
        return f"{head[:40]} in `{key}`", base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"`{key}` holds a {head[:40]} that is not base64 ({error}); write it again") from None


def _filled(value: object) -> bool:
    return value is not None and value == value and value not in ("", [])  # NaN: nothing, as pandas writes it


def media_problem(row: dict, shows: bool) -> str:
    """Why a row would be read without what its other keys show, or ""."""
    for key, value in row.items():
        if key in (*IMAGE_KEYS, "id", "conversations", "question") or not _filled(value):
            continue
        if key in OTHER_MEDIA:
            return f"has a `{key}`, which this model cannot see or hear; drop the row"
        if not shows and _is_media(value):
            return f"names an image or film in `{key}`, which is not read; call it `image`, or drop the key or the row"
    return ""


def _is_media(value: object) -> bool:
    one = value[0] if isinstance(value, list) and value else value
    if isinstance(one, dict):
        return bool(one.get("bytes") or one.get("path"))
    return isinstance(one, bytes) or (isinstance(one, str) and bool(MEDIA_FILE.search(one)) and "\n" not in one)


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


def _count_problem(conversation: list[dict[str, str]], pictures: int, template: str) -> str:
    """Why a template does not show each of a row's images once, or ""."""
    shown = sum(segment.text.count(IMAGE) for segment in render(conversation, template))
    if shown == pictures:
        return ""
    tags = sum(turn["value"].count(IMAGE) for turn in conversation)
    if template == "plain":
        advice = "it shows one image before each answer: use template vicuna or chatml, or drop the row"
    elif template == "vicuna" and tags == pictures:
        advice = "it shows one image a question: use template chatml, or ask about each in a question of its own"
    elif not pictures:
        advice = f"give its images in `image`, or take {IMAGE} out of the questions"
    else:
        advice = f"put one {IMAGE} into a question for each image"
    return f"has {pictures} images, but its conversation shows {shown} in template `{template}`; {advice}"


def _tars_state(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the tars in a folder, looked at again after each five seconds."""
    return _tars_now(folder, int(time.monotonic() / 5))


@lru_cache(maxsize=256)
def _tars_now(folder: str, moment: int) -> tuple[tuple[str, int, int], ...]:
    """Of the tars in a folder, or of the one tar that the path itself is."""
    if os.path.isfile(folder):
        found = [Path(folder)]
    else:
        found = sorted(Path(folder).glob("*.tar")) if os.path.isdir(folder) else []
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found)


@lru_cache(maxsize=64)
def _tar_members(folder: str, state: tuple[tuple[str, int, int], ...]) -> dict[str, dict[str, Picture]]:
    """Members of the tars of `_tars_now` by file name, each with all its places by tar and name in it."""
    members: dict[str, dict[str, Picture]] = {}
    for path, *_ in state:
        try:
            with tarfile.open(path, "r:") as tar:  # places in a compressed one would be none
                for member in tar:
                    if member.isfile():
                        place = Picture(path, member.offset_data, member.size)
                        name = os.path.normpath(member.name)
                        members.setdefault(os.path.basename(name), {})[f"{path}/{name}"] = place
        except tarfile.TarError as error:
            raise InputError(f"{path}: not a readable tar file ({error}); download or write it again") from None
    return members


def main(argv: list[str] | None = None) -> None:
    """`check` lists every fault, `stats` says what a model would learn from the rows."""
    import argparse

    parser = argparse.ArgumentParser(
        "python -m mllm.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("check", "stats"), help="find faults, or describe the rows")
    parser.add_argument("files", nargs="+", help="LLaVA JSON, JSONL or parquet files")
    parser.add_argument("--image_root", required=True, help="folder that the rows' image paths start from")
    parser.add_argument("--image_prefix", default="", help="only rows whose image path starts with this")
    parser.add_argument("--template", default="vicuna", choices=("plain", "vicuna", "chatml"), help="prompt format")
    parser.add_argument("--model", default="", help="a run of align or instruct, to count tokens")
    parser.add_argument("--max_length", type=int, default=2048, help="longer rows are reported")
    parser.add_argument("--out", default="", help="stats: folder for lengths.png and stats.json")
    options = parser.parse_args(argv)
    from mllm.data import report as data_report

    sys.exit(data_report.check(options) if options.action == "check" else data_report.stats(options))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
