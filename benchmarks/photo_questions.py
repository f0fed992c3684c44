"""Yes/no questions about photographs whose objects are all labelled, as POPE asks them, to train a small model on.

python -m benchmarks.photo_questions --set data/voc/objects_train.jsonl voc/images \
    --set data/coco/annotations/instances_train.json coco/images --out data/photos

A set is a file and the folder of its images below the image root. The file is COCO's instances JSON, or JSONL with
{"image": ..., "objects": [{"name": ..., "difficult": 0}]} a line. Written are, for align, instruct and language:

    align.json      "Which objects can you see in the image?" and a list of them
    instruct.json   conversations of yes/no questions, half of them answered yes, the image once in each
    text.jsonl      both kinds about images written out in words, for the stand-in language model

A third of the negatives each is random, among the most frequent objects, and among those most often seen with an object
of the image: POPE's three ways, counted in these files alone.
"""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from diffclip.base.commands import Parser
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import json_line, read_json, read_jsonl, write_json, write_whole

LIST = "Which objects can you see in the image?"
SHORT = "Answer the question using a single word or phrase."
MOST_WORDS = 3  # objects of an image in words
FREQUENT = 5  # a popular or co-occurring negative is one of the first so many


class Photo(NamedTuple):
    """What is seen in an image, and what may or may not be (VOC's "difficult" objects), which is never asked."""

    image: str
    objects: frozenset[str]
    unsure: frozenset[str] = frozenset()


class Counts(NamedTuple):
    """How often each object occurs in a set of images, and with which others."""

    single: Counter[str]
    pairs: dict[str, Counter[str]]


def read_set(path: Path, folder: str) -> list[Photo]:
    """The images of an annotation file that show an object; InputError if it is neither of the two kinds."""
    try:
        rows = _read_lines(path) if path.suffix == ".jsonl" else _read_coco(read_json(path))
        seen = [(name, sure, unsure) for name, sure, unsure in rows if sure]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: no object annotations that can be read ({type(error).__name__}: {error})") from None
    return [Photo(f"{folder}/{name}", frozenset(sure), frozenset(unsure - sure)) for name, sure, unsure in seen]


def _read_lines(path: Path) -> Iterator[tuple[str, set[str], set[str]]]:
    for _, row in read_jsonl(path):
        sure = {thing["name"] for thing in row["objects"] if not thing.get("difficult")}
        yield row["image"], sure, {thing["name"] for thing in row["objects"]}


def _read_coco(data: dict) -> Iterator[tuple[str, set[str], set[str]]]:
    names = {category["id"]: category["name"] for category in data["categories"]}
    seen: dict[int, set[str]] = {image["id"]: set() for image in data["images"]}
    for annotation in data["annotations"]:
        seen[annotation["image_id"]].add(names[annotation["category_id"]])
    return ((image["file_name"], seen[image["id"]], set()) for image in data["images"])


def count(photos: list[Photo]) -> Counts:
    """Frequencies and co-occurrences of objects."""
    single = Counter(name for photo in photos for name in sorted(photo.objects))
    pairs: dict[str, Counter[str]] = {name: Counter() for name in single}
    for photo in photos:
        for name in sorted(photo.objects):
            pairs[name].update(sorted(photo.objects - {name}))
    return Counts(single, pairs)


def negative(photo: Photo, counts: Counts, taken: set[str], rng: random.Random) -> str | None:
    """An object that the image does not show and that was not asked yet, in one of POPE's three ways."""
    absent = [name for name, _ in counts.single.most_common() if name not in photo.objects | photo.unsure | taken]
    if not absent:
        return None
    way = rng.choice(("random", "popular", "adversarial"))
    if way == "adversarial":
        beside = counts.pairs[rng.choice(sorted(photo.objects))]
        # popular where nothing that is left was ever seen beside it
        absent = [name for name, _ in beside.most_common() if name in set(absent)] or absent
    return rng.choice(absent if way == "random" else absent[:FREQUENT])


