"""Rows of LLaVA's JSON, checked once and kept memory-mapped; what a user can get wrong is found before training."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from datasets import Dataset, Features, Value, disable_progress_bars, enable_progress_bars
from datasets.exceptions import DatasetGenerationError

from diffclip.base.errors import InputError
from mllm.conversation import QWEN_CONTROL
from mllm.data.checks import examine
from mllm.data.images import ImagePlace, find_places

FORMAT = 2  # raise it when what `load_rows` keeps changes its meaning


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
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.table[index]
        images = []
        for name, content in zip(row["images"], row["contents"]):
            place = find_places(self.image_root, [name])[name] if content is None else ImagePlace(name, content=content)
            if place is None:
                raise InputError(f"{row['key']}: image {name} is no longer under {self.image_root}")
            images.append(place)
        return Row(row["key"], json.loads(row["conversation"]), images)

    def texts(self, indices: Sequence[int]) -> tuple[list[list[dict[str, str]]], list[int]]:
        """Conversations and numbers of images of some rows, without looking for the images."""
        rows = self._texts[indices]
        return [json.loads(text) for text in rows["conversation"]], [len(names) for names in rows["images"]]


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
