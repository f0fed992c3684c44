"""The one decoder: what a viewer shows, the same on every path, of raster formats alone, in bounded memory."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

import diffclip
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.base.images import BROKEN, as_stored, cut_strip, decode, open_image, to_rgb
from diffclip.base.jpegs import decode_for_crops, read_for_crops
from diffclip.hf import image_processor

CONFIG = diffclip.MODELS["DiffCLIP-B-32"]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(height=6, width=4) -> np.ndarray:
    """(height, width, 3) with another colour at each corner, so that every turn and flip is seen."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[0, 0], pixels[0, -1], pixels[-1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return pixels


STORED = {  # how a camera stores the upright image under each EXIF orientation, after the EXIF standard
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_turns_a_image_once(orientation, kind):
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](corners())))
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    if kind == "AVIF":  # its own boxes hold the turn; a viewer's answer is that of PIL's own function
        from PIL import ImageOps

        content = encoded(stored, kind, exif=exif.tobytes(), **options)
        with Image.open(io.BytesIO(content)) as image:
            wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    else:
        content, wanted = encoded(stored, kind, exif=exif.tobytes(), **options), corners()
    image = decode(content)
    assert np.array_equal(np.asarray(image), wanted)
    assert to_rgb(image) is image  # and never again
    assert to_rgb(to_rgb(Image.open(io.BytesIO(content)))).tobytes() == image.tobytes()


def test_datasets_which_turns_too_gives_the_same(tmp_path):
    """lmms-eval's rows come from `datasets`, which decodes by itself."""
    import datasets

    exif = Image.Exif()
    exif[274] = 6
    content = encoded(Image.fromarray(np.ascontiguousarray(STORED[6](corners(64, 32)))), "JPEG", exif=exif.tobytes())
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": content, "path": None}]}, features=datasets.Features({"image": datasets.Image()})
    )
    decoded = rows[0]["image"]
    assert decode(content).size == (32, 64)
    for seen in (to_rgb(decoded), to_rgb(decoded.convert("RGB"))):
        assert seen.tobytes() == decode(content).tobytes()


def test_damaged_exif_keeps_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    plain = decode(encoded(image, "JPEG"))
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0" + struct.pack("<I", 999), b"junk"):
        assert decode(encoded(image, "JPEG", exif=exif)).tobytes() == plain.tobytes()


def test_plain_images_are_what_pil_gives():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"):
        content = encoded(Image.fromarray(pixels), kind)
        with Image.open(io.BytesIO(content)) as image:
            assert decode(content).tobytes() == image.convert("RGB").tobytes(), kind
    opaque = Image.fromarray(np.dstack([pixels, np.full((40, 30), 255, np.uint8)]))
    assert decode(encoded(opaque, "PNG")).tobytes() == pixels.tobytes()
    palette = Image.fromarray(pixels).quantize(16)
    assert decode(encoded(palette, "PNG")).tobytes() == palette.convert("RGB").tobytes()


