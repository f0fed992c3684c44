"""DiffCLIP: CLIP with differential attention, for open_clip, timm and transformers.

`import diffclip` makes transformers' Auto classes know our vision tower and the multimodal model (in the project's own
commands it is `import diffclip.hf` and `import mllm.model` that do, so that they start in a moment); other names are
imported when first used.
"""

import diffclip.base.threads  # noqa: F401, I001 # first of all: OpenMP reads the environment once, when torch is loaded

import importlib
import importlib.util
import sys
from typing import Any

_HOME = {
    "InputError": "base.errors",
    "DifferentialAttention": "attention",
    "lambda_init_schedule": "attention",
    "MODELS": "models",
    "build": "models",
    "differentiate": "models",
    "tokenizer": "models",
    "transforms": "models",
    "normalize": "models",
    "save": "checkpoints",
    "load": "checkpoints",
    "DiffCLIPVisionConfig": "hf",
    "DiffCLIPVisionModel": "hf",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffclip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffclip.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _own_command() -> bool:
    """Whether this process is one of the project's own `python -m` commands, which import what they need."""
    module = dict(zip(sys.orig_argv, sys.orig_argv[1:])).get("-m", "")
    return module.split(".")[0] in ("diffclip", "mllm", "stages")


if not _own_command():
    importlib.import_module("diffclip.hf")
    if importlib.util.find_spec("mllm"):  # absent where somebody took this folder alone
        importlib.import_module("mllm.model")
