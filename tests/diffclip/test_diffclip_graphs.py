"""Both towers as graphs and under torch.func, against the same model run plainly, for batches unlike the example."""

import copy

import pytest
import torch

from diffclip import models, variants
from diffclip.attention.base import KEEP_BELOW, without_recomputation

NAMES = ["CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-V2-tiny"]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    """One layer a tower and sequences so long that training recomputes their maps."""
    config = copy.deepcopy(variants.MODELS[request.param])
    config["model_cfg"]["text_cfg"] |= {"context_length": KEEP_BELOW + 6, "layers": 1, "vocab_size": 500}
    config["model_cfg"]["vision_cfg"] |= {"image_size": 64, "layers": 1}
    config["preprocess_cfg"]["size"] = 64
    torch.manual_seed(0)
    return models.build(config).eval()


def inputs(model, count):
    """Images, and captions of which none ends in the last column, each as long as it happens to be."""
    draw = torch.Generator().manual_seed(count)
    text = torch.randint(1, 400, (count, model.context_length), generator=draw)
    for row, end in enumerate(torch.randint(2, model.context_length - 1, (count,), generator=draw)):
        text[row, end:] = 0
        text[row, end] = model.vocab_size - 1
    return torch.randn(count, 3, *model.visual.image_size, generator=draw), text


def similarity(model, images, texts):
    image, text, scale = model(images, texts)
    return (scale * image * text).sum()


@pytest.mark.slow
def test_both_towers_export_for_any_batch_size(model):
    class Encoders(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, image, text):
            return self.model.encode_image(image), self.model.encode_text(text, normalize=True)

    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Encoders(), inputs(model, 3), dynamic_shapes=({0: batch}, {0: batch})).module()
    for count in (1, 2, 5):
        with torch.no_grad():
            for found, expected in zip(exported(*inputs(model, count)), Encoders()(*inputs(model, count))):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_both_towers_are_traced_for_any_batch_size(model):
    images, texts = inputs(model, 3)
    traced = torch.jit.trace_module(model, {"encode_image": images, "encode_text": texts}, check_trace=False)
    for count in (1, 5):
        images, texts = inputs(model, count)
        torch.testing.assert_close(traced.encode_image(images), model.encode_image(images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(traced.encode_text(texts), model.encode_text(texts), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_whole_model_compiles_into_one_graph_with_its_gradients(model):
    torch._dynamo.reset()
    compiled, batch = torch.compile(model, fullgraph=True, backend="eager"), inputs(model, 3)
    found, expected = (
        torch.autograd.grad(similarity(run, *batch), list(model.parameters())) for run in (compiled, model)
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_gradients_of_torch_func_are_those_of_backward(model):
    """Also each example's own, by vmap: their sum is that of the batch."""
    for module in model.modules():
        if hasattr(module, "attn_implementation"):
            module.attn_implementation = "eager"  # rounded alike
    named = dict(model.named_parameters())
    images, texts = inputs(model, 3)
    expected = torch.autograd.grad(similarity(model, images, texts), list(named.values()))

    def loss(values, images, texts):
        image, text, scale = torch.func.functional_call(model, values, (images, texts))
        return (scale * image * text).sum()

    def one(values, image, text):
        return loss(values, image[None], text[None])

    whole = torch.func.grad(loss)(named, images, texts)
    each = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(named, images, texts)
    for name, wanted in zip(named, expected):
        torch.testing.assert_close(whole[name], wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(each[name].sum(0), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_recomputation_can_be_switched_off(name, monkeypatch):
    """Counted by the calls of `mix`: twice a step with it, once without, for the same gradients."""
    attention = models.build(name).visual.trunk.blocks[0].attn
    x = torch.randn(2, KEEP_BELOW, attention.out_proj.out_features, requires_grad=True)
    calls = []
    mix = attention.mix
    monkeypatch.setattr(attention, "mix", lambda *args: calls.append(1) or mix(*args))
    (kept,) = torch.autograd.grad(attention(x).square().sum(), x)
    assert len(calls) == 2
    with without_recomputation():
        (again,) = torch.autograd.grad(attention(x).square().sum(), x)
    assert len(calls) == 3
    torch.testing.assert_close(again, kept)
