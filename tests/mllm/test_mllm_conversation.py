"""Prompts and supervision against the official templates, and labels against the text they stand for."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm.conversation import IGNORE, IMAGE, Segment, chat_template, encode, prompt, render

OFFICIAL_NAMES = {"pretrain": "plain", "qwen2_instruct": "vicuna"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that every character boundary is a token boundary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, "<|im_start|>"]})
    return tokenizer


@pytest.fixture
def records(golden):
    return json.loads((golden("08_chat") / "conversations.json").read_text())["records"]


def test_segments_equal_the_official_templates(records):
    for record in records:
        segments = render(record["conversation"], OFFICIAL_NAMES[record["template"]])
        assert "".join(s.text for s in segments) == record["prompt"], record["name"]
        # Where an answer quotes the separator, the official bookkeeping drops the sample; spans do not.
        if not record["whole_sample_ignored_after_mismatch_warning"]:
            assert [s._asdict() for s in segments] == record["segments"], record["name"]


def test_quoted_separator_keeps_its_supervision(records):
    record = next(r for r in records if r["name"] == "answer_contains_separator")
    supervised = [s.text for s in render(record["conversation"], "vicuna") if s.supervised]
    assert supervised == [" It says: ASSISTANT: hello<|im_end|>"]


def test_generation_prompt_is_the_training_prompt_without_the_last_answer(records):
    for record in records:
        if record["template"] == "qwen2_instruct":
            assert prompt(record["conversation"][:-1], "vicuna") == record["generation_prompt"], record["name"]


@pytest.mark.parametrize("template", ["plain", "vicuna", "chatml"])
def test_labels_are_exactly_the_supervised_text(records, template):
    tokenizer = byte_tokenizer()
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    for record in records:
        segments = render(record["conversation"], template)
        encoded = encode(segments, tokenizer, image_tokens=5)
        ids, labels = encoded["input_ids"], encoded["labels"]
        assert len(ids) == len(labels)
        assert all(label in (IGNORE, token) for token, label in zip(ids, labels))
        learnt = tokenizer.decode([t for t in labels if t != IGNORE])
        assert learnt == "".join(s.text for s in segments if s.supervised), record["name"]
        assert ids.count(image_id) == 5 * "".join(s.text for s in segments).count(IMAGE)
        assert not any(label == image_id for label in labels)


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_jinja_template_gives_the_same_prompt(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [
        {"from": "human", "value": f"{IMAGE}\nWhat's this?"},
        {"from": "gpt", "value": "A cup."},
        {"from": "human", "value": "Its colour?"},
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What's this?"}, {"type": "image"}]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Its colour?"},
    ]
    (rendered,), _ = render_jinja_template([messages], chat_template=chat_template(template))
    assert rendered == prompt(conversation, template)


def test_chatml_is_qwens_form():
    conversation = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    text = "".join(s.text for s in render(conversation, "chatml"))
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )
    assert [s.text for s in render(conversation, "chatml") if s.supervised] == ["Hello<|im_end|>"]


@pytest.mark.parametrize(
    "roles",
    [[], ["human"], ["human", "human"], ["gpt"], ["human", "gpt", "gpt"], ["human", "system", "gpt"], ["system"]],
)
def test_turns_out_of_order_are_refused(roles):
    with pytest.raises(ValueError):
        render([{"from": r, "value": "x"} for r in roles], "vicuna")


def test_unknown_template_is_refused():
    with pytest.raises(ValueError, match="vicuna"):
        render([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "llama")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_labels_are_those_of_a_walk_over_all_tokens(seed, assembled):
    """The definition, token by token, on random text with characters of one to four bytes and many answers."""
    tokenizer = assembled[1].tokenizer
    rng = np.random.default_rng(seed)
    letters = list("ab .,\n") + ["é", "人", "🙂", "yes ", " no", "<|im_end|>"]
    segments = []
    for n in range(int(rng.integers(1, 12))):
        text = "".join(rng.choice(letters, int(rng.integers(0, 12))))
        segments.append(Segment(text + (IMAGE if rng.random() < 0.2 and n % 2 == 0 else ""), n % 2 == 1))
    found = encode(segments, tokenizer, image_tokens=3)
    text = "".join(s.text for s in segments)
    ends = np.cumsum([len(s.text) for s in segments])
    ids, labels = [], []
    whole = tokenizer(text, return_offsets_mapping=True)
    for token, (_, end) in zip(whole["input_ids"], whole["offset_mapping"]):
        image = token == tokenizer.convert_tokens_to_ids(IMAGE)
        learnt = segments[int(np.searchsorted(ends, end))].supervised and not image
        ids += [token] * (3 if image else 1)
        labels += [token if learnt else IGNORE] * (3 if image else 1)
    assert found == {"input_ids": ids, "labels": labels}
