"""Hallucination in free captions by CHAIR (Rohrbach et al. 2018): objects that a caption names and an image lacks.

An image holds what its annotations and its reference captions name. CHAIR_i is the share of all mentions of objects
that are of absent ones, CHAIR_s the share of captions with such a mention; recall, the share of the objects there that
are named, stands beside them, since a caption that names nothing has no hallucination.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from diffclip.base.statistics import percentiles, resampled_sums
from mllm.pope.scores import FOLDS, folds_of, other_images

SCORES = ("chair_i", "chair_s", "recall")
FEWEST = 30  # images of which a verdict is given
ANIMALS = (  # "a baby elephant" names no person
    *("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"),
)
IRREGULAR = {"person": "people", "child": "children", "mouse": "mice", "goose": "geese", "ox": "oxen", "calf": "calves"}
Words = dict[tuple[str, ...], str]  # a word or phrase -> the object it names, "" for none


class Caption(NamedTuple):
    """What a caption names, and what its image holds."""

    mentions: list[str]  # objects, one for each mention
    there: frozenset[str]

    @property
    def absent(self) -> list[str]:
        """The mentions of objects that are not there."""
        return [name for name in self.mentions if name not in self.there]


def read_words(categories: Iterable[str], synonyms: str | Path | None = None) -> Words:
    """The words that name objects, in singular and plural.

    Args:
        categories: names of objects in the annotations.
        synonyms: a file of one object a line, `object, synonym, synonym, …`, as CHAIR's authors publish; by default
            the categories alone.

    Raises:
        InputError: the file cannot be read, a word in two lines, or a category in none.
    """
    lines = {number: [name] for number, name in enumerate(categories, 1)}
    source = str(synonyms or "the annotations")
    if synonyms:
        try:
            text = Path(synonyms).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{synonyms}: cannot be read as text ({error}); give lines `object, synonym, …`") from None
        lines = {number: line.split(",") for number, line in enumerate(text.splitlines(), 1)}
    words: Words = {}
    for number, line in lines.items():
        terms = [tokens for term in line if (tokens := tuple(tokens_of(term)))]
        for term in terms:
            name = " ".join(terms[0])
            if words.setdefault(term, name) != name:
                raise InputError(
                    f"{source}: line {number}: `{' '.join(term)}` names {words[term]} and {name}; keep one of them"
                )
    if lacking := [name for name in categories if tuple(tokens_of(name)) not in words]:
        raise InputError(f"{source}: no line names {', '.join(lacking)} of the annotations; add a line for each")
    for term, name in list(words.items()):
        for plural in plurals(term[-1]):
            words.setdefault((*term[:-1], plural), name)
    special: Words = {("home", "plate"): "", ("train", "track"): "", ("train", "tracks"): ""}
    special |= {("toilet", "seat"): words.get(("toilet",), "")}
    special |= {("passenger", vehicle): words.get((vehicle,), "") for vehicle in ("train", "jet")}
    for animal in ANIMALS:
        special |= {(age, one): words.get((one,), "") for age in ("baby", "adult") for one in (animal, f"{animal}s")}
    return {**special, **words}


def tokens_of(text: str) -> list[str]:
    """Words in lower case; a possessive loses its ending."""
    return re.findall(r"[^\W_]+", re.sub(r"['\u2019]s\b", "", text.lower()))


def plurals(word: str) -> list[str]:
    """How the plural of an English noun may be written."""
    if word in IRREGULAR:
        return [IRREGULAR[word], f"{word}s"]
    if word.endswith("man"):
        return [f"{word[:-3]}men"]
    if re.search(r"(s|x|z|ch|sh)$", word):
        return [f"{word}es"]
    if re.search(r"[^aeiou]y$", word):
        return [f"{word[:-1]}ies"]
    if re.search(r"[^f]fe?$", word):
        return [re.sub(r"fe?$", "ves", word), f"{word}s"]
    return [f"{word}s", f"{word}es"] if word.endswith("o") else [f"{word}s"]


def mentions(text: str, words: Words) -> list[str]:
    """The objects that a text names, once for each mention; the longest phrase counts ("hot dog" is no dog)."""
    longest = max(map(len, words))
    tokens, found, place = tokens_of(text), [], 0
    while place < len(tokens):
        spans = (tuple(tokens[place : place + size]) for size in range(longest, 0, -1))
        span = next((span for span in spans if span in words), None)
        if span and words[span]:
            found.append(words[span])
        place += len(span or "1")
    return found


def read_truth(
    instances: str | Path, captions: str | Path | None = None, synonyms: str | Path | None = None
) -> tuple[dict[str, frozenset[str]], Words]:
    """{image's file name: objects it holds} and the words for them.

    Args:
        instances: COCO's annotations of objects.
        captions: COCO's captions of the same images: what they name is there, too.
        synonyms: as in `read_words`.

    Raises:
        InputError: a file that is not COCO's, annotations of images that `instances` does not list.
    """
    table = read_json(instances)
    try:
        names = {image["id"]: str(image["file_name"]) for image in table["images"]}
        categories = {category["id"]: str(category["name"]) for category in table["categories"]}
        objects = [(row["image_id"], categories[row["category_id"]]) for row in table["annotations"]]
        texts = read_json(captions)["annotations"] if captions else []
        told = [(row["image_id"], str(row["caption"])) for row in texts]
    except (KeyError, TypeError) as error:
        raise InputError(f"{instances} or {captions}: not COCO's annotations ({error!r})") from None
    if not names:
        raise InputError(f"{instances}: lists no images")
    words = read_words(categories.values(), synonyms)
    there: dict[str, set[str]] = {name: set() for name in names.values()}
    if strange := [image for image, _ in objects if image not in names]:
        raise InputError(f"{instances}: annotates image {strange[0]}, which is not among its images")
    for image, category in objects:
        there[names[image]].add(words[tuple(tokens_of(category))])
    for image, text in told:
        if image in names:  # COCO's captions are of all images, where the instances may be of some
            there[names[image]] |= set(mentions(text, words))
    return {name: frozenset(found) for name, found in there.items()}, words


def score(captions: Sequence[Caption]) -> dict[str, float]:
    """`SCORES` and mentions a caption, in [0, 1] but for the last; 0 where nothing was named, or nothing is there."""
    sums = _counts(captions).sum(0)
    return {**dict(zip(SCORES, map(float, _ratios(sums)))), "mentions": float(sums[1] / max(len(captions), 1))}


def intervals(captions: Sequence[Caption], *, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals of 95 % of `SCORES`, images being resampled."""
    drawn = resampled_sums(_counts(captions), resamples, seed)  # (resamples, 6)
    return {name: percentiles(values) for name, values in zip(SCORES, _ratios(drawn.T))}


def _counts(captions: Sequence[Caption]) -> np.ndarray:
    """(captions, 6): absent mentions, mentions, whether one is absent, 1, objects there that are named, objects."""
    rows = [
        (len(c.absent), len(c.mentions), bool(c.absent), 1, len(c.there & set(c.mentions)), len(c.there))
        for c in captions
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 6)


def _ratios(sums: np.ndarray) -> list[np.ndarray]:
    """`SCORES` of sums (6, …) of `_counts`."""
    return [sums[k] / np.maximum(sums[k + 1], 1) for k in (0, 2, 4)]


def controls(named: Mapping[str, list[str]], truth: Mapping[str, frozenset[str]], seed: int = 0) -> dict[str, Any]:
    """{"model", "shuffled", "blind": captions} of what a model names for each image.

    Shuffled: each image with the caption of another. Blind: as many objects as the caption names, those that most of
    the images of other folds hold.
    """
    names = sorted(named)
    other = other_images(names, seed)
    folds = folds_of(names, seed)
    counts = {f: Counter(o for n in names if folds[n] != f for o in sorted(truth[n])) for f in range(FOLDS)}
    usual = {fold: [name for name, _ in count.most_common()] for fold, count in counts.items()}
    return {
        "model": [Caption(named[n], truth[n]) for n in names],
        "shuffled": [Caption(named[other[n]], truth[n]) for n in names],
        "blind": [Caption(usual[folds[n]][: len(set(named[n]))], truth[n]) for n in names],
    }


def verdict(scores: Mapping[str, Mapping[str, float]], images: float) -> tuple[bool | None, str]:
    """Whether captions are of their images, None if that cannot be told; and the end of a sentence that says so.

    Args:
        scores: from `score` and `intervals`, {"model", "shuffled", "blind": scores}.
        images: how many; the ends of a bootstrap over few of them are too close to each other.
    """
    own, controls = scores["model"], {who: scores[who]["chair_i"] for who in ("shuffled", "blind")}
    if not own["mentions"]:
        return None, "name no object of the annotations, so nothing can be said"
    if images < FEWEST:
        return None, f"are {images:g}, too few to say whether they are about their images; take {FEWEST} or more"
    who = min(controls, key=lambda who: controls[who])
    seen = own.get("chair_i_high", own["chair_i"]) < controls[who]
    told = "are about their images" if seen else "are not shown to be about their images"
    numbers = f"CHAIR_i {100 * own['chair_i']:.1f} against {100 * controls[who]:.1f} of the best control, {who}"
    return seen, f"{told}: {numbers}"
