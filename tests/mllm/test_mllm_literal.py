"""Control tokens that a text writes stay text, in training and in asking, for every kind of tokenizer."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from diffclip.base.errors import InputError
from mllm.conversation import IGNORE, encode, render
from mllm.data.examples import ConversationDataset
from mllm.data.judge import token_lengths
from mllm.data.rows import load_rows
from mllm.literal import MARK, as_text, control_tokens, renamed, turns_as_text

TEXT = ["Is there a red square in the image? Yes no <s> </s> [CLS] small blue circle left of the green star"] * 4
WRITTEN = "What is <|im_end|> good for, <|im_start|>?"


def asked(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def kinds():
    """Tokenizers whose special tokens are part of their vocabulary, of all models that there are."""
    special = ["<unk>", "<s>", "</s>", "[CLS]"]
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    byte_pairs = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    byte_pairs.pre_tokenizer, byte_pairs.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    byte_pairs.post_processor = processors.Sequence([around])
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer, unigram.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    pieces = Tokenizer(models.WordPiece(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.post_processor = pre_tokenizers.BertPreTokenizer(), around
    options = {"special_tokens": special, "show_progress": False, "vocab_size": 300}
    for tokenizer, trainer in (
        (byte_pairs, trainers.BpeTrainer(**options)),
        (unigram, trainers.UnigramTrainer(unk_token="<unk>", **options)),
        (pieces, trainers.WordPieceTrainer(**options)),
    ):
        tokenizer.train_from_iterator(TEXT, trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        fast.add_special_tokens({"additional_special_tokens": ["[CLS]"]})
        yield type(tokenizer.model).__name__, fast


@pytest.mark.parametrize("name", ["BPE", "Unigram", "WordPiece"])
def test_no_special_token_comes_of_a_text_and_all_other_ids_stay(name):
    tokenizer = dict(kinds())[name]
    control = control_tokens(tokenizer)
    special = set(tokenizer.convert_tokens_to_ids([*control]))
    rng = random.Random(0)
    for _ in range(300):
        words = [rng.choice([*control, "red", "<", "/s>", "square", "s>", " ", "?"]) for _ in range(rng.randint(1, 9))]
        text = "".join(words)
        (seen,), backend = renamed([as_text(text, control) + MARK], tokenizer)  # a mark, so that it is the other one
        assert seen == text
        found = backend.encode(seen, add_special_tokens=False)
        assert not special - {tokenizer.unk_token_id} & {*found.ids}, text
        tokenizer.backend_tokenizer.encode_special_tokens = True  # the library's own way to take all of it for text
        wanted = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.backend_tokenizer.encode_special_tokens = False
        if name != "Unigram" and not any(token in text for token in control):
            assert found.ids == wanted
        # what the template writes are the special tokens still, and what it puts around a text
        (seen,), backend = renamed([f"</s>red{MARK} square<s>"], tokenizer)
        assert backend.encode(seen).ids == tokenizer.backend_tokenizer.encode("</s>red square<s>").ids


@pytest.mark.parametrize("template", ["chatml", "vicuna"])
def test_a_conversation_about_control_tokens_is_learnt_and_asked_as_text(template, assembled):
    model, processor = assembled
    tokenizer = processor.tokenizer
    assembled.use_template(template)
    turns = asked(WRITTEN, "It is <|im_end|>, the end.")
    control = control_tokens(tokenizer)
    encoded = encode(render(turns_as_text(turns, control), template), tokenizer, 1)
    plain = asked("What is X good for, Y?", "It is X, the end.")
    end, start = (tokenizer.convert_tokens_to_ids(f"<|im_{word}|>") for word in ("end", "start"))
    wanted = encode(render(plain, template), tokenizer, 1)["input_ids"]
    for control_id in (end, start):  # as often as the template writes them
        assert encoded["input_ids"].count(control_id) == wanted.count(control_id)
    text = "".join(s.text for s in render(turns, template))
    assert tokenizer.decode(encoded["input_ids"]) == text  # byte for byte what was written
    learnt = [label for label in encoded["labels"] if label != IGNORE]
    assert tokenizer.decode(learnt[:-1]).strip() == "It is <|im_end|>, the end." and learnt[-1] == end
    # between the template's own tokens the ids are those of the library's switch for all of a text
    tokenizer.backend_tokenizer.encode_special_tokens = True
    inside = tokenizer.backend_tokenizer.encode(" It is <|im_end|>, the end."[template == "chatml" :]).ids
    tokenizer.backend_tokenizer.encode_special_tokens = False
    assert learnt[:-1] == inside
    ask = [turns[:1], plain[:1]]
    batch = assembled.inputs(assembled.prompts(ask), [[], []])
    for ids, mask, one in zip(batch["input_ids"], batch["attention_mask"], ask):
        assert ids[mask.bool()].tolist() == assembled.encode(one, ask=True)["input_ids"]
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


def test_rows_with_control_tokens_are_learnt_and_counted(assembled, tmp_path):
    rows = [{"conversations": asked(WRITTEN, "<|im_end|><|im_end|>")}, {"conversations": asked("Red?", "Yes")}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    control = control_tokens(assembled.tokenizer)
    loaded = load_rows([tmp_path / "rows.json"], tmp_path, control=control)
    assert len(loaded) == 2 and not loaded.problems
    dataset = ConversationDataset(loaded, assembled.processor, template="vicuna")
    lengths = token_lengths(loaded, assembled.tokenizer, dataset.image_tokens, "vicuna")
    assert lengths.tolist() == [len(dataset[i]["input_ids"]) for i in (0, 1)]
    end = assembled.tokenizer.eos_token_id
    assert [dataset[i]["input_ids"].tolist().count(end) for i in (0, 1)] == [1, 1]


def test_marks_in_a_text_are_refused_and_marking_twice_changes_nothing():
    once = turns_as_text(asked("a <|im_<|im_end|>end|> b", "c"), ["<|im_end|>"])
    assert "<|im_end|>" not in once[0]["value"] and once[0]["value"].replace(MARK, "") == "a <|im_<|im_end|>end|> b"
    assert as_text(once[0]["value"], ["<|im_end|>"]) == once[0]["value"]
    for mark in ("\ufdd0", "\ufdd1"):
        with pytest.raises(InputError, match="no characters; write it without"):
            turns_as_text(asked(f"a{mark}", "b"), ["<|im_end|>"])
