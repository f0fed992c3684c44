"""DiffCLIP: CLIP with differential attention, for open_clip, timm and transformers.

After `import diffclip` transformers' Auto classes know our vision tower and the multimodal model, and open_clip's
`create_model` our runs. Nothing heavy is imported for it: names are imported when first used, and models when somebody
first asks for one.
"""

import diffclip.base.threads  # noqa: F401, I001 # first of all: OpenMP reads the environment once, when torch is loaded

import importlib
from typing import Any

from diffclip.base.after_import import after_import
from diffclip.base.auto_classes import register_lazily
from diffclip.open_clip_runs import take_runs

__version__ = "0.1.0"

_HOME = {
    "InputError": "base.errors",
    "DifferentialAttention": "attention",
    "lambda_init_schedule": "attention",
    "MODELS": "variants",
    "build": "models",
    "differentiate": "warm_start",
    "tokenizer": "preprocessing",
    "transforms": "preprocessing",
    "normalize": "preprocessing",
    "save": "checkpoints",
    "load": "checkpoints",
    "DiffCLIPConfig": "hf",
    "DiffCLIPModel": "hf",
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


register_lazily(
    {
        "CONFIG_MAPPING": {
            "diffclip": "diffclip.hf",
            "diffclip_text": "diffclip.hf",
            "diffclip_vision": "diffclip.hf",
            "open_clip_vision": "diffclip.hf.open_clip_vision",
            "diffclip_llava": "mllm.model",
        },
        "IMAGE_PROCESSOR_MAPPING": {"DiffCLIPImageProcessor": "diffclip.hf"},
    }
)
after_import({"open_clip.factory": take_runs})
