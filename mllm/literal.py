"""Control tokens that are written in a text stay text: `<|im_end|>` in a question does not end it.

A mark inside such a word keeps it from being one of the tokenizer's special tokens, through any template. Before the
text becomes tokens the marks go; a tokenizer in which the special tokens have other names, which the template's own
have been given, reads it.
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from diffclip.base.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"
MARK, QUOTE = "\ufdd0", "\ufdd1"  # for which Unicode has no characters: programs may use them among themselves


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """What a tokenizer takes for one of its special tokens wherever it is written.

    `<image>` is left out, which questions may hold, and so is white space, which every template does.
    """
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted(content for content in special if content.strip() and content != IMAGE))


def as_text(text: str, control: Iterable[str]) -> str:
    """`text` with a mark in every control token of more than one character, so that it stays text."""
    control = [token for token in control if len(token) > 1]
    while written := [token for token in control if token in text]:  # a mark may lay another one free
        for token in written:
            text = text.replace(token, f"{token[0]}{MARK}{token[1:]}")
    return text


def turns_as_text(turns: Sequence[dict[str, str]], control: Sequence[str]) -> list[dict[str, str]]:
    """Turns with `as_text` done to what they say; InputError if they hold the marks themselves."""
    values = [turn.get("value") for turn in turns]
    together = "\n".join(value for value in values if isinstance(value, str))
    if not any(token in together for token in (MARK, QUOTE, *control)):  # of nearly all rows, so asked once
        return list(turns)
    if MARK in together or QUOTE in together:
        raise InputError("a text contains U+FDD0 or U+FDD1, which are no characters; write it without")
    return [
        {**turn, "value": as_text(value, control)} if isinstance(value, str) else turn
        for turn, value in zip(turns, values)
    ]


def renamed(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[str], Tokenizer]:
    """Texts with marks, and the tokenizer's backend, as both must be for each other: the ids are the tokenizer's own.

    Where no text has a mark both are what they were.
    """
    if not any(MARK in text for text in texts):
        return list(texts), tokenizer.backend_tokenizer
    names = {token: f"{QUOTE}{i}{QUOTE}" for i, token in enumerate(control_tokens(tokenizer))}
    changed = []
    for text in texts:
        for token in sorted(names, key=len, reverse=True):  # a longer one may hold a shorter
            text = text.replace(token, names[token])
        changed.append(text.replace(MARK, ""))
    return changed, _with_names(tokenizer.backend_tokenizer.to_str(), tuple(names.items()))


@lru_cache(maxsize=2)
def _with_names(backend: str, names: tuple[tuple[str, str], ...]) -> Tokenizer:
    """A backend, given as JSON, whose special tokens are called otherwise."""
    settings, other = json.loads(backend), dict(names)
    for token in settings["added_tokens"]:
        token["content"] = other.get(token["content"], token["content"])
    model = settings["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {other.get(word, word): number for word, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # a Unigram's, with scores
        model["vocab"] = [[other.get(word, word), score] for word, score in vocabulary]
    if model.get("unk_token") in other:
        model["unk_token"] = other[model["unk_token"]]
    for process in _processors(settings.get("post_processor")):
        for each in (process.get("special_tokens") or {}).values():
            each["tokens"] = [other.get(token, token) for token in each["tokens"]]
    return Tokenizer.from_str(json.dumps(settings))


def _processors(settings: dict | None) -> list[dict]:
    """The post-processors that one in JSON consists of."""
    return [one for each in (settings or {}).get("processors", []) for one in _processors(each)] or [settings or {}]
