"""Pairs as people have them: each is read as what it is or refused by name, by training and benchmarks alike."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.benchmarks.captioned import read_captioned
from diffclip.benchmarks.labelled import read_labelled
from diffclip.data import shards as shards_module
from diffclip.data.pairs import BadSample, PairTable
from diffclip.data.training_pairs import TrainingPairs


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(path, members: list[tuple[str, bytes]]) -> str:
    """A tar of members in this order, names twice where they are given twice."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def contents(table: PairTable) -> list[tuple[int, list[str]]]:
    return [(image.getpixel((0, 0))[0], captions) for image, captions in (table[i] for i in range(len(table)))]


def pairs(*values: int, caption="a {}") -> list[tuple[str, bytes]]:
    return [m for v in values for m in ((f"{v}.png", png(v)), (f"{v}.txt", caption.format(v).encode()))]


# ---- shards


@pytest.mark.parametrize("order", [("jpg", "png"), ("png", "jpg"), ("webp", "PNG"), ("seg.png", "jpg")])
def test_of_two_images_under_one_key_the_first_kind_counts(tmp_path, order):
    value = {"jpg": 10, "png": 200, "PNG": 10, "webp": 200, "seg.png": 200}
    members = [(f"k.{suffix}", png(value[suffix])) for suffix in order] + [("k.txt", b"a photo")]
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    assert contents(table) == [(10, ["a photo"])] and table.problems == []
    if "seg.png" in order:  # under webdataset's rules another member, no second image
        assert table.notices == []
    else:
        assert "several images" in table.notices[0][1] and table.notices[0][0].endswith("x.tar/k")
    captioned = read_captioned(tmp_path / "x.tar")
    assert captioned.images[0][0].getpixel((0, 0)) == (10, 10, 10)


def test_lines_of_a_txt_are_captions_here_and_in_benchmarks(tmp_path):
    text = "\ufeffone\r\ntwo \n\n three\u2028still three\n".encode()
    path = tar_of(tmp_path / "x.tar", [("0.png", png(0)), ("0.txt", text)])
    wanted = ["one", "two", "three\u2028still three"]
    assert contents(PairTable([path])) == [(0, wanted)]
    assert read_captioned(tmp_path / "x.tar").captions == wanted


@pytest.mark.parametrize(
    "members",
    [
        [*pairs(1, 2), *pairs(1, 2, caption="b {}")],
        [*pairs(1), *pairs(1, caption="b {}"), *pairs(2), *pairs(2, caption="b {}")],
        [*pairs(1, 2), *(p for n in (1, 2) for p in reversed(pairs(n, caption="b {}")))],
        [*pairs(1, 2)[::2], *pairs(1, 2)[1::2], *pairs(1, 2, caption="b {}")[::2], *pairs(1, 2, caption="b {}")[1::2]],
    ],
    ids=["joined", "side by side", "caption first", "images first"],
)
def test_keys_that_occur_twice_are_pairs_of_their_own(tmp_path, members):
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    assert sorted((v, c[0]) for v, c in contents(table)) == [(1, "a 1"), (1, "b 1"), (2, "a 2"), (2, "b 2")]
    assert table.problems == [] and "2 keys of the shard occur again" in table.notices[0][1]
    captioned = read_captioned(tmp_path / "x.tar")
    seen = [captioned.images[i][0].getpixel((0, 0))[0] for i in range(4)]
    assert sorted(zip(seen, captioned.captions)) == [(1, "a 1"), (1, "b 1"), (2, "a 2"), (2, "b 2")]


def test_joined_shards_of_two_kinds_of_image_keep_their_pairs_apart(tmp_path):
    second = [("1.jpg", png(50)), ("1.txt", b"of the second")]
    table = PairTable([tar_of(tmp_path / "x.tar", [*pairs(1, 2), *second])])
    assert contents(table) == [(1, ["a 1"]), (2, ["a 2"]), (50, ["of the second"])]


