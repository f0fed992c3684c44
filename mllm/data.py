"""Rows of LLaVA's JSON, checked once and kept memory-mapped; what a user can get wrong is found before training.

    python -m mllm.data check rows.json --image_root images     # every fault, by row
    python -m mllm.data stats rows.json --image_root images --model runs/align   # answers, lengths, what is supervised

Pictures are opened when they are needed; they may be plain files or members of webdataset tars.
"""

import json
import os
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

from diffclip.base.paths import inside
from diffclip.errors import InputError, exit_on_input_error
from mllm.conversation import IMAGE, pair_turns, render

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

FORMAT = 1  # raise it when what `load_rows` keeps changes its meaning


class Picture(NamedTuple):
    """Where a picture's bytes lie: a whole file (size 0) or a stretch of a tar."""

    file: str
    offset: int = 0
    size: int = 0

    def read(self) -> bytes:
        """The encoded picture; OSError if it cannot be read."""
        handle = os.open(self.file, os.O_RDONLY)
        try:
            return os.pread(handle, self.size or os.fstat(handle).st_size, self.offset)
        finally:
            os.close(handle)

    def open(self, key: str = "") -> "Image.Image":
        """Decode to RGB; InputError naming the row that shows it, if given, and the file when that fails."""
        from diffclip.pictures import open_picture

        return open_picture(self.read, f"{key}: {self.file}" if key else self.file)


class Row(NamedTuple):
    """One conversation: where it came from, its turns, its pictures."""

    key: str  # "file.json: row 17 (id abc)"
    conversation: list[dict[str, str]]
    pictures: list[Picture]


class Rows(Sequence[Row]):
    """Checked rows in an Arrow file that is mapped into memory: any number of them opens at once and is shared."""

    def __init__(self, table: "Dataset", image_root: str | Path) -> None:
        self.table, self.image_root = table, str(image_root)

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
        places = find_pictures(self.image_root, row["images"])
        gone = [name for name, place in places.items() if place is None]
        if gone:
            raise InputError(f"{row['key']}: picture {gone[0]} is no longer under {self.image_root}")
        return Row(row["key"], json.loads(row["conversation"]), [places[name] for name in row["images"]])

    def texts(self, indices: Sequence[int]) -> tuple[list[list[dict[str, str]]], list[int]]:
        """Conversations and numbers of pictures of some rows, without looking for the pictures."""
        some = self.table[indices]
        return [json.loads(text) for text in some["conversation"]], [len(names) for names in some["images"]]


def load_rows(
    files: Sequence[str | Path], image_root: str | Path, *, image_prefix: str = "", template: str = "vicuna"
) -> Rows:
    """Read rows `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}` and check them all.

    What was checked is kept in the cache folder of `datasets`, so the same files open in a moment the next time, and
    in every other process.

    Args:
        files: JSON arrays, JSONL, parquet, or folders of `datasets.save_to_disk`; several make a mixture, in order.
        image_root: folder that the rows' `image` paths start from. A path that is no file there is looked for
            in the tars of its folder: `shots/train/7.jpg` as member `7.jpg` of a tar in `shots/train/`.
        image_prefix: keep only rows whose image path starts with this; "coco/" is LLaVA-665K's COCO subset.
        template: the conversation format that the rows are to be written in, which decides how many pictures show.

    Raises:
        InputError: unreadable file, missing picture, turns out of order, empty answer, more or fewer pictures than the
            conversation shows; names the row.
    """
    from datasets import Dataset, Features, Value, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetGenerationError

    sources = [(str(path), _state(Path(path))) for path in files]
    settings = {"sources": json.dumps(sources), "image_root": str(image_root), "image_prefix": image_prefix}
    features = Features({"key": Value("string"), "conversation": Value("string"), "images": [Value("string")]})
    disable_progress_bars()
    try:
        table = Dataset.from_generator(
            _checked_rows, features=features, gen_kwargs={**settings, "template": template, "version": FORMAT}
        )
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise (InputError(str(cause)) if isinstance(cause, InputError) else cause) from None
    finally:
        enable_progress_bars()
    return Rows(table, image_root)


def _state(path: Path) -> tuple[int, int]:
    if not path.exists():
        raise InputError(f"{path}: no such file; give a LLaVA JSON or JSONL file")
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _checked_rows(sources: str, image_root: str, image_prefix: str, template: str, version: int) -> Iterator[dict]:
    """What `load_rows` keeps; raises InputError at the end if any row has a fault."""
    files = [path for path, _ in json.loads(sources)]
    problems, kept = [], 0
    for key, row, _, problem in examine(files, image_root, image_prefix=image_prefix, template=template):
        kept += 1
        if problem:
            problems.append(f"{key}: {problem}")
        else:
            yield {"key": key, "conversation": json.dumps(row["conversations"]), "images": image_names(row)}
    if not kept:
        only = f" with an image path that starts with `{image_prefix}`" if image_prefix else ""
        raise InputError(f"{', '.join(files)}: no rows{only}; check the file and image_prefix")
    if problems:
        rest = f" ({len(problems) - 1} more rows have problems: python -m mllm.data check)" if len(problems) > 1 else ""
        raise InputError(problems[0] + rest)


