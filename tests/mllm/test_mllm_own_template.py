"""`template: auto` against what each tokenizer's own `apply_chat_template` makes of the same conversation."""

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat_templates import CHATML, TEMPLATES
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from diffclip.base.errors import InputError
from mllm.assemble import assemble
from mllm.conversation import IGNORE, IMAGE, encode, render
from mllm.data.__main__ import main
from mllm.model import load
from mllm.own_template import own_template
from mllm.pope.margins import yes_no_tokens
from mllm.processing import prepare_tokenizer, write_own_template
from stages import align, instruct

TALKS = [
    ["<image>\nIs there a dog?", "Yes"],
    ["<image>\n What is it? ", " A cat: ASSISTANT says </s\n", "Sure?", "No", "Why?", "Because\n\nof 1 < 2."],
    ["Is it Yes?\n<image>", "Yes", "Yes?", "Yes"],
    ["a", "a", "a", "a", "a", "a", "a", "a"],
    ["Describe", "answer-mark-0 @answer-mark-0 {{ 1 + 1 }} {% raw %}"],
]


def byte_tokenizer(template, bos, eos, others, adds=()):
    """One token per byte with special tokens and a chat template; `adds`: what it writes before and behind a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, **({"bos_token": bos} if bos else {}))
    tokenizer.add_special_tokens({"additional_special_tokens": list(others)})
    if adds:
        specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in adds if token != "$A"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=list(adds), special_tokens=specials)
    tokenizer.chat_template = template
    return tokenizer


def prepared(tokenizer):
    """(the tokenizer as `auto` leaves it, the template's source, ids of tokens that end an answer)."""
    own = copy.deepcopy(tokenizer)
    prepare_tokenizer(own, "vicuna", "lm")
    source = own_template(own)
    return own, source, write_own_template(own, source)


def turns(talk, system=""):
    """LLaVA's form, and that of chat templates."""
    roles = ("human", "gpt") * len(talk)
    rows = [{"from": "system", "value": system}] * bool(system)
    messages = [{"role": "system", "content": system}] * bool(system)
    rows += [{"from": role, "value": text} for role, text in zip(roles, talk)]
    messages += [{"role": {"human": "user", "gpt": "assistant"}[r], "content": t} for r, t in zip(roles, talk)]
    return rows, messages


def its_own(tokenizer, name, messages, ask=False):
    """What the tokenizer itself makes of messages; Gemma's system text in front of the first question."""
    if name == "gemma" and messages[0]["role"] == "system":
        first, question, *rest = messages
        messages = [{"role": "user", "content": first["content"] + "\n\n" + question["content"]}, *rest]
    options = {"date_string": "26 Jul 2024", "enable_thinking": False, "add_generation_prompt": ask, "tokenize": False}
    return tokenizer.apply_chat_template(messages, **options)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_training_text_and_prompts_are_the_tokenizers_own(name, system):
    template, bos, eos, others, _ = TEMPLATES[name]
    tokenizer = byte_tokenizer(template, bos, eos, others)
    _, source, _ = prepared(tokenizer)
    for talk in TALKS:
        for length in range(1, len(talk) + 1):
            rows, messages = turns(talk[:length], system)
            ask = length % 2 == 1
            text = "".join(segment.text for segment in render(rows, source, ask))
            expected = its_own(tokenizer, name, messages, ask)
            assert text == expected
            assert not ask or not render(rows, source, True)[-1].supervised


@pytest.mark.slow
@pytest.mark.parametrize("adds", ["nothing", "bos", "eos"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_tokenizers_own_and_answers_with_their_ends_are_learnt(name, adds):
    template, bos, eos, others, end = TEMPLATES[name]
    before, behind = ([bos] if adds == "bos" and bos else []), ([eos] if adds == "eos" else [])
    tokenizer = byte_tokenizer(template, bos, eos, others, [*before, "$A", *behind] if before or behind else ())
    own, source, ends = prepared(tokenizer)
    assert own.eos_token == end and ends[0] == own.convert_tokens_to_ids(end)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    for talk in TALKS:
        rows, messages = turns(talk, "Be brief.")
        encoded = encode(render(rows, source), own, image_tokens=1)
        text = its_own(tokenizer, name, messages)
        assert encoded["input_ids"] == own(text)["input_ids"]
        assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        learnt = tokenizer.decode([i for i in encoded["labels"] if i != IGNORE])
        answers = [piece for piece in learnt.split(end) if piece.strip()]
        assert [a.strip() for a in answers] == [t.strip() for t in talk[1::2]]
        assert learnt.count(end) == len(talk) // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_training_text_up_to_the_last_answer(name):
    template, bos, eos, others, _ = TEMPLATES[name]
    _, source, _ = prepared(byte_tokenizer(template, bos, eos, others))
    for talk in TALKS:
        prompt = "".join(s.text for s in render(turns(talk[:-1])[0], source, True))
        whole = render(turns(talk)[0], source)
        assert "".join(s.text for s in whole).startswith(prompt)
        last = max(i for i, s in enumerate(whole) if s.supervised and not whole[i - 1].supervised)
        assert prompt == "".join(s.text for s in whole[:last])


def test_a_saved_tokenizer_still_knows_its_template_and_adds_nothing(tmp_path):
    template, bos, eos, others, _ = TEMPLATES["llama3"]
    own, source, _ = prepared(byte_tokenizer(template, bos, eos, others, [bos, "$A"]))
    own.chat_template = "another"
    own.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert own_template(again) == source
    assert again("yes")["input_ids"] == own("yes")["input_ids"] == own("yes", add_special_tokens=False)["input_ids"]


def test_pictures_in_content_are_placeholders_in_front_of_the_text():
    template, bos, eos, others, _ = TEMPLATES["gemma"]
    own, source, _ = prepared(byte_tokenizer(template, bos, eos, others))
    content = [{"type": "image"}, {"type": "text", "text": "Red?"}]
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": content}]
    text = own.apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
    assert text == "<bos><start_of_turn>user\nShort.\n\n<image>\nRed?<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: None, "keeps no chat template"),
        (lambda t: t.replace("'<|im_end|>'", "''"), "no token of the tokenizer"),
        (
            lambda t: t.replace("+ message.content +", "+ (message.content if message.role == 'assistant' else '') +"),
            "not at all",
        ),
        (
            lambda t: t.replace(
                "+ message.content +", "+ message.content + (message.content if message.role == 'user' else '') +"
            ),
            "twice",
        ),
        (lambda t: t.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>ai\\n' }}"), "other words"),
        (lambda t: "{{ raise_exception('tools only') }}", "tools only"),
        (lambda t: t + "{% if %}", "refuses a conversation"),
        (lambda t: "{{ messages[0].content.__class__.mro() }}" + t, "refuses a conversation"),
        (
            lambda t: (
                "{%- for m in messages -%}{{ m.role }}"
                "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{%- endfor -%}"
            ),
            "generation",
        ),
    ],
)
def test_templates_that_cannot_be_trained_in_are_refused_by_what_they_do(change, reason):
    tokenizer = byte_tokenizer(change(CHATML), None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"))
    with pytest.raises(InputError, match=reason) as error:
        prepared(tokenizer)
    assert "\n" not in str(error.value) and "use vicuna" in str(error.value)


def test_a_text_that_changes_the_layout_is_refused_and_others_are_not():
    template, bos, eos, others, _ = TEMPLATES["qwen3"]
    _, source, _ = prepared(byte_tokenizer(template, bos, eos, others))
    rows, _ = turns(["Why?", "<think>\nhm\n</think>\n\nyes"])
    with pytest.raises(InputError, match="lays this conversation out in another way"):
        render(rows, source)
    assert render(turns(["Why?", "hm"])[0], source)


def test_generation_blocks_decide_what_is_learnt():
    blocks = CHATML.replace(
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
        "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}{% generation %}"
        "{{- message.content + '<|im_end|>' + '\\n' }}{%- endgeneration %}"
        "{%- else %}{{- message.content + '<|im_end|>' + '\\n' }}{%- endif %}",
    )
    assert blocks != CHATML
    tokenizer = byte_tokenizer(blocks, None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"))
    own, source, _ = prepared(tokenizer)
    for talk in TALKS[1:]:
        rows, messages = turns([text.replace(IMAGE, "") for text in talk])
        encoded = encode(render(rows, source), own, image_tokens=1)
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        expected = tokenizer.apply_chat_template(messages, **options)
        assert encoded["input_ids"] == expected["input_ids"]
        assert [label != IGNORE for label in encoded["labels"]] == [bool(m) for m in expected["assistant_masks"]]


def write_language_model(path, language_dir, name):
    """The tiny Qwen2 with a tokenizer that has another model's chat template."""
    template, bos, eos, others, _ = TEMPLATES[name]
    tokenizer = AutoTokenizer.from_pretrained(language_dir)
    tokenizer.add_special_tokens({"eos_token": eos, "pad_token": eos, **({"bos_token": bos} if bos else {})})
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in others], special_tokens=True)
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(language_dir)
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "smollm3"])
def test_an_assembled_model_is_asked_in_its_own_template_and_in_others(
    name, tower_dir, language_dir, picture, tmp_path
):
    vlm = assemble(tower_dir, write_language_model(tmp_path / "lm", language_dir, name), template="auto")
    assert vlm.end_token == TEMPLATES[name][4]
    vlm.save(tmp_path / "run")
    again = load(tmp_path / "run")
    talk = turns(["<image>\nRed?"], "Short.")[0]
    assert again.prompts([talk]) == vlm.prompts([talk]) and again.identity() == vlm.identity()
    assert again.encode(turns(["Red?", "Yes"])[0]) == vlm.encode(turns(["Red?", "Yes"])[0])
    yes, no = yes_no_tokens(vlm)
    assert {vlm.tokenizer.decode([token]) for token in (*yes, *no)} == {"Yes", "yes", "No", "no"}
    two = [turns(["<image>\nRed?"])[0], turns(["<image>\nIs there a small blue circle?"])[0]]
    images = [[picture(1)], [picture(2)]]
    alone = [vlm.answer([each], [image], max_new_tokens=6)[0] for each, image in zip(two, images)]
    processor = AutoProcessor.from_pretrained(tmp_path / "run")  # plain transformers, a batch of two
    inputs = processor(text=vlm.prompts(two), images=images, padding=True, return_tensors="pt")
    tokens = AutoModelForImageTextToText.from_pretrained(tmp_path / "run").generate(**inputs, max_new_tokens=6)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == alone
    with pytest.raises(InputError, match=r"in template `auto` the conversation shows 2 images, but 1 are given"):
        vlm.ask("<image> or <image>?", [picture(1)])
    vlm.use_template("vicuna")
    assert vlm.prompts([talk])[0].startswith("Short. USER:") and vlm.identity() != again.identity()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3"])
