"""Models to draw or score maps of, loaded before any work, so that one without maps is refused at once."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffclip import checkpoints
from diffclip.attention_maps import readouts, seen_part
from diffclip.base.errors import InputError


def load_with_maps(sources: Sequence[str | Path]) -> list[tuple[Any, Callable, Callable]]:
    """Return (model, transform, tokenizer) of each; InputError names the one that cannot be read or has none."""
    loaded = []
    for source in sources:
        model, transform, tokenizer = checkpoints.load(source)
        try:
            readouts(model)
            seen_part(transform)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        loaded.append((model, transform, tokenizer))
    return loaded