def test_transparency_lies_over_white():
    alpha = np.array([[0, 255], [128, 51]], np.uint8)
    wanted = np.array([[255, 0], [127, 204]])  # of black: 255 - alpha
    black = np.zeros((2, 2), np.uint8)
    for image in (Image.fromarray(np.dstack([black] * 3 + [alpha])), Image.fromarray(np.dstack([black, alpha]), "LA")):
        for seen in (decode(encoded(image, "PNG")), to_rgb(image)):
            assert np.abs(np.asarray(seen).astype(int) - wanted[..., None]).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert decode(encoded(palette, kind, transparency=0)).getdata()[0] == (255, 255, 255), kind
        assert decode(encoded(palette, kind, transparency=0)).getdata()[1] == (10, 20, 30), kind
    partly = decode(encoded(palette, "PNG", transparency=bytes([51, 255])))
    assert partly.getpixel((0, 0)) == (204,) * 3
    key = decode(encoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)))
    assert key.getpixel((0, 0)) == (255,) * 3


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    "values, kind",
    [
        ((RAMP * 257).astype(np.uint16), "PNG"),
        ((RAMP * 257).astype(np.uint16), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),  # 8 bits in a wider type
        ((RAMP * 257).astype(np.int32), "TIFF"),
        ((RAMP * 100_000).astype(np.int32), "TIFF"),
        ((RAMP * 1000 - 90_000).astype(np.int32), "TIFF"),
        ((RAMP / 255).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 257).astype(np.float32), "TIFF"),
        ((RAMP / 10 - 3).astype(np.float32), "TIFF"),
    ],
)
def test_greys_of_many_bits_are_scaled_to_eight(values, kind):
    image = decode(encoded(Image.fromarray(values), kind))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.dstack([RAMP] * 3))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_greys_of_16_bits_are_scaled_by_their_type_however_dark(kind):
    """White is 65535 in these formats, whatever the largest value: the next frame is not another scale."""
    for most in (1, 200, 255, 256, 4095):
        values = np.linspace(0, most, 64).round().astype(np.uint16).reshape(8, 8)
        seen = np.asarray(decode(encoded(Image.fromarray(values), kind)))[..., 0]
        assert np.array_equal(seen, np.round(values / 257)), most


def test_a_grey_of_16_bits_that_stands_for_nothing_is_white():
    values = np.array([[1000, 30_000]], np.uint16)
    content = encoded(Image.fromarray(values), "PNG")
    key = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
    start = content.index(b"IDAT") - 4
    seen = decode(content[:start] + chunk + content[start:])
    assert [seen.getpixel((x, 0))[0] for x in (0, 1)] == [255, round(30_000 / 257)]


def test_white_is_zero_in_a_tiff_that_says_so():
    for bits, image in ((16, Image.fromarray(np.array([[0, 257, 65535]], np.uint16))), (8, Image.new("L", (3, 1)))):
        if bits == 8:
            image.putdata([0, 1, 255])
        content = encoded(image, "TIFF")
        entry = struct.pack("<HHIH", 262, 3, 1, 1)  # PhotometricInterpretation 1: black is zero
        assert content.count(entry) == 1
        seen = decode(content.replace(entry, struct.pack("<HHIH", 262, 3, 1, 0)))
        assert [pixel[0] for pixel in seen.getdata()] == [255, 254, 0], bits


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBa", "I;16B"])
def test_images_in_memory_of_every_mode_are_what_they_show(mode):
    colour = Image.new("RGB", (4, 4), (255, 255, 255))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image = ImageCms.profileToProfile(colour, *profiles, outputMode="LAB")
    elif mode == "I;16B":
        image = Image.frombytes(mode, (4, 4), b"\xff\xff" * 16)
    elif mode in ("PA", "RGBa"):  # black that is not there
        image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    else:
        image = colour.convert(mode)
    assert np.asarray(to_rgb(image)).min() >= 254


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_of_many_frames_the_first_is_seen(kind):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    seen = np.asarray(decode(encoded(red, kind, save_all=True, append_images=[blue]))).astype(int)
    assert np.abs(seen - (255, 0, 0)).max() <= 2


def test_what_is_cut_short_or_holds_nothing_is_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"):
        content = encoded(noise, kind)
        for part in (content[: len(content) * 2 // 3], content[:20], b""):
            with pytest.raises(BROKEN):
                decode(part)
    for content in (b"P6 0 0 255\n", b"GIF89a" + bytes(7) + b";", b"<svg/>", b"<html>", b"version https://git-lfs"):
        with pytest.raises(BROKEN):
            decode(content)


def test_a_bomb_is_refused_before_it_is_unpacked():
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b""), b"IEND"]
    content = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    with pytest.raises(InputError, match=r"400,?000,?000 pixels"):
        open_image(b"\x89PNG\r\n\x1a\n" + content)


def test_floats_that_are_no_numbers_do_not_spoil_the_rest():
    values = (RAMP / 255).astype(np.float32)
    values[0, :2] = np.nan, np.inf
    seen = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert np.array_equal(seen.ravel()[2:], RAMP.ravel()[2:])
    assert to_rgb(Image.fromarray(np.zeros((4, 4), np.uint16))).getextrema() == ((0, 0),) * 3


