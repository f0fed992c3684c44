"""Tokens counted by word are the tokens that the tokenizer gives, whatever its kind and the text."""

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mllm.data.word_tokens import TokenCounter

CHARACTERS = [*"ab7.,_(\n\t\u3000\u00a0\x1cé\u0301\u200d中א🙂", "the", "'s", "e\u0301", "<end>", "\r\n", *"     "]
QWEN = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(CHARACTERS, k=rng.randint(0, 14))) for _ in range(count)]


def split_by(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def bpe(pre, normalizer=None, *, end: str = "<end>", rstrip: bool = False, begins: bool = False) -> Tokenizer:
    """A byte-level BPE, learnt from texts like those that it is asked about."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("<end>", "") for text in texts(3000, seed=1)], trainer)
    tokenizer.add_tokens([AddedToken(end, special=True, rstrip=rstrip)])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<end> $A <end>", special_tokens=[("<end>", tokenizer.token_to_id("<end>"))]
        )
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and XLM-R's: a mark before the first word, and pieces of no fixed places."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(texts(3000, seed=1), trainer)
    return tokenizer


def superwords() -> Tokenizer:
    """A BPE whose tokens reach over spaces: only digits are kept apart."""
    return bpe(split_by(r"\p{N}+"))


KINDS = {
    "Qwen": (lambda: bpe(split_by(QWEN), normalizers.NFC()), True),
    "Llama-3": (lambda: bpe(split_by(LLAMA3), begins=True), True),
    "GPT-2": (lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), True),
    "RoBERTa": (lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), None),
    "T5": (unigram, False),
    "tokens over spaces": (superwords, False),
    "lower case": (lambda: bpe(split_by(QWEN), normalizers.NFKC()), False),
    "a token with a space in it": (lambda: bpe(split_by(QWEN), end="a b"), False),
    "a token that takes the spaces behind it": (
        lambda: bpe(split_by(QWEN), rstrip=True),
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_words_add_up_to_the_text(kind):
    make, by_word = KINDS[kind]
    backend = make()
    count = TokenCounter(backend)
    asked = texts(20_000)
    assert count(asked) == [len(tokens) for tokens in backend.encode_batch_fast(asked)]
    if by_word is not None:
        assert count.by_word == by_word


def test_the_tokens_over_spaces_are_real():
    """Without the question whether a tokenizer begins anew at a space, that one would be counted wrongly."""
    backend = superwords()
    count = TokenCounter(backend)
    count.by_word = True
    asked = texts(2000)
    assert count(asked) != [len(tokens) for tokens in backend.encode_batch_fast(asked)]
