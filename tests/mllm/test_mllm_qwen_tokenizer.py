"""Prompts and labels with the real tokenizer of Qwen2.5, from the folder that DIFFCLIP_QWEN_TOKENIZER names."""

import json
import os

import pytest
from transformers import AutoTokenizer

from mllm.conversation import CHATML_SYSTEM, IGNORE, encode, render
from mllm.processing import prepare_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    folder = os.environ.get("DIFFCLIP_QWEN_TOKENIZER", "")
    if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
        pytest.skip("DIFFCLIP_QWEN_TOKENIZER names no folder with Qwen2.5's tokenizer.json")
    made = AutoTokenizer.from_pretrained(folder)
    prepare_tokenizer(made, "vicuna", folder)
    return made


CONVERSATION = [
    {"from": "human", "value": "<image>\nIs there a dog? 狗 🐕"},
    {"from": "gpt", "value": "Yes, two:\n- a puppy\n- it's 老"},
    {"from": "human", "value": "What colour?"},
    {"from": "gpt", "value": "Brown."},
]


def supervised_runs(encoded):
    """The stretches of supervised ids."""
    runs, current = [], []
    for token, label in zip(encoded["input_ids"], encoded["labels"]):
        if label != IGNORE:
            assert label == token
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    return [*runs, current] if current else runs


@pytest.mark.parametrize("template, lead", [("vicuna", " "), ("chatml", "")])
def test_answers_and_their_end_tokens_alone_are_supervised(tokenizer, template, lead):
    encoded = encode(render(CONVERSATION, template), tokenizer, image_tokens=196)
    answers = [turn["value"] for turn in CONVERSATION if turn["from"] == "gpt"]
    assert [tokenizer.decode(run) for run in supervised_runs(encoded)] == [f"{lead}{a}<|im_end|>" for a in answers]
    assert all(run[-1] == 151645 for run in supervised_runs(encoded))  # Qwen's own <|im_end|>
    assert encoded["input_ids"].count(tokenizer.convert_tokens_to_ids("<image>")) == 196


def test_chatml_is_qwens_own_template(tokenizer):
    if not tokenizer.chat_template:
        pytest.skip("this copy of the tokenizer brings no chat template")
    messages = [{"role": "system", "content": CHATML_SYSTEM}]
    messages += [
        {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]} for turn in CONVERSATION
    ]
    ours = "".join(segment.text for segment in render(CONVERSATION, "chatml"))
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False)


def test_vicuna_prompts_of_the_official_code_have_its_ids(tokenizer, golden):
    """Text is tokenised as a whole: decoding gives it back, and no token crosses from a question into an answer."""
    records = json.loads((golden("08_chat") / "conversations.json").read_text())["records"]
    for record in records:
        template = {"pretrain": "plain", "qwen2_instruct": "vicuna"}[record["template"]]
        segments = render(record["conversation"], template)
        encoded = encode(segments, tokenizer, image_tokens=1)
        assert tokenizer.decode(encoded["input_ids"]) == record["prompt"]
        learnt = "".join(s.text for s in segments if s.supervised)
        assert "".join(tokenizer.decode(run) for run in supervised_runs(encoded)) == learnt, record["name"]
