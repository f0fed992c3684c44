"""What can be asked about a scene: POPE's questions and negatives, and questions of nine other kinds; and what is made
of them for training: conversations in LLaVA's form about the image, and lines of text alone.

Answers are computed from the scene; the same questions serve the images and the text-only training.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import cycle, islice, permutations

from diffclip.base.schema import POPE_SPLITS
from diffclip.scenes import text
from diffclip.scenes.drawing import COLORS, SHAPES, Scene, make_scene
from diffclip.scenes.text import NUMBERS, OPPOSITE, RELATIONS, a, at, named, place, plural, reference, relation

SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's suffix, also lmms-eval's for POPE

# ---------------------------------------------------------------- POPE negatives


@lru_cache(maxsize=1)
def world_statistics() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Shapes by how many images hold them; for each shape, the others by how often both are there."""
    present, together = Counter[str](), Counter[tuple[str, ...]]()
    for i in range(4000):
        shapes = {t.shape for t in make_scene(0, "statistics", i).things}
        present.update(shapes)
        together.update(permutations(shapes, 2))
    return tuple(sorted(SHAPES, key=lambda s: -present[s])), {
        s: tuple(sorted((o for o in SHAPES if o != s), key=lambda o: -together[s, o])) for s in SHAPES
    }


def negatives(present: list[str], way: str, count: int, rng: random.Random) -> list[str]:
    """`count` absent shapes (all, if there are fewer) as POPE draws them (arXiv 2305.10355, section 4.1).

    random: uniform; popular: the most frequent; adversarial: for each present shape in turn, the one that is
    most often seen with it.
    """
    by_frequency, company = world_statistics()
    absent = [s for s in by_frequency if s not in present]
    if way == "random":
        return rng.sample(absent, min(count, len(absent)))
    if way == "popular":
        return absent[:count]
    if way == "adversarial":
        out: list[str] = []
        for shape in islice(cycle(present), min(count, len(absent))):
            out.append(next(s for s in company[shape] if s in absent and s not in out))
        return out
    raise ValueError(f"unknown way {way!r}: random, popular or adversarial")


def presence_question(shape: str) -> str:
    return f"Is there {a(shape)} in the image?"


def pope_questions(scene: Scene, way: str, rng: random.Random, pairs: int = 3) -> list[tuple[str, str]]:
    """Questions about `pairs` present shapes, each followed by one on an absent shape; with "yes" or "no"."""
    present = list(dict.fromkeys(t.shape for t in scene.things))
    rng.shuffle(present)  # adversarial negatives answer to the shapes that are asked about, which come first
    both = zip(present[:pairs], negatives(present, way, pairs, rng))
    return [(presence_question(s), answer) for pair in both for s, answer in zip(pair, ("yes", "no"))]


# ---------------------------------------------------------------- questions with a short and a long answer

Question = tuple[str, str, str]  # with its short and its long answer


def _answers(yes: bool, fact: str) -> tuple[str, str]:
    return ("Yes", f"Yes, {fact}.") if yes else ("No", f"No, {fact}.")


def presence_deck(scene: Scene, rng: random.Random) -> list[Question]:
    """Shuffled yes/no questions: POPE's about every present shape and as many absent ones,
    drawn in POPE's three ways, and one about a shape with its colour.

    Drawing each question by itself would favour No, since few shapes are present to ask about again.
    """
    present = list(dict.fromkeys(t.shape for t in scene.things))
    deck, used = [ask_colored_presence(scene, rng)], list[str]()
    for shape in present:
        thing = next(t for t in scene.things if t.shape == shape)
        fact = f"there is {a(f'{thing.color} {shape}')} {at(thing)}"
        deck.append((presence_question(shape), *_answers(True, fact)))
        way = rng.choice(POPE_SPLITS)
        shape = rng.choice([s for s in negatives(present, way, 3 + len(used), rng) if s not in used])
        used.append(shape)
        deck.append((presence_question(shape), *_answers(False, f"there is no {shape} in the image")))
    rng.shuffle(deck)
    return deck


def ask_presence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One of POPE's questions about the image, as it is asked for a single word, and its answer."""
    question, answer = rng.choice(pope_questions(scene, rng.choice(POPE_SPLITS), rng))
    return question + SHORT, answer.capitalize()


def ask_colored_presence(scene: Scene, rng: random.Random) -> Question:
    """Is there a red star? When not, there is a star of another colour or something else that is red."""
    thing = rng.choice(scene.things)
    color, shape, there = thing.color, thing.shape, {(t.color, t.shape) for t in scene.things}
    yes = rng.random() < 0.5
    if not yes and rng.random() < 0.6:
        color = rng.choice([c for c in COLORS if (c, shape) not in there])
    elif not yes:
        shape = rng.choice([s for s in SHAPES if (color, s) not in there])
    fact = f"it is {at(thing)}" if yes else f"there is no {color} {shape}"
    return f"Is there {a(f'{color} {shape}')} in the image?", *_answers(yes, fact)


