"""CHAIR against scores worked out by hand, and what its words, controls and command make of captions."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from launch import call

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_jsonl, write_json
from mllm.pope.__main__ import main
from mllm.pope.captions import PASSES, read_captions
from mllm.pope.chair import (
    Caption,
    controls,
    intervals,
    mentions,
    plurals,
    read_truth,
    read_words,
    score,
    verdict,
)
from stages import evaluate

pytestmark = pytest.mark.usefixtures("coarse_figures")

SYNONYMS = """person, man, woman, child, baby
dog, puppy
hot dog
bear, cub
train, locomotive
toilet
chair, seat
dining table, table
knife
sheep, lamb
wine glass
tie, bow tie
"""


@pytest.fixture
def words(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    return read_words(["person", "dog", "hot dog", "dining table"], tmp_path / "synonyms.txt")


def coco(tmp_path, objects, captions=()):
    """COCO's files for {image: [object]} and [(image, caption)]; the ids are not the names."""
    names = sorted({name for things in objects.values() for name in things} | {"person"})
    ids = {image: 100 + i for i, image in enumerate(objects)}
    table = {
        "images": [{"id": ids[image], "file_name": image} for image in objects],
        "categories": [{"id": 7 * k, "name": name} for k, name in enumerate(names)],
        "annotations": [
            {"image_id": ids[image], "category_id": 7 * names.index(name)}
            for image, things in objects.items()
            for name in things
        ],
    }
    write_json(tmp_path / "instances.json", table)
    told = [{"image_id": ids.get(image, 1), "caption": text} for image, text in captions]
    write_json(tmp_path / "captions.json", {"annotations": told})
    return tmp_path / "instances.json", tmp_path / "captions.json"


def test_the_scores_are_those_worked_out_by_hand():
    captions = [
        Caption(["dog", "dog", "cat"], frozenset({"dog", "bowl"})),  # 1 of 3 mentions absent; 1 of 2 objects named
        Caption(["person"], frozenset({"person"})),  # 0 of 1; 1 of 1
        Caption([], frozenset({"car", "bus"})),  # nothing named; 0 of 2
        Caption(["cup", "fork"], frozenset()),  # 2 of 2; nothing there
    ]
    wanted = {
        "chair_i": Fraction(3, 6),
        "chair_s": Fraction(2, 4),
        "recall": Fraction(2, 5),
        "mentions": Fraction(6, 4),
    }
    assert score(captions) == {name: pytest.approx(float(value)) for name, value in wanted.items()}
    assert score([Caption([], frozenset())]) == {"chair_i": 0, "chair_s": 0, "recall": 0, "mentions": 0}
    ends = intervals(captions * 50)
    assert all(low < wanted[name] < high for name, (low, high) in ends.items())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A man and two women with their dogs.", ["person", "person", "dog"]),
        ("Two hot dogs, a hot-dog and a Dog's bowl", ["hot dog", "hot dog", "dog"]),
        ("a puppy under the dining table on a table", ["dog", "dining table", "dining table"]),
        ("children, CHILD; the child\u2019s baby", ["person"] * 4),
        ("a baby bear and two adult bears", ["bear", "bear"]),  # no person is named
        ("a baby in a chair", ["person", "chair"]),
        ("a toilet seat beside the seat", ["toilet", "chair"]),
        ("a passenger train on the train tracks", ["train"]),
        ("knives, wine glasses, lambs and sheep", ["knife", "wine glass", "sheep", "sheep"]),
        ("a bow tie", ["tie"]),
        ("a doghouse, a bowtie and manmade glass", []),
        ("", []),
    ],
)
def test_objects_are_named_by_words_and_phrases_and_their_plurals(words, text, named):
    assert mentions(text, words) == named


def test_plurals_are_written_as_english_has_them():
    singular = ("bus", "bench", "box", "pony", "toy", "knife", "scarf", "giraffe", "man", "mouse", "tomato", "cat")
    plural = (
        "buses",
        "benches",
        "boxes",
        "ponies",
        "toys",
        "knives",
        "scarves",
        "giraffes",
        "men",
        "mice",
        "tomatoes",
        "cats",
    )
    assert all(many in plurals(one) for one, many in zip(singular, plural))


