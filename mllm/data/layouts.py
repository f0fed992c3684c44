"""Conversations in the layouts that people have -> one: turns {"from": "system" | "human" | "gpt", "value"}, and images
in the order in which the questions show them, an `<image>` for each.

| layout | turns | images |
| --- | --- | --- |
| LLaVA, ShareGPT | `conversations`: from/value or role/content, `system` beside them | as `<image>` in the text says |
| OpenAI, TRL | `messages`, or `prompt` and `completion`: role/content, text or parts | where the parts stand |
| the Cauldron | `texts`: user/assistant | before the first question |

Images are under `image`, `images` or `image_path`, or in the parts. Rows of messages that say nowhere where their
images stand show them before the first question, as TRL does. What else a row holds is told apart by name and value:
what shows or sounds is never ignored.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from diffclip.base.errors import InputError
from mllm.conversation import IMAGE, question_turn
from mllm.data.files import FAULT
from mllm.data.images import IMAGE_KEYS, filled, row_images, value_images

TURNS = ("conversations", "conversation", "messages", "texts")
SYSTEM = ("system", "system_prompt")
COMMON = ({"from", "value"}, {"role", "content"})  # keys of nearly all turns, whose values say all
ROLES = {"system": "system", "developer": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
LAYOUTS = "LLaVA's `conversations`, `messages`, `prompt` and `completion`, or the Cauldron's `texts`"

OTHER_MEDIA = re.compile(r"(input_)?(videos?|audios?|sounds?|speech|music)(_?(paths?|files?|urls?))?", re.IGNORECASE)
MEDIA_KEY = re.compile(  # images under another name than those that are read
    r"(input_?)?(images?|imgs?|pictures?|pics?|photos?|frames?|pixel_values|masks?|depth|figures?|screenshots?)_?\d*"
    r"(_?(paths?|files?|file_?names?|names?|urls?|uris?|list|base64|b64|str|bytes|data|content)){0,3}",
    re.IGNORECASE,
)
MEDIA_FILE = re.compile(
    r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|mpe?g|wav|mp3|flac|ogg|m4a)(\?\S*)?$",
    re.IGNORECASE,
)
MEDIA_TEXT = ("data:image/", "data:video/", "data:audio/", "/9j/4", "iVBORw0KGgo", "R0lGOD", "UklGR")  # also base64
UNREAD = ("tools", "tool_calls", "functions", "function_call")
ROW_KEYS = {*IMAGE_KEYS, *TURNS, *SYSTEM, "id", "question", "question_id", "prompt", "completion"}

Turn = dict[str, str]
Image = tuple[str, bytes | None]  # what to call it, and its encoded bytes where the row holds them


def read_conversation(row: dict) -> tuple[list[Turn], list[Image]]:
    """The turns of a row of any layout and its images; InputError, without the row's name, for what is none."""
    if FAULT in row:
        raise InputError(str(row[FAULT]))
    layout, turns = _turns(row)
    uncommon = [turn for turn in turns if turn.keys() not in COMMON]
    for owner in (row, *uncommon):
        if called := next((key for key in UNREAD if filled(owner.get(key)) and owner[key] not in ("[]", {})), None):
            raise InputError(f"has `{called}`, which this model does not know; drop the row")
    given = row_images(row)
    parts: list[dict] = []
    conversation = _system(row)
    for number, turn in enumerate(turns):
        role, content = _role_and_content(turn, number)
        text = content if isinstance(content, str) else "".join(_joined(content, parts))
        if role == "system" and conversation:
            if conversation != [{"from": "system", "value": text}]:
                raise InputError("has two system texts; only one, at the beginning, is read: join them")
        elif role != "system" or text.strip():  # a blank one says nothing: the template's own stands
            conversation.append({"from": role, "value": text})
    images = _shown(parts, given)
    if images and not parts and layout != "conversations" and not any(IMAGE in turn["value"] for turn in conversation):
        for first in [turn for turn in conversation if turn["from"] == "human"][:1]:
            first |= question_turn(first["value"], len(images))
    problem = media_problem(row, images)
    if problem := problem or next(filter(None, (media_problem(turn, owner="a turn ") for turn in uncommon)), ""):
        raise InputError(problem)
    return conversation, images


