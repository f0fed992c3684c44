"""What counts can stand behind published POPE scores: rounded percentages allow few whole numbers, often none."""

import argparse
from math import ceil, floor
from typing import NamedTuple


class Counts(NamedTuple):
    """Yes and no questions, and how many of each were answered with yes."""

    is_yes: int
    is_no: int
    true_yes: int
    false_yes: int


def solutions(accuracy: float, precision: float, recall: float, questions: int, decimals: int = 2) -> list[Counts]:
    """All counts whose scores round to the given ones.

    Args:
        accuracy, precision, recall: in percent, rounded to `decimals`.
        questions: how many there were; any share of them may be yes questions.
    """
    half = 0.5 * 10**-decimals + 1e-9
    shares = {name: ((v - half) / 100, (v + half) / 100) for name, v in zip("apr", (accuracy, precision, recall))}
    found = []
    for is_yes in range(1, questions):
        low, high = (share * is_yes for share in shares["r"])
        for true_yes in range(max(0, ceil(low)), min(is_yes, floor(high)) + 1):
            # accuracy = (true_yes + is_no - false_yes) / questions, precision = true_yes / (true_yes + false_yes)
            right = true_yes + questions - is_yes
            low, high = (right - share * questions for share in reversed(shares["a"]))
            if true_yes:
                said = [true_yes / share if share > 0 else float("inf") for share in reversed(shares["p"])]
                low, high = max(low, said[0] - true_yes), min(high, said[1] - true_yes)
            for false_yes in range(max(0, ceil(low)), min(questions - is_yes, floor(high)) + 1):
                found.append(Counts(is_yes, questions - is_yes, true_yes, false_yes))
    return found


def audit(options: argparse.Namespace) -> None:
    """Print the counts that published scores allow, for each number of questions."""
    for questions in options.questions:
        found = solutions(options.accuracy, options.precision, options.recall, questions)
        print(f"{questions:,} questions: {len(found)} solution{'s' * (len(found) != 1)}")
        for one in found[:10]:
            yes = 100 * (one.true_yes + one.false_yes) / questions
            print(
                f"  {one.is_yes:,} yes and {one.is_no:,} no questions; yes was said to {one.true_yes:,} and "
                f"{one.false_yes:,} of them, to {yes:.1f} % of all"
            )
