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


README = """---
license: mit
dataset_info:
{indent}features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': red
          '10': ten
          '2': blue
          '1': lime
---
# A set
"""


@pytest.mark.parametrize("name", ["README.md", "dataset_info.json", "dataset_infos.json", "test/dataset_info.json"])
def test_class_names_that_are_declared_beside_the_files(folder, tmp_path, name):
    """As `datasets` wrote them before they stood in the schema, and as the Hub's pages have them."""
    features = {"image": {"_type": "Image"}, "label": {"names": [*NAMES, "ten"], "_type": "ClassLabel"}}
    content = {"dataset_infos.json": {"default": {"features": features}}}.get(name, {"features": features})
    parquet(folder / "test" / "0.parquet", [0, 2])
    text = README.format(indent="  ") if name == "README.md" else json.dumps(content)
    (folder / name).write_text(text)
    assert read_set(tmp_path).classnames == [*NAMES, "ten"]
    if name == "dataset_infos.json":
        other = {"label": {"names": ["x", "y", "z"]}}
        (folder / name).write_text(json.dumps(content | {"other": {"features": other}}))
        with pytest.raises(InputError, match="declares class names for several configurations"):
            read_set(tmp_path)
    (folder / "classnames.txt").write_text("a\nb\nc\n")
    assert read_set(tmp_path).classnames == ["a", "b", "c"]  # the user's own go first


def test_names_are_those_of_the_column_that_is_read(folder, tmp_path):
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"fine_label": {"names": ["x", "y", "z"]}}}))
    parquet(folder / "test.parquet", [0, 2], fine_label=[1, 1])
    with pytest.raises(InputError, match="has numbers as labels: put their names"):
        read_set(tmp_path)


def test_what_datasets_saves_to_disk_is_read(folder, tmp_path):
    import datasets as hub

    labels = {"train": [0, 1, 2], "test": [2, 1]}
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=NAMES)})
    rows = {
        split: hub.Dataset.from_dict({"image": [{"bytes": png(NAMES[n])} for n in of], "label": of}, features=features)
        for split, of in labels.items()
    }
    hub.DatasetDict(rows).save_to_disk(folder)
    found = read_set(tmp_path)
    assert found.classnames == NAMES and {split: images.labels for split, images in found.splits.items()} == labels
    assert colour_of(found.splits["test"], 0) == (0, 0, 255)


def test_the_hubs_converted_files_lie_in_the_folder_of_a_configuration(folder, tmp_path):
    (folder / "classnames.json").write_text(json.dumps(NAMES))
    parquet(folder / "default" / "test" / "0000.parquet", [0, 2])
    parquet(folder / "default" / "train" / "0000.parquet", [0, 1, 2])
    found = read_set(tmp_path)
    assert found.splits["test"].labels == [0, 2] and found.splits["train"].labels == [0, 1, 2]
    parquet(folder / "other" / "test" / "0000.parquet", [1])
    with pytest.raises(InputError, match="has the configurations default, other: keep one"):
        read_set(tmp_path)


WNIDS = {1: "n01491361", 2: "n01440764", 3: "n01440764"}  # tiger shark, tench, tench
ORDERED = [f"n{number:08d}" for number in (1440764, 1443537, 1484850, 1491361)]  # labels 0 to 3 of ImageNet
TRUTHS = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"ILSVRC2012_val_{n:08d},{w} 85 1 499 272 {w} 1 1 2 2 \n" for n, w in reversed(WNIDS.items())),
    "val.txt": "".join(f"ILSVRC2012_val_{n:08d}.JPEG {ORDERED.index(w)}\n" for n, w in WNIDS.items()),
    "imagenet_2012_validation_synset_labels.txt": "".join(f"{w}\n" for w in WNIDS.values()),
    "ILSVRC2012_validation_ground_truth.txt": "490\n7\n7\n",  # no order of names
}


