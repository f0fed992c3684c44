"""The captions of a pair, in every form in which .txt, .json and table cells hold them."""

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress

EMPTY = "empty caption"
WRITTEN_LIST = re.compile(r"""\s*\[\s*["'].*["']\s*\]\s*""", re.DOTALL)


def parse_captions(raw: bytes, member: str, keys: Sequence[str] = (), encoding: str = "utf-8") -> list[str]:
    """Captions of one sample: the lines of a text, or of a .json `captions` (else `caption`), or a list in it.

    Args:
        member: the suffix; what ends in json is JSON.
        keys: of a JSON object, that hold captions; all that are there count.
        encoding: of texts.

    Raises:
        ValueError: there is none, or they cannot be read.
    """
    if not member.endswith("json"):
        return not_empty(caption_lines(raw.decode("utf-8-sig" if encoding == "utf-8" else encoding)))
    values = json.loads(raw)
    if isinstance(values, dict):
        if not any(key in values for key in keys or ("captions", "caption")):
            wanted = " nor ".join(f"`{key}`" for key in keys or ("captions", "caption"))
            none = "no" if len(keys) == 1 else "neither"
            held = ", ".join(values) or "nothing"
            raise ValueError(f"the .json has {none} {wanted}, but {held}; set caption_column to the key")
        values = [values.get(key) for key in keys] if keys else values.get("captions") or values.get("caption")
    elif not isinstance(values, list):
        raise ValueError("the .json is neither an object with `captions` nor a list of them")
    return not_empty(texts(values))


def caption_lines(text: str) -> list[str]:
    """The captions of a .txt, one a line as in clip-benchmark's shards; U+2028 and its like end no line."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def texts(value: object) -> list[str]:
    """Captions in a cell or JSON value: text, bytes of UTF-8, a number as text, {"raw": ...}, or a list of these."""
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    if isinstance(value, dict):
        return texts(next((value[key] for key in ("raw", "caption", "text") if key in value), None))
    if value is None or value != value:  # NaN, of pandas
        return []
    text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    return [text] if text.strip() else []


def cell_texts(value: object) -> list[str]:
    """`texts` of a table's cell, in which a list of texts may stand as JSON or Python writes it."""
    if isinstance(value, str) and WRITTEN_LIST.fullmatch(value):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                values = read(value.strip())
                if all(isinstance(each, str) for each in values):
                    return texts(values)
    return texts(value)


def not_empty(captions: list[str]) -> list[str]:
    """The captions; ValueError where there is none, or one holds half of a surrogate pair, which no tokenizer takes."""
    if not captions:
        raise ValueError(EMPTY)
    for caption in captions:
        caption.encode()
    return captions
