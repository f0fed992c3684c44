"""Making any open_clip model differential: its embeddings are kept, or the option that stands in the way is named."""

import copy
import dataclasses
import inspect
import json
import math
import re

import pytest
import timm
import torch
from open_clip.factory import get_model_config
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import nn

from diffclip import warm_start
from diffclip.attention import KINDS, Differential
from diffclip.attention_maps import attention_map
from diffclip.base.backbones import TimmAttention, open_clip
from diffclip.base.errors import InputError

SMALL_TEXT = {"context_length": 12, "vocab_size": 96, "width": 32, "heads": 4, "layers": 2}
SMALL_VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
SMALL_TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32, "num_classes": 0}


def perturbed(model):
    """The model with all its numbers moved, so that norms, scales and biases count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def small(vision=None, text=None, **top):
    """An open_clip model of few numbers, with options in one of its towers."""
    top = {"embed_dim": 16, **top}
    torch.manual_seed(0)
    return perturbed(
        open_clip.CustomTextCLIP(vision_cfg=SMALL_VISION | (vision or {}), text_cfg=SMALL_TEXT | (text or {}), **top)
    )


def with_trunk(trunk):
    """An open_clip model around a timm trunk."""
    model = small({"timm_model_name": "vit_tiny_patch16_224", "image_size": 32, "timm_pool": ""})
    model.visual.trunk = trunk
    model.visual.head = nn.Identity()
    return perturbed(model)


def timm_tower(name, **options):
    torch.manual_seed(0)
    return with_trunk(timm.create_model(name, **{**SMALL_TIMM, **options}))


def embeddings(model, side):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 3, side, side, generator=generator).to(next(model.parameters()).dtype)
    text = torch.randint(1, 90, (3, 12), generator=generator)
    text[:, 7], text[:, 8:] = 95, 0
    with torch.no_grad():
        image_features, text_features = model.encode_image(images), model.encode_text(text)
    pick = lambda found: found[0] if isinstance(found, tuple) else found  # noqa: E731 - CoCa gives tokens too
    return pick(image_features), pick(text_features)


def check_kept(model, side, towers=("vision", "text"), kind="v2", lambda_init=0.3):
    before = embeddings(model, side)
    warm_start.differentiate(model, towers, kind=kind, lambda_init=lambda_init)
    assert any(isinstance(module, Differential) for module in model.modules())
    for old, new in zip(before, embeddings(model, side)):
        torch.testing.assert_close(new, old, atol=1e-5 * max(1.0, old.abs().max().item()), rtol=1e-5)


# A value of its own for every option of open_clip's towers, with what it needs beside it, and of timm's ViT; but for
# what only says how large they are or is another kind of tower.
BLOCKS = {
    "ls_init_value": {"ls_init_value": 0.5},
    "act_kwargs": {"act_kwargs": {"approximate": "tanh"}},
    "norm_kwargs": {"norm_kwargs": {"eps": 1e-3}},
    "block_type": {"block_type": "custom"},
    "qk_norm": {"qk_norm": True},
    "scale_heads": {"scale_heads": True},
    "scale_attn_inner": {"scale_attn_inner": True},
    "scale_attn": {"scale_attn": True},
    "scale_fc": {"scale_fc": True},
    "output_tokens": {"output_tokens": True},
    "final_ln_after_pool": {"final_ln_after_pool": True},
    "mlp_ratio": {"mlp_ratio": 2.0},
}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5}
OPTIONS = {
    "vision": BLOCKS
    | {
        "attentional_pool": POOLER,
        "attn_pooler_heads": POOLER | {"attn_pooler_heads": 2},
        "attn_pooler_queries": POOLER | {"attn_pooler_queries": 3},
        "no_ln_pre": {"no_ln_pre": True},
        "patch_dropout": {"patch_dropout": 0.5},
        "pool_type": {"pool_type": "avg"},
        "pos_embed_type": {"pos_embed_type": "sin_cos_2d"},
    },
    "text": BLOCKS
    | {
        "embed_cls": {"embed_cls": True},  # and so a mask of what is padding
        "pad_id": {"pad_id": 7, "embed_cls": True},
        "eos_id": {"eos_id": 95, "pool_type": "eos"},
        "no_causal_mask": {"no_causal_mask": True},
        "pool_type": {"pool_type": "last"},
        "proj_bias": {"proj_bias": True},
        "proj_type": {"proj_type": "none"},
    },
}
ELSEWHERE = {"scaled_cosine_attn", "width", "layers", "heads", "head_width", "image_size", "patch_size"}
ELSEWHERE |= {"context_length", "vocab_size"}
TIMM = {
    "global_pool": [{"global_pool": kind} for kind in ("avg", "avgmax", "max", "map", "prr")],
    "qkv_bias": [{"qkv_bias": False}],
    "qk_norm": [{"qk_norm": True}],
    "scale_attn_norm": [{"scale_attn_norm": True}],
    "scale_mlp_norm": [{"scale_mlp_norm": True}],
    "proj_bias": [{"proj_bias": False}],
    "init_values": [{"init_values": 0.5}],
    "class_token": [{"class_token": False, "global_pool": "avg"}],
    "pos_embed": [{"pos_embed": "none"}],
    "no_embed_class": [{"no_embed_class": True}],
    "reg_tokens": [{"reg_tokens": 2}, {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}],
    "pre_norm": [{"pre_norm": True}],
    "final_norm": [{"final_norm": False}],
    "fc_norm": [{"fc_norm": True}],
    "pool_include_prefix": [{"pool_include_prefix": True, "global_pool": "avg"}],
    "dynamic_img_size": [{"dynamic_img_size": True}],
    "dynamic_img_pad": [{"dynamic_img_pad": True}],
    "weight_init": [{"weight_init": "jax"}],
    "fix_init": [{"fix_init": True}],
    "embed_norm_layer": [{"embed_norm_layer": "layernorm"}],
    "norm_layer": [{"norm_layer": "rmsnorm", "qk_norm": True, "scale_attn_norm": True}],
    "act_layer": [{"act_layer": "quick_gelu"}],
    "mlp_layer": [{"mlp_layer": timm.layers.SwiGLU}],
    **{f"{what}_rate": [{f"{what}_rate": 0.5}] for what in ("drop", "pos_drop", "proj_drop", "attn_drop")},
    "patch_drop_rate": [{"patch_drop_rate": 0.5}],
    "drop_path_rate": [{"drop_path_rate": 0.5}],
}
TIMM_ELSEWHERE = {"self", "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads"}
TIMM_ELSEWHERE |= {"mlp_ratio", "device", "dtype", "embed_layer", "block_fn", "attn_layer"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower", "options"),
    [pytest.param(t, o, id=f"{t}-{name}") for t, table in OPTIONS.items() for name, o in table.items()],
)
def test_v2_keeps_the_embeddings_of_open_clip_towers_with_each_option(tower, options):
    check_kept(small(**{tower: options}), 16)


@pytest.mark.slow
@pytest.mark.parametrize("options", [option for options in TIMM.values() for option in options], ids=str)
def test_v2_keeps_the_embeddings_of_timm_towers_with_each_option(options):
    check_kept(timm_tower("vit_tiny_patch16_224", **options), 32)


def test_the_tables_have_every_option_that_open_clip_and_timm_have():
    for tower, config in (("vision", CLIPVisionCfg), ("text", CLIPTextCfg)):
        names = {field.name for field in dataclasses.fields(config)}
        names = {name for name in names if not re.match("timm_|hf_|tokenizer_", name)} - ELSEWHERE
        assert names == OPTIONS[tower].keys()
    names = inspect.signature(VisionTransformer.__init__).parameters.keys() - TIMM_ELSEWHERE
    assert names == TIMM.keys()


EVERYTHING = {"qk_norm": True, "scale_attn": True, "scale_fc": True, "scale_attn_inner": True, "scale_heads": True}
TOGETHER = [
    ({**EVERYTHING, "ls_init_value": 0.5}, {**EVERYTHING, "embed_cls": True, "ls_init_value": 0.5}),
    ({"pool_type": "avg", "no_ln_pre": True}, {"embed_cls": True, "qk_norm": True}),
    ({}, {"no_causal_mask": True, "qk_norm": True}),
]
TIMM_TOGETHER = {"qk_norm": True, "qkv_bias": False, "proj_bias": False, "init_values": 0.5, "scale_attn_norm": True}


@pytest.mark.parametrize("kind", ["v2", "dex"])
@pytest.mark.parametrize(("vision", "text"), TOGETHER)
def test_warm_starts_keep_the_embeddings_with_options_together(vision, text, kind):
    check_kept(small(vision, text), 16, kind=kind)


def everything_of_timm():
    """A timm tower with all its attention's options, the gate too, which timm's ViT itself cannot ask for."""
    model = timm_tower("vit_tiny_patch16_224", reg_tokens=2, **TIMM_TOGETHER)
    options = {"qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm}
    for block in model.visual.trunk.blocks:
        block.attn = TimmAttention(32, 4, proj_bias=False, **options)
    return perturbed(model)


@pytest.mark.parametrize("kind", ["v2", "dex"])
def test_warm_starts_keep_the_embeddings_of_a_timm_tower_with_options_together(kind):
    check_kept(everything_of_timm(), 32, kind=kind)


@pytest.mark.parametrize("kind", ["v2", "dex"])
@pytest.mark.parametrize("towers", [["vision"], ["text"], ["vision", "text"]])
def test_warm_starts_keep_the_embeddings_of_the_first_layout_and_cocas_captions(towers, kind):
    torch.manual_seed(0)
    check_kept(perturbed(open_clip.model.CLIP(16, SMALL_VISION, SMALL_TEXT)), 16, towers, kind)
    text = SMALL_TEXT | {"embed_cls": True, "output_tokens": True}
    captions = {"context_length": 12, "vocab_size": 96, "width": 32, "heads": 4, "layers": 2}
    model = perturbed(open_clip.CoCa(32, captions, text, SMALL_VISION | POOLER | {"output_tokens": True}))
    inputs = torch.randn(2, 3, 16, 16), torch.randint(1, 90, (2, 12))
    with torch.no_grad():
        model.text_decoder.text_projection.normal_()  # which open_clip leaves as the memory was
        before = model(*inputs)["logits"]
        check_kept(model, 16, towers, kind)
        torch.testing.assert_close(model(*inputs)["logits"], before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("block", ["default", "custom"])
def test_v2_is_as_near_in_bfloat16_as_the_original_is(block, autocast):
    vision, text = {"block_type": block}, {"block_type": block, "embed_cls": True}
    model = small(vision, text)
    exact = torch.cat(embeddings(model, 16))
    if not autocast:
        model = model.bfloat16()

    def error():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return (torch.cat(embeddings(model, 16)).float() - exact).norm() / exact.norm()

    before = error()
    warm_start.differentiate(model, kind="v2", lambda_init=0.3)
    assert 0 < error() < 2 * before


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [everything_of_timm, lambda: small(EVERYTHING)])
def test_norms_and_gates_before_the_output_projection_stand_behind_maps_too(make, kind):
    model = make()
    warm_start.differentiate(model, ["vision"], kind=kind)
    module = next(module for module in model.modules() if isinstance(module, Differential))
    x = torch.randn(2, 5, 32)
    assert sum(p.numel() for p in module.inner_norm.parameters()) > 0
    torch.testing.assert_close(module.apply_map(x, attention_map(module, x)), module(x), atol=1e-5, rtol=1e-4)


REFUSED = {
    "DiffAttention": lambda: timm_tower("vit_tiny_patch16_224", attn_layer="diff"),
    "scaled_cosine_attn": lambda: small({"scaled_cosine_attn": True}),
    "RelPosAttention": lambda: timm_tower("vit_relpos_medium_patch16_cls_224"),
    "EvaAttention": lambda: timm_tower("eva02_tiny_patch14_224", img_size=28),  # rotary
    "AttentionRope": lambda: timm_tower("vit_small_patch16_rope_224"),
    "ParallelScalingBlock": lambda: timm_tower(
        "vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock
    ),
    "not only .* but also by BlockOfMine": lambda: with_last_block(BlockOfMine),
    "not only .* but also by ParallelScalingBlock": lambda: with_last_block(ParallelScalingBlock),
}


class BlockOfMine(Block):
    """A block that may compute anything."""


def with_last_block(make):
    """A timm tower whose last block is of another class than the first."""
    model = timm_tower("vit_tiny_patch16_224")
    model.visual.trunk.blocks[-1] = make(32, 4)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_by_name_and_nothing_is_changed(name, kind):
    model = REFUSED[name]()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=name):
        warm_start.differentiate(model, ["text", "vision"], kind=kind)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    "make",
    [lambda: small({"qk_norm": True}, {"qk_norm": True}), lambda: timm_tower("vit_tiny_patch16_224", qk_norm=True)],
)
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_norms_of_queries_and_keys_stay_and_their_maps_are_drawn(make, kind):
    model = make()
    count = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "_norm." in name or "ln_q" in name or "ln_k" in name
    )
    warm_start.differentiate(model, kind=kind)
    attentions = [m for m in model.modules() if isinstance(m, Differential)]
    assert sum(p.numel() for a in attentions for n in (a.q_norm, a.k_norm) for p in n.parameters()) == count > 0
    module, x = attentions[0].eval(), torch.randn(1, 5, 32)
    q = module.project(x)[0]
    expected = module.q_norm(module.q_proj(x).unflatten(-1, (-1, 8))).transpose(1, 2)
    torch.testing.assert_close(q, expected)
    assert attention_map(module, x).isfinite().all()


def test_version_1_follows_its_definition_under_norms_of_queries_and_keys():
    model = timm_tower("vit_tiny_patch16_224", qk_norm=True)
    old = copy.deepcopy(model.visual.trunk.blocks[0].attn)
    warm_start.differentiate(model, ["vision"], lambda_init=0.4)
    new, x = model.visual.trunk.blocks[0].attn, torch.randn(2, 5, 32)
    q, k, v = old.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    maps = (old.q_norm(q) @ old.k_norm(k).transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    values = v.unflatten(1, (2, 2)).transpose(2, 3).flatten(3)  # a pair's two values side by side
    mixed = (maps[:, 0::2] - new.compute_lambda() * maps[:, 1::2]) @ values
    mixed = mixed / (mixed.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * new.diff_norm.weight * 0.6
    torch.testing.assert_close(new(x), old.proj(mixed.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-4)


def shipped():
    """(name, config) of the architectures that open_clip ships, of those alike but for their size one."""
    sizes = r"tiny|small|medium|base|x*large|giant(opt)?|gigantic|enormous|so400m|patch|window|\d+"
    ours = ("image_size", "patch_size", "head_width", "mlp_ratio", "context_length", "vocab_size", "tokenizer_kwargs")
    seen = {}
    for name in open_clip.list_models():
        config = get_model_config(name)
        shape = {"vision": dict(config["vision_cfg"]), "text": dict(config["text_cfg"])}
        for tower in shape.values():
            for key in (*ours, *SMALL_TEXT):
                tower.pop(key, None)
            for key in [key for key in tower if key.startswith("hf_")]:
                del tower[key]
        if timm_name := shape["vision"].get("timm_model_name"):
            shape = {"timm": re.sub(sizes, "", timm_name), "text": shape["text"]}
        shape["resnet"] = isinstance(config["vision_cfg"].get("layers"), list)
        seen.setdefault(json.dumps(shape, sort_keys=True), (name, config))
    return list(seen.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [pytest.param(n, c, id=n) for n, c in shipped()])
def test_every_architecture_of_open_clip_keeps_its_embeddings_or_is_refused(name, config):
    vision = config["vision_cfg"]
    text = {k: v for k, v in config["text_cfg"].items() if not k.startswith(("hf_", "tokenizer"))} | SMALL_TEXT
    if "timm_model_name" not in vision and not isinstance(vision["layers"], list):
        patch = vision["patch_size"]
        check_kept(small({**vision, **SMALL_VISION, "patch_size": patch, "image_size": 2 * patch}, text), 2 * patch)
        return
    with torch.device("meta"):
        whole = open_clip.CustomTextCLIP(16, vision | {"timm_model_pretrained": False}, text)
    trunk = getattr(whole.visual, "trunk", None)
    if isinstance(trunk, VisionTransformer):
        hybrid = type(trunk.patch_embed).__name__ == "HybridEmbed"  # whose width its convolutions decide
        options = {"embed_dim": trunk.embed_dim} if hybrid else {}
        check_kept(timm_tower(vision["timm_model_name"], img_size=64, **options), 64)
    else:
        with pytest.raises(InputError, match="0 blocks with self-attention known here"):
            warm_start.differentiate(whole, kind="v2")


def test_text_towers_of_transformers_are_refused_by_name_and_the_vision_tower_stays():
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    model = small()
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=96)
    model.text = HFTextEncoder("", output_dim=16, config=config, proj_type="linear")
    before = model.state_dict().keys()
    with pytest.raises(InputError, match=r"HFTextEncoder has 0 blocks.*BertSelfAttention"):
        warm_start.differentiate(model, kind="v2")
    assert model.state_dict().keys() == before
