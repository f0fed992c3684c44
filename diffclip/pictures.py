"""The one way in which picture files are decoded, for training, chat and benchmarks alike."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from diffclip.errors import InputError

BROKEN = (  # all that a decoder or parser may raise at bytes that it was not made for
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# of odd tags in a file that can be read; what cannot, raises (once for all: catch_warnings is not made for threads)
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(source: bytes | str | Path) -> Image.Image:
    """Decode a picture to RGB: the first frame, 16-bit greys scaled to 8, transparent parts as stored.

    Raises:
        one of BROKEN: it is broken, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        pixels = image.width * image.height
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:  # PIL only warns up to twice as many
            raise Image.DecompressionBombError(f"{pixels:,} pixels, which could be a decompression bomb")
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms_eval sets it: half a picture would pass for a whole
        image.load()
        if image.mode.startswith("I"):  # PIL would cut 16 bits at 255 instead of scaling
            return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")


def open_picture(source: bytes | str | Path | Callable[[], bytes], name: str) -> Image.Image:
    """`open_image` for pictures that a user named: InputError with `name` when one is missing or broken.

    Args:
        source: the encoded picture, its path, or a function that reads it.
        name: what the message calls it.
    """
    try:
        return open_image(source() if callable(source) else source)
    except BROKEN as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose own words are about a Python object
        reason = "not a picture" if unknown else str(error) or type(error).__name__
        raise InputError(f"{name} cannot be read as an image ({reason}): replace or remove it") from error
