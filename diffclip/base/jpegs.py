"""Plain JPEGs, which most training images are, straight into tensors: the pixels of `diffclip.base.images.decode`."""

import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from diffclip.base.files import file_content
from diffclip.base.images import opened, stored_as_shown, to_rgb

# torchvision 0.29, which is pinned, still has it; its successor is a package of its own
warnings.filterwarnings("ignore", message="The image decoding and encoding", module=r"torchvision\.io")


def decode_for_crops(source: bytes | str | Path) -> Tensor | Image.Image:
    """Decode an image for `diffclip.transforms(..., train=True)`: a JPEG to (3, height, width) uint8, channels last.

    Any other file, and a JPEG that has to be turned or is neither RGB nor grey, comes as `decode` gives it, and what
    torchvision refuses as well, so that PIL says what is wrong with it. Raises as `decode` does.
    """
    content = source if isinstance(source, bytes) else file_content(source)
    with opened(content) as image:
        if stored_as_shown(image):
            try:
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
            except RuntimeError:
                pass
        return to_rgb(image)
