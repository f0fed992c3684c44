"""R@k against the official numbers, clip-benchmark and a sort; readers on real and on broken files."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.benchmarks.captioned import read_captioned
from diffclip.benchmarks.retrieval import ranks, recall_at_k


def test_recall_matches_the_official_numbers(golden):
    folder = golden("07c_zeroshot_retrieval")
    features = {k: torch.from_numpy(v) for k, v in np.load(folder / "features.npz").items()}
    expected = json.loads((folder / "expected.json").read_text())["retrieval_clip_benchmark"]
    ours = recall_at_k(features["ret_image"], features["ret_text"], features["ret_text_owner"])
    for k in (1, 5, 10):
        # clip-benchmark names the side that is retrieved
        assert ours[f"text_to_image/R@{k}"] / 100 == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours[f"image_to_text/R@{k}"] / 100 == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-6)


def random_set(images, captions, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(images, (captions - images,), generator=generator)
    owner = torch.cat([torch.arange(images), extra])[torch.randperm(captions, generator=generator)]
    return (
        torch.randn(images, width, generator=generator),
        torch.randn(captions, width, generator=generator),
        owner,
    )


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_ranks_equal_a_full_sort_in_any_block_size(block):
    image, text, owner = random_set(40, 130)
    similarity = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    found = ranks(image, text, owner, block=block)
    for t in range(130):
        assert similarity[t].argsort(descending=True).tolist().index(owner[t]) == found.text_to_image[t]
    for i in range(40):
        order = owner[similarity[:, i].argsort(descending=True)].tolist()
        assert order.index(i) == found.image_to_text[i]


def test_recall_equals_clip_benchmark():
    from clip_benchmark.metrics import zeroshot_retrieval as theirs

    image, text, owner = random_set(30, 75, seed=3)
    scores = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(75), owner] = True
    ours = recall_at_k(image, text, owner)
    for k in (1, 5, 10):
        to_image = (theirs.recall_at_k(scores, positive, k) > 0).float().mean().item()
        to_text = (theirs.recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert ours[f"text_to_image/R@{k}"] / 100 == pytest.approx(to_image, abs=1e-6)
        assert ours[f"image_to_text/R@{k}"] / 100 == pytest.approx(to_text, abs=1e-6)


def test_a_collapsed_model_is_at_chance():
    owner = torch.arange(50)
    found = recall_at_k(torch.ones(50, 8), torch.ones(50, 8), owner)
    assert found["text_to_image/R@1"] == pytest.approx(2)
    assert found["image_to_text/R@10"] == pytest.approx(20)


def test_owners_must_fit():
    image, text, owner = random_set(4, 6)
    with pytest.raises(ValueError, match="text_owner"):
        ranks(image, text, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="text_owner"):
        ranks(image[:3], text, owner)


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_shards_are_read_in_order(tmp_path):
    write_tar(tmp_path / "00000.tar", {"a.png": png("red"), "a.txt": b"one\n\n two \n", "a.json": b"{}"})
    write_tar(tmp_path / "00001.tar", {"b.txt": b"three", "b.png": png("lime")})
    found = read_captioned(tmp_path)
    assert found.captions == ["one", "two", "three"]
    assert found.owner == [0, 0, 1]
    assert [found.images[i][0].getpixel((0, 0)) for i in range(2)] == [(255, 0, 0), (0, 255, 0)]


@pytest.mark.parametrize(
    "members,message",
    [
        ({"a.png": b"x", "b.png": b"x", "b.txt": b"b"}, r"00000\.tar/a cannot be scored \(no \.txt caption\)"),
        ({"a.png": b"x", "a.txt": b" \n"}, r"00000\.tar/a has no caption that can be read \(empty"),
        ({"a.txt": b"x", "b.png": b"x", "b.txt": b"b"}, r"00000\.tar/a cannot be scored \(no image\)"),
        ({}, "shard is empty"),
    ],
)
def test_incomplete_shards_are_named(tmp_path, members, message):
    write_tar(tmp_path / "00000.tar", members)
    with pytest.raises(InputError, match=message):
        read_captioned(tmp_path)


def test_what_is_not_a_retrieval_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds neither shards"):
        read_captioned(tmp_path)
    with pytest.raises(InputError, match="gone does not exist"):
        read_captioned(tmp_path / "gone")
    (tmp_path / "00000.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(InputError, match="not a readable tar file"):
        read_captioned(tmp_path)


def test_captions_json_forms_agree(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    plain, karpathy = tmp_path / "plain.json", tmp_path / "karpathy.json"
    plain.write_text(json.dumps({"a.png": ["one", "two"], "b.png": ["three"]}))
    rows = [
        {"filename": "a.png", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "gone.png", "split": "train", "sentences": [{"raw": "not this"}]},
        {"filename": "b.png", "split": "test", "sentences": [{"raw": "three"}]},
    ]
    karpathy.write_text(json.dumps({"images": rows}))
    for path in (plain, karpathy):
        found = read_captioned(path)
        assert (found.captions, found.owner) == (["one", "two", "three"], [0, 0, 1])
        assert found.images[1][0].getpixel((0, 0)) == (0, 0, 255)
    plain.write_text(json.dumps({"gone.png": ["x"]}))
    with pytest.raises(InputError, match=r"gone\.png"):
        read_captioned(plain)


def test_parquet_with_image_structs(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = {"image": [{"bytes": png("red"), "path": "a"}, {"bytes": png("blue"), "path": "b"}]}
    pyarrow.parquet.write_table(pyarrow.table({**rows, "caption": [["x", "y"], ["z"]]}), tmp_path / "a.parquet")
    found = read_captioned(tmp_path)
    assert (found.captions, found.owner) == (["x", "y", "z"], [0, 0, 1])
    assert found.images[0][0].getpixel((0, 0)) == (255, 0, 0)
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"needs an image column .* and a caption column .*found image"):
        read_captioned(tmp_path)


def test_real_sets(shared_data):
    flickr = read_captioned(shared_data("flickr8k") / "retrieval_dev" / "wds")
    assert (len(flickr.images), len(flickr.captions)) == (1000, 5000)
    assert flickr.images[999][0].size == (112, 112)
    fashion = read_captioned(shared_data("fashion") / "retrieval_dev" / "dev.parquet")
    assert len(fashion.images) == len(fashion.captions) == 1000
    assert fashion.images[0][0].size == (60, 80)
