"""POPE's files, scores and controls: official numbers, closed forms, and faults planted in files."""

import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest

from diffclip.base.errors import InputError
from mllm.pope import questions as pope_files
from mllm.pope.images import find_images, unpack_images
from mllm.pope.parsers import PARSERS, parse, parse_lmms_eval, parse_official, parse_strict
from mllm.pope.questions import SPLITS, Answer, Question, digest, join, read, read_answers, version, with_labels
from mllm.pope.scores import blind, intervals, score, score_splits, shuffle_images

OBJECTS = ("cat", "dog", "clock", "airplane")


def rows(split, pictures=6):
    """Questions about all objects; image i holds object (i mod 4), always the two of them before clock."""
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


def answers_to(questions, path):
    """The texts of a file's answers in the order of the questions."""
    return [answer.text for answer in join(questions, read_answers(path, questions), str(path))]


def llava_file(path, shuffled=False):
    lines = [
        {
            "question_id": 1000 * SPLITS.index(split) + n,
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
        answers = [Answer(q, q.label) for q in official]
        random.Random(0).shuffle(answers)
        given = [answer.text for answer in join(questions, answers)]
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
        assert score_splits(official, ["yes"] * len(official))["mean"]["accuracy"] == 0.5
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
    """One question per (image, object) with its label from truth(image, object)."""
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
    # Every object is asked about one image only: nothing can be learnt about it from the other folds.
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


def parquet(path, split_files):
    """The Hub's layout: a row for each question with its image, named without an extension."""
    lines = [(split, row) for split in SPLITS for row in rows(split)]
    columns = {
        "question_id": [str(row["question_id"]) for _, row in lines],
        "question": [row["text"] for _, row in lines],
        "answer": [row["label"] for _, row in lines],
        "image_source": [row["image"].removesuffix(".png") for _, row in lines],
        "image": [{"bytes": f"image {row['image']}".encode(), "path": None} for _, row in lines],
        "category": [split for split, _ in lines],
    }
    path.mkdir()
    table = pyarrow.table(columns)
    if not split_files:
        pyarrow.parquet.write_table(table, path / "test-00000-of-00001.parquet")
        return
    for split in SPLITS:
        part = table.filter(pyarrow.array([category == split for category in columns["category"]]))
        pyarrow.parquet.write_table(part, path / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("split_files", [False, True])
def test_the_hubs_parquet_holds_the_same_questions(folder, tmp_path, split_files):
    parquet(tmp_path / "hub", split_files)
    hub, official = read(tmp_path / "hub"), read(folder)
    assert [q.label for q in join(official, hub)] == [q.label for q in official]
    assert version(hub) == version(official)
    unpacked = unpack_images(tmp_path / "hub", tmp_path / "images")
    places = find_images(hub, unpacked)
    assert places["3"].read() == b"image 3.png" and len(list(unpacked.iterdir())) == 6
    (tmp_path / "hub" / "other.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"other\.parquet"):
        read(tmp_path / "hub")


def test_llavas_file_takes_its_labels_from_the_official_ones(folder, tmp_path):
    asked = read(llava_file(tmp_path / "llava.jsonl", shuffled=True), labels=folder)
    assert score_splits(asked, [q.label for q in asked])["mean"]["accuracy"] == 1
    assert version(asked) == version(read(folder))


@pytest.mark.parametrize("form", ["llava", "official", "without split"])
def test_answers_of_other_programs_are_matched_by_question(folder, tmp_path, form):
    asked = read(llava_file(tmp_path / "llava.jsonl"), labels=folder)
    lines = [
        {"question_id": q.question_id, "prompt": q.text + "\nAnswer the question.", "text": q.label.title()}
        if form == "llava"
        else {"image": q.image, "question": q.text, "answer": q.label.title()}
        | ({"category": q.split} if form == "official" else {})
        for q in asked
    ]
    if form == "without split":
        lines = [line for i, line in enumerate(lines) if line not in lines[:i]]
        assert len(lines) < len(asked)  # each question is in all three splits of these files
    random.Random(2).shuffle(lines)
    write(tmp_path / "answers.jsonl", lines)
    said = [parse_strict(answer) for answer in answers_to(asked, tmp_path / "answers.jsonl")]
    assert score_splits(asked, said)["mean"]["accuracy"] == 1
    write(tmp_path / "answers.jsonl", lines[1:])
    with pytest.raises(InputError, match="missing"):
        answers_to(asked, tmp_path / "answers.jsonl")
    wrong = {"question_id": "7", "prompt": "Is there?", "text": ""} if form == "llava" else {"image": "x.png"}
    write(tmp_path / "answers.jsonl", [*lines, wrong])
    with pytest.raises(InputError, match=f":{len(lines) + 1}: "):
        answers_to(asked, tmp_path / "answers.jsonl")


HUB = {"text": "question", "label": "answer", "image": "image_source"}


def test_questions_may_be_one_list_with_the_hubs_keys_in_any_case(folder, tmp_path):
    asked = read(folder)
    for split in SPLITS:
        lines = [{HUB.get(k, k): v.upper() if k == "label" else v for k, v in row.items()} for row in rows(split)]
        (folder / f"coco_pope_{split}.json").write_text(json.dumps(lines, indent=1))
    assert read(folder) == asked and version(read(folder)) == version(asked)
    (folder / "coco_pope_random.json").write_text(json.dumps([*lines[:1], {**lines[1], "answer": "maybe"}]))
    with pytest.raises(InputError, match=r"coco_pope_random\.json: row 1: label is `maybe`"):
        read(folder)


def test_the_hubs_two_copies_of_all_questions_are_told_apart(folder, tmp_path):
    (tmp_path / "hub").mkdir()
    parquet(tmp_path / "hub" / "data", False)
    parquet(tmp_path / "hub" / "Full", True)
    with pytest.raises(InputError, match=r"asked twice.* or name one of the folders .*hub/Full, .*hub/data"):
        read(tmp_path / "hub")
    assert version(read(tmp_path / "hub" / "Full")) == version(read(folder))


@pytest.mark.parametrize("key", ["answer", "prediction", "pred", "response", "output"])
@pytest.mark.parametrize("layout", ["lines", "list"])
def test_answers_under_other_keys_and_as_one_list(folder, tmp_path, key, layout):
    asked = read(folder)
    lines = [{"category": q.split, "image_source": q.image, "question": q.text, key: f" {q.label} "} for q in asked]
    lines = [{**line, key: line[key].upper()} for line in lines]
    random.Random(3).shuffle(lines)
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(lines, indent=1) if layout == "list" else "".join(f"{json.dumps(x)}\n" for x in lines))
    assert [parse_lmms_eval(answer) for answer in answers_to(asked, path)] == [q.label for q in asked]


def test_lmms_evals_samples_are_answers(folder, tmp_path):
    asked = read(folder)
    names = ("question_id", "question", "answer", "image_source", "category")
    docs = [dict(zip(names, (q.question_id, q.text, q.label, q.image, q.split))) for q in asked]
    lines = [
        {"doc_id": n, "doc": doc, "target": "yes", "filtered_resps": [doc["answer"]] if n % 2 else doc["answer"]}
        for n, doc in enumerate(docs)
    ]
    write(tmp_path / "samples.jsonl", lines[::-1])
    assert answers_to(asked, tmp_path / "samples.jsonl") == [q.label for q in asked]


@pytest.mark.parametrize("part", ["all", "popular"])
def test_the_authors_answers_have_no_image_but_the_order_of_the_questions(folder, tmp_path, part):
    """{"question": "is there a bird in the image?", "answer": "yes"} a line, as their repository says."""
    for number, split in enumerate(SPLITS):  # in each file another order
        lines = rows(split)
        write(folder / f"coco_pope_{split}.json", lines[4 * number :] + lines[: 4 * number])
    asked = [q for q in read(folder) if part in ("all", q.split)]
    lines = [{"question": q.text.replace("Is", "is"), "answer": f"{q.label}."} for q in asked]
    path = tmp_path / "answers.json"
    write(path, lines)
    given = join(asked, read_answers(path, asked))
    assert [parse_strict(answer.text) for answer in given] == [q.label for q in asked]
    for changed in (lines[1:], lines[::-1], [*lines, lines[0]]):  # never matched by place alone
        write(path, changed)
        with pytest.raises(InputError, match="not an answer"):
            read_answers(path, asked)


def release(random_lines, name="COCO_val2014_{:012}.jpg", end="image?"):
    counts = {"random": random_lines, "popular": 3000, "adversarial": 3000}
    return [
        Question(split, name.format(i // 6), f"Is there a {i} in the {end}", "no" if i % 2 else "yes", str(i), "")
        for split, n in counts.items()
        for i in range(n)
    ]


@pytest.mark.slow
def test_releases_are_told_by_digests_of_their_content(monkeypatch):
    for n in (2910, 3000):  # made-up questions as many as the public ones are not these
        assert version(release(n)).count("but NOT the same") == 3
    assert version(release(2999)).startswith("random 2,999: no public release")

    digests = {split: digest(q for q in release(3000) if q.split == split) for split in SPLITS}
    monkeypatch.setattr(pope_files, "RELEASES", {(s, 3000): (d, f"the known {s}") for s, d in digests.items()})
    for same in (
        release(3000),
        release(3000)[::-1],
        release(3000, "COCO_val2014_{:012}"),  # as the Hub names images
        release(3000, end="imange?"),  # as the authors' first files spell it
    ):
        assert all(f"{s} 3,000: the known {s}" in version(same) for s in SPLITS)
        assert version(same) == version(release(3000))
    other = release(3000)
    other[7] = other[7]._replace(label={"yes": "no", "no": "yes"}[other[7].label])
    assert "random 3,000: as many questions as the known random, but NOT the same" in version(other)
    assert "popular 3,000: the known popular" in version(other)


def test_answers_meet_questions_that_another_copy_spells_otherwise():
    slips = [q._replace(text=q.text.replace("image?", "imange?")) for q in release(2910)]
    assert join(release(2910), slips[::-1]) == slips


@pytest.mark.parametrize("place", ["{}", "val2014/{}", "val2017/000000000009.jpg", "000000000009.jpg"])
def test_coco_pictures_are_found_in_its_usual_folders(tmp_path, place):
    name = "COCO_val2014_000000000009.jpg"
    file = tmp_path / place.format(name)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    question = Question("random", name, "Is there a cat in the image?", "yes", "1", name)
    assert find_images([question], tmp_path)[name].file == str(file)
    with pytest.raises(InputError, match="1 images"):
        find_images([question._replace(shown="COCO_val2014_000000000010.jpg")], tmp_path)


def test_intervals_are_the_binomials_when_questions_are_independent():
    coin = random.Random(0)
    asked = [Question("random", f"{i}.png", "Is there a cat?", "yes", str(i), f"{i}.png") for i in range(400)]
    said = [coin.choice(("yes", "yes", "yes", "no")) for _ in asked]
    low, high = intervals(asked, said, resamples=4000)["random"]["accuracy"]
    share = said.count("yes") / 400
    spread = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert low == pytest.approx(share - spread, abs=0.006) and high == pytest.approx(share + spread, abs=0.006)
    # four times the same image and answer are no more evidence than one
    copies = [q._replace(image=f"{i % 100}.png", question_id=str(i)) for i, q in enumerate(asked)]
    wider = intervals(copies, said[:100] * 4, resamples=4000)["random"]["accuracy"]
    assert wider[1] - wider[0] == pytest.approx(2 * (high - low), rel=0.15)
    assert wider[0] < score(said[:100], ["yes"] * 100)["accuracy"] < wider[1]
    assert intervals(asked, ["yes"] * 400)["mean"] == {"accuracy": (1.0, 1.0), "f1": (1.0, 1.0)}


def test_answers_of_null_are_invalid_by_every_rule(folder, shared_cases, tmp_path):
    """The official rule takes an empty answer for yes; no answer at all is no yes."""
    asked = read(folder)
    lines = [{"category": q.split, "image": q.image, "question": q.text, "answer": None} for q in asked]
    lines[0]["answer"], lines[1]["answer"] = float("nan"), ""  # as pandas writes it; and an answer, if an empty one
    write(tmp_path / "answers.jsonl", lines)
    given = answers_to(asked, tmp_path / "answers.jsonl")
    assert given.count(None) == len(asked) - 1 and given[1] == ""
    for parser in PARSERS:
        said = parse(given, parser)
        assert said.count("invalid") == len(asked) - (parser == "official")
    questions = read(shared_cases("pope/questions"))
    given = answers_to(questions, shared_cases("pope/null-answers.jsonl"))
    for parser in PARSERS:
        scores = score_splits(questions, parse(given, parser))
        assert scores["mean"]["invalid_rate"] == 1 and scores["mean"]["accuracy"] == 0 and scores["mean"]["n"] == 36


@pytest.mark.parametrize("answer", [1, True, ["Yes"], {"text": "Yes"}])
def test_answers_that_are_no_text_are_named(folder, tmp_path, answer):
    asked = read(folder)
    write(tmp_path / "a.jsonl", [{"split": q.split, "image": q.image, "text": q.text, "answer": answer} for q in asked])
    with pytest.raises(InputError, match=r"a\.jsonl:1: the answer is .*must be text, or null"):
        answers_to(asked, tmp_path / "a.jsonl")


def test_odd_lines_of_answers(folder, tmp_path):
    """Line ends inside names and answers, blank lines and a byte order mark are nothing; half a line is named."""
    write(folder / "coco_pope_random.json", [{**row, "image": "a\u2028" + row["image"]} for row in rows("random")])
    asked = read(folder)
    lines = [{"split": q.split, "image": q.image, "text": q.text, "answer": f"{q.label}\x85\u2028"} for q in asked]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [parse_strict(answer) for answer in answers_to(asked, path)] == [q.label for q in asked]
    path.write_bytes(text.encode()[:-20])
    with pytest.raises(InputError, match=rf"answers\.jsonl:{2 * len(asked) - 1}: not valid JSON"):
        answers_to(asked, path)
    path.write_bytes(text.encode() + b'\n{"answer": "caf\xe9"}')
    with pytest.raises(InputError, match=rf"answers\.jsonl:{2 * len(asked)}: not UTF-8"):
        answers_to(asked, path)
    no_answer = json.dumps({"image": asked[0].image, "question": asked[0].text, "said": "Yes"})
    for line in ("[1, 2]", no_answer, '{"question_id": 1, "text": "Yes"}', '{"question": "Is?", "answer": "Yes"}'):
        path.write_text(line + "\n")
        with pytest.raises(InputError, match=r"answers\.jsonl:1: not an answer.*rows are \{image, question, answer\}"):
            answers_to(asked, path)


def test_answers_of_an_evaluation_with_controls(folder, tmp_path):
    asked = read(folder)
    lines = [{"pass": "grey", **q._asdict(), "answer": "no"} for q in asked]
    write(tmp_path / "answers.jsonl", [*lines, *({"pass": "model", **q._asdict(), "answer": q.label} for q in asked)])
    assert answers_to(asked, tmp_path / "answers.jsonl") == [q.label for q in asked]
    assert read_answers(tmp_path / "answers.jsonl") == [(q, q.label) for q in asked]
    assert [a.text for a in read_answers(tmp_path / "answers.jsonl", passed="grey")] == ["no"] * len(asked)


@pytest.mark.parametrize(
    "name", ["../secret.png", "{}/secret.png", "..\\secret.png", "a/../../secret.png", "C:\\x.png"]
)
def test_pictures_outside_the_folder_are_not_read(folder, tmp_path, name):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    lines = rows("random")
    lines[5]["image"] = name.format(tmp_path)
    write(folder / "coco_pope_random.json", lines)
    for i in range(6):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"POPE, random question 11: image: .*(leads outside|Windows)"):
        find_images(read(folder), tmp_path / "images")


@pytest.mark.parametrize("name", ["../evil", "{}/evil", "..\\evil", "link/evil", None, ""])
def test_pictures_of_a_parquet_stay_in_their_folder(tmp_path, name):
    parquet(tmp_path / "hub", split_files=False)
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path, tmp_path / "images" / "link")
    file = tmp_path / "hub" / "test-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(file)
    sources = table["image_source"].to_pylist()
    sources[7] = name and name.format(tmp_path)
    place = table.schema.get_field_index("image_source")
    pyarrow.parquet.write_table(table.set_column(place, "image_source", pyarrow.array(sources)), file)
    with pytest.raises(InputError, match=r"test-00000-of-00001\.parquet: row 7: "):
        unpack_images(tmp_path / "hub", tmp_path / "images")
    assert not list(tmp_path.rglob("*evil*"))


def test_pictures_of_a_parquet_are_its_own(tmp_path):
    """Not those that another set of the same names had left in the folder; a row without its image is named."""
    parquet(tmp_path / "hub", split_files=False)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "3.jpg").write_bytes(b"of another set")
    unpack_images(tmp_path / "hub", tmp_path / "images")
    assert (tmp_path / "images" / "3.jpg").read_bytes() == b"image 3.png"
    file = tmp_path / "hub" / "test-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(file)
    empty = pyarrow.array([{"bytes": None, "path": "/etc/hostname"}] * len(table))
    place = table.schema.get_field_index("image")
    pyarrow.parquet.write_table(table.set_column(place, "image", empty), file)
    with pytest.raises(InputError, match="row 0: carries no image"):
        unpack_images(tmp_path / "hub", tmp_path / "other")


@pytest.mark.parametrize("image", ["\udce9.jpg", None, 3, ["0.png"]])
def test_names_that_no_table_holds_are_named_with_their_line(folder, image):
    write(folder / "coco_pope_popular.json", [*rows("popular")[:3], {**rows("popular")[3], "image": image}])
    with pytest.raises(InputError, match=r"coco_pope_popular\.json:4: not a POPE question"):
        read(folder)
