"""Attention maps and relevance against the modules' own outputs, finite differences and planted answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffclip import attention_maps, checkpoints, maps, models
from diffclip.base.errors import InputError
from diffclip.benchmarks import localisation, mask_scores
from diffclip.scenes import drawing as scenes
from diffclip.scenes.__main__ import main as export_scenes

NAMES = ["CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-V2-tiny"]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    torch.manual_seed(0)
    built = models.build(request.param).eval()
    with torch.no_grad():
        for block in built.visual.trunk.blocks:
            for parameter in block.attn.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return built


IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
TEXTS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layer", [0, -1])
def test_recording_changes_nothing_and_maps_are_those_applied(model, layer):
    attention = attention_maps.vision_attention(model, layer)
    plain = model.encode_image(IMAGES)
    with attention_maps.recorded(attention) as seen:
        recorded = model.encode_image(IMAGES)
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode_image(IMAGES), plain, atol=0, rtol=0)  # back to its own forward
    assert seen["map"].shape[-2:] == (37, 37)
    layer_maps = attention_maps.layer_maps(model, IMAGES, layer)
    used = layer_maps.get("difference", layer_maps["A1"])
    torch.testing.assert_close(used.flatten(2), seen["map"][:, :, 0, 1:])
    heads = {"CLIP": 4, "DiffCLIP": 2, "DiffCLIP-V2": 4}[model.model_config["diffclip"]["variant"]]
    assert used.shape == (2, heads, 6, 6)


def test_relevance_is_map_times_gradient(model):
    """Against finite differences: nudge one entry of the class token's row of the map, watch the similarity."""
    model = model.double()
    images = IMAGES.double()
    found = attention_maps.relevance(model, images, TEXTS)
    assert found.shape == (2, 6, 6) and found.min() >= 0 and found.max() > 0
    attention = attention_maps.vision_attention(model, -1)
    with torch.no_grad(), attention_maps.recorded(attention) as seen:
        queries = model.encode_text(TEXTS, normalize=True)
        model.encode_image(images)
        x, base = seen["input"], seen["map"]
        for patch in (0, 17, 35):
            expected = torch.zeros(2)
            for head in range(base.shape[1]):
                ends = []
                for step in (1e-5, -1e-5):
                    nudged = base.clone()
                    nudged[:, head, 0, 1 + patch] += step
                    attention.forward = lambda x, *a, nudged=nudged, **k: attention_maps.apply_map(attention, x, nudged)
                    ends.append((model.encode_image(images, normalize=True) * queries).sum(-1))
                slope = (ends[0] - ends[1]) / 2e-5
                expected += (slope * base[:, head, 0, 1 + patch]).clamp(min=0).float() / base.shape[1]
            torch.testing.assert_close(found.flatten(1)[:, patch], expected, atol=1e-7, rtol=1e-3)
        assert x.shape == (2, 37, 128)
    model.float()


def test_figure_is_drawn_for_several_models(tmp_path):
    for name in NAMES[:2]:
        checkpoints.save(models.build(name), tmp_path / name)
    for i in range(2):
        Image.fromarray(scenes.draw(scenes.make_scene(0, "figure", i), 64)).save(tmp_path / f"{i}.png")
    arguments = [str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--query", "a star", "--models"]
    arguments += [str(tmp_path / name) for name in NAMES[:2]]
    maps.main([*arguments, "--out", str(tmp_path / "fig.png")])
    assert np.asarray(Image.open(tmp_path / "fig.png").convert("L")).std() > 20
    with pytest.raises(InputError, match="3 queries for 2 images"):
        maps.main([*arguments[:2], "--query", "a", "b", "c", *arguments[4:], "--out", str(tmp_path / "x.png")])


def test_scores_of_planted_maps():
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:7] = True
    perfect = mask_scores.map_scores(mask.astype(float), mask)
    assert perfect == {"pointing": 100, "energy": 100, "precision": 100, "area": 12}
    assert mask_scores.map_scores(np.zeros((10, 10)), mask)["energy"] == pytest.approx(12)
    wrong = mask_scores.map_scores((~mask).astype(float), mask)
    assert wrong["pointing"] == wrong["energy"] == 0 and wrong["precision"] == pytest.approx(12)
    half = np.zeros((10, 10))
    half[2, 3], half[9, 9] = 1.0, 3.0
    found = mask_scores.map_scores(half, mask)
    assert found["pointing"] == 0 and found["energy"] == pytest.approx(25)


def test_masks_are_those_of_the_scenes(tmp_path):
    export_scenes(["export", str(tmp_path / "s"), "--only", "segmentation", "--segmentation", "6", "--seed", "3"])
    folder = tmp_path / "s" / "segmentation"
    items = list(mask_scores.read_masks(folder / "instances.json", folder / "images"))
    wanted = []
    for i in range(6):
        scene = scenes.make_scene(3, "segmentation", i)
        for shape in scenes.SHAPES:
            visible = [m for t, m in zip(scene.things, scenes.masks(scene, 64)) if t.shape == shape]
            if visible:
                wanted.append((f"{i:06d}.png", shape, np.any(visible, axis=0)))
    assert [(p.name, n) for p, n, _ in items] == [(p, n) for p, n, _ in wanted]
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(items, wanted))
    (folder / "images" / "000003.png").unlink()
    with pytest.raises(InputError, match=r"000003\.png: no such image"):
        list(mask_scores.read_masks(folder / "instances.json", folder / "images"))


