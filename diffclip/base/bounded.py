"""Whether work that a stranger wrote comes to an end: tried in a child process that may take so much and no more."""

import os
import resource
import warnings
from collections.abc import Callable

SECONDS, MEMORY = 10, 1 << 30  # of a CPU; bytes beyond what this process has


def comes_to_an_end(work: Callable[[], object], seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether `work` ends, by a result or an exception, within these limits; what it changes stays in the child."""
    with warnings.catch_warnings():  # of Python 3.12 in a process of threads: `work` takes no locks of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        code = 1
        try:
            with open("/proc/self/statm", encoding="ascii") as f:
                has = int(f.read().split()[0]) * resource.getpagesize()
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = has + memory if hard == resource.RLIM_INFINITY else min(has + memory, hard)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            work()
            code = 0
        except MemoryError:
            pass
        except Exception:
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