def examine(
    files: Sequence[str | Path], image_root: str | Path, *, image_prefix: str = "", template: str = "vicuna"
) -> Iterator[tuple[str, dict, dict[str, Picture | None], str]]:
    """Every row with its name, its pictures' places, and what is wrong with it or ""; arguments as in `load_rows`."""
    for path in files:
        for number, row in enumerate(read_json_rows(path)):
            names = image_names(row)
            if image_prefix and not any(name.startswith(image_prefix) for name in names):
                continue
            places = find_pictures(image_root, names)
            missing = [name for name in names if places[name] is None]
            problem = _turn_problem(row.get("conversations"))
            if missing:
                problem = f"picture {missing[0]} is not under {image_root}, nor in a tar there; check image_root"
            if not problem:
                shown = sum(segment.text.count(IMAGE) for segment in render(row["conversations"], template))
                if shown != len(names):
                    problem = (
                        f"has {len(names)} pictures, but its conversation shows {shown} in template `{template}`; "
                        f"put one {IMAGE} into a question for each picture"
                    )
            yield f"{path}: row {number} (id {row.get('id', '?')})", row, places, problem


def find_pictures(root: str | Path, names: Iterable[str]) -> dict[str, Picture | None]:
    """Each name's place under `root`, as a file or as a member of a tar in its folder, or None.

    Raises:
        InputError: a name that leads outside `root`.
    """
    places: dict[str, Picture | None] = {}
    for name in names:
        path = str(inside(root, name, "picture"))
        if os.path.isfile(path):
            places[name] = Picture(path)
            continue
        folder, base = os.path.split(path)
        places[name] = _tar_members(Path(folder), _tars_state(folder)).get(base)  # only where files are missing
    return places


def read_json_rows(path: str | Path) -> Iterator[dict]:
    """Rows of a JSON array or of a file with one JSON object a line; InputError for anything else."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        yield from _table_rows(path)
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a LLaVA JSON or JSONL file")
    with open(path, encoding="utf-8") as f:
        head = f.read(64).lstrip()[:1]
        f.seek(0)
        try:
            rows = json.load(f) if head == "[" else [json.loads(line) for line in f if line.strip()]
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON: {error}; expected an array of rows, or one row a line") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is no JSON object; expected id, image and conversations")
        yield row


def _table_rows(path: Path) -> Iterator[dict]:
    from datasets import Dataset, load_from_disk

    try:
        table = load_from_disk(str(path)) if path.is_dir() else Dataset.from_parquet(str(path))
        missing = {"conversations"} - set(table.column_names)
    except Exception as error:
        # any of a dozen kinds, by what is broken
        raise InputError(f"{path}: cannot be read as a `datasets` folder or parquet file ({error})") from error
    if missing:
        raise InputError(f"{path}: has no column conversations; LLaVA's rows have id, image and conversations")
    yield from table


def image_names(row: dict) -> list[str]:
    image = row.get("image") or []
    return [image] if isinstance(image, str) else list(image)


def _turn_problem(conversation: object) -> str:
    """What is wrong with a conversation, or ""."""
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        return "`conversations` is no list of turns"
    try:
        _, answers = pair_turns(conversation)
    except ValueError as error:
        return str(error)
    if any(not answer.strip() for answer in answers):
        return "an answer is empty; drop the turn"
    if any(IMAGE in answer for answer in answers):
        return f"an answer contains {IMAGE}; only questions may show pictures"
    return ""


def _tars_state(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the tars in a folder, looked at again after each five seconds."""
    return _tars_now(folder, int(time.monotonic() / 5))


@lru_cache(maxsize=256)
def _tars_now(folder: str, moment: int) -> tuple[tuple[str, int, int], ...]:
    found = sorted(Path(folder).glob("*.tar"))
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)


@lru_cache(maxsize=64)
def _tar_members(folder: Path, state: tuple) -> dict[str, Picture]:
    """Members of all tars in a folder by file name; `state` makes a changed tar a new one."""
    members = {}
    for path in sorted(folder.glob("*.tar")):
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.isfile():
                        place = Picture(str(path), member.offset_data, member.size)
                        members[os.path.basename(member.name)] = place
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
    parser.add_argument("--model", default="", help="stats: a run of align or instruct, to count tokens")
    parser.add_argument("--max_length", type=int, default=2048, help="longer rows are reported")
    parser.add_argument("--out", default="", help="stats: folder for lengths.png and stats.json")
    options = parser.parse_args(argv)
    from mllm import data_report

    sys.exit(data_report.check(options) if options.action == "check" else data_report.stats(options))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
