"""Towers of open_clip: features and pixels are open_clip's own, and a saved multimodal model gives them back."""

import json

import pytest
import torch

from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from mllm.assemble import assemble, assembled_config
from mllm.model import VisionLanguageModel, load
from mllm.open_clip_tower import load_tower

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
    "timm-vit": {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"},
    "eva": {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "efficientnet": {"image_size": 64, "timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg"},
}


def open_clip_name(folder, kind):
    """An architecture of `VISION` made known to open_clip, with seeded weights in a file: its name for `assemble`."""
    wide = 192 if kind == "eva" else 16
    config = {"embed_dim": wide, "vision_cfg": VISION[kind], "text_cfg": TEXT, "quick_gelu": kind == "vit"}
    (folder / f"small-{kind}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"small-{kind}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(f"small-{kind}").state_dict(), folder / "weights.pt")
    return f"open_clip:small-{kind}@{folder / 'weights.pt'}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", VISION)
def test_last_state_is_what_open_clips_own_head_takes(tmp_path, picture, kind):
    name = open_clip_name(tmp_path, kind)
    tower, image_processor = load_tower(name)
    model, _, preprocess = open_clip.create_model_and_transforms(f"small-{kind}", pretrained=tmp_path / "weights.pt")
    model.eval()
    pixels = preprocess(picture(0, (90, 70))).unsqueeze(0)
    ours = image_processor([picture(0, (90, 70))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, pixels)
    with torch.no_grad():
        last = tower(pixels).last_hidden_state
        if kind == "vit":
            pooled = model.visual._pool(last)[0] @ model.visual.proj
        elif kind == "resnet":
            pooled = model.visual.attnpool(last.transpose(1, 2).reshape(1, -1, 2, 2))
        else:
            trunk = model.visual.trunk
            features = last.transpose(1, 2).reshape(1, -1, 2, 2) if kind == "efficientnet" else trunk.norm(last)
            pooled = model.visual.head(trunk.forward_head(features))
        torch.testing.assert_close(pooled, model.encode_image(pixels))


def test_penultimate_layer_with_class_token_in_front(tmp_path, picture):
    tower, image_processor = load_tower(open_clip_name(tmp_path, "vit"))
    seen = []
    tower.visual.transformer.resblocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    pixels = image_processor([picture(1)], return_tensors="pt")["pixel_values"]
    states = tower(pixels, output_hidden_states=[-2]).hidden_states
    assert [state is None for state in states] == [True, True, False, True]
    assert torch.equal(states[-2], seen[0]) and states[-2].shape == (1, 17, 32)
    with pytest.raises(ValueError, match="no embeddings"):
        tower(pixels, output_hidden_states=[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind, layer", [("vit", -2), ("eva", -2), ("efficientnet", -1)])
def test_assembled_saved_and_loaded(language_dir, tmp_path, picture, kind, layer):
    name = open_clip_name(tmp_path, kind)
    model, processor = assemble(name, language_dir, vision_feature_layer=layer)
    inputs = processor(text=["<image>\nIs it red?"], images=[picture(0)], return_tensors="pt")
    logits = model(**inputs).logits
    other = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}).logits
    assert not torch.allclose(logits, other)
    VisionLanguageModel(model, processor).save(tmp_path / "run")
    again, _ = load(tmp_path / "run")
    assert fingerprint(again.model.vision_tower) == fingerprint(model.model.vision_tower)
    torch.testing.assert_close(again(**inputs).logits, logits, rtol=0, atol=1e-6)
    assert assembled_config(name, language_dir).vision_config.hidden_size == model.config.vision_config.hidden_size


@pytest.mark.parametrize(
    "name, words",
    [
        ("open_clip:ViT-B-16", "names no weights"),
        ("open_clip:no-such-model@x.pt", "has no architecture no-such-model"),
        ("open_clip:ViT-B-32@no_such_tag", "neither a file nor weights"),
        ("open_clip:local-dir:no/such/folder", "no/such/folder: no such file"),
    ],
)
def test_what_open_clip_does_not_know_is_refused(language_dir, name, words):
    with pytest.raises(InputError, match=words):
        assemble(name, language_dir)


def test_a_stage_of_another_width_is_refused(language_dir, tmp_path):
    with pytest.raises(InputError, match="set vision_feature_layer -1"):
        assemble(open_clip_name(tmp_path, "efficientnet"), language_dir)
