"""What counts can stand behind published POPE scores: rounded percentages allow few whole numbers, often none."""

from argparse import Namespace
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
    counts = []
    for is_yes in range(1, questions):
        low, high = (share * is_yes for share in shares["r"])
        for true_yes in range(max(0, ceil(low)), min(is_yes, floor(high)) + 1):
            # accuracy = (true_yes + is_no - false_yes) / questions, precision = true_yes / (true_yes + false_yes)
            right = true_yes + questions - is_yes
            low, high = (right - share * questions for share in reversed(shares["a"]))
            if true_yes:
                least, most = (true_yes / share if share > 0 else float("inf") for share in reversed(shares["p"]))
                low, high = max(low, least - true_yes), min(high, most - true_yes)
            for false_yes in range(max(0, ceil(low)), min(questions - is_yes, floor(high)) + 1):
                counts.append(Counts(is_yes, questions - is_yes, true_yes, false_yes))
    return counts


def run(options: Namespace) -> None:
    """The whole numbers that published accuracy, precision and recall allow, for each number of questions."""
    for questions in options.questions:
        allowed = solutions(options.accuracy, options.precision, options.recall, questions)
        print(f"{questions:,} questions: {len(allowed)} solution{'s' * (len(allowed) != 1)}")
        for counts in allowed[:10]:
            yes = 100 * (counts.true_yes + counts.false_yes) / questions
            print(
                f"  {counts.is_yes:,} yes and {counts.is_no:,} no questions; yes was said to {counts.true_yes:,} and "
                f"{counts.false_yes:,} of them, to {yes:.1f} % of all"
            )
