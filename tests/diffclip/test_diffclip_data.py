"""Image-text sources: every format gives the same pairs, the training order is a permutation, bad data is named."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as F

import diffclip
from diffclip.base.errors import InputError
from diffclip.data import shards as shards_module
from diffclip.data import training_pairs
from diffclip.data.pairs import BadSample, PairTable
from diffclip.data.sources import expand
from diffclip.data.training_pairs import TrainingPairs

PAIRS = 12


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), 20 * (i % 12), dtype=np.uint8))


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


def test_items_of_a_batch_are_those_of_each_place(tmp_path, monkeypatch):
    """Whatever the files are, and whatever stands in for the broken ones, however many are made in one go."""
    rgb = Image.fromarray(noise(40, 56, 3))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    plain = encoded(rgb, "JPEG")
    kinds = {
        "plain.jpg": plain,
        "square.jpg": encoded(rgb.resize((48, 48)), "JPEG"),
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "turned.jpg": encoded(rgb, "JPEG", exif=exif.tobytes()),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "shown.png": encoded(rgb, "PNG"),
        "cut.jpg": plain[: len(plain) // 2],  # of which the header can be read
        "empty.jpg": b"",
    }
    members = {}
    for name, content in kinds.items():
        members |= {name: content, f"{name.split('.')[0]}.txt": name.encode()}
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    config = diffclip.MODELS["CLIP-tiny"]
    for crop in (diffclip.transforms(config, train=True), lambda image: torch.rand(2)):
        pairs = TrainingPairs(
            *(table, crop, diffclip.tokenizer(config)),
            **{"global_batch_size": 8, "epochs": 4, "seed": 0, "bad_samples": tmp_path / "bad.jsonl"},
        )
        singly = [pairs[k] for k in range(32)]
        assert sum(item["bad"] for item in singly) >= 8
        for together in (1, 3, 16):
            monkeypatch.setattr(training_pairs, "TOGETHER", together)
            for one, other in zip(singly, pairs.__getitems__(list(range(32))), strict=True):
                assert {**one, "image": 0, "text": 0} == {**other, "image": 0, "text": 0}
                assert torch.equal(one["image"], other["image"]) and torch.equal(one["text"], other["text"])


def test_crops_are_torchvisions_with_its_draws():
    config = diffclip.MODELS["CLIP-tiny"]
    for interpolation in InterpolationMode.BILINEAR, InterpolationMode.BICUBIC:
        cfg = {**config["preprocess_cfg"], "interpolation": interpolation.value}
        ours = diffclip.transforms({**config, "preprocess_cfg": cfg}, train=True, normalized=False)
        theirs = v2.RandomResizedCrop(cfg["size"], scale=(0.5, 1.0), interpolation=interpolation, antialias=True)
        for height, width in ((300, 200), (90, 91), (64, 64), (20, 400)):
            pixels = torch.from_numpy(noise(height, width, 3)).permute(2, 0, 1)
            for seed in range(5):
                with training_pairs.seeded(seed):
                    box = ours.draw(height, width)
                with training_pairs.seeded(seed):
                    assert torch.equal(ours(pixels), ours(pixels, box))
                with training_pairs.seeded(seed):
                    wanted = theirs(pixels)
                assert torch.equal(ours(pixels, box), wanted), (interpolation, height, width, seed)


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
        for name, content in (("7.jpg", b"no image"), ("7.txt", b"a caption")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"x.tar/7: unreadable pair"):
        PairTable([str(tmp_path / "x.tar")])[0]


def test_a_batch_normalised_at_once_is_bit_for_bit_the_transform():
    config = diffclip.MODELS["DiffCLIP-B-32"]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (300, 260, 3), dtype=np.uint8)) for _ in range(3)]
    one_by_one = torch.stack([diffclip.transforms(config, train=False)(image) for image in images])
    pixels = torch.stack([diffclip.transforms(config, train=False, normalized=False)(image) for image in images])
    assert pixels.dtype == torch.uint8 and torch.equal(diffclip.normalize(config, pixels), one_by_one)


# ---- mixtures


def test_weights_say_how_often_an_epoch_sees_each_source(tmp_path):
    write_shard(tmp_path / "many.tar", range(100))
    write_shard(tmp_path / "few.tar", range(100, 110))
    table = PairTable([str(tmp_path / "many.tar"), str(tmp_path / "few.tar")])
    pairs = TrainingPairs(table, None, None, global_batch_size=1, epochs=2, seed=0, weights=[0.3, 2.5])
    first, second = (pairs.order(epoch).tolist() for epoch in (0, 1))
    assert len(pairs) == 2 * (30 + 25)
    for order in (first, second):
        many = [row for row in order if row < 100]
        few = [row for row in order if row >= 100]
        assert len(many) == len(set(many)) == 30
        assert {few.count(row) for row in range(100, 110)} == {2, 3} and len(few) == 25
    assert set(first) != set(second)  # another draw
    assert [pairs.row(k) for k in range(55)] == first
    with pytest.raises(InputError, match="1 weights for 2 data sources"):
        TrainingPairs(table, None, None, global_batch_size=1, epochs=1, seed=0, weights=[1])


# ---- dirty data


def tar_of(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_unusual_pictures_are_read_as_what_they_show(tmp_path):
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)).quantize(4) for v in (200, 10)]
    rgb = Image.fromarray(np.full((8, 8, 3), (250, 20, 20), np.uint8))
    pictures = {
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG", quality=95), np.asarray(rgb), 12),
        "palette.png": (encoded(rgb.quantize(8), "PNG"), np.asarray(rgb), 2),
        "sixteen.png": (encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), grey[..., None], 0),
        "animated.webp": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), np.uint8(200), 2),
        "grey.jpg": (encoded(Image.fromarray(grey), "JPEG", quality=95), grey[..., None], 6),
    }
    members = {}
    for name, (content, _, _) in pictures.items():
        members |= {name: content, f"{name.split('.')[0]}.txt": b"a caption"}
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    assert len(table) == len(pictures)
    for i, (name, (_, wanted, tolerance)) in enumerate(pictures.items()):
        image, _ = table[i]
        assert image.mode == "RGB" and image.size == (8, 8), name
        assert np.abs(np.asarray(image).astype(int) - wanted.astype(int)).max() <= tolerance, name


def test_what_cannot_be_used_is_named_with_the_reason(tmp_path, monkeypatch):
    whole = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")
    cases = {
        "truncated": (whole[: len(whole) // 2], b"a caption", "truncated"),
        "zero": (b"", b"a caption", "cannot identify"),
        "html": (b"<html>404</html>", b"a caption", "cannot identify"),
        "bomb": (encoded(Image.new("1", (400, 300)), "PNG"), b"a caption", "decompression bomb"),
        "latin": (whole, "café".encode("latin-1"), "codec can't decode"),
        "empty": (whole, b" \n", "empty caption"),
    }
    members = {}
    for name, (picture_bytes, caption, _) in cases.items():
        members |= {f"{name}.jpg": picture_bytes, f"{name}.txt": caption}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval leaves it
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    for i, (name, (_, _, reason)) in enumerate(cases.items()):
        with pytest.raises(BadSample, match=f"x.tar/{name}: unreadable pair") as caught:
            table[i]
        assert reason in caught.value.reason


def test_any_bytes_give_a_picture_or_a_bad_sample(tmp_path):
    """Flip and cut real files at random: nothing but BadSample may come out."""
    rng = np.random.default_rng(0)
    sources = [
        encoded(Image.fromarray(noise(24, 24, 3)), kind)
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
    ]
    members = {}
    for i in range(400):
        content = bytearray(sources[i % len(sources)])
        for at in rng.integers(0, len(content), rng.integers(1, 8)):
            content[at] = rng.integers(0, 256)
        members |= {
            f"{i:03d}.jpg": bytes(content[: rng.integers(1, len(content)) if i % 2 else None]),
            f"{i:03d}.txt": b"a caption",
        }
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    outcomes = {"read": 0, "bad": 0}
    for i in range(len(table)):
        try:
            assert table[i][0].mode == "RGB"
            outcomes["read"] += 1
        except BadSample:
            outcomes["bad"] += 1
    assert min(outcomes.values()) > 20


@pytest.mark.slow
def test_a_bad_sample_is_replaced_and_named(tmp_path):
    members = {}
    for i in range(40):
        members |= {f"{i:02d}.png": b"" if i in (3, 17) else png(i % 12), f"{i:02d}.txt": f"a {i % 12}".encode()}
    named = tmp_path / "bad.jsonl"

    def items():
        return TrainingPairs(
            PairTable([tar_of(tmp_path / "x.tar", members)]),
            lambda image: F.pil_to_tensor(image)[0, :1, :1].float() // 20,
            lambda texts: torch.tensor([[int(t.split()[1])] for t in texts]),
            global_batch_size=4,
            epochs=3,
            seed=0,
            bad_samples=named,
        )

    seen = [items()[k] for k in range(120)]
    assert sum(item["bad"] for item in seen) >= 6  # two in each of three epochs, or more by replacements
    assert all(int(item["image"]) == int(item["text"]) for item in seen)
    once = [json.loads(line) for line in named.read_text().splitlines()]
    assert {line["key"].rsplit("/")[-1] for line in once} == {"03", "17"}
    again = items()
    assert all(torch.equal(again[k]["image"], seen[k]["image"]) for k in reversed(range(120)))
    assert len(named.read_text().splitlines()) >= 4  # another process names them again; keys say that they are the same


def test_shards_that_lack_parts_or_end_early_keep_the_rest(tmp_path):
    members = {f"{i}.{kind}": png(i) if kind == "png" else b"a caption" for i in range(4) for kind in ("png", "txt")}
    whole = tmp_path / "whole.tar"
    tar_of(whole, members | {"lost.txt": b"no image", "mute.png": png(1)})
    table = PairTable([str(whole)])
    assert len(table) == 4
    assert {(key.rsplit("/")[-1], reason) for key, reason in table.problems} == {
        ("lost", "no image"),
        ("mute", "no .txt caption"),
    }
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        places = {m.name: m.offset_data for m in tar}
    for name, at in (("2.png", places["2.png"] + 10), ("2.png header", places["2.png"] - 100)):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(content[:at])
        table = PairTable([str(cut)])
        assert len(table) == 2 and [captions for _, captions in (table[0], table[1])], name
        assert "ends early" in table.problems[0][1], name


def test_a_shard_that_vanishes_gives_bad_samples(tmp_path):
    write_shard(tmp_path / "x.tar", range(4))
    table = PairTable([str(tmp_path / "x.tar")])
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:100])
    with pytest.raises(BadSample, match="shorter"):
        table[2]
    (tmp_path / "x.tar").unlink()
    with pytest.raises(BadSample, match="No such file"):
        table[2]


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png"])
def test_a_member_with_a_path_outside_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="leads outside"):
        PairTable([tar_of(tmp_path / "x.tar", {name: png(1), "1.png": png(1), "1.txt": b"a"})])


def test_an_index_from_the_cache_is_the_index(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards_module, "CACHE_FROM", 0)
    write_shard(tmp_path / "x.tar", range(5))
    tar_of(tmp_path / "y.tar", {"1.png": png(1), "1.txt": b"a", "lost.txt": b"b"})
    sources = [str(tmp_path / "x.tar"), str(tmp_path / "y.tar")]
    walked = PairTable(sources)
    assert len(list((tmp_path / "cache" / "index").glob("*.places"))) == 2
    monkeypatch.setattr(shards_module, "_index", None)  # would fail if called
    cached = PairTable(sources)
    assert contents(cached) == contents(walked) and cached.problems == walked.problems != []
    assert [cached.key(i) for i in range(6)] == [walked.key(i) for i in range(6)]
    monkeypatch.undo()
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    write_shard(tmp_path / "x.tar", range(3))  # another file under the same name is walked again
    assert len(PairTable(sources)) == 4


def test_a_dataset_folder_stands_for_one_of_the_hub(tmp_path, monkeypatch):
    """`hf:` goes to `datasets.load_dataset`, which takes a local folder as it takes a Hub id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"jpg": [{"bytes": png(i), "path": None} for i in range(3)], "txt": [f"a {i}" for i in range(3)]}
    (tmp_path / "owner" / "name").mkdir(parents=True)
    pq.write_table(pa.table(rows), tmp_path / "owner" / "name" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert contents(PairTable(["hf:owner/name"])) == [(i, [f"a {i}"]) for i in range(3)]
    with pytest.raises(InputError, match="hf:owner/other: `datasets` cannot read it"):
        PairTable(["hf:owner/other"])
