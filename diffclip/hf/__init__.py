"""Our models as transformers models; importing this package registers them for the Auto classes."""

from diffclip.hf.files import image_processor, vision_config
from diffclip.hf.images import DiffCLIPImageProcessor
from diffclip.hf.vision import DiffCLIPVisionConfig, DiffCLIPVisionModel

__all__ = ["DiffCLIPImageProcessor", "DiffCLIPVisionConfig", "DiffCLIPVisionModel", "image_processor", "vision_config"]
