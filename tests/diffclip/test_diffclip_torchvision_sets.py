"""torchvision's own classes and our reader see the same images, labels and splits; the rules are fixed and fair."""

import hashlib
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat

from diffclip.base.errors import InputError
from diffclip.benchmarks import TORCHVISION, datasets, paper
from diffclip.benchmarks.__main__ import main
from diffclip.benchmarks.paper import torchvision_root
from diffclip.benchmarks.torchvision_sets import read_torchvision


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (number % 256, number // 256, 99)).save(path)


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def food101(root, _):
    base = root / "food-101"
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        meta = {name: [f"{name}/{n}" for n in numbers] for name in ("tuna_tartare", "apple_pie")}
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / "meta" / f"{split}.json").write_text(str(meta).replace("'", '"'))
        for c, files in enumerate(meta.values()):
            for n, file in enumerate(files):
                paint(base / "images" / f"{file}.jpg", 10 * c + n)


def cifar10(root, monkeypatch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    digests = {}
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        if name == "batches.meta":
            content = {"label_names": ["airplane", "car"]}
        else:
            content = {"data": rng.integers(0, 256, (6, 3072), dtype=np.uint8), "labels": [0, 1, 0, 1, 0, 1]}
        (folder / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", digests["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", digests["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
    monkeypatch.setattr(kind, "meta", meta)


def aircraft(root, _):
    data = root / "fgvc-aircraft-2013b" / "data"
    write(data / "variants.txt", ["707-320", "A318"])
    number = 1000
    for split in ("train", "val", "test"):
        rows = []
        for variant in ("707-320", "A318", "A318"):
            rows.append(f"{number} {variant}")
            paint(data / "images" / f"{number}.jpg", number)
            number += 1
        write(data / f"images_variant_{split}.txt", rows)


def dtd(root, _):
    base = root / "dtd" / "dtd"
    for s, split in enumerate(("train", "val", "test")):
        rows = [f"{texture}/{texture}_{s}{n}.jpg" for texture in ("banded", "woven") for n in range(2)]
        write(base / "labels" / f"{split}1.txt", rows)
        for n, row in enumerate(rows):
            paint(base / "images" / row, 10 * s + n)


def pets(root, _):
    base = root / "oxford-iiit-pet"
    for s, split in enumerate(("trainval", "test")):
        rows = [f"{pet}_{s}{n} {label} 1 1" for label, pet in ((1, "Abyssinian"), (2, "pug")) for n in range(3)]
        write(base / "annotations" / f"{split}.txt", rows)
        for n, row in enumerate(rows):
            paint(base / "images" / f"{row.split()[0]}.jpg", 10 * s + n)


def flowers(root, monkeypatch):
    base = root / "flowers-102"
    for n in range(1, 13):
        paint(base / "jpg" / f"image_{n:05d}.jpg", n)
    savemat(base / "imagelabels.mat", {"labels": np.arange(12) % 2 + 1})
    savemat(base / "setid.mat", {"trnid": np.arange(1, 5), "valid": np.arange(5, 9), "tstid": np.arange(9, 13)})
    kind = torchvision.datasets.Flowers102
    files = {"image": ("102flowers.tgz", "")}
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        files[key] = (name, hashlib.md5((base / name).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "_file_dict", files)


def sun397(root, _):
    base = root / "SUN397"
    write(base / "ClassName.txt", ["/a/abbey", "/a/apartment_building/outdoor"])
    for c, name in enumerate(("a/abbey", "a/apartment_building/outdoor")):
        for n in range(40):
            paint(base / name / f"sun_{name[2:5]}{n:03d}.jpg", 100 * c + n)


def caltech101(root, _):
    base = root / "caltech101"
    (base / "Annotations").mkdir(parents=True)
    for c, (name, count) in enumerate((("Faces", 45), ("ant", 33), ("BACKGROUND_Google", 5))):
        for n in range(1, count + 1):
            paint(base / "101_ObjectCategories" / name / f"image_{n:04d}.jpg", 100 * c + n)


LAYOUTS = {f.__name__: f for f in (food101, cifar10, aircraft, dtd, pets, flowers, sun397, caltech101)}
PEERS = {  # torchvision's own objects, read through their public items
    "food101": lambda root, split: torchvision.datasets.Food101(root, split),
    "cifar10": lambda root, split: torchvision.datasets.CIFAR10(root, split == "train"),
    "aircraft": lambda root, split: torchvision.datasets.FGVCAircraft(root, split),
    "dtd": lambda root, split: torchvision.datasets.DTD(root, split),
    "pets": lambda root, split: torchvision.datasets.OxfordIIITPet(root, {"train": "trainval"}.get(split, split)),
    "flowers": lambda root, split: torchvision.datasets.Flowers102(root, split),
}


@pytest.mark.parametrize("name", PEERS)
def test_same_images_labels_and_splits_as_torchvision(tmp_path, monkeypatch, name):
    LAYOUTS[name](tmp_path, monkeypatch)
    classnames, splits = read_torchvision(name, tmp_path)
    assert len(classnames) == (102 if name == "flowers" else 2) and not any("_" in one for one in classnames)
    assert len(splits) == (3 if name in ("aircraft", "dtd", "flowers") else 2)
    for split, images in splits.items():
        peer = PEERS[name](tmp_path, split)
        assert len(images) == len(peer) > 0
        for (image, label), (other, wanted) in zip(images, peer):
            assert label == wanted and np.array_equal(np.asarray(image), np.asarray(other))


@pytest.mark.parametrize(
    "name, counts, frozen", [("sun397", (28, 4, 8), "8ca1cbec99ed"), ("caltech101", (30, 3), "07fd0f2f735e")]
)
def test_the_rules_split_each_class_once_and_never_change(tmp_path, monkeypatch, name, counts, frozen):
    LAYOUTS[name](tmp_path, monkeypatch)
    classnames, splits = read_torchvision(name, tmp_path)
    assert classnames == {"sun397": ["abbey", "apartment building outdoor"], "caltech101": ["Faces", "ant"]}[name]
    for split, count in zip(splits, counts):
        per_class = Counter(splits[split].labels)
        assert per_class[1] == count
    seen = [file for images in splits.values() for file in images.sources]
    assert len(set(seen)) == len(seen) == {"sun397": 80, "caltech101": 78}[name]
    # the same split wherever the set lies, in whatever order the disk lists it
    again = tmp_path / "elsewhere"
    LAYOUTS[name](again, monkeypatch)
    for split, images in read_torchvision(name, again)[1].items():
        moved = [file.relative_to(again) for file in images.sources]
        assert moved == [file.relative_to(tmp_path) for file in splits[split].sources]
    # frozen: a changed rule would make scores of different releases incomparable
    base = tmp_path / TORCHVISION[name]
    listed = "\n".join(file.relative_to(base).as_posix() for file in splits["test"].sources)
    assert hashlib.sha256(listed.encode()).hexdigest()[:12] == frozen


def test_suite_finds_torchvisions_folders_and_evaluates_them(tmp_path, monkeypatch):
    food101(tmp_path, monkeypatch)  # the data root is torchvision's
    pets(tmp_path / "pets", monkeypatch)  # each set has a root of its own
    suite, missing = paper.suite(tmp_path)
    assert torchvision_root("pets", tmp_path / "pets") == tmp_path / "pets"
    assert "classification/food101" not in missing and "data download dtd" in missing["classification/dtd"]
    data = datasets.read(tmp_path, suite)
    assert set(data.classification) == {"food101", "pets"}
    assert data.classification["pets"].metric == "mean_per_class"
    assert data.classification["food101"].classnames == ["apple pie", "tuna tartare"]
    found = {name: count for name, _, count, _, _ in paper.check(tmp_path)}
    assert (found["food101"], found["pets"], found["dtd"]) == (4, 6, 0)


def test_a_damaged_set_is_named_with_the_remedy(tmp_path, monkeypatch):
    cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"cifar-10-batches-py.*data download cifar10 --data_root"):
        read_torchvision("cifar10", tmp_path)


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    """Up to the seam: torchvision's own downloader runs, and no server answers."""
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/x.tar.gz")
    with pytest.raises(InputError, match=r"^.*cannot be read as torchvision's cifar10.*$"):
        main(["data", "download", "cifar10", "--data-root", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["download", "cifar1O"], "cifar1O: did you mean cifar10"),
        (["download", "imagenet"], r"data download: imagenet.*0_data\.sh fetches the others"),
        (["download"], "name sets among food101, cifar10"),
        (["chek"], "did you mean check"),
    ],
)
def test_near_misses_of_sets_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        main(["data", *arguments, "--data_root", "data"])


def test_imagenets_folders_need_no_names(tmp_path):
    for number, wnid in enumerate(("n01443537", "n01440764", "n15075141")):
        paint(tmp_path / "imagenet" / "val" / wnid / "a.JPEG", number)
    for number, wnid in enumerate(("n01443537", "n15075141")):
        paint(tmp_path / "imagenet-r" / wnid / "a.jpg", number)
    for number in (0, 999, 1):
        paint(tmp_path / "imagenet-v2" / str(number) / "a.jpeg", number)
    suite, _ = paper.suite(tmp_path)
    data = datasets.read(tmp_path, suite)
    imagenet = data.classification["imagenet"]
    assert imagenet.classnames == ["tench", "goldfish", "toilet paper"]  # those that are there compete
    assert imagenet.splits["test"].labels == [0, 1, 2]
    assert data.shifts["imagenet-r"].images.labels == [1, 2]
    assert data.shifts["imagenet-v2"].images.labels == [0, 1, 2]
