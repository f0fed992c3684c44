"""Which form `auto` takes: timed once for a device, dtype and shape, kept on disk, and never without need."""

import logging
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffclip.attention import KINDS, DifferentialAttention, fastest
from diffclip.base.cache import kept_json


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of its own, and a process that knows nothing."""
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fastest, "_known", {})
    return tmp_path / "cache/attention"


def inputs(batch=2, heads=4, tokens=9, d=8):
    q = torch.randn(batch, heads, tokens, d)
    return q, torch.randn_like(q), torch.randn(batch, heads // 2, tokens, 2 * d)


def mix(form, q, k, v, attn_mask, is_causal):
    """Of three forms, "slow" sleeps and "none" cannot be run here."""
    if form.startswith("none"):
        raise RuntimeError("no kernel for this device")
    if form == "slow":
        time.sleep(0.03)
    return sum(x.sum() for x in (q, k, v))


def choose(forms=("slow", "none", "quick"), mask=None, **shape):
    return fastest.fastest("kind", forms, mix, inputs(**shape), mask, False)


def test_the_fastest_is_taken_and_one_that_cannot_run_is_not():
    assert choose() == "quick"
    assert choose(("none", "slow")) == "slow"


def test_where_nothing_can_be_timed_the_plainest_which_is_last_is_taken():
    assert choose(("none", "none either")) == "none either"


def test_of_equally_fast_forms_the_first_is_taken(monkeypatch):
    monkeypatch.setattr(fastest, "measure", lambda *args: {"lean": 1.02, "other": 1.0})
    assert choose(("lean", "other")) == "lean"
    monkeypatch.setattr(fastest, "measure", lambda *args: {"lean": 1.1, "other": 1.0})
    assert choose(("lean", "other"), tokens=50) == "other"


def test_another_process_reads_what_one_has_measured(fresh, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "diffclip"):
        choose()
    (line,) = [record.getMessage() for record in caplog.records if "takes" in record.getMessage()]
    assert "9 tokens, float32" in line and "takes quick" in line and "none" not in line
    (kept,) = fresh.iterdir()
    monkeypatch.setattr(fastest, "_known", {})
    monkeypatch.setattr(fastest, "measure", lambda *args: pytest.fail("measured again"))
    assert choose() == "quick" and choose(tokens=12) == "quick"  # lengths are taken together by sixteens
    assert kept_json(kept)["milliseconds"]["none"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"milliseconds": {"slow": 1}}', '{"facts": 1, "milliseconds": {}}']
)
def test_a_damaged_file_is_measured_anew(content, fresh, monkeypatch):
    choose()
    (kept,) = fresh.iterdir()
    whole = kept_json(kept)
    kept.write_text(content)
    monkeypatch.setattr(fastest, "_known", {})
    assert choose() == "quick"
    assert kept_json(kept)["facts"] == whole["facts"]


def test_each_shape_dtype_and_mask_is_measured_for_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(fastest, "measure", lambda forms, *args: seen.append(1) or dict.fromkeys(forms, 1.0))
    forms = ("quick", "slow")
    mask = torch.zeros(9, 9)
    for options in ({}, {"tokens": 50}, {"heads": 2}, {"d": 16}, {"batch": 9}, {"mask": mask}, {"mask": mask > 0}):
        before = len(seen)
        choose(forms, **options)
        choose(forms, **options)
        assert len(seen) == before + 1


def test_a_folder_that_cannot_be_written_costs_the_measuring_alone(monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", "/dev/null/nowhere")
    assert choose() == "quick"


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("grad", ["training", "no_grad", "inference_mode"])
def test_measuring_leaves_no_trace_in_the_result_or_in_random_numbers(kind, grad):
    torch.manual_seed(0)
    modules = {form: kind(32, 4, attn_implementation=form) for form in ("auto", *kind.forms[-2:])}
    for module in modules.values():
        module.load_state_dict(modules["auto"].state_dict())
    x, before = torch.randn(3, 20, 32), torch.get_rng_state()
    with {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[grad]():
        found = modules["auto"](x)
        assert torch.equal(found, modules[modules["auto"].seen_form](x))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in modules["auto"].parameters())
    assert modules["auto"].seen_form in kind.forms and modules["auto"].seen_form != "triton"


def test_measuring_within_a_checkpoint_is_no_part_of_it():
    module = DifferentialAttention(32, 4)
    x = torch.randn(3, 20, 32, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)  # which counts what is kept, twice
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS.values())
def test_functions_and_graphs_are_not_measured(kind, monkeypatch):
    monkeypatch.setattr(fastest, "measure", lambda *args: pytest.fail("measured"))
    module = kind(32, 4)
    x = torch.randn(3, 20, 32)
    torch.func.functional_call(module.to("meta"), dict(module.named_parameters()), x.to("meta"))
    module = kind(32, 4)
    torch.func.vmap(module)(x[None])
    torch.jit.trace(module, x, check_trace=False)
    with FlopCounterMode(display=False), torch.no_grad():
        module(x)
