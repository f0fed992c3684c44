"""POPE's files, scores and controls: official numbers, closed forms, and faults planted in files."""

import json
import random

import pytest

from diffclip.errors import InputError
from mllm.pope import (
    PARSERS,
    SPLITS,
    Question,
    always_yes,
    blind,
    join,
    parse_lmms_eval,
    parse_official,
    parse_strict,
    read,
    score,
    score_splits,
    shuffle_images,
    with_labels,
)

OBJECTS = ("cat", "dog", "clock", "airplane")


def rows(split, pictures=6):
    """Questions about all objects; picture i holds object (i mod 4), always the two of them before clock."""
    return [
        {
            "question_id": 10 * i + j,
            "image": f"{i}.png",
            "text": f"Is there a{'n' if o == 'airplane' else ''} {o} in the image?",
            "label": "yes" if j == i % 4 else "no",
        }
        for i in range(pictures)
        for j, o in enumerate(OBJECTS)
    ]


@pytest.fixture
def folder(tmp_path):
    for split in SPLITS:
        write(tmp_path / f"coco_pope_{split}.json", rows(split))
    return tmp_path


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def llava_file(path, shuffled=False):
    lines = [
        {
            "question_id": 1000 + n,
            "image": row["image"],
            "text": row["text"] + "\nAnswer the question using a single word or phrase.",
            "category": split,
        }
        for split in reversed(SPLITS)
        for n, row in enumerate(rows(split))
    ]
    if shuffled:
        random.Random(1).shuffle(lines)
    write(path, lines)
    return path


def test_official_parser(golden):
    expected = json.loads((golden("07e_pope") / "expected.json").read_text())
    for case in expected["parsed"]:
        assert parse_official(case["text"]) == case["parsed"], case["text"]


def test_official_scores(golden):
    folder = golden("07e_pope")
    answers, labels = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("answers.jsonl", "labels.jsonl")
    )
    expected = json.loads((folder / "expected.json").read_text())
    groups = {"overall": expected["overall"], **expected["per_category"]}
    for name, numbers in groups.items():
        pairs = [(a, b) for a, b in zip(answers, labels) if name in ("overall", a["category"])]
        got = score([parse_official(a["text"]) for a, _ in pairs], [b["label"] for _, b in pairs])
        for ours, theirs in (*((k, k) for k in ("accuracy", "precision", "recall", "f1")), ("yes_rate", "yes_ratio")):
            assert got[ours] == pytest.approx(numbers["pope"][theirs], abs=1e-12), (name, ours)


def test_scores_without_positives_are_zero_as_tinyllava_prints_them(golden):
    cases = json.loads((golden("07e_pope") / "expected.json").read_text())["degenerate"]
    for name in ("all_predicted_no", "no_true_positive", "no_positive_label"):
        got = score([parse_official(a) for a in cases[name]["answers"]], cases[name]["labels"])
        for key in ("accuracy", "precision", "recall", "f1"):
            assert got[key] == pytest.approx(cases[name]["tinyllava"][key], abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "lmms_eval", "strict", "official"),
    [
        ("Yes", "yes", "yes", "yes"),
        (" no\n", "no", "no", "yes"),
        ("Yes.", "invalid", "yes", "yes"),
        ("NO", "no", "no", "yes"),
        ("", "invalid", "invalid", "yes"),
        ("No, there is no dog", "invalid", "invalid", "no"),
        ("a dog", "invalid", "invalid", "yes"),
    ],
)
def test_parsers_differ_where_they_should(answer, lmms_eval, strict, official):
    assert {n: p(answer) for n, p in PARSERS.items()} == {
        "lmms_eval": lmms_eval,
        "strict": strict,
        "official": official,
    }


def test_lmms_evals_rule_is_the_installed_one():
    utils = pytest.importorskip("lmms_eval.tasks.pope.utils")
    for answer in ("Yes", "yes.", " NO ", "", "nope", "no"):
        for label in ("yes", "no"):
            theirs = utils.pope_process_results({"answer": label, "question_id": 0}, [answer])
            assert theirs["pope_accuracy"]["score"] == (parse_lmms_eval(answer) == label)


def test_invalid_answers_are_wrong_and_counted():
    got = score(["yes", "invalid", "invalid", "no"], ["yes", "yes", "no", "no"])
    assert got == {
        "accuracy": 0.5, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3),
        "yes_rate": 0.25, "invalid_rate": 0.5, "n": 4,
    }  # fmt: skip
    with pytest.raises(ValueError):
        score(["yes"], ["yes", "no"])


