"""Every entry of the table of kinds through all that asks for it: what fails here is what a new kind has forgotten."""

import copy
import json
import pickle
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import AutoModel

import diffclip
from diffclip import attention, attention_maps, checkpoints, hf, variants, warm_start
from diffclip.attention import KINDS, Differential
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from stages.settings import PretrainConfig

IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
TEXTS = torch.randint(1, 300, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    """A small dual encoder with this kind in both towers, its numbers moved so that all of them count."""
    config = copy.deepcopy(variants.MODELS["CLIP-tiny"])
    lambda_init = KINDS[kind].default_lambda_init
    towers = {tower: variants.attention(kind, lambda_init) for tower in variants.TOWERS}
    config["diffclip"] |= {"attention": towers, "variant": "custom"}
    torch.manual_seed(0)
    built = diffclip.build(config).eval()
    with torch.no_grad():
        for module in attentions(built):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    attention.set_annealing(built, 0.5)
    return built


def attentions(model):
    return [module for module in model.modules() if isinstance(module, Differential)]


def start(module):
    """Where lambda starts: dex anneals it in."""
    return 0 if module.name == "dex" else module.lambda_init


def features(model):
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(TEXTS)


def test_it_has_all_that_is_its_own_to_write(kind):
    own = ("forward", "maps", "apply_map", "start_from", "reset_lambdas", "mean_lambda", "added", "timed")
    assert [name for name in own if getattr(KINDS[kind], name) is getattr(Differential, name)] == []
    default = KINDS[kind].default_lambda_init
    assert default == "schedule" or 0 < default < 1
    assert kind in get_args(get_type_hints(PretrainConfig)["attention"]), "stages/settings.py does not offer it"


def test_what_it_says_it_adds_is_what_ordinary_attention_has_not(kind):
    module, width = KINDS[kind](32, 4), 32
    parameters = dict(module.named_parameters())
    added = sum(
        parameters[name].numel() if rows is None else parameters[name][rows].numel()
        for name, rows in module.added().items()
    )
    assert sum(p.numel() for p in parameters.values()) - added == 4 * width * (width + 1)


@pytest.mark.slow
def test_it_is_built_into_both_towers_and_every_number_learns(model, kind):
    layers = len(model.visual.trunk.blocks) + len(model.transformer.resblocks)
    assert [isinstance(module, KINDS[kind]) for module in attentions(model)] == [True] * layers
    fresh = copy.deepcopy(model).train()
    (fresh.encode_image(IMAGES).square().sum() + fresh.encode_text(TEXTS).square().sum()).backward()
    still = [
        f"{i} {name}"
        for i, module in enumerate(attentions(fresh))
        for name, p in module.named_parameters()
        if not p.grad.any()
    ]
    assert [name for name in still if "k_proj.bias" not in name] == []  # of which a softmax takes no notice


def test_lambda_starts_from_lambda_init(kind):
    torch.manual_seed(0)
    for module in (KINDS[kind](32, 4), KINDS[kind](32, 4, lambda_init=0.3)):
        module.reset_lambdas()
        assert module.mean_lambda() == pytest.approx(start(module), abs=0.2)


@pytest.mark.parametrize("mask", ["none", "causal", "additive", "per head"])
def test_its_forms_agree_and_its_map_is_the_one_applied(mask, kind):
    x, bias = torch.randn(2, 7, 32), torch.randn(7, 7)
    given = {"causal": {"is_causal": True}, "additive": {"attn_mask": bias}}.get(mask, {})
    given = {"attn_mask": torch.randn(2, 4, 7, 7)} if mask == "per head" else given
    outputs = []
    for form in ("eager", "fused", "auto"):
        torch.manual_seed(0)
        module = KINDS[kind](32, 4, attn_implementation=form).eval()
        attention.set_annealing(module, 0.5)
        outputs.append(module(x, **given))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=1e-4)
    map_ = attention_maps.attention_map(module, x, **given)
    assert map_.shape[0] == 2 and map_.shape[2:] == (7, 7)
    torch.testing.assert_close(module.apply_map(x, map_), outputs[2], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [2, 4])
def test_a_mask_for_each_head_needs_no_batch(heads, kind):
    x, planes = torch.randn(2, 7, 32), torch.randn(heads, 7, 7)
    for form in KINDS[kind].forms:
        torch.manual_seed(0)
        module = KINDS[kind](32, heads, attn_implementation=form).eval()
        expected = module(x, attn_mask=planes.expand(2, heads, 7, 7))
        assert torch.allclose(module(x, attn_mask=planes), expected, atol=1e-6), form


