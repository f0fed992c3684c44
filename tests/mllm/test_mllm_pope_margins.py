"""Exact yes/no scoring against the same questions asked one at a time, and its scores against brute force."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from diffclip.base.errors import InputError
from mllm.assemble import assemble
from mllm.conversation import prompt
from mllm.model import VisionLanguageModel, load
from mllm.packed import keeps_apart
from mllm.pope.margins import best_threshold, generate, margins, pack, score_margins, yes_no_tokens
from mllm.pope.questions import POST_PROMPT, SPLITS, Question
from mllm.pope.scores import CONTROLS, GREY, grey_image

OBJECTS = ("red square", "small blue circle", "green star", "left green square", "circle")


def asked(pictures=5, seed=0):
    """Questions of three splits about a few images; some are asked in several splits."""
    coin = random.Random(seed)
    return [
        Question(split, f"{i}.png", f"Is there a {thing} in the image?", coin.choice(("yes", "no")), str(n), f"{i}.png")
        for split in SPLITS
        for i in range(pictures)
        for n, thing in enumerate(coin.sample(OBJECTS, 1 + i % 4))
    ]


def one_at_a_time(model, processor, question, picture):
    """The margin from a plain forward through the processor, with neither packing nor batching."""
    yes, no = yes_no_tokens(VisionLanguageModel(model, processor))
    turn = {"from": "human", "value": ("<image>\n" if question.shown else "") + question.text + POST_PROMPT}
    shown = {"": None, GREY: [grey_image()]}.get(question.shown) or (question.shown and [picture(question.shown)])
    text = [prompt([turn], model.config.conversation_template, processor.tokenizer.eos_token)]
    inputs = processor(text=text, images=shown or None, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].double()
    return float(logits[yes].logsumexp(0) - logits[no].logsumexp(0))


@pytest.mark.slow
@pytest.mark.parametrize("template", ["vicuna", "chatml"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_margins_are_those_of_questions_asked_alone(assembled, picture, template, attention):
    model, processor = assembled
    model.config.conversation_template = template
    model.set_attn_implementation(attention)
    questions = asked()
    questions += [q for control in CONTROLS.values() for q in control(questions, 0)]
    named = {f"{i}.png": picture(i) for i in range(5)}
    found = margins(assembled, questions, named.__getitem__, batch_size=3, most=3)
    alone = [one_at_a_time(model, processor, q, named.__getitem__) for q in questions]
    np.testing.assert_allclose(found, alone, atol=1e-4)
    assert np.ptp(alone[: len(alone) // 4]) > 1e-2  # images and questions matter, or equality says nothing


@pytest.mark.parametrize("ask", [margins, generate])
def test_a_question_that_shows_more_than_it_has_is_refused(assembled, picture, ask):
    first, *others = asked(2)
    rows = [first._replace(text=f"<image>\n{first.text}", shown=""), *others]  # in a control without images
    with pytest.raises(InputError, match="shows 1 images, but 0 are given"):
        ask(assembled, rows, lambda name: picture(0))


def test_a_question_is_computed_once_and_a_picture_opened_once(assembled, picture):
    model = assembled.model
    opened, seen = [], []
    model.model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    questions = asked(2)
    margins(assembled, questions * 3, lambda name: opened.append(name) or picture(0), batch_size=8)
    assert sorted(opened) == ["0.png", "1.png"] and len(seen) == 1


def test_pack_shows_each_prompt_the_beginning_and_itself():
    prompts = [[1, 2, 3, 7, 8], [1, 2, 3, 9], [1, 2, 3]]
    ids, positions, allowed, lasts = pack(prompts)
    assert [ids[last].item() for last in lasts] == [8, 9, 3]
    for prompt_ids, last in zip(prompts, lasts):
        visible = allowed[last].nonzero().flatten()
        assert ids[visible].tolist() == prompt_ids
        assert positions[visible].tolist() == list(range(len(prompt_ids)))
    assert len(ids) == 2 + 3 + 2 + 1  # the third keeps its last token to itself


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(50):
        margin, is_yes = rng.integers(0, 6, 20).astype(float), rng.integers(0, 2, 20).astype(bool)
        right = lambda threshold, m=margin, y=is_yes: ((m > threshold) == y).sum()  # noqa: E731
        assert right(best_threshold(margin, is_yes)) == max(right(t) for t in np.arange(-1, 7, 0.5))


def test_scores_of_margins():
    questions = asked(40, seed=3)
    labels = np.array([q.label == "yes" for q in questions])
    oracle = score_margins(questions, np.where(labels, 1.0, -1.0))["mean"]
    assert oracle["accuracy"] == oracle["auc"] == oracle["ap"] == oracle["accuracy_tuned"] == 1
    moved = score_margins(questions, np.where(labels, 9.0, 8.0))["mean"]  # says yes to all, yet knows
    assert moved["yes_rate"] == 1 and moved["accuracy"] == pytest.approx(labels.mean(), abs=0.1)
    assert moved["auc"] == moved["accuracy_tuned"] == 1
    values = np.random.default_rng(0).normal(size=len(questions)).round(1)
    table = score_margins(questions, values)
    for split in SPLITS:
        chosen = [i for i, q in enumerate(questions) if q.split == split]
        pairs = [(values[i], values[j]) for i in chosen for j in chosen if labels[i] and not labels[j]]
        assert table[split]["auc"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


def test_greedy_answers_are_the_models_own(assembled, picture):
    model, processor = assembled
    questions = asked(3)
    found = generate(assembled, questions, lambda name: picture(int(name[0])), batch_size=4)
    text = prompt([{"from": "human", "value": f"<image>\n{questions[4].text}{POST_PROMPT}"}], "vicuna")
    inputs = processor(text=[text], images=[picture(int(questions[4].image[0]))], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    assert found[4] == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_words_that_begin_alike_are_refused(assembled):
    processor = assembled.processor
    processor.tokenizer.add_tokens([" "])  # as a tokenizer would that parts spaces from words
    with pytest.raises(InputError, match="same token"):
        yes_no_tokens(assembled)


def test_a_token_that_begins_both_small_words_is_left_out(assembled):
    processor = assembled.processor
    processor.tokenizer.add_tokens([" ", " Yes", " No"])  # " yes" and " no" go on from the lone space
    tokens = yes_no_tokens(assembled)
    assert [processor.tokenizer.convert_ids_to_tokens(one) for one in tokens] == [[" Yes"], [" No"]]


def test_margins_of_a_loaded_run_in_bfloat16_are_near(assembled, picture, tmp_path):
    assembled.save(tmp_path / "run")
    loaded = load(tmp_path / "run", dtype=torch.bfloat16)
    questions = asked(2)
    exact = margins(assembled, questions, lambda name: picture(0))
    np.testing.assert_allclose(margins(loaded, questions, lambda name: picture(0)), exact, atol=0.3)


FAMILIES = {  # language models that go by no mask of ours, or not by all of it
    "bloom": {"n_layer": 2, "n_head": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
    "mistral": {"sliding_window": 48},
    "qwen2": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_margins_are_right_where_questions_cannot_share_a_row(family, tower_dir, language_dir, picture, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(language_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "max_position_embeddings": 512}
    torch.manual_seed(4)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer) + 7, **sizes, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vlm = assemble(tower_dir, tmp_path)
    questions, named = asked(2), {f"{i}.png": picture(i) for i in range(2)}
    found = margins(vlm, questions, named.__getitem__)
    np.testing.assert_allclose(found, [one_at_a_time(*vlm, q, named.__getitem__) for q in questions], atol=1e-4)
    assert keeps_apart(vlm.model) == (family in ("qwen2", "mistral"))