def test_a_tar_sorted_by_kind_is_read_as_ever(tmp_path):
    members = [*pairs(1, 2)[::2], *pairs(1, 2)[1::2], ("1.json", b"{}"), ("2.json", b"{}")]
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    assert contents(table) == [(1, ["a 1"]), (2, ["a 2"])] and not table.problems and not table.notices


def test_litter_of_a_mac_or_windows_is_no_broken_pair(tmp_path):
    litter = [("d/._1.png", b"x"), ("d/._1.txt", b"x"), ("d/.DS_Store", b"x"), ("__MACOSX/d/._1.png", b"x")]
    litter += [("__MACOSX/d/1.png", b"x"), ("d/Thumbs.db", b"x"), ("d/desktop.ini", b"x")]
    members = [("d/1.png", png(1)), ("d/1.txt", b"a 1")]
    table = PairTable([tar_of(tmp_path / "x.tar", [*litter, *members])])
    assert contents(table) == [(1, ["a 1"])] and table.problems == []
    assert len(read_captioned(tmp_path / "x.tar").images) == 1


@pytest.mark.parametrize("size", [0, 10240])
def test_an_empty_shard_is_a_problem_and_not_the_end(tmp_path, size):
    paths = [tar_of(tmp_path / "0.tar", pairs(1)), str(tmp_path / "1.tar"), tar_of(tmp_path / "2.tar", pairs(2))]
    (tmp_path / "1.tar").write_bytes(bytes(size))
    table = PairTable(paths)
    assert contents(table) == [(1, ["a 1"]), (2, ["a 2"])] and table.problems == [(paths[1], "the shard is empty")]
    assert table.ranges == [(0, 1), (1, 1), (1, 2)]
    assert contents(PairTable([str(tmp_path)])) == contents(table)  # the folder of shards
    with pytest.raises(InputError, match=r"1\.tar: the shard is empty"):
        PairTable(paths[1:2])


def test_what_a_shard_without_pairs_holds_is_said(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("0.img", png(0)), ("0.cap", b"a")])
    with pytest.raises(InputError, match=r"x\.tar: no sample has both.*1 keys in it, with \.cap, \.img"):
        PairTable([path])


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar", "with space.tar.gz"])
def test_a_compressed_shard_is_refused_with_the_command_that_helps(tmp_path, name):
    with open(tar_of(tmp_path / "plain", pairs(1, 2)), "rb") as f:
        (tmp_path / name).write_bytes(gzip.compress(f.read()))
    with pytest.raises(InputError, match="compressed") as caught:
        PairTable([str(tmp_path / name)])
    message = str(caught.value)
    assert os.system(message.split("`")[1]) == 0
    assert contents(PairTable([message.rsplit("name ", 1)[1]])) == [(1, ["a 1"]), (2, ["a 2"])]


