"""Any CLIP in, any CLIP out: each way to name a dual encoder gives its own outputs, and saving gives them back."""

import json
import warnings

import pytest
import torch
from clips import OPEN_CLIP, TEXT, VIT, siglip_directory, small_siglip
from PIL import Image
from safetensors.torch import save_file

import diffclip
from diffclip import architectures, checkpoints
from diffclip.attention import Differential, base
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError

SIGLIP_TEXT = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
CONFIGS = {
    "any-ViT": OPEN_CLIP,
    "any-custom": {"embed_dim": 16, "custom_text": True, "vision_cfg": {**VIT, "qk_norm": True}, "text_cfg": TEXT},
    "any-sig": {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**TIMM, "timm_pool": "avg", "timm_proj": "none"},
        "text_cfg": {**TEXT, **SIGLIP_TEXT},
    },
    "any-CoCa": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    },
    "any-timm": {"embed_dim": 16, "vision_cfg": TIMM, "text_cfg": TEXT},
}
TEXTS = ["a red square", "two stars and a long caption that has more than twelve tokens in it, by far"]


@pytest.fixture(autouse=True)
def one_form(monkeypatch):
    """Towers with a causal mask and with a flag for it are timed apart, and which of two forms wins by a hair is
    chance; they differ in the last digits, which are compared here.
    """
    monkeypatch.setattr(base, "fastest", lambda kind, forms, *_: forms[-1])


