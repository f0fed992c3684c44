"""Every command takes every dual encoder, by whatever name: benchmarks, maps, align, evaluate, pretrain."""

import json

import pytest
import torch
from clips import OPEN_CLIP, siglip_directory, small_siglip, transformers_clip
from launch import call
from PIL import Image
from safetensors.torch import save_file

import diffclip
from diffclip import official
from diffclip.base.backbones import open_clip
from mllm.assemble import assemble, assembled_config
from mllm.model import load
from stages.pretraining import run_title, starting_model
from stages.settings import PretrainConfig

NAMES = (
    "run",
    "official folder",
    "open_clip file",
    "open_clip folder",
    "CLIPModel",
    "SiglipModel",
    "differential SigLIP",
)


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """What NAMES stand for, as a user gives it."""
    folder = tmp_path_factory.mktemp("named")
    torch.manual_seed(0)
    diffclip.save(diffclip.build("DiffCLIP-tiny"), folder / "run")
    (folder / "official").mkdir()
    state = official.to_official(diffclip.build("DiffCLIP-tiny").state_dict())
    torch.save({"state_dict": {f"module.{k}": t for k, t in state.items()}}, folder / "official" / "checkpoint_best.pt")
    (folder / "every-ViT.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(folder / "every-ViT.json")
    theirs = open_clip.create_model("every-ViT")
    save_file(theirs.state_dict(), folder / "w.safetensors")
    (folder / "oc").mkdir()
    (folder / "oc" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    save_file(theirs.state_dict(), folder / "oc" / "open_clip_model.safetensors")
    transformers_clip(folder / "clip")
    siglip_directory(folder / "siglip", small_siglip(torch.Generator().manual_seed(3)))
    siglip = diffclip.load(folder / "siglip")[0]
    diffclip.save(diffclip.differentiate(siglip, kind="v2"), folder / "differential")
    places = ["run", "official", None, "oc", "clip", "siglip", "differential"]
    yield {
        name: f"open_clip:every-ViT@{folder / 'w.safetensors'}" if place is None else str(folder / place)
        for name, place in zip(NAMES, places, strict=True)
    }
    del open_clip.factory._MODEL_CONFIGS["every-ViT"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for label in ("red", "blue"):
        place = folder / "classification" / "colour" / "test" / label
        place.mkdir(parents=True)
        for n in range(6):
            Image.effect_noise((40, 40), 20 + n).convert("RGB").save(place / f"{n}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmarks_and_evaluate_take_it(named, data, tmp_path, name):
    call("diffclip.benchmarks", "--model", f"it={named[name]}", f"--data_root={data}", f"--output_dir={tmp_path / 'b'}")
    scores = json.loads((tmp_path / "b" / "it" / "clip_benchmarks.json").read_text())["metrics"]
    call("stages.evaluate", f"--clip={named[name]}", f"--data_root={data}", f"--output_dir={tmp_path / 'run'}")
    evaluated = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {key: evaluated[key] for key in scores} == scores and 0 <= scores["zero_shot/colour/top1"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_maps_and_training_start_from_it(named, data, tmp_path, name):
    image = next((data / "classification" / "colour" / "test").rglob("*.png"))
    call("diffclip.maps", str(image), "--query", "red", "--models", named[name], "--out", str(tmp_path / "fig.png"))
    assert Image.open(tmp_path / "fig.png").width > 100
    config = PretrainConfig(init_from=named[name])
    model, transform, tokenizer = starting_model(config)
    expected = diffclip.load(named[name])[0]
    pixels = transform(Image.open(image))[None]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), expected.encode_image(pixels))
    assert run_title(config).endswith("+keep") and tokenizer(["red"]).shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_tower_is_aligned_with_a_language_model(named, language_dir, tmp_path, name):
    vlm = assemble(named[name], language_dir)
    transform = diffclip.load(named[name])[1]
    image = Image.effect_noise((64, 40), 30).convert("RGB")
    pixels = vlm.pixels([image])
    torch.testing.assert_close(pixels[0], transform(image), atol=2e-2, rtol=0)  # two libraries round in their own ways
    planned, made = assembled_config(named[name], language_dir), vlm.model.config
    assert planned.vision_config.hidden_size == made.vision_config.hidden_size
    vlm.save(tmp_path / "vlm")
    before, after = (
        m.model.model.vision_tower(pixels, output_hidden_states=True) for m in (vlm, load(tmp_path / "vlm"))
    )
    torch.testing.assert_close(after.hidden_states[-1], before.hidden_states[-1])
