"""Rows of conversations: read in any layout, judged once, and kept memory-mapped.

What a user can get wrong is told before any training: missing images, turns, half characters. What images and lengths
are good for is judged in `mllm.data.judge`.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow
from datasets import Dataset
from filelock import FileLock

from diffclip.base.cache import CHECKSUM, cache_dir, checksum
from diffclip.base.errors import InputError
from diffclip.base.files import refuse_pipe, whole
from diffclip.base.fingerprint import json_digest
from diffclip.base.paths import matching
from mllm.conversation import QWEN_CONTROL
from mllm.data.examine import BYTES
from mllm.data.files import KINDS
from mllm.data.images import ImagePlace, find_place, present
from mllm.data.records import KEPT, ended_processes, record_batches

FORMAT = 4  # raise it when what `load_rows` keeps changes its meaning
BATCH_ROWS = 1000  # rows are kept in batches of about so many, or of BYTES of images


class Row(NamedTuple):
    """One conversation: where it came from, its turns, its images."""

    key: str  # "file.json: row 17 (id abc)"
    conversation: list[dict[str, str]]
    images: list[ImagePlace]


class Rows(Sequence[Row]):
    """Judged rows in an Arrow file that is mapped into memory: any number of them opens at once and is shared.

    `problems` has the (key, reason) of those that are left out; `positions` (rows,) int64 where the others lie in
    `table`; `identity` changes with what a row or its place is.
    """

    def __init__(self, table: Dataset, image_root: str | Path, digest: str) -> None:
        self.table, self.image_root, self.digest = table, os.path.abspath(image_root), digest
        bad = pyarrow.compute.is_valid(table.data.column("problem"))
        self.positions = np.flatnonzero(~bad.to_numpy(zero_copy_only=False))
        self.whole = digest + hashlib.sha256(self.positions.tobytes()).hexdigest()[:16]
        self.identity = self.whole
        keys, reasons = (table.data.column(name).filter(bad).to_pylist() for name in ("key", "problem"))
        self.problems = list(zip(keys, reasons))

    def without(self, problems: Mapping[int, str]) -> "Rows":
        """The rows but for those at some positions, which are left out for a reason each."""
        if not problems:
            return self
        rows = Rows(self.table, self.image_root, self.digest)
        rows.positions = self.positions[~np.isin(self.positions, list(problems))]
        rows.problems = self.problems + [(self.table[at]["key"], reason) for at, reason in sorted(problems.items())]
        rows.identity = self.whole + hashlib.sha256(rows.positions.tobytes()).hexdigest()[:16]
        return rows

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = self.table[int(self.positions[index])]
        images = []
        try:
            for name, content in zip(row["images"], row["contents"]):
                images.append(present(self.image_root, name, content))
        except InputError as error:
            raise InputError(f"{row['key']}: {error}") from None
        return Row(row["key"], json.loads(row["conversation"]), images)

    @property
    def chosen(self) -> str:
        """A hash that changes with which rows of the files are these, wherever the files lie."""
        return hashlib.sha256(f"{len(self.table)} ".encode() + self.positions.tobytes()).hexdigest()[:16]

    def key(self, index: int) -> str:
        """Where a row came from, as `Row.key`."""
        return self.table[int(self.positions[index])]["key"]

    def texts(self) -> Iterator[tuple[list[list[dict[str, str]]], list[int]]]:
        """Conversations and numbers of images of all rows, 4096 at a time, without looking for the images."""
        columns = self.table.select_columns(["conversation", "images"])
        for first in range(0, len(self), 4096):
            rows = columns[self.positions[first : first + 4096]]
            yield [json.loads(text) for text in rows["conversation"]], [len(names) for names in rows["images"]]


def load_rows(
    files: Sequence[str | Path],
    image_root: str | Path,
    *,
    image_prefix: str = "",
    split: str = "",
    template: str = "vicuna",
    control: Sequence[str] = QWEN_CONTROL,
    max_bad_share: float = 0.0,
    fresh: bool = False,
) -> Rows:
    """Read rows of any of `mllm.data.layouts` and judge them all.

    What was judged is kept in `diffclip.base.cache.cache_dir`, so the same files open in a moment the next time, and
    in every other process: of several one judges, and the others wait. Images that rows hold themselves are kept there
    too. Rows whose images were missing are judged anew when the images have come.

    Args:
        files: JSON arrays, JSONL (both also .gz), parquet, folders of `datasets.save_to_disk` or of parquet shards, or
            globs of these; several make a mixture, in order.
        image_root: folder that the rows' image paths start from. A path that is no file there is looked for
            in the tars of its folder: `shots/train/7.jpg` as member `7.jpg` of a tar in `shots/train/`; where several
            hold one, the row names it: `shots/train/00000.tar/7.jpg`. Images are paths, file:// or data: URIs, or
            encoded images (`datasets`' {"bytes", "path"}), one or a list.
        image_prefix: keep only rows whose image path starts with this; "coco/" is LLaVA-665K's COCO subset.
        split: which of several that a folder or the rows themselves name, see `mllm.data.files.read_rows`.
        template: the conversation format that the rows are to be written in, which decides how many images show.
        control: tokens that stay text where the rows write them, from `mllm.literal.control_tokens`.
        max_bad_share: the share of rows that may have a fault, and are left out then; see `refuse_too_bad`.
        fresh: judge anew, whatever is kept.

    Raises:
        InputError: unreadable file, no rows; or more than `max_bad_share` of them have a missing image, video or
            sound, turns out of order, an empty answer, more or fewer images than the
            conversation shows, or the like: names the first.
    """
    sources = [(_by_its_name(path), _state(Path(path))) for path in matching([str(path) for path in files])]
    settings: dict[str, Any] = {
        "image_prefix": image_prefix,
        "split": split,
        "template": template,
        "control": list(control),
    }
    root = os.path.realpath(image_root)
    digest = json_digest([FORMAT, sources, root, settings], 32)
    path = cache_dir() / "rows" / f"{digest}.arrow"
    names = [name for name, _ in sources]
    table = None if fresh else _kept(path, root)
    if table is None:
        with locked(path):
            table = None if fresh else _kept(path, root)  # another process may have judged them in the meantime
            if table is None:
                with ended_processes(names):
                    _keep(path, record_batches(names, root, settings))
                table = Dataset.from_file(str(path))
    rows = Rows(table, image_root, digest)
    if not len(table):
        only = f" with an image path that starts with `{image_prefix}`" if image_prefix else ""
        only += f" of the split {split or 'train'}"
        raise InputError(f"{', '.join(names)}: no rows{only}; check the file, image_prefix and split")
    refuse_too_bad(rows, max_bad_share)
    return rows


def _by_its_name(path: str) -> str:
    """A path without links but for the last: the Hub's cache has a file under its name as a link to a digest."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def refuse_too_bad(rows: Rows, max_bad_share: float, named_in: str | Path = "") -> None:
    """InputError with the first fault if more than a share of the rows has one, or all of them; infinity: never.

    `named_in`: the file that names them all, where there is one.
    """
    bad, total = len(rows.problems), len(rows) + len(rows.problems)
    if not bad or max_bad_share == math.inf or (bad <= max_bad_share * total and len(rows)):
        return
    key, reason = rows.problems[0]
    where = f"see {named_in}" if named_in else "diffclip check"
    rest = f"{bad - 1} more rows have problems: {where}" if bad > 1 else ""
    if max_bad_share:
        share = f"{bad} of {total} rows have problems, more than max_bad_share {max_bad_share:g}"
        rest = f"{share}: {where}, mend the data or raise it"
    raise InputError(f"{key}: {reason}" + f" ({rest})" * bool(rest))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time work on a file of the cache, whose folder is made; InputError where none can."""
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path.parent}: cannot be written ({reason}); set DIFFCLIP_CACHE to another folder") from None
    try:
        yield
    finally:
        lock.release()


def _state(path: Path) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file is written, or any in a folder."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give {KINDS}")
    files = [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]
    stats = ((str(file.relative_to(path)), file.stat()) for file in files)
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]


def _kept(path: Path, root: str) -> Dataset | None:
    """The table that `_keep` wrote, if it is there, whole, and every image that was missing still is."""
    try:
        refuse_pipe(path)
        content = pyarrow.memory_map(str(path)).read_buffer()
        if _checksum(content[:-CHECKSUM]) != content[-CHECKSUM:].to_pybytes():
            return None
        table = Dataset.from_file(str(path))
    except Exception:  # pyarrow raises whatever damage leads it to
        return None
    left_out = pyarrow.compute.is_valid(table.data.column("problem"))
    missing = pyarrow.compute.list_flatten(table.data.column("images").filter(left_out)).unique().to_pylist()
    return None if any(_found(root, name) for name in missing) else table


def _checksum(file: pyarrow.Buffer) -> bytes:
    """The checksum of a table and all it says of itself, but for the images that rows hold, which may fill a disk."""
    view, pieces, at = memoryview(file), list[memoryview](), 0
    for chunk in pyarrow.ipc.open_stream(file).read_all().column("contents").chunks:
        images = chunk.buffers()[-1]
        if images and images.size:
            pieces.append(view[at : images.address - file.address])
            at = images.address - file.address + images.size
    return checksum(*pieces, view[at:])


def _found(root: str, name: str) -> bool:
    try:
        return find_place(root, name) is not None
    except InputError:
        return False


def _keep(path: Path, judged: Iterator[pyarrow.RecordBatch]) -> None:
    """Write batches in the form of KEPT as one table, whole or not at all."""
    try:
        with whole(path) as temporary:
            with pyarrow.ipc.new_stream(str(temporary), KEPT) as writer:
                held, rows, size = list[pyarrow.RecordBatch](), 0, 0
                for batch in judged:
                    held.append(batch)
                    rows, size = rows + len(batch), size + batch.nbytes
                    if rows >= BATCH_ROWS or size > BYTES:
                        writer.write_batch(held[0] if len(held) == 1 else pyarrow.concat_batches(held))
                        held, rows, size = [], 0, 0
                writer.write_table(pyarrow.Table.from_batches(held, KEPT))
            end = _checksum(pyarrow.memory_map(str(temporary)).read_buffer())
            with open(temporary, "ab") as file:
                file.write(end)  # readers of the format stop before it
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); make room, or set DIFFCLIP_CACHE") from None
