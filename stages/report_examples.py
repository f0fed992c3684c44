"""Questions with their picture and the answers of every model side by side, from the evaluate runs' examples.jsonl."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.report_data import POPE_SPLITS, Arms, read_lines

SHOWN = 24
LARGEST = 320  # pixels; larger pictures are scaled down, so that the page stays small


@dataclass
class Example:
    """One question; `answers` maps the model to (answer, answer with another picture, right or not)."""

    split: str
    question: str
    label: str
    picture: str  # data URI, "" where it cannot be shown
    width: int = 0
    answers: dict[str, tuple[str, str, bool]] = field(default_factory=dict)


def examples(arms: Arms) -> tuple[list[Example], int, str]:
    """Questions of each split at one seed, evenly spaced among those stored, so not chosen by outcome.

    Returns:
        (examples, how many distinct questions were stored, the seed they are of).
    """
    for seed in dict.fromkeys(s for model in arms.models for s in arms.seeds(model)):
        rows: dict[tuple, dict[str, tuple[dict[str, Any], Path]]] = {}
        for model in arms.models:
            for run in arms.of("evaluate", model, seed):
                for row in read_lines(run.path / "examples.jsonl"):
                    # the text belongs to the key: ids may be numbered afresh in every file
                    key = tuple(_text(row, name) for name in ("split", "question_id", "question", "label"))
                    rows.setdefault(key, {})[model] = (row, run.path)
        if rows:
            chosen = _spread(list(rows))
            return [_example(key, rows[key]) for key in chosen], len(rows), seed
    return [], 0, ""


def _spread(keys: list[tuple]) -> list[tuple]:
    """Up to SHOWN keys, the same number of each split, evenly spaced: neighbours often share a picture."""
    by_split: dict[str, list[tuple]] = {split: [] for split in POPE_SPLITS}
    for key in keys:
        by_split.setdefault(key[0], []).append(key)
    by_split = {split: found for split, found in by_split.items() if found}
    each = max(1, SHOWN // max(1, len(by_split)))
    chosen = []
    for found in by_split.values():
        count = min(each, len(found))
        chosen += [found[i * len(found) // count] for i in range(count)]
    return chosen[:SHOWN]


def _example(key: tuple, rows: dict[str, tuple[dict[str, Any], Path]]) -> Example:
    split, _, question, label = key
    uris = (picture(directory, _text(row, "image")) for row, directory in rows.values())
    uri, width = next((found for found in uris if found[0]), ("", 0))
    result = Example(split, question, label, uri, width)
    for model, (row, _) in rows.items():
        answer = _text(row, "answer")
        right = answer.strip().rstrip(".").lower() == label.strip().lower()
        result.answers[model] = (answer, _text(row, "answer_shuffled"), right)
    return result


def picture(directory: Path, name: str) -> tuple[str, int]:
    """(data URI, width in pixels) of a picture inside `directory`; ("", 0) if it is elsewhere or unreadable."""
    from PIL import Image

    path = (directory / name).resolve()
    if not name or directory.resolve() not in path.parents:
        return "", 0
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "", 0
    image.thumbnail((LARGEST, LARGEST))
    kind = "png" if max(image.size) <= 96 else "jpeg"  # small drawings keep their pixels
    data = io.BytesIO()
    image.save(data, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", image.width


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else str(value)[:500]
