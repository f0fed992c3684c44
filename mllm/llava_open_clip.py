"""The multimodal model around a tower of open_clip: what such a model's saved code begins with."""

from diffclip.hf.open_clip_vision import OpenClipVisionConfig
from mllm.llava import DiffCLIPLlavaConfig, DiffCLIPLlavaForConditionalGeneration, DiffCLIPLlavaModel

__all__ = [
    "DiffCLIPLlavaConfig",
    "DiffCLIPLlavaForConditionalGeneration",
    "DiffCLIPLlavaModel",
    "OpenClipVisionConfig",
]