@pytest.mark.slow
@pytest.mark.parametrize("place", ["", "val", "ILSVRC2012_img_val"])
@pytest.mark.parametrize("name", TRUTHS)
def test_imagenets_validation_images_in_one_folder(folder, tmp_path, name, place):
    for number in (3, 1):
        paint(folder / place / f"ILSVRC2012_val_{number:08d}.JPEG", (number, 0, 0))
    with pytest.raises(InputError, match=r"holds ImageNet's images without their classes: put one of LOC_val_solution"):
        read_set(tmp_path)
    (folder / name).write_text(TRUTHS[name])
    if "ground_truth" in name:
        with pytest.raises(InputError, match=r"put meta\.mat or map_clsloc\.txt beside it"):
            read_set(tmp_path)
        (folder / "map_clsloc.txt").write_text("n01491361 490 tiger_shark\nn01440764 7 tench\n")
    found = read_set(tmp_path)
    assert found.classnames == ["tench", "tiger shark"]
    assert [(colour_of(found.splits["test"], row)[0], found.splits["test"].labels[row]) for row in (0, 1)] == [
        (1, 1),
        (3, 0),
    ]
    assert found.notes == ["2 of ImageNet's 1,000 classes are there, and only these compete"]
    paint(folder / place / "ILSVRC2012_val_00000009.JPEG")
    with pytest.raises(InputError, match=r"ILSVRC2012_val_00000009\.JPEG: .* has no class for it"):
        read_set(tmp_path)


def test_the_devkits_matlab_file_says_what_the_authors_numbers_mean(folder, tmp_path):
    import numpy as np
    import scipy.io

    paint(folder / "val" / "ILSVRC2012_val_00000001.JPEG")
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n")
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    rows = [(490, "n01491361", "tiger shark", "", 0), (7, "n01440764", "tench", "", 0), (1001, "n00001740", "", "", 9)]
    synsets = np.array(rows, dtype=kinds)
    scipy.io.savemat(folder / "meta.mat", {"synsets": synsets})
    assert read_set(tmp_path).classnames == ["tiger shark"]
    (folder / "meta.mat").write_bytes(b"no matlab")
    with pytest.raises(InputError, match=r"meta\.mat: is not the devkit's"):
        read_set(tmp_path)


