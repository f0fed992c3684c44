"""Differential attention V2 against a loop written from the definition, and as a warm start of pretrained models."""

import pytest
import timm
import torch
from timm.layers import Attention

from diffclip import checkpoints, hf, models, warm_start
from diffclip.attention import DifferentialAttentionV2
from diffclip.attention_maps import attention_map, both_maps
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError

FORMS = ("eager", "fused")


def random_attention(dim=48, heads=4, dtype=torch.float64, **options):
    """Attention with peaky maps and lambdas that differ between tokens and heads."""
    torch.manual_seed(0)
    module = DifferentialAttentionV2(dim, heads, **options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=2 / dim**0.5 if parameter.ndim == 2 else 0.3)
    return module


def by_definition(module, x, mask):
    """One image, one head, one query at a time: two queries, one key and value; mask (tokens, tokens) is additive."""
    d, outs = module.head_dim, []
    q, k, v, lambdas = module.q_proj(x), module.k_proj(x), module.v_proj(x), module.lambda_proj(x)
    for image in range(len(x)):
        heads = []
        for j in range(module.num_heads):
            keys, values = k[image, :, d * j : d * (j + 1)], v[image, :, d * j : d * (j + 1)]
            rows = []
            for token in range(x.shape[1]):
                maps = []
                for query in (2 * j, 2 * j + 1):
                    scores = keys @ q[image, token, d * query : d * (query + 1)] / d**0.5 + mask[token]
                    maps.append(scores.exp() / scores.exp().sum())
                weight = 1 / (1 + (-lambdas[image, token, j]).exp())
                rows.append((maps[0] - weight * maps[1]) @ values)
            heads.append(torch.stack(rows))
        outs.append(torch.cat(heads, dim=-1))
    return module.out_proj(torch.stack(outs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "additive", "per head"])
def test_equals_the_definition_written_as_loops(form, kind):
    module, tokens = random_attention(attn_implementation=form), 7
    x = torch.randn(2, tokens, 48, dtype=torch.float64)
    bias = torch.randn(tokens, tokens, dtype=torch.float64)
    allowed = (bias < 0.5) | torch.eye(tokens, dtype=torch.bool)
    causal = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    arguments, mask = {
        "none": ({}, torch.zeros_like(bias)),
        "causal": ({"is_causal": True}, causal),
        "boolean": ({"attn_mask": allowed}, torch.zeros_like(bias).masked_fill(~allowed, -torch.inf)),
        "additive": ({"attn_mask": bias}, bias),
        "per head": ({"attn_mask": bias.expand(2, 4, tokens, tokens)}, bias),
    }[kind]
    torch.testing.assert_close(module(x, **arguments), by_definition(module, x, mask), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-5), (torch.bfloat16, 0.2)])
def test_forms_agree_forward_and_backward(dtype, atol):
    x = torch.randn(2, 9, 48, dtype=dtype)
    results = []
    for form in FORMS:
        module = random_attention(dtype=dtype, attn_implementation=form)
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        out.square().mean().backward()
        results.append([out.detach(), inputs.grad, *(p.grad for p in module.parameters())])
    for eager, fused in zip(*results):
        torch.testing.assert_close(eager, fused, atol=atol, rtol=atol)


@pytest.mark.parametrize(("name", "lambda_init"), [("ViT-B-32", 0.5), ("ViT-B-16-SigLIP", 0.01)])
def test_warm_start_keeps_an_open_clip_models_embeddings(name, lambda_init):
    """With fewer and narrower layers than the real ones have."""
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    text |= {"width": 64, "heads": 4, "layers": 4, "vocab_size": 300}
    torch.manual_seed(1)
    if name == "ViT-B-32":
        model = open_clip.CLIP(64, vision | {"width": 64, "head_width": 16, "layers": 4}, text)
    else:
        small = {"img_size": 224, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 0}
        model = open_clip.CustomTextCLIP(64, vision | {"timm_model_name": "vit_tiny_patch16_224"}, text)
        model.visual.trunk = timm.create_model(vision["timm_model_name"], **small)
    model = model.double().eval()
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    texts = torch.randint(1, 300, (2, model.context_length))
    before = model.encode_image(images), model.encode_text(texts)
    warm_start.differentiate(model, kind="v2", lambda_init=lambda_init)
    assert sum(isinstance(m, DifferentialAttentionV2) for m in model.modules()) == 8
    for old, new in zip(before, (model.encode_image(images), model.encode_text(texts))):
        torch.testing.assert_close(new, old, atol=1e-8, rtol=1e-6)


