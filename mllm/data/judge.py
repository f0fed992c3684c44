"""Rows judged once, before training, as training sees them: do their images decode, do their tokens fit?

Verdicts and lengths are kept in the cache folder beside the rows: of several processes one judges, the others wait and
read. An image that was decoded once is remembered by its content, whatever rows show it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from diffclip.base.cache import cache_dir, keep, kept_array, kept_json
from diffclip.base.errors import InputError
from diffclip.base.files import file_content
from diffclip.base.fingerprint import json_digest
from diffclip.base.images import open_image
from diffclip.base.ranks import rank
from diffclip.base.threads import cores
from mllm.conversation import IGNORE, NoSupervisionError, encode, render
from mllm.data.images import find_place, present
from mllm.data.rows import Rows, locked
from mllm.data.word_tokens import TokenCounter
from mllm.literal import MARK, renamed
from mllm.processing import image_tokens

FORMAT = 1  # raise it when a verdict or a length changes its meaning
AT_ONCE = 256  # rows whose images are decoded side by side
TEXTS = 1024  # rows that are tokenised at a time

Problems = dict[int, str]  # position in the table -> what is wrong


def judged(
    rows: Rows,
    processor: LlavaProcessor,
    *,
    template: str,
    max_length: int = 2048,
    positions: int | None = None,
    fresh: bool = False,
) -> Rows:
    """`rows` without those that could not be learnt from, which join its `problems`.

    Those are rows with an image that cannot be decoded, with more tokens than the language model has positions, and
    those of which `max_length` would leave no supervised token, or only a part of an image. `fresh`: look at all images
    again, whatever is kept.
    """
    problems = image_problems(rows, fresh)
    problems |= length_problems(rows, processor, template=template, max_length=max_length, positions=positions)
    return rows.without(problems)


# ---------------------------------------------------------------- images


def image_problems(rows: Rows, fresh: bool = False) -> Problems:
    """The rows that show an image that cannot be decoded, or that has gone.

    `fresh`: read all images again, whatever is kept; those whose content was decoded before are not decoded again.
    """
    path = _cache(rows, "images")

    def judge() -> list[list]:
        found: list[list] = []
        reasons: dict[str, str] = {}  # of image files, which several rows may show
        with DecodedImages() as known, ThreadPoolExecutor(min(32, cores() + 4)) as pool:
            for keys, jobs in _jobs(rows, reasons):
                for (position, name), reason in zip(keys, pool.map(known.problem, jobs)):
                    if position is None:
                        reasons[name] = reason
                    elif reason:
                        found.append([position, reason, None])
                known.keep()
        bad = {name: reason for name, reason in reasons.items() if reason}
        for position, names in _names(rows) if bad else ():
            for name in filter(bad.__contains__, names):
                found.append([position, bad[name], [name, _file_state(rows.image_root, name)]])
                break
        return found

    def still(found: list[list]) -> bool:
        """Whether no file that could not be decoded has been written since."""
        files = {json.dumps(file) for _, _, file in found if file}
        return all(_file_state(rows.image_root, name) == state for name, state in map(json.loads, files))

    return {position: reason for position, reason, _ in _kept(path, judge, still, fresh)}


class DecodedImages:
    """The contents of all images that this machine has decoded for any rows, by hash, in a file that only grows."""

    def __init__(self) -> None:
        self.path = cache_dir() / "rows" / "decoded.txt"  # a line each: half a line, left by a kill, is no hash
        self.known: set[bytes] = set()
        self.new: list[bytes] = []

    def __enter__(self) -> "DecodedImages":
        with suppress(OSError):
            self.known = {*file_content(self.path).split()}
        return self

    def __exit__(self, *error: object) -> None:
        self.keep()

    def problem(self, job: tuple[str, Callable[[], bytes]]) -> str:
        """Why an image, by (what to call it, how to read it), cannot be decoded, or ""."""
        name, read = job
        try:
            content = read()
            digest = hashlib.blake2b(content, digest_size=16).hexdigest().encode()
            if digest not in self.known:
                open_image(content, name)
                self.new.append(digest)
        except InputError as error:
            return str(error)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error}): replace or remove it"
        return ""

    def keep(self) -> None:
        """Write what is new, in one go, since several processes may share the file."""
        new, self.new = self.new, []
        if new and (self.path.is_file() or not self.path.exists()):  # whoever writes into a pipe waits
            self.known.update(new)
            with suppress(OSError), open(self.path, "ab") as file:  # a link in a circle, say; it is a cache
                file.write(b"\n" + b"\n".join(new) + b"\n")


Job = tuple[str, Callable[[], bytes]]


def _jobs(rows: Rows, seen: dict[str, str]) -> Iterator[tuple[list[tuple[int | None, str]], list[Job]]]:
    """Images of some rows at a time, as ((position, name), job); files, which have no position, once each."""
    columns = rows.table.select_columns(["images", "contents"])
    bar = tqdm(total=len(rows), desc="checking images", unit="row", delay=2, leave=False, disable=_quiet())
    for first in range(0, len(rows), AT_ONCE):
        positions = rows.positions[first : first + AT_ONCE]
        batch = columns[positions]
        keys: list[tuple[int | None, str]] = []
        jobs: list[Job] = []
        for position, names, contents in zip(positions.tolist(), batch["images"], batch["contents"]):
            for name, content in zip(names, contents):
                if content is None and name in seen:
                    continue
                if content is None:
                    seen[name] = ""
                keys.append((None if content is None else position, name))
                jobs.append((name, partial(_content, rows.image_root, name, content)))
        yield keys, jobs
        bar.update(len(positions))
    bar.close()


def _content(root: str, name: str, content: bytes | None) -> bytes:
    return present(root, name, content).read()


def _names(rows: Rows) -> Iterator[tuple[int, list[str]]]:
    """Each row's position, and the names of its images."""
    columns = rows.table.select_columns(["images"])
    for first in range(0, len(rows), TEXTS):
        positions = rows.positions[first : first + TEXTS]
        yield from zip(positions.tolist(), columns[positions]["images"])


