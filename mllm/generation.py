"""Generating text: options that do what they say, and answers that come piece by piece."""

import math
from collections.abc import Iterator, Mapping
from threading import Event, Thread
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from diffclip.base.errors import InputError
from mllm.llava import DiffCLIPLlavaForConditionalGeneration

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # options without a meaning in greedy decoding


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of transformers' `generate` that do what they say; None counts as not given.

    The temperature, where there is one, decides: 0 is greedy and more samples, whatever do_sample says; without one
    do_sample does, and without both it is greedy. max_gen_toks, as some tasks of lmms-eval say, is max_new_tokens.

    Raises:
        InputError: a temperature below 0, or no new tokens.
    """
    result = {name: value for name, value in options.items() if value is not None}
    result.setdefault("max_new_tokens", result.pop("max_gen_toks", 512))
    if result["max_new_tokens"] < 1:
        raise InputError(f"max_new_tokens is {result['max_new_tokens']}: an answer needs 1 or more")
    if "temperature" in result:
        temperature = float(result["temperature"])
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature is {temperature}: give 0 for the likeliest words, or more to sample")
        result |= {"temperature": temperature, "do_sample": temperature > 0}
    result["do_sample"] = bool(result.get("do_sample"))
    return {name: value for name, value in result.items() if result["do_sample"] or name not in SAMPLING}


def stream_text(
    model: DiffCLIPLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
) -> Iterator[str]:
    """Yield what `model.generate` writes behind the inputs for one text as it comes; closing the iterator ends it."""
    stopped, failed = Event(), list[BaseException]()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def stop(ids: torch.Tensor, scores: object, **rest: object) -> torch.Tensor:
        return ids.new_full((len(ids),), stopped.is_set(), dtype=torch.bool)

    def generate() -> None:
        try:
            model.generate(**inputs, streamer=streamer, stopping_criteria=[stop], **options)
        except BaseException as error:  # raised again in the thread that reads
            failed.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    started = False
    try:
        for piece in streamer:
            if piece := piece if started else piece.lstrip():
                started = True
                yield piece
    finally:  # also when whoever reads the pieces stops
        stopped.set()
        thread.join()
    if failed:
        raise failed[0]
