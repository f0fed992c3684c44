"""What can be said about a scene: names, relations, captions, and pairs of scenes that differ in one fact.

Every sentence is true of the scene it is made from; wording varies with the generator that is passed in.
"""

import random
from collections import Counter
from itertools import combinations, permutations

from diffclip.scenes.drawing import (
    CANVAS,
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

NAMES_ONLY = 0.4  # share of captions without attributes, without which colours outshine shapes in training
NUMBERS = ("no", "one", "two", "three", "four")
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
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
APART = 7  # units between centres from which on two objects count as left/right or above/below

# ---------------------------------------------------------------- words


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "sh", "ch")) else "s")


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def noun_phrase(thing: Thing, rng: random.Random, size: float = 0.5, color: float = 0.9, direction: bool = True) -> str:
    """A "large red star" with some words left out; an arrow sometimes says where it points."""
    words = []
    if rng.random() < size:
        words.append(rng.choice(("large", "big") if thing.size == "large" else ("small", "little")))
    words += [thing.color, thing.shape] if rng.random() < color else [thing.shape]
    if thing.direction and direction and rng.random() < size:
        words.append("pointing " + thing.direction)
    return " ".join(words)


def full_phrase(thing: Thing) -> str:
    end = f" pointing {thing.direction}" if thing.direction else ""
    return a(f"{thing.size} {thing.color} {thing.shape}{end}")


def place(thing: Thing) -> str:
    """Which of the nine fields of the image holds the object's centre: "top left", "left", "middle", ..."""
    x, y = thing.centre
    across = "left" if x < CANVAS * 0.36 else "right" if x > CANVAS * 0.64 else ""
    down = "top" if y < CANVAS * 0.36 else "bottom" if y > CANVAS * 0.64 else ""
    return f"{down} {across}".strip() or "middle"


