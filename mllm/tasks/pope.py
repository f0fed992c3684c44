"""What lmms-eval calls for the POPE task files: the image, the prompt, and the scores by its own matching rule."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from diffclip.base.images import to_rgb
from mllm.pope.parsers import parse_lmms_eval
from mllm.pope.scores import SCORES, score


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image of a question; none in the control without images."""
    return [to_rgb(doc["image"])] if doc["image"] else []


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """The question between the prompts of the task file."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question'].strip()}{around.get('post_prompt', '')}"


def record(doc: dict[str, Any], results: list[str]) -> dict[str, dict[str, str]]:
    """Prediction and label of one question, for every metric."""
    entry = {"prediction": parse_lmms_eval(results[0]), "label": doc["answer"]}
    return dict.fromkeys(SCORES, entry)


def _score(name: str) -> Callable[[list[dict[str, str]]], float]:
    def aggregate(records: list[dict[str, str]]) -> float:
        return score([r["prediction"] for r in records], [r["label"] for r in records])[name]

    return aggregate


accuracy, precision, recall, f1, yes_rate, invalid_rate = map(_score, SCORES)
