"""`python -m benchmarks.held_out`: no image on both sides, whatever the order; scores that can be counted by hand."""

import json

import pytest

from benchmarks.held_out import held_out, main, score
from diffclip.base.errors import InputError


def row(i: int, source: str, turns: int = 1) -> dict:
    said = [{"from": ("human", "gpt")[j % 2], "value": f"{source} {i} {j}"} for j in range(2 * turns)]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": f"{source}{i}", "image": f"{source}/{i % 400}.jpg", "conversations": said, "source": source}


@pytest.fixture
def files(tmp_path):
    captions = [row(i, "photo") for i in range(600)]
    talks = [row(i, "product", 3) for i in range(600)] + [row(i, "other") for i in range(100)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    return tmp_path


def split(folder, *more: str) -> list[str]:
    paths = ["--captions", f"{folder / 'captions.json'}", "--conversations", f"{folder / 'talks.json'}"]
    return ["split", *paths, "--source", "product", "--some", "50", "--out", f"{folder / 'out'}", *more]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_picture_is_trained_on_or_asked_about_and_nothing_is_lost(files):
    main(split(files))
    talks, asked = json.loads((files / "out/conversations.json").read_text()), lines(files / "out/questions.jsonl")
    shown, hidden = {one["image"] for one in talks}, {one["image"] for one in asked}
    assert not shown & hidden and len(shown | hidden) == 400
    assert len(talks) + len(asked) / 3 == 600
    assert 0.05 < len(hidden) / 400 < 0.15
    assert all(held_out(image) for image in hidden)
    number = asked[0]["truth"].split()[1]
    assert [one["question"] for one in asked[:3]] == [f"product {number} {turn}" for turn in (0, 2, 4)]
    assert [one["truth"] for one in asked[:3]] == [f"product {number} {turn}" for turn in (1, 3, 5)]
    captions, rest = json.loads((files / "out/captions.json").read_text()), lines(files / "out/to_caption.jsonl")
    assert len(captions) + len(rest) == 600 and not {one["image"] for one in captions} & {one["image"] for one in rest}
    some = {json.dumps(one) for one in json.loads((files / "out/some_captions.json").read_text())}
    assert len(some) == 50 and some <= {json.dumps(one) for one in captions}


def test_the_order_of_the_rows_decides_nothing(files):
    main(split(files))
    first = {one["image"] for one in lines(files / "out/questions.jsonl")}
    talks = json.loads((files / "talks.json").read_text())
    (files / "talks.json").write_text(json.dumps(talks[::-1]))
    main(split(files))
    assert {one["image"] for one in lines(files / "out/questions.jsonl")} == first


def test_answers_are_counted_by_question_to_the_letter():
    kind, colour = 'Is it of type "Flats"?\nShort.', "Which colour?\nShort."
    asked = [(kind, "Yes", "Yes"), (kind.replace("Flats", "Tops"), "No", "Yes"), (kind, "No", "No.")]
    asked += [(colour, "Red", " Red"), (colour, "Red", "red"), (colour, "Blue", "Blue"), (colour, "Navy", "Blue")]
    rows = [{"question": question, "truth": truth, "answer": answer} for question, truth, answer in asked]
    assert score(rows) == {'Is it of type "…"?': (3, 1 / 3, 2 / 3), "Which colour?": (4, 1 / 2, 1 / 2)}


@pytest.mark.parametrize(
    "content, told",
    [("{", "not valid JSON"), ("[1]", "no JSON list"), ('[{"conversations": []}]', "row 0 has no image")],
)
def test_files_that_cannot_be_split_are_named(files, content, told):
    (files / "captions.json").write_text(content)
    with pytest.raises(InputError, match=rf"captions\.json: .*{told}"):
        main(split(files))
    assert not (files / "out").exists()


def test_an_unknown_source_or_too_many_captions_are_refused(files):
    with pytest.raises(InputError, match=r"talks\.json: no row of source `nothing`"):
        main(split(files, "--source", "nothing"))
    with pytest.raises(InputError, match="--some 600 is more"):
        main(split(files, "--some", "600"))