def test_tiny_imagenet_as_it_is_unpacked(folder, tmp_path):
    for number, wnid in enumerate(("n01440764", "n01491361")):
        paint(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG", (10, 0, 0))
        paint(folder / "val" / "images" / f"val_{number}.JPEG", (number, 0, 0))
    paint(folder / "test" / "images" / "test_0.JPEG")  # without labels
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01491361\t0\t32\nval_1.JPEG\tn01440764\t1\t2\n")
    found = read_set(tmp_path)
    assert found.classnames == ["tench", "tiger shark"] and set(found.splits) == {"train", "test"}
    assert found.splits["test"].labels == [1, 0] and found.splits["train"].labels == [0, 1]


def test_objectnet_as_it_is_unpacked(folder, tmp_path):
    folders = {"alarm_clock": "Alarm clock", "basket": "Basket", "air_freshener": "Air freshener"}
    mappings = {
        "folder_to_objectnet_label": folders,
        "objectnet_to_imagenet_1k": {"Alarm clock": "analog clock; digital clock", "Basket": "shopping basket"},
    }
    (folder / "mappings").mkdir()
    for name, content in mappings.items():
        (folder / "mappings" / f"{name}.json").write_text(json.dumps(content))
    for number, name in enumerate(folders):
        framed = Image.new("RGB", (12, 10), "red")
        framed.paste((number, 200, 0), (2, 2, 10, 8))
        (folder / "images" / name).mkdir(parents=True)
        framed.save(folder / "images" / name / "0.png")
    found = read_set(tmp_path)
    assert found.classnames == ["alarm clock", "basket"] and found.splits["test"].labels == [0, 1]
    image = found.splits["test"][1][0]
    assert image.size == (8, 6) and image.getextrema() == ((1, 1), (200, 200), (0, 0))  # the border is gone
    assert found.notes == ["2 of ObjectNet's 3 classes are ImageNet's, and only these compete"]
    (folder / "images" / "basket" / "0.png").unlink()
    with pytest.raises(InputError, match=r"images/basket holds no images"):
        read_set(tmp_path)


def test_folders_of_splits_without_classes_are_no_classes(folder, tmp_path):
    paint(folder / "test" / "1.png")
    paint(folder / "train" / "1.png")
    (folder / "test" / "metadata.csv").write_text("file_name,label\n1.png,0\n")
    with pytest.raises(InputError, match="the images in test and train have no classes: sort them into folders"):
        read_set(tmp_path)


def test_a_folder_among_wordnet_numbers_that_is_none_is_named(folder, tmp_path):
    """Else all prompts would be numbers: a photo of a n01440764."""
    for name in ("n01440764", "n01491361", "images"):
        paint(folder / "test" / name / "1.png")
    with pytest.raises(InputError, match="images/ is no WordNet number as n01440764/ is"):
        read_set(tmp_path)


@pytest.mark.slow
def test_imagenet_v2s_numbered_folders_are_imagenets_classes(folder, tmp_path):
    for number in range(1000):
        (folder / str(number)).mkdir()
        (folder / str(number) / "1.png").write_bytes(b"never opened")
    found = read_set(tmp_path)
    assert [found.classnames[label] for label in (0, 2, 999)] == ["tench", "great white shark", "toilet paper"]
    rows = found.splits["test"]
    assert all(f"/{label}/" in name for name, label in zip(rows.names, rows.labels)) and len(rows) == 1000


def test_numbers_and_doubled_keys_of_class_names(folder, tmp_path):
    parquet(folder / "test.parquet", [0, 2])
    (folder / "classnames.json").write_text('{"2": "blue", "0": "red", "1": "lime"}')
    assert read_set(tmp_path).classnames == NAMES
    (folder / "classnames.json").write_text('{"1": "red", "2": "lime", "3": "blue"}')
    with pytest.raises(InputError, match="its numbers need to be 0 to 2"):
        read_set(tmp_path)
    (folder / "classnames.json").write_text('{"0": "red", "1": "lime", "1": "blue"}')
    with pytest.raises(InputError, match=r"classnames\.json: .*'1' stands twice in one object: keep one"):
        read_set(tmp_path)


def test_class_folders_in_a_folder_of_their_own(folder, tmp_path):
    """images/CLASS/*.jpg: today's one class `images` would be right in all of its images."""
    for name in ("bus", "dog"):
        paint(folder / "images" / "all" / name / "1.png")
    assert read_set(tmp_path).classnames == ["bus", "dog"]
    paint(folder / "images" / "0.png")
    assert read_set(tmp_path).classnames == ["images"]


def test_pickles_of_cifar_are_not_read(folder, tmp_path):
    """torchvision unpickles these files once it knows them by their digest; others never."""
    import pickle

    class Plant:
        def __reduce__(self):
            return (tmp_path / "planted").touch, ()

    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / "cifar-10-batches-py").mkdir(exist_ok=True)
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Plant()))
    (folder / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(Plant()))
    with pytest.raises(InputError, match="cannot be read as torchvision's cifar10"):
        read_set(tmp_path)
    assert not (tmp_path / "planted").exists()


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
    with pytest.raises(InputError, match=r"holds several splits \(train, val\): set `split`"):
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
    with pytest.raises(InputError, match=r"Row #2: Expected 2 columns, got 3.*needs quotes"):
        captioned.read_captioned(tmp_path / "z.csv")


FLICKR = {  # four images, of which c and d are for the test; each file as its authors publish it
    "results_20130124.token": "".join(f"{n}.png#{i}\t{n} {i}, so\n" for n in "cd" for i in range(2)),
    "captions.txt": "image,caption\n" + "".join(f'{n}.png,"{n} {i}, so"\n' for n in "cd" for i in range(2)),
    "annotations.csv": "raw,sentids,split,filename,img_id\n"
    + "".join(
        f'"[""{n} 0, so"", ""{n} 1, so""]","[0, 1]",{split},{n}.png,0\n'
        for n, split in zip("abcd", ["train", "val", "test", "test"])
    ),
    "python.csv": "filename;raw;split\nc.png;['c 0, so', 'c 1, so'];test\nd.png;['d 0, so', 'd 1, so'];test\n",
    "columns.csv": 'image,caption_0,caption_1\nc.png,"c 0, so","c 1, so"\nd.png,"d 0, so","d 1, so"\n',
    "dataset_flickr30k.json": json.dumps(
        {
            "images": [
                {"filename": f"{n}.png", "split": split, "sentences": [{"raw": f"{n} {i}, so"} for i in range(2)]}
                for n, split in zip("abcd", ["train", "val", "test", "test"])
            ],
            "dataset": "flickr30k",
        }
    ),
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"{n}.png", "text": f"{n} {i}, so"}) + "\n" for n in "cd" for i in range(2)
    ),
    "coco_karpathy_test.json": json.dumps(
        [{"image": f"/export/share/flickr30k-images/{n}.png", "caption": [f"{n} 0, so", f"{n} 1, so"]} for n in "cd"]
    ),
    "one_a_row.json": json.dumps([{"image": f"{n}.png", "caption": f"{n} {i}, so"} for n in "cd" for i in range(2)]),
}


