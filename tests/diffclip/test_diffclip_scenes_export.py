"""The exported files, read back by the libraries that the formats belong to."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict

import numpy as np
import psutil
import pytest
from launch import ROOT, environment
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.benchmarks import datasets
from diffclip.scenes import drawing as scenes
from diffclip.scenes import export, parts, questions
from diffclip.scenes.__main__ import main
from diffclip.scenes.options import Options

SMALL = {"pairs": 30, "retrieval": 10, "class_train": 80, "class_val": 10, "class_test": 80, "align": 12}
SMALL |= {"conversations": 9, "texts": 20, "pope": 8, "mmvp": 2, "segmentation": 12, "seed": 3}

TINY = {"pairs": 6, "retrieval": 3, "class_train": 8, "class_val": 4, "class_test": 8, "align": 3}
TINY |= {"conversations": 3, "texts": 5, "pope": 2, "mmvp": 1, "segmentation": 2}


def arguments(folder, **changed):
    options = {**SMALL, **changed}
    return ["export", str(folder), *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    main(arguments(folder))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    main(arguments(folder, **TINY))
    return folder


@pytest.mark.slow
def test_pairs_are_readable_as_webdataset(made):
    import webdataset

    data = webdataset.WebDataset(str(made / "pretrain/00000.tar"), shardshuffle=False).decode("pil")
    rows = list(data.to_tuple("png", "txt", "json"))
    assert len(rows) == 30
    for i, (image, caption, about) in enumerate(rows):
        assert caption == about["caption"] == about["captions"][0] and len(about["captions"]) == 5
        assert np.array_equal(np.asarray(image), scenes.draw(scenes.make_scene(3, "pretrain", i)))


def test_retrieval_has_several_captions_a_picture(made):
    with tarfile.open(made / "retrieval/00000.tar") as tar:
        texts = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
    assert len(texts) == 10 and all(len(t.splitlines()) == 5 for t in texts)


def test_class_folders(made):
    from torchvision.datasets import ImageFolder

    for what, count in {"shape": 10, "color": 8, "shape_color": 80}.items():
        names = json.loads((made / "classification" / what / "classnames.json").read_text())
        templates = json.loads((made / "classification" / what / "templates.json").read_text())
        assert len(names) == count and all("{c}" in t for t in templates)
        data = ImageFolder(made / "classification" / what / "test")
        assert sorted(names) == data.classes and len(data) == 80
        assert set(np.bincount(data.targets)) == {80 // count}
    for role in ("v2", "a", "r", "sketch"):
        assert sorted(ImageFolder(made / "shifts" / role).classes) == sorted(scenes.SHAPES)


def test_fewer_images_than_classes_are_a_set_that_the_benchmarks_read(made):
    assert len([*(made / "classification/shape_color/val").iterdir()]) == 10
    suite = datasets.read(made, datasets.suite_from_folder(made))
    assert suite  # a folder without images would have been refused


def test_llava_rows(made):
    for name, count in {"align.json": 12, "instruct.json": 9}.items():
        rows = json.loads((made / "llava" / name).read_text())
        assert len(rows) == count == len({r["id"] for r in rows})
        for row in rows:
            with Image.open(made / "llava/images" / row["image"]) as image:
                assert image.size == (64, 64) and image.mode == "RGB"
    lines = [json.loads(line) for line in (made / "llava/text.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and all(set(line) == {"text"} for line in lines)


def test_pope_files_share_positives_and_pictures(made):
    files = {}
    for way in ("random", "popular", "adversarial"):
        rows = [json.loads(s) for s in (made / f"pope/scenes_pope_{way}.json").read_text().splitlines()]
        assert [r["question_id"] for r in rows] == list(range(1, 49))
        assert all(list(r) == ["question_id", "image", "text", "label"] for r in rows)
        assert sum(r["label"] == "yes" for r in rows) == 24
        assert all((made / "pope/images" / r["image"]).exists() for r in rows)
        assert len({(r["image"], r["text"]) for r in rows}) == 48
        files[way] = {(r["image"], r["text"]) for r in rows if r["label"] == "yes"}
    assert files["random"] == files["popular"] == files["adversarial"]


def test_mmvp_table(made):
    with open(made / "mmvp/Questions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["Question ID", "Type", "Statement"]
    assert [int(r["Question ID"]) for r in rows] == list(range(1, len(rows) + 1)) and len(rows) == 2 * 2 * 7
    for row in rows:
        assert (made / "mmvp/MMVP VLM Images" / row["Type"] / f"{row['Question ID']}.jpg").exists()


def test_masks_agree_with_cocos_own_reader(made):
    tools = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    coco = tools.COCO(str(made / "segmentation/instances.json"))
    for image in coco.loadImgs(coco.getImgIds()):
        scene = scenes.make_scene(3, "segmentation", image["id"] - 1)
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        for annotation, thing, mask in zip(found, scene.things, scenes.masks(scene), strict=True):
            read = coco.annToMask(annotation).astype(bool)
            assert np.array_equal(read, mask) and annotation["area"] == read.sum()
            rows, columns = np.nonzero(read)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == box
            assert coco.loadCats(annotation["category_id"])[0]["name"] == thing.shape


def test_run_lengths_on_random_masks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((5, 7)) < rng.random()
        value, flat = False, []
        for n in parts.run_lengths(mask):
            flat += [value] * n
            value = not value
        assert np.array_equal(np.array(flat).reshape(7, 5).T, mask)


def test_called_again_it_does_nothing_and_other_options_are_refused(made, capsys):
    stamp = (made / "pretrain/00000.tar").stat().st_mtime_ns
    main(arguments(made))
    assert "complete" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"pairs=30.*pairs=31"):
        main(arguments(made, pairs=31))
    assert (made / "pretrain/00000.tar").stat().st_mtime_ns == stamp


def test_parts_alone_and_after_an_interruption_equal_the_whole(small, tmp_path):
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope/left over").touch()  # as a killed run leaves it: no scenes.json
    main(arguments(tmp_path, only="pope,mmvp", **TINY))
    assert json.loads((tmp_path / "scenes.json").read_text())["parts"] == ["pope", "mmvp"]
    main(arguments(tmp_path, **TINY))
    names = sorted(p.relative_to(small) for p in small.rglob("*"))
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    assert all((small / n).read_bytes() == (tmp_path / n).read_bytes() for n in names if (small / n).is_file())


def test_several_processes_write_the_same_files(small, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(export, "SEVERAL_FROM", 0)
    monkeypatch.setattr(export, "cores", lambda: 3)
    main(arguments(tmp_path / "several", **TINY))
    names = sorted(p.relative_to(small) for p in small.rglob("*"))
    assert names == sorted(p.relative_to(tmp_path / "several") for p in (tmp_path / "several").rglob("*"))
    assert all(
        (small / n).read_bytes() == (tmp_path / "several" / n).read_bytes() for n in names if (small / n).is_file()
    )


@pytest.mark.slow
def test_processes_end_with_the_one_that_asked(tmp_path):
    command = [sys.executable, "-m", "diffclip", "scenes", "export", str(tmp_path / "world"), "--pairs=200000"]
    exporting = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (writing := psutil.Process(exporting.pid).children()) or not [*tmp_path.rglob("*.tar")]:
        assert time.time() < deadline
        time.sleep(0.05)
    exporting.kill()
    exporting.wait()
    assert not psutil.wait_procs(writing, timeout=20)[1]


@pytest.mark.slow
@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the fault reaches forked processes alone")
@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        ("raise OSError(28, 'No space left on device')", OSError, "No space left"),
        ("os._exit(9)", InputError, "has ended, as where memory runs out"),
    ],
)
def test_a_process_that_fails_ends_the_export(tmp_path, monkeypatch, fault, error, told):
    def fail(*_):
        exec(fault, {"os": os})

    monkeypatch.setattr(export, "SEVERAL_FROM", 0)
    monkeypatch.setattr(export, "cores", lambda: 2)
    monkeypatch.setitem(parts.WRITERS, "pope", (fail, lambda options: 1_000_000))  # the largest, so the first
    with pytest.raises(error, match=told):
        main(arguments(tmp_path / "world"))
    assert not (tmp_path / "world/scenes.json").exists()
    monkeypatch.undo()
    main(arguments(tmp_path / "world"))  # as if there had been nothing


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"pairs": 0}, "--pairs"),
        ({"only": "pop"}, "pop is not a part of the export: did you mean pope"),
        ({"size": 8}, "--size"),
        ({"rounds": 21}, "--rounds.*at most 20"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_bad_options_name_the_option(tmp_path, changed, word):
    with pytest.raises(InputError, match=word):
        main(arguments(tmp_path / "new", **changed))
    assert not (tmp_path / "new").exists()


def test_a_simple_world_has_the_images_of_any_and_asks_for_shapes_alone(tmp_path, small, capsys):
    main(arguments(tmp_path, **TINY | {"conversations": 60}, simple=1))
    with tarfile.open(tmp_path / "pretrain/00000.tar") as tar:
        told = [json.load(tar.extractfile(m))["captions"] for m in tar if m.name.endswith("json")]
    with tarfile.open(tmp_path / "retrieval/00000.tar") as tar:
        told += [tar.extractfile(m).read().decode().splitlines() for m in tar if m.name.endswith("txt")]
    for part in ("llava", "pope"):
        images = {path.name: path.read_bytes() for path in (small / part).rglob("*.png")}
        assert images.items() <= {path.name: path.read_bytes() for path in (tmp_path / part).rglob("*.png")}.items()
        assert images
    rows = json.loads((tmp_path / "llava/align.json").read_text())
    told += [[turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"] for row in rows]
    told += [json.loads(line)["text"].split("USER:") for line in (tmp_path / "llava/text.jsonl").open()]
    words = {word for texts in told for one in texts for word in re.findall(r"\w+", one.lower())}
    assert words & set(scenes.SHAPES) and not words & {*scenes.COLORS, "large", "left", "background"}
    rows = json.loads((tmp_path / "llava/instruct.json").read_text())
    for row in rows:
        asked, _ = row["conversations"]
        question = rf"<image>\nIs there an? ({'|'.join(scenes.SHAPES)}) in the image\?{questions.SHORT}"
        assert re.fullmatch(question, asked["value"])
    assert [path.name for path in (tmp_path / "classification").iterdir()] == ["shape"]
    assert json.loads((tmp_path / "scenes.json").read_text())["classes"] == {"shape": 10}
    assert len([*(tmp_path / "classification").rglob("*.png")]) * 3 == len([*(small / "classification").rglob("*.png")])
    with pytest.raises(InputError, match="made with simple=1 but simple=0 was asked for"):
        main(arguments(tmp_path, **TINY | {"conversations": 60}))


def test_a_world_from_before_the_option_simple_is_complete(small, tmp_path, capsys):
    shutil.copytree(small, tmp_path / "old")
    about = json.loads((tmp_path / "old/scenes.json").read_text())
    del about["options"]["simple"]
    (tmp_path / "old/scenes.json").write_text(json.dumps(about))
    main(arguments(tmp_path / "old", **TINY))
    assert "complete" in capsys.readouterr().out


@pytest.mark.slow
def test_no_test_scene_is_a_training_scene():
    """Over the default counts, by the whole description: what decides every pixel."""
    n = asdict(Options())
    train = {scenes.make_scene(0, "pretrain", i) for i in range(n["pairs"])}
    train |= {scenes.make_scene(0, "llava", i) for i in range(n["align"])}
    test = {parts.pope_scene(0, i) for i in range(n["pope"])}
    test |= {parts.retrieval_scene(0, i) for i in range(n["retrieval"])}
    test |= {scenes.make_scene(0, "segmentation", i) for i in range(n["segmentation"])}
    for what in parts.CLASSES:
        for split, into in {"train": train, "val": train, "test": test}.items():
            stream = f"classification/{what}/{split}"
            into |= {parts.class_scene(0, what, stream, i)[0] for i in range(n[f"class_{split}"])}
    for role in parts.SHIFTS:
        test |= {parts.class_scene(0, "shape", f"shifts/{role}", i, role)[0] for i in range(n["class_test"])}
    assert len(train) == n["pairs"] + n["align"] + 3 * (n["class_train"] + n["class_val"])
    assert len(test) == n["pope"] + n["retrieval"] + n["segmentation"] + 7 * n["class_test"]
    assert not train & test
    written = {scenes.make_scene(0, "text", i).things for i in range(n["texts"])}
    assert not written & {scene.things for scene in test}


def test_command_line(tmp_path, capsys):
    main(["show", "--seed", "1", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(set(sheet.convert("L").getdata())) > 50
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    help_text = capsys.readouterr().out
    assert all(re.search(rf"--{name}\b", help_text) for name in asdict(Options()))