def test_an_image_holds_what_its_annotations_and_its_captions_name(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    files = coco(tmp_path, {"a.jpg": ["dog"], "b.jpg": []}, [("a.jpg", "A man at a table."), ("unknown", "A bear.")])
    truth, _ = read_truth(*files, tmp_path / "synonyms.txt")
    assert truth == {"a.jpg": {"dog", "person", "dining table"}, "b.jpg": set()}
    assert read_truth(files[0], synonyms=tmp_path / "synonyms.txt")[0] == {"a.jpg": {"dog"}, "b.jpg": set()}
    plain, _ = read_truth(*files)  # the categories alone are the words
    assert plain["a.jpg"] == {"dog"}


def test_bad_files_are_refused_by_name(tmp_path):
    files = coco(tmp_path, {"a.jpg": ["dog"]})
    synonyms = tmp_path / "synonyms.txt"
    for text, fault in (
        ("dog, puppy\ncat, puppy\nperson", r"line 2: `puppy` names dog and cat"),
        ("dog", "no line names person"),
    ):
        synonyms.write_text(text)
        with pytest.raises(InputError, match=fault):
            read_truth(*files, synonyms)
    with pytest.raises(InputError, match="nowhere"):
        read_truth(*files, tmp_path / "nowhere")
    for content, fault in (
        ([], "not COCO's"),
        ({"images": [], "categories": [], "annotations": []}, "lists no images"),
    ):
        write_json(tmp_path / "bad.json", content)
        with pytest.raises(InputError, match=fault):
            read_truth(tmp_path / "bad.json")
    write_json(tmp_path / "bad.json", {**read_json(files[0]), "images": [{"id": 1, "file_name": "x"}]})
    with pytest.raises(InputError, match="annotates image 100"):
        read_truth(tmp_path / "bad.json")
    truth = {"a.jpg": frozenset(["dog"])}
    for line, fault in (
        ('{"image": "a.jpg"}', "not a caption"),
        ('{"image": "c.jpg", "caption": "x"}', "c.jpg is not among"),
        (
            '{"image": "a.jpg", "caption": "x"}\n{"image": "dir/a.png", "answer": "y"}',
            ":2: image dir/a.png is captioned twice",
        ),
        ("", "holds no captions"),
    ):
        (tmp_path / "rows.jsonl").write_text(line)
        with pytest.raises(InputError, match=fault):
            read_captions(tmp_path / "rows.jsonl", truth)


def test_controls_tell_captions_of_their_images_from_captions_of_any():
    things = ("dog", "cat", "car", "cup", "bird")
    truth = {f"{i}.jpg": frozenset({"person", things[i % 5]}) for i in range(50)}
    seeing = controls({name: sorted(there) for name, there in truth.items()}, truth)
    scores = {who: score(captions) for who, captions in seeing.items()}
    assert scores["model"]["chair_i"] == 0 and scores["model"]["recall"] == 1
    assert scores["blind"]["mentions"] == 2 and scores["blind"]["chair_i"] == pytest.approx(
        0.4, abs=0.1
    )  # person is there
    assert 0.2 < scores["shuffled"]["chair_i"] <= 0.5
    assert verdict(scores, 50) == (
        True,
        "are about their images: CHAIR_i 0.0 against "
        f"{100 * scores['shuffled']['chair_i']:.1f} of the best control, shuffled",
    )
    assert verdict(scores, 3)[0] is None and "too few" in verdict(scores, 3)[1]
    guessing = {who: score(c) for who, c in controls({n: ["person", "dog"] for n in truth}, truth).items()}
    assert guessing["model"] == guessing["shuffled"] and verdict(guessing, 50)[0] is False
    silent = {who: score(c) for who, c in controls({n: [] for n in truth}, truth).items()}
    assert silent["model"]["chair_i"] == 0 and verdict(silent, 50)[0] is None
    with pytest.raises(InputError, match="at least two images"):
        controls({"0.jpg": []}, truth)


def test_a_models_captions_of_scenes_are_written_and_kept(assembled, tmp_path, capsys):
    from PIL import Image

    from diffclip.scenes.options import Options
    from diffclip.scenes.parts import write_segmentation

    write_segmentation(tmp_path / "scenes", Options(segmentation=3), lambda: None)
    assembled.save(tmp_path / "run")
    arguments = ["chair", str(tmp_path / "run"), "--instances", str(tmp_path / "scenes" / "instances.json")]
    arguments += ["--image_root", str(tmp_path / "scenes" / "images"), "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_new_tokens=6", "--device=cpu"]
    main(arguments)
    truth, _ = read_truth(tmp_path / "scenes" / "instances.json")
    rows = [row for _, row in read_jsonl(tmp_path / "out" / "captions.jsonl")]
    assert [row["image"] for row in rows] == sorted(truth) and len(rows) == 3
    with Image.open(tmp_path / "scenes" / "images" / rows[0]["image"]) as image:
        said = assembled.ask("Describe this image in detail.", [image.convert("RGB")], max_new_tokens=6)
    assert rows[0]["caption"] == said and rows[0]["there"] == sorted(truth[rows[0]["image"]])
    scores = read_json(tmp_path / "out" / "chair.json")
    assert {"model", "shuffled", "grey", "no_image", "blind"} <= set(scores) and scores["images"] == 3
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    (tmp_path / "out" / "answers.jsonl").write_bytes(before[: before.index(b"\n") + 1])  # killed after the first
    main(arguments)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before
    for wrong, fault in (
        (["--answers", "x"], "one of them"),
        (["--image_root", str(tmp_path)], "3 images are not under"),
    ):
        with pytest.raises(InputError, match=fault):
            main([*arguments, *wrong])


@pytest.mark.slow
def test_an_evaluation_scores_captions_and_the_report_shows_them(saying, tmp_path, monkeypatch):
    """The numbers of the command `chair` for the same captions, and the settings that are refused."""
    from diffclip.scenes.options import Options
    from diffclip.scenes.parts import write_segmentation

    monkeypatch.chdir(tmp_path)
    write_segmentation(Path("scenes"), Options(segmentation=4), lambda: None)
    saying("circle", "star", "square").save("model")
    settings = ["--mllm", "model", "--chair", "scenes/instances.json", "--chair_limit=3", "--output_dir", "out"]
    evaluate.main([*settings, "--chair_images", "scenes/images", "--seed=5"])
    main(["chair", "--answers", "out/chair/captions.jsonl", "--instances", "scenes/instances.json",
          "--output_dir", "again"])  # fmt: skip
    metrics, again = read_json("out/metrics.json"), read_json("again/chair.json")
    assert metrics["chair/images"] == again["images"] == 3 and again["model"]["mentions"] > 0
    assert {key.split("/")[1] for key in metrics} == {"images", *PASSES}
    for name, value in again["model"].items():
        if not name.endswith(("_low", "_high")):  # drawn by another seed
            assert metrics[f"chair/model/{name}"] == pytest.approx(value if name == "mentions" else 100 * value)
    assert metrics["chair/model/chair_i_low"] <= metrics["chair/model/chair_i"] <= metrics["chair/model/chair_i_high"]
    call("stages.report", "out", "--output_dir", "report")
    page = Path("report/report.md").read_text()
    assert "CHAIR with its controls" in page and "too few" in page and f"{metrics['chair/blind/chair_i']:.1f}" in page
    assert "Other numbers" not in page
    for wrong, fault in (
        (["--mllm=", "--clip=model"], "--chair asks a multimodal model"),
        (["--mllm=model"], "chair_images` is missing"),
        (["--mllm=model", "--image_root=report", "--output_dir=other"], "CHAIR: 3 images are not under report"),
    ):
        with pytest.raises(InputError, match=fault):
            evaluate.main([*settings, *wrong])


def test_people_who_caption_coco_hallucinate_little(shared_data, tmp_path, capsys):
    """One caption of each photo against the objects and the other captions of it, and against itself."""
    folder = shared_data("coco") / "annotations"
    names = {image["id"]: image["file_name"] for image in read_json(folder / "instances_pope.json")["images"]}
    table = read_json(folder / "captions_pope.json")
    first, rest = {}, []
    for row in table["annotations"]:
        if row["image_id"] in names and row["image_id"] not in first:
            first[row["image_id"]] = row["caption"]
        else:
            rest.append(row)
    rows = (json.dumps({"image": names[image], "caption": text}) for image, text in first.items())
    (tmp_path / "people.jsonl").write_text("\n".join(rows))
    write_json(tmp_path / "rest.json", {**table, "annotations": rest})
    scores = {}
    for name, captions in (("others", tmp_path / "rest.json"), ("own", folder / "captions_pope.json")):
        main(["chair", "--answers", str(tmp_path / "people.jsonl"), "--instances", str(folder / "instances_pope.json"),
              "--captions", str(captions), "--output_dir", str(tmp_path / name)])  # fmt: skip
        scores[name] = read_json(tmp_path / name / "chair.json")
    assert scores["own"]["model"]["chair_i"] == scores["own"]["model"]["chair_s"] == 0
    assert scores["others"]["model"]["chair_i"] < 0.05 < 0.3 < scores["others"]["blind"]["chair_i"]
    assert scores["others"]["shuffled"]["chair_i"] > 0.5
    assert "are about their images:" in capsys.readouterr().out