@pytest.mark.parametrize("place", ["", "flickr30k-images"])
@pytest.mark.parametrize("name", FLICKR)
def test_captions_as_their_authors_publish_them(tmp_path, name, place):
    for number, letter in enumerate("abcd"):
        paint(tmp_path / place / f"{letter}.png", (number, 0, 0))
    (tmp_path / name).write_text(FLICKR[name])
    (tmp_path / "readme.txt").write_text("who took them\n")
    for path in (tmp_path, tmp_path / name):
        found = captioned.read_captioned(path)
        assert found.captions == ["c 0, so", "c 1, so", "d 0, so", "d 1, so"] and found.owner == [0, 0, 1, 1]
        assert [colour_of(found.images, row)[0] for row in range(2)] == [2, 3]


def test_lists_of_images_beside_flickr8ks_captions_are_its_splits(tmp_path):
    for number, letter in enumerate("abc"):
        paint(tmp_path / "Flicker8k_Dataset" / f"{letter}.png", (number, 0, 0))
    (tmp_path / "Flickr8k.token.txt").write_text("".join(f"{n}.png#{i}\t{n} {i}\n" for n in "abc" for i in range(2)))
    for split, name in (("train", "a"), ("dev", "b"), ("test", "c")):
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text(f"{name}.png\n")
    found = captioned.read_captioned(tmp_path)
    assert found.captions == ["c 0", "c 1"] and colour_of(found.images, 0) == (2, 0, 0)
    (tmp_path / "Flickr8k.token.txt").write_text("a.png#0\tone\na.png: two\n")
    with pytest.raises(InputError, match=r"Flickr8k\.token\.txt:2: is not image#number"):
        captioned.read_captioned(tmp_path)


def test_coco_is_read_as_it_is_unpacked(tmp_path):
    paint(tmp_path / "val2017" / "000000000139.jpg")
    paint(tmp_path / "train2017" / "000000000009.jpg", "blue")
    coco = {
        "images": [{"id": 139, "file_name": "000000000139.jpg"}],
        "annotations": [{"image_id": 139, "caption": "a"}],
    }
    boxes = {"images": [], "annotations": [{"bbox": []}]}
    (tmp_path / "annotations").mkdir()
    for name, content in (
        ("captions_val2017", coco),
        ("instances_val2017", boxes),
        ("person_keypoints_val2017", boxes),
    ):
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(content))
    assert captioned.read_captioned(tmp_path).captions == ["a"]
    coco["images"][0]["file_name"] = "000000000009.jpg"
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(coco))
    with pytest.raises(
        InputError, match=r"several splits \(train, val\): .*or name its files, e\.g\. .*train2017\.json"
    ):
        captioned.read_captioned(tmp_path)
    only = captioned.read_captioned(tmp_path / "annotations" / "captions_val2017.json")
    assert colour_of(only.images, 0)[0] > 250


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a.png": ["x"], "a.png": ["y"]}', r"x\.json: .*'a\.png' stands twice in one object"),
        (
            '[{"image": "a.png", "caption": "x", "split": "test"}, {"image": "a.png", "caption": "y", "split": "out"}]',
            r"x\.json: the column split holds 'out'; write train, val or test in every row",
        ),
        ('[{"image_id": 1, "caption": "x"}]', r"x\.json: needs an image column .*found image_id, caption"),
        ('{"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "a.png"}], "annotations": []}', "one id"),
        (
            '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
            "has a caption of image 2, which it does not list",
        ),
    ],
)
def test_captions_that_could_be_read_as_something_else_are_refused(tmp_path, content, message):
    paint(tmp_path / "a.png")
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message):
        captioned.read_captioned(tmp_path)


def test_captions_as_text_or_objects_are_the_same(tmp_path):
    paint(tmp_path / "a.png")
    for sentences in (["x", "y"], [{"raw": "x"}, {"raw": "y"}], [{"caption": "x"}, "y"]):
        rows = {"images": [{"filename": "a.png", "filepath": None, "split": None, "sentences": sentences}]}
        (tmp_path / "x.json").write_text(json.dumps(rows))
        assert captioned.read_captioned(tmp_path).captions == ["x", "y"]


