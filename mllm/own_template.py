"""A tokenizer's own chat template: conversations as its language model knows them, and which parts answers are.

The template becomes one Jinja source that needs nothing else, saved with the run for training and asking alike. Where
answers stand in what it writes is seen by writing marks in the place of all texts, never by searching an answer; or by
its `{% generation %}` blocks, where it has them. Then the real texts have to fit between the same pieces.
"""

import json
import re
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from diffclip.base.bounded import MEMORY, SECONDS, comes_to_an_end
from diffclip.base.errors import InputError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = "own_chat_template"  # under which tokenizer_config.json of a run keeps it, whatever template the run asks in
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ENDS = re.compile(r"\{%- set diffclip_ends = (\[.*?\]) -%\}")  # with which every source of ours begins
SYSTEM, MARK = "@system-mark@", "@{}-mark-{}@"

# Parts of content as one text; no thinking, which no training data here has; and always the same date, Llama-3's, so
# that a model answers tomorrow as it does today.
BEFORE = """\
{%- macro diffclip_text(content) -%}{%- if content is string -%}{{ content }}{%- elif content -%}
{%- for part in content if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')
| replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24') | replace('%H', '00') | replace('%M', '00')
| replace('%S', '00') | replace('%A', 'Friday') | replace('%a', 'Fri') }}{%- endmacro -%}
{%- set enable_thinking = false -%}
{%- set diffclip = namespace(messages=[], system='') -%}
{%- for message in messages -%}{%- set content = diffclip_text(message.content) -%}
"""
EACH = {  # whether a system turn joins the first question: what is done with each message
    False: """\
{%- if message.role != 'system' or content | trim -%}
{%- set diffclip.messages = diffclip.messages + [dict(message, content=content)] -%}{%- endif -%}
""",
    True: """\
{%- if message.role == 'system' -%}{%- set diffclip.system = content + '\\n\\n' if content | trim else '' -%}
{%- else -%}{%- set content = (diffclip.system if message.role == 'user' else '') + content -%}
{%- if message.role == 'user' -%}{%- set diffclip.system = '' -%}{%- endif -%}
{%- set diffclip.messages = diffclip.messages + [dict(message, content=content)] -%}{%- endif -%}
""",
}
AFTER = "{%- endfor -%}{%- set messages = diffclip.messages %}\n"


class Piece(NamedTuple):
    """A stretch of a layout: text of the template, or the mark of a text that goes there."""

    text: str
    supervised: bool
    mark: bool


