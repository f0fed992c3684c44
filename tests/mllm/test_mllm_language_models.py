"""Any causal language model: a text has the logits, the loss and the next words in it that the model itself gives."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.language_models import examine
from diffclip.base.errors import InputError
from mllm.assemble import assemble
from mllm.lora import base_weights
from mllm.model import VisionLanguageModel, load
from mllm.weights import parts
from stages import instruct

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OWN = {  # what decides the logits of a family beside the common sizes
    "granite": {"logits_scaling": 7.0, "embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}
FAMILIES = [
    *("llama", "qwen2", "qwen3", "mistral", "phi3", "granite", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text"),
    *("gpt2", "opt", "falcon_h1", "olmo2", "smollm3", "stablelm", "gpt_neox", "phi", "nanochat"),
]
TEXT = "USER: Is there a red square? ASSISTANT: yes"


def write_language_model(path, family, language_dir):
    tokenizer = AutoTokenizer.from_pretrained(language_dir)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = GPT2 if family == "gpt2" else TINY
    torch.manual_seed(4)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer) + 7, **sizes, **ends, **OWN.get(family, {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_words_are_the_language_models_own(family, tower_dir, language_dir, tmp_path):
    path = write_language_model(tmp_path / "lm", family, language_dir)
    own = AutoModelForCausalLM.from_pretrained(path).eval()
    model, processor = assemble(tower_dir, path)
    ids = processor.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :5] = -100
    expected = own(input_ids=ids, labels=labels)
    found = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(model.train()(input_ids=ids, labels=labels).loss, own(input_ids=ids, labels=labels).loss)
    model.eval()
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **how), own.generate(input_ids=ids, **how))
    assert base_weights(model).keys() == parts(model)["language_model"].state_dict().keys()
    VisionLanguageModel(model, processor).save(tmp_path / "run")
    again, _ = load(tmp_path / "run")
    torch.testing.assert_close(again(input_ids=ids).logits, expected.logits)


def test_training_through_the_head_gives_the_language_models_gradients(tower_dir, language_dir, tmp_path):
    path = write_language_model(tmp_path / "lm", "granite", language_dir)
    own = AutoModelForCausalLM.from_pretrained(path).train()
    model, processor = assemble(tower_dir, path)
    ids = processor.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    own(input_ids=ids, labels=ids).loss.backward()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    expected = own.base_model.layers[0].mlp.down_proj.weight.grad
    torch.testing.assert_close(model.model.language_model.layers[0].mlp.down_proj.weight.grad, expected)


@pytest.mark.parametrize("family", ["mamba", "bert"])
def test_what_cannot_be_used_is_refused_by_name(family, tower_dir, language_dir, tmp_path):
    path = write_language_model(tmp_path / "lm", family, language_dir)
    with pytest.raises(InputError, match=r"language models of class \w+ cannot be used.*use another") as error:
        assemble(tower_dir, path)
    assert "\n" not in str(error.value)


def test_a_head_that_gives_other_logits_is_refused(tower_dir, language_dir, monkeypatch):
    from mllm.llava import DiffCLIPLlavaForConditionalGeneration as Model

    monkeypatch.setattr(Model, "logits", lambda self, hidden: self.lm_head(hidden) * 1.01)
    with pytest.raises(InputError, match=r"Qwen2ForCausalLM cannot be used.*1\.0% away"):
        assemble(tower_dir, language_dir)


@pytest.mark.parametrize("family", ["granite", "qwen2"])
def test_runs_of_earlier_versions_load_unless_their_logits_were_others(family, tower_dir, language_dir, tmp_path):
    path = write_language_model(tmp_path / "lm", family, language_dir)
    assemble(tower_dir, path).save(tmp_path / "run")
    file = tmp_path / "run/fingerprints.json"
    prints = json.loads(file.read_text())
    del prints["settings"]["own_logits"]
    file.write_text(json.dumps(prints))
    if family == "qwen2":
        load(tmp_path / "run")
    else:
        with pytest.raises(InputError, match=r"granite.*train it again"):
            load(tmp_path / "run")


EXAMINED = {  # by what decides: Gemma-4 needs token ids beside embeddings, Whisper's layers come with an encoder
    **dict.fromkeys(("gemma4_text", "whisper", "bart", "xlnet", "rwkv", "llama4_text"), "refused"),
    **dict.fromkeys(("gpt2", "bloom", "jamba", "mixtral"), "works"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", EXAMINED)
def test_the_sweep_over_all_families_finds_what_works_and_what_is_refused(family, tower_dir, tmp_path):
    verdict, why = examine(family, tower_dir, tmp_path)
    assert verdict == EXAMINED[family], why
    assert "\n" not in why and (verdict == "works" or "use another" in why)
    assert ("not with packing" in why) == (family in ("bloom", "jamba"))


@pytest.mark.slow
def test_packing_is_refused_where_examples_would_see_each_other(tower_dir, language_dir, tmp_path):
    path = write_language_model(tmp_path / "lm", "falcon_h1", language_dir)
    assemble(tower_dir, path).save(tmp_path / "align")
    turns = [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": "Yes"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}] * 4))
    data = [f"--model={tmp_path / 'align'}", f"--data={tmp_path / 'rows.json'}", f"--image_root={tmp_path}"]
    how = ["--use_cpu=true", "--precision=fp32", "--report_to=none", "--global_batch_size=2", "--num_workers=0"]
    with pytest.raises(InputError, match=r"packing.*FalconH1Model.*set packing false"):
        instruct.main([*data, *how, f"--output_dir={tmp_path / 'run'}", "--packing=true", "--max_length=128"])
    instruct.main([*data, *how, f"--output_dir={tmp_path / 'run'}", "--max_length=128", "--learns=language_model"])
