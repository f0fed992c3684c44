"""LoRA and QLoRA: merging changes no logit, nothing beside the adapters moves, 4-bit weights are only a stand-in."""

import importlib.util
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2Config

from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from mllm.assemble import assemble
from mllm.lora import add_lora, base_weights, merge, quantise, save_adapter
from mllm.model import VisionLanguageModel, load
from mllm.weights import freeze, parts

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


def train(model, steps=3):
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_merged_logits_equal_the_adapters_and_the_run_loads_like_any_other(assembled, tmp_path):
    model = assembled.model
    before, untouched = parts(model), logits(model)
    prints = {name: fingerprint(module) for name, module in before.items()}
    freeze(model, {"projector"})
    adapter = add_lora(model, 4, seed=1)
    assert torch.equal(logits(model), untouched)  # the second matrix starts at zero
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or "multi_modal_projector" in name for name in learning) and len(learning) > 4
    train(model)
    assert fingerprint(base_weights(model)) == prints["language_model"]
    trained = logits(model)
    assert (trained - untouched).abs().max() > 0.01
    save_adapter(model, adapter, tmp_path / "adapter", {"projector", "language_model"})
    merge(adapter)
    assert (logits(model) - trained).abs().max() < 1e-4
    assert fingerprint(parts(model)["language_model"]) != prints["language_model"]
    assembled.save(tmp_path)
    again, _ = load(tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("learns", [{"language_model"}, {"language_model", "projector", "vision_tower"}])
def test_the_adapter_on_the_model_that_training_began_with_gives_the_trained_one(
    assembled, picture, tmp_path, learns, recwarn
):
    model, processor = assembled
    assembled.save(tmp_path / "align")
    freeze(model, learns - {"language_model"})
    adapter = add_lora(model, 4, seed=1)
    train(model)
    save_adapter(model, adapter, tmp_path / "adapter", learns)
    merge(adapter)
    inputs = processor(text=["<image>\nRed?"], images=[picture(1)], return_tensors="pt")
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
        base = AutoModelForImageTextToText.from_pretrained(tmp_path / "align")
        untouched = base(**inputs).logits
        peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(peft(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (wanted - untouched).abs().max() > 0.01
        torch.testing.assert_close(peft.merge_and_unload()(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]


def test_the_seed_decides_the_adapters(tower_dir, language_dir):
    def first(seed):
        model, _ = assemble(tower_dir, language_dir, seed=3)
        add_lora(model, 2, seed=seed)
        return {name: p for name, p in model.named_parameters() if "lora_A" in name}

    a, b, c = first(1), first(1), first(2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.fixture
def wider_dir(language_dir, tmp_path):
    """The language model at width 64: bitsandbytes rounds blocks of 64 weights."""
    shutil.copytree(language_dir, tmp_path / "wider")
    config = Qwen2Config.from_pretrained(language_dir)
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wider")
    return tmp_path / "wider"


def test_qlora_trains_on_rounded_weights_and_merges_into_the_true_ones(tower_dir, wider_dir, tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is not installed")
    model, processor = assemble(tower_dir, wider_dir, seed=3)
    loss = model.train()(input_ids=IDS, labels=IDS).loss.item()
    freeze(model, {"projector"})
    originals = quantise(model, torch.device("cpu"))
    rounded = model.train()(input_ids=IDS, labels=IDS).loss.item()
    assert 1e-5 < abs(rounded - loss) < 0.2 * loss  # 4 bits show, and do not destroy
    adapter = add_lora(model, 4, seed=1)
    train(model)
    save_adapter(model, adapter, tmp_path / "adapter", {"language_model"})
    merge(adapter, originals)
    # the unrounded model with the adapter beside it, by peft
    base, _ = assemble(tower_dir, wider_dir, seed=3)
    untouched = {name: w.clone() for name, w in base.model.language_model.state_dict().items()}
    rebuilt = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().model.language_model
    ours = parts(model)["language_model"]["model"].state_dict()
    assert all(torch.allclose(w, ours[name], atol=1e-6) for name, w in rebuilt.state_dict().items())
    assert any((w - ours[name]).abs().max() > 1e-3 for name, w in untouched.items())
    VisionLanguageModel(model, processor).save(tmp_path)
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))


def test_qlora_without_bitsandbytes_says_what_to_install(assembled, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="pip install bitsandbytes, or set lora_bits: 16"):
        quantise(assembled[0], torch.device("cpu"))


def test_qlora_on_a_device_without_a_backend_is_refused(assembled):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is not installed")
    with pytest.raises(InputError, match=r"no backend for meta.*set lora_bits: 16"):
        quantise(assembled[0], torch.device("meta"))