def _file_state(root: str, name: str) -> list[int]:
    """What changes when another file takes the place of an image, or of the tar that holds it."""
    try:
        place = find_place(root, name)
        stat = os.stat(place.file) if place else None
    except (InputError, OSError):
        return []
    return [stat.st_size, stat.st_mtime_ns] if stat else []


# ---------------------------------------------------------------- lengths


def length_problems(
    rows: Rows, processor: LlavaProcessor, *, template: str, max_length: int, positions: int | None = None
) -> Problems:
    """The rows whose tokens do not fit, see `judged`; `positions`: of the language model, None for no limit."""
    tokenizer, images = processor.tokenizer, image_tokens(processor)
    lengths = token_lengths(rows, tokenizer, images, template)
    known = json_digest([_about(tokenizer, images, template), max_length, positions])
    path = _cache(rows, f"lengths-{known}")

    def judge() -> list[list]:
        found: list[list] = []
        for index in np.flatnonzero(lengths > min(max_length, positions or max_length)).tolist():
            length = min(int(lengths[index]), max_length)
            if positions and length > positions:
                reason = f"has {length} tokens, more than the {positions} positions of the language model"
                found.append([int(rows.positions[index]), f"{reason}; set max_length {positions}, or shorten the row"])
                continue
            row = rows.table[int(rows.positions[index])]
            segments = render(json.loads(row["conversation"]), template, end_token=str(tokenizer.eos_token))
            try:
                cut(encode(segments, tokenizer, images), processor.image_token_id, max_length)
            except InputError as error:
                found.append([int(rows.positions[index]), str(error)])
        return found

    return dict(_kept(path, judge))