def _turns(row: dict) -> tuple[str, list[dict]]:
    """The layout of a row, and its turns {role or from, content or value}."""
    held = [key for key in TURNS if isinstance(row.get(key), list) and row[key]]
    if len(held) > 1:
        raise InputError(f"has turns in `{held[0]}` and in `{held[1]}`; keep one of them")
    if not held and filled(row.get("prompt")) and filled(row.get("completion")):
        turns = [*_messages(row["prompt"], "user", "prompt"), *_messages(row["completion"], "assistant", "completion")]
        return "messages", turns
    if not held:
        empty = next((key for key in TURNS if key in row), None)
        keys = ", ".join(str(key)[:40] for key in [*row][:12]) or "nothing"
        what = f"`{empty}` is no list of turns" if empty else f"has no conversation, but {keys}"
        raise InputError(f"{what}; rows hold {LAYOUTS}")
    (key,) = held
    turns = row[key]
    if not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"`{key}` is no list of turns; rows hold {LAYOUTS}")
    if key == "texts":
        if not all({"user", "assistant"} <= turn.keys() for turn in turns):
            raise InputError("`texts` holds more than {user, assistant}, the Cauldron's turns; rows hold " + LAYOUTS)
        turns = [turn for pair in turns for turn in _asked(pair)]
    return "conversations" if key.startswith("conversation") else key, turns


def _asked(pair: dict) -> list[dict]:
    """A question and its answer of the Cauldron; what else stands beside them stays with the question."""
    rest = {key: value for key, value in pair.items() if key not in ("user", "assistant")}
    return [{**rest, "role": "user", "content": pair["user"]}, {"role": "assistant", "content": pair["assistant"]}]


def _messages(value: object, role: str, key: str) -> list[dict]:
    """A prompt or completion of TRL: a text, or messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"`{key}` is neither a text nor a list of messages; rows hold {LAYOUTS}")
    return value


def _system(row: dict) -> list[Turn]:
    """The system text that stands beside the turns, as a turn."""
    given = [row[key] for key in SYSTEM if filled(row.get(key))]
    if any(not isinstance(text, str) for text in given) or len(given) > 1:
        raise InputError("`system` is not one text; give one")
    return [{"from": "system", "value": text} for text in given if text.strip()]


def _role_and_content(turn: dict, number: int) -> tuple[str, str | list]:
    """Whose a turn is, by our names, and its text or parts."""
    if turn.keys() == COMMON[0] and isinstance(turn["value"], str) and turn["from"] in ("human", "gpt"):
        return turn["from"], turn["value"]  # nearly all of hundreds of thousands
    names = {turn[key] for key in ("from", "role") if isinstance(turn.get(key), str) and turn[key]}
    if len(names) != 1:
        raise InputError(f"turn {number} says in neither `from` nor `role`, or in both, whose it is; mend it")
    (name,) = names
    role = ROLES.get(name.strip().lower())
    if role is None:
        raise InputError(f"turn {number} is by `{name[:40]}`; only system, human (user), gpt (assistant) are read")
    contents = [turn[key] for key in ("value", "content", "text") if turn.get(key) is not None]
    if len(contents) > 1 and any(content != contents[0] for content in contents):
        raise InputError(f"turn {number} has two texts, `value` and `content`; keep one")
    content = [contents[0]] if contents and isinstance(contents[0], dict) else contents[0] if contents else None
    if not isinstance(content, (str, list)):
        raise InputError(f"a {role} turn has no text in `value`")
    unlearnt = next((key for key in ("weight", "loss") if turn.get(key) in (0, False)), None)  # None is neither
    if unlearnt and role == "gpt":
        raise InputError(f"an answer is not to be learnt (`{unlearnt}` 0), which is not read; drop the row")
    return role, content


def _joined(content: Sequence, parts: list[dict]) -> Iterator[str]:
    """The texts of a turn's parts, and on a line of its own an `<image>` for each image, which goes to `parts`."""
    before = ""
    for part in [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]:
        if not isinstance(part, dict):
            raise InputError(f"a part of a message is {str(part)[:40]}, neither a text nor an image; mend it")
        held = {key: value for key, value in part.items() if filled(value)}
        kind = held.get("type") or next((key for key in ("text", "image", "image_url") if key in held), None)
        if kind in ("text", "input_text", "output_text"):
            text = part.get("text")
            if not isinstance(text, str):
                raise InputError("a part of a message has no text in `text`; mend it")
            if other := next((key for key in held if MEDIA_KEY.fullmatch(key) or OTHER_MEDIA.fullmatch(key)), None):
                raise InputError(
                    f"a text part of a message has `{other}`, which is not read; make it a part of its own"
                )
        elif kind in ("image", "image_url", "input_image"):
            if "text" in held:
                raise InputError("an image part of a message has a text, too; make it a part of its own")
            parts.append(held)
            text = IMAGE
        else:
            raise InputError(f"a part of a message is of type `{str(kind)[:40]}`, not a text or an image; drop the row")
        if before and text and IMAGE in (before, text) and not (before.endswith("\n") or text.startswith("\n")):
            yield "\n"
        yield text
        before = text or before


