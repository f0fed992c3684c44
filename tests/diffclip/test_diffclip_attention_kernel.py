"""The Triton kernel, run on the CPU by Triton's interpreter, against maps that are written out."""

import pytest
import torch

from diffclip.attention import DifferentialAttention, DifferentialAttentionV2, kernel

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """As small as they can be, so that short sequences are several."""
    assert kernel.ON_CPU, "triton was imported before tests/conftest.py asked for its interpreter"
    monkeypatch.setattr(kernel, "LARGE", 16)
    monkeypatch.setattr(kernel, "SMALL", 16)


def masks(tokens, heads):
    draw = torch.Generator().manual_seed(3)
    allowed = (torch.rand(tokens, tokens, generator=draw) < 0.6) | torch.eye(tokens, dtype=torch.bool)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": allowed},
        "per head": {"attn_mask": torch.randn(2, heads, tokens, tokens, generator=draw)},
    }


def compare(kind, tokens, dim, heads, arguments, batch=1):
    """The kernel's errors, against maps in float64, are at most a few times those of maps in float32."""
    torch.manual_seed(0)
    module = kind(dim, heads)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=2 / dim**0.5 if parameter.ndim == 2 else 0.3)
    x = torch.randn(batch, tokens, dim)
    eager, triton = (with_gradients(module, x, form, arguments) for form in ("eager", "triton"))
    mask = arguments.get("attn_mask")
    exact = {"attn_mask": mask.double()} if mask is not None and mask.is_floating_point() else {}
    truth = with_gradients(module.double(), x.double(), "eager", arguments | exact)
    names = ["out", "x", *(name for name, _ in module.named_parameters())]
    for name, one, other, true in zip(names, eager, triton, truth):
        if name == "k_proj.bias":  # cannot matter: what is there is rounding
            assert other.abs().max() < 1e-4
            continue
        rounding = max(float((one - true).abs().max()), 1e-6 * max(1.0, float(true.abs().max())))
        assert (other - true).abs().max() <= 5 * rounding, name


def with_gradients(module, x, form, arguments):
    module.attn_implementation = form
    x = x.clone().requires_grad_()
    out = module(x, **arguments)
    weights = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])]


KINDS = pytest.mark.parametrize("kind", [DifferentialAttention, DifferentialAttentionV2])


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("mask", masks(1, 1))
def test_equals_eager_with_every_mask(kind, mask):
    """In two blocks of rows and of columns, the second of them short."""
    compare(kind, 19, 32, 2, masks(19, 2)[mask], batch=2 if mask == "per head" else 1)


@KINDS
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 16), (16, 24), pytest.param(37, 32, marks=pytest.mark.slow), (5, 80), (3, 128)]
)
def test_equals_eager_at_any_length_and_width(kind, tokens, width):
    compare(kind, tokens, 2 * width, 2, {})


def test_a_batch_of_several_pairs_finds_its_own_rows():
    compare(DifferentialAttention, 7, 64, 4, {"is_causal": True}, batch=2)


def test_a_row_that_looks_at_nothing_is_nan_as_in_the_maps():
    module = DifferentialAttention(32, 2)
    allowed = torch.ones(4, 4, dtype=torch.bool)
    allowed[2] = False
    for module.attn_implementation in ("eager", "triton"):
        rows = module(torch.randn(1, 4, 32), allowed).isnan().any(dim=-1)[0]
        assert rows.tolist() == [False, False, True, False]


def test_large_scores_neither_overflow_nor_vanish():
    """Also far below zero, where the logarithm of the sum is."""
    module = DifferentialAttention(32, 2)
    with torch.no_grad():
        module.q_proj.weight.mul_(40)
        module.k_proj.weight.mul_(40)
    x, found = torch.randn(1, 20, 32), []
    bias = torch.full((20, 20), -300.0)
    for module.attn_implementation in ("eager", "triton"):
        found.append(module(x, bias))
    assert found[1].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_interpreted_kernel_is_one_operator_in_a_compiled_graph():
    """So nothing breaks the graph, forward or backward."""
    module = DifferentialAttention(32, 2, attn_implementation="triton")
    x = torch.randn(1, 5, 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(run(x).square().sum(), list(module.parameters())) for run in (compiled, module)]
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_computed_in_another_form(monkeypatch):
    """No GPU, dropout, a mask that learns, float64, very wide heads."""
    monkeypatch.setattr(kernel, "ON_CPU", False)
    x = torch.randn(1, 4, 32)
    module = DifferentialAttention(32, 2, attn_implementation="triton")
    fused = DifferentialAttention(32, 2, attn_implementation="fused")
    fused.load_state_dict(module.state_dict())
    assert torch.equal(module(x), fused(x))
    monkeypatch.setattr(kernel, "ON_CPU", True)
    q, v = torch.randn(1, 2, 4, 16), torch.randn(1, 1, 4, 32)
    assert kernel.takes(q, v, None, 0.0)
    assert not kernel.takes(q, v, None, 0.1)
    assert not kernel.takes(q, v, torch.zeros(4, 4, requires_grad=True), 0.0)
    assert not kernel.takes(q.double(), v.double(), None, 0.0)
    assert not kernel.takes(q, torch.randn(1, 1, 4, 512), None, 0.0)
    monkeypatch.setattr(kernel, "triton", None)
    assert not kernel.takes(q, v, None, 0.0)
