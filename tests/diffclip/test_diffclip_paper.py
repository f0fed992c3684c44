"""The paper's suite: what is there is run, what is not says how to get it."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffclip
from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from diffclip.benchmarks import paper
from diffclip.benchmarks.__main__ import main
from stages import fetch


def shard(path: Path, rows: list[tuple[str, bytes]]) -> None:
    """A tar of noise images, each with one more member of the suffix and content given."""
    rng = np.random.default_rng(len(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (suffix, content) in enumerate(rows):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            for end, data in (("png", buffer.getvalue()), (suffix, content)):
                info = tarfile.TarInfo(f"s{number:05d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
    """Four of the paper's sets as 0_data.sh leaves them, and what a download of a fifth leaves that failed."""
    names = ["cat", "dog", "car", "cup", "key"]
    for name, classes in (("cifar10", names), ("imagenet", names), ("imagenet-r", names[3:])):
        labels = [("cls", str(i % len(classes)).encode()) for i in range(10)]
        shard(tmp_path / name / "test" / "0.tar", labels)
        (tmp_path / name / "classnames.txt").write_text("\n".join(classes))
    shard(tmp_path / "cifar10" / "train" / "0.tar", [("cls", str(i % 5).encode()) for i in range(40)])
    shard(tmp_path / "flickr8k" / "test" / "0.tar", [("txt", b"one\ntwo\n")] * 6)
    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd" / ".lock").touch()
    return tmp_path


def test_suite_holds_what_is_there_and_a_remedy_for_the_rest(root):
    suite, missing = paper.suite(root)
    assert set(suite["classification"]) == {"cifar10", "imagenet"} and set(suite["retrieval"]) == {"flickr8k"}
    assert suite["shifts"] == {"imagenet-r": {"folder": "imagenet-r", "of": "imagenet"}} and "mmvp" not in suite
    assert len(missing) == len(paper.SETS) - 4
    assert f"0_data.sh pets --output_dir {root}" in missing["classification/pets"]
    (root / "classification").mkdir()
    (root / "cifar10").rename(root / "classification" / "cifar10")
    assert paper.suite(root)[0]["classification"]["cifar10"] == {"folder": "classification/cifar10"}
    unpacked = root / "classification" / "dtd"
    (unpacked / paper.TORCHVISION["dtd"]).mkdir(parents=True)
    assert paper.suite(root)[0]["classification"]["dtd"] == {"folder": "classification/dtd", "torchvision": "dtd"}


def test_check_says_complete_partial_or_missing(root, monkeypatch):
    monkeypatch.setitem(paper.SETS, "cifar10", paper.SETS["cifar10"]._replace(test=10))
    rows = {name: (state, found) for name, state, found, _, _ in paper.check(root)}
    assert rows["cifar10"] == ("complete", 10) and rows["imagenet-r"] == ("partial", 10)
    assert rows["flickr8k"] == ("partial", 6) and rows["dtd"] == ("missing", 0) and rows["coco"] == ("missing", 0)


def test_every_set_can_be_fetched_and_counts_the_same():
    for name, about in paper.SETS.items():
        assert fetch.SETS[name].expected == about.test


@pytest.mark.slow
def test_command_runs_the_suite_and_lists_what_it_lacks(root, tmp_path, capsys):
    diffclip.save(diffclip.build("CLIP-tiny"), tmp_path / "model")
    options = ["--data-root", str(root)]
    main(["--model", str(tmp_path / "model"), *options, "--suite", "paper", "--out", str(tmp_path / "out")])
    scores = read_json(tmp_path / "out" / "model" / "clip_benchmarks.json")
    assert {"zero_shot/imagenet/top1", "shift/imagenet-r/top1", "linear_probe/cifar10/accuracy"} <= set(
        scores["metrics"]
    )
    assert "retrieval/flickr8k/text_to_image/R@1" in scores["metrics"]
    assert "0_data.sh coco" in scores["skipped"]["retrieval/coco"] and "retrieval/coco" in capsys.readouterr().out
    main(["--model", str(tmp_path / "model"), *options, "--out", str(tmp_path / "told")])  # by the folders' names
    told = read_json(tmp_path / "told" / "model" / "clip_benchmarks.json")
    assert told["metrics"] == scores["metrics"] and told["skipped"] == scores["skipped"]
    main(["data", "check", *options])
    listed = capsys.readouterr().out
    assert "partial" in listed and "0_data.sh mmvp" in listed


def test_an_empty_folder_is_no_suite(tmp_path):
    with pytest.raises(InputError, match="holds none of the paper's sets: see `data check`"):
        main(["--model", "x", "--data_root", str(tmp_path), "--suite", "paper", "--output_dir", str(tmp_path / "out")])