def _shown(parts: Sequence[dict], given: list[Image]) -> list[Image]:
    """The images of parts in their order, taken from the row where they hold none themselves."""
    if not parts:
        return given
    own = [_part_image(part) for part in parts]
    if all(image is None for image in own):
        places = [part.get("index") for part in parts]
        if all(place is None for place in places):
            return given
        if sorted(str(place) for place in places) != sorted(str(n) for n in range(len(given))):
            raise InputError(
                f"its parts show images {places}, but it has {len(given)}; each must be shown once, from 0"
            )
        return [given[int(place)] for place in places if place is not None]
    if given:
        raise InputError("has images beside its messages and in them; keep one of the two")
    if None in own:
        raise InputError("a part of a message is an image that is not given; give it in the part")
    return [image for image in own if image is not None]


def _part_image(part: dict) -> Image | None:
    """The image that a part holds; None where it only says that one of the row's stands there."""
    held = [key for key in ("image", "image_url", "path", "url", "base64", "source") if key in part]
    if len(held) > 1:
        raise InputError(f"a part of a message has `{held[0]}` and `{held[1]}`; give each image a part of its own")
    value = part[held[0]] if held else None
    if "base64" in part:
        value = f"data:image/png;base64,{part['base64']}"
    if isinstance(value, dict) and value.get("type") == "base64":  # Anthropic's
        value = f"data:{value.get('media_type') or 'image/png'};base64,{value.get('data')}"
    elif isinstance(value, dict) and filled(value.get("url")):
        value = value["url"]
    if value is None:
        return None
    images = value_images(value, "messages")
    if len(images) != 1:
        raise InputError("a part of a message holds several images; give each a part of its own")
    return images[0]


def media_problem(row: dict, images: Sequence[Image] = (), owner: str = "") -> str:
    """Why a row, or a turn, would be read without what its other keys show, or "".

    Where it has `images`, a path under any key that is not named like one says where they come from, and so do web
    addresses, and names of the same files.
    """
    read = ("from", "role", "value", "content") if owner else ROW_KEYS
    names, shows = [name for name, _ in images], bool(images)
    for key, value in row.items():
        if key in read or not filled(value):
            continue
        if OTHER_MEDIA.fullmatch(str(key)):
            return f"{owner}has a `{key}`, which this model cannot see or hear; drop the row"
        named = bool(MEDIA_KEY.fullmatch(str(key)))
        media = [each for each in _flat(value) if _is_media(each, any_text=named and not shows)]
        if shows and all(isinstance(each, str) and (not named or _origin(each, names)) for each in media):
            continue
        if media:
            remedy = "call it `image`, or drop the key or the row"
            return f"{owner}names an image or film in `{key}`, which is not read; {remedy}"
    return ""


def _origin(text: str, names: Sequence[str]) -> bool:
    """Whether a text says where the images of these names come from."""
    return "://" in text[:16] or any(name.endswith(text.rpartition("/")[2]) for name in names)


def _flat(value: object, depth: int = 0) -> Iterator[object]:
    """What lies in lists and dictionaries, at most a few deep."""
    if isinstance(value, dict) and depth < 4 and not isinstance(value.get("bytes"), bytes):
        for each in value.values():
            yield from _flat(each, depth + 1)
    elif isinstance(value, list) and depth < 4 and value:
        for each in value[:64]:
            yield from _flat(each, depth + 1)
    elif value is not None:
        yield value


def _is_media(value: Any, any_text: bool) -> bool:
    """Whether a value shows something, as encoded bytes or by name; with `any_text`, whatever text it is."""
    if isinstance(value, (bytes, dict)):
        return True
    if not isinstance(value, str) or not value:
        return False
    if any_text or value.startswith(MEDIA_TEXT):
        return True
    return len(value) < 1000 and "\n" not in value and bool(MEDIA_FILE.search(value))
