"""Large checkpoints, written while the training goes on: a step waits for a copy in memory, and not for the disk.

Each rank leaves a mark in the checkpoint until its part is on the disk, and rank 0 seals the checkpoint (stages.run)
once there are no marks. What is killed before leaves a checkpoint that does not count, beside the one before it.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_map

from diffclip.base.errors import on_rank
from diffclip.base.files import write_whole
from diffclip.base.ranks import rank, world
from diffclip.base.schema import WRITING

FROM = 1_000_000_000  # parameters that learn; what smaller models have is written in a step or two
BYTES = 12  # of a parameter: its value, and both means of Adam, in float32
WRITER = ThreadPoolExecutor(1)  # its thread begins with the first large checkpoint; Python waits for it at its end

_writing: list[Future] = []


def gains(model: nn.Module) -> bool:
    """Whether DeepSpeed's part of a checkpoint is large enough, and this machine's memory holds a copy of it."""
    learning = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    copies = BYTES * learning / world() * int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return learning >= FROM and 2 * copies < psutil.virtual_memory().available


@contextmanager
def written_behind(engine: Any, folder: Path) -> Iterator[None]:
    """What `engine`, of DeepSpeed, saves inside is copied to memory, and written to `folder` in a thread after it.

    Raises:
        OSError: what was saved so before could not be written.
    """
    finish()
    copies: list[tuple[object, str]] = []
    writer = engine.checkpoint_engine
    writer.save = lambda state_dict, path: copies.append((tree_map(_copied, state_dict), path))
    try:
        yield
    finally:
        del writer.save  # which leaves the class's own
    mark = folder / f"{WRITING}{rank()}"
    write_whole(mark, "")
    _writing.append(WRITER.submit(_write, copies, mark))


def finish() -> None:
    """Wait until all parts of this rank are on the disk; OSError or what else has kept them from it."""
    while _writing:
        _writing.pop().result()


def _copied(value: object) -> object:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def _write(copies: list[tuple[object, str]], mark: Path) -> None:
    try:
        while copies:  # each is freed once it is written
            content, path = copies.pop()
            torch.save(content, path)
            del content
    except Exception as error:
        write_whole(mark, f"{on_rank()}its part could not be written ({error})")
        raise
    mark.unlink()
