"""Making any open_clip model differential: its embeddings are kept, or the option that stands in the way is named."""

import copy
import json
import math
import re

import open_clip
import pytest
import timm
import torch
from open_clip.factory import get_model_config
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from diffclip import warm_start
from diffclip.attention import Differential
from diffclip.attention_maps import attention_map
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
    images = torch.randn(3, 3, side, side, generator=generator)
    text = torch.randint(1, 90, (3, 12), generator=generator)
    text[:, 7], text[:, 8:] = 95, 0
    with torch.no_grad():
        image_features, text_features = model.encode_image(images), model.encode_text(text)
    pick = lambda found: found[0] if isinstance(found, tuple) else found  # noqa: E731 - CoCa gives tokens too
    return pick(image_features), pick(text_features)


def check_kept(model, side, towers=("vision", "text")):
    before = embeddings(model, side)
    warm_start.differentiate(model, towers, kind="v2", lambda_init=0.3)
    for old, new in zip(before, embeddings(model, side)):
        torch.testing.assert_close(new, old, atol=1e-5 * max(1.0, old.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True},
        {"scale_attn": True, "scale_fc": True, "qk_norm": True},
        {"block_type": "custom"},
        {"ls_init_value": 0.5},
        {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}},
    ],
)
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_v2_keeps_the_embeddings_of_open_clip_towers_with_each_option(tower, options):
    check_kept(small(**{tower: options}), 16)


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 4}, {"embed_cls": True}),
        ({"pool_type": "avg", "no_ln_pre": True}, {"embed_cls": True, "qk_norm": True}),
        ({"pos_embed_type": "sin_cos_2d"}, {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}),
        ({"final_ln_after_pool": True}, {"pool_type": "eos", "eos_id": 95}),
        ({}, {"no_causal_mask": True, "qk_norm": True}),
    ],
)
def test_v2_keeps_the_embeddings_beside_other_options(vision, text):
    check_kept(small(vision, text), 16)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"qk_norm": True, "qkv_bias": False, "proj_bias": False, "init_values": 0.5},
        {"reg_tokens": 2, "class_token": False, "no_embed_class": True, "global_pool": "avg"},
        {"pos_embed": "none", "scale_mlp_norm": True, "pre_norm": True},
        {"class_token": False, "global_pool": "map"},
    ],
)
def test_v2_keeps_the_embeddings_of_timm_towers_with_each_option(options):
    check_kept(timm_tower("vit_tiny_patch16_224", **options), 32)


REFUSED = {
    "scale_norm": lambda: timm_tower("vit_tiny_patch16_224", scale_attn_norm=True),
    "DiffAttention": lambda: timm_tower("vit_tiny_patch16_224", attn_layer="diff"),
    "scale_attn_inner": lambda: small({"scale_attn_inner": True}),
    "scale_heads": lambda: small({"scale_heads": True}),
    "scaled_cosine_attn": lambda: small({"scaled_cosine_attn": True}),
    "RelPosAttention": lambda: timm_tower("vit_relpos_medium_patch16_cls_224"),
    "EvaAttention": lambda: timm_tower("eva02_tiny_patch14_224", img_size=28),  # rotary
    "AttentionRope": lambda: timm_tower("vit_small_patch16_rope_224"),
    "ParallelScalingBlock": lambda: timm_tower(
        "vit_tiny_patch16_224", block_fn=timm.models.vision_transformer.ParallelScalingBlock
    ),
}


@pytest.mark.parametrize("kind", ["v1", "v2"])
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