def test_warm_started_queries_part_in_training():
    attention = Attention(32, num_heads=4, qkv_bias=True)
    holder = models.vision_trunk(
        {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 8, "mlp_ratio": 2.0}, 1e-6
    )
    holder.blocks[0].attn = attention
    warm_start.differentiate_tower(holder, [0.3], kind="v2")
    module = holder.blocks[0].attn
    queries = module.q_proj.weight.unflatten(0, (4, 2, 8))
    assert torch.equal(queries[:, 0], queries[:, 1])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(4, 5, 32)).square().mean().backward()
        optimizer.step()
    queries = module.q_proj.weight.unflatten(0, (4, 2, 8))
    assert not torch.allclose(queries[:, 0], queries[:, 1], atol=1e-7)
    assert module.lambda_proj.weight.abs().max() > 0  # tokens choose their lambda


def test_from_scratch_shares_the_baselines_start_but_not_its_second_queries():
    built = []
    for name in ("CLIP-tiny", "DiffCLIP-V2-tiny"):
        torch.manual_seed(0)
        built.append(models.build(name))
    plain, v2 = built[0].visual.trunk.blocks[1].attn, built[1].visual.trunk.blocks[1].attn
    queries = v2.q_proj.weight.unflatten(0, (4, 2, 32))
    assert torch.equal(queries[:, 0].flatten(0, 1), plain.qkv.weight[:128])
    assert torch.equal(v2.out_proj.weight, plain.proj.weight)
    first, second = queries[:, 0], queries[:, 1]
    assert 0.9 < second.std() / first.std() < 1.1
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05
    assert built[1].model_config["diffclip"]["variant"] == "DiffCLIP-V2"


def test_parameter_count_at_full_size():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in models.build(f"{v}-B-16").parameters()) for v in ("CLIP", "DiffCLIP-V2")]
    vision, text = ((d * d + d + (d + 1) * h) * 12 for d, h in ((768, 12), (512, 8)))
    assert counts[1] - counts[0] == vision + text


def test_maps_multiply_the_values():
    module = random_attention()
    x = torch.randn(2, 6, 48, dtype=torch.float64)
    _, _, v = module.project(x)
    mixed = attention_map(module, x) @ v
    torch.testing.assert_close(module(x), module.out_proj(mixed.transpose(1, 2).flatten(2)))
    first, second, lambda_ = both_maps(module, x)
    torch.testing.assert_close(attention_map(module, x).sum(-1, keepdim=True), 1 - lambda_)
    assert first.shape == second.shape == (2, 4, 6, 6) and lambda_.shape == (2, 4, 6, 1)


def test_saved_model_loads_as_encoder_and_as_tower_but_not_as_official_file(tmp_path):
    torch.manual_seed(0)
    model = models.build("DiffCLIP-V2-tiny").eval()
    checkpoints.save(model, tmp_path / "run")
    again, _, _ = checkpoints.load(tmp_path / "run")
    image = torch.randn(2, 3, 48, 48)
    assert torch.equal(again.encode_image(image), model.encode_image(image))
    tower = hf.DiffCLIPVisionModel.from_pretrained(tmp_path / "run").eval()
    torch.testing.assert_close(tower(image).pooler_output, model.visual.trunk(image), atol=1e-5, rtol=1e-5)
    assert tower(image, output_attentions=True).attentions[0].shape == (2, 4, 37, 37)
    with pytest.raises(InputError, match="no differential attention v2"):
        checkpoints.convert(str(tmp_path / "run"), str(tmp_path / "official.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_graph_breaks(form):
    module = random_attention(dtype=torch.float32, attn_implementation=form)
    x = torch.randn(2, 70, 48)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("form", FORMS)
def test_dropout_only_in_training(form):
    module = random_attention(attn_drop=0.5, attn_implementation=form)
    x = torch.randn(1, 6, 48, dtype=torch.float64)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 48, "num_heads": 5}, "must divide"),
        ({"dim": 48, "num_heads": 4, "lambda_init": 1.0}, "between 0 and 1"),
        ({"dim": 48, "num_heads": 4, "attn_implementation": "flash"}, "must be one of"),
    ],
)
def test_impossible_settings_are_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message):
        DifferentialAttentionV2(**arguments)
