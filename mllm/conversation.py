"""Conversations in LLaVA's JSON form -> spans of text that are supervised or not -> token ids and labels.

The text is tokenised once, as a whole, and labels are read off the spans: no answer is ever searched for or
tokenised a second time, so a template and a tokenizer cannot disagree about where an answer begins.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from diffclip.base.errors import InputError
from mllm.literal import IMAGE, renamed, turns_as_text
from mllm.own_template import ENDS, lay_out

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Conversation = Sequence[dict[str, str]]  # turns {"from": "system" | "human" | "gpt", "value": text}
IGNORE = -100  # label of positions that carry no loss
TEMPLATES = ("plain", "vicuna", "chatml")
AUTO = "auto"  # the tokenizer's own template; what stands for it is its source, see `mllm.own_template`
QWEN_CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # of the default language model

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATML_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class NoSupervisionError(InputError, ValueError):
    """An example carries no supervised token: it would train nothing and hide a wrong template."""


class Segment(NamedTuple):
    """A stretch of a prompt; the model learns to write it if `supervised`."""

    text: str
    supervised: bool


def render(
    conversation: Conversation, template: str, add_generation_prompt: bool = False, end_token: str = "<|im_end|>"
) -> list[Segment]:
    """Lay a conversation out as text.

    Args:
        conversation: alternating turns; a leading gpt turn is dropped. A system turn before all others takes the
            place of the template's own system text.
        template: "plain" (stage 1: the image, then the caption and a newline; questions are dropped, and so is a
            system text), "vicuna" (LLaVA 1.5's form; TinyLLaVA names it qwen2_instruct), "chatml" (Qwen's own form),
            or a source of `mllm.own_template` (the language model's own).
        add_generation_prompt: the last turn is a question; end where the answer begins.
        end_token: closes each answer of "vicuna"; the language model's end-of-turn token.

    Returns:
        Segments whose concatenation is the prompt.

    Raises:
        ValueError: unknown template, turns out of order, a question without an answer (or the reverse); as
            InputError, texts that the language model's own template refuses.
    """
    return segments_of(*pair_turns(conversation, add_generation_prompt), system_text(conversation), template, end_token)


def segments_of(
    questions: list[str], answers: list[str], system: str, template: str, end_token: str = "<|im_end|>"
) -> list[Segment]:
    """`render` of questions and answers as `pair_turns` returns them, and of `system_text`."""
    if ENDS.match(template):
        return [Segment(*piece) for piece in lay_out(template, questions, answers, system)]
    if template == "plain":
        segments = [part for answer in answers for part in (Segment(IMAGE, False), Segment(answer + "\n", True))]
        return segments + [Segment(IMAGE, False)] * (len(questions) - len(answers))
    around = _surroundings(template, end_token, system)
    segments, lead = [], around.system
    for i, question in enumerate(questions):
        if template == "vicuna" and IMAGE in question:  # the image always stands in front, once
            question = f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()
        segments.append(Segment(f"{lead}{around.user}{question}{around.assistant}", False))
        if i < len(answers):
            segments.append(Segment(f"{around.space}{answers[i]}{around.end}", True))
        lead = around.between
    return [*segments, Segment(lead, False)] if lead and len(answers) == len(questions) else segments


class _Surroundings(NamedTuple):
    """What a template writes around questions and answers."""

    system: str
    user: str
    assistant: str
    space: str  # before an answer, and learnt with it, as `end` is
    end: str
    between: str  # after each answer, and not learnt


def _surroundings(template: str, end_token: str, system: str = "") -> _Surroundings:
    """What `template` writes, with `system` instead of its own system text, if given."""
    if template == "vicuna":
        return _Surroundings((system or VICUNA_SYSTEM) + " ", "USER: ", " ASSISTANT:", " ", end_token, "")
    if template == "chatml":
        start, end = "<|im_start|>", "<|im_end|>"
        lead = f"{start}system\n{system or CHATML_SYSTEM}{end}\n"
        return _Surroundings(lead, f"{start}user\n", f"{end}\n{start}assistant\n", "", end, "\n")
    raise ValueError(f"unknown conversation template `{template}`: use one of {', '.join(TEMPLATES)}, {AUTO}")


def template_name(template: str) -> str:
    """What a template is called in settings and messages."""
    return AUTO if ENDS.match(template) else template


def system_text(conversation: Conversation) -> str:
    """What a system turn before all others says, or ""; a blank one says nothing."""
    first = conversation[0] if conversation else {}
    text = first.get("value") if first.get("from") == "system" else ""
    return text if isinstance(text, str) and text.strip() else ""


def pair_turns(conversation: Conversation, add_generation_prompt: bool = False) -> tuple[list[str], list[str]]:
    """Questions and answers, one answer fewer for a generation prompt; ValueError unless turns alternate."""
    turns = list(conversation)
    if turns and turns[0].get("from") == "system" and isinstance(turns[0].get("value"), str):
        turns = turns[1:]
    if turns and turns[0].get("from") == "gpt":
        turns = turns[1:]
    roles = (["human", "gpt"] * len(turns))[: len(turns)]
    values = cast(list[str], [turn.get("value") for turn in turns])  # whether they are is asked next
    if [turn.get("from") for turn in turns] != roles or not all(isinstance(value, str) for value in values):
        raise ValueError(_turn_problem(turns, roles))
    if not turns or len(turns) % 2 != (1 if add_generation_prompt else 0):
        raise ValueError(
            "the conversation must end with a question" if add_generation_prompt else "a question has no answer"
        )
    return values[0::2], values[1::2]


def _turn_problem(turns: Conversation, roles: Sequence[str]) -> str:
    """What is wrong with the first turn that has another role than these, or no text."""
    for turn, role in zip(turns, roles):
        if turn.get("from") != role:
            return f"turns must alternate human, gpt, human, ...; found `{turn.get('from')}`"
        if not isinstance(turn.get("value"), str):
            return f"a {role} turn has no text in `value`"
    return ""


def prompt(
    conversation: Conversation, template: str, end_token: str = "<|im_end|>", control: Sequence[str] = QWEN_CONTROL
) -> str:
    """The text up to where the answer to the last turn begins; InputError if there is a `text_problem`.

    Control tokens that the turns write are marked as text, see `mllm.literal`.
    """
    conversation = turns_as_text(conversation, control)
    if problem := text_problem(*pair_turns(conversation, True), control, system_text(conversation)):
        raise InputError(problem)
    return "".join(s.text for s in render(conversation, template, True, end_token))


def question_turn(question: str, images: int) -> dict[str, str]:
    """A human turn that shows its images in front, unless the question says where."""
    return {"from": "human", "value": question if IMAGE in question else f"{IMAGE}\n" * images + question}


def check_image_count(shown: int, given: int, template: str, name: str = "") -> None:
    """Raise InputError, which begins with `name`, unless a conversation shows as many images as it is given."""
    if shown == given:
        return
    if shown > given:
        remedy = "this template has no questions without an image" if template == "plain" else "remove <image> from it"
        remedy = f"give every <image> its image, or {remedy}"
    elif template_name(template) in ("chatml", AUTO):
        remedy = "write one <image> into the question for each image, or none for all of them in front"
    else:
        remedy = "vicuna and plain show one a question: ask about one image at a time"
    counts = f"the conversation shows {shown} images, but {given} are given"
    raise InputError(f"{name}in template `{template_name(template)}` {counts}; {remedy}")


def text_problem(questions: Sequence[str], answers: Sequence[str], control: Iterable[str], system: str = "") -> str:
    """Why texts cannot be given to a tokenizer, or ""; with `control` from `mllm.literal.control_tokens`, where none of
    these tokens may be left.
    """
    control = list(control)
    told = "\n".join((system, *answers))
    together = "\n".join((told, *questions))
    without = together.replace(IMAGE, "")
    if together.isascii() and IMAGE not in told and not any(t in together or t in without for t in control):
        return ""  # as of nearly all rows
    kinds = (("the system text", [system]), ("a question", questions), ("an answer", answers))
    for kind, text in ((kind, text) for kind, texts in kinds for text in texts):
        # a template may take <image> out of a question, and what stood around it comes together
        without = text.replace(IMAGE, "") if IMAGE in text else text
        written = [token for token in control if token in text or token in without]
        if written:
            return f"{kind} contains {written[0]}, which would become the model's control token; write it otherwise"
        if kind != "a question" and IMAGE in text:
            return f"{kind} contains {IMAGE}; only questions may show images"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"{kind} contains half a character, {text[error.start]!a}; write the text again"
    return ""


def encode(
    segments: Iterable[Segment], tokenizer: "PreTrainedTokenizerBase", image_tokens: int
) -> dict[str, list[int]]:
    """Token ids and labels of a rendered conversation.

    Args:
        tokenizer: a fast Hugging Face tokenizer that knows `<image>` as one token.
        image_tokens: how many placeholders stand for one image in the model's input.

    Returns:
        `input_ids` and `labels`, equally long; labels are the ids of supervised tokens, else -100. A token is
        supervised if its last character lies in a supervised segment; placeholders never are.
    """
    segments = list(segments)
    texts, backend = renamed([s.text for s in segments], tokenizer)
    text = "".join(texts)
    encoded = backend.encode(text)
    ids, labels, position = encoded.ids, [IGNORE] * len(encoded), 0
    for segment, own in zip(segments, texts):
        end = position + len(own)
        if segment.supervised and own:
            first, last = (_first_token(encoded, place, len(text)) for place in (position, end))
            labels[first:last] = ids[first:last]
        position = end
    image_id = cast(int, tokenizer.convert_tokens_to_ids(IMAGE))
    place = -1
    for _ in range(ids.count(image_id)):
        place = ids.index(image_id, place + 1)
        ids[place : place + 1] = [image_id] * image_tokens
        labels[place : place + 1] = [IGNORE] * image_tokens
        place += image_tokens - 1
    return {"input_ids": ids, "labels": labels}


def _first_token(encoded: "Encoding", position: int, text_length: int) -> int:
    """The first token that ends behind a character position, found at the position and not among all tokens."""
    token = encoded.char_to_token(position)
    if token is None:  # the end of the text, or a character that no token covers
        ends = [end for _, end in encoded.offsets] if position < text_length else []
        return next((i for i, end in enumerate(ends) if end > position), len(encoded))
    while token and encoded.offsets[token - 1][1] > position:  # a character of several tokens
        token -= 1
    return token


def chat_template(template: str, end_token: str = "<|im_end|>") -> str | None:
    """The template as Jinja, for `processor.apply_chat_template`; None for "plain" (no questions).

    What is supervised here stands in `{% generation %}`, which others go by (`return_assistant_tokens_mask`, TRL's
    assistant_only_loss).
    """
    if template == "plain":
        return None
    if ENDS.match(template):
        return template
    around = _surroundings(template, end_token)
    system, user, assistant, space, end, between = map(repr, around)
    before, behind = map(repr, _surroundings(template, end_token, "\0").system.split("\0"))
    return (
        "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
        "{%- for part in content if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
        "{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
        "{%- if messages and messages[0].role == 'system' and text(messages[0].content) | trim -%}"
        f"{{{{ {before} + text(messages[0].content) + {behind} }}}}{{%- else -%}}{{{{ {system} }}}}{{%- endif -%}}"
        "{%- for message in messages -%}{%- if message.role == 'user' -%}"
        f"{{{{ {user} + text(message.content) + {assistant} }}}}"
        "{%- elif message.role == 'assistant' -%}"
        f"{{%- generation -%}}{{{{ {space} + text(message.content) + {end} }}}}{{%- endgeneration -%}}"
        f"{{{{ {between} }}}}"
        "{%- endif -%}{%- endfor -%}"
    )
