"""What has to be mended in lmms-eval 0.7.3 for choices to be scored, and for an error to end all processes."""

import functools
import os
from collections.abc import Callable
from typing import Any

from lmms_eval.api.instance import Instance

from diffclip.base.lines import print_line


def ends_all(method: Callable) -> Callable:
    """`method` of a model, whose error ends the process where there are several.

    lmms-eval catches errors, and the other processes would wait for this one for ever; so their launcher ends them.
    """

    @functools.wraps(method)
    def checked(self: Any, requests: list[Instance]) -> list:
        try:
            return method(self, requests)
        except Exception as error:
            if self._world_size == 1:
                raise
            print_line(f"Error during evaluation: {error}", error=True)
            os._exit(1)

    return checked


def keep_likelihoods() -> None:
    """Have lmms-eval leave pairs of a log-probability as they are.

    Version 0.7.3 writes out as text whatever a model gives and is none, and then cannot score a task of choices.
    """
    from lmms_eval import evaluator

    unwrap = evaluator.unwrap_generation_output
    if unwrap.__module__ == __name__:  # done before
        return

    def unwrapped(output: Any) -> tuple[Any, Any]:
        if isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[0], float):
            return tuple(output), None
        return unwrap(output)

    evaluator.unwrap_generation_output = unwrapped