def yes_no(photo: Photo, counts: Counts, rng: random.Random, most: int) -> list[tuple[str, str]]:
    """(object, "Yes" or "No") by a fair coin until all of the image's objects were asked, or `most`.

    With a fixed number of each answer in a conversation, the last could be told from those before, without the image.
    """
    present, asked = rng.sample(sorted(photo.objects), len(photo.objects)), []
    while present and len(asked) < most:
        yes = rng.random() < 0.5
        name = present.pop() if yes else negative(photo, counts, {name for name, _ in asked}, rng)
        if name is None:
            break
        asked.append((name, "Yes" if yes else "No"))
    return asked


def question(name: str) -> str:
    """POPE's question, with the words that ask for a short answer."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?\n{SHORT}"


def listed(photo: Photo, rng: random.Random) -> str:
    """The image's objects in any order: "dog, person."."""
    return ", ".join(rng.sample(sorted(photo.objects), len(photo.objects))) + "."


def conversation(photo: Photo, number: int, turns: list[tuple[str, str]]) -> dict:
    """A row in LLaVA's form from (question, answer) pairs."""
    values = [value for turn in turns for value in turn]
    messages = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    messages[0]["value"] = f"<image>\n{values[0]}"
    return {"id": f"{Path(photo.image).stem}_{number}", "image": photo.image, "conversations": messages}


def text_line(counts: Counts, rng: random.Random, most: int = MOST_WORDS) -> dict[str, str]:
    """A made-up image of one to `most` objects in words, where later an image will stand, with a question or a list.

    Its objects are drawn evenly, so that only a look at the words tells the answer.
    """
    names = sorted(counts.single)
    photo = Photo("", frozenset(rng.sample(names, min(rng.randint(1, most), len(names) - 1))))
    words = [word for name in sorted(photo.objects) for word in [name] * rng.randint(1, 4)]
    rng.shuffle(words)
    yes = rng.random() < 0.5
    name = rng.choice(sorted(photo.objects if yes else set(names) - photo.objects))
    asked, answer = question(name), "Yes" if yes else "No"
    if rng.random() < 0.4:
        asked, answer = LIST, ", ".join(dict.fromkeys(words)) + "."
    return {"text": f"USER: {' '.join(words)}\n{asked} ASSISTANT: {answer}<|im_end|>"}


def write(sets: list[tuple[Path, str]], out: Path, copies: int, questions: int, texts: int, seed: int) -> None:
    """Write the three files; a set's own frequencies decide its negatives.

    Args:
        copies: conversations, and lists, of each image.
        questions: most in a conversation.
        texts: lines of text.jsonl.
    """
    rng, align, instruct = random.Random(seed), [], []
    read = [read_set(file, folder) for file, folder in sets]
    for photos in read:
        counts = count(photos)
        for number in range(copies):
            for photo in photos:
                align.append(conversation(photo, number, [(LIST, listed(photo, rng))]))
                asked = yes_no(photo, counts, rng, questions)
                instruct.append(conversation(photo, number, [(question(name), answer) for name, answer in asked]))
    counts = count([photo for photos in read for photo in photos])
    # from one object to many: that an answer can be looked up is discovered where there is little to look through
    lines = [json_line(text_line(counts, rng, 1 + i * MOST_WORDS // texts)) for i in range(texts)]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("align", align), ("instruct", instruct)):
        rng.shuffle(rows)
        write_json(out / f"{name}.json", rows)
    write_whole(out / "text.jsonl", "".join(lines))
    answers = Counter(turn["value"] for row in instruct for turn in row["conversations"] if turn["from"] == "gpt")
    print(
        f"{out}: {sum(map(len, read)):,} images, {len(counts.single)} kinds of objects, {len(instruct):,} "
        f"conversations with {answers['Yes']:,} yes and {answers['No']:,} no, {len(lines):,} texts"
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.photo_questions", description=__doc__)
    parser.add_argument("--set", nargs=2, action="append", required=True, metavar=("FILE", "FOLDER"), dest="sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--copies", type=int, default=10, help="conversations of each image (10)")
    parser.add_argument("--questions", type=int, default=6, help="most questions in a conversation (6)")
    parser.add_argument("--texts", type=int, default=100000, help="lines of text.jsonl (100000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    sets = [(Path(file), folder) for file, folder in options.sets]
    write(sets, options.out, options.copies, options.questions, options.texts, options.seed)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