def test_the_cases_that_users_have(shared_cases):
    exif3, exif6 = (np.asarray(decode(shared_cases(f"images/exif{n}.jpg"))).astype(int) for n in (3, 6))
    with Image.open(shared_cases("images/exif6.jpg")) as image:
        stored = np.asarray(image).astype(int)
    assert exif3.shape == stored.shape and exif6.shape == (stored.shape[1], stored.shape[0], 3)
    assert np.array_equal(exif6, np.rot90(stored, -1))  # 6: to be turned clockwise
    with Image.open(shared_cases("images/exif3.jpg")) as image:
        assert np.array_equal(exif3, np.asarray(image)[::-1, ::-1])
    for name in ("gray16.png", "int32.tif"):
        assert decode(shared_cases(f"images/{name}")).getextrema() == ((52, 235),) * 3, name
    for name in ("icon_black_on_transparent.png", "icon_LA.png"):
        assert decode(shared_cases(f"images/{name}")).getextrema() == ((0, 255),) * 3, name


# ---- every path from a PIL image to pixels


def paths():
    """What goes from a PIL image of any kind to (3, 224, 224) floats; the last is open_clip's, for its own models."""
    transform, processor = diffclip.transforms(CONFIG, train=False), image_processor(CONFIG)
    foreign = diffclip.preprocessing.decoding(open_clip.image_transform(224, is_train=False))
    return [
        transform,
        lambda image: torch.as_tensor(processor([image], return_tensors="pt")["pixel_values"][0]),
        foreign,
    ]


def test_transform_and_processor_decode_alike():
    exif = Image.Exif()
    exif[274] = 8
    contents = [
        encoded(
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)), "JPEG", exif=exif
        ),
        encoded(Image.fromarray((RAMP * 257).astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(np.dstack([np.zeros((16, 16, 3)), RAMP]).astype(np.uint8)), "PNG"),
    ]
    for path in paths():
        for content in contents:
            assert torch.equal(path(Image.open(io.BytesIO(content))), path(decode(content)))


def test_the_processor_opens_files_as_it_opens_images(tmp_path):
    """transformers itself takes any of PIL's formats, and lays transparency over black."""
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 4), dtype=np.uint8)), "PNG", exif=exif
    )
    (path := tmp_path / "a.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    processor = image_processor(CONFIG)
    wanted = diffclip.transforms(CONFIG, train=False)(decode(content))
    for source in (path, str(path), content, text, f"data:image/png;base64,{text}", decode(content)):
        for given in (source, [source], [source, source]):
            assert torch.equal(torch.as_tensor(processor(given, return_tensors="pt")["pixel_values"][0]), wanted)
    for eps in (EPS, base64.b64encode(EPS).decode()):
        with pytest.raises(OSError):
            processor(eps)
    with pytest.raises(ValueError, match="valid path"):
        processor("there is none.png")


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (30_000, 100), (4001, 3), (100_000, 1)])
def test_a_strip_takes_little_memory(size):
    strip = Image.new("RGB", size, (200, 30, 30))
    short = cut_strip(strip)
    assert min(short.size) == min(size) and max(short.size) <= 16 * min(size) + 1
    for path in paths():
        seen = path(strip)
        assert seen.shape == (3, 224, 224)
        assert torch.allclose(seen, path(Image.new("RGB", (8, 8), (200, 30, 30))), atol=1e-6)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_a_strip_is_seen_in_every_resize_mode_of_open_clip(mode, size):
    config = {**CONFIG, "preprocess_cfg": {**CONFIG["preprocess_cfg"], "resize_mode": mode, "fill_color": 0}}
    seen = diffclip.transforms(config, train=False, normalized=False)(Image.new("RGB", size, (200, 30, 30)))
    if seen.dtype != torch.uint8:  # open_clip's own always normalises
        mean, std = (torch.tensor(config["preprocess_cfg"][key])[:, None, None] for key in ("mean", "std"))
        seen = (seen * std + mean) * 255
    assert seen.shape == (3, 224, 224)
    middle = seen[:, 108:116, 108:116].flatten(1).float().amax(1)  # in "longest" a line between bars
    assert (middle - torch.tensor([200, 30, 30])).abs().max() <= 1
    assert diffclip.transforms(config, train=True)(Image.new("RGB", size)).shape == (3, 224, 224)


