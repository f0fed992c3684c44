"""Attention maps and relevance against the modules' own outputs, finite differences and planted answers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffclip
from diffclip import attention_maps, checkpoints, maps, models, written_maps
from diffclip.attention import KINDS
from diffclip.base.errors import InputError
from diffclip.benchmarks import localisation, mask_scores
from diffclip.figure import figure
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_figure_is_drawn_for_several_models(tmp_path):
    for name in NAMES[:2]:
        checkpoints.save(models.build(name), tmp_path / name)
    for i in range(2):
        Image.fromarray(scenes.draw(scenes.make_scene(0, "figure", i), 64)).save(tmp_path / f"{i}.png")
    arguments = [str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--query", "a star", "--models"]
    arguments += [str(tmp_path / name) for name in NAMES[:2]]
    maps.main([*arguments, "--out", str(tmp_path / "fig.png")])
    assert np.asarray(Image.open(tmp_path / "fig.png").convert("L")).std() > 20
    with pytest.raises(InputError, match="3 queries for 2 images: give one for all, one for each, or one image"):
        maps.main([*arguments[:2], "--query", "a", "b", "c", *arguments[4:], "--out", str(tmp_path / "x.png")])


@pytest.mark.slow
def test_one_image_has_a_row_for_each_of_several_queries(tmp_path):
    checkpoints.save(models.build("DiffCLIP-tiny"), tmp_path / "run")
    Image.fromarray(scenes.draw(scenes.make_scene(0, "figure", 0), 64)).save(tmp_path / "0.png")
    sizes = []
    for queries in (["a star"], ["a star", "a dog", "two cups"]):
        figure(str(tmp_path / "0.png").split(), queries, [tmp_path / "run"], tmp_path / "fig.png")
        sizes.append(Image.open(tmp_path / "fig.png").size)
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] == 3 * sizes[0][1]


def test_what_cannot_be_drawn_or_written_is_told_before_the_work(tmp_path):
    """Before a picture or a model is read; and a model without maps before any is asked."""
    for out, said in (
        ("no/fig.png", "there is no folder .*no; make it first"),
        ("fig.bmp2", r"must end in \.png, \.pdf or \.svg"),
        (".", r"must end in"),
    ):
        with pytest.raises(InputError, match=said):
            maps.main(["absent.png", "--query", "a", "--models", "absent", "--out", str(tmp_path / out)])
    with pytest.raises(InputError, match=r"out\.txt: must end in \.json"):
        mask_scores.compare("absent.json", "absent", ["absent"], str(tmp_path / "out.txt"))
    Image.new("RGB", (48, 48)).save(tmp_path / "0.png")
    checkpoints.save(models.build("CLIP-tiny"), tmp_path / "run")
    resnet = tmp_path / "resnet"
    resnet.mkdir()
    model_cfg = {**SMALL, "vision_cfg": WITHOUT["ResNet"][0]}
    (resnet / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {"size": 32}}))
    save_file(open_clip_model("ResNet").state_dict(), resnet / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"resnet: no attention maps for this model: its ModifiedResNet"):
        figure([tmp_path / "0.png"], ["a"], [tmp_path / "run", resnet], tmp_path / "fig.png")
    assert not (tmp_path / "fig.png").exists()


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


@pytest.mark.parametrize(
    ("part", "odd", "reason"),
    [
        ("annotations", {"segmentation": {"size": [4, 4], "counts": [4, -1, 13]}}, "far outside"),
        ("annotations", {"segmentation": {"size": [-4, 4], "counts": [16]}}, "far outside"),
        ("annotations", {"category_id": 7}, "of a category that is not there"),
        ("images", {"height": -4}, "height or width"),
    ],
)
def test_masks_that_are_none_are_refused(part, odd, reason, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    runs = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": {"size": [4, 4], "counts": [4, 4, 8]}}
    image = {"id": 1, "file_name": "a.png", "height": 4, "width": 4}
    table = {"images": [image], "annotations": [runs], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "i.json").write_text(json.dumps(table))
    ((_, name, mask),) = mask_scores.read_masks(tmp_path / "i.json", tmp_path)
    assert name == "cat" and mask.sum(0).tolist() == [0, 4, 0, 0]
    table[part][0] |= odd
    (tmp_path / "i.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match=reason):
        list(mask_scores.read_masks(tmp_path / "i.json", tmp_path))


def test_masks_of_another_size_than_the_turned_image_are_refused(tmp_path):
    """A viewer turns the image by its EXIF; masks drawn without that would lie elsewhere."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    model = diffclip.build("CLIP-tiny")
    transform, tokenizer = diffclip.transforms(model.model_config, train=False), diffclip.tokenizer(model.model_config)
    masks = {shape: np.zeros(shape, bool) for shape in ((60, 40), (40, 60))}
    for mask in masks.values():
        mask[20:30, 20:30] = True
    upright = [(tmp_path / "a.jpg", "cat", masks[60, 40])]
    assert mask_scores.localise(model, transform, tokenizer, upright).shape == (1, 4)
    with pytest.raises(InputError, match=r"a\.jpg: is 40 x 60 pixels as a viewer shows it, its masks are 60 x 40"):
        mask_scores.localise(model, transform, tokenizer, [(tmp_path / "a.jpg", "cat", masks[40, 60])])


