"""Differences in the report against closed forms: t and McNemar by hand, bootstrap against the normal approximation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_stages_report import SPLITS, rows_of, scores, write_run

from diffclip.base.statistics import bootstrap_mean
from stages.report.data import gather
from stages.report.layout import table1, table3
from stages.report.pope import pope, pope_pairs
from stages.report.significance import difference
from stages.report.tables import comparison, tally

KEY = "zero_shot/shape/top1"


def two_models(root: Path, first: np.ndarray, second: np.ndarray, digests=("d", "d")):
    """Evaluate runs of A and B with the outcomes of single items."""
    for model, right, digest in zip("AB", (first, second), digests):
        inputs = {"clip_data": {"path": "x", "digest": digest}}
        write_run(root / model, "evaluate", model=model, metrics={KEY: 100 * right.mean()}, inputs=inputs)
        save_file({KEY: right.astype(np.uint8)}, root / model / "clip_outcomes.safetensors")
    return gather([root])


def binomial_two_sided(better: int, worse: int) -> float:
    """McNemar's exact p by its definition, for a fair coin."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def test_one_seed_is_tested_over_its_items(tmp_path):
    first = np.array([1] * 500 + [0] * 300 + [1] * 60 + [0] * 140)
    second = np.array([1] * 500 + [0] * 300 + [0] * 60 + [1] * 140)
    found = difference(two_models(tmp_path, first, second), "A", "B", KEY)
    spread = 100 * np.std(second - first) / math.sqrt(1000)
    assert found.mean == pytest.approx(8.0)
    assert (found.low, found.high) == pytest.approx((8 - 1.96 * spread, 8 + 1.96 * spread), abs=0.25)
    assert found.p == pytest.approx(binomial_two_sided(140, 60)) and found.significant


def test_a_difference_within_noise_is_not_marked(tmp_path):
    first = np.array([1] * 50 + [0] * 50)
    second = np.array([1] * 49 + [0] * 49 + [1, 1])
    arms = two_models(tmp_path, first, second)
    found = difference(arms, "A", "B", KEY)
    assert found.low < 0 < found.high and not found.significant
    cells = rows_of(comparison(arms))["Zero-shot classification, top-1 / shape"]
    assert cells[2] == "+1.0" and cells[3].endswith("n.s.") and float(cells[4]) == pytest.approx(1.0)
    assert "higher than A on 1 (on 0 of them" in tally(arms)[0]


@pytest.mark.parametrize("case", ["other data", "other length", "no outcomes", "broken file"])
def test_items_that_are_not_the_same_are_not_paired(tmp_path, case):
    first = np.array([1, 0] * 50)
    second = np.array([1, 1] * (49 if case == "other length" else 50))
    arms = two_models(tmp_path, first, second, ("d", "e") if case == "other data" else ("d", "d"))
    file = tmp_path / "B" / "clip_outcomes.safetensors"
    if case == "no outcomes":
        file.unlink()
    elif case == "broken file":
        file.write_bytes(b"\x00" * 40)
    found = difference(arms, "A", "B", KEY)
    assert found.low is None and found.mean == pytest.approx(50) and found.why


def test_several_seeds_are_tested_over_seeds(tmp_path):
    values = {"A": [60.0, 64.0, 62.5], "B": [63.0, 66.5, 66.0]}
    for model, column in values.items():
        for seed, value in enumerate(column):
            write_run(tmp_path / f"{model}{seed}", "evaluate", model=model, seed=seed, metrics={KEY: value})
    found = difference(gather([tmp_path]), "A", "B", KEY)
    differences = [3.0, 2.5, 3.5]
    half = (
        4.302653 * 0.5 / math.sqrt(3)
    )  # Student's t at 0.975 with two degrees of freedom; sd of the differences is 0.5
    assert found.mean == pytest.approx(sum(differences) / 3)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-4)
    t = 3 / (0.5 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)  # closed form for two degrees of freedom


def test_an_average_is_tested_over_the_items_of_its_sets(tmp_path):
    generator = np.random.default_rng(5)
    spread = 0.0
    right = {"A": {}, "B": {}}
    for name, count in (("x", 400), ("y", 900)):
        key = f"zero_shot/{name}/top1"
        right["A"][key] = (generator.random(count) < 0.5).astype(np.uint8)
        right["B"][key] = (generator.random(count) < 0.6).astype(np.uint8)
        spread += np.var(right["B"][key].astype(float) - right["A"][key]) / count / 4  # of a mean of two means
    for model, found in right.items():
        write_run(tmp_path / model, "evaluate", model=model, metrics={k: 100 * v.mean() for k, v in found.items()})
        save_file(found, tmp_path / model / "clip_outcomes.safetensors")
    found = difference(gather([tmp_path]), "A", "B", "zero_shot/average/top1")
    half = 196 * math.sqrt(spread)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.4)


def test_equal_differences_have_no_spread_to_test(tmp_path):
    for model, lift in (("A", 0), ("B", 1)):
        for seed in (0, 1):
            metrics = {KEY: 60.0 + seed + lift}
            write_run(tmp_path / f"{model}{seed}", "evaluate", model=model, seed=seed, metrics=metrics)
    assert difference(gather([tmp_path]), "A", "B", KEY).low is None