def test_a_strip_shows_its_middle_as_if_it_were_whole():
    """Against torchvision's own resizing of the whole strip."""
    from torchvision import transforms as T

    pixels = np.random.default_rng(0).integers(0, 256, (10, 401, 3), dtype=np.uint8)
    pixels[:, 190:211] = 255
    for image in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2))):
        whole = T.Compose([T.Resize(224), T.CenterCrop(224), T.PILToTensor()])(image)
        ours = diffclip.transforms(CONFIG, train=False, normalized=False)(image)
        assert (whole.int() - ours.int()).abs().max() <= 1
    usual = Image.fromarray(pixels[:, :160])
    assert cut_strip(usual) is usual


# ---- a stranger's files


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["x.eps", "x.jpg", "bytes"])
def test_eps_never_reaches_ghostscript(tmp_path, monkeypatch, name):
    from PIL import EpsImagePlugin

    fake = tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # look for it again
    with Image.open(io.BytesIO(EPS)) as image, pytest.raises(OSError):
        image.load()  # PIL by itself starts it
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    source = EPS
    if name != "bytes":
        source = tmp_path / name
        source.write_bytes(EPS)
    with pytest.raises(BROKEN):
        decode(source)
    with pytest.raises(InputError, match=r"picked.eps cannot be read as an image"):
        open_image(source, "picked.eps")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PCX", "SGI", "PDF", "TGA", "EPS", "MSP"])
def test_formats_beyond_the_list_are_refused(kind):
    with pytest.raises(BROKEN):
        decode(encoded(Image.new("1" if kind == "MSP" else "RGB", (8, 8)), kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO"])
def test_formats_of_the_list_are_read(kind):
    image = decode(encoded(Image.new("RGB", (32, 32), (255, 255, 255)), kind))
    assert image.mode == "RGB" and image.size == (32, 32) and image.getpixel((5, 5)) == (255, 255, 255)


def test_no_other_place_opens_images():
    """`Image.open` without the list of formats stands nowhere in the packages."""
    root = Path(diffclip.__file__).parents[1]
    files = [path for name in ("diffclip", "mllm", "stages", "benchmarks") for path in (root / name).rglob("*.py")]
    opening = [str(path.relative_to(root)) for path in files if "Image.open(" in path.read_text(encoding="utf-8")]
    assert opening == ["diffclip/base/images.py"]


# ---- the rules of before


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_rules_1_see_an_image_as_it_is_stored_opened_by_us_or_not(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    mode = "RGBA" if kind == "PNG" else "RGB"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, len(mode)), dtype=np.uint8)
    content = encoded(Image.fromarray(pixels), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        stored = np.asarray(image)[..., :3]  # PIL's convert("RGB") drops the alpha, and turns nothing
        assert np.array_equal(as_stored(image), stored)
    ours = as_stored(decode(content))
    assert np.array_equal(ours, stored)
    assert np.array_equal(to_rgb(ours), stored) and np.array_equal(as_stored(ours), stored)  # nothing turns it again


def test_rules_1_scale_16_bits_and_take_colours_behind_transparency():
    greys = np.array([[0, 257, 65535, 514]], dtype=np.uint16)
    with Image.open(io.BytesIO(encoded(Image.fromarray(greys), "PNG"))) as image:
        assert [p[0] for p in as_stored(image).getdata()] == [0, 1, 255, 2]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    content = encoded(palette, "PNG", transparency=0)
    assert [*as_stored(decode(content)).getdata()] == [(10, 20, 30), (40, 50, 60)]
    assert [*decode(content).getdata()] == [(255, 255, 255), (40, 50, 60)]


# ---- the way into tensors


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, np.int16) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


JPEGS = {
    "4:2:0": {},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "rough": {"quality": 10},
    "kept RGB": {"keep_rgb": True},
}


def as_trained_on(source):
    return decode_for_crops(*read_for_crops(source))


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_becomes_a_tensor_of_pil_s_pixels(mode, options):
    for size in ((1, 1), (17, 250), (120, 91)):
        content = encoded(photo(*size).convert(mode), "JPEG", **options)
        pixels = as_trained_on(content)
        assert isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8
        assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(decode(content)))