@pytest.mark.slow
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


def timm(name, side=160, pool="token", **more):
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": side} | more


POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5, "output_tokens": True}
CUSTOM = {"block_type": "custom", "qk_norm": True, "scale_attn_inner": True, "scale_attn": True}
# family -> its vision tower, which queries of the last attention its embedding is read from, and the side of its grid
TOWERS = {
    "ViT": (VIT, slice(0, 1), 4),  # OpenAI's
    "averaged": ({**VIT, "pool_type": "avg"}, slice(1, None), 4),
    "custom": ({**VIT, **CUSTOM}, slice(0, 1), 4),
    "timm": (timm("test_vit"), slice(0, 1), 10),
    "registers": (timm("test_vit2", pool="avg"), slice(1, None), 10),
    "SigLIP": (timm("test_vit3", pool="map"), slice(0, 1), 10),
    "CoCa": ({**VIT, **POOLER}, slice(0, 1), 4),
    "EVA": (timm("eva02_tiny_patch14_224", 224), slice(0, 1), 16),
}
WITHOUT = {
    "ResNet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "its ModifiedResNet is no vision transformer"),
    "ConvNeXt": (timm("test_convnext", pool="avg"), "its ConvNeXt is no vision transformer"),
    "cascade": (
        {**VIT, **POOLER, "width": 16, "head_width": 8, "attentional_pool": "cascade"},
        "its VisionTransformer is no .* with known pooling",  # of open_clip's own, which does not run in 3.3
    ),
}
FAMILIES = [name for name in TOWERS if name != "EVA"] + [pytest.param("EVA", marks=pytest.mark.slow)]


def open_clip_model(kind):
    import open_clip

    torch.manual_seed(0)
    vision = {**TOWERS, **WITHOUT}[kind][0]
    text = SMALL["text_cfg"]
    if "attentional_pool" in vision:
        multimodal = {"width": 32, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 49408}
        return open_clip.CoCa(16, multimodal, {**text, "embed_cls": True, "output_tokens": True}, vision).eval()
    made = open_clip.CLIP if kind in ("ViT", "ResNet") else open_clip.CustomTextCLIP
    return made(16, vision, open_clip.model.CLIPTextCfg(**text)).eval()