def at(thing: Thing) -> str:
    where = place(thing)
    return "in the middle" if where == "middle" else f"{'on' if where in ('left', 'right') else 'at'} the {where}"


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
    return sorted(scene.things, key=lambda t: (int(t.centre[1] // 16), t.centre[0]))


def reference(thing: Thing, scene: Scene) -> str:
    """The shortest name that only this object answers to: "the star", "the red star"; "" if there is none."""
    alike = [t.color for t in scene.things if t.shape == thing.shape]
    if len(alike) == 1:
        return f"the {thing.shape}"
    return f"the {thing.color} {thing.shape}" if alike.count(thing.color) == 1 else ""


def named(scene: Scene) -> list[tuple[Thing, str]]:
    """Objects that can be referred to, with their names."""
    return [(t, name) for t in scene.things if (name := reference(t, scene))]


def background_phrase(scene: Scene, rng: random.Random) -> str:
    words = [scene.background.tone] if rng.random() < 0.5 else []
    return " ".join([*words, rng.choice(BACKGROUND_WORDS[scene.background.kind]), "background"])


# ---------------------------------------------------------------- captions


def caption(scene: Scene, rng: random.Random, detail: float = 0.5) -> str:
    """One sentence that names every object, as often as not by its shape alone; `detail` is the chance of each
    size word in the others.
    """
    if rng.random() < NAMES_ONLY:
        return names_caption(scene, rng)
    things = list(scene.things)
    rng.shuffle(things)
    pairs = [p for p in permutations(things, 2) if relation(*p)]
    form = rng.random()
    related = len(things) > 1 and form < 0.55 and bool(pairs)
    # "an arrow pointing up to the left of" would be read wrongly
    phrases = {t: a(noun_phrase(t, rng, detail, direction=not related)) for t in things}
    opening = rng.choice(("", "", "", "there is ", "a picture of ", "this image shows ", "we see ", "only "))
    if len(things) == 1:
        text = opening + phrases[things[0]] + (f" {at(things[0])}" if form < 0.5 else "")
    elif related:
        one, other = rng.choice(pairs)
        rest = [phrases[t] for t in things if t not in (one, other)]
        text = f"{opening}{phrases[one]} {rng.choice(RELATIONS[relation(one, other)])} {phrases[other]}"
        if rest:
            text += rng.choice((", with ", " and also ", ", along with ")) + join(rest)
    elif form < 0.7 and len(things) < 3:
        text = join([f"{phrases[t]} {at(t)}" for t in things])
    elif form < 0.8:
        text = f"{NUMBERS[len(things)]} {rng.choice(('shapes', 'objects'))}: {join(list(phrases.values()))}"
    elif form < 0.9:
        alike = {t.shape: phrases[t] for t in things}
        counts = Counter(t.shape for t in things).items()
        text = opening + join([f"{NUMBERS[n]} {plural(s)}" if n > 1 else alike[s] for s, n in counts])
    else:
        text = opening + join(list(phrases.values()))
    background = f" on {a(background_phrase(scene, rng))}" if rng.random() < 0.3 else ""
    return text + background + rng.choice((".", ""))


def names_caption(scene: Scene, rng: random.Random) -> str:
    """A short caption without attributes: "two stars and a moon"."""
    counts = list(Counter(t.shape for t in scene.things).items())
    rng.shuffle(counts)
    opening = rng.choice(("", "", "there is ", "a picture of ", "we see "))
    return opening + join([f"{NUMBERS[n]} {plural(s)}" if n > 1 else a(s) for s, n in counts])


def captions(scene: Scene, rng: random.Random, count: int, detail: float = 0.5, simple: int = 0) -> list[str]:
    """`count` captions, different where the wording allows it; with `simple` they name, and count, shapes alone."""
    out: dict[str, None] = {}
    for _ in range(3 * count):
        out[names_caption(scene, rng) if simple else caption(scene, rng, detail)] = None
        if len(out) == count:
            break
    return ([*out] * count)[:count]


def detailed_caption(scene: Scene, rng: random.Random) -> str:
    """Several sentences: every object with its size, colour and place, a relation, the background."""
    things = reading_order(scene)
    n = len(things)
    shows = f"The image shows {NUMBERS[n]} object{'s' * (n > 1)}: "
    sentences = [shows + join([f"{full_phrase(t)} {at(t)}" for t in things]) + "."]
    if pairs := [(name, r, other) for (p, name), (q, other) in permutations(named(scene), 2) if (r := relation(p, q))]:
        name, side, other = rng.choice(pairs)
        sentences.append(f"{name.capitalize()} is {rng.choice(RELATIONS[side])} {other}.")
    sentences.append(f"The background is {scene.background.tone} and {scene.background.kind}.")
    return " ".join(sentences)


def scene_in_words(scene: Scene) -> str:
    """The list that stands for the image in text-only training: object phrases in reading order."""
    listed = ". ".join(f"{full_phrase(t)} {at(t)}" for t in reading_order(scene))
    return f"{listed}. {a(scene.background.tone)} {scene.background.kind} background."


def sentence(text: str) -> str:
    """A caption as an answer: capital first, full stop last."""
    return text[0].upper() + text[1:].rstrip(".") + "."


# ---------------------------------------------------------------- pairs that differ in one fact


def mmvp_pair(category: str, seed: int, index: int) -> list[tuple[Scene, str]]:
    """Two scenes that differ in one visual fact, each with its statement; categories as in MMVP-VLM."""
    split = f"mmvp/{category}"
    rng, scene = stream_rng(seed, f"{split}/fact", index), make_scene(seed, split, index, min_shapes=2)
    first, *others = scene.things

    def with_first(thing: Thing) -> Scene:
        return scene._replace(things=(thing, *others))

    if category == "Orientation and Direction":
        arrow = make_thing(rng, "arrow", first.color, first.size, first.d)._replace(x=first.x, y=first.y)
        others = [t for t in others if t.shape != "arrow"]
        two = rng.sample(DIRECTIONS, 2)
        return [(scene._replace(things=(arrow._replace(direction=d), *others)), f"an arrow pointing {d}") for d in two]
    if category == "Presence of Specific Features":
        others = [t for t in others if t.shape != first.shape]
        rest = [a(t.shape) for t in others]
        without = scene._replace(things=tuple(others))
        return [(with_first(first), join([*rest, a(first.shape)])), (without, f"only {join(rest)}")]
    if category == "State and Condition":
        two = rng.sample(tuple(BACKGROUND_WORDS), 2)
        background = scene.background._replace(contrast=16)
        name = a(first.shape)
        return [(scene._replace(background=background._replace(kind=k)), f"{name} on {a(k)} background") for k in two]
    if category == "Quantity and Count":
        many = [make_thing(rng, first.shape, rng.choice(tuple(COLORS)), "small") for _ in range(4)]
        things, background = arrange(rng, many), make_background(rng)
        names = {
            n: f"{NUMBERS[n]} {plural(first.shape) if n > 1 else first.shape}" for n in rng.sample((1, 2, 3, 4), 2)
        }
        return [(Scene(things[:n], background), name) for n, name in names.items()]
    if category == "Positional and Relational Context":
        related = [(p, q) for p, q in combinations(scene.things, 2) if relation(p, q)]
        if not related:  # two objects alone, one beside the other
            scene = scene._replace(things=(first._replace(x=0, y=16), others[0]._replace(x=24, y=16)))
            related = [(scene.things[0], scene.things[1])]
        thing, neighbour = rng.choice(related)
        name, other_name = (a(f"{t.color} {t.shape}") for t in (thing, neighbour))
        side = relation(thing, neighbour)
        if side in ("left", "right"):
            flipped = [t._replace(x=CANVAS - t.x - t.d) for t in scene.things]
        else:
            flipped = [t._replace(y=CANVAS - t.y - t.d) for t in scene.things]
        both = (side, scene), (OPPOSITE[side], scene._replace(things=tuple(flipped)))
        return [(shown, f"{name} {RELATIONS[s][0]} {other_name}") for s, shown in both]
    if category == "Color and Appearance":
        two = rng.sample(tuple(COLORS), 2)
        others = [t for t in others if t.shape != first.shape]
        return [(with_first(first._replace(color=c, rgb=COLORS[c])), f"{a(c)} {first.shape}") for c in two]
    if category == "Structural Characteristics":
        two = rng.sample([s for s in SHAPES if s not in {t.shape for t in others} and s != "arrow"], 2)
        return [(with_first(first._replace(shape=s, direction="")), f"{a(first.color)} {s}") for s in two]
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