def test_command_compares_models_with_intervals(tmp_path):
    export_scenes(["export", str(tmp_path / "s"), "--only", "segmentation", "--segmentation", "12"])
    for name in NAMES[:2]:
        checkpoints.save(models.build(name), tmp_path / name)
    folder, out = tmp_path / "s" / "segmentation", tmp_path / "found.json"
    arguments = ["--instances", str(folder / "instances.json"), "--images", str(folder / "images"), "--models"]
    localisation.main([*arguments, *(str(tmp_path / n) for n in NAMES[:2]), "--out", str(out)])
    found = json.loads(out.read_text())
    one, other = found["models"].values()
    assert found["pictures"] == 12 and one["area"] == other["area"]
    for score in mask_scores.SCORES:
        assert 0 <= one[score]["low"] <= one[score]["mean"] <= one[score]["high"] <= 100
        assert other[f"{score}_difference"]["mean"] == pytest.approx(other[score]["mean"] - one[score]["mean"])


SMALL = {"embed_dim": 16, "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}


def open_clip_model(kind):
    import open_clip

    torch.manual_seed(0)
    text = open_clip.model.CLIPTextCfg(**SMALL["text_cfg"])
    timm = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
    match kind:
        case "ViT":
            return open_clip.CLIP(16, VIT, text, quick_gelu=True).eval()
        case "timm":
            return open_clip.CustomTextCLIP(16, timm, text).eval()
        case "ResNet":
            return open_clip.CLIP(16, {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, text).eval()
        case "SigLIP":
            return open_clip.CustomTextCLIP(16, {**timm, "timm_pool": "avg"}, text).eval()
        case "CoCa":
            pooler = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
            embedding = {"embed_cls": True, "output_tokens": True}
            multimodal = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 49408}
            return open_clip.CoCa(16, multimodal, {**SMALL["text_cfg"], **embedding}, {**VIT, **pooler}).eval()


def images_for(kind):
    side = 224 if kind in ("timm", "SigLIP") else 32
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["ViT", "timm"])
def test_maps_of_open_clips_models(kind):
    model = open_clip_model(kind)
    images, texts = images_for(kind), TEXTS[:, :8]
    attention = attention_maps.vision_attention(model, -1)
    plain = model.encode_image(images)
    with attention_maps.recorded(attention) as seen:
        torch.testing.assert_close(model.encode_image(images), plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen["map"].sum(-1), torch.ones(seen["map"].shape[:-1]))
    found = attention_maps.relevance(model, images, texts)
    patches = 4 if kind == "ViT" else 14
    assert found.shape == (2, patches, patches) and found.min() >= 0 and found.max() > 0
    assert attention_maps.layer_maps(model, images, 0)["A1"].shape[-2:] == (patches, patches)
    with pytest.raises(InputError, match="layer 99 of"):
        attention_maps.vision_attention(model, 99)


def test_maps_of_torchs_attention_are_torchs():
    model = open_clip_model("ViT")
    attention, x = attention_maps.vision_attention(model, 0), torch.randn(2, 17, 32)
    _, weights = attention(x, x, x, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(attention_maps.attention_map(attention, x), weights)


def test_scale_norm_of_a_tower_is_applied():
    model = open_clip_model("timm")
    attention = model.visual.trunk.blocks[-1].attn
    attention.norm = torch.nn.LayerNorm(192)
    plain = model.encode_image(images_for("timm"))
    with attention_maps.recorded(attention):
        torch.testing.assert_close(model.encode_image(images_for("timm")), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind,said", [("ResNet", "ModifiedResNet"), ("CoCa", "VisionTransformer"), ("SigLIP", "Vision")]
)
def test_towers_without_a_class_token_have_no_maps(kind, said):
    with pytest.raises(InputError, match=f"no attention maps for this model: its {said}"):
        attention_maps.relevance(open_clip_model(kind), images_for(kind), TEXTS[:, :8])


@pytest.mark.parametrize("kind", ["ViT", "timm", "ResNet", "CoCa", "SigLIP"])
def test_features_of_every_tower(kind):
    """What the projection makes of the features before it is what the model gives."""
    from diffclip.benchmarks.features import encode_image

    model = open_clip_model(kind)
    with torch.no_grad():
        before, after = encode_image(model, images_for(kind))
        wanted = model.encode_image(images_for(kind))
    if kind == "CoCa":  # normalises by itself
        after = torch.nn.functional.normalize(after, dim=-1)
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
    assert after.shape == (2, 16) and before.shape[1] == {"ViT": 32, "ResNet": 256, "CoCa": 16}.get(kind, 192)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_masks_are_cropped_as_the_images_are(mode):
    import open_clip

    transform = open_clip.image_transform(32, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode=mode)
    mask = np.zeros((60, 100), bool)
    mask[10:40, 20:60] = True
    image = Image.fromarray(mask).convert("RGB")
    seen = np.asarray(attention_maps.seen_part(transform, nearest=True)(image))[:, :, 0] > 127
    assert seen.shape == (32, 32) and (seen == (transform(image)[0].numpy() > 0)).mean() > 0.95
    with pytest.raises(InputError, match="does not tell how it resizes"):
        attention_maps.seen_part(lambda image: image)