def test_an_image_that_could_be_two_files_is_refused(tmp_path):
    for folder in ("one", "two"):
        paint(tmp_path / folder / "a.png")
    (tmp_path / "x.json").write_text(json.dumps({"a.png": ["red"]}))
    with pytest.raises(InputError, match=r"image a\.png could be .*one/a\.png and .*two/a\.png: remove one"):
        captioned.read_captioned(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"two/a.png": ["red"]}))
    assert captioned.read_captioned(tmp_path).images.names[0].endswith("two/a.png")
    (tmp_path / "x.json").write_text(json.dumps({"b.png": ["red"]}))
    with pytest.raises(InputError, match=r"there is no b\.png in .*nor in a folder beside it; set image_root"):
        captioned.read_captioned(tmp_path)


def test_one_image_in_several_rows_of_parquet_is_one_image(tmp_path):
    """As the Hub's copies of COCO with a row a caption: each caption of an image is a right answer to it."""
    table = {"image": [png("red"), png("red"), png("blue")], "caption": ["one", "two", "three"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "test.parquet")
    found = captioned.read_captioned(tmp_path)
    assert (found.captions, found.owner, len(found.images)) == (["one", "two", "three"], [0, 0, 1], 2)
    table = {"image": [png("red")], "caption_0": ["one"], "caption_1": ["two"], "caption_2": [None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "test.parquet")
    assert captioned.read_captioned(tmp_path).captions == ["one", "two"]
    paint(tmp_path / "images" / "a.png", "lime")
    table = {"image": ["images/a.png"], "caption": ["one"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "test.parquet")
    assert colour_of(captioned.read_captioned(tmp_path).images, 0) == (0, 255, 0)
    pyarrow.parquet.write_table(pyarrow.table({**table, "image": ["b.png"]}), tmp_path / "test.parquet")
    with pytest.raises(InputError, match=r"test\.parquet: .*there is no b\.png in"):
        captioned.read_captioned(tmp_path)


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
    (tmp_path / "retrieval" / "captions.md").write_text("a.png is red\n")
    (tmp_path / "retrieval" / "readme.txt").write_text("an image, a caption\n")
    with pytest.raises(InputError, match=r"retrieval: holds neither shards, .*but \.md, \.png, \.txt"):
        datasets.read(tmp_path, datasets.suite_from_folder(tmp_path))


def test_what_lies_in_retrieval_is_one_set_or_several(tmp_path):
    (tmp_path / "retrieval" / "coco").mkdir(parents=True)
    for name, text in {"readme.txt": "image sets,\r" * 20_000, "long.txt": "x" * 300_000, "nul.txt": "a\0b"}.items():
        (tmp_path / "retrieval" / name).write_text(text)
    assert datasets.suite_from_folder(tmp_path) == {"retrieval": {"coco": {"path": "retrieval/coco"}}}
    one = {"retrieval": {"": {"path": "retrieval"}}}
    for name in ("c.txt", "c.jsonl.gz", "test/0.tar", "annotations/c.json"):
        path = tmp_path / "retrieval" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("image,caption\n")
        assert datasets.suite_from_folder(tmp_path) == one
        path.unlink()
        if path.parent.name != "retrieval":
            path.parent.rmdir()


def test_an_unfinished_table_says_of_how_many_classes_and_images(tmp_path):
    from diffclip.benchmarks.evaluate import notes

    for name, label in (("red", 0), ("lime", 1), ("blue", 2)):
        paint(tmp_path / "classification" / "set" / "test" / name / f"{label}.png", name)
        paint(tmp_path / "classification" / "dtd" / "test" / name / f"{label}.png", name)
    for name in ("red", "blue"):
        paint(tmp_path / "shifts" / "other" / name / "0.png", name)
    paint(tmp_path / "retrieval" / "flickr8k" / "a.png")
    (tmp_path / "retrieval" / "flickr8k" / "captions.txt").write_text("image,caption\na.png,red\n")
    suite = datasets.suite_from_folder(tmp_path)
    suite["shifts"]["other"]["of"] = "set"
    assert notes(datasets.read(tmp_path, suite)) == {
        "other": "2 of the 3 classes of set have images; only these compete",
        "dtd": "scored on 3 images; the published test set has 1,880",
        "flickr8k": "scored on 1 images; the published test set has 1,000",
    }
