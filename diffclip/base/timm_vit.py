"""The one module that imports timm, and what the vision tower takes of it.

Where wandb is installed, as lmms-eval wants it, timm imports it for a function of its own training script: a quarter of
the time that our commands take to start. So timm is imported without it; it stays importable for all others.
"""
# ruff: noqa: F401

import sys

if "timm" not in sys.modules and "wandb" not in sys.modules:
    sys.modules["wandb"] = None  # type: ignore[assignment] # Python's way to say that there is no such module
    try:
        import timm.utils.summary
    finally:
        del sys.modules["wandb"]

from timm.layers import Attention as TimmAttention
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