def keep(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Have the tokenizer save its chat template, and the special tokens that it names, beside the one of the run."""
    try:
        source = tokenizer.get_chat_template()
    except ValueError:  # it has none, or several without a default
        return
    tokens = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    known = "".join(f"{{%- set {name} = {_literal(text)} %}}\n" for name, text in tokens.items())
    tokenizer.init_kwargs[KEPT] = known + source


def own_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The Jinja source that `lay_out` takes, from what `keep` kept.

    Raises:
        InputError: there is none, or it lays conversations out in a way that cannot be trained and asked in.
    """
    if not isinstance(kept := tokenizer.init_kwargs.get(KEPT), str):
        raise InputError(
            "template auto: this run keeps no chat template of its language model, whose tokenizer has none, or which "
            "an earlier version aligned; align anew with one that has, or use vicuna"
        )
    try:
        check_end(BEFORE + EACH[False] + AFTER + kept)
        source = _with_system_turns(BEFORE, kept)
        if (lead := _lead(source)).strip():  # written by the template, not by the model: `<think></think>` of Qwen3
            source = f"{source.removesuffix(chr(10))}{{{{ {_literal(lead)} if add_generation_prompt else '' }}}}"
        source = f"{{%- set diffclip_ends = {_literal(_ends(source, tokenizer))} -%}}\n{source}"
        for turns in (1, 2, 3):
            for system in (False, True):
                for ask in (False, True):
                    _layout(source, turns, system, ask)
    except InputError as error:
        raise InputError(f"template auto: the tokenizer's chat template {error}; use vicuna") from None
    return source


def check_end(source: str) -> None:
    """InputError if a template, which is a program and may be a stranger's, takes minutes or all memory.

    It is tried with up to three questions. What it does with another conversation, nobody can know.
    """
    from transformers.utils import chat_template_utils  # noqa: F401 - here, where no limit is on memory

    def lay_out_some() -> None:
        for turns in (1, 2, 3):
            for system, ask in ((False, True), (True, False)):
                _render(source, *_marks(turns, system, ask))

    if not comes_to_an_end(lay_out_some):
        raise InputError(f"takes more than {SECONDS} seconds or {MEMORY >> 30} GB for a short conversation")


def ends(source: str) -> list[str]:
    """The tokens that end an answer in a source of `own_template`."""
    found = ENDS.match(source)
    return json.loads(found[1]) if found else []


def lay_out(source: str, questions: list[str], answers: list[str], system: str = "") -> list[tuple[str, bool]]:
    """The text that a template makes of a conversation, in pieces that are supervised or not.

    Args:
        source: of `own_template`.
        answers: as many as questions, or one fewer: then the text ends where the answer to the last one begins.

    Raises:
        InputError: it refuses these texts, or writes them in another way than others.
    """
    ask = len(answers) < len(questions)
    written = _write(source, questions, answers, system)
    texts = {MARK.format("question", i): text for i, text in enumerate(questions)}
    texts |= {MARK.format("answer", i): text for i, text in enumerate(answers)} | {SYSTEM: system}
    pieces, position = [], 0
    layout = _layout(source, len(questions), bool(system), ask)
    for number, piece in enumerate(layout):
        behind = ""
        for each in layout[number + 1 :]:
            if each.mark:
                break
            behind += each.text
        for text in _trimmed(texts[piece.text]) if piece.mark else [piece.text]:
            if written.startswith(text + behind, position):
                break
        else:
            raise InputError(
                "the chat template lays this conversation out in another way than others, as for a control word like "
                "<think> in it; write its texts otherwise, or use template vicuna"
            )
        pieces.append((text, piece.supervised))
        position += len(text)
    if position != len(written):
        raise InputError("the chat template writes more behind this conversation than behind others; drop the row")
    return pieces


def _trimmed(text: str) -> list[str]:
    """A text, and what templates may leave of its margins."""
    return [text, text.rstrip(), text.lstrip(), text.strip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")]


def _write(source: str, questions: list[str], answers: list[str], system: str) -> str:
    return _render(source, questions, answers, system)[0]


def _render(
    source: str, questions: list[str], answers: list[str], system: str = "", mask: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """What a template makes of a conversation; with `mask`, where its `{% generation %}` blocks stand in it."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        messages += [{"role": "assistant", "content": answers[i]}] if i < len(answers) else []
    ask = len(answers) < len(questions)
    from transformers.utils import chat_template_utils  # not at the top: `diffclip chat --help` answers at once

    jinja: Any = chat_template_utils.render_jinja_template  # declared to return a text
    try:
        texts, spans = jinja(
            [messages], chat_template=source, add_generation_prompt=ask, return_assistant_tokens_mask=mask
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise InputError(f"refuses a conversation ({in_one_line(error, 200)})") from None
    return texts[0], spans[0] if mask else []


def _marks(turns: int, system: bool, ask: bool) -> tuple[list[str], list[str], str]:
    """Questions, answers and system text that are marks."""
    questions, answers = ([MARK.format(kind, i) for i in range(turns)] for kind in ("question", "answer"))
    return questions, answers[: turns - ask], SYSTEM if system else ""


@lru_cache(maxsize=1024)
def _layout(source: str, turns: int, system: bool, ask: bool) -> tuple[Piece, ...]:
    """How a template lays out a conversation of so many questions, the last without its answer if `ask`.

    Raises:
        InputError: it leaves a text out, writes it twice, or none of `ends` behind an answer; its blocks for what is
            supervised do not hold answers with their ends; an answer would be asked for in other words than learnt.
    """
    questions, answers, system_text = _marks(turns, system, ask)
    blocks = bool(GENERATION.search(source)) and not ask
    written, spans = _render(source, questions, answers, system_text, mask=blocks)
    marks = [*questions, *answers, *([SYSTEM] if system else [])]
    if wrong := next((mark for mark in marks if written.count(mark) != 1), None):
        kind = wrong.strip("@").split("-")[0]
        raise InputError(f"writes a {kind} {'twice' if wrong in written else 'not at all'}")
    end = re.compile(rf"\s*({'|'.join(map(re.escape, ends(source)))})")
    learnt: list[tuple[int, int]] = []
    for i, answer in enumerate(answers):
        start = written.index(answer)
        closed = end.match(written, start + len(answer))
        if not closed:
            raise InputError("ends some answers with no token, or with another than others")
        prompt, _ = _render(source, questions[: i + 1], answers[:i], system_text)
        asked = written.startswith(prompt) and len(prompt) <= start
        if not asked and i == turns - 1:
            raise InputError("asks for an answer with other words than stand before it in training")
        first, last = len(prompt) if asked and not written[len(prompt) : start].strip() else start, closed.end()
        if blocks:  # without what a prompt holds already: SmolLM3's blocks begin with the head of the turn
            block = next((span for span in spans if span[0] <= start and last <= span[1]), None)
            if block is None:
                raise InputError("has {% generation %} blocks that leave out answers or the tokens that end them")
            first, last = max(block[0], first), block[1]
        learnt.append((first, last))
    borders = {0, len(written), *(border for span in learnt for border in span)}
    for mark in marks:
        borders |= {written.index(mark), written.index(mark) + len(mark)}
    cuts = sorted(borders)
    return tuple(
        Piece(written[a:b], any(first <= a and b <= last for first, last in learnt), written[a:b] in marks)
        for a, b in pairwise(cuts)
    )


def _with_system_turns(before: str, kept: str) -> str:
    """The whole source; where the template itself has no system turns, their text joins the first question."""
    questions, answers, system = _marks(1, True, False)
    for joined in (False, True):
        source = before + EACH[joined] + AFTER + kept
        try:
            if SYSTEM in _write(source, questions, answers, system):
                return source
        except InputError:
            if joined:
                raise
    raise InputError("leaves system texts out")


def _lead(source: str) -> str:
    """What stands between the end of a prompt and its answer."""
    questions, answers, _ = _marks(1, False, False)
    written, prompt = _write(source, questions, answers, ""), _write(source, questions, [], "")
    if answers[0] not in written or not written.startswith(prompt):
        raise InputError("asks for an answer with other words than stand before it in training")
    return written[len(prompt) : written.index(answers[0])]


def _ends(source: str, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokens that stand behind answers, that of the last one first."""
    tokens = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()), key=len)
    token = re.compile(rf"\s*({'|'.join(map(re.escape, reversed(tokens)))})")
    questions, answers, _ = _marks(2, False, False)
    written = _write(source, questions, answers, "")
    found = [token.match(written, written.index(a) + len(a)) for a in reversed(answers) if a in written]
    if len(found) < 2 or not all(found):
        raise InputError("ends answers with no token of the tokenizer, so that none would ever end")
    return list(dict.fromkeys(match[1] for match in found if match))


def _literal(value: str | list[str]) -> str:
    """A value as Jinja writes it."""
    return json.dumps(value, ensure_ascii=False)