def write_pope(root: Path, model: str, wrong: set[int], order: int = 1, questions: int = 120) -> None:
    """Answers to `questions` of each split, six an image, all right but those numbered in `wrong`."""
    rows = []
    for split in SPLITS:
        for i in range(questions):
            label = "yes" if i % 2 else "no"
            answer = label if i not in wrong else {"yes": "no", "no": "Yes it is"}[label]
            row = {"split": split, "image": f"{i // 6}.png", "text": f"Is there thing {i}?", "label": label}
            rows.append({"pass": "model", **row, "answer": answer})
            rows.append({"pass": "shuffled", **row, "answer": "no"})
    accuracy = 100 * (1 - len(wrong) / questions)
    write_run(
        root / model, "evaluate", model=model, metrics=scores() | {f"pope/{s}/accuracy": accuracy for s in SPLITS}
    )
    (root / model / "pope").mkdir()
    (root / model / "pope" / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[::order]))


def test_pope_pairs_answers_by_question_and_not_by_place(tmp_path):
    write_pope(tmp_path, "A", set(range(30)))
    write_pope(tmp_path, "B", set(range(20, 36)), order=-1)  # written in the opposite order
    arms = gather([tmp_path])
    found = difference(arms, "A", "B", "pope/random/accuracy")
    assert found.p == pytest.approx(binomial_two_sided(20, 6)) and found.low < found.mean < found.high
    # what is wrong lies in a few images, so the interval is wider than that of independent questions
    alone = 1.96 * 100 * np.std([1] * 20 + [0] * 94 + [-1] * 6) / math.sqrt(120)
    assert found.high - found.low > 2 * alone * 1.5
    row = next(row for row in pope_pairs(arms).rows if row[0] == "random")
    assert row[1:7] == ["120", "84", "6", "20", "10", "+11.7"]
    assert difference(arms, "A", "B", "pope/mean/accuracy").p is None  # its splits share questions


def test_pope_of_other_questions_is_not_paired(tmp_path):
    write_pope(tmp_path, "A", {1, 2})
    write_pope(tmp_path, "B", {1}, questions=114)
    arms = gather([tmp_path])
    assert pope_pairs(arms) is None and difference(arms, "A", "B", "pope/random/accuracy").low is None


def test_an_interval_over_images_is_wider_than_one_over_questions():
    generator = np.random.default_rng(3)
    images = np.repeat(np.arange(60), 10)
    values = np.repeat(generator.normal(size=60), 10)  # ten questions about an image all say the same
    _, low, high = bootstrap_mean(values, images)
    half = 1.96 * np.std(values[::10]) / math.sqrt(60)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    alone = bootstrap_mean(values, np.arange(600))[1:]
    assert (high - low) > 2.5 * (alone[1] - alone[0])


def test_localisation_is_paired_by_object(tmp_path):
    generator = np.random.default_rng(1)
    base = generator.uniform(0, 60, size=200)
    for model, lift in (("A", 0.0), ("B", 5.0)):
        run = tmp_path / model
        write_run(run, "evaluate", model=model, metrics={"localisation/energy": float(base.mean() + lift)})
        record = {"pictures": [f"{i // 2}.png" for i in range(200)], "objects": ["a"] * 200}
        record["scores"] = {"energy": [None, *(base[1:] + lift).tolist()]}
        (run / "localisation.json").write_text(json.dumps(record))
    found = difference(gather([tmp_path]), "A", "B", "localisation/energy")
    assert (found.mean, found.low, found.high) == pytest.approx((5, 5, 5))  # the same for every object


def test_the_papers_layout_marks_what_is_significant(tmp_path):
    first, second = np.array([1, 0] * 200), np.array([1, 1, 1, 0] * 100)
    for model, right in (("A", first), ("B", second)):
        metrics = {f"linear_probe/{name}/accuracy": 100 * right.mean() for name in ("cifar10", "dtd", "mine")}
        write_run(tmp_path / model, "evaluate", model=model, metrics=metrics)
        save_file({"linear_probe/dtd/accuracy": right.astype(np.uint8)}, tmp_path / model / "clip_outcomes.safetensors")
    table = table1(gather([tmp_path]))
    assert table.columns == ["Model", "DTD", "CIFAR10", "mine", "Avg."]  # the paper's names and order, then others
    assert table.rows[2] == ["B", "75.0 (+25.0*)", "75.0 (+25.0)", "75.0 (+25.0)", "75.0 (+25.0)"]
    assert "Caltech-101" in table.caption and table.rows[5][1].startswith("– [")


def test_new_controls_of_pope_are_shown_and_absent_ones_named(tmp_path):
    metrics = scores() | {f"pope_grey/{s}/accuracy": 51.5 for s in SPLITS}
    metrics |= {f"pope_margin/{s}/auc": 88.0 for s in SPLITS} | {"pope/mean/accuracy_low": 77.0}
    metrics |= {"pope/mean/accuracy_high": 81.0}
    write_run(tmp_path / "a", "evaluate", model="A", metrics=metrics)
    table = pope(gather([tmp_path]))
    rows = rows_of(table)
    assert rows["A / images grey (control)"] == ["51.5"] * 4
    assert rows["A / exact scoring: area under ROC"] == ["88.0"] * 4
    assert rows["A / accuracy, 95 % interval"] == ["–", "–", "–", "[77.0, 81.0]"]
    assert "no evaluate run wrote it: no image" in table.caption and "images grey" not in table.caption


def test_table3_has_the_papers_columns(tmp_path):
    write_run(tmp_path / "a", "evaluate", model="A", metrics=scores(pope=80.0))
    write_run(tmp_path / "b", "evaluate", model="B", metrics=scores(pope=81.0))
    table = table3(gather([tmp_path]))
    assert table.groups == [("", 1), ("A", 3), ("B", 3), ("", 1)] and [row[0] for row in table.rows][:3] == [
        "Random",
        "Popular",
        "Adversarial",
    ]
    assert table.rows[0] == ["Random", "80.0", "80.0", "80.0", *["81.0 (+1.0)"] * 3, "3,000"]
