"""Our models as transformers models; importing this package registers them for the Auto classes."""

from diffclip.hf.dual import DiffCLIPConfig, DiffCLIPModel
from diffclip.hf.files import image_processor, vision_config, write
from diffclip.hf.heads import DiffCLIPBackbone, DiffCLIPForImageClassification
from diffclip.hf.images import DiffCLIPImageProcessor
from diffclip.hf.text import DiffCLIPTextConfig, DiffCLIPTextModel
from diffclip.hf.vision import DiffCLIPVisionConfig, DiffCLIPVisionModel

__all__ = [
    "DiffCLIPBackbone",
    "DiffCLIPConfig",
    "DiffCLIPForImageClassification",
    "DiffCLIPImageProcessor",
    "DiffCLIPModel",
    "DiffCLIPTextConfig",
    "DiffCLIPTextModel",
    "DiffCLIPVisionConfig",
    "DiffCLIPVisionModel",
    "image_processor",
    "vision_config",
    "write",
]
