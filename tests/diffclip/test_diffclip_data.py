"""Image-text sources: every format gives the same pairs, the training order is a permutation, bad data is named."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from diffclip.data import PairTable, TrainingPairs, expand
from diffclip.errors import InputError

PAIRS = 12


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8))


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, indices, captions=True):
    with tarfile.open(path, "w") as tar:
        for i in indices:
            members = {"png": png(i), "json": json.dumps({"captions": [f"a {i}", f"b {i}"]}).encode()}
            if captions:
                members["txt"] = f"a {i}\n".encode()
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "00000.tar", range(5))
    write_shard(tmp_path / "00001.tar", range(5, PAIRS))
    return str(tmp_path / "{00000..00001}.tar")


def contents(table: PairTable) -> list[tuple[int, list[str]]]:
    return [(image.getpixel((0, 0))[0] // 20, captions) for image, captions in (table[i] for i in range(len(table)))]


def test_shards_hold_the_pairs_in_order(shards):
    table = PairTable([shards])
    assert contents(table) == [(i, [f"a {i}"]) for i in range(PAIRS)]
    assert table.key(5).endswith("00001.tar/00005")
    assert contents(PairTable([shards], "json"))[3] == (3, ["a 3", "b 3"])


@pytest.mark.parametrize("suffix, separator", [("csv", ","), ("tsv", "\t")])
def test_tables_of_paths_hold_the_same_pairs(tmp_path, suffix, separator):
    for i in range(PAIRS):
        picture(i).save(tmp_path / f"{i}.png")
    with open(tmp_path / f"pairs.{suffix}", "w", newline="") as f:
        writer = csv.writer(f, delimiter=separator)
        writer.writerows([("image_path", "caption"), *((f"{i}.png", f"a {i}") for i in range(PAIRS))])
    assert contents(PairTable([str(tmp_path / f"pairs.{suffix}")])) == [(i, [f"a {i}"]) for i in range(PAIRS)]


def test_parquet_with_pictures_inside_holds_the_same_pairs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(PAIRS)],
        "caption": [f"a {i}" for i in range(PAIRS)],
    }
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    assert contents(PairTable([str(tmp_path / "p.parquet")])) == [(i, [f"a {i}"]) for i in range(PAIRS)]


def stream(shards, seed=0, epochs=3):
    return TrainingPairs(
        PairTable([shards], "json"),
        lambda image: F.pil_to_tensor(image)[0, :1, :1].float() // 20 + torch.rand(()) / 2,
        lambda texts: torch.tensor([[int(t.split()[1]), int(t[0] == "b")] for t in texts]),
        global_batch_size=5,
        epochs=epochs,
        seed=seed,
    )


def test_each_epoch_is_another_permutation_cut_to_whole_batches(shards):
    items = stream(shards)
    assert len(items) == 3 * 10
    epochs = [[int(items[k]["text"][0]) for k in range(e * 10, e * 10 + 10)] for e in range(3)]
    for order in epochs:
        assert len(set(order)) == 10 and set(order) <= set(range(PAIRS))
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert all(int(items[k]["image"].item()) == items[k]["text"][0] for k in range(30))


def test_an_item_depends_on_seed_and_position_only(shards):
    one, two = stream(shards), stream(shards)
    forwards = [one[k] for k in range(30)]
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    backwards = [two[k] for k in reversed(range(30))][::-1]
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(forwards, backwards):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["text"], b["text"])
    assert len({float(item["image"]) % 1 for item in forwards}) == 30  # each crop is its own
    assert {int(item["text"][1]) for item in forwards} == {0, 1}  # both captions are drawn
    assert any(
        not torch.equal(a["text"], b["text"]) for a, b in zip(forwards, (stream(shards, seed=1)[k] for k in range(30)))
    )


def test_bad_sources_are_named(tmp_path, shards):
    write_shard(tmp_path / "mute.tar", range(3), captions=False)
    with pytest.raises(InputError, match=r"mute.tar: no sample has both an image and a .txt caption"):
        PairTable([str(tmp_path / "mute.tar")])
    (tmp_path / "broken.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(InputError, match=r"broken.tar: not a readable tar"):
        PairTable([str(tmp_path / "broken.tar")])
    (tmp_path / "odd.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"odd.csv: needs an image column"):
        PairTable([str(tmp_path / "odd.csv")])
    with pytest.raises(InputError, match=r"00002.tar: no such file"):
        expand([shards.replace("00001}", "00002}")])
    with pytest.raises(InputError, match="do not fill one batch of 50"):
        TrainingPairs(PairTable([shards]), None, None, global_batch_size=50, epochs=1, seed=0)


def test_a_broken_picture_is_named(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("7.jpg", b"no picture"), ("7.txt", b"a caption")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"x.tar/7: unreadable pair"):
        PairTable([str(tmp_path / "x.tar")])[0]
