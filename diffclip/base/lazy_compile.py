"""Compiling when a function is first called: torch.compile imports inductor as it decorates, which takes a second."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from diffclip.base.after_import import after_import


def compile_when_called(function: Callable) -> Callable:
    """`torch.compile(function)`, made at the first call."""
    compiled = functools.cache(lambda: torch.compile(function))

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():  # as a part of what calls it
            return function(*given, **named)
        return compiled()(*given, **named)

    return call


def _in_deepspeed(compiler: ModuleType) -> None:
    compiler.compile = lambda: compile_when_called  # type: ignore[attr-defined]


@functools.cache
def ease_deepspeed() -> None:
    """Let DeepSpeed, whenever it is imported, not compile for its optimiser Muon what a training may never call."""
    after_import({"deepspeed.runtime.compiler": _in_deepspeed})
