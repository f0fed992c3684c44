"""What POPE's files and published scores tell without a model: which release, scores of answers, two models, counts."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffclip.base.console import print_table
from diffclip.base.errors import InputError
from diffclip.base.lines import print_line
from diffclip.base.schema import ANSWERS, POPE
from diffclip.base.statistics import mcnemar
from mllm.pope.images import find_images
from mllm.pope.parsers import PARSERS, parse
from mllm.pope.questions import SPLITS, Answer, Key, join, read, read_answers, read_labelled, version
from mllm.pope.scores import SCORES, blind, intervals, score, score_splits, uses_image


def check(options: Namespace) -> None:
    """Which release the files are, whether an oracle scores 100 on them, whether their images are there."""
    questions = read(options.pope, options.labels)
    print_line(version(questions))
    if all(q.label for q in questions):
        oracle = score_splits(questions, [q.label for q in questions])["mean"]["accuracy"]
        blind_rule = score_splits(questions, blind(questions))
        accuracies = ", ".join(f"{split} {100 * row['accuracy']:.1f}" for split, row in blind_rule.items())
        print_line(f"an oracle scores {100 * oracle:.1f}; the best rule that sees no image: {accuracies}")
    else:
        print_line("no labels: give --labels, the official files")
    if options.image_root:
        print_line(f"{len(find_images(questions, options.image_root)):,} images found under {options.image_root}")


def score_file(options: Namespace) -> None:
    """Scores of a file of answers by every parser, intervals, and the blind rule beside them."""
    questions = read_labelled(options.pope, options.labels)
    answers = join(questions, read_answers(options.answers, questions), str(options.answers))
    print_line(version(questions))
    print_nulls(answers, options.answers)
    for name in PARSERS:
        predictions = parse((answer.text for answer in answers), name)
        print_invalid(answers, predictions, name)
        print_scores(f"{options.answers.name}, parser {name} (%)", score_splits(questions, predictions), SCORES)
        if name == options.parser:
            for split, ends in intervals(questions, predictions).items():
                low, high = ends["accuracy"]
                print_line(f"{split}: accuracy between {100 * low:.1f} and {100 * high:.1f} (95 %, images resampled)")
            verdict = uses_image(score_splits(questions, predictions), score_splits(questions, blind(questions)))
    print_line(verdict)


def compare(options: Namespace) -> None:
    """The paper's table 3 for two evaluations, with McNemar's exact test for every split."""
    first, second = (_labels_and_predictions(run, options.parser) for run in options.runs)
    if first.keys() != second.keys():
        raise InputError(
            f"{options.runs[0]} and {options.runs[1]} answer different questions; evaluate both on the same"
        )
    rows = []
    for split in [split for split in SPLITS if any(key[0] == split for key in first)]:
        keys = [key for key in first if key[0] == split]
        right = [np.array([run[key][0] == run[key][1] for key in keys]) for run in (first, second)]
        p = mcnemar(*right)
        for name, run in zip(options.runs, (first, second)):
            scores = score([run[key][1] for key in keys], [run[key][0] for key in keys])
            rows.append([split, str(name), *(f"{100 * scores[s]:.1f}" for s in SCORES[:5]), f"{p:.2g}"])
    print_table(["split", "run", "accuracy", "precision", "recall", "f1", "yes", "McNemar p"], rows, "POPE (%)")


def _labels_and_predictions(run: Path, parser: str) -> dict[Key, tuple[str, str]]:
    """(label, prediction) by question, of a run of stages.evaluate or a file as it writes them."""
    file = run / POPE / ANSWERS if run.is_dir() else run
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a run of stages.evaluate that had POPE")
    answers = read_answers(file)
    wrong = next((q for q, _ in answers if q.split not in SPLITS or q.label not in ("yes", "no")), None)
    if wrong:
        raise InputError(
            f"{file}: `{wrong.image}`, `{wrong.text}` has split `{wrong.split}` and label `{wrong.label}`; rows "
            f"need a split of {', '.join(SPLITS)} and the label yes or no, as stages.evaluate writes them"
        )
    print_nulls(answers, file)
    predictions = parse((answer.text for answer in answers), parser)
    return {answer.key: (answer.question.label, prediction) for answer, prediction in zip(answers, predictions)}


def print_nulls(answers: Sequence[Answer], name: Path) -> None:
    """How many answers are none at all."""
    if nulls := sum(answer.text is None for answer in answers):
        print_line(f"{name}: {nulls:,} of {len(answers):,} answers are null; they count as invalid, which is wrong")


def print_invalid(answers: Sequence[Answer], predictions: Sequence[str], parser: str) -> None:
    """How many answers are neither yes nor no by a parser, and the first of them."""
    invalid = [answer for answer, said in zip(answers, predictions) if said == "invalid" and answer.text is not None]
    if invalid:
        named = "; ".join(f"{q.split} {q.image}, {q.text}: {str(text)[:40]!r}" for q, text in invalid[:3])
        print_line(
            f"parser {parser}: {len(invalid):,} of {len(answers):,} answers are neither yes nor no, e.g. {named}"
        )


def print_scores(title: str, scores: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> None:
    """A table of percentages, a row for each split."""
    rows = [[split, *(f"{100 * row[name]:.1f}" for name in columns)] for split, row in scores.items()]
    print_table(["split", *columns], rows, title)


class Counts(NamedTuple):
    """Yes and no questions, and how many of each were answered with yes."""

    is_yes: int
    is_no: int
    true_yes: int
    false_yes: int


def solutions(accuracy: float, precision: float, recall: float, questions: int) -> list[Counts]:
    """All counts whose scores round to the given ones, in percent with two decimals; any share may be yes questions."""
    half = 0.005 + 1e-9
    shares = {name: ((v - half) / 100, (v + half) / 100) for name, v in zip("apr", (accuracy, precision, recall))}
    counts: list[Counts] = []
    for is_yes in range(1, questions):
        low, high = (share * is_yes for share in shares["r"])
        for true_yes in range(max(0, ceil(low)), min(is_yes, floor(high)) + 1):
            # accuracy = (true_yes + is_no - false_yes) / questions, precision = true_yes / (true_yes + false_yes)
            right = true_yes + questions - is_yes
            low, high = (right - share * questions for share in reversed(shares["a"]))
            if true_yes:
                least, most = (true_yes / share if share > 0 else float("inf") for share in reversed(shares["p"]))
                low, high = max(low, least - true_yes), min(high, most - true_yes)
            possible = range(max(0, ceil(low)), min(questions - is_yes, floor(high)) + 1)
            counts += (Counts(is_yes, questions - is_yes, true_yes, false_yes) for false_yes in possible)
    return counts


def audit(options: Namespace) -> None:
    """The whole numbers that published accuracy, precision and recall allow, for each number of questions."""
    for questions in options.questions:
        allowed = solutions(options.accuracy, options.precision, options.recall, questions)
        print_line(f"{questions:,} questions: {len(allowed)} solution{'s' * (len(allowed) != 1)}")
        for counts in allowed[:10]:
            yes = 100 * (counts.true_yes + counts.false_yes) / questions
            print_line(
                f"  {counts.is_yes:,} yes and {counts.is_no:,} no questions; yes was said to {counts.true_yes:,} and "
                f"{counts.false_yes:,} of them, to {yes:.1f} % of all"
            )