def test_align_and_instruct_in_a_models_own_template(name, tower_dir, language_dir, picture, tmp_path):
    lm = write_language_model(tmp_path / "lm", language_dir, name)
    (tmp_path / "images").mkdir()
    rows = []
    for n in range(8):
        picture(n).save(tmp_path / f"images/{n}.png")
        talk = ["<image>\nIs there a dog?", "Yes", "Sure?", "No"]
        rows.append({"id": n, "image": f"{n}.png", "conversations": turns(talk, "Be brief." if n % 2 else "")[0]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = [f"--data={tmp_path / 'rows.json'}", f"--image_root={tmp_path / 'images'}", "--global_batch_size=4"]
    how = ["--use_cpu=true", "--precision=fp32", "--num_workers=0", "--report_to=none", "--image_prefix="]
    shown = [{**row, "conversations": row["conversations"][-4:-2]} for row in rows]
    (tmp_path / "captions.json").write_text(json.dumps(shown))
    parts = [f"--vision_tower={tower_dir}", f"--language_model={lm}", f"--output_dir={tmp_path / 'align'}"]
    align.main([*parts, f"--data={tmp_path / 'captions.json'}", *data[1:], *how])
    vlm = load(tmp_path / "align")
    assert vlm.template == "vicuna"
    instruct.main([f"--model={tmp_path / 'align'}", "--template=auto", f"--output_dir={tmp_path / 'run'}", *data, *how])
    vlm = load(tmp_path / "run")
    assert vlm.model.config.conversation_template == "auto"
    assert vlm.end_token == TEMPLATES[name][4]
    assert vlm.tokenizer.convert_tokens_to_ids(vlm.end_token) in vlm.model.generation_config.eos_token_id
    assert vlm.ask("Is there a dog?", [picture(1)], max_new_tokens=3) is not None
    (prompt,) = vlm.prompts([[{"from": "human", "value": "<image>\nIs there a dog?"}]])
    content = [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    assert processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True) == prompt
    shown_once = AutoTokenizer.from_pretrained(lm)(prompt.replace(IMAGE, ""), add_special_tokens=False)["input_ids"]
    assert processor.tokenizer(prompt.replace(IMAGE, ""))["input_ids"] == shown_once
    assert (
        main(["check", str(tmp_path / "rows.json"), *data[1:2], "--template=auto", f"--model={tmp_path / 'run'}"]) == 0
    )
    file = tmp_path / "run/chat_template.jinja"
    file.write_text(file.read_text() + "!")
    with pytest.raises(InputError, match=r"chat_template\.jinja is not the one"):
        load(tmp_path / "run")


SPECIAL = re.compile(r"<\|?[a-zA-Z_/]+[a-zA-Z_0-9]*\|?>|<turn\|>|<\|turn>")
SHIPPED = find_spec("trl")  # not imported, which takes seconds
FOLDER = Path(SHIPPED.origin).parent / "chat_templates" if SHIPPED and SHIPPED.origin else Path("none")
REFUSED = re.compile("deepseek|glm4moe.jinja|diffusion_gemma_training|idefics|llava|smolvlm")  # of images, or reasoning


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="TRL, which ships language models' templates, is not installed")
def test_the_templates_of_language_models_that_trl_ships_are_followed_or_refused():
    followed, exact = [], []
    for file in sorted(FOLDER.glob("*.jinja")):
        template = file.read_text(encoding="utf-8")
        tokens = sorted({*SPECIAL.findall(template)} - {IMAGE})
        tokenizer = byte_tokenizer(template.replace("strftime_now(", "'a day'.format("), "<BOS>", "<EOS>", tokens)
        try:
            own, source, _ = prepared(tokenizer)
        except InputError as error:
            assert REFUSED.search(file.name), (file.name, error)
            continue
        followed.append(file.name)
        for talk in TALKS:
            rows, messages = turns(talk, "" if file.name.startswith("gemma") else "Be brief.")
            segments = render(rows, source)
            options = {"enable_thinking": False, "return_assistant_tokens_mask": "_training" in file.name}
            text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
            assert "".join(segment.text for segment in segments) == text, file.name
            learnt = "".join(segment.text for segment in segments if segment.supervised)
            assert all(answer.strip() in learnt for answer in talk[1::2]), file.name
            if options["return_assistant_tokens_mask"] and IMAGE not in text:
                theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
                encoded = encode(segments, own, image_tokens=1)
                assert encoded["input_ids"] == theirs["input_ids"]
                ours, its = [i != IGNORE for i in encoded["labels"]], [bool(m) for m in theirs["assistant_masks"]]
                assert not any(learnt and not own for learnt, own in zip(ours, its)), file.name
                exact.append(ours == its)  # others have blocks that begin in the prompt
    assert sum(exact) >= 20
    assert len(followed) > 50 and {"llama3.jinja", "qwen3.jinja", "gemma3.jinja", "phi3.jinja"} <= {*followed}


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted",
    [
        "{%- for a in range(99999) %}{% for b in range(99999) %}{% set x = a * b %}{% endfor %}{% endfor %}",
        "{{ 'x' * 9999999999 }}",
        "{%- set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
    ],
    ids=["endless", "as wide as memory", "doubling"],
)
def test_a_template_that_takes_all_time_or_memory_is_refused(planted, monkeypatch):
    monkeypatch.setattr("diffclip.base.bounded.comes_to_an_end.__defaults__", (1, 200 << 20))
    tokenizer = byte_tokenizer(planted + CHATML, "", "<|im_end|>", ["<|im_start|>"])
    with pytest.raises(InputError, match=r"template auto: .* takes more than .* for a short conversation; use vicuna"):
        prepared(tokenizer)
