"""The one module that imports open_clip, and what the project uses of it and of timm."""
# ruff: noqa: F401, I001

from diffclip.base.timm_vit import Block, TimmAttention, TimmVisionTransformer  # first: open_clip imports timm too

import open_clip
from open_clip.factory import get_model_config
from open_clip.loss import ClipLoss
from open_clip.model import _build_vision_tower as build_vision_tower
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention as OpenClipAttention
from open_clip.transformer import CustomResidualAttentionBlock, QuickGELU, ResidualAttentionBlock
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from timm.data import ImageNetInfo
