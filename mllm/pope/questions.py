"""POPE's questions (Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models") in every layout
that is passed around, and answers to them. These meet by (split, image, question), never by their place in a file: a
wrong order of lines gives a perfect model 50 %, and looks like a model that hallucinates.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffclip.base import parquet
from diffclip.base.errors import InputError
from diffclip.base.files import open_file, read_json, read_jsonl

SPLITS = ("random", "popular", "adversarial")
POST_PROMPT = "\nAnswer the question using a single word or phrase."  # lmms-eval's own, and LLaVA's in training
# `digest` of the public splits by their number of questions. Taken from copies in public repositories that were read
# and written out by hand, with the files' exact lengths; no file was downloaded whole.
RELEASES = {
    ("random", 2910): ("23ac095af3e0", "POPE's first release, which LLaVA uses"),
    ("random", 3000): ("1e53023c14f8", "POPE's later release, with 90 more negatives"),
    ("popular", 3000): ("f68dfab6ff76", "POPE's, of both releases"),
    ("adversarial", 3000): ("533116115aa2", "POPE's, of both releases"),
}
ANSWER_KEYS = ("answer", "prediction", "pred", "response", "output", "outputs")
Key = tuple[str, str, str]


class Question(NamedTuple):
    """One yes/no question about one image."""

    split: str  # random, popular or adversarial: how its negatives were chosen
    image: str  # file name of the image it asks about
    text: str  # without LLaVA's "Answer the question using a single word or phrase."
    label: str  # "yes", "no", or "" where the file has no labels
    question_id: str
    shown: str  # file name of the image the model sees; differs from `image` only in controls, "" for none

    @property
    def key(self) -> Key:
        """What makes a question one and the same in any file; the Hub's set names images without .jpg."""
        return self.split, os.path.splitext(self.image)[0], mended(self.text)


class Answer(NamedTuple):
    """A model's answer to a question."""

    question: Question  # its label is "" where the file has none
    text: str | None  # None where a program failed to give one

    @property
    def key(self) -> Key:
        return self.question.key


Keyed = TypeVar("Keyed", Question, Answer)


def read(path: str | Path, labels: str | Path | None = None) -> list[Question]:
    """Read POPE questions.

    Args:
        path: the official three files' folder (one JSON object `{question_id, image, text, label}` a line, the split
            in the file's name), LLaVA's single JSONL file (lines with a `category` and no label), or the Hub's
            lmms-lab/POPE as parquet, a file or a folder of them. JSON may have the Hub's names for keys (`question`,
            `answer`, `image_source`), and be one list.
        labels: for LLaVA's file, any of the others, which knows the labels.

    Raises:
        InputError: a split is missing or there twice, a bad line, an unknown label, a question asked twice, questions
            of `labels` that are not those of `path`.
    """
    path = Path(path)
    if tables := parquets(path):
        questions = [q for table in tables for q in _table(table)]
    elif path.is_file():
        questions = list(_lines(path, split=None))
    elif path.is_dir():
        questions = [q for split in SPLITS for q in _lines(_file_of(path, split), split)]
    else:
        raise InputError(f"{path}: no such file or folder; give POPE's folder of three files, LLaVA's file, or parquet")
    if not questions:
        raise InputError(f"{path}: holds no questions")
    questions.sort(key=lambda q: SPLITS.index(q.split))  # stable: the order inside a split stays
    try:
        index(questions, str(path))
    except InputError as error:
        if (
            len(folders := sorted({str(table.parent) for table in tables})) > 1
        ):  # the Hub's copy has all questions twice
            raise InputError(f"{error}; or name one of the folders {', '.join(folders)}") from None
        raise
    return with_labels(questions, read(labels), str(labels)) if labels else questions


def read_labelled(path: str | Path, labels: str | Path | None = None) -> list[Question]:
    """`read`, where every question must have a label."""
    questions = read(path, labels)
    if not all(q.label for q in questions):
        raise InputError(f"{path}: has no labels; give the official files, too")
    return questions


def version(questions: Sequence[Question]) -> str:
    """Which public release each split is, told by `digest`, and a digest of all three.

    A split with as many questions as a release has, but others, is said to be changed.
    """
    releases = []
    for split in SPLITS:
        part = [q for q in questions if q.split == split]
        known, name = RELEASES.get((split, len(part)), ("", "no public release of COCO's that is known here"))
        if known and known != digest(part):
            name = f"as many questions as {name}, but NOT the same"
        releases.append(f"{split} {len(part):,}: {name}")
    return f"{'; '.join(releases)}; digest {digest(questions)}"


