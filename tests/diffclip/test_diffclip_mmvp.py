"""MMVP-VLM scores against the official ones, its files read by question id."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.benchmarks import mmvp


@pytest.fixture(scope="module")
def official(golden):
    folder = golden("07d_mmvp_vlm")
    similarity = torch.from_numpy(np.load(folder / "similarities.npz")["similarity"])
    return similarity, json.loads((folder / "expected.json").read_text())


def test_every_choice_is_the_official_one_ties_included(official):
    similarity, expected = official
    first = mmvp.picks_first(similarity)
    assert first.tolist() == [[row["pred1"] == "img1", row["pred2"] == "img1"] for row in expected["rows"]]


def test_categories_and_average(official):
    similarity, expected = official
    categories = [name for name in expected["categories"] for _ in range(15)]
    found = mmvp.by_category(mmvp.right_pairs(similarity), categories)
    assert list(found) == expected["categories"]
    assert found == pytest.approx(expected["percent_per_category"])
    assert sum(found.values()) / 9 == pytest.approx(expected["average"])


def test_a_pair_needs_both_statements():
    similarity = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.3, 0.1], [0.2, 0.1]], [[0.1, 0.3], [0.1, 0.2]]])
    assert mmvp.right_pairs(similarity).tolist() == [True, False, False]
    assert not mmvp.right_pairs(torch.ones(4, 2, 2)).any()  # a model that sees no difference scores nothing


def test_similarities_stand_statement_by_image():
    images, texts = torch.randn(6, 4), torch.randn(6, 4)
    found = mmvp.similarities(images, texts)
    assert found.shape == (3, 2, 2)
    for pair, statement, image in [(0, 0, 1), (2, 1, 0)]:
        want = torch.nn.functional.cosine_similarity(texts[2 * pair + statement], images[2 * pair + image], dim=0)
        assert found[pair, statement, image] == pytest.approx(want.item(), abs=1e-6)


ROWS = ["1,Color,a red ball", "2,Color,a blue ball", "3,Count,one ball", '4,Count,"two balls, big"']


def write(folder, rows=ROWS, skip=(), extra=()):
    for number, category in [(1, "Color"), (2, "Color"), (3, "Count"), (4, "Count"), *extra]:
        path = folder / "MMVP VLM Images" / category / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number not in skip:
            Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    (folder / "Questions.csv").write_text("\n".join(["Question ID,Type,Statement", *rows]) + "\n")


@pytest.mark.parametrize("rows", [ROWS, ROWS[::-1]])
def test_pairs_follow_the_question_ids_whatever_the_file_order(tmp_path, rows):
    write(tmp_path, rows)
    pairs = mmvp.read_mmvp(tmp_path)
    assert pairs.statements == ["a red ball", "a blue ball", "one ball", "two balls, big"]
    assert pairs.categories == ["Color", "Count"]
    assert [pairs.images[i][0].getpixel((0, 0))[0] for i in range(4)] == [1, 2, 3, 4]


def test_a_number_used_twice_is_told_apart_by_category(tmp_path):
    write(tmp_path, extra=[(1, "Count")])
    assert mmvp.read_mmvp(tmp_path).images.names[0].endswith("Color/1.png")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"skip": (3,)}, "question 3 .*needs exactly one image"),
        ({"rows": ROWS[:3]}, "question 3 has no partner 4"),
        ({"rows": [*ROWS, "4,Count,again"]}, "line 6: question 4 occurs twice"),
        ({"rows": [*ROWS[:3], "4,Count,two balls, big"]}, "line 5: more cells than columns"),
        ({"rows": ["²,Color,a red ball", *ROWS[1:]]}, "line 2: needs a whole number"),
        ({"rows": ["x,Color,a ball"]}, "line 2: needs a whole number"),
        ({"rows": []}, "at least one question"),
    ],
)
def test_incomplete_sets_are_named(tmp_path, change, message):
    write(tmp_path, **change)
    with pytest.raises(InputError, match=message):
        mmvp.read_mmvp(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252", "utf-16-be"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_read_as_excel_saves_it(tmp_path, encoding, separator):
    rows = [[1, "Color", 'a "red" ball – here'], [2, "Color", "a blue ball"], [3, "Count", "one; a ball"]]
    rows += [[4, "Count", "two balls,\tbig"], ["", "", ""]]
    write(tmp_path)
    with open(tmp_path / "Questions.csv", "w", encoding=encoding, newline="") as file:
        if encoding == "utf-16-be":
            file.write("\ufeff")
        if separator == ";":
            file.write("sep=;\r\n")
        writer = csv.writer(file, delimiter=separator, lineterminator="\r\n")
        writer.writerows([["Question ID", "Type", "Statement"], [], *rows, []])
    pairs = mmvp.read_mmvp(tmp_path)
    assert pairs.statements == ['a "red" ball – here', "a blue ball", "one; a ball", "two balls,\tbig"]
    assert pairs.categories == ["Color", "Count"]


def test_a_table_of_no_known_encoding_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "Questions.csv").write_bytes(b"Question ID,Type,Statement\n1,Color,\x81 ball\n")
    with pytest.raises(InputError, match="is not cp1252"):
        mmvp.read_mmvp(tmp_path)


def test_missing_questions_file(tmp_path):
    with pytest.raises(InputError, match=r"Questions\.csv does not exist"):
        mmvp.read_mmvp(tmp_path)


def test_averages_over_nine_and_over_seven_categories():
    nine = {f"c{i}": 10.0 * i for i in range(7)} | {"Text": 100.0, "Viewpoint and Perspective": 50.0}
    assert mmvp.averages(nine) == {"average": 40.0, "average7": 30.0}
    assert mmvp.averages({"a": 1.0, "b": 2.0}) == {"average": 1.5}