@pytest.mark.slow
def test_it_is_saved_and_loaded_as_encoder_and_by_the_auto_classes(model, kind, tmp_path):
    diffclip.save(model, tmp_path)
    again = diffclip.load(tmp_path)[0]
    assert again.model_config == model.model_config
    assert all(torch.equal(a, b) for a, b in zip(features(again), features(model)))
    tower = hf.DiffCLIPVisionModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        outputs = tower(IMAGES, output_attentions=True)
        torch.testing.assert_close(outputs.pooler_output, model.visual.trunk(IMAGES), atol=1e-5, rtol=1e-5)
    assert all(isinstance(module, KINDS[kind]) for module in attentions(tower))
    assert len(outputs.attentions) == 4 and outputs.attentions[0].shape[2:] == (37, 37)
    drawn = AutoModel.from_config(hf.vision_config(model.model_config))  # as what a file lacks is drawn
    for module in attentions(drawn):
        assert module.mean_lambda() == pytest.approx(start(module), abs=0.2)


def test_its_maps_and_relevance_are_drawn(model, kind):
    maps = attention_maps.layer_maps(model, IMAGES)
    assert maps.keys() == ({"A1"} if kind == "dex" else {"A1", "A2", "difference"})
    assert all(map_.shape[-2:] == (6, 6) for map_ in maps.values())
    heat = attention_maps.relevance(model, IMAGES, TEXTS)
    assert heat.shape == (2, 6, 6) and heat.min() >= 0 and heat.max() > 0


@pytest.mark.parametrize("block", ["residual", "custom"])
def test_it_takes_the_place_of_attention_in_each_of_open_clips_blocks(block, kind):
    text = {"context_length": 12, "vocab_size": 96, "width": 32, "heads": 4, "layers": 2, "embed_cls": True}
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
    towers = [tower | ({"block_type": "custom"} if block == "custom" else {}) for tower in (vision, text)]
    model = open_clip.CustomTextCLIP(16, *towers).eval()
    warm_start.differentiate(model, kind=kind)
    assert [isinstance(module, KINDS[kind]) for module in attentions(model)] == [True] * 4
    again = pickle.loads(pickle.dumps(model))
    tokens = torch.tensor(
        [[5, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]]
    )  # padding masked
    for one, other in zip(
        (model.encode_image(IMAGES[:, :, :16, :16]), model.encode_text(tokens)),
        (again.encode_image(IMAGES[:, :, :16, :16]), again.encode_text(tokens)),
    ):
        assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.slow
def test_the_official_layout_holds_it_or_refuses_it(model, kind, tmp_path):
    diffclip.save(model, tmp_path / "run")
    if KINDS[kind].in_official_layout:
        with pytest.warns(UserWarning, match="by hand: vision_norm_eps"):
            checkpoints.convert(tmp_path / "run", tmp_path / "official.pt")
        assert all(
            torch.equal(a, b) for a, b in zip(features(diffclip.load(tmp_path / "official.pt")[0]), features(model))
        )
    else:
        with pytest.raises(InputError, match=f"has no differential attention {kind}"):
            checkpoints.convert(tmp_path / "run", tmp_path / "official.pt")
        assert not (tmp_path / "official.pt").exists()


def test_a_kind_is_found_by_its_name_and_by_the_number_of_earlier_releases():
    assert {how["kind"] for towers in variants.VARIANTS.values() for how in towers.values()} <= KINDS.keys()
    assert [attention.kind(number) for number in (1, 2)] == [KINDS["v1"], KINDS["v2"]]
    assert all(attention.kind(name) is found and found.name == name for name, found in KINDS.items())
    for unknown in (9, "v9"):
        with pytest.raises(InputError, match=f"attention must be v1.* or .*: got {unknown!r}"):
            warm_start.differentiate(diffclip.build("CLIP-tiny"), kind=unknown)


def test_models_that_hold_the_old_numbers_are_read(tmp_path):
    built = diffclip.build("DiffCLIP-V2-tiny").eval()
    diffclip.save(built, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        assert config[tower]["attention_version"] == "v2"
        config[tower]["attention_version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [module.name for module in attentions(AutoModel.from_pretrained(tmp_path))] == ["v2"] * 7
