"""What a POPE score is worth: rules that see no image, and the same questions with other images, grey, or none."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from PIL import Image

from diffclip.base.errors import InputError
from mllm.pope.questions import Question

FOLDS = 5  # of images, where a rule is learnt from others than it is tried on
GREY = "grey"  # the image of the control of that name


def blind(questions: Sequence[Question], seed: int = 0) -> list[str]:
    """Predictions of the best rule that sees no image: the usual answer to this question, in this split.

    Images are divided into folds; the answers for one fold come from the others. A question that these never
    ask gets the answer that is more common among them.
    """
    fold_of = folds_of_images(questions, seed)
    predictions = [""] * len(questions)
    for fold in range(FOLDS):
        votes: dict[tuple[str, ...], int] = Counter()  # yes minus no
        for q in questions:
            if fold_of[q.image] != fold:
                vote = 1 if q.label == "yes" else -1
                votes[q.split, q.key[2]] += vote
                votes[q.split,] += vote
        for i, q in enumerate(questions):
            if fold_of[q.image] == fold:
                usual = votes[q.split, q.key[2]] or votes[q.split,]
                predictions[i] = "yes" if usual >= 0 else "no"
    return predictions


def folds_of_images(questions: Sequence[Question], seed: int) -> dict[str, int]:
    """A fold for each image, drawn by the seed."""
    names = sorted({q.image for q in questions})
    random.Random(seed).shuffle(names)
    return {name: i % FOLDS for i, name in enumerate(names)}


def grey_image() -> Image.Image:
    """What `GREY` stands for."""
    return Image.new("RGB", (224, 224), (128, 128, 128))


def shuffle_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions shown with other images: no image stays in its place, each is used for another."""
    names = sorted({q.image for q in questions})
    if len(names) < 2:
        raise InputError("shuffling needs questions about at least two images")
    random.Random(seed).shuffle(names)
    other = dict(zip(names, [*names[1:], names[0]]))  # one cycle, so nothing stays in place
    return [q._replace(shown=other[q.image]) for q in questions]


CONTROLS: dict[str, Callable[[Sequence[Question], int], list[Question]]] = {  # of questions and a seed
    "shuffled": shuffle_images,
    "grey": lambda questions, seed: [q._replace(shown=GREY) for q in questions],
    "no_image": lambda questions, seed: [q._replace(shown="") for q in questions],
}
