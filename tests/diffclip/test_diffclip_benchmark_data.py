"""Benchmark data as users and the Hub have it: read rightly, or refused by name."""

import io
import json
import tarfile
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.benchmarks import captioned, datasets, mmvp, prompts

NAMES = ["red", "lime", "blue"]


def png(colour="red", size=4):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, labels, image="image", label="label", metadata=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = [NAMES[value] if value is not None and 0 <= value < 3 else "white" for value in labels]
    images = [{"bytes": png(colour), "path": None} for colour in colours]
    table = pyarrow.table({image: images, label: labels, **columns})
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)


def paint(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path, "PNG")


def read_set(root):
    """The one classification set below root."""
    (found,) = datasets.read(root, datasets.suite_from_folder(root)).classification.values()
    return found


def colour_of(images, row):
    return images[row][0].getpixel((0, 0))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "classification" / "set"
    folder.mkdir(parents=True)
    return folder


def test_withheld_labels_send_the_score_to_validation(folder, tmp_path):
    (folder / "classnames.json").write_text(json.dumps(NAMES))
    parquet(folder / "test-00000-of-00001.parquet", [-1, -1])
    with pytest.raises(InputError, match=r"labels of test are withheld \(-1\) and there is no val"):
        read_set(tmp_path)
    parquet(folder / "validation-00000-of-00001.parquet", [2, 1, 0])
    found = read_set(tmp_path)
    assert found.splits["test"].labels == [2, 1, 0] and set(found.splits) == {"test"}
    assert found.notes == ["the test labels are withheld (-1): scored on validation"]
    parquet(folder / "test-00000-of-00001.parquet", [0, -1, 1])
    with pytest.raises(InputError, match="row 1 has no label"):
        read_set(tmp_path)
    parquet(folder / "test-00000-of-00001.parquet", [0, None, 1])
    with pytest.raises(InputError, match="row 1 has no label"):
        read_set(tmp_path)


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
def test_the_hubs_folder_columns_and_class_names(folder, tmp_path, columns):
    features = {columns[1]: {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet(folder / "data" / "validation-00000-of-00001.parquet", [0, 2], *columns, metadata=metadata)
    parquet(folder / "data" / "train-00000-of-00001.parquet", [2, 1, 0], *columns, metadata=metadata)
    found = read_set(tmp_path)
    assert found.classnames == NAMES and found.splits["test"].labels == [0, 2]
    assert found.splits["train"].labels == [2, 1, 0] and colour_of(found.splits["train"], 1) == (0, 255, 0)
    assert found.notes == ["3 classes compete, 2 of them have images to score"]


def test_other_columns_are_named(folder, tmp_path):
    (folder / "classnames.json").write_text(json.dumps(NAMES))
    parquet(folder / "test.parquet", [0, 1], "photo", "target")
    with pytest.raises(InputError, match=r"needs the columns image and label .* has photo, target"):
        read_set(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"image": [png()], "label": ["red"]}), folder / "test.parquet")
    with pytest.raises(InputError, match="row 0: label 'red' is no whole number"):
        read_set(tmp_path)


def test_the_column_split_counts(folder, tmp_path):
    (folder / "classnames.json").write_text(json.dumps(NAMES))
    parquet(folder / "all.parquet", [0, 1, 2, 0, 1, 2], split=["train"] * 3 + ["test", "Validation", "test"])
    found = read_set(tmp_path)
    assert {split: rows.labels for split, rows in found.splits.items()} == {
        "train": [0, 1, 2],
        "val": [1],
        "test": [0, 2],
    }
    (folder / "all.parquet").unlink()
    parquet(folder / "test.parquet", [0, 1, 2], split=["test", "train", "test"])
    assert read_set(tmp_path).splits["test"].labels == [0, 2]


