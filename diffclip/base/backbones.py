"""The one module that imports open_clip, and what the project uses of it and of timm."""
# ruff: noqa: F401, I001

from diffclip.base.timm_vit import Block, TimmAttention, TimmVisionTransformer  # first: open_clip imports timm too

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