def test_odd_bytes_in_names_are_read_and_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards_module, "CACHE_FROM", 0)
    odd = os.fsdecode(b"caf\xe9 \xe2\x80\xa8")
    folder = tmp_path / os.fsdecode(b"d\xff")
    folder.mkdir()
    members = [(f"{odd}.png", png(7)), (f"{odd}.txt", b"a 7"), (f"{odd}2.txt", b"lost"), *pairs(1)]
    with tarfile.open(folder / "x.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for _ in range(2):  # walked, then from the cache
        table = PairTable([str(folder / "x.tar")])
        assert contents(table) == [(7, ["a 7"]), (1, ["a 1"])]
        for key in (table.key(0), table.problems[0][0]):
            assert key.rsplit("/", 1)[1].encode().startswith(b"caf\\xe9")


def test_captions_of_a_json_as_a_list_or_under_another_key(tmp_path):
    kinds = {"list": ["one", 2], "many": {"captions": ["x", {"raw": "y"}]}, "one": {"caption": 7}}
    members = [m for k, v in kinds.items() for m in ((f"{k}.png", png(1)), (f"{k}.json", json.dumps(v).encode()))]
    table = PairTable([tar_of(tmp_path / "x.tar", members)], "json")
    assert [captions for _, captions in contents(table)] == [["one", "2"], ["x", "y"], ["7"]]
    bad = {"alt": b'{"alt_text": "a"}', "deep": b"[" * 100_000, "empty": b'{"captions": ["", " "], "caption": ""}'}
    members = [m for k, v in bad.items() for m in ((f"{k}.png", png(1)), (f"{k}.json", v))]
    table = PairTable([tar_of(tmp_path / "y.tar", members)], "json")
    for i, reason in enumerate(("neither `captions` nor `caption`, but alt_text", "recursion", "empty caption")):
        with pytest.raises(BadSample, match=reason):
            table[i]


def test_labels_of_benchmark_shards(tmp_path):
    members = [("1.png", png(1)), ("1.cls", b"4"), ("._1.png", b"x"), ("1.png", png(2)), ("1.cls", b"5\n")]
    tar_of(tmp_path / "x.tar", members)
    found = read_labelled([tmp_path / "x.tar"], "test")
    assert [(image.getpixel((0, 0))[0], label) for image, label in (found[i] for i in range(2))] == [(1, 4), (2, 5)]
    tar_of(tmp_path / "y.tar", [("1.png", png(1)), ("1.cls", b"four")])
    with pytest.raises(InputError, match="label 'four' is no whole number"):
        read_labelled([tmp_path / "y.tar"], "test")


# ---- tables and folders


@pytest.fixture
def images(tmp_path):
    for value in (1, 2, 3):
        (tmp_path / f"{value}.png").write_bytes(png(value))
    return tmp_path


@pytest.mark.parametrize(
    "name, separator", [("x.csv", "\t"), ("x.csv", ";"), ("x.csv", ","), ("x.tsv", ","), ("x.csv", "|")]
)
def test_the_header_tells_the_separator_and_cells_are_text(images, name, separator):
    cells = [("1.png", "None"), ("2.png", "007"), ("3.png", "1.50")]
    rows = [separator.join(("\ufefffilepath", "other", "title")), *(separator.join((a, "", b)) for a, b in cells)]
    (images / name).write_bytes("\r\n".join([*rows, ""]).encode())
    assert contents(PairTable([str(images / name)])) == [(1, ["None"]), (2, ["007"]), (3, ["1.50"])]


def test_quotes_in_a_tsv_are_text_and_swallow_nothing(images):
    lines = ["image_path\tcaption", '1.png\t"Big" sale', '2.png\t"unclosed', '3.png\tend" of it', ""]
    (images / "x.tsv").write_text("\n".join(lines))
    assert contents(PairTable([str(images / "x.tsv")])) == [
        (1, ['"Big" sale']),
        (2, ['"unclosed']),
        (3, ['end" of it']),
    ]


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize(
    "header, cells", [("image_path,caption", "{0}.png,{1}"), ("caption,image_path", "{1},{0}.png")]
)
def test_a_quote_in_a_csv_that_swallows_rows_is_refused(images, separator, header, cells):
    rows = [header, cells.format(1, '"so it began'), cells.format(2, "b"), cells.format(3, 'c" or not')]
    (images / "x.csv").write_text("\n".join(rows).replace(",", separator) + "\n")
    with pytest.raises(InputError, match=r"x\.csv: "):
        PairTable([str(images / "x.csv")])
    good = f'image_path{separator}caption\n1.png{separator}"two\nlines{separator} one ""caption"""\n'
    (images / "y.csv").write_text(good)
    assert contents(PairTable([str(images / "y.csv")])) == [(1, [f'two\nlines{separator} one "caption"'])]


def test_rows_of_another_length_and_encoding_are_named(images):
    (images / "x.csv").write_text("image_path,caption\n1.png,a\n2.png,red, car\n")
    with pytest.raises(InputError, match=r"x\.csv: cannot be read as a table.*Expected 2 columns, got 3"):
        PairTable([str(images / "x.csv")])
    (images / "x.csv").write_bytes("image_path,caption\n1.png,a\n2.png,café\n".encode("latin1"))
    with pytest.raises(InputError, match=r"x\.csv:3: not UTF-8; convert it, e\.g\. by `iconv -f latin1") as caught:
        PairTable([str(images / "x.csv")])
    assert os.system(f"cd {images} && {str(caught.value).split('`')[1]}") == 0
    assert contents(PairTable([str(images / "new.csv")])) == [(1, ["a"]), (2, ["café"])]
    (images / "x.csv").write_bytes("image_path,caption\n1.png,a\n".encode("utf-16"))  # its mark says so
    assert contents(PairTable([str(images / "x.csv")])) == [(1, ["a"])]


def test_line_ends_of_old_macs_are_named(images):
    (images / "x.csv").write_bytes(b"filepath,title\r1.png,a\r2.png,b\r")
    with pytest.raises(InputError, match=r"x\.csv: its first line cannot be read .*end its lines with"):
        PairTable([str(images / "x.csv")])


def test_failed_downloads_are_no_broken_pairs(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    status = ["success", "failed_to_download", "success", "failed_to_resize", "success"]
    rows = {
        "jpg": [png(1), None, None, None, png(5)],
        "caption": [f"a {i}" for i in range(1, 6)],
        "status": status,
    }
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    table = PairTable([str(tmp_path / "x.parquet")])
    assert len(table) == 3 and table.problems == [] and "2 rows whose download failed" in table.notices[0][1]
    assert table[0][1] == ["a 1"] and table[2][1] == ["a 5"] and table.key(2).endswith("x.parquet:4")
    with pytest.raises(BadSample, match=r"x\.parquet:2: unreadable pair \(no image"):
        table[1]  # its download did not fail
    struct = {**rows, "jpg": [None if b is None else {"bytes": b, "path": None} for b in rows["jpg"]]}
    pq.write_table(pa.table(struct), tmp_path / "y.parquet")
    assert len(PairTable([str(tmp_path / "y.parquet")])) == 3


def test_captions_of_a_parquet_in_many_forms(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    forms = {"bytes": [b"a"], "numbers": [7], "lists": [["a", "b"]], "structs": [[{"raw": "a"}]]}
    for name, caption in forms.items():
        pq.write_table(pa.table({"image": [png(1)], "alt_text": caption}), tmp_path / f"{name}.parquet")
    found = {name: contents(PairTable([str(tmp_path / f"{name}.parquet")])) for name in forms}
    assert found == {
        "bytes": [(1, ["a"])],
        "numbers": [(1, ["7"])],
        "lists": [(1, ["a", "b"])],
        "structs": [(1, ["a"])],
    }


def test_a_folder_of_files_is_a_source(tmp_path):
    for folder, value in (("b", 3), ("a", 1), ("a", 2)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{value}.png").write_bytes(png(value))
        (tmp_path / folder / f"{value}.txt").write_text(f"a {value}")
    (tmp_path / "a" / "._1.png").write_bytes(b"x")
    (tmp_path / "a" / "mute.png").write_bytes(png(9))
    (tmp_path / "a" / "lost.txt").write_text("x")
    table = PairTable([str(tmp_path)])
    assert contents(table) == [(1, ["a 1"]), (2, ["a 2"]), (3, ["a 3"])]
    assert {(os.path.basename(key), reason) for key, reason in table.problems} == {
        ("mute.png", "no .txt caption"),
        ("lost.txt", "no image"),
    }
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: holds neither shards"):
        PairTable([str(tmp_path / "none")])


def test_links_and_capitals_in_a_folder_of_files(tmp_path):
    for folder, value in (("own", 1), ("elsewhere", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{value}.PNG").write_bytes(png(value))
        (tmp_path / folder / f"{value}.TXT").write_text(f"a {value}")
    (tmp_path / "own" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "again").symlink_to(tmp_path / "own")  # round and round
    table = PairTable([str(tmp_path / "own")])
    assert contents(table) == [(1, ["a 1"]), (2, ["a 2"])] and table.problems == []


# ---- the cases that users have


CASES = {
    "two-pictures-one-key.tar": 4,
    "same-keys-twice.tar": 8,
    "macos.tar": 4,
    "empty-shard": 8,
    "img2dataset-wds": 4,
    "img2dataset-files": 4,
    "img2dataset-failed-rows.parquet": 7,
    "csv/openclip_tabs.csv": 4,
    "csv/semicolon.csv": 4,
    "csv/numbers.csv": 6,
    "csv/na.csv": 6,
    "csv/quote.tsv": 4,
    "parquet/alt.parquet": 4,
    "parquet/bytes.parquet": 4,
    "parquet/structs.parquet": 4,
}
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "cyan", "pink")


@pytest.mark.parametrize("name", CASES)
def test_pairs_as_users_have_them(name, shared_cases):
    table = PairTable([str(shared_cases(f"pairs/{name}"))])
    assert len(table) == CASES[name]
    for image, (caption,) in (table[i] for i in range(len(table))):
        if " square with a spot, number " in caption:  # the photo is of the colour that its caption says
            red, green, blue = np.asarray(image).reshape(-1, 3).mean(0)
            said = caption.split()[1]
            if said in ("red", "green", "blue"):
                assert said == ("red", "green", "blue")[int(np.argmax((red, green, blue)))], (name, caption)


def test_five_captions_of_a_txt(shared_cases):
    path = shared_cases("pairs/five-lines-a-txt.tar")
    table, captioned = PairTable([str(path)]), read_captioned(path)
    assert table[0][1] == [f"caption {n} of red" for n in range(5)] == captioned.captions[:5]
    assert [len(table[i][1]) for i in range(4)] == [5] * 4 and len(captioned.captions) == 20


# ---- replacements


def test_a_source_of_weight_0_is_no_replacement(tmp_path):
    broken = [(n, b"" if n.endswith(("0.png", "5.png")) else c) for n, c in pairs(*range(40))]
    sources = [tar_of(tmp_path / "mixed.tar", broken), tar_of(tmp_path / "never.tar", pairs(*range(100, 200)))]

    def values(weights):
        stream = TrainingPairs(
            PairTable(sources),
            lambda image: np.asarray(image)[0, 0, 0],
            lambda texts: texts,
            global_batch_size=1,
            epochs=2,
            seed=0,
            weights=weights,
            bad_samples=tmp_path / "bad.jsonl",
        )
        return [(int(stream[k]["image"]), stream[k]["bad"]) for k in range(len(stream))]

    seen = values([1, 0])
    assert sum(bad for _, bad in seen) >= 16 and max(value for value, _ in seen) < 40
    assert seen == values([1, 0])
    few = values([1, 0.02])  # of the second source, replacements are what the epoch sees of it anyway
    for epoch in (few[:42], few[42:]):
        assert len({value for value, _ in epoch if value >= 100}) <= 2


def test_weights_that_leave_nothing_or_everything_are_refused(tmp_path):
    table = PairTable([tar_of(tmp_path / "a.tar", pairs(1, 2)), tar_of(tmp_path / "b.tar", pairs(3))])
    for weights, words in (([0, 0], "one of the weights more than 0"), ([1, np.inf], "of 0"), ([np.nan, 1], "of 0")):
        with pytest.raises(InputError, match=words):
            TrainingPairs(table, None, None, global_batch_size=1, epochs=1, seed=0, weights=weights)


def test_replacements_without_weights_are_those_of_before(tmp_path):
    """Drawn by (seed, k, tries) from the whole table: a resumed run goes on with the same pairs."""
    members = [(n, b"" if n in ("3.png", "5.png") else c) for n, c in pairs(*range(10))]
    stream = TrainingPairs(
        PairTable([tar_of(tmp_path / "x.tar", members)]),
        lambda image: np.asarray(image)[0, 0, 0],
        lambda texts: texts,
        global_batch_size=1,
        epochs=3,
        seed=4,
        bad_samples=tmp_path / "bad.jsonl",
    )
    for k in range(30):
        row, bad = stream.row(k), 0
        while row in (3, 5):
            bad += 1
            row = int(np.random.default_rng((4, k, bad)).integers(10))
        assert (int(stream[k]["image"]), stream[k]["bad"]) == (row, bad)
