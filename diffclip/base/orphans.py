"""Commands end with those who started them: a launcher or a pipeline that is killed leaves nothing running unseen."""

import os
import socket
import threading
import time
from contextlib import suppress

from diffclip.base.lines import print_line

PARENT = "DIFFCLIP_PARENT"  # environment variable: host, process and its start, which a command of ours ends with
LAUNCHERS = {  # what Python runs, by the name of the file or module
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate.commands.launch"),
}

_watching = threading.Event()


def as_parent() -> dict[str, str]:
    """The variable for the environment of a command that is to end with this process."""
    return {PARENT: f"{socket.gethostname()}:{os.getpid()}:{_start(os.getpid())}"}


def end_with_parents() -> None:
    """From now on, end within a second of the death of what started this process: the command of ours that says so in
    the variable `PARENT`, and the launchers above this process.

    A variable of another host says nothing here. The deepspeed launcher does not pass signals on, and what it started
    would train on unseen.
    """
    watched = dict(_launchers()) | _named(os.environ.get(PARENT, ""))
    if not watched or _watching.is_set() or not os.path.isdir("/proc/self"):
        return
    _watching.set()
    threading.Thread(target=_watch, args=(watched,), daemon=True).start()


def end_with(parent: str) -> None:
    """From now on, end within a second of the death of the process of which `as_parent` gave this value."""
    if (watched := _named(parent)) and os.path.isdir("/proc/self"):
        threading.Thread(target=_watch, args=(watched,), daemon=True).start()


def _named(parent: str) -> dict[int, str]:
    """The process of this host that a value of `as_parent` names, with its start."""
    place, _, start = parent.rpartition(":")
    host, _, process = place.rpartition(":")
    return {int(process): start} if host == socket.gethostname() and process.isdecimal() else {}


def _watch(watched: dict[int, str]) -> None:
    while all(_start(process) == start for process, start in watched.items()):
        time.sleep(0.5)
    gone = next(process for process, start in watched.items() if _start(process) != start)
    with suppress(OSError, ValueError):  # who read it may be gone as well
        print_line(f"ended, since process {gone}, which had started this one, is gone", error=True)
    os._exit(1)


def _launchers() -> list[tuple[int, str]]:
    """The launchers right above this process, with their starts."""
    found, process = [], os.getppid()
    while process > 1 and _is_launcher(process):
        found.append((process, _start(process)))
        fields = _fields(process)
        process = int(fields[1]) if fields else 0
    return found


def _is_launcher(process: int) -> bool:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as f:
            program, *arguments = f.read().decode(errors="replace").split("\0")
    except (OSError, ValueError):
        return False
    runs = next((word for word in arguments if not word.startswith("-")), "")
    return "python" in os.path.basename(program) and os.path.basename(runs) in LAUNCHERS


def _fields(process: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold anything: state, parent, …"""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as f:
            return f.read().rpartition(")")[2].split()
    except OSError:
        return []


def _start(process: int) -> str:
    """When a process started, in the kernel's ticks; "" if there is none, or a dead one that nobody has waited for."""
    fields = _fields(process)
    return fields[19] if fields and fields[0] not in "ZX" else ""
