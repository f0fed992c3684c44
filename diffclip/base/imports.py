"""Importing large libraries in a quarter less of the time, and sharing them with loading processes."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 500  # modules; transformers' Trainer and what comes with it are four thousand


@contextmanager
def importing() -> Iterator[None]:
    """Let no garbage be collected while modules are loaded, and none of what they hold be looked through after that.

    Thousands of modules make millions of objects, nearly all of which stay: the collector goes through them again and
    again (1.3 of 5.5 s of a stage's imports), and in each forked process writes into, and so copies, their pages.
    """
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
        if len(sys.modules) - before > MANY:  # not where all was there: it would keep garbage of a test, say
            gc.freeze()
    finally:
        if enabled:
            gc.enable()
