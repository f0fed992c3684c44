"""The one module that imports open_clip and timm, and what the project uses of them.

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

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.factory import _find_checkpoint_in_dir as find_checkpoint
from open_clip.factory import get_model_config, load_checkpoint
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import _build_vision_tower as build_vision_tower
from open_clip.model import (
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    resize_text_pos_embed,
    set_model_preprocess_cfg,
)
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import CustomResidualAttentionBlock, QuickGELU, ResidualAttentionBlock
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from timm.data import ImageNetInfo
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
