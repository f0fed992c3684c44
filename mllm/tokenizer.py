"""Tokenizers of language models, made fit for conversations about images: `<image>`, an end token, no cutting."""

from pathlib import Path

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from diffclip.base.errors import InputError
from mllm.conversation import IMAGE, TEMPLATES


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str, path: str | Path) -> None:
    """Give the tokenizer `<image>`, a padding token, and as its eos the token that ends an answer."""
    if template not in TEMPLATES:
        raise InputError(f"unknown template `{template}`: use one of {', '.join(TEMPLATES)}")
    if not tokenizer.is_fast:
        raise InputError(f"{path}: needs a fast tokenizer (tokenizer.json), which knows where tokens begin and end")
    never_cut(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    if "<|im_end|>" in tokenizer.get_vocab():  # base models have it too, but stop at another token
        tokenizer.eos_token = "<|im_end|>"
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has neither <|im_end|> nor an end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    before, behind = _added_tokens(tokenizer)
    if behind:  # an end token: a question would end before its answer begins
        if getattr(tokenizer, "add_eos_token", False):
            tokenizer.add_eos_token = False
        specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in before]
        only_before = TemplateProcessing(single=[*before, "$A"], special_tokens=specials)
        tokenizer.backend_tokenizer.post_processor = only_before
    check_tokens(tokenizer, template, path)


def check_tokens(tokenizer: PreTrainedTokenizerBase, template: str, path: str | Path) -> None:
    """Raise InputError unless the tokenizer can write the template, and ends no text by itself."""
    if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys():
        raise InputError(f"{path}: template chatml needs the tokens <|im_start|> and <|im_end|>; use vicuna")
    _, behind = _added_tokens(tokenizer)
    if behind:
        raise InputError(
            f"{path}: its tokenizer writes {' '.join(behind)} behind every text, so that answers would begin behind "
            "the end; take it out of post_processor in tokenizer.json"
        )


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens that a tokenizer puts before and behind every text."""
    bare = len(tokenizer("yes", add_special_tokens=False)["input_ids"])
    marked = tokenizer("yes", return_special_tokens_mask=True)
    before = marked["special_tokens_mask"].index(0)
    tokens = list(tokenizer.convert_ids_to_tokens(marked["input_ids"]))
    return tokens[:before], tokens[before + bare :]


def never_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a fast tokenizer neither cut texts nor fill them up, which a tokenizer.json may ask for.

    transformers hands such a length on to processors, so that questions would lose their ends without a word.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(name, None)
