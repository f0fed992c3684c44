"""POPE's questions (Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models") in every layout
that is passed around. Answers meet labels by (split, image, question), never by their place in a file: a wrong
order of lines gives a perfect model 50 %, and looks like a model that hallucinates.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from diffclip.base.errors import InputError
from diffclip.base.files import read_jsonl, write_whole
from diffclip.base.paths import inside

SPLITS = ("random", "popular", "adversarial")
POST_PROMPT = "\nAnswer the question using a single word or phrase."  # lmms-eval's own, and LLaVA's in training
COCO_NAME = re.compile(r"COCO_(?:val|train)2014_(\d{12})$")
# `digest` of the public splits by their number of questions. Taken from copies in public repositories that were read
# and written out by hand, with the files' exact lengths; no file was downloaded whole.
RELEASES = {
    ("random", 2910): ("23ac095af3e0", "POPE's first release, which LLaVA uses"),
    ("random", 3000): ("1e53023c14f8", "POPE's later release, with 90 more negatives"),
    ("popular", 3000): ("f68dfab6ff76", "POPE's, of both releases"),
    ("adversarial", 3000): ("533116115aa2", "POPE's, of both releases"),
}
COCO_FOLDERS = ("", "val2014", "images", "val2017", "train2017", "train2014")


class Question(NamedTuple):
    """One yes/no question about one image."""

    split: str  # random, popular or adversarial: how its negatives were chosen
    image: str  # file name of the image it asks about
    text: str  # without LLaVA's "Answer the question using a single word or phrase."
    label: str  # "yes", "no", or "" where the file has no labels
    question_id: str
    shown: str  # file name of the image the model sees; differs from `image` only in controls, "" for none

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes a question one and the same in any file; the Hub's set names images without .jpg."""
        return self.split, os.path.splitext(self.image)[0], mended(self.text)


Keyed = TypeVar("Keyed")


def read(path: str | Path, labels: str | Path | None = None) -> list[Question]:
    """Read POPE questions.

    Args:
        path: the official three files' folder (one JSON object `{question_id, image, text, label}` a line, the split
            in the file's name), LLaVA's single JSONL file (lines with a `category` and no label), or the Hub's
            lmms-lab/POPE as parquet, a file or a folder of them.
        labels: for LLaVA's file, any of the others, which knows the labels.

    Raises:
        InputError: a split is missing or there twice, a bad line, an unknown label, a question asked twice, questions
            of `labels` that are not those of `path`.
    """
    path = Path(path)
    tables = _parquets(path)
    if tables:
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
    index(questions, lambda q: q.key, str(path))
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
    said = []
    for split in SPLITS:
        part = [q for q in questions if q.split == split]
        key = split, len(part)
        if key not in RELEASES:
            name = "no public release of COCO's that is known here"
        elif RELEASES[key][0] == digest(part):
            name = RELEASES[key][1]
        else:
            name = f"as many questions as {RELEASES[key][1]}, but NOT the same"
        said.append(f"{split} {len(part):,}: {name}")
    return f"{'; '.join(said)}; digest {digest(questions)}"


def digest(questions: Iterable[Question]) -> str:
    """The first 12 hexadecimal digits of a SHA-256 of images, questions and labels, in any order."""
    text = "\n".join(sorted(json.dumps([*q.key, q.label]) for q in questions))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def index(items: Iterable[Keyed], key: Callable[[Keyed], tuple], name: str) -> dict[tuple, Keyed]:
    """Items by key; InputError if two share one."""
    result: dict[tuple, Keyed] = {}
    for item in items:
        if key(item) in result:
            raise InputError(f"{name}: asked twice: {' | '.join(map(str, key(item)))}; drop one of the lines")
        result[key(item)] = item
    return result


def join(
    questions: Sequence[Question],
    others: Iterable[Keyed],
    key: Callable[[Keyed], tuple] = lambda other: other.key,
    name: str = "the answers",
) -> list[Keyed]:
    """`others` in the order of `questions`, matched by `Question.key`.

    Raises:
        InputError: a key is missing, left over, or there twice.
    """
    found = index(others, key, name)
    wanted = {q.key for q in questions}
    missing, extra = wanted - found.keys(), found.keys() - wanted
    if missing or extra:
        examples = "; ".join(" | ".join(map(str, one)) for one in sorted(missing or extra)[:3])
        raise InputError(
            f"{name} do not fit the questions: {len(missing)} missing, {len(extra)} left over "
            f"(e.g. {examples}); use files of one and the same POPE version"
        )
    return [found[q.key] for q in questions]


