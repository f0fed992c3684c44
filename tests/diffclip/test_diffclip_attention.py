"""Differential attention against the official numbers, a loop written from the definition, and timm's module."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import DiffAttention
from torch import nn

from diffclip.attention import DifferentialAttention, DifferentialAttentionV2, lambda_init_schedule
from diffclip.attention.v1 import softmax_maps
from diffclip.attention_maps import attention_map
from diffclip.base.errors import InputError

FORMS = ("eager", "fused", "padded")


def random_attention(dim=48, heads=4, seed=0, dtype=torch.float64, **options):
    """Attention with peaky maps and every parameter away from its starting value."""
    torch.manual_seed(seed)
    module = DifferentialAttention(dim, heads, **options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=2 / dim**0.5 if parameter.ndim == 2 else 0.3)
        module.diff_norm.weight.add_(1)
    return module


def by_definition(module, x, mask):
    """The formula, one image, one pair, one query at a time; mask (tokens, tokens) is additive."""
    d, outs = module.head_dim, []
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    lambda_ = (module.lambda_q1 @ module.lambda_k1).exp() - (module.lambda_q2 @ module.lambda_k2).exp()
    lambda_ = lambda_ + module.lambda_init
    for image in range(len(x)):
        pairs = []
        for j in range(module.num_heads // 2):
            values, rows = v[image, :, 2 * d * j : 2 * d * (j + 1)], []
            for query in range(x.shape[1]):
                maps = []
                for head in (2 * j, 2 * j + 1):
                    part = slice(d * head, d * (head + 1))
                    scores = k[image, :, part] @ q[image, query, part] / d**0.5 + mask[query]
                    maps.append(scores.exp() / scores.exp().sum())
                row = (maps[0] - lambda_ * maps[1]) @ values
                rms = (row.square().mean() + module.diff_norm.eps).sqrt()
                rows.append((1 - module.lambda_init) * module.diff_norm.weight * row / rms)
            pairs.append(torch.stack(rows))
        outs.append(torch.cat(pairs, dim=-1))
    return module.out_proj(torch.stack(outs))


def masks(tokens):
    """Pairs of (arguments of forward, the additive mask they mean)."""
    causal = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    allowed = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed |= torch.eye(tokens, dtype=torch.bool)
    bias = torch.randn(tokens, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return {
        "none": ({}, torch.zeros(tokens, tokens, dtype=torch.float64)),
        "causal": ({"is_causal": True}, causal),
        "causal mask": ({"attn_mask": causal}, causal),
        "boolean": ({"attn_mask": allowed}, torch.zeros_like(bias).masked_fill(~allowed, -torch.inf)),
        "additive": ({"attn_mask": bias}, bias),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", masks(1))
@pytest.mark.parametrize("heads", [2, 6])
def test_equals_the_definition_written_as_loops(form, mask, heads):
    module = random_attention(heads=heads, lambda_init=0.35, attn_implementation=form)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    arguments, additive = masks(7)[mask]
    torch.testing.assert_close(module(x, **arguments), by_definition(module, x, additive), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mask", masks(1))
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-5), (torch.bfloat16, 0.2)])
def test_forms_agree_forward_and_backward(mask, dtype, atol):
    module = random_attention(seed=1, dtype=dtype)
    x = torch.randn(2, 33, 48, dtype=dtype, requires_grad=True)
    arguments, _ = masks(33)[mask]
    found = {}
    for module.attn_implementation in FORMS:
        out = module(x, **arguments)
        grads = torch.autograd.grad((out * torch.linspace(-1, 1, 48)).sum(), [x, *module.parameters()])
        found[module.attn_implementation] = [out, *grads]
    for one, other in zip(found["eager"], found["fused"]):
        scale = max(1.0, float(one.detach().abs().max()))
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=atol)


@pytest.mark.parametrize("form", FORMS)
def test_equals_timm(form):
    """timm keeps one qkv matrix and per-depth lambda_init; with one depth's value set, the function is the same."""
    module = random_attention(seed=2, lambda_init=lambda_init_schedule(5), attn_implementation=form)
    timm = DiffAttention(48, num_heads=2, qkv_bias=True, depth=5).double()  # timm counts pairs
    state = module.state_dict()
    renamed = {f"qkv.{end}": torch.cat([state[f"{name}_proj.{end}"] for name in "qkv"]) for end in ("weight", "bias")}
    renamed |= {name.replace("out_proj", "proj").replace("diff_norm", "sub_norm"): t for name, t in state.items()}
    timm.load_state_dict({name: renamed[name] for name in timm.state_dict()})
    assert timm.lambda_init == module.lambda_init
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    torch.testing.assert_close(module(x), timm(x), rtol=0, atol=1e-6)  # timm rounds lambda to float32


