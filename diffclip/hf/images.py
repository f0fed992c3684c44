"""The transform of a dual encoder as a transformers image processor: the same pixels."""

import base64
import contextlib
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torchvision.transforms.functional import center_crop
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling

from diffclip.base.images import DECODING, cut_strip, decode, rgb_by
from diffclip.base.portable import Portable, auto_map
from diffclip.hf.vision import DiffCLIPVisionConfig


class DiffCLIPImageProcessor(Portable, PilBackend):
    """`diffclip.transforms(config, train=False)` as a transformers image processor: the same pixels."""

    auto_classes: ClassVar = {"AutoImageProcessor": "diffclip.hf.images.DiffCLIPImageProcessor"}
    resample = PILImageResampling.BILINEAR
    size: ClassVar = {"shortest_edge": 224}
    crop_size: ClassVar = {"height": 224, "width": 224}
    default_to_square = False
    image_mean: ClassVar = [0.485, 0.456, 0.406]
    image_std: ClassVar = [0.229, 0.224, 0.225]
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def to_dict(self) -> dict[str, Any]:
        """As transformers' class does it, with `auto_map`, also within a processor."""
        return {**super().to_dict(), "auto_map": auto_map(self.auto_classes)}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths, bytes and base64 as all else here does; transformers itself would let any of PIL's formats in and
        lay transparency over black. Addresses are left to it.
        """
        source = image_url_or_urls
        if isinstance(source, list | tuple):
            return [self.fetch_images(each) for each in source]
        if isinstance(source, bytes | Path) or (isinstance(source, str) and os.path.isfile(source)):
            return decode(source)
        if isinstance(source, str) and not source.startswith(("http://", "https://")):
            with contextlib.suppress(ValueError):  # neither a file nor base64: transformers says so
                return decode(base64.b64decode(source.partition("base64,")[2] or source, validate=True))
        return super().fetch_images(source)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Turn a PIL image into (3, height, width) by the rules of `diffclip.base.images`; a strip loses its ends."""
        if isinstance(image, Image):
            image = rgb_by(getattr(self, "decoding", DECODING))(image)
            image = cut_strip(image) if self.do_center_crop else image
        return super().process_image(image, *args, **kwargs)

    def center_crop(  # type: ignore[override] # as transformers' own backend is called
        self, image: np.ndarray, size: Any, **kwargs: Any
    ) -> np.ndarray:
        """Crop (channels, height, width) as torchvision does, which rounds an odd margin differently."""
        return center_crop(torch.from_numpy(image), [size.height, size.width]).numpy()


PROCESSORS: dict[str, type] = dict.fromkeys(("pil", "torchvision"), DiffCLIPImageProcessor)
AutoImageProcessor.register(DiffCLIPVisionConfig, image_processor_classes=PROCESSORS, exist_ok=True)
