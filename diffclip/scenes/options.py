"""How much of the built-in world is written, and in which words: the same options give the same bytes."""

from dataclasses import dataclass, field
from typing import Any

from diffclip.base.commands import Range

PARTS = ("pretrain", "retrieval", "classification", "shifts", "llava", "pope", "mmvp", "segmentation")


def _number(default: int, text: str, least: int = 1, most: float = float("inf")) -> Any:
    return field(default=default, metadata={"help": text, "range": Range(least, most)})


@dataclass(frozen=True)
class Options:
    """Seed, image size, counts and wording of an export; scenes.json keeps them in this order."""

    seed: int = _number(0, "seed of the world", least=0)
    size: int = _number(64, "side of the images in pixels", least=32)
    pairs: int = _number(20000, "image-text pairs in pretrain/")
    captions: int = _number(5, "captions per pair")
    retrieval: int = _number(1000, "images in retrieval/")
    class_train: int = _number(800, "training images of each classification set")
    class_val: int = _number(200, "validation images of each classification set")
    class_test: int = _number(800, "test images of each classification set and of each shifted set")
    align: int = _number(8000, "caption conversations in llava/align.json")
    conversations: int = _number(6000, "conversations in llava/instruct.json, on the first images of align.json")
    rounds: int = _number(6, "questions per conversation", most=20)  # there are not many more different ones
    texts: int = _number(20000, "lines in llava/text.jsonl")
    pope: int = _number(300, "images in pope/, six questions each in each of the three files")
    mmvp: int = _number(15, "pairs per category in mmvp/")
    segmentation: int = _number(300, "images in segmentation/")
    simple: int = _number(
        0, "1: captions, classes, text and conversations, of one question each, are of shapes alone", 0, 1
    )
