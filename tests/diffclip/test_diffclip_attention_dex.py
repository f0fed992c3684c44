"""Dex against its definition written as loops; its annealing, choice of heads, and start as ordinary attention."""

import math

import pytest
import torch
from open_clip import CustomTextCLIP
from torch import nn
from torch._dynamo.testing import CompileCounter

from diffclip import warm_start
from diffclip.attention import Dex, select_heads, set_annealing
from diffclip.base.errors import InputError

VISION = {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 8, "layers": 2}
TEXT = {"context_length": 12, "vocab_size": 96, "width": 32, "heads": 4, "layers": 2}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
CAPTIONS = torch.tensor([[5, 9, 3, *9 * [0]], [3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5], [1, *11 * [0]]])


def random_dex(annealing=0.4, **options):
    torch.manual_seed(0)
    module = Dex(48, 4, **{"lambda_init": 0.6, **options}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.set_annealing(annealing)
    return module


def clip(padding=True, kind="dex"):
    torch.manual_seed(0)
    model = CustomTextCLIP(16, VISION, TEXT | {"embed_cls": padding}).eval()
    return warm_start.differentiate(model, kind=kind) if kind else model


def features(model):
    return model.encode_image(IMAGES), model.encode_text(CAPTIONS)


@pytest.mark.parametrize("form", ["eager", "fused"])
@pytest.mark.parametrize("causal", [False, True])
def test_it_computes_its_definition(form, causal):
    module = random_dex(attn_implementation=form)
    module.selected[1] = 0
    x = torch.randn(2, 6, 48, dtype=torch.float64)
    lambda_ = 0.4 * 0.6 * 0.6 + 0.4 * module.lambda_learnt.item()
    q, k, v = (layer(x) for layer in (module.q_proj, module.k_proj, module.v_proj))
    outputs = []
    for head in range(4):
        part = slice(12 * head, 12 * head + 12)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(12)
        if causal:
            scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        output = scores.softmax(-1) @ v[..., part]
        outputs.append(output if head == 1 else output - lambda_ * output @ module.subtracted.T)
    torch.testing.assert_close(module(x, is_causal=causal), module.out_proj(torch.cat(outputs, -1)))


def test_forms_agree_in_gradients_too_where_maps_are_computed_twice():
    x, gradients = torch.randn(1, 70, 48, dtype=torch.float64), []
    for form in ("eager", "fused"):
        module = random_dex(attn_implementation=form)
        module(x).square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.25, 0.1125 + 0.05), (0.5, 0.15 + 0.1), (1.0, 0.2)])
def test_lambda_is_annealed_from_nothing_to_what_is_learnt(share, expected):
    module = Dex(48, 4, lambda_init=0.6)
    assert module.lambda_learnt.item() == 0
    nn.init.constant_(module.lambda_learnt, 0.2)
    set_annealing(nn.ModuleList([nn.Linear(1, 1), module]), share)
    assert module.mean_lambda() == pytest.approx(expected)


@pytest.mark.parametrize("padding", [False, True])
def test_it_starts_as_ordinary_attention_and_then_all_that_is_new_learns(padding):
    model, plain = clip(padding), clip(padding, kind=None)
    for new, old in zip(features(model), features(plain)):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-5)
    own = [p for name, p in model.named_parameters() if "subtracted" in name or "lambda_learnt" in name]
    assert len(own) == 8
    sum(part.square().sum() for part in features(model)).backward()
    assert not any(p.grad.any() for p in own)
    set_annealing(model, 0.01)
    sum(part.square().sum() for part in features(model)).backward()
    assert all(p.grad.any() for p in own)
    assert not torch.equal(features(model)[0], features(plain)[0])


def test_training_moves_lambda_and_leaves_the_map_positive():
    model = clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    goal = [torch.randn_like(part) for part in features(model)]
    for step in range(5):
        set_annealing(model, min(1, step / 4))
        optimizer.zero_grad()
        sum((part - wanted).square().mean() for part, wanted in zip(features(model), goal)).backward()
        optimizer.step()
    layers = [module for module in model.modules() if isinstance(module, Dex)]
    assert all(layer.mean_lambda() == layer.lambda_learnt.item() != 0 for layer in layers)
    assert layers[0].maps(torch.randn(1, 5, 32))[0].min() >= 0


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_that_attend_most_evenly_are_selected(autocast):
    model = clip()
    layers = [module for module in model.modules() if isinstance(module, Dex)]
    wanted = [{0, 2}, {1, 3}, {0, 1}, {2, 3}]
    with torch.no_grad():
        for layer, even in zip(layers, wanted):
            layer.q_proj.weight.mul_(20)
            for head in even:
                layer.q_proj.weight[8 * head : 8 * head + 8] = 0  # every key alike
    set_annealing(model, 0.5)
    before = features(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        select_heads(model, lambda: features(model))
    assert [set(layer.selected.nonzero().flatten().tolist()) for layer in layers] == wanted
    assert not any(torch.equal(old, new) for old, new in zip(before, features(model)))
    assert all("mix" not in vars(layer) for layer in layers)
    other = clip()
    other.load_state_dict(model.state_dict())  # the choice and the annealing with it
    assert all(torch.equal(old, new) for old, new in zip(features(model), features(other)))


def test_compiled_once_it_follows_the_annealing():
    module, counter = random_dex().float(), CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    x = torch.randn(2, 6, 48)
    outputs = []
    for share in (0.0, 0.5, 1.0):
        set_annealing(compiled, share)
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], module(x))
    assert counter.frame_count == 1 and not torch.equal(outputs[0], outputs[2])


def test_new_parameters_are_few_and_a_matrix_is_shared_by_heads():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in kind.parameters()) for kind in (Dex(768, 12), nn.MultiheadAttention(768, 12))]
    assert counts[0] - counts[1] == 64 * 64 + 1


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="must divide"):
        Dex(48, 5)
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        set_annealing(random_dex(), 1.5)