def test_litter_is_no_class_and_no_image(folder, tmp_path):
    for name in ("red apple", "Hot_Dog", "Cat", "cat", "日本"):
        paint(folder / "test" / name / "1.png")
    paint(folder / "test" / "cat" / "2.jfif")
    paint(folder / "test" / "cat" / "._1.png")
    paint(folder / "test" / "cat" / ".ipynb_checkpoints" / "1-checkpoint.png")
    paint(folder / "test" / ".cache" / "1.png")
    paint(folder / "test" / "__MACOSX" / "1.png")
    for place in ("test", "test/cat"):
        (folder / place / "Thumbs.db").write_bytes(b"x")
        (folder / place / ".DS_Store").write_bytes(b"x")
    found = read_set(tmp_path)
    assert found.classnames == ["Cat", "Hot Dog", "cat", "red apple", "日本"]
    assert found.splits["test"].labels == [0, 1, 2, 2, 3, 4]
    (folder / "classnames.txt").write_text("a house cat\nx\n", encoding="utf-8")
    with pytest.raises(InputError, match="Cat has no prompt name"):
        read_set(tmp_path)
    (folder / "classnames.txt").unlink()
    names = {"cat": "house cat", "Cat": "the musical", "hot dog": "sausage", "red_apple": "apple", "日本": "Japan"}
    (folder / "classnames.json").write_text(json.dumps(names))
    found = read_set(tmp_path)  # each folder by its own name, where that decides
    assert found.classnames == list(names.values())
    assert found.splits["test"].labels == [1, 2, 0, 0, 3, 4]


def test_folders_of_splits_by_any_name_and_a_class_called_train(folder, tmp_path):
    for split in ("Training", "Testing"):
        for name in ("bus", "train"):
            paint(folder / split / name / "1.png")
    found = read_set(tmp_path)
    assert found.classnames == ["bus", "train"] and set(found.splits) == {"train", "test"}
    paint(folder / "test" / "bus" / "1.png")
    with pytest.raises(InputError, match="Testing/ and test/: keep one"):
        read_set(tmp_path)


def test_a_class_called_train_is_a_class(folder, tmp_path):
    for name in ("bus", "train"):
        paint(folder / name / "1.png")
    assert read_set(tmp_path).classnames == ["bus", "train"]


def test_some_of_imagenets_classes_compete_among_themselves(folder, tmp_path):
    for wnid in ("n01491361", "n01440764"):  # tiger shark, tench
        paint(folder / "test" / wnid / "0.png")
    found = read_set(tmp_path)
    assert found.classnames == ["tench", "tiger shark"] and found.splits["test"].labels == [0, 1]
    assert found.notes == ["2 of ImageNet's 1,000 classes are there, and only these compete"]
    paint(folder / "test" / "n99999999" / "0.png")
    with pytest.raises(InputError, match="n99999999 is none of ImageNet's 1,000 classes"):
        read_set(tmp_path)


def test_openais_braces_are_a_place_for_the_name(folder, tmp_path):
    paint(folder / "test" / "red" / "0.png")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {}.\nart of {c}\n\n")
    assert read_set(tmp_path).templates == ["a photo of a {c}.", "art of {c}"]
    (folder / "templates.json").write_text('["itap of a {}."]')
    assert read_set(tmp_path).templates == ["itap of a {c}."]
    assert prompts.prompts(["cat"], read_set(tmp_path).templates) == ["itap of a cat."]
    (folder / "templates.json").unlink()
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}\na photo\n")
    with pytest.raises(InputError, match=r"template 2, 'a photo', needs \{c\} or \{\}"):
        read_set(tmp_path)


