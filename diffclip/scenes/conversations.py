"""What is said about a scene in training: conversations in LLaVA's form about the image, and lines of text alone."""

import random

from diffclip.scenes.drawing import Scene
from diffclip.scenes.questions import ASK, SHORT, Question, pope_questions, presence_deck
from diffclip.scenes.text import caption, detailed_caption, scene_in_words, sentence

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
            question, answer = rng.choice(DETAIL_REQUESTS), detailed_caption(scene, rng)
        elif kind < DETAIL_SHARE + CAPTION_SHARE:
            question, answer = rng.choice(CAPTION_REQUESTS), sentence(caption(scene, rng, 0.7))
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


def align_conversation(scene: Scene, rng: random.Random) -> Turns:
    """One turn as in LLaVA's caption stage: a request with the image before or after it, a caption."""
    parts = ["<image>", rng.choice(CAPTION_REQUESTS)]
    rng.shuffle(parts)
    return _turns([("\n".join(parts), sentence(caption(scene, rng, 0.7)))])


def instruct_conversation(scene: Scene, rng: random.Random, count: int, any_request: bool = True) -> Turns:
    """Several turns in LLaVA's form; the first question carries the image.

    Without `any_request`, a single turn that asks whether one shape is there. From these a small model learns to
    look in minutes; among captions and other questions it takes many times longer, so they should come last.
    """
    if any_request:
        (question, answer), *rest = rounds(scene, rng, count)
        return _turns([(f"<image>\n{question}", answer), *rest])
    questions = pope_questions(scene, rng.choice(("random", "popular", "adversarial")), rng)
    question, answer = rng.choice(questions)
    return _turns([(f"<image>\n{question}{SHORT}", answer.capitalize())])


def _turns(pairs: list[tuple[str, str]]) -> Turns:
    return [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]


def text_line(scene: Scene, rng: random.Random, any_request: bool = True) -> str:
    """Text alone: the scene in words and one yes/no question about it in the vicuna form.

    With `any_request`, half the lines have another request instead, two in three of them for a caption. Among
    those a small model takes many times longer to discover that an answer can be looked up in the scene, so they
    should come last.
    """
    if not any_request or rng.random() < 0.5:
        question, answer = pick_style(presence_deck(scene, rng)[0], rng)
    elif rng.random() < 0.67:
        question, answer = rng.choice(CAPTION_REQUESTS), sentence(caption(scene, rng, 0.7))
    else:
        [(question, answer)] = rounds(scene, rng, 1)
    # the words stand before the first round, or inside its question, where an image will stand
    start = f"{scene_in_words(scene)} USER: " if rng.random() < 0.5 else f"USER: {scene_in_words(scene)}\n"
    return f"{start}{question} ASSISTANT: {answer}<|im_end|>"