def images_for(model):
    side = model.visual.image_size
    return torch.randn(
        2, 3, *([side] * 2 if isinstance(side, int) else side), generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_maps_of_every_vision_transformer(kind):
    """Writing the maps out changes nothing, they are softmaxes, and relevance is the rule's on the right rows."""
    model, (_, rows, side) = open_clip_model(kind), TOWERS[kind]
    images, texts = images_for(model), TEXTS[:, :8]
    for layer in (0, -1):
        attention = attention_maps.vision_attention(model, layer)
        with torch.no_grad():
            plain = model.encode_image(images)
            with attention_maps.recorded(attention) as seen:
                torch.testing.assert_close(model.encode_image(images), plain, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(model.encode_image(images), plain, atol=0, rtol=0)
        torch.testing.assert_close(seen["map"].sum(-1), torch.ones(seen["map"].shape[:-1]))
        assert attention_maps.layer_maps(model, images, layer)["A1"].shape[-2:] == (side, side)

    # the map as a leaf of its own, put in the place of the module's
    leaf, forward = seen["map"].clone().requires_grad_(), attention.forward

    def given(*args, **kwargs):
        del attention.forward
        out = written_maps.written(attention, leaf, *args, **kwargs)[1]
        attention.forward = given
        return out

    attention.forward = given
    similarity = (model.encode_image(images, normalize=True) * model.encode_text(texts, normalize=True)).sum()
    (gradient,) = torch.autograd.grad(similarity, leaf)
    attention.forward = forward
    others = torch.ones(leaf.shape[2], dtype=torch.bool)
    others[rows] = False
    assert gradient[:, :, rows].abs().amax() > 0 and not gradient[:, :, others].any()
    expected = (leaf * gradient).clamp(min=0).mean(1)[:, rows].mean(1)[:, -side * side :]
    found = attention_maps.relevance(model, images, texts)
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-7, rtol=1e-3)


def test_there_is_no_layer_99():
    with pytest.raises(InputError, match="layer 99 of 2"):
        attention_maps.vision_attention(open_clip_model("ViT"), 99)


@pytest.mark.parametrize("attention_kind", KINDS)
@pytest.mark.parametrize("family", ["ViT", "registers", "CoCa"])
def test_maps_of_towers_made_differential(family, attention_kind):
    model = open_clip_model(family)
    diffclip.differentiate(model, ["vision"], kind=attention_kind)
    attention, images = attention_maps.vision_attention(model, 0), images_for(model)
    with torch.no_grad():
        plain = model.encode_image(images)
        with attention_maps.recorded(attention):
            torch.testing.assert_close(model.encode_image(images), plain, atol=1e-5, rtol=1e-4)
    two = {"A1", "A2", "difference"}
    assert attention_maps.layer_maps(model, images, 0).keys() == ({"A1"} if attention_kind == "dex" else two)
    assert attention_maps.relevance(model, images, TEXTS[:, :8]).max() > 0


def test_maps_of_torchs_attention_are_torchs():
    """Within a sequence, and of a pooling head's queries over a sequence of another width."""
    attention, x = attention_maps.vision_attention(open_clip_model("ViT"), 0), torch.randn(2, 17, 32)
    pooler, queries = attention_maps.vision_attention(open_clip_model("CoCa"), -1), torch.randn(2, 5, 16)
    for module, inputs in ((attention, (x, x, x)), (pooler, (queries, x, x))):
        out, weights = module(*inputs, need_weights=True, average_attn_weights=False)
        found, (again, _) = written_maps.written(module, None, *inputs)
        torch.testing.assert_close(found, weights)
        torch.testing.assert_close(again, out)


def test_scale_norm_of_a_tower_is_applied():
    model = open_clip_model("timm")
    attention = model.visual.trunk.blocks[-1].attn
    attention.norm = torch.nn.LayerNorm(64)
    plain = model.encode_image(images_for(model))
    with attention_maps.recorded(attention):
        torch.testing.assert_close(model.encode_image(images_for(model)), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", WITHOUT)
def test_other_towers_have_no_maps(kind):
    model = open_clip_model(kind)
    with pytest.raises(InputError, match=f"no attention maps for this model: {WITHOUT[kind][1]}"):
        attention_maps.relevance(model, images_for(model), TEXTS[:, :8])


@pytest.mark.parametrize("kind", [*FAMILIES, "ResNet", "ConvNeXt"])
def test_features_of_every_tower(kind):
    """What the projection makes of the features before it is what the model gives."""
    from diffclip.benchmarks.features import encode_image

    model = open_clip_model(kind)
    with torch.no_grad():
        before, after = encode_image(model, images_for(model))
        wanted = model.encode_image(images_for(model))
    if hasattr(model, "text_decoder"):  # CoCa normalises by itself
        after = torch.nn.functional.normalize(after, dim=-1)
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
    assert after.shape == (2, 16) and before.ndim == 2 and before.shape[1] >= 16


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
