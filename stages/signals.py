"""Told to end: SIGTERM, SIGUSR1 and SIGHUP let a training write a checkpoint and end, on all ranks at the same step.

A scheduler sends one of them before it takes a machine away. A second one of the same kind ends the process at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

HEEDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_told = threading.Event()


@contextmanager
def noticed() -> Iterator[None]:
    """Within it the signals only set what `told` says; one that is ignored, as under nohup, stays ignored."""
    before: dict[signal.Signals, Any] = {}

    def notice(number: int, frame: FrameType | None) -> None:
        _told.set()
        signal.signal(number, before[signal.Signals(number)])

    _told.clear()
    try:
        if threading.current_thread() is threading.main_thread():  # the others cannot have handlers
            before |= {each: signal.getsignal(each) for each in HEEDED if signal.getsignal(each) != signal.SIG_IGN}
            for each in before:
                signal.signal(each, notice)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Told:
    """Whether any rank has been told to end; every rank asks at the same steps, and all get the same answer."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # on the CPU, so that no rank waits for its device
        self.group: Any = dist.new_group(backend="gloo") if several else None

    def __call__(self) -> bool:
        if self.group is None:
            return _told.is_set()
        told = torch.tensor(int(_told.is_set()))
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group)
        return bool(told)
