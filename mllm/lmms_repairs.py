"""What has to be mended in lmms-eval 0.7.3 for choices to be scored, for an error to end all processes, and for it to
start in seconds.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import yaml
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


def parse_in_c() -> None:
    """Have YAML parsed by libyaml: lmms-eval reads its 3,000 task files at each start, 6 s in Python and 1 s in C."""
    if not hasattr(yaml, "CFullLoader") or issubclass(yaml.FullLoader, yaml.CFullLoader):
        return

    class FullLoader(yaml.CFullLoader):
        def __init__(self, stream: Any) -> None:
            self.name = getattr(stream, "name", "<text>")  # which a task's !function asks for, and C keeps to itself
            super().__init__(stream)

    yaml.FullLoader = yaml.loader.FullLoader = FullLoader  # type: ignore[assignment, misc]
