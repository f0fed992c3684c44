"""What can be said about a scene: captions, questions with their answers, conversations, POPE negatives, statements.

Every sentence is true of the scene it is made from; wording varies with the generator that is passed in.
"""

import random
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from itertools import combinations, permutations

from diffclip.scenes import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    Scene,
    Thing,
    arrange,
    make_background,
    make_scene,
    make_thing,
    stream_rng,
)

NUMBERS = ("no", "one", "two", "three", "four")
SHORT = (
    "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's suffix, also lmms-eval's for POPE
)
BACKGROUND_WORDS = {
    "plain": ("plain", "even"),
    "grainy": ("grainy", "noisy"),
    "striped": ("striped",),
    "checkered": ("checkered",),
    "shaded": ("shaded",),
}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
APART = 9  # units between centres from which on two objects count as left/right or above/below

# ---------------------------------------------------------------- words


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def noun_phrase(thing: Thing, rng: random.Random, size: float = 0.5, color: float = 0.9) -> str:
    """ "large red star" with some words left out; an arrow sometimes says where it points."""
    words = []
    if rng.random() < size:
        words.append(rng.choice(("large", "big") if thing.size == "large" else ("small", "little")))
    if rng.random() < color:
        words.append(thing.color)
    words.append(thing.shape)
    if thing.direction and rng.random() < size:
        words.append("pointing " + thing.direction)
    return " ".join(words)


def full_phrase(thing: Thing) -> str:
    end = f" pointing {thing.direction}" if thing.direction else ""
    return a(f"{thing.size} {thing.color} {thing.shape}{end}")


def place(thing: Thing) -> str:
    """Which of the nine fields of the picture holds the object's centre: "top left", "left", "middle", ..."""
    x, y = thing.centre
    across = "left" if x < 64 * 0.36 else "right" if x > 64 * 0.64 else ""
    down = "top" if y < 64 * 0.36 else "bottom" if y > 64 * 0.64 else ""
    return f"{down} {across}".strip() or "middle"


def at(thing: Thing) -> str:
    where = place(thing)
    return (
        "in the middle"
        if where == "middle"
        else f"{'on' if where in ('left', 'right') else 'at'} the {where}"
    )


