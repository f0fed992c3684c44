"""Counts behind published scores: what was rounded is found again, and the paper's table 3 has one solution a cell."""

import random

import pytest

from mllm.pope.__main__ import main
from mllm.pope.tables import Counts, solutions


def scores(counts):
    is_yes, is_no, true_yes, false_yes = counts
    questions = is_yes + is_no
    accuracy, precision = (true_yes + is_no - false_yes) / questions, true_yes / (true_yes + false_yes)
    return [round(100 * share, 2) for share in (accuracy, precision, true_yes / is_yes)]


def test_counts_are_found_from_their_rounded_scores():
    coin = random.Random(0)
    for _ in range(30):
        is_yes, is_no = coin.randint(40, 200), coin.randint(40, 200)
        counts = Counts(is_yes, is_no, coin.randint(1, is_yes), coin.randint(0, is_no))
        found = solutions(*scores(counts), is_yes + is_no)
        assert counts in found and all(scores(one) == scores(counts) for one in found)


def test_brute_force_finds_no_others():
    counts = Counts(20, 24, 17, 5)
    everything = [
        Counts(yes, 44 - yes, true, false)
        for yes in range(1, 44)
        for true in range(1, yes + 1)
        for false in range(45 - yes)
    ]
    assert solutions(*scores(counts), 44) == [one for one in everything if scores(one) == scores(counts)]


@pytest.mark.parametrize(
    "published, questions, other",
    [  # the paper's table 3: CLIP, then DiffCLIP
        ((50.14, 50.07, 98.21), 2910, 3000),
        ((50.41, 50.21, 98.56), 2910, 3000),
        ((50.27, 50.13, 99.33), 3000, 2910),
        ((50.27, 50.13, 99.47), 3000, 2910),
        ((50.17, 50.08, 99.33), 3000, 2910),
        ((50.20, 50.10, 99.47), 3000, 2910),
    ],
)
def test_the_papers_table_has_one_balanced_solution_a_row(published, questions, other):
    balanced = [one for one in solutions(*published, questions) if one.is_yes == one.is_no]
    assert len(balanced) == 1
    assert not [one for one in solutions(*published, other) if one.is_yes == one.is_no]


def test_command_line(capsys):
    main(["audit", "50.14", "50.07", "98.21", "--questions", "2910"])
    assert "1,455 yes and 1,455 no questions; yes was said to 1,429 and 1,425" in capsys.readouterr().out
