"""Two ranks of `torchrun -m diffclip benchmark` write the bits that one process writes."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from launch import call, run_ranks, start_ranks
from PIL import Image
from safetensors.torch import load_file

import diffclip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    diffclip.save(diffclip.build("DiffCLIP-tiny"), folder)
    return folder


@pytest.fixture
def root(tmp_path):
    """Noise in each format: 3 classes of 31 + 5 + 7 images, and 11 images with captions."""
    rng = np.random.default_rng(0)

    def noise() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))

    for split, count in (("train", 31), ("val", 5), ("test", 7)):
        for name in ("cat", "cup", "car"):
            folder = tmp_path / "data/classification/things" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise().save(folder / f"{number:02d}.png")
    (tmp_path / "data/retrieval").mkdir()
    with tarfile.open(tmp_path / "data/retrieval/0.tar", "w") as tar:
        for number in range(11):
            buffer = io.BytesIO()
            noise().save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("txt", f"thing {number}\n".encode())):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return tmp_path / "data"


def arguments(model, root, out):
    options = ["--model", str(model), "--data-root", str(root), "--out", str(out)]
    return ["diffclip.benchmarks", *options, "--batch-size", "8", "--episodes", "20"]


@pytest.mark.slow
def test_two_ranks_give_the_same_features_scores_and_outcomes(model, root, tmp_path):
    torch.set_num_threads(1)  # as the ranks have
    call(*arguments(model, root, tmp_path / "one"))
    told = run_ranks(2, *arguments(model, root, tmp_path / "two"))
    assert told.stdout.count("CLIP benchmarks") == 1
    scores = [json.loads((tmp_path / n / "tiny/clip_benchmarks.json").read_text()) for n in ("one", "two")]
    assert scores[0] == scores[1] and len(scores[0]["metrics"]) > 10
    for kind in (
        "tiny/clip_outcomes.safetensors",
        *(f"features/{p.name}" for p in (tmp_path / "one/features").iterdir()),
    ):
        one, two = (load_file(tmp_path / n / kind) for n in ("one", "two"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not list((tmp_path / "two/features").glob(".*"))


@pytest.mark.slow
def test_a_broken_image_ends_every_rank(model, root, tmp_path):
    (root / "classification/things/train/cat/09.png").write_bytes(b"not an image")  # of the second rank's first batch
    with start_ranks(2, *arguments(model, root, tmp_path / "out"), folder=tmp_path) as processes:
        for process in processes:  # by itself: no launcher kills it
            process.join(120)
        assert [process.exitcode for process in processes] == [2, 2]
    assert (tmp_path / "stderr").read_text().count("cat/09.png cannot be read as an image") == 2