def cut(encoded: dict[str, list[int]], image_token: int, max_length: int) -> dict[str, list[int]]:
    """An example of `encode` without what lies behind `max_length` tokens.

    Raises:
        NoSupervisionError, InputError: nothing to learn is left of it, or not all of an image.
    """
    if all(label == IGNORE for label in encoded["labels"][:max_length]):
        raise NoSupervisionError(f"no supervised token in the first {max_length}; raise max_length")
    if image_token in encoded["input_ids"][max_length:]:
        raise InputError(f"max_length {max_length} cuts an image off; raise it")
    return {name: values[:max_length] for name, values in encoded.items()}


def token_lengths(rows: Rows, tokenizer: PreTrainedTokenizerBase, images: int, template: str) -> np.ndarray:
    """(rows,) int32: the tokens of each row, with `images` for each image, and nothing cut; kept once counted."""
    path = _cache(rows, f"tokens-{_about(tokenizer, images, template)}", "int32", of_table=True)
    if not (counted := _read_lengths(path, rows)):
        with locked(path):
            if not (counted := _read_lengths(path, rows)):
                lengths = _count_tokens(rows, tokenizer, images, template)
                keep(path, lengths.data)
                counted = [lengths]
    return counted[0][rows.positions]


def _read_lengths(path: Path, rows: Rows) -> list[np.ndarray]:
    """What a file of lengths holds, if it is there and whole."""
    lengths = kept_array(path)
    return [lengths] if lengths is not None and len(lengths) == len(rows.table) else []


def _count_tokens(rows: Rows, tokenizer: PreTrainedTokenizerBase, images: int, template: str) -> np.ndarray:
    """`token_lengths` of all of the table, 0 for rows that were left out."""
    counts = np.zeros(len(rows.table), np.int32)
    end, count = str(tokenizer.eos_token), TokenCounter(tokenizer.backend_tokenizer)
    columns = rows.table.select_columns(["conversation", "images"])
    bar = tqdm(total=len(columns), desc="counting tokens", unit="row", delay=2, leave=False, disable=_quiet())
    for first in range(0, len(columns), TEXTS):
        batch = columns[first : first + TEXTS]
        turns = [json.loads(text) if text else None for text in batch["conversation"]]
        texts = ["".join(s.text for s in render(each, template, end_token=end)) if each else "" for each in turns]
        lengths = count(texts)
        for i in (i for i, text in enumerate(texts) if MARK in text):
            (text,), backend = renamed([texts[i]], tokenizer)
            lengths[i] = len(backend.encode(text))
        for at, (each, tokens, shown) in enumerate(zip(turns, lengths, batch["images"]), first):
            if each:
                counts[at] = tokens + (images - 1) * len(shown)
        bar.update(len(turns))
    bar.close()
    return counts


def _about(tokenizer: PreTrainedTokenizerBase, images: int, template: str) -> str:
    """A short hash of all that decides how many tokens a row has."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # an earlier call's; none is wanted
    backend.no_padding()
    content = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return json_digest([FORMAT, content, tokenizer.eos_token, images, template])


# ---------------------------------------------------------------- what is kept


def _cache(rows: Rows, what: str, suffix: str = "json", of_table: bool = False) -> Path:
    """The file in which something about rows is kept; `of_table`: about all of the table that they lie in."""
    return cache_dir() / "rows" / f"{rows.whole if of_table else rows.identity}-{what}.{suffix}"


def _kept(
    path: Path, judge: Callable[[], list], still: Callable[[list], bool] = lambda _: True, fresh: bool = False
) -> list:
    """What `judge` returns, from the file where it was kept if it is `still` true; otherwise kept there."""

    def read() -> list | None:
        found = None if fresh else kept_json(path)
        return found if found is not None and still(found) else None

    if (found := read()) is None:
        with locked(path):
            if (found := read()) is None:  # no other process has judged them in the meantime
                found = judge()
                keep(path, json.dumps(found).encode())
    return found


def _quiet() -> bool | None:
    """For tqdm: no bar in any rank but the first, nor where there is no console."""
    return True if rank() else None
