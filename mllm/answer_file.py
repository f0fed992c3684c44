"""A file of questions about images, answered into another file; the same command goes on after a stop.

Each answer carries an `answer_id`: a hash of the model and the options, and one of the row and its images. Answers are
found again by it, so rows may have been added or moved in the meantime.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffclip.base.errors import InputError
from diffclip.base.files import append_jsonl, cut_to_whole_lines, json_line, parse_json, write_whole
from diffclip.base.fingerprint import json_digest
from diffclip.base.lines import print_line
from mllm.conversation import IMAGE, check_image_count, question_turn
from mllm.data.files import read_rows
from mllm.data.images import ImagePlace, filled, find_place, row_images
from mllm.data.layouts import TURNS, Image, Turn, media_problem, read_conversation
from mllm.model import VisionLanguageModel, generation_options


def answer_file(
    vlm: VisionLanguageModel, source: Path, out: Path, image_root: Path, batch_size: int, **options: Any
) -> None:
    """Answer every row of a file; answers that `out` already holds are kept.

    Args:
        source: rows {image, question}, in any of LLaVA's layouts.
        out: gets these rows with their `answer` and `answer_id`, as JSONL.
        options: see `mllm.model.generation_options`.

    Raises:
        InputError: a row without a question, with an image that cannot be found or read, or with more or fewer
            images than its prompt shows, by its number; `out` holds something else than answers of this model, with
            these options, to these rows.
    """
    if out.is_dir() or os.path.realpath(out) == os.path.realpath(source):
        raise InputError(
            f"--out {out} is {'a folder' if out.is_dir() else 'the file of the questions'}; name a new file"
        )
    rows, turns, places = _read_questions(vlm, source, image_root)
    model_id = json_digest([vlm.identity(), generation_options(options)], 12)
    ids = [f"{model_id}-{row_id}" for row_id in _row_ids(rows, places, source)]
    out.parent.mkdir(parents=True, exist_ok=True)
    answers = _read_answers(out, ids, source)
    rows = [_plain(row) for row in rows]
    todo = [i for i, answer_id in enumerate(ids) if answer_id not in answers]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="question", disable=None) as bar:
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            images = [[place.open(f"{source}: row {i}") for place in places[i]] for i in batch]
            texts = vlm.answer([turns[i] for i in batch], images, **options)
            answers |= {ids[i]: text for i, text in zip(batch, texts)}
            append_jsonl(out, [{**rows[i], "answer": answers[ids[i]], "answer_id": ids[i]} for i in batch])
            bar.update(len(batch))
    lines = ({**row, "answer": answers[answer_id], "answer_id": answer_id} for row, answer_id in zip(rows, ids))
    write_whole(out, "".join(map(json_line, lines)))
    print_line(f"wrote {out}: {len(rows):,} answers")


def _read_questions(
    vlm: VisionLanguageModel, source: Path, root: Path
) -> tuple[list[dict], list[list[Turn]], list[list[ImagePlace]]]:
    """The rows of a file of questions, their turns and the places of their images; InputError names a row at fault."""
    rows, asked, places = list(read_rows(source)), [], []
    if not rows:
        raise InputError(f"{source}: holds no row; rows are {{image, question}}")
    for number, row in enumerate(rows):
        try:
            turns, images = _question(row)
            found = [(name, find_place(root, name, content)) for name, content in images]
            if missing := [name for name, place in found if place is None]:
                name = missing[0][:200]
                raise InputError(f"image {name} is not under {root}, nor in a tar there; check --image_root")
            (prompt,) = vlm.prompts([turns])
            check_image_count(prompt.count(IMAGE), len(images), vlm.template)
        except (InputError, ValueError) as error:
            raise InputError(f"{source}: row {number}: {error}") from None
        asked.append(turns)
        places.append([place for _, place in found if place])
    return rows, asked, places


def _question(row: dict) -> tuple[list[Turn], list[Image]]:
    """The turns of a row {image, question} (LLaVA's own files say `text`), or of a conversation without its answer."""
    question = row.get("question") if filled(row.get("question")) else row.get("text")
    if not filled(question) and any(isinstance(row.get(key), list) for key in TURNS):
        return read_conversation(row)
    if not isinstance(question, str) or not question.strip():
        raise InputError("has no question; rows are {image, question}")
    images = row_images(row)
    if problem := media_problem(row, images):
        raise InputError(problem)
    return [question_turn(question, len(images))], images


def _plain(value: Any) -> Any:
    """A row as JSON can hold it: without the images that it holds itself."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items() if not isinstance(each, bytes)}
    if isinstance(value, list):
        return [_plain(each) for each in value if not isinstance(each, bytes)]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _row_ids(rows: list[dict], places: list[list[ImagePlace]], source: Path) -> list[str]:
    """A hash of each row and its images' bytes; rows that are repeated differ in how often they came before."""
    digests: dict[ImagePlace, str] = {}
    before: Counter[str] = Counter()
    ids = []
    for number, (row, images) in enumerate(zip(rows, places)):
        for place in images:
            if place not in digests:
                try:
                    digests[place] = hashlib.sha256(place.read()).hexdigest()
                except OSError as error:
                    raise InputError(f"{source}: row {number}: {place.file} cannot be read ({error})") from None
        content = json_digest([row, [digests[place] for place in images]], 12)
        ids.append(json_digest([content, before[content]], 12))
        before[content] += 1
    return ids


def _read_answers(out: Path, ids: list[str], source: Path) -> dict[str, str]:
    """The answers that a file holds by their ids, in its order; half a line at its end, left by a kill, is cut off."""
    content = out.read_bytes() if out.exists() else b""
    wanted, model_id = set(ids), ids[0].split("-")[0]
    answers: dict[str, str] = {}
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n"), 1):
        if not line.strip():
            continue
        name = f"{out}: line {number}"
        try:
            row = parse_json(line, name)
        except InputError as error:
            raise InputError(f"{error}; give another --out, or remove this line") from None
        answer_id = row.get("answer_id") if isinstance(row, dict) else None
        if not isinstance(answer_id, str) or not isinstance(row.get("answer"), str):
            raise InputError(f"{name} does not say which model answered; give another --out, or remove this file")
        if answer_id.split("-")[0] != model_id:
            raise InputError(
                f"{name} is the answer of another model, or of this one with other options; give another --out, or "
                "remove this file"
            )
        if answer_id not in wanted:
            raise InputError(
                f"{name} answers a row that {source} does not hold, or its image has changed; give another --out, or "
                "remove this line"
            )
        answers[answer_id] = row["answer"]
    cut_to_whole_lines(out)
    return answers
