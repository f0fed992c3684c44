"""Answers of any program to POPE's questions, read in one way and matched by `Question.key`, never by their place."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffclip.base.errors import InputError
from diffclip.base.files import read_jsonl
from mllm.pope.questions import Key, Question, index, mended, plain


class Answer(NamedTuple):
    """A model's answer to a question."""

    question: Question  # its label is "" where the file has none
    text: str | None  # None where a program failed to give one

    @property
    def key(self) -> Key:
        return self.question.key


def read_answers(path: str | Path, questions: Sequence[Question] = (), passed: str = "model") -> list[Answer]:
    """A model's answers in the order of their file; `mllm.pope.questions.join` brings them into that of questions.

    Args:
        path: JSONL of rows that name their question by `image` and `text` or `question` (and `category` or `split`
            where a question is in several), the answer in `answer`, perhaps the `label`; or, as LLaVA writes them, by
            `question_id` and `prompt`, the answer in `text`. An answer of null (or NaN, as pandas writes it) is None.
        questions: what was asked, for rows of LLaVA's form or without a split.
        passed: of rows with `pass`, as `stages.evaluate` writes them, those of this one.

    Raises:
        InputError: the file cannot be read, a line is not JSON or no answer (named), a question is answered twice.
    """
    by_id = {q.question_id: q for q in questions}
    by_text: dict[tuple[str, str], list[Question]] = defaultdict(list)  # by image and question, a split each
    for q in questions:
        by_text[q.key[1:]].append(q)
    answers: list[Answer] = []
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
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
            split = row.get("category") or row.get("split") or ""
            text, image = plain(row["question"] if "question" in row else row["text"]), row["image"]
            label = (row.get("label") or "").strip().lower()
            question = Question(split, image, text, label, str(row.get("question_id", "")), row.get("shown", image))
            if not all(isinstance(value, str) for value in question):
                raise TypeError("image, question, split and label must be text")
            answer = _text(row["answer"], where)
            # one that fits nothing keeps its empty split, and whoever joins it tells of it
            splits = [split] if split else [q.split for q in by_text[question.key[1:]]] or [""]
        except (KeyError, TypeError, AttributeError) as error:
            layouts = "{image, question, answer}, perhaps with category, or LLaVA's {question_id, prompt, text}"
            raise InputError(f"{where}: not an answer ({error!r}); rows are {layouts}, one a line") from None
        answers += (Answer(question._replace(split=each), answer) for each in splits)
    index(answers, str(path))
    return answers


def _text(value: object, where: str) -> str | None:
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        raise InputError(f"{where}: the answer is {str(value)[:80]}; it must be text, or null where there is none")
    return value
