"""Runs in other people's programs: TRL's trainers, and what vLLM's transformers backend asks of a model."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import mllm.model
import mllm.vllm_plugin
from diffclip.base.files import read_json, read_text
from mllm.assemble import assemble
from mllm.conversation import IGNORE, IMAGE

QUESTION = "Is there a red square in the image?"
TURNS = [
    {"from": "human", "value": f"{IMAGE}\n{QUESTION}"},
    {"from": "gpt", "value": "Yes"},
    {"from": "human", "value": "Is there a blue circle?"},
    {"from": "gpt", "value": "No"},
]


@pytest.fixture(scope="module", params=["vicuna", "chatml"])
def run(request, tower_dir, language_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assemble(tower_dir, language_dir, template=request.param, seed=3).save(folder)
    return folder


def say(role, text):
    return {"role": role, "content": text}


def test_transformers_masks_the_answers_that_we_supervise(run, picture):
    """return_assistant_tokens_mask, by the template's own marks, against labels made without a template."""
    model = mllm.model.load(run)
    content = [{"type": "image", "image": picture(0, (40, 48))}, {"type": "text", "text": QUESTION}]
    messages = [
        say("user", content),
        say("assistant", [{"type": "text", "text": "Yes"}]),
        say("user", [{"type": "text", "text": "Is there a blue circle?"}]),
        say("assistant", [{"type": "text", "text": "No"}]),
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = model.processor.apply_chat_template([messages], **options)
    expected = model.encode(TURNS, 1)
    assert found["input_ids"][0] == expected["input_ids"]
    assert found["assistant_masks"][0] == [int(label != IGNORE) for label in expected["labels"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", ["chatml"], indirect=True)
def test_trl_trains_a_run_by_its_path(run, picture, tmp_path):
    """SFT on messages with images and the loss on answers alone; DPO on preferred answers, which gain."""
    trl = pytest.importorskip("trl", reason="trl of the extra `dev` is not installed")
    from datasets import Dataset

    common = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    common |= {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": None}
    common |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    images = [[picture(i, (40, 48))] for i in range(4)]
    turns = [say("user" if t["from"] == "human" else "assistant", t["value"].removeprefix(f"{IMAGE}\n")) for t in TURNS]
    rows = Dataset.from_list([{"images": image, "messages": turns} for image in images])
    arguments = trl.SFTConfig(**common, assistant_only_loss=True)
    trainer = trl.SFTTrainer(model=str(run), args=arguments, train_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    ours = mllm.model.load(run).encode(TURNS, 1)
    assert batch["labels"][0].tolist() == ours["labels"] and batch["input_ids"][0].tolist() == ours["input_ids"]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[1] < losses[0]

    row = {"prompt": [say("user", QUESTION)], "chosen": [say("assistant", "Yes")], "rejected": [say("assistant", "No")]}
    rows = Dataset.from_list([{"images": image, **row} for image in images])
    trainer = trl.DPOTrainer(model=str(run), args=trl.DPOConfig(**common), train_dataset=rows)
    trainer.train()
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[1] > 0


def test_vllms_backend_finds_what_it_asks_for(run, picture):
    """The questions of vLLM 0.33's `_try_resolve_transformers` and its multimodal class, asked of transformers."""
    entry = 'vllm.general_plugins"]\ndiffclip = "mllm.vllm_plugin:register"'
    assert entry in read_text(Path(__file__).parents[2] / "pyproject.toml")
    mllm.vllm_plugin.register()
    config = AutoConfig.from_pretrained(run)
    kind = getattr(transformers, read_json(run / "config.json")["architectures"][0])
    assert kind.is_backend_compatible() and config.get_text_config() is not config

    calls = []

    def attention(module, *args, **kwargs):
        calls.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    plain, processor = kind.from_pretrained(run).eval(), AutoProcessor.from_pretrained(run)
    AttentionInterface.register("counted", attention)
    config.get_text_config()._attn_implementation = "counted"
    model = AutoModel.from_config(config).eval()
    model.load_state_dict(plain.model.state_dict())
    image = picture(0, (40, 48))
    inputs = processor(text=[f"{IMAGE}\nIs there?"], images=[image], return_tensors="pt")
    with torch.no_grad():
        found, expected = model(**inputs)[0], plain.model(**inputs)[0]
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == config.text_config.num_hidden_layers and model.get_decoder() is model.language_model
    counted = processor._get_num_multimodal_tokens(image_sizes=[[40, 48]])["num_image_tokens"]
    placeholders = int((inputs["input_ids"] == config.image_token_index).sum())
    assert counted == [placeholders] == [len(features[0])]
