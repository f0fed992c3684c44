"""The one way in which image files become RGB, for training, chat, benchmarks and lmms-eval alike."""

import contextlib
import functools
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from diffclip.base.errors import InputError

BROKEN = (  # all that a decoder or parser may raise at bytes that it was not made for
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
# Raster formats alone: PIL hands EPS to Ghostscript, an interpreter of programs, and WMF to the system.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000", "ICO")
TURNS = {  # EXIF orientation -> what turns the stored pixels as the camera was held
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DECODING = 2  # the version of these rules, which runs record; 1 was `as_stored`
STRIP = 16  # an image that is longer than so many times its width

# of odd tags in a file that can be read; what cannot, raises (once for all: catch_warnings is not made for threads)
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(source: bytes | str | Path | Callable[[], bytes], name: str = "") -> Image.Image:
    """`decode` of bytes, a path, or what a function reads; InputError with `name` or the path if missing or broken."""
    name = name or (str(source) if isinstance(source, (str, Path)) else "the image")
    try:
        return decode(source() if callable(source) else source)
    except BROKEN as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose own words are about a Python object
        reason = "not an image" if unknown else str(error) or type(error).__name__
        raise InputError(f"{name} cannot be read as an image ({reason}): replace or remove it") from error


def decode(source: bytes | str | Path) -> Image.Image:
    """Decode an image of one of `FORMATS`: its first frame, by the rules of `to_rgb`.

    One of BROKEN if it is broken, of another format, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with opened(source) as image:
        return to_rgb(image)


@contextlib.contextmanager
def opened(source: bytes | str | Path) -> Iterator[Image.Image]:
    """An image of one of `FORMATS` whose header is read and whose pixels are not; raises as `decode` does."""
    if not isinstance(source, bytes) and Path(source).is_fifo():
        raise OSError("it is a pipe, which would be waited for")
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
        pixels = image.width * image.height
        if Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:  # PIL only warns up to twice as many
            raise Image.DecompressionBombError(f"{pixels:,} pixels, which could be a decompression bomb")
        yield image


def stored_as_shown(image: Image.Image) -> bool:
    """Whether an opened image is a JPEG of which the rules of all versions show the pixels that it stores."""
    return image.format == "JPEG" and image.mode in ("RGB", "L") and _turn(image) is None


def rgb_by(version: int) -> Callable[[Image.Image], Image.Image]:
    """The rules of a version of `DECODING`: a model sees images as it saw them in training. InputError if unknown."""
    rules = {1: as_stored, DECODING: to_rgb}
    if version not in rules:
        raise InputError(f"decoding {version!r} is unknown: a newer diffclip-stack made this: install that")
    return rules[version]


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB image of what a viewer shows of any PIL image; an upright RGB image is returned as it is.

    Turned as EXIF says, once: the result carries no orientation. Transparency lies over white. Greys of more than
    8 bits are scaled as `_grey` says. One of BROKEN if the rest of a lazily opened file cannot be decoded.
    Raise `DECODING` with any change of this. What the rules of before make otherwise goes along for `as_stored`.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms_eval sets it: half an image would pass for a whole
    image.load()
    turn = _turn(image)
    special = turn is not None or image.mode[0] in "IF" or image.has_transparency_data
    if image.mode[0] in "IF":  # PIL would cut these at 255 instead of scaling
        rgb = _grey(image).convert("RGB")
    elif image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}  # EXIF and XMP, which would turn it once more
    if special:
        rgb.stored = image  # type: ignore[attr-defined]
    return rgb


def as_stored(image: Image.Image) -> Image.Image:
    """An RGB image by rules 1, also of what `to_rgb` made: not turned, opaque, 16-bit greys scaled, floats cut at 255.

    The result carries no orientation and no transparency, so that both rules leave it as it is.
    """
    image = getattr(image, "stored", image)
    image.load()
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    rgb = image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {}
    return rgb


def cut_strip(image: Image.Image) -> Image.Image:
    """The middle of a strip, which is all that a centre crop leaves of it; other images as they are.

    Without it, resizing the shorter side of 4000 x 1 pixels to 224 makes 896,000 x 224 of them.
    """
    width, height = image.size
    most = STRIP * min(width, height)
    left, top = (max(0, (side - most) // 2) for side in (width, height))  # both ends lose alike
    return image.crop((left, top, width - left, height - top)) if left or top else image


def widened(image: Image.Image, side: int) -> Image.Image:
    """A strip of which nothing is left once its longer side is `side`, made 1 pixel wide there; others as they are."""
    width, height = image.size
    if side * min(width, height) >= max(width, height):
        return image
    return image.resize((side, 1) if width > height else (1, side), Image.Resampling.BOX)


def _grey(image: Image.Image) -> Image.Image:
    """8-bit greys of an image of more bits: 16-bit ones as their formats define them, from 0 to 65535.

    For 32-bit integers and floats no format does: 0 to 1, 8 or 16 bits are told from the largest value, and what fits
    none of these ranges (negative or larger values) is stretched from its smallest to its largest value.
    """
    values: np.ndarray = np.nan_to_num(
        np.asarray(image).astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0
    )
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        clear = values == image.info.get("transparency", -1)  # a grey that stands for nothing at all
        white_is_zero = getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        values = np.where(clear, 255, (65535 - values if white_is_zero else values) / 257)
    elif low < 0 or high > 65535:
        values = (values - low) / (high - low or 1) * 255
    elif high <= 1:
        values = values * 255
    elif high > 255:
        values = values / 257
    return Image.fromarray(values.round().astype(np.uint8))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What the EXIF (or XMP) orientation asks for; None where there is none or the tags are damaged."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BROKEN:
        return None


@contextlib.contextmanager
def as_decoder(rules: Callable[[Image.Image], Image.Image] = to_rgb) -> Iterator[None]:
    """While it lasts `PIL.Image.open` gives what `decode` does, by `rules`: for code that opens images by itself."""
    opened = Image.open

    def in_rgb(file: Any, mode: Literal["r"] = "r", formats: Any = None) -> Image.Image:
        return rules(opened(file, mode, formats or _formats()))

    Image.open = in_rgb  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.open = opened


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # a format whose decoder this PIL lacks would be a KeyError
    return tuple(name for name in FORMATS if name in Image.OPEN)
