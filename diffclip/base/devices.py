"""The device that a command computes on, and the group of its ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from diffclip.base.errors import InputError
from diffclip.base.ranks import LONGEST, world


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or InputError; without a name the GPU if there is one, else the CPU."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"device {name}: not on this machine ({reason}); give cuda, cuda:1, … or cpu") from None
    return device


@contextmanager
def group() -> Iterator[None]:
    """A process group of all ranks (gloo) within, where there are several; each has its own GPU, if there are any."""
    if world() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("gloo", timeout=LONGEST)
    try:
        yield
    finally:
        dist.destroy_process_group()
