"""Tokens of very many texts, counted without tokenising each: the same words come again and again."""

import re

from tokenizers import Tokenizer
from tokenizers.normalizers import NFC

BEFORE_WORD = re.compile(r"(?<=\S)(?= \S)")  # where one space lies between two words, before it
MOST = 1_000_000  # words that are kept, at most some 150 MB
LONGEST = 32  # characters of one: longer ones, as whole sentences of scripts without spaces, do not come again
SAMPLES = "aZ7.é中'_<\N{HEBREW LETTER ALEF}"


class TokenCounter:
    """How many tokens texts have, special ones around them counted.

    The byte-level BPEs of GPT-2, Llama-3, Qwen and most since begin a token anew at each space before a word, so a text
    has as many tokens as its words, and each word is tokenised once. Other tokenizers are given the whole texts.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.by_word = begins_anew(backend)
        self.around = len(backend.encode(""))
        self.known: dict[str, int] = {}  # what lies between two places of BEFORE_WORD -> its tokens

    def __call__(self, texts: list[str]) -> list[int]:
        if not self.by_word:
            return [len(tokens) for tokens in self.backend.encode_batch_fast(texts)]  # in Rust's threads
        if len(self.known) > MOST:
            self.known.clear()
        split = [BEFORE_WORD.split(text) for text in texts]
        new = list({word for words in split for word in words} - self.known.keys())
        encoded = self.backend.encode_batch_fast(new, add_special_tokens=False)
        self.known.update((word, len(tokens)) for word, tokens in zip(new, encoded))
        counts = [self.around + sum(map(self.known.__getitem__, words)) for words in split]
        for word in new:
            if len(word) > LONGEST:
                del self.known[word]
        return counts


def begins_anew(backend: Tokenizer) -> bool:
    """Whether no token of `backend` reaches over, or depends on, what lies before a word's space."""
    added = backend.get_added_tokens_decoder().values()
    if type(backend.normalizer) not in (type(None), NFC):
        return False
    if any(token.lstrip or token.rstrip or re.search(r"\S | \S", token.content) for token in added):
        return False
    if backend.pre_tokenizer is None or getattr(backend.model, "dropout", None):
        return False

    def parts(text: str) -> list[str]:
        return [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    return all(parts(f"{a} {b}") == parts(a) + parts(f" {b}") for a in SAMPLES for b in SAMPLES)