def digest(questions: Iterable[Question]) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of images, questions and labels, in any order."""
    text = "\n".join(sorted(json.dumps([*q.key, q.label]) for q in questions))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def index(items: Iterable[Keyed], name: str) -> dict[Key, Keyed]:
    """Items by `Question.key`; InputError if two share one."""
    result: dict[Key, Keyed] = {}
    for item in items:
        if item.key in result:
            raise InputError(f"{name}: asked twice: {' | '.join(item.key)}; drop one of the lines")
        result[item.key] = item
    return result


def join(questions: Sequence[Question], others: Iterable[Keyed], name: str = "the answers") -> list[Keyed]:
    """`others` in the order of `questions`, matched by `Question.key`.

    Raises:
        InputError: a key is missing, left over, or there twice.
    """
    by_key = index(others, name)
    wanted = {q.key for q in questions}
    missing, extra = wanted - by_key.keys(), by_key.keys() - wanted
    if missing or extra:
        examples = "; ".join(" | ".join(key) for key in sorted(missing or extra)[:3])
        raise InputError(
            f"{name} do not fit the questions: {len(missing)} missing, {len(extra)} left over "
            f"(e.g. {examples}); use files of one and the same POPE version"
        )
    return [by_key[q.key] for q in questions]


def with_labels(
    questions: Sequence[Question], labelled: Iterable[Question], name: str = "the labelled files"
) -> list[Question]:
    """Questions of LLaVA's file with the labels of the official files."""
    return [q._replace(label=m.label) for q, m in zip(questions, join(questions, labelled, name))]


def plain(text: str) -> str:
    """A question without LLaVA's instruction on the next line."""
    return text.split("\n")[0].strip()


def mended(text: str) -> str:
    """A question without the slips of the public files, which some copies correct: "imange" and "an traffic light"."""
    return text.replace("imange?", "image?").replace(" an traffic", " a traffic")


def parquets(path: Path) -> list[Path]:
    """The parquet files that `path` is or holds; none where it holds the official JSON files."""
    if path.suffix == ".parquet" and path.is_file():
        return [path]
    return sorted(path.rglob("*.parquet")) if path.is_dir() and not list(path.glob("*.json*")) else []


def _table(path: Path) -> Iterator[Question]:
    columns = ["question_id", "question", "answer", "image_source", "category"]
    for number, row in enumerate(parquet.rows(path, columns, 1024)):
        given = {"text": row["question"], "label": row["answer"], "image": row["image_source"]}
        yield _question({**row, **given}, row["category"], f"{path}: row {number}", labelled=True)


def _file_of(folder: Path, split: str) -> Path:
    pattern = re.compile(rf"(^|[^a-z]){split}([^a-z]|$)")
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".jsonl") and pattern.search(p.stem)]
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise InputError(f"{folder}: needs exactly one *{split}*.json file, found {names}")
    return files[0]