def test_what_has_to_be_turned_or_converted_is_left_to_pil(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    image = photo(40, 60)
    (tmp_path / "a.png").write_bytes(encoded(image, "PNG"))
    turned, cmyk = encoded(image, "JPEG", exif=exif.tobytes()), encoded(image.convert("CMYK"), "JPEG")
    for source in (turned, cmyk, tmp_path / "a.png"):
        seen = as_trained_on(source)
        assert isinstance(seen, Image.Image) and np.array_equal(np.asarray(seen), np.asarray(decode(source)))
    assert as_trained_on(turned).size == (40, 60)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_is_the_same_image_or_as_broken_as_for_pil(progressive):
    """Cut short, or with a few bytes changed anywhere, or with one changed in the header."""
    whole = encoded(photo(60, 80), "JPEG", progressive=progressive)
    rng = np.random.default_rng(1)
    outcomes = set()
    for trial in range(150):
        content = bytearray(whole)
        if trial % 3 == 0:
            content = content[: rng.integers(2, len(whole))]
        else:
            for place in rng.integers(0, len(whole) if trial % 3 == 1 else 700, 3):
                content[place] = rng.integers(256)
        try:
            wanted = np.asarray(decode(bytes(content)))
        except BROKEN:
            outcomes.add("broken")
            with pytest.raises(BROKEN):
                as_trained_on(bytes(content))
        else:
            outcomes.add("whole")
            seen = as_trained_on(bytes(content))
            seen = seen.permute(1, 2, 0) if isinstance(seen, torch.Tensor) else np.asarray(seen)
            assert np.array_equal(seen, wanted)
    assert outcomes == {"broken", "whole"}


def test_more_pixels_than_allowed_are_refused_on_both_ways(monkeypatch):
    content = encoded(photo(40, 60), "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for way in (decode, as_trained_on):
        with pytest.raises(Image.DecompressionBombError):
            way(content)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(480, 640), (100, 75), (1, 1), (3, 700), (224, 224)], ids=str)
def test_crops_are_those_of_pil_within_one_level(size, interpolation):
    """Of the same draws as torchvision's RandomResizedCrop makes; a few of a million bicubic pixels are 2 apart."""
    config = {**CONFIG, "preprocess_cfg": {**CONFIG["preprocess_cfg"], "interpolation": interpolation}}
    peer = T.RandomResizedCrop(224, scale=(0.5, 1.0), interpolation=T.InterpolationMode(interpolation))
    transform = diffclip.transforms(config, train=True, normalized=False)
    image = photo(*size)
    for seed in range(4):
        torch.manual_seed(seed)
        wanted = np.asarray(peer(image), np.int16)
        for given in (image, torch.from_numpy(np.array(image)).permute(2, 0, 1)):
            torch.manual_seed(seed)
            seen = transform(given)
            assert seen.dtype == torch.uint8 and seen.shape == (3, 224, 224)
            apart = np.abs(seen.permute(1, 2, 0).numpy().astype(np.int16) - wanted)
            assert apart.max() <= (2 if interpolation == "bicubic" else 1) and (apart > 1).mean() < 1e-4
        torch.manual_seed(seed)
        floats = diffclip.transforms(config, train=True)(image)
        assert torch.equal(floats, diffclip.normalize(config, seen))


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg cannot be read as an image \(it is a pipe"):
        open_image(tmp_path / "x.jpg")