def ask_color(scene: Scene, rng: random.Random) -> Question | None:
    if not (once := [t for t in scene.things if reference(t, scene) == f"the {t.shape}"]):
        return None
    thing = rng.choice(once)
    return f"What colour is the {thing.shape}?", thing.color.capitalize(), f"The {thing.shape} is {thing.color}."


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    if not (once := [t for t in scene.things if sum(o.color == t.color for o in scene.things) == 1]):
        return None
    thing = rng.choice(once)
    name = f"the {thing.color} object"
    return f"What shape is {name}?", thing.shape.capitalize(), f"{name.capitalize()} is {a(thing.shape)}."


def ask_count(scene: Scene, rng: random.Random) -> Question:
    """How many objects in all, of one kind, or of one colour; zero at times."""
    kind = rng.random()
    if kind < 0.35:
        n, what = len(scene.things), "object"
    elif kind < 0.75:
        present = [t.shape for t in scene.things]
        repeated = [s for s in present if present.count(s) > 1]
        what = rng.choice(repeated or present) if rng.random() < 0.8 else rng.choice(SHAPES)
        n = present.count(what)
    else:
        color = rng.choice([t.color for t in scene.things]) if rng.random() < 0.8 else rng.choice(tuple(COLORS))
        n, what = sum(t.color == color for t in scene.things), f"{color} object"
    there = f"There is one {what}." if n == 1 else f"There are {NUMBERS[n]} {plural(what)}."
    return f"How many {plural(what)} are there in the image?", NUMBERS[n].capitalize() if n else "Zero", there


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """Yes or no: is this to the left of / to the right of / above / below that?"""
    if not (pairs := [(p, q) for p, q in permutations(named(scene), 2) if relation(p[0], q[0])]):
        return None
    (one, name), (other, other_name) = rng.choice(pairs)
    side = relation(one, other)
    yes = rng.random() < 0.5
    asked, truth = RELATIONS[side if yes else OPPOSITE[side]][0], RELATIONS[side][0]
    return f"Is {name} {asked} {other_name}?", *_answers(yes, f"{name} is {truth} {other_name}")


def ask_neighbour(scene: Scene, rng: random.Random) -> Question | None:
    """What is left of this? Only where one object answers."""
    options = []
    for other, name in named(scene):
        for side, axis, sign in (("left", 0, -1), ("right", 0, 1), ("above", 1, -1), ("below", 1, 1)):
            there = [t for t in scene.things if sign * (t.centre[axis] - other.centre[axis]) > 0]
            if len(there) == 1 and relation(there[0], other) == side:
                options.append((there[0], side, name))
    if not options:
        return None
    thing, side, name = rng.choice(options)
    phrase, words = a(f"{thing.color} {thing.shape}").capitalize(), RELATIONS[side][0]
    return f"What is {words} {name}?", phrase, f"{phrase} is {words} {name}."


def ask_place(scene: Scene, rng: random.Random) -> Question | None:
    if not (choices := named(scene)):
        return None
    thing, name = rng.choice(choices)
    return f"Where is {name}?", place(thing).capitalize(), f"{name.capitalize()} is {at(thing)}."


def ask_size(scene: Scene, rng: random.Random) -> Question | None:
    if not (choices := named(scene)):
        return None
    thing, name = rng.choice(choices)
    if rng.random() < 0.5:
        return f"Is {name} small or large?", thing.size.capitalize(), f"{name.capitalize()} is {thing.size}."
    asked = rng.choice(("small", "large"))
    return f"Is {name} {asked}?", *_answers(asked == thing.size, f"{name} is {thing.size}")


def ask_direction(scene: Scene, rng: random.Random) -> Question | None:
    if not (arrows := [(t, name) for t, name in named(scene) if t.direction]):
        return None
    thing, name = rng.choice(arrows)
    where = thing.direction
    return f"Where does {name} point?", where.capitalize(), f"{name.capitalize()} points {where}."


def ask_background(scene: Scene, rng: random.Random) -> Question:
    kind, tone = scene.background.kind, scene.background.tone
    if rng.random() < 0.5:
        return "Is the background white or grey?", tone.capitalize(), f"The background is {tone}."
    return "What does the background look like?", kind.capitalize(), f"The background is {kind}."


# What the other questions of conversations are, in these proportions.
ASK: dict[Callable[[Scene, random.Random], Question | None], float] = {
    ask_color: 1.5,
    ask_shape: 1.0,
    ask_count: 1.0,
    ask_relation: 1.0,
    ask_neighbour: 0.5,
    ask_place: 0.7,
    ask_size: 0.6,
    ask_direction: 0.4,
    ask_background: 0.5,
}

