"""Several processes that are one training: what rank 0 decides, all of them do.

They talk through the store at MASTER_ADDR and MASTER_PORT, which torch's process group uses after them, so that they
can agree before there is one.
"""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

from diffclip.base.errors import InputError

T = TypeVar("T")
LONGEST = timedelta(hours=12)  # that the others wait for rank 0; where it ends, the launcher ends them all
PATIENCE = timedelta(seconds=30)  # that rank 0 waits for the others to hear of an error

_calls = count()  # every rank makes the same calls in the same order


def rank() -> int:
    """The number of this process among all of the training's."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes are one training."""
    return int(os.environ.get("WORLD_SIZE", 1))


def where() -> str:
    """Rank and host, for messages."""
    return f"rank {rank()} on {socket.gethostname()}"


def from_main(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; it is called nowhere else, and its result must be JSON.

    An InputError of rank 0 is raised on all of them; anything else ends rank 0 alone, and the launcher the others.
    """
    if world() == 1:
        return decide()
    key = f"decided/{next(_calls)}"
    if rank() == 0:
        try:
            value: Any = decide()
        except InputError as error:
            _store().set(key, json.dumps({"error": str(error)}))
            with suppress(RuntimeError):  # a rank that never comes
                _store().wait([f"{key}/{other}" for other in range(1, world())], PATIENCE)
            raise  # not before all know it: the store ends with this process
        _store().set(key, json.dumps({"value": value}))
        return value
    told = json.loads(_get(key))
    _store().set(f"{key}/{rank()}", "known")
    if "error" in told:
        raise InputError(told["error"])
    return told["value"]


def gather(text: str) -> list[str]:
    """What each rank says, by rank, on every rank."""
    if world() == 1:
        return [text]
    number = next(_calls)
    _store().set(f"said/{number}/{rank()}", text)
    return [_get(f"said/{number}/{other}").decode() for other in range(world())]


def _get(key: str) -> bytes:
    try:
        return _store().get(key)
    except RuntimeError:  # of several kinds
        raise InputError(f"{where()}: rank 0 has ended; see what it says") from None


@cache
def _store() -> Any:
    from torch.distributed import PrefixStore  # not at the top: one process alone needs no torch
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=LONGEST))
    return PrefixStore("diffclip", store)