def with_labels(
    questions: Sequence[Question], labelled: Iterable[Question], name: str = "the labelled files"
) -> list[Question]:
    """Questions of LLaVA's file with the labels of the official files."""
    matched = join(questions, labelled, name=name)
    return [q._replace(label=m.label) for q, m in zip(questions, matched)]


def read_answers(path: str | Path, questions: Sequence[Question]) -> list[str | None]:
    """A model's answers in the order of `questions`; None where a program failed to give one.

    Args:
        path: as in `answered`.

    Raises:
        InputError: a line that is no answer, answers that do not fit the questions one to one.
    """
    matched = join(questions, answered(path, questions), lambda pair: pair[0].key, str(path))
    return [answer for _, answer in matched]


def answered(
    path: str | Path, questions: Sequence[Question] = (), passed: str = "model"
) -> Iterator[tuple[Question, str | None]]:
    """Questions and a model's answers to them, one at a time; the one reader of answers.

    Args:
        path: JSONL of rows that name their question by `image` and `text` or `question` (and `category` or `split`
            where a question is in several), the answer in `answer`, perhaps the `label`, which is "" in the question
            otherwise; or, as LLaVA writes them, by `question_id` and `prompt`, the answer in `text`. An answer of null
            (or NaN, as pandas writes it) is None.
        questions: what was asked, for rows of LLaVA's form or without a split.
        passed: of rows with `pass`, as `stages.evaluate` writes them, those of this one.

    Raises:
        InputError: the file cannot be read, a line is not JSON or no answer; names the line.
    """
    by_id = {q.question_id: q for q in questions}
    asked: dict[tuple, list[Question]] = defaultdict(list)  # by image and question, a split each
    for q in questions:
        asked[q.key[1:]].append(q)
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
                yield question, _answer(row["text"], where)
                continue
            split = row.get("category") or row.get("split") or ""
            text, image = plain(row["question"] if "question" in row else row["text"]), row["image"]
            label = (row.get("label") or "").strip().lower()
            one = Question(split, image, text, label, str(row.get("question_id", "")), row.get("shown", image))
            if not all(isinstance(value, str) for value in one):
                raise TypeError("image, question, split and label must be text")
            answer = _answer(row["answer"], where)
            # one that fits nothing keeps its empty split, and whoever joins it tells of it
            splits = [split] if split else [q.split for q in asked[one.key[1:]]] or [""]
        except (KeyError, TypeError, AttributeError) as error:
            layouts = "{image, question, answer}, perhaps with category, or LLaVA's {question_id, prompt, text}"
            raise InputError(f"{where}: not an answer ({error!r}); rows are {layouts}, one a line") from None
        yield from ((one._replace(split=each), answer) for each in splits)


def _answer(value: object, where: str) -> str | None:
    if value is None or value != value:
        return None
    if not isinstance(value, str):
        raise InputError(f"{where}: the answer is {str(value)[:80]}; it must be text, or null where there is none")
    return value


def find_images(questions: Sequence[Question], image_root: str | Path) -> dict[str, Any]:
    """Where the images that `questions` show lie: a `mllm.data.images.ImagePlace` for each name.

    COCO's names of 2014 and of 2017 stand for the same image, and its usual folders may lie under `image_root`.

    Raises:
        InputError: a name that leads outside `image_root`, or images that are not there, with the first of them.
    """
    from mllm.data.images import ImagePlace, find_places

    places: dict[str, Any] = {}
    shown = {q.shown: q for q in questions if q.shown}
    for name in sorted(shown):
        inside(image_root, name, f"POPE, {shown[name].split} question {shown[name].question_id}: image")
        stem = os.path.splitext(name)[0]
        coco = COCO_NAME.search(stem)
        names = [name, f"{stem}.jpg", *([f"{coco[1]}.jpg"] if coco else [])]
        files = (os.path.join(image_root, folder, one) for folder in COCO_FOLDERS for one in names)
        file = next(filter(os.path.isfile, files), None)
        places[name] = ImagePlace(file) if file else find_places(image_root, [name])[name]
    missing = [name for name, place in places.items() if place is None]
    if missing:
        raise InputError(f"{len(missing)} images of POPE are not under {image_root}, e.g. {missing[0]}")
    return places