def test_a_blank_line_among_class_names_is_named(folder, tmp_path):
    parquet(folder / "test.parquet", [0, 1])
    (folder / "classnames.txt").write_text("red\n\nlime\n")
    with pytest.raises(InputError, match="class number 2 has no prompt name"):
        read_set(tmp_path)
    (folder / "classnames.txt").write_text("crane\ncrane\n\n")  # as in ImageNet: the bird, the machine
    assert read_set(tmp_path).classnames == ["crane", "crane"]


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def test_joined_shards_masks_and_macs_files(tmp_path):
    pairs = [("0.png", png("lime")), ("0.jpg", png("red")), ("._0.jpg", b"x"), ("0.txt", b"one\n\xe2\x80\xa8\ntwo\n")]
    tar(tmp_path / "0.tar", [*pairs, ("0.jpg", png("blue")), ("0.txt", b"three")])
    (tmp_path / "._0.tar").write_bytes(b"x")
    found = captioned.read_captioned(tmp_path)
    assert (found.captions, found.owner) == (["one", "two", "three"], [0, 0, 1])
    assert [colour_of(found.images, row) for row in (0, 1)] == [(255, 0, 0), (0, 0, 255)]


def test_retrieval_takes_test_rows_and_real_captions(tmp_path):
    table = {"image": [png(colour) for colour in NAMES], "caption": [["a", ""], ["b", None, " "], ["c"]]}
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({**table, "split": ["train", "test", "val"]}), path)
    found = captioned.read_captioned(tmp_path)
    assert found.captions == ["b"] and colour_of(found.images, 0) == (0, 255, 0)
    pyarrow.parquet.write_table(pyarrow.table({**table, "split": ["train", "val", "val"]}), path)
    with pytest.raises(InputError, match=r"holds several splits \(train, val\)"):
        captioned.read_captioned(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({**table, "split": ["val"] * 3}), path)
    assert captioned.read_captioned(tmp_path).captions == ["a", "b", "c"]
    path.rename(tmp_path / "train-0.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [png()], "caption": ["d"]}), tmp_path / "test-0.parquet")
    assert captioned.read_captioned(tmp_path).captions == ["d"]


def test_caption_files_of_coco_flickr30k_and_blip(tmp_path):
    for name in "ab":
        paint(tmp_path / f"{name}.png")
    coco = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
        "annotations": [{"image_id": i, "caption": t} for i, t in ((3, "three"), (7, "one"), (7, "two"))],
    }
    texts = {
        "x.json": json.dumps(coco),
        "y.json": json.dumps([{"image": "a.png", "caption": ["one", "two"]}, {"image": "b.png", "caption": "three"}]),
        "results.csv": "image_name| comment_number| comment\na.png| 0| one\na.png| 1   two\nb.png| 0| three\n",
        "z.csv": 'image,caption\na.png,one\na.png,"two"\nb.png,three\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        found = captioned.read_captioned(tmp_path / name)
        assert (found.captions, found.owner) == (["one", "two", "three"], [0, 0, 1]), name
    (tmp_path / "z.csv").write_text("image,caption\na.png,one, and two\n")
    with pytest.raises(InputError, match="Row #2: Expected 2 columns, got 3"):
        captioned.read_captioned(tmp_path / "z.csv")


def test_mmvp_as_windows_wrote_it(tmp_path):
    for number in (1, 2):
        paint(tmp_path / "MMVP VLM Images" / "Color" / f"{number}.png")
    rows = "Question ID,Type,Statement\r\n1,Color,A \x93red\x94 one\r\n2,Color,A blue one\r\n,,\r\n"
    (tmp_path / "Questions.csv").write_bytes(rows.encode("latin1"))
    assert mmvp.read_mmvp(tmp_path).statements == ["A “red” one", "A blue one"]


CASES = {  # name: class names, test labels
    "labels-withheld": (["red", "green", "blue", "yellow"], [0, 1, 2, 3] * 2),
    "hub-data-folder": (["red", "green", "blue", "yellow"], [0, 1, 2, 3] * 2),
    "img-fine_label": (["red", "green", "blue", "yellow"], [0, 1, 2, 3] * 2),
    "names-in-schema": (["red", "green", "blue", "yellow"], [0, 1, 2, 3] * 2),
    "litter": (["Cat", "Hot Dog", "cat", "grüner Apfel", "red apple", "日本"], [0, 1, 1, 2, 3, 3, 4, 4, 4, 4, 5, 5]),
    "wnid-subset": (["tench", "goldfish", "great white shark", "tiger shark"], [0, 0, 1, 1, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_classification_cases(shared_cases, case):
    found = read_set(shared_cases(f"evaluation/classification/{case}"))
    assert (found.classnames, found.splits["test"].labels) == CASES[case]
    assert all(found.splits["test"][row][0].mode == "RGB" for row in range(len(found.splits["test"])))


@pytest.mark.parametrize(
    "case,images,captions",
    [
        ("coco-captions", 6, 30),
        ("flickr30k-results-csv", 6, 30),
        ("nlphuji-parquet-with-split-column", 3, 15),
        ("an-empty-caption", 6, 6),
    ],
)
def test_retrieval_cases(shared_cases, case, images, captions):
    root = shared_cases(f"evaluation/retrieval/{case}")
    (found,) = datasets.read(root, datasets.suite_from_folder(root)).retrieval.values()
    assert (len(found.images), len(found.captions)) == (images, captions)
    colours = ["red", "green", "blue", "yellow", "black", "white"]
    wanted = colours[1::2] if "split" in case else colours
    assert [found.captions[found.owner.index(row)].split()[1] for row in range(images)] == wanted


@pytest.mark.parametrize("case", ["cp1252", "blank last line"])
def test_mmvp_cases(shared_cases, case):
    found = mmvp.read_mmvp(shared_cases(f"evaluation/mmvp/{case}") / "mmvp")
    assert found.statements[0] == "A square on the left — “facing” left" and len(found.statements) == 4


@pytest.mark.parametrize(
    "test", ["Test-0.parquet", "test_0.parquet", "test.00.parquet", "TEST/0.parquet", "test/0.PARQUET"]
)
def test_a_test_set_is_found_whatever_the_case_and_the_stroke(folder, tmp_path, test):
    (folder / "classnames.json").write_text(json.dumps(NAMES))
    parquet(folder / "validation-00000-of-00001.parquet", [1, 1])
    parquet(folder / test, [0, 1, 2])
    parquet(folder / "test_notes.parquet", [0])  # no number: none of the split's files
    assert read_set(tmp_path).splits["test"].labels == [0, 1, 2]


def test_files_by_two_names_of_a_split_are_refused(folder, tmp_path):
    (folder / "classnames.json").write_text(json.dumps(NAMES))
    parquet(folder / "val-0.parquet", [1, 1])
    parquet(folder / "validation-0.parquet", [0, 1, 2])
    with pytest.raises(InputError, match="has val files as val and as validation: keep those of one name"):
        read_set(tmp_path)


def test_files_without_a_split_are_told_how_to_get_one(folder, tmp_path):
    (folder / "classnames.json").write_text(json.dumps(NAMES))
    parquet(folder / "all.parquet", [0, 1], split=["a", "b"])
    with pytest.raises(InputError, match=r"files called test-\*\.tar or test-\*\.parquet, or any .* column split"):
        read_set(tmp_path)


def test_one_class_in_two_of_unicodes_forms(folder, tmp_path):
    names = ["Äpfel", "pears"]
    for split, form in (("train", "NFD"), ("test", "NFC")):
        for name in names:
            paint(folder / split / unicodedata.normalize(form, name) / "1.png")
    found = read_set(tmp_path)
    assert sorted(found.classnames) == sorted(names)
    for images in found.splits.values():
        spelt = [unicodedata.normalize("NFC", name.split("/")[-2]) for name in images.names]
        assert [found.classnames[label] for label in images.labels] == spelt and len(spelt) == 2


def test_retrieval_without_a_file_that_can_be_read_is_no_empty_suite(tmp_path):
    paint(tmp_path / "retrieval" / "a.png")
    (tmp_path / "retrieval" / "captions.xml").write_text("<image>a.png</image>")
    with pytest.raises(InputError, match="retrieval: holds neither shards"):
        datasets.read(tmp_path, datasets.suite_from_folder(tmp_path))