def test_oracle_scores_one_and_its_opposite_zero_on_every_layout(folder, tmp_path):
    official = read(folder)
    llava = with_labels(read(llava_file(tmp_path / "llava_pope_test.jsonl", shuffled=True)), official)
    for questions in (official, llava):
        # The oracle answers in another order than the labels stand in; only the join can bring them together.
        answers = [(q.key, q.label) for q in official]
        random.Random(0).shuffle(answers)
        given = [label for _, label in join(questions, answers, key=lambda a: a[0])]
        table = score_splits(questions, given)
        assert set(table) == {*SPLITS, "mean"} and all(row["accuracy"] == 1.0 for row in table.values())
        wrong = score_splits(questions, ["no" if g == "yes" else "yes" for g in given])
        assert all(row["accuracy"] == 0.0 for row in wrong.values())


def test_real_files_in_both_layouts(shared_data):
    for name in ("coco", "voc"):
        folder = shared_data(name) / "pope"
        official = read(folder)
        labelled = with_labels(read(folder / f"llava_{name}_pope_test.jsonl"), official)
        assert len(official) == len(labelled)
        assert score_splits(labelled, [q.label for q in labelled])["mean"]["accuracy"] == 1.0
        assert score_splits(official, always_yes(official))["mean"]["accuracy"] == 0.5
        # Negatives are the frequent objects in the popular split, so a rule without eyes does well there.
        rule = score_splits(official, blind(official))
        assert rule["popular"]["accuracy"] > 0.8 > rule["random"]["accuracy"]


def test_unequal_sets_of_questions_are_refused(folder):
    questions = read(folder)
    with pytest.raises(InputError, match="1 missing, 0 left over"):
        join(questions, questions[1:])
    with pytest.raises(InputError, match=r"0 missing, 1 left over.*lizard"):
        join(questions, [*questions, questions[0]._replace(text="Is there a lizard in the image?")])
    with pytest.raises(InputError, match="twice"):
        join(questions, [*questions, questions[0]])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"question_id": 1, "image": "0.png", "text": "Is there a cow in the image?", "label": "maybe"}, "maybe"),
        ({"question_id": 1, "image": "0.png", "text": "Is there a cow in the image?"}, "label"),
        ({"question_id": 1, "image": "0.png", "text": "Is there a cat in the image?", "label": "yes"}, "twice"),
    ],
)
def test_bad_lines_are_named(folder, line, words):
    write(folder / "coco_pope_popular.json", [*rows("popular"), line])
    with pytest.raises(InputError, match=words):
        read(folder)


def test_missing_and_doubled_splits_are_refused(folder):
    (folder / "coco_pope_random.json").rename(folder / "aokvqa_pope_popular.json")
    with pytest.raises(InputError, match=r"\*random\*"):
        read(folder)
    write(folder / "coco_pope_random.json", rows("random"))
    with pytest.raises(InputError, match="aokvqa_pope_popular"):
        read(folder)
    with pytest.raises(InputError, match="nowhere"):
        read(folder / "nowhere")


def questions_about(truth):
    """One question per (picture, object) with its label from truth(picture, object)."""
    return [
        Question("random", f"{i}", f"Is there a {o} in the image?", truth(i, o), f"{i}{o}", f"{i}")
        for i in range(40)
        for o in OBJECTS
    ]


def test_blind_rule_knows_priors_and_nothing_else():
    by_object = questions_about(lambda i, o: "yes" if o in ("cat", "clock") else "no")
    assert score(blind(by_object), [q.label for q in by_object])["accuracy"] == 1.0
    coin = random.Random(0)
    by_picture = questions_about(lambda i, o: coin.choice(("yes", "no")))
    assert abs(score(blind(by_picture), [q.label for q in by_picture])["accuracy"] - 0.5) < 0.15


def test_blind_rule_never_learns_from_the_picture_it_answers_about():
    # Every object is asked about one picture only: nothing can be learnt about it from the other folds.
    alone = [
        Question("random", f"{i}", f"Is there a thing{i} in the image?", "yes" if i % 4 else "no", str(i), f"{i}")
        for i in range(40)
    ]
    assert blind(alone) == ["yes"] * 40  # the common answer, also where it is wrong


def test_shuffling_moves_every_picture_and_keeps_the_questions(folder):
    questions = read(folder)
    shuffled = shuffle_images(questions, seed=3)
    assert [q.key for q in shuffled] == [q.key for q in questions]
    assert all(q.shown != q.image for q in shuffled)
    other = {(q.image, q.shown) for q in shuffled}
    assert len(other) == len({image for image, _ in other}) == len({shown for _, shown in other}) == 6
    assert shuffle_images(questions, seed=3) == shuffled != shuffle_images(questions, seed=4)


def test_strict_parser_takes_punctuation():
    assert [parse_strict(a) for a in ("Yes!", "no.", "yes no", "Yes, sir")] == ["yes", "no", "invalid", "invalid"]
