"""How a process of ours waits and where it keeps memory, set on import, before torch; the user's own settings win.

OpenMP's threads spin at a barrier for milliseconds by default, which takes the core from whoever else could run: beside
one busy process a training step waits for threads that wait for each other. Much shorter spins than these cost where
the machine is free (docs/performance.md). libgomp reads the number when torch loads it.

glibc gives freed tensors back to the system, and where page faults are dear (virtual machines) taking them again costs
more than half of a small model's step. Its variables are read before Python starts; a call does the same.
"""

import ctypes
import os
import sys

SPINS = "3000"
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's numbers for them
KEPT = 1 << 30  # bytes: blocks up to here are kept for the next tensor
USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def cores() -> int:
    """How many cores this process may use, which may be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS  # processes that this one starts inherit it

if sys.platform == "linux" and not {*USERS} & os.environ.keys() and hasattr(libc := ctypes.CDLL(None), "mallopt"):
    for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        libc.mallopt(parameter, KEPT)
