"""What large models need: gradient checkpointing changes no gradient, weights in several files load as one."""

import json

import pytest
import torch
from test_mllm_open_clip_tower import open_clip_name

import diffclip
from mllm.assemble import assemble
from mllm.conversation import encode, render
from mllm.data.examples import image_tokens
from mllm.model import load
from mllm.weights import freeze, parts
from stages import conversations
from stages.conversations import computed_buffers, restore_buffers
from stages.run import Run
from stages.settings import InstructConfig


def example(processor, picture):
    turns = [{"from": "human", "value": "<image>\nIs there a red square?"}, {"from": "gpt", "value": "Yes"}]
    encoded = encode(render(turns, "vicuna"), processor.tokenizer, image_tokens(processor))
    pixels = processor.image_processor([picture(1)], return_tensors="pt")["pixel_values"]
    return {**{k: torch.tensor([v]) for k, v in encoded.items()}, "pixel_values": pixels}


def tower_in(kind, tower_dir, tmp_path):
    if kind == "ours":
        diffclip.save(diffclip.build("DiffCLIP-tiny"), tmp_path / "pretrain")
        return tmp_path / "pretrain"
    return tower_dir if kind == "clip" else open_clip_name(tmp_path, "vit")


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "kind, learns",
    [
        ("clip", {"projector", "language_model"}),
        ("clip", {"vision_tower", "projector"}),
        ("ours", {"vision_tower", "projector", "language_model"}),
        ("open_clip", {"vision_tower", "projector", "language_model"}),
    ],
)
def test_gradient_checkpointing_changes_no_gradient(
    tower_dir, language_dir, picture, tmp_path, reentrant, kind, learns
):
    model, processor = assemble(tower_in(kind, tower_dir, tmp_path), language_dir, seed=3)
    freeze(model, learns)
    inputs = example(processor, picture)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.model.language_model.is_gradient_checkpointing
        model.train()
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_weights_in_several_files_load_as_one(assembled, picture, tmp_path):
    model, processor = assembled
    assembled.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, _ = load(tmp_path)  # checks the fingerprints
    inputs = example(processor, picture)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_weights_in_bfloat16_stay_so(tower_dir, language_dir, tmp_path):
    assemble(tower_dir, language_dir, dtype=torch.bfloat16).save(tmp_path)
    model, _ = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load(tmp_path, dtype=torch.float32)[0].dtype == torch.float32


def test_rotary_frequencies_survive_a_cast_to_bfloat16(assembled, picture):
    model, processor = assembled
    exact = computed_buffers(model)
    assert any("inv_freq" in name for name in exact)
    model.to(torch.bfloat16)
    assert any(not torch.equal(dict(model.named_buffers())[name].float(), exact[name]) for name in exact)
    restore_buffers(model, exact)
    assert all(torch.equal(dict(model.named_buffers())[name], exact[name]) for name in exact)
    assert not exact.keys() & model.state_dict().keys()
    assert model(**{**example(processor, picture), "labels": None}).logits.dtype == torch.bfloat16


def train_in_process(assembled, picture, folder, **settings):
    """Two steps of instruct, without a launcher."""
    picture(0).save(folder / "0.png")
    turns = [{"from": "human", "value": "<image>\nIs there a star?"}, {"from": "gpt", "value": "Yes"}]
    (folder / "rows.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}] * 4))
    config = InstructConfig(
        output_dir=str(folder / "run"),
        data=[str(folder / "rows.json")],
        image_root=str(folder),
        global_batch_size=2,
        deepspeed="",
        use_cpu=True,
        precision="fp32",
        num_workers=0,
        report_to=[],
        **settings,
    )
    run = Run("instruct", config, {})
    conversations.train_on_conversations(assembled, config, run)
    return run


def test_weights_that_change_when_training_begins_are_found(assembled, picture, tmp_path, monkeypatch):
    """As if the launcher had initialised a part anew."""

    def disturb(model, buffers):
        torch.nn.init.normal_(model.model.vision_tower.get_input_embeddings().weight)

    monkeypatch.setattr(conversations, "restore_buffers", disturb)
    with pytest.raises(RuntimeError, match="vision_tower is not what it was before"):
        train_in_process(assembled, picture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part, lora", [("vision_tower", 0), ("vision_tower", 2), ("language_model", 2)])
def test_a_frozen_part_that_changes_while_training_is_found(assembled, picture, tmp_path, monkeypatch, part, lora):
    def disturb(self, args, state, control, **kwargs):
        with torch.no_grad():
            frozen = [p for p in parts(assembled[0])[part].parameters() if not p.requires_grad]
            frozen[-1].add_(1.0)

    monkeypatch.setattr("stages.callbacks.Watch.on_step_end", disturb)
    beside = "weights of the language model beside LoRA's changed" if part == "language_model" else f"{part} changed"
    with pytest.raises(RuntimeError, match=beside):
        train_in_process(assembled, picture, tmp_path, lora_rank=lora)


@pytest.mark.slow
def test_a_part_that_does_not_learn_is_found(assembled, picture, tmp_path):
    with pytest.raises(RuntimeError, match="projector did not change"):
        train_in_process(assembled, picture, tmp_path, learning_rate=0.0)


@pytest.mark.slow
def test_undisturbed_training_passes_all_of_them(assembled, picture, tmp_path):
    assert train_in_process(assembled, picture, tmp_path).record["state"] == "finished"
