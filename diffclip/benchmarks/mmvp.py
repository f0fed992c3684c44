"""MMVP-VLM (Tong et al. 2024): pairs of images that CLIP models confuse, each with its statement.

A statement goes to the first image when its softmax over the two exceeds one half, a tie to the second;
a pair counts when both statements find their image.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffclip.base.errors import InputError
from diffclip.base.files import read_text
from diffclip.benchmarks.images import Images, images_in
from diffclip.benchmarks.protocol import Evaluation, Protocol
from diffclip.benchmarks.zero_shot import balanced

PROMPT = "a photo of {c}"
# The DiffCLIP paper's 21.9 and 27.6 are 23 and 29 of 105 pairs, so seven of the nine categories; it does not say which.
# These two are left out here.
BEYOND_SEVEN = ("Text", "Texts", "Viewpoint and Perspective")


class Pairs(NamedTuple):
    """P pairs: image 2p and statement 2p belong together, and 2p + 1 likewise."""

    images: Images
    statements: list[str]
    categories: list[str]  # one per pair


def read_mmvp(folder: Path) -> Pairs:
    """Read the layout of the public release: Questions.csv and "MMVP VLM Images"/<category>/<id>.jpg.

    Questions 2n+1 and 2n+2 form a pair, whatever the order of the file; the images are found by
    question id.

    Raises:
        InputError: a missing file or column, a question without its partner, an image that is missing or
        double.
    """
    path = folder / "Questions.csv"
    if not path.is_file():
        raise InputError(f"{path} does not exist: MMVP-VLM is a folder with Questions.csv and the images")
    try:
        text = read_text(path)
    except InputError:  # the release was written on Windows; a byte that cp1252 lacks ends here
        if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16, in which cp1252 would find letters
            raise
        try:
            text = path.read_bytes().decode("cp1252")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: neither UTF-8 nor cp1252 (byte {error.start}): save it as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    numbered = [
        (reader.line_num, {_plain(key): value for key, value in row.items() if isinstance(value, str)})
        for row in _whole_rows(reader, path)
    ]
    rows = [row for _, row in numbered]
    if not rows or not {"questionid", "type", "statement"} <= rows[0].keys():
        raise InputError(f"{path} needs the columns Question ID, Type and Statement, and at least one question")

    questions: dict[int, dict[str, str]] = {}
    for line, row in numbered:
        if not row.get("questionid", "").strip().isdecimal() or not row.get("statement", "").strip():
            raise InputError(f"{path} line {line}: needs a whole number as Question ID and a Statement")
        number = int(row["questionid"])
        if number in questions:
            raise InputError(f"{path} line {line}: question {number} occurs twice")
        questions[number] = row

    by_number: dict[int, list[Path]] = {}
    for image in images_in(folder):
        if image.stem.isdecimal():
            by_number.setdefault(int(image.stem), []).append(image)

    files, statements, categories = [], [], []
    for number in sorted(questions):
        partner = number + 1 if number % 2 else number - 1
        if partner not in questions:
            raise InputError(f"{path}: question {number} has no partner {partner}")
        category = questions[number].get("type", "").strip()
        found = by_number.get(number, [])
        if len(found) > 1:
            found = [image for image in found if _plain(image.parent.name) == _plain(category)]
        if len(found) != 1:
            raise InputError(f"{folder}: question {number} ({category}) needs exactly one image {number}.jpg")
        files += found
        statements.append(questions[number]["statement"].strip())
        if number % 2:
            categories.append(category)
    return Pairs(Images([str(file) for file in files], files), statements, categories)


def _whole_rows(reader: csv.DictReader, path: Path) -> Iterator[dict[str, str | None]]:
    """Rows that hold something, none with more of it than the header has columns: a comma would cut a statement."""
    for row in reader:
        beyond = row.get(None) or []  # where csv puts further cells
        if any(cell.strip() for cell in beyond):
            raise InputError(f"{path} line {reader.line_num}: more cells than columns; put the statement into quotes")
        if any((value or "").strip() for key, value in row.items() if key is not None):
            yield row


def similarities(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Turn features of 2P images and 2P statements into cosines (P, 2 statements, 2 images)."""
    images = torch.nn.functional.normalize(image_features.float(), dim=-1).unflatten(0, (-1, 2))
    texts = torch.nn.functional.normalize(text_features.float(), dim=-1).unflatten(0, (-1, 2))
    return texts @ images.transpose(1, 2)


def picks_first(similarity: Tensor, logit_scale: float = 100.0) -> Tensor:
    """Return (P, 2) bool: statement s of pair p is matched with the first image. Ties go to the second."""
    return (logit_scale * similarity).softmax(dim=-1)[..., 0] > 0.5


def right_pairs(similarity: Tensor, logit_scale: float = 100.0) -> Tensor:
    """Return (P,) bool: both statements of the pair found their own image."""
    first = picks_first(similarity, logit_scale)
    return first[:, 0] & ~first[:, 1]


def by_category(right: Tensor, categories: list[str]) -> dict[str, float]:
    """Return the percentage of right pairs per category, in order of first appearance."""
    rows: dict[str, list[bool]] = {}
    for category, outcome in zip(categories, right.tolist()):
        rows.setdefault(category, []).append(outcome)
    return {category: 100 * sum(outcomes) / len(outcomes) for category, outcomes in rows.items()}


def averages(percent: dict[str, float]) -> dict[str, float]:
    """Return "average" over all categories and, where some of `BEYOND_SEVEN` are there, "average7" without them."""
    found = {"average": sum(percent.values()) / len(percent)}
    seven = [value for category, value in percent.items() if category not in BEYOND_SEVEN]
    if 0 < len(seven) < len(percent):
        found["average7"] = sum(seven) / len(seven)
    return found


def _plain(name: str | None) -> str:
    return re.sub(r"[^a-z0-9]", "", (name or "").lower())


def images(name: str, pairs: Pairs) -> dict[str, Images]:
    return {"mmvp images": pairs.images}


def score(evaluation: Evaluation, name: str, pairs: Pairs) -> None:
    """Add mmvp/CATEGORY, mmvp/average and mmvp/average7, of the public nine categories."""
    statements = [PROMPT.replace("{c}", statement) for statement in pairs.statements]
    features = evaluation.encoder.images(pairs.images, "mmvp images").after
    right = right_pairs(similarities(features, evaluation.encoder.texts(statements, "mmvp statements")))
    percent = by_category(right, pairs.categories)
    numbers = torch.tensor([list(percent).index(category) for category in pairs.categories])
    evaluation.add("mmvp", percent | averages(percent), {"average": balanced(right, numbers)})


PROTOCOL = Protocol(images, score, read=read_mmvp)