# ---------------------------------------------------------------- conversations and lines of text

Turns = list[dict[str, str]]

# Three quarters of the rounds come from the deck of yes/no questions, the others from `ASK`.
DECK_SHARE, DETAIL_SHARE, CAPTION_SHARE = 0.75, 0.03, 0.03
CAPTION_REQUESTS = (
    "Describe the image in one sentence.",
    "What does this picture show?",
    "Write a short caption for the image.",
    "Give a brief description of the picture.",
    "Say in a few words what can be seen here.",
    "Sum up what the image contains.",
)
DETAIL_REQUESTS = (
    "Describe the image in detail.",
    "What can be seen in this picture? Tell me everything.",
    "Give a full description of the image.",
)


def rounds(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` different questions with their answers, some of them answered shortly on request."""
    out: dict[str, str] = {}
    deck, asks, weights = presence_deck(scene, rng), tuple(ASK), tuple(ASK.values())
    while len(out) < count:
        kind = rng.random()
        if kind < DETAIL_SHARE:
            question, answer = rng.choice(DETAIL_REQUESTS), text.detailed_caption(scene, rng)
        elif kind < DETAIL_SHARE + CAPTION_SHARE:
            question, answer = rng.choice(CAPTION_REQUESTS), text.sentence(text.caption(scene, rng, 0.7))
        else:
            ask_deck = deck and rng.random() < DECK_SHARE
            made = deck.pop() if ask_deck else rng.choices(asks, weights)[0](scene, rng)
            if made is None:
                continue
            question, answer = pick_style(made, rng)
        if question.removesuffix(SHORT) not in {q.removesuffix(SHORT) for q in out}:
            out[question] = answer
    return list(out.items())


def pick_style(made: Question, rng: random.Random) -> tuple[str, str]:
    """The question, mostly asking for a single word or phrase, and its answer; a bare Yes or No comes unasked too."""
    question, short, long = made
    style = rng.random()
    answer = short if style < 0.6 or (short in ("Yes", "No") and style < 0.8) else long
    return question + SHORT * (style < 0.6), answer


def align_conversation(scene: Scene, rng: random.Random, simple: int = 0) -> Turns:
    """One turn as in LLaVA's caption stage: a request with the image before or after it, a caption."""
    parts = ["<image>", rng.choice(CAPTION_REQUESTS)]
    rng.shuffle(parts)
    [caption] = text.captions(scene, rng, 1, 0.7, simple)
    return _turns([("\n".join(parts), text.sentence(caption))])


def instruct_conversation(scene: Scene, rng: random.Random, count: int, any_request: bool = True) -> Turns:
    """Several turns in LLaVA's form; the first question carries the image.

    Without `any_request`, a single turn that asks whether one shape is there. From these a small model learns to
    look in minutes; among captions and other questions it takes many times longer, so they should come last.
    """
    if any_request:
        (question, answer), *rest = rounds(scene, rng, count)
        return _turns([(f"<image>\n{question}", answer), *rest])
    question, answer = ask_presence(scene, rng)
    return _turns([(f"<image>\n{question}", answer)])


def _turns(pairs: list[tuple[str, str]]) -> Turns:
    return [{"from": who, "value": line} for pair in pairs for who, line in zip(("human", "gpt"), pair)]


def text_line(scene: Scene, rng: random.Random, any_request: bool = True) -> str:
    """Text alone: the scene in words and one yes/no question about it in the vicuna form.

    With `any_request`, half the lines have another request instead, two in three of them for a caption. Among
    those a small model takes many times longer to discover that an answer can be looked up in the scene, so they
    should come last.
    """
    if not any_request or rng.random() < 0.5:
        question, answer = pick_style(presence_deck(scene, rng)[0], rng)
    elif rng.random() < 0.67:
        question, answer = rng.choice(CAPTION_REQUESTS), text.sentence(text.caption(scene, rng, 0.7))
    else:
        [(question, answer)] = rounds(scene, rng, 1)
    return _line(text.scene_in_words(scene), question, answer, rng)


def simple_line(scene: Scene, rng: random.Random) -> str:
    """As `text_line`, of a scene whose shapes alone are listed: a request for a caption, or a question of POPE's."""
    listed = text.sentence(". ".join(text.a(t.shape) for t in text.reading_order(scene)))
    if rng.random() < 0.2:
        question, answer = rng.choice(CAPTION_REQUESTS), text.sentence(text.names_caption(scene, rng))
    else:
        question, answer = ask_presence(scene, rng)
    return _line(listed, question, answer, rng)


def _line(words: str, question: str, answer: str, rng: random.Random) -> str:
    # the words stand before the first round, or inside its question, where an image will stand
    start = f"{words} USER: " if rng.random() < 0.5 else f"USER: {words}\n"
    return f"{start}{question} ASSISTANT: {answer}<|im_end|>"
