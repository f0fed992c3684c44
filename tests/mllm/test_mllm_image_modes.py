"""Ways to make an image square: what is seen, what is not, and that the choice is saved with the model."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import diffclip
from diffclip.base.errors import InputError
from diffclip.base.images import DECODING, to_rgb
from diffclip.hf import image_processor
from mllm.assemble import assemble
from mllm.model import VisionLanguageModel, load, transform_fingerprint
from mllm.processing import bounded, with_mode


def picture():
    """White, twice as wide as high, with a red stripe at the left and a blue one at the right end."""
    pixels = np.full((60, 120, 3), 255, dtype=np.uint8)
    pixels[:, :20], pixels[:, -20:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def seen(processor):
    """(3, H, W) in 0..1, as the tower gets it before normalisation."""
    pixels = processor([picture()], return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(list(v))[:, None, None] for v in (processor.image_mean, processor.image_std))
    return pixels * std + mean


@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_what_each_mode_shows(kind, tower_dir):
    if kind == "ours":
        base = image_processor(diffclip.build("CLIP-tiny").model_config)
    else:
        base = AutoProcessor.from_pretrained(tower_dir)
    side = base.crop_size["height"]
    crop, squash, pad = (seen(with_mode(base, mode)) for mode in ("crop", "squash", "pad"))
    assert crop.shape == squash.shape == pad.shape == (3, side, side)
    red, blue = torch.tensor([1.0, 0, 0]), torch.tensor([0, 0, 1.0])
    assert crop.min() > 0.9  # the stripes are beyond the middle square
    for image, row in ((squash, 1), (squash, side - 2), (pad, side // 2)):
        assert (image[:, row, 1] - red).abs().max() < 0.05 and (image[:, row, -2] - blue).abs().max() < 0.05
    bars = pad[:, [0, 1, -2, -1]]
    assert (bars - torch.tensor(list(base.image_mean))[:, None, None]).abs().max() < 0.01
    assert (squash[:, 0] - squash[:, side // 2]).abs().max() < 0.05  # no bars


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_the_mode_is_saved_with_the_model(mode, tower_dir, language_dir, tmp_path):
    model, processor = assemble(tower_dir, language_dir, image_mode=mode)
    VisionLanguageModel(model, processor).save(tmp_path)
    _, again = load(tmp_path)
    assert torch.equal(seen(again.image_processor), seen(processor.image_processor))
    text = "<image>\nIs there a red square?"
    inputs = again(text=[text], images=[picture()], return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_a_run_records_how_its_images_were_decoded_and_one_of_before_sees_them_as_then(
    mode, tower_dir, language_dir, tmp_path
):
    model, processor = assemble(tower_dir, language_dir, image_mode=mode)
    VisionLanguageModel(model, processor).save(tmp_path)
    assert load(tmp_path).processor.image_processor.decoding == DECODING
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    del settings["image_processor"]["decoding"]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="prepares images in another way"):
        load(tmp_path)  # it was there when the run was saved
    prints = json.loads((tmp_path / "fingerprints.json").read_text())
    del processor.image_processor.decoding  # as runs before this version were saved
    prints["transform"] = transform_fingerprint(processor)
    (tmp_path / "fingerprints.json").write_text(json.dumps(prints))
    before = load(tmp_path)
    assert before.processor.image_processor.decoding == 1
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8))
    opaque = Image.fromarray(np.asarray(stored)[..., :3].copy())  # what rules 1 see: colours without their transparency
    for image in (stored, to_rgb(stored)):
        assert torch.equal(before.pixels([image]), before.pixels([opaque]))
    before.save(tmp_path / "again")
    assert load(tmp_path / "again").processor.image_processor.decoding == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (60_000, 60), (100_000, 1)])
@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_a_strip_takes_little_memory_in_every_mode(kind, mode, size, tower_dir):
    base = image_processor(diffclip.build("CLIP-tiny").model_config)
    processor = with_mode(base if kind == "ours" else AutoProcessor.from_pretrained(tower_dir), mode)
    (image,) = bounded([Image.new("RGB", size, (200, 30, 30))], processor)
    width, height = image.size
    if mode == "pad":
        assert max(width, height) <= 2048  # and so is the square between whose bars it lies
    elif mode == "crop":
        assert max(width, height) <= 17 * min(width, height)
    pixels = processor([image], return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(list(v))[:, None, None] for v in (processor.image_mean, processor.image_std))
    colour = torch.tensor([200, 30, 30]) / 255
    if mode == "pad":  # all but nothing of it is left between the bars
        assert (pixels * std)[:, 0, 0].abs().max() < 0.01
    else:
        assert ((pixels * std + mean) - colour[:, None, None]).abs().max() < 0.01


def test_pictures_that_are_no_strips_stay_as_they_are(tower_dir):
    for mode in ("crop", "squash", "pad"):
        image = picture()
        assert bounded([image], with_mode(AutoProcessor.from_pretrained(tower_dir), mode)) == [image]


def test_an_unknown_mode_is_refused(tower_dir):
    with pytest.raises(InputError, match="image_mode 'stretch' is unknown"):
        with_mode(AutoProcessor.from_pretrained(tower_dir), "stretch")