def images_of(
    questions: Sequence[Question], path: str | Path, image_root: str | Path | None, unpack_to: str | Path
) -> dict[str, Any]:
    """`find_images` under `image_root`, or, where that is not given, among those that the files in `path` carry.

    Args:
        unpack_to: folder that these are written to.

    Raises:
        InputError: there is neither, or an image is missing.
    """
    if not image_root and not _parquets(Path(path)):
        raise InputError("--image_root is missing: the folder of POPE's images (val2014 for COCO)")
    return find_images(questions, image_root or unpack_images(path, unpack_to))


def unpack_images(path: str | Path, folder: str | Path) -> Path:
    """Write the images that a parquet layout carries as files, each once; returns `folder`.

    Raises:
        InputError: a row has no image, or a name that leads outside `folder`.
    """
    import pyarrow.parquet

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = set()
    for table in _parquets(Path(path)):
        number = 0
        for batch in pyarrow.parquet.ParquetFile(table).iter_batches(256, columns=["image_source", "image"]):
            for row in batch.to_pylist():
                where, name, image = f"{table}: row {number}", row["image_source"], row.get("image")
                number += 1
                inside(folder, name, f"{where}: image_source")
                file = inside(folder, f"{os.path.splitext(name)[0]}.jpg", f"{where}: image_source", writing=True)
                if file in done:
                    continue
                done.add(file)
                content = image.get("bytes") if isinstance(image, Mapping) else image
                if not isinstance(content, bytes):
                    raise InputError(f"{where}: carries no image; use a copy that does, or files and --image_root")
                if not file.is_file() or file.read_bytes() != content:  # perhaps of another set, of equal names
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(file, content)
    return folder


def plain(text: str) -> str:
    """A question without LLaVA's instruction on the next line."""
    return text.split("\n")[0].strip()


def mended(text: str) -> str:
    """A question without the slips of the public files, which some copies correct: "imange" and "an traffic light"."""
    return text.replace("imange?", "image?").replace(" an traffic", " a traffic")


def _parquets(path: Path) -> list[Path]:
    if path.suffix == ".parquet" and path.is_file():
        return [path]
    return sorted(path.rglob("*.parquet")) if path.is_dir() and not list(path.glob("*.json*")) else []


def _table(path: Path) -> Iterator[Question]:
    import pyarrow.parquet

    columns = ["question_id", "question", "answer", "image_source", "category"]
    try:
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not lmms-lab's POPE ({' '.join(str(error).split())[:200]})") from None
    for number, row in enumerate(rows):
        given = {"text": row["question"], "label": row["answer"], "image": row["image_source"]}
        yield _question({**row, **given}, row["category"], f"{path}: row {number}", labelled=True)


def _file_of(folder: Path, split: str) -> Path:
    pattern = re.compile(rf"(^|[^a-z]){split}([^a-z]|$)")
    found = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".jsonl") and pattern.search(p.stem)]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise InputError(f"{folder}: needs exactly one *{split}*.json file, found {names}")
    return found[0]


def _lines(path: Path, split: str | None) -> Iterator[Question]:
    """Questions of one file; `split` None means that each line has a `category` and may lack a label."""
    for number, row in read_jsonl(path):
        yield _question(row, split, f"{path}:{number}", labelled=split is not None)


def _question(row: Mapping, split: str | None, where: str, labelled: bool) -> Question:
    try:
        question = Question(
            split=split or row["category"],
            image=row["image"],
            text=plain(row["text"]),
            label=row["label"] if labelled else row.get("label", ""),
            question_id=str(row["question_id"]),
            shown=row["image"],
        )
        if not all(isinstance(value, str) for value in question):
            raise TypeError("image, text, label and category must be text")
        "".join(question).encode()  # what lmms-eval's tables can hold; half a surrogate pair would end it
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise InputError(f"{where}: not a POPE question ({error!r}); see mllm.pope_files.read") from None
    if question.split not in SPLITS:
        raise InputError(f"{where}: unknown category `{question.split}`; use {', '.join(SPLITS)}")
    if question.label not in ("yes", "no") and (labelled or question.label):
        raise InputError(f'{where}: label is `{question.label}`; it must be "yes" or "no"')
    return question
