"""Rows as the Arrow batches in which they are kept, judged by several processes where the files are large.

Each process reads the files whole and judges its share of the rows: reading is a sixth of the work, and what was read
in one process would have to be packed and sent to the others.
"""

import gc
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from diffclip.base.errors import InputError, in_one_line
from diffclip.base.ranks import rank
from diffclip.base.threads import cores
from mllm.data.examine import Examined, examine
from mllm.data.files import read_rows
from mllm.data.images import find_place, row_images

KEPT = pyarrow.schema(
    {
        "key": pyarrow.string(),
        "conversation": pyarrow.string(),  # JSON; "" of a row that is left out
        "images": pyarrow.list_(pyarrow.string()),  # of a row that is left out: those that were not found
        "contents": pyarrow.list_(pyarrow.large_binary()),  # encoded images that the row itself holds
        "problem": pyarrow.string(),
    }
)
TEXT = (".json", ".jsonl", ".ndjson")  # files that hold next to no images
SEVERAL_FROM = 64 << 20  # bytes of text, some 40,000 conversations, from which more than one process pays
MOST_PROCESSES = 8


class Records(IterableDataset):
    """The batches of `record_batches`; a loading process yields its share of them, and bad input as a value."""

    def __init__(self, files: Sequence[str | Path], image_root: str | Path, settings: dict[str, Any]) -> None:
        self.files, self.image_root, self.settings = files, image_root, settings

    def __iter__(self) -> Iterator[pyarrow.RecordBatch | InputError | OSError]:
        worker, share = get_worker_info(), (0, 1)
        if worker and worker.dataset is self:  # and not a process of whoever loads rows in one
            share = (worker.id, worker.num_workers)
            gc.freeze()  # a collection would write into all that was imported, and so copy it: 130 MB a process
        try:
            for rows in examine(self.files, self.image_root, **self.settings, share=share):
                yield pyarrow.RecordBatch.from_pylist(list(map(_record, rows)), KEPT)
        except (InputError, OSError) as error:
            yield error  # raised in a loading process, it would come with that one's traceback in its message


def record_batches(
    files: Sequence[str | Path], image_root: str | Path, settings: dict[str, Any]
) -> Iterator[pyarrow.RecordBatch]:
    """All rows of files in their order, in the form of KEPT; `settings` of `examine`, whose errors are raised."""
    quiet = True if rank() else None  # None: where there is no console
    try:
        batches = _started(Records(files, image_root, settings))
        with tqdm(desc="reading conversations", unit="row", delay=2, leave=False, disable=quiet) as bar:
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
                if len(batch):
                    yield batch
                bar.update(len(batch))
    except OSError as error:  # of the files: whoever writes what this yields has errors of its own
        name, reason = error.filename or ", ".join(map(str, files)), error.strerror or error
        raise InputError(f"{name}: cannot be read ({reason}); look at its disk, or fetch it again") from None


def _started(records: Records) -> Iterator[pyarrow.RecordBatch | InputError | OSError]:
    """The batches of rows, from loading processes where these pay and the system has them to give."""
    if count := _processes(records.files):
        for file in records.files:  # what is no file of rows is told once; indices of tars are there for all processes
            first = next(read_rows(file, records.settings["split"]), {})
            with suppress(InputError):
                for name, content in row_images(first):
                    find_place(records.image_root, name, content)
        own = torch.Generator()  # the loader draws from it, and from the training's that would depend on what is kept
        with suppress(OSError):  # no semaphores, no memory for a process more, too many of them
            return iter(
                DataLoader(records, batch_size=None, num_workers=count, generator=own, multiprocessing_context="fork")
            )
    return iter(records)


@contextmanager
def ended_processes(files: Sequence[str | Path]) -> Iterator[None]:
    """Raise InputError where the system ends a loading process, which torch tells at any moment while they run."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that read {', '.join(map(str, files))} has ended ({in_one_line(error).rstrip('.')}); the "
            "system ends processes where memory runs out: free some, and start the same command again"
        ) from error


def _processes(files: Sequence[str | Path]) -> int:
    """How many loading processes judge the rows; 0: this one does."""
    large = sum(map(os.path.getsize, files)) > SEVERAL_FROM and all(str(path).lower().endswith(TEXT) for path in files)
    alone = multiprocessing.current_process().daemon  # a loading process itself, which may start none
    return min(cores(), MOST_PROCESSES) if large and cores() > 1 and not alone else 0


def _record(row: Examined) -> dict[str, Any]:
    if row.problem:
        missing = [name for name, place in row.images if place is None]
        return {"key": row.key, "conversation": "", "images": missing, "contents": [], "problem": row.problem}
    return {
        "key": row.key,
        "conversation": json.dumps(row.conversation),
        "images": [name for name, _ in row.images],
        "contents": [place.content for _, place in row.images if place],
        "problem": None,
    }