CASES = [
    ("01_diffattn_vision", "vision_d64h4n17_li080"),
    ("01_diffattn_vision", "vision_d64h4n17_li035"),
    ("01_diffattn_vision", "vision_d48h2n5_li080"),
    ("02_diffattn_text", "text_causal_d64h4l16_li080"),
    ("02_diffattn_text", "text_causal_d64h4l16_li035"),
    ("02_diffattn_text", "text_nomask_d48h6l7_li080"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["f64", "f32"])
@pytest.mark.parametrize(("folder", "case"), CASES)
def test_equals_the_official_module(golden, folder, case, prefix, form):
    path = golden(folder) / f"{case}.safetensors"
    tolerances = json.loads((golden(folder) / "tolerances.json").read_text())[case]["tensors"]
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    dtype = torch.float64 if prefix == "f64" else torch.float32
    module = DifferentialAttention(
        int(facts["dim"]),
        int(facts["num_heads"]),
        lambda_init=float(facts["lambda_init"]),
        norm_eps=float(facts["norm_eps"]),
        attn_implementation=form,
    ).to(dtype)
    module.load_state_dict({n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")})
    sequence_first = facts["layout"] == "L,B,D"
    causal = facts["causal"] == "True"
    x, cotangent = tensors["input.x"].to(dtype).requires_grad_(), tensors["cotangent"].to(dtype)

    inputs = x.transpose(0, 1) if sequence_first else x
    out = module(inputs, is_causal=causal)
    q, k, _ = module.project(inputs)
    maps = torch.stack(softmax_maps(q, k, is_causal=causal), dim=2).flatten(1, 2)  # heads in order again
    found = {
        "out": out.transpose(0, 1) if sequence_first else out,
        "aux.lambda": module.compute_lambda(),
        "aux.attn": maps,
        "aux.diff_attn": attention_map(module, inputs, is_causal=causal),
    }
    found["loss"] = (found["out"] * cotangent).sum()
    found["loss"].backward()
    found |= {f"grad.{name}": parameter.grad for name, parameter in module.named_parameters()}
    found["grad.x"] = x.grad

    for name, value in found.items():
        limits = tolerances[name]
        if limits.get("exact_value") == 0:  # the key bias cannot matter
            assert value.abs().max() < 1e-3
            continue
        limit = limits["suggest_atol_f64" if prefix == "f64" else "suggest_atol_f32"]
        error = (value.detach().double() - tensors[f"{prefix}.{name}"].double()).abs().max()
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


def test_heads_pair_with_their_neighbours():
    """Swapping the heads of one pair swaps its maps; other pairs do not notice."""
    module = random_attention(heads=4)
    x = torch.randn(1, 5, 48, dtype=torch.float64)
    q, k, _ = module.project(x)
    first, second = softmax_maps(q, k)
    swapped = [1, 0, 2, 3]
    first_swapped, second_swapped = softmax_maps(q[:, swapped], k[:, swapped])
    torch.testing.assert_close(first_swapped[:, 0], second[:, 0])
    torch.testing.assert_close(second_swapped[:, 0], first[:, 0])
    torch.testing.assert_close(first_swapped[:, 1], first[:, 1])


def test_rows_of_the_map_sum_to_one_minus_lambda():
    module = random_attention(seed=5)
    rows = attention_map(module, torch.randn(2, 6, 48, dtype=torch.float64)).sum(-1)
    torch.testing.assert_close(rows, (1 - module.compute_lambda()).expand_as(rows))


def test_map_of_timm_attention_reproduces_its_output():
    from timm.layers import Attention

    torch.manual_seed(0)
    module = Attention(32, num_heads=4, qkv_bias=True).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    values = module.qkv(x).unflatten(-1, (3, 4, 8))[:, :, 2].transpose(1, 2)
    out = module.proj((attention_map(module, x) @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize(("dim", "heads"), [(48, 3), (48, 1), (48, 0), (48, 10)])
def test_heads_that_cannot_pair_are_refused(dim, heads):
    with pytest.raises(InputError, match=f"num_heads={heads}, width=48"):
        DifferentialAttention(dim, heads)


def test_unknown_form_is_refused():
    with pytest.raises(InputError, match="attn_implementation"):
        DifferentialAttention(48, 2, attn_implementation="flash")


@pytest.mark.parametrize("form", FORMS)
def test_mask_and_is_causal_exclude_each_other(form):
    module = random_attention(attn_implementation=form)
    with pytest.raises((ValueError, RuntimeError)):
        module(torch.randn(1, 4, 48, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64), is_causal=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_dropout_drops_entries_of_each_map_and_only_in_training(form):
    """Without the norm the output is linear in the maps, so its mean over many draws is the undropped output."""
    module = random_attention(seed=6, attn_drop=0.5, attn_implementation=form)
    x = torch.randn(1, 6, 48, dtype=torch.float64)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(0)
    module.diff_norm = nn.Identity()
    mean = torch.stack([module(x) for _ in range(1000)]).mean(0)
    module.eval()
    assert not torch.equal(module(x), mean)
    spread = module(x).abs().max()
    assert (mean - module(x)).abs().max() < 0.15 * spread


def test_lambda_keeps_float32_precision_in_bfloat16():
    module = random_attention(dtype=torch.bfloat16)
    assert module.compute_lambda().dtype == torch.float32
    assert module(torch.randn(1, 4, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("error:Mismatch dtype")  # torch's notice that it left its fused kernel
def test_autocast_gives_bfloat16_close_to_float32(form):
    module = random_attention(dtype=torch.float32, attn_implementation=form)
    x = torch.randn(2, 20, 48)
    causal = torch.full((20, 20), -torch.inf).triu(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, causal)
    assert out.dtype == torch.bfloat16
    cosine = nn.functional.cosine_similarity(out.float().flatten(), module(x, causal).flatten(), dim=0)
    assert cosine > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [8, 70])  # below and above the length from which maps are recomputed
def test_compiles_without_graph_breaks(form, tokens):
    module = random_attention(dtype=torch.float32, attn_implementation=form)
    x = torch.randn(2, tokens, 48)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, module):
        out = call(x, is_causal=True)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [DifferentialAttention, DifferentialAttentionV2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_nothing_but_what_is_kept(kind, form, dropout, monkeypatch):
    torch.manual_seed(0)
    module = kind(48, 4, attn_drop=dropout, attn_implementation=form).double()
    x = torch.randn(2, 65, 48, dtype=torch.float64, requires_grad=True)
    found, kept = [], []
    for keep_below in (1000, 64):
        monkeypatch.setattr("diffclip.attention.base.KEEP_BELOW", keep_below)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = module(x, is_causal=True)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
        kept.append(sum(sizes))
    assert kept[1] < 0.7 * kept[0]
    for one, other in zip(*found):
        assert torch.equal(one, other)


def test_schedule():
    """Values of the schedule by hand: 0.8 - 0.6 = 0.2 first, then 0.8 - 0.6 exp(-0.3), tending to 0.8."""
    assert lambda_init_schedule(0) == pytest.approx(0.2)
    assert lambda_init_schedule(1) == pytest.approx(0.3555090676)
    assert lambda_init_schedule(0, base=1) == lambda_init_schedule(1)
    assert lambda_init_schedule(100) == pytest.approx(0.8)
