"""Plain JPEGs, which most training images are, straight into tensors: the pixels of `diffclip.base.images.decode`."""

import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from diffclip.base.files import file_content
from diffclip.base.images import decode, opened, stored_as_shown

# torchvision 0.29, which is pinned, still has it; its successor is a package of its own
warnings.filterwarnings("ignore", message="The image decoding and encoding", module=r"torchvision\.io")


def plain_size(content: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that shows the RGB or grey pixels that it stores, told from its header; None of any
    other image. Raises as `diffclip.base.images.decode` where the header cannot be read.
    """
    with opened(content) as image:
        return (image.height, image.width) if stored_as_shown(image) else None


def decode_for_crops(source: bytes | str | Path, size: tuple[int, int] | None = None) -> Tensor | Image.Image:
    """Decode an image for `diffclip.transforms(..., train=True)`: a JPEG to (3, height, width) uint8, channels last.

    Any other file, and a JPEG that has to be turned or is neither RGB nor grey, comes as `decode` gives it, and what
    torchvision refuses as well, so that PIL says what is wrong with it. Raises as `decode` does.

    Args:
        size: what `plain_size` gave, where it is known.
    """
    content = source if isinstance(source, bytes) else file_content(source)
    if size or plain_size(content):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            pass
    return decode(content)