def relation(one: Thing, other: Thing) -> str:
    """The clearer of left/right and above/below, as seen from `other`; "" when neither is clear."""
    dx, dy = (p - q for p, q in zip(one.centre, other.centre))
    if max(abs(dx), abs(dy)) < APART or 0.8 < abs(dx) / max(abs(dy), 1e-9) < 1.25:
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def reading_order(scene: Scene) -> list[Thing]:
    """Top rows first, left to right within a row."""
    return sorted(scene.things, key=lambda t: (int(t.centre[1] // 22), t.centre[0]))


def reference(thing: Thing, scene: Scene) -> str:
    """The shortest definite name that only this object answers to: "the star", "the red star"; "" if there is none."""
    if sum(t.shape == thing.shape for t in scene.things) == 1:
        return f"the {thing.shape}"
    if sum((t.shape, t.color) == (thing.shape, thing.color) for t in scene.things) == 1:
        return f"the {thing.color} {thing.shape}"
    return ""


def named(scene: Scene) -> list[tuple[Thing, str]]:
    """Objects that can be referred to, with their names."""
    return [(t, name) for t in scene.things if (name := reference(t, scene))]


def background_phrase(scene: Scene, rng: random.Random) -> str:
    words = [scene.background.tone] if rng.random() < 0.5 else []
    return " ".join([*words, rng.choice(BACKGROUND_WORDS[scene.background.kind]), "background"])


# ---------------------------------------------------------------- captions


def caption(scene: Scene, rng: random.Random, detail: float = 0.5) -> str:
    """One sentence that names every object; `detail` is the chance of each size word."""
    things = list(scene.things)
    rng.shuffle(things)
    phrases = [a(noun_phrase(t, rng, detail)) for t in things]
    background = f" on {a(background_phrase(scene, rng))}" if rng.random() < 0.3 else ""
    opening = rng.choice(("", "", "", "there is ", "a picture of ", "this image shows ", "we see ", "only "))
    form = rng.random()
    if len(things) == 1:
        where = f" {at(things[0])}" if rng.random() < 0.5 else ""
        text = (
            rng.choice(("", "there is ", "a picture of ", "a photo of ", "this image shows ", "only "))
            + phrases[0]
            + where
        )
    elif form < 0.55 and (
        pairs := [p for p in permutations(range(len(things)), 2) if relation(*(things[i] for i in p))]
    ):
        i, j = rng.choice(pairs)
        words = rng.choice(RELATIONS[relation(things[i], things[j])])
        rest = [p for k, p in enumerate(phrases) if k not in (i, j)]
        text = f"{opening}{phrases[i]} {words} {phrases[j]}"
        if rest:
            text += rng.choice((", with ", " and also ", ", along with ")) + join(rest)
    elif form < 0.7:
        text = join([f"{p} {at(t)}" for t, p in zip(things, phrases)])
    elif form < 0.8:
        text = f"{NUMBERS[len(things)]} {rng.choice(('shapes', 'objects'))}: {join(phrases)}"
    elif form < 0.9:
        counts = Counter(t.shape for t in things)
        parts = [
            f"{NUMBERS[n]} {plural(s)}"
            if n > 1
            else a(noun_phrase(next(t for t in things if t.shape == s), rng, detail))
            for s, n in counts.items()
        ]
        text = opening + join(parts)
    else:
        text = opening + join(phrases)
    return text + background + rng.choice((".", ""))


def captions(scene: Scene, rng: random.Random, count: int, detail: float = 0.5) -> list[str]:
    """`count` captions, different where the wording allows it."""
    out: list[str] = []
    for _ in range(3 * count):
        text = caption(scene, rng, detail)
        if text not in out:
            out.append(text)
        if len(out) == count:
            return out
    return (out * count)[:count]


def detailed_caption(scene: Scene, rng: random.Random) -> str:
    """Several sentences: every object with its size, colour and place, a relation, the background."""
    things = reading_order(scene)
    n = len(things)
    shows = f"The image shows {NUMBERS[n]} object{'s' * (n > 1)}: "
    sentences = [shows + join([f"{full_phrase(t)} {at(t)}" for t in things]) + "."]
    pairs = [(p, q, r) for (p, m), (o, q) in permutations(named(scene), 2) if (r := relation(p, o)) and m]
    if pairs:
        thing, other, r = rng.choice(pairs)
        sentences.append(f"{reference(thing, scene).capitalize()} is {rng.choice(RELATIONS[r])} {other}.")
    sentences.append(f"The background is {scene.background.tone} and {scene.background.kind}.")
    return " ".join(sentences)


def scene_in_words(scene: Scene) -> str:
    """The list that stands for the picture in text-only training: object phrases in reading order."""
    listed = ". ".join(f"{full_phrase(t)} {at(t)}" for t in reading_order(scene))
    return f"{listed}. {a(scene.background.tone)} {scene.background.kind} background."


# ---------------------------------------------------------------- POPE negatives


@lru_cache(maxsize=1)
def world_statistics() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Shapes by the share of pictures that hold them, and for each shape the others by how often both are there."""
    present: Counter = Counter()
    together: Counter = Counter()
    for i in range(4000):
        shapes = {t.shape for t in make_scene(0, "statistics", i).things}
        present.update(shapes)
        together.update(permutations(shapes, 2))
    by_frequency = sorted(SHAPES, key=lambda s: -present[s])
    return tuple(by_frequency), {
        s: tuple(sorted((o for o in SHAPES if o != s), key=lambda o: -together[s, o])) for s in SHAPES
    }


def negatives(present: list[str], way: str, count: int, rng: random.Random) -> list[str]:
    """`count` absent shapes as POPE draws them (arXiv 2305.10355, section 4.1).

    random: uniform; popular: the most frequent; adversarial: for each present shape in turn, the one that is most
    often seen with it.
    """
    by_frequency, company = world_statistics()
    absent = [s for s in by_frequency if s not in present]
    if way == "random":
        return rng.sample(absent, count)
    if way == "popular":
        return absent[:count]
    if way == "adversarial":
        out: list[str] = []
        while len(out) < count:
            for shape in present:
                out += [next(s for s in company[shape] if s in absent and s not in out)]
        return out[:count]
    raise ValueError(f"unknown way {way!r}: random, popular or adversarial")


def presence_question(shape: str) -> str:
    return f"Is there {a(shape)} in the image?"


def pope_questions(scene: Scene, way: str, rng: random.Random, pairs: int = 3) -> list[tuple[str, str]]:
    """`pairs` questions about present shapes, each followed by one about an absent shape: (text, "yes" | "no")."""
    present = list(dict.fromkeys(t.shape for t in scene.things))
    asked = rng.sample(present, pairs)
    out = []
    for yes, no in zip(asked, negatives_for(asked, present, way, pairs, rng)):
        out += [(presence_question(yes), "yes"), (presence_question(no), "no")]
    return out


def negatives_for(
    asked: list[str], present: list[str], way: str, count: int, rng: random.Random
) -> list[str]:
    """`negatives` with the asked shapes first, so that adversarial ones answer to them."""
    return negatives(asked + [s for s in present if s not in asked], way, count, rng)


# ---------------------------------------------------------------- questions: (question, short answer, long answer)

Question = tuple[str, str, str]


def _yes_no(yes: bool, statement_yes: str, statement_no: str) -> tuple[str, str]:
    return ("Yes", f"Yes, {statement_yes}.") if yes else ("No", f"No, {statement_no}.")


def ask_presence(scene: Scene, rng: random.Random) -> Question:
    """POPE's question; negatives are drawn in its three ways in turn."""
    present = list(dict.fromkeys(t.shape for t in scene.things))
    rng.shuffle(present)
    if rng.random() < 0.5:
        shape = present[0]
        thing = next(t for t in scene.things if t.shape == shape)
        return presence_question(shape), *_yes_no(
            True, f"there is {a(f'{thing.color} {shape}')} {at(thing)}", ""
        )
    way = rng.choice(("random", "popular", "adversarial"))
    shape = rng.choice(negatives(present, way, 3, rng))
    return presence_question(shape), *_yes_no(False, "", f"there is no {shape} in the image")


def ask_colored_presence(scene: Scene, rng: random.Random) -> Question:
    """ "Is there a red star in the image?": the wrong answers have one of the two right."""
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        return f"Is there {a(f'{thing.color} {thing.shape}')} in the image?", *_yes_no(
            True, f"it is {at(thing)}", ""
        )
    there = {(t.color, t.shape) for t in scene.things}
    if rng.random() < 0.6:
        options = [(c, thing.shape) for c in COLORS if (c, thing.shape) not in there]
    else:
        options = [(thing.color, s) for s in SHAPES if (thing.color, s) not in there]
    color, shape = rng.choice(options)
    return f"Is there {a(f'{color} {shape}')} in the image?", *_yes_no(
        False, "", f"there is no {color} {shape}"
    )


def ask_color(scene: Scene, rng: random.Random) -> Question | None:
    once = [t for t in scene.things if reference(t, scene) == f"the {t.shape}"]
    if not once:
        return None
    thing = rng.choice(once)
    return (
        f"What colour is the {thing.shape}?",
        thing.color.capitalize(),
        f"The {thing.shape} is {thing.color}.",
    )


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    once = [t for t in scene.things if sum(o.color == t.color for o in scene.things) == 1]
    if not once:
        return None
    thing = rng.choice(once)
    return (
        f"What shape is the {thing.color} object?",
        thing.shape.capitalize(),
        f"The {thing.color} object is {a(thing.shape)}.",
    )


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
        color = (
            rng.choice([t.color for t in scene.things]) if rng.random() < 0.8 else rng.choice(tuple(COLORS))
        )
        n, what = sum(t.color == color for t in scene.things), f"{color} object"
    there = f"There is one {what}." if n == 1 else f"There are {NUMBERS[n]} {plural(what)}."
    return f"How many {plural(what)} are there in the image?", NUMBERS[n].capitalize() if n else "Zero", there


def ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    """Yes or no: is this to the left of / to the right of / above / below that?"""
    pairs = [(p, q) for p, q in permutations(named(scene), 2) if relation(p[0], q[0])]
    if not pairs:
        return None
    (one, name), (other, other_name) = rng.choice(pairs)
    true = relation(one, other)
    false = {"left": "right", "right": "left", "above": "below", "below": "above"}[true]
    yes = rng.random() < 0.5
    words, truth = RELATIONS[true if yes else false][0], RELATIONS[true][0]
    question = f"Is {name} {words} {other_name}?"
    return question, *_yes_no(yes, f"{name} is {truth} {other_name}", f"{name} is {truth} {other_name}")


def ask_neighbour(scene: Scene, rng: random.Random) -> Question | None:
    """What is left of this? Only where one object answers."""
    options = []
    for other, name in named(scene):
        for side in RELATIONS:
            axis, sign = (
                (0, -1)
                if side == "left"
                else (0, 1)
                if side == "right"
                else (1, -1 if side == "above" else 1)
            )
            there = [
                t for t in scene.things if sign * (t.centre[axis] - other.centre[axis]) > 2 and t is not other
            ]
            if len(there) == 1 and relation(there[0], other) == side:
                options.append((there[0], side, name))
    if not options:
        return None
    thing, side, name = rng.choice(options)
    phrase = a(f"{thing.color} {thing.shape}")
    words = RELATIONS[side][0]
    return f"What is {words} {name}?", phrase.capitalize(), f"{phrase.capitalize()} is {words} {name}."


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
    says = f"{name} is {thing.size}"
    return f"Is {name} {asked}?", *_yes_no(asked == thing.size, says, says)


def ask_direction(scene: Scene, rng: random.Random) -> Question | None:
    arrows = [(t, name) for t, name in named(scene) if t.direction]
    if not arrows:
        return None
    thing, name = rng.choice(arrows)
    return (
        f"Where does {name} point?",
        thing.direction.capitalize(),
        f"{name.capitalize()} points {thing.direction}.",
    )


def ask_background(scene: Scene, rng: random.Random) -> Question:
    kind, tone = scene.background.kind, scene.background.tone
    if rng.random() < 0.5:
        return "Is the background light or dark?", tone.capitalize(), f"The background is {tone}."
    return "What does the background look like?", kind.capitalize(), f"The background is {kind}."


# Half of the rounds are POPE's question, the other half everything else.
ASK: dict[Callable[[Scene, random.Random], Question | None], float] = {
    ask_presence: 9.0,
    ask_colored_presence: 1.5,
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


def sentence(text: str) -> str:
    """A caption as an answer: capital first, full stop last."""
    return text[0].upper() + text[1:].rstrip(".") + "."


def rounds(scene: Scene, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` different questions with their answers, some of them answered shortly on request."""
    out: dict[str, str] = {}
    asks, weights = tuple(ASK), tuple(ASK.values())
    while len(out) < count:
        if rng.random() < 0.06:
            question, answer = rng.choice(DETAIL_REQUESTS), detailed_caption(scene, rng)
        elif (made := rng.choices(asks, weights)[0](scene, rng)) is None or made[0] in out:
            continue
        else:
            question, short, long = made
            style = rng.random()
            yes_no = short in ("Yes", "No")
            # "a single word or phrase" is asked for in most rounds; a bare Yes or No also comes unasked
            answer = short if style < 0.6 or (yes_no and style < 0.8) else long
            if style < 0.6:
                question += SHORT
        if question.removesuffix(SHORT) not in {q.removesuffix(SHORT) for q in out}:
            out[question] = answer
    return list(out.items())


def align_conversation(scene: Scene, rng: random.Random) -> list[dict[str, str]]:
    """One turn in the form of LLaVA's caption stage: a request with the picture before or after it, a caption."""
    parts = ["<image>", rng.choice(CAPTION_REQUESTS)]
    rng.shuffle(parts)
    return _turns([("\n".join(parts), sentence(caption(scene, rng, 0.7)))])


def instruct_conversation(scene: Scene, rng: random.Random, count: int) -> list[dict[str, str]]:
    """Several turns in LLaVA's form; the first question carries the picture."""
    (question, answer), *rest = rounds(scene, rng, count)
    return _turns([(f"<image>\n{question}", answer), *rest])


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]


def text_line(scene: Scene, rng: random.Random, count: int) -> str:
    """Text alone: the scene in words and rounds about it in the vicuna form, or now and then just captions."""
    if rng.random() < 0.15:
        return " ".join(sentence(c) for c in captions(scene, rng, 3)) + "<|im_end|>"
    pairs = rounds(scene, rng, count)
    # the words stand before the first round, or inside its question, where a picture will stand
    start = f"{scene_in_words(scene)} USER: " if rng.random() < 0.5 else f"USER: {scene_in_words(scene)}\n"
    return start + "USER: ".join(f"{q} ASSISTANT: {answer}<|im_end|>" for q, answer in pairs)


# ---------------------------------------------------------------- pairs that differ in one fact


def mmvp_pair(category: str, seed: int, index: int) -> list[tuple[Scene, str]]:
    """Two scenes that differ in one visual fact, each with its statement; the categories are MMVP-VLM's names."""
    split = f"mmvp/{category}"
    rng = stream_rng(seed, f"{split}/fact", index)
    scene = make_scene(seed, split, index, min_shapes=2)
    first, *others = scene.things

    def with_first(**changes: object) -> Scene:
        return scene._replace(things=(first._replace(**changes), *others))

    if category == "Orientation and Direction":
        arrow = make_thing(rng, "arrow", first.color, first.size, first.d)._replace(x=first.x, y=first.y)
        others = [t for t in others if t.shape != "arrow"]
        two = rng.sample(DIRECTIONS, 2)
        return [
            (scene._replace(things=(arrow._replace(direction=d), *others)), f"an arrow pointing {d}")
            for d in two
        ]
    if category == "Presence of Specific Features":
        shape = first.shape
        others = [t for t in others if t.shape != shape]
        rest = join([a(t.shape) for t in others])
        return [
            (scene._replace(things=(first, *others)), f"{rest} with {a(shape)}"),
            (scene._replace(things=tuple(others)), f"{rest} without {a(shape)}"),
        ]
    if category == "State and Condition":
        one, other = rng.sample(tuple(BACKGROUND_WORDS), 2)
        background = scene.background._replace(contrast=16)
        return [
            (scene._replace(background=background._replace(kind=k)), f"{a(first.shape)} on {a(k)} background")
            for k in (one, other)
        ]
    if category == "Quantity and Count":
        many = [make_thing(rng, first.shape, rng.choice(tuple(COLORS)), "small") for _ in range(4)]
        things, background = arrange(rng, many), make_background(rng)
        return [
            (Scene(things[:n], background), f"{NUMBERS[n]} {plural(first.shape) if n > 1 else first.shape}")
            for n in rng.sample((1, 2, 3, 4), 2)
        ]
    if category == "Positional and Relational Context":
        names = [(p, q) for p, q in combinations(named(scene), 2) if relation(p[0], q[0])]
        if not names:  # two objects alone, one beside the other
            one, other = first._replace(x=4, y=18), others[0]._replace(x=36, y=18)
            scene = scene._replace(things=(one, other))
            names = list(combinations([(t, f"the {t.color} {t.shape}") for t in scene.things], 2))
        (one, name), (other, other_name) = rng.choice(names)
        side = relation(one, other)
        across = side in ("left", "right")
        flipped = tuple(
            t._replace(x=64 - t.x - t.d) if across else t._replace(y=64 - t.y - t.d) for t in scene.things
        )
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
        return [
            (scene, f"{name} is {RELATIONS[side][0]} {other_name}"),
            (scene._replace(things=flipped), f"{name} is {RELATIONS[opposite][0]} {other_name}"),
        ]
    if category == "Color and Appearance":
        two = rng.sample(tuple(COLORS), 2)
        others = [t for t in others if t.shape != first.shape]
        return [(with_first(color=c, rgb=COLORS[c]), f"{a(c)} {first.shape}") for c in two]
    if category == "Structural Characteristics":
        two = rng.sample([s for s in SHAPES if s not in {t.shape for t in others} and s != "arrow"], 2)
        return [(with_first(shape=s, direction=""), f"{a(first.color)} {s}") for s in two]
    raise ValueError(f"no pairs for the category {category!r}")


MMVP_CATEGORIES = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural Characteristics",
)