def _lines(path: Path, split: str | None) -> Iterator[Question]:
    """Questions of one file; `split` None means that each line has a `category` and may lack a label."""
    for where, row in _rows(path):
        yield _question(row, split, where, labelled=split is not None)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place for messages, row) of a file of JSON lines, or of one JSON list of objects."""
    try:
        with open_file(path) as file:
            is_list = re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", file.read(4096))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if is_list:
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(read_json(path)))
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _question(row: Mapping, split: str | None, where: str, labelled: bool) -> Question:
    try:
        image = row["image_source"] if "image_source" in row else row["image"]
        text, question_id = plain(row["text"] if "text" in row else row["question"]), str(row["question_id"])
        label = row.get("label", row.get("answer", None if labelled else ""))
        label = label.strip().lower() if isinstance(label, str) else label
        question = Question(split or row["category"], image, text, label, question_id, shown=image)
        if not all(isinstance(value, str) for value in question):
            raise TypeError("image, text, label and category must be text")
        "".join(question).encode()  # what lmms-eval's tables can hold; half a surrogate pair would end it
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise InputError(f"{where}: not a POPE question ({error!r}); see mllm.pope.questions.read") from None
    if question.split not in SPLITS:
        raise InputError(f"{where}: unknown category `{question.split}`; use {', '.join(SPLITS)}")
    if question.label not in ("yes", "no") and (labelled or question.label):
        raise InputError(f'{where}: label is `{question.label}`; it must be "yes" or "no"')
    return question


def read_answers(path: str | Path, questions: Sequence[Question] = (), passed: str = "model") -> list[Answer]:
    """A model's answers in the order of their file; `join` brings them into that of questions.

    Args:
        path: rows, as JSON lines or one list, that name their question by `image` (or `image_source`) and `text` or
            `question` (and `category` or `split` where a question is in several), the answer in one of `ANSWER_KEYS`,
            perhaps the `label`; or, as LLaVA writes them, by `question_id` and `prompt`, the answer in `text`; or
            lmms-eval's samples; or, as the authors' repository has them, `{question, answer}` without an image: these
            must be the answers to all questions of a split, or of all of them, word by word in the order of
            `questions`. An answer of null (or NaN, as pandas writes it) is None.
        questions: what was asked, for rows of LLaVA's or the authors' form, or without a split.
        passed: of rows with `pass`, as `stages.evaluate` writes them, those of this one.

    Raises:
        InputError: the file cannot be read, a line is not JSON or no answer (named), a question is answered twice.
    """
    by_id = {q.question_id: q for q in questions}
    by_text: dict[tuple[str, str], list[Question]] = defaultdict(list)  # by image and question, a split each
    for q in questions:
        by_text[q.key[1:]].append(q)
    answers: list[Answer] = []
    rows = list(_rows(Path(path)))
    if ordered := _in_order(rows, questions):
        named = ({"image": q.image, "question": q.text, "category": q.split} for q in ordered)
        rows = [(where, {**row, **of}) for (where, row), of in zip(rows, named)]
    for where, row in rows:
        try:
            if row.get("pass", "model") != passed:
                continue
            if "prompt" in row:
                question = by_id.get(str(row["question_id"]))
                if len(by_id) < len(questions) or question is None or mended(plain(row["prompt"])) != question.key[2]:
                    raise InputError(
                        f"{where}: question_id {row['question_id']} names no question, or another one, of "
                        "these files; score it with the question file that it was asked from"
                    )
                answers.append(Answer(question, _text(row["text"], where)))
                continue
            if isinstance(row.get("doc"), dict) and "filtered_resps" in row:  # lmms-eval's samples
                said = row["filtered_resps"]
                said = said[0] if isinstance(said, list) and len(said) == 1 else said
                row = {**row["doc"], "label": row["doc"].get("answer"), "answer": said}
            split = row.get("category") or row.get("split") or ""
            image = row["image_source"] if "image_source" in row else row["image"]
            text = plain(row["question"] if "question" in row else row["text"])
            label = (row.get("label") or "").strip().lower()
            question = Question(split, image, text, label, str(row.get("question_id", "")), row.get("shown", image))
            if not all(isinstance(value, str) for value in question):
                raise TypeError("image, question, split and label must be text")
            answer = _text(row[next((key for key in ANSWER_KEYS if key in row), "answer")], where)
            # one that fits nothing keeps its empty split, and whoever joins it tells of it
            splits = [split] if split else [q.split for q in by_text[question.key[1:]]] or [""]
        except (KeyError, TypeError, AttributeError) as error:
            layouts = "{image, question, answer}, perhaps with category, or LLaVA's {question_id, prompt, text}"
            raise InputError(f"{where}: not an answer ({error!r}); rows are {layouts}, one a line") from None
        answers += (Answer(question._replace(split=each), answer) for each in splits)
    index(answers, str(path))
    return answers


def _in_order(rows: Sequence[tuple[str, Any]], questions: Sequence[Question]) -> Sequence[Question]:
    """The questions of rows that name no image: of one split or of all, if the texts are theirs one by one."""
    texts = [row.get("question") if isinstance(row, dict) and "image" not in row else None for _, row in rows]
    if not all(isinstance(text, str) for text in texts):
        return ()
    said = [mended(plain(text)).casefold() for text in texts if text]
    parts = [list(questions), *([q for q in questions if q.split == split] for split in SPLITS)]
    fitting = [part for part in parts if part and [q.key[2].casefold() for q in part] == said]
    return fitting[0] if fitting and all(part == fitting[0] for part in fitting) else ()


def _text(value: object, where: str) -> str | None:
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        raise InputError(f"{where}: the answer is {str(value)[:80]}; it must be text, or null where there is none")
    return value
