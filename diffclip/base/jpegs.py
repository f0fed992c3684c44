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


def read_for_crops(source: bytes | str | Path) -> tuple[bytes, tuple[int, int] | None]:
    """The content of an image's file, and if its header says that it is a plain JPEG (height, width).

    Plain is what shows the RGB or grey pixels that it stores. Raises as `diffclip.base.images.decode` where the header
    cannot be read.
    """
    content = source if isinstance(source, bytes) else file_content(source)
    with opened(content) as image:
        return content, (image.height, image.width) if stored_as_shown(image) else None


def decode_for_crops(content: bytes, size: tuple[int, int] | None) -> Tensor | Image.Image:
    """Decode what `read_for_crops` gave for `diffclip.transforms(..., train=True)`: a plain JPEG to (3, height, width)
    uint8, channels last.

    Any other file comes as `decode` gives it, and what torchvision refuses as well, so that PIL says what is wrong with
    it. Raises as `decode` does.
    """
    if size:
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:
            pass
    return decode(content)
