"""`python -m benchmarks.photo_questions`: what it asks is true, half is yes, and no answer follows from another."""

import json
import random
from collections import Counter

import pytest

from benchmarks.photo_questions import Photo, count, main, negative, read_set, text_line, yes_no
from diffclip.base.errors import InputError
from mllm.data.rows import load_rows

SEEN = {"a.png": ["dog", "person"], "b.png": ["person"], "c.png": ["car", "person"], "d.png": ["oven"]}


@pytest.fixture
def voc(tmp_path):
    """VOC's kind of file; d.png also shows a difficult cat."""
    rows = [{"image": image, "objects": [{"name": name} for name in names]} for image, names in SEEN.items()]
    rows[3]["objects"].append({"name": "cat", "difficult": 1})
    file = tmp_path / "objects.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_both_kinds_of_annotations_give_the_same_photos(voc, tmp_path):
    names = ["dog", "person", "car", "oven"]
    coco = {
        "images": [{"id": i, "file_name": image} for i, image in enumerate(SEEN)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": names.index(name)} for i, seen in enumerate(SEEN.values()) for name in seen
        ],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(coco))
    photos = read_set(voc, "voc/images")
    assert [photo._replace(unsure=frozenset()) for photo in photos] == read_set(file, "voc/images")
    assert photos[0] == Photo("voc/images/a.png", frozenset({"dog", "person"}))
    assert photos[3].unsure == {"cat"}


def test_negatives_are_absent_and_popular_or_beside_an_object_more_often_than_by_chance():
    photos = [Photo("", frozenset(one)) for one in [("dog", "ball")] * 9 + [("man",)] * 30 + [(c,) for c in "abcdefgh"]]
    counts, rng = count(photos), random.Random(0)
    dog = Photo("", frozenset({"dog"}), frozenset({"a"}))
    drawn = Counter(negative(dog, counts, {"b"}, rng) for _ in range(3000))
    assert drawn.keys() == set("cdefgh") | {"ball", "man"}  # neither shown, unsure, nor asked already
    assert drawn["ball"] / 3000 == pytest.approx(1 / 3 + 1 / 3 / 5 + 1 / 3 / 8, abs=0.03)
    assert drawn["man"] / 3000 == pytest.approx(1 / 3 / 5 + 1 / 3 / 8, abs=0.03)
    assert negative(dog, counts, set(counts.single), rng) is None


def test_answers_are_a_fair_coin_at_every_place_and_after_every_answer():
    names = [f"thing {i}" for i in range(40)]
    counts = count([Photo("", frozenset({name})) for name in names])
    rng = random.Random(0)
    after: dict[tuple[str, ...], list[bool]] = {}
    for i in range(6000):
        photo = Photo("", frozenset(rng.sample(names, 1 + i % 3)))
        asked = yes_no(photo, counts, rng, 6)
        assert len({name for name, _ in asked}) == len(asked)
        assert all((name in photo.objects) == (answer == "Yes") for name, answer in asked)
        answers = [answer for _, answer in asked]
        for place, answer in enumerate(answers):
            after.setdefault(tuple(answers[:place]), []).append(answer == "Yes")
    shares = {before: sum(said) / len(said) for before, said in after.items() if len(said) > 500}
    assert len(shares) >= 7
    assert all(share == pytest.approx(0.5, abs=0.06) for share in shares.values())


def test_texts_in_words_are_true():
    counts, rng = count([Photo("", frozenset({name})) for name in ("dog", "oven", "car", "cat")]), random.Random(0)
    lines = [text_line(counts, rng)["text"] for _ in range(200)]
    for line in lines:
        words, rest = line.removeprefix("USER: ").split("\n", 1)
        answer = rest.split("ASSISTANT: ")[1].removesuffix("<|im_end|>")
        if rest.startswith("Is there a"):
            assert answer == ("Yes" if rest.split()[3] in words.split() else "No")
        else:
            assert answer.rstrip(".").split(", ") == list(dict.fromkeys(words.split()))
    assert all(len(set(text_line(counts, rng, 1)["text"].split("\n")[0].split())) == 2 for _ in range(20))


def test_the_command_writes_rows_that_the_stages_take(voc, tmp_path, picture, capsys):
    folder = tmp_path / "root" / "voc" / "images"
    folder.mkdir(parents=True)
    for i, name in enumerate(SEEN):
        picture(i).save(folder / name)
    command = ["--set", str(voc), "voc/images", "--copies", "3", "--texts", "7"]
    main([*command, "--out", str(tmp_path / "out")])
    main([*command, "--out", str(tmp_path / "again")])
    for name in ("align.json", "instruct.json"):
        rows = load_rows([str(tmp_path / "out" / name)], str(tmp_path / "root"), template="vicuna")
        assert len(rows) == 12
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert len((tmp_path / "out" / "text.jsonl").read_text().splitlines()) == 7
    assert "4 images, 4 kinds of objects, 12 conversations" in capsys.readouterr().out


def test_a_file_without_objects_is_one_sentence(tmp_path):
    file = tmp_path / "captions.json"
    file.write_text('{"images": []}')
    with pytest.raises(InputError, match="no object annotations"):
        read_set(file, "images")
