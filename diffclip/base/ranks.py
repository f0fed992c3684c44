"""Several processes that are one training: what rank 0 decides, all of them do.

They talk through the store at MASTER_ADDR and MASTER_PORT, which torch's process group uses after them, so that they
can agree before there is one.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TextIO, TypeVar

from diffclip.base.errors import InputError, first_line, other_rank_gone

T = TypeVar("T")
LONGEST = timedelta(hours=12)  # that the others wait for rank 0; where it ends, the launcher ends them all
PATIENCE = timedelta(seconds=30)  # that rank 0 waits for the others to hear what was said, before it may end
LAUNCHERS = (  # how variables begin by which launchers tell a process its rank
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_"),
)

_calls = count()  # every rank makes the same calls in the same order


def join_slurm() -> None:
    """Let the tasks of a Slurm step, as `srun diffclip pretrain` starts them, be the ranks of one training.

    Nothing is done where a launcher has said which rank this is, and in a batch script, which is one process. Without
    MASTER_ADDR the ranks meet on the first host of the step.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if "WORLD_SIZE" in os.environ or "SLURM_STEP_ID" not in os.environ or tasks < 2:
        return
    here = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # like 4(x2),3
    if "MASTER_ADDR" not in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        try:
            os.environ["MASTER_ADDR"] = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise InputError(
                f"this is task {os.environ['SLURM_PROCID']} of a Slurm step of {tasks}, and scontrol does not say on "
                "which hosts: export MASTER_ADDR, an address of the first that the others reach, and MASTER_PORT"
            ) from None
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_by_node(here)[int(os.environ.get("SLURM_NODEID", 0))]),
    }


def be_a_launcher() -> bool:
    """Tell this process, if no launcher has, that it is a training of one, since DeepSpeed would look for MPI."""
    if alone := "WORLD_SIZE" not in os.environ:
        own = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": free_port()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}
    return alone


def free_port() -> int:
    """A port of this machine that nobody listens on, so that two trainings on it do not meet at a fixed one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tasks_by_node(text: str) -> list[int]:
    """Tasks of each node as Slurm writes them: `4(x2),3` is 4, 4, 3."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]


def rank() -> int:
    """The number of this process among all of the training's."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes are one training."""
    return int(os.environ.get("WORLD_SIZE", 1))


def environment_of_none() -> dict[str, str]:
    """The environment for a command that rank 0 starts, and that is no rank of the same."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}


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
            _heard(key)
            raise
        _store().set(key, json.dumps({"value": value}))
        _heard(key)
        return value
    told = json.loads(_get(key))
    _heard(key)
    if "error" in told:
        raise InputError(told["error"])
    return told["value"]


def gather(text: str) -> list[str]:
    """What each rank says, by rank, on every rank."""
    if world() == 1:
        return [text]
    key = f"said/{next(_calls)}"
    _store().set(f"{key}/{rank()}", text)
    said = [_get(f"{key}/{other}").decode() for other in range(world())]
    _heard(key)
    return said


def _heard(key: str) -> None:
    """Say that this rank has what was said under a key; rank 0, whose end is the store's, waits until all have it."""
    with suppress(RuntimeError):  # a rank that never comes, or a rank 0 that has not waited for this one
        if rank() != 0:
            _store().set(f"{key}/heard/{rank()}", "")
        else:
            _store().wait([f"{key}/heard/{other}" for other in range(1, world())], PATIENCE)


def keep_errors(file: Path) -> None:
    """Have what this process writes to stderr from now on, warnings and tracebacks, written to a file, too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    copy = open(file, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - until the process ends
    sys.stderr = _Both(sys.stderr, copy)


class _Both:
    """A console's stream that a file gets a copy of."""

    def __init__(self, stream: TextIO, copy: TextIO) -> None:
        self.stream, self.copy = stream, copy

    def write(self, text: str) -> int:
        self.copy.write(text)
        self.copy.flush()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _get(key: str) -> bytes:
    try:
        return _store().get(key)
    except RuntimeError:  # of several kinds
        raise InputError("rank 0 has ended; see what it says") from None


@cache
def _store() -> Any:
    from torch.distributed import PrefixStore  # not at the top: one process alone needs no torch
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=LONGEST))
    except (RuntimeError, ValueError) as error:  # ValueError: a variable of the launcher's is missing
        if other_rank_gone(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise InputError(
            f"the ranks cannot meet at {place} ({first_line(error)}): give the launcher a free port "
            "(--master_port), and an address of rank 0's host that the others reach"
        ) from None
    return PrefixStore("diffclip", store)