@pytest.fixture(scope="module", autouse=True)
def architectures_of_open_clip(tmp_path_factory):
    """open_clip knows our small architectures while this file's tests run."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    for name in CONFIGS:
        del open_clip.factory._MODEL_CONFIGS[name]


def made(name, **options):
    torch.manual_seed(0)
    model = open_clip.create_model(name, **options).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.5)  # so that a scale which was not loaded shows
        if hasattr(model, "text_decoder"):
            model.text_decoder.text_projection.zero_()  # open_clip leaves what lay in the memory
    return model


@torch.no_grad()
def outputs(model, tokenize, size):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    features = [model.encode_image(pixels), model.encode_text(tokenize(TEXTS))]
    return [*features, model.logit_scale.exp(), *([] if model.logit_bias is None else [model.logit_bias])]


def equal(found, expected, atol=0.0):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


def size_of(model):
    return architectures.preprocess_cfg_of(model)["size"]


# How it is named


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["training file", "compiled training file", "safetensors"])
def test_an_architecture_with_a_file_is_what_open_clip_loads(name, form, tmp_path):
    theirs = made(name)
    state, path = theirs.state_dict(), tmp_path / ("w.safetensors" if form == "safetensors" else "epoch_5.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        prefix = "module._orig_mod." if form.startswith("compiled") else "module."
        optimizer = torch.optim.AdamW(theirs.parameters()).state_dict()
        content = {"epoch": 5, "name": "run", "optimizer": optimizer}
        torch.save({**content, "state_dict": {f"{prefix}{k}": t for k, t in state.items()}}, path)
    model, transform, tokenizer = diffclip.load(f"open_clip:{name}@{path}")
    equal(outputs(model, tokenizer, size_of(theirs)), outputs(theirs, open_clip.get_tokenizer(name), size_of(theirs)))
    assert str(size_of(theirs)) in repr(transform)
    diffclip.save(model, tmp_path / "saved")
    again, _, tokenizer = diffclip.load(tmp_path / "saved")
    equal(outputs(again, tokenizer, size_of(theirs)), outputs(model, tokenizer, size_of(theirs)))
    assert again.model_config == model.model_config


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_directories_of_open_clip_in_each_spelling(name, tmp_path):
    theirs = made(name)
    cfg = {"model_cfg": CONFIGS[name], "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    expected = outputs(theirs, open_clip.get_tokenizer(name), size_of(theirs))
    for spelt in (tmp_path, f"local-dir:{tmp_path}", f"open_clip:local-dir:{tmp_path}"):
        model, transform, tokenizer = diffclip.load(spelt)
        equal(outputs(model, tokenizer, size_of(theirs)), expected)
    plain = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    from PIL import Image

    image = Image.effect_noise((200, 90), 40).convert("RGB")
    assert torch.equal(transform(image), plain(image))


def test_a_directory_that_leaves_the_image_size_to_the_model_has_the_models(tmp_path):
    tower = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    cfg = {
        "embed_dim": 16,
        "vision_cfg": tower,
        "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": cfg, "preprocess_cfg": {"std": [1, 1, 1]}})
    )
    save_file(open_clip.CLIP(**cfg).state_dict(), tmp_path / "open_clip_model.safetensors")
    _, transform, _ = diffclip.load(tmp_path)
    assert transform(Image.new("RGB", (100, 50))).shape == (3, 32, 32)


def test_a_tag_brings_its_preprocessing_and_its_activation(tmp_path, monkeypatch):
    theirs = made("any-ViT", force_quick_gelu=True)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    tag = {"file": str(tmp_path / "w.safetensors"), "mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4), "quick_gelu": True}
    tag |= {"interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "any-ViT", {"mine": tag})
    model, transform, tokenizer = diffclip.load("open_clip:any-ViT@mine")
    equal(outputs(model, tokenizer, 32), outputs(theirs, open_clip.get_tokenizer("any-ViT"), 32))
    assert "0.4" in repr(transform) and "bilinear" in repr(transform)
    with pytest.raises(InputError, match=r"open_clip:any-ViT@minn: neither a file nor weights.*did you mean mine"):
        diffclip.load("open_clip:any-ViT@minn")
    with pytest.raises(InputError, match=r"write open_clip:any-ViT@TAG, with TAG one of mine, or @FILE"):
        diffclip.load("open_clip:any-ViT")


REFUSED = {
    "open_clip:any-VIT@x": "has no architecture any-VIT; did you mean any-ViT",
    "open_clip:ViT-B-32@laion2b_s34b_b79k": "its weights are not in reach",
    "nobody/nothing": "nor a Hub repository in reach",
    "": "'' names no model",
    "hf-hub:": "'hf-hub:' names no model",
    "open_clip:local-dir:": "names no model",
    "hf-hub:nobody/nothing": "nor a Hub repository in reach",
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_lead_nowhere_say_why(name):
    with pytest.raises(InputError, match=REFUSED[name]):
        diffclip.load(name)


def test_files_say_what_they_look_like(tmp_path):
    path = tmp_path / "epoch_5.pt"
    torch.save({"state_dict": {f"module.{k}": t for k, t in made("any-ViT").state_dict().items()}}, path)
    with pytest.raises(InputError, match=r"weights of an open_clip model: give open_clip:ARCHITECTURE@.*epoch_5.pt"):
        diffclip.load(path)
    with pytest.raises(InputError, match=r"epoch_5.pt: does not fit the model, nothing was loaded"):
        diffclip.load(f"open_clip:any-timm@{path}")
    torch.save(small_siglip(torch.Generator()).state_dict(), path)
    with pytest.raises(InputError, match=r"transformers' CLIPModel or SiglipModel: give the folder"):
        diffclip.load(path)
    torch.save({"trunk.cls_token": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="a vision tower alone"):
        diffclip.load(path)


def test_slips_own_head_is_left_out_with_a_notice(tmp_path):
    from diffclip import official

    model = diffclip.build("CLIP-tiny")
    state = {f"module.{k}": t for k, t in official.to_official(model.state_dict()).items()}
    state |= {"module.image_mlp.layer1.weight": torch.zeros(4, 4), "module.image_mlp.bn1.running_mean": torch.zeros(4)}
    torch.save({"state_dict": state}, tmp_path / "slip_small_25ep.pt")
    with pytest.warns(UserWarning, match="image_mlp, SLIP's head"):
        loaded = diffclip.load(tmp_path / "slip_small_25ep.pt", heads=(4, 4))[0]
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in loaded.state_dict().items())


# transformers' SigLIP


def test_a_siglip_of_transformers_gives_its_features_and_is_saved_with_its_inputs(tmp_path):
    theirs = small_siglip(torch.Generator().manual_seed(3))
    siglip_directory(tmp_path / "hf", theirs)
    model, transform, tokenizer = diffclip.load(tmp_path / "hf")
    pixels, ids = torch.randn(2, 3, 32, 32), tokenizer(TEXTS)
    with torch.no_grad():
        outputs = theirs(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(
            model.encode_image(pixels, normalize=True), outputs.image_embeds, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(model.encode_text(ids, normalize=True), outputs.text_embeds, atol=1e-5, rtol=1e-4)
        logits = model.get_logits(pixels, ids)[0]
        torch.testing.assert_close(logits, outputs.logits_per_image, atol=1e-4, rtol=1e-4)
    assert ids.shape == (2, 8)
    diffclip.save(diffclip.differentiate(model, ["vision"], kind="v2"), tmp_path / "saved")
    again, transform_again, tokenizer_again = diffclip.load(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(pixels), model.encode_image(pixels), atol=0, rtol=0)
    assert torch.equal(tokenizer_again(TEXTS), ids)
    from PIL import Image

    image = Image.effect_noise((50, 90), 40).convert("RGB")
    assert torch.equal(transform_again(image), transform(image)) and transform(image).shape == (3, 32, 32)


# Differential, and saved


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_differentiated_models_of_open_clip_are_saved_whole(name, kind, tmp_path):
    theirs = made(name)
    diffclip.differentiate(theirs, ["vision"], lambda_init=0.3, kind=kind)
    diffclip.differentiate(theirs, ["text"], lambda_init=[0.4, 0.6], kind=kind)  # one after the other, each in its way
    diffclip.save(theirs, tmp_path)
    model, _, tokenizer = diffclip.load(tmp_path)
    equal(outputs(model, tokenizer, size_of(theirs)), outputs(theirs, tokenizer, size_of(theirs)))
    attention = model.model_config["diffclip"]["attention"]
    assert [attention[tower]["lambda_init"] for tower in ("vision", "text")] == [0.3, [0.4, 0.6]]
    assert sum(isinstance(module, Differential) for module in model.modules()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["any-ViT", "any-timm"])
def test_another_image_size_is_saved_with_it(name, tmp_path):
    theirs = made(name)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    size = {"any-ViT": 48, "any-timm": 96}[name]
    forced = open_clip.create_model(name, force_image_size=size).eval()
    open_clip.factory.load_checkpoint(forced, str(tmp_path / "w.safetensors")) if name == "any-ViT" else None
    if name == "any-timm":
        forced = made(name)
        forced.visual.set_input_size(size)
    model = architectures.with_image_size(diffclip.load(f"open_clip:{name}@{tmp_path / 'w.safetensors'}")[0], size)
    tokenizer = open_clip.get_tokenizer(name)
    equal(outputs(model, tokenizer, size), outputs(forced, tokenizer, size), atol=1e-6)
    for number, other in enumerate((model, forced)):
        diffclip.differentiate(other, ["vision"], kind="v2")
        diffclip.save(other, tmp_path / str(number))
        again, transform, _ = diffclip.load(tmp_path / str(number))
        equal(outputs(again, tokenizer, size), outputs(other, tokenizer, size))
        assert str(size) in repr(transform)


def test_locked_parameters_stay_locked():
    model = made("any-ViT")
    model.lock_image_tower()
    diffclip.differentiate(model, kind="v2")
    assert not any(p.requires_grad for p in model.visual.parameters())
    assert all(p.requires_grad for p in model.transformer.parameters())


@pytest.mark.slow
def test_wrappers_are_taken_off(tmp_path):
    theirs = made("any-ViT")
    expected = outputs(theirs, open_clip.get_tokenizer("any-ViT"), 32)
    averaged = torch.optim.swa_utils.AveragedModel(theirs)
    inside = made("any-ViT")
    inside.visual = torch.compile(inside.visual, backend="eager")
    for number, wrapped in enumerate(
        (torch.compile(theirs, backend="eager"), averaged, torch.compile(averaged, backend="eager"), inside)
    ):
        diffclip.save(wrapped, tmp_path / str(number))
        model, _, tokenizer = diffclip.load(tmp_path / str(number))
        equal(outputs(model, tokenizer, 32), expected)


def test_what_no_config_describes_is_refused_and_nothing_is_written(tmp_path):
    model = made("any-ViT")
    model.visual.ln_pre.eps = 0.5
    with pytest.raises(InputError, match=r"cannot save this CLIP.*add_model_config"):
        diffclip.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_is_not_in_reach_is_named_at_saving_and_at_loading(tmp_path):
    config = {**CONFIGS["any-sig"], "text_cfg": {**TEXT, "layers": 1, "hf_tokenizer_name": "nobody/tokens"}}
    (tmp_path / "any-sig-2.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "any-sig-2.json")
    try:
        with pytest.warns(UserWarning, match=r"saved without its tokenizer: .*nobody/tokens"):
            diffclip.save(made("any-sig-2"), tmp_path / "run")
        with pytest.raises(InputError, match="nobody/tokens cannot be read"):
            diffclip.load(tmp_path / "run")
    finally:
        del open_clip.factory._MODEL_CONFIGS["any-sig-2"]


@pytest.mark.slow
def test_directories_of_the_first_release_load(tmp_path):
    """Their configs had one kind of attention for all towers."""
    for name, old in {
        "DiffCLIP-star-tiny": {"towers": ["vision", "text"], "lambda_init": "schedule", "schedule_base": 0},
        "DiffCLIP-dagger-tiny": {"towers": ["vision"], "lambda_init": 0.8, "schedule_base": 0},
        "DiffCLIP-V2-tiny": {"towers": ["vision", "text"], "lambda_init": 0.5, "schedule_base": 0, "version": 2},
        "CLIP-tiny": {"towers": []},
    }.items():
        model = diffclip.build(name).eval()
        diffclip.save(model, tmp_path / name)
        path = tmp_path / name / checkpoints.CONFIG
        config = json.loads(path.read_text())
        del config["diffclip"]["attention"]
        path.write_text(json.dumps({**config, "diffclip": {**config["diffclip"], **old}}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again, _, tokenizer = diffclip.load(tmp_path / name)
        assert again.model_config == model.model_config
        equal(outputs(again, tokenizer, 48), outputs(model, tokenizer, 48))
