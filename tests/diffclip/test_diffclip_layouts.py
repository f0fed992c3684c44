"""Layouts of pairs as tools write them: read as what they are, by training and evaluation alike, or refused by name."""

import base64
import gzip
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.benchmarks.captioned import read_captioned
from diffclip.data import shards as shards_module
from diffclip.data import training_pairs
from diffclip.data.layout import Layout
from diffclip.data.pairs import BadSample, PairTable
from diffclip.data.training_pairs import TrainingPairs
from stages import pretraining
from stages.settings import PretrainConfig

datasets.disable_progress_bars()


def image(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def write(folder, contents: dict[str, bytes | str]):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tar_of(path, members: list[tuple[str, bytes | tuple[bytes, str]]]) -> str:
    """A tar; a member of (type, name) is a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def pair(value: int, folder: str = "") -> list[tuple[str, bytes]]:
    return [(f"{folder}{value}.png", image(value)), (f"{folder}{value}.txt", f"a {value}".encode())]


def contents(source, **settings) -> list[tuple[int, list[str]]]:
    table = PairTable([str(source)], **settings)
    return [(picture.getpixel((0, 0))[0], captions) for picture, captions in (table[i] for i in range(len(table)))]


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


A_TO_C = {f"{value}.png": image(value) for value in (1, 2, 3)}

# ---- shards


def test_members_are_named_by_settings_and_the_first_that_a_sample_has_counts(tmp_path):
    members = [("1.img", image(1)), ("1.cap", b"a"), ("2.pic", image(2)), ("2.txt", b"b"), ("2.cap", b"c")]
    path = tar_of(tmp_path / "x.tar", members)
    wanted = [(1, ["a"]), (2, ["c"])]
    assert contents(path, image_member=["img", "pic"], caption_member=["cap", "txt"]) == wanted
    assert contents(path, image_member=".IMG;pic", caption_member="cap;txt") == wanted  # as webdataset writes it
    with pytest.raises(InputError, match=r"with \.cap, \.img, \.pic, \.txt\); set image_member and caption_member"):
        PairTable([path])


def test_the_key_of_a_json_is_named_by_a_setting(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("1.png", image(1)), ("1.json", b'{"syn": "s", "alt": ["a", "b"]}')])
    assert contents(path, caption_member="json", caption_column="syn") == [(1, ["s"])]
    assert contents(path, caption_member="json", caption_column=["syn", "alt"]) == [(1, ["s", "a", "b"])]
    with pytest.raises(BadSample, match=r"neither .* but syn, alt; set caption_column"):
        contents(path, caption_member="json")


def test_links_in_a_tar_are_what_they_point_to(tmp_path):
    links = [("d/2.png", (tarfile.LNKTYPE, "d/1.png")), ("d/2.txt", b"hard")]
    links += [("d/3.png", (tarfile.SYMTYPE, "1.png")), ("d/3.txt", b"soft")]
    links += [("d/4.png", (tarfile.SYMTYPE, "gone.png")), ("d/4.txt", b"lost")]
    table = PairTable([tar_of(tmp_path / "x.tar", [*pair(1, "d/"), *links])])
    assert [table[i][1] for i in range(len(table))] == [["a 1"], ["hard"], ["soft"]]
    assert [table[i][0].getpixel((0, 0))[0] for i in range(3)] == [1, 1, 1]
    assert [reason for _, reason in table.problems] == ["no image"]


def test_tars_joined_by_cat_are_read_to_the_last(tmp_path):
    parts = [Path(tar_of(tmp_path / f"{v}.tar", pair(v))).read_bytes() for v in (1, 2, 3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    assert contents(tmp_path / "all.tar") == [(v, [f"a {v}"]) for v in (1, 2, 3)]
    (tmp_path / "cut.tar").write_bytes(b"".join(parts[:2])[:-10000])
    (tmp_path / "junk.tar").write_bytes(parts[0] + b"no tar" * 1000)
    for name in ("cut", "junk"):
        table = PairTable([str(tmp_path / f"{name}.tar")])
        assert table[0][1] == ["a 1"] and "ends early" in table.problems[0][1]


def test_names_with_dots_are_parted_at_the_last_where_the_first_gives_no_pair(tmp_path):
    members = [(f"example.com_{v}.{kind}", c) for v in (1, 2) for kind, c in (("png", image(v)), ("txt", b"a"))]
    table = PairTable([tar_of(tmp_path / "x.tar", members)])
    assert len(table) == 2 and "parted at the last" in table.notices[0][1] and table.problems == []
    assert len(PairTable([tar_of(tmp_path / "y.tar", [("k.seg.png", image(9)), *pair(1)])])) == 1


def test_a_text_of_another_encoding_is_read_by_the_setting(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("1.png", image(1)), ("1.txt", "café".encode("latin1"))])
    assert contents(path, encoding="latin1") == [(1, ["café"])]
    with pytest.raises(InputError, match="setting `encoding`: there is no 'utf9'"):
        contents(path, encoding="utf9")


def test_half_of_a_surrogate_pair_is_a_bad_pair_before_a_tokenizer_sees_it(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("1.png", image(1)), ("1.json", b'{"caption": "\\ud83d"}')])
    with pytest.raises(BadSample, match="surrogates not allowed"):
        contents(path, caption_member="json")


def test_pairs_are_read_from_the_index_file_and_survive_its_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards_module, "CACHE_FROM", 0)
    tar_of(tmp_path / "x.tar", [*pair(1), ("2.bmp", image(2, "BMP")), ("2.txt", b"a 2")])
    table = PairTable([str(tmp_path / "x.tar")])
    assert table.parts[0].records is None and table[0][1] == ["a 1"]  # nothing of it is held in memory
    assert len(PairTable([str(tmp_path / "x.tar")], image_member=["png", "bmp"])) == 2  # another index
    for file in (tmp_path / "cache" / "index").iterdir():
        file.unlink()
    assert table[0][1] == ["a 1"] and table.key(0).endswith("x.tar/1")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(shards_module, "CACHE_FROM", 0)
    assert contents(tar_of(tmp_path / "x.tar", pair(1))) == [(1, ["a 1"])]


# ---- img2dataset, as its three writers leave a folder


def record(value: int) -> dict:
    status = "failed_to_download" if value == 4 else "success"
    caption = None if value == 3 else f"a {value}"
    size = None if value == 4 else 8
    error = "HTTP Error 404" if value == 4 else None
    names = {"url": f"http://example.org/{value}", "caption": caption, "key": f"00000000{value}", "status": status}
    return {**names, "error_message": error, "width": size, "height": size, "exif": "{}", "sha256": "x"}


def records(**more):
    rows = [record(value) for value in (1, 2, 3, 4)]
    return {name: [row[name] for row in rows] for name in rows[0]} | more


@pytest.mark.parametrize("kind", ["webdataset", "files", "parquet"])
def test_an_output_of_img2dataset_is_a_source_as_it_is(tmp_path, kind):
    write(tmp_path, {"00000_stats.json": '{"count": 4}'})
    (tmp_path / "_tmp").mkdir()
    extra = {"jpg": [image(1), image(2), image(3), None]} if kind == "parquet" else {}
    parquet(tmp_path / "00000.parquet", **records(**extra))
    parts = {  # of a row without a caption an empty text
        f"00000000{v}.{suffix}": content
        for v in (1, 2, 3)
        for suffix, content in (
            ("jpg", image(v, "JPEG")),
            ("json", json.dumps(record(v)).encode()),
            ("txt", b"" if v == 3 else f"a {v}".encode()),
        )
    }
    if kind == "webdataset":
        tar_of(tmp_path / "00000.tar", list(parts.items()))
    if kind == "files":
        write(tmp_path / "00000", parts)
    for source in (tmp_path, tmp_path / "*"):
        table = PairTable([str(source)])
        assert [table[i][1] for i in (0, 1)] == [["a 1"], ["a 2"]] and len(table) == 3 and table.problems == []
        with pytest.raises(BadSample, match="empty caption"):
            table[2]
    if kind != "parquet":
        assert PairTable([str(tmp_path)], caption_member="json")[1][1] == ["a 2"]
        with pytest.raises(InputError, match="record of a download and holds no images"):
            PairTable([str(tmp_path / "00000.parquet")])


def test_lists_of_addresses_are_sent_to_the_command_that_fetches_them(tmp_path):
    write(tmp_path, {"u.csv": "url,caption\nhttp://a/b.jpg,c\n", "v.csv": "image,caption\nhttp://a/b.jpg,c\n"})
    for name in ("u.csv", "v.csv"):
        with pytest.raises(InputError, match="diffclip data pairs"):
            PairTable([str(tmp_path / name)])


# ---- folders


def packed(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)  # tests are named by it, in every process alike


@pytest.mark.parametrize(
    "name, text",
    [
        ("metadata.csv", "file_name,text\n1.png,a\n2.png,b\n"),
        ("metadata.jsonl", '{"file_name": "1.png", "text": "a"}\n{"file_name": "2.png", "text": ["b"]}\n'),
        ("captions.json", '{"1.png": ["a"], "2.png": "b"}'),
        ("captions.json", '{"image": ["1.png", "2.png"], "caption": ["a", "b"]}'),
        ("rows.json", '[{"image": "1.png", "caption": "a"}, {"image": "2.png", "captions": null, "caption": "b"}]'),
        ("rows.jsonl.gz", packed('\ufeff{"image":"1.png","text":"a"}\n\n{"image":"2.png","text":"b"}')),
        ("table.csv.gz", packed("image;caption\n1.png;a\n2.png;b\n")),
        ("results.csv", 'image_name| comment_number| comment\n1.png| 0| a\n2.png| 1   b\n'),
        ("r.tsv", '"image_path"\t"caption"\n"1.png"\t"a"\n"2.png"\t"b"\n'),
        ("pandas.csv", "\n,image,caption\n0,1.png,a\n1,2.png,b\n"),
        ("windows.csv", "\ufeffImage,Caption\r\n.\\1.png,a\r\n.\\2.png,b\r\n"),
    ],
)  # fmt: skip
def test_a_table_beside_its_images_is_read_by_its_name_or_its_folder(tmp_path, name, text):
    write(tmp_path, {**A_TO_C, name: text})
    for source in (tmp_path, tmp_path / name):
        assert contents(source) == [(1, ["a"]), (2, ["b"])]
        found = read_captioned(source)
        assert found.captions == ["a", "b"] and found.images[1][0].getpixel((0, 0)) == (2, 2, 2)


def test_a_folder_takes_every_kind_of_image_and_names_what_has_no_partner(tmp_path):
    kinds = {
        "1.bmp": image(1, "BMP"),
        "2.jfif": image(2, "JPEG"),
        "3.gif": image(3, "GIF"),
        "mute.tif": image(4, "TIFF"),
    }
    write(tmp_path, {**kinds, "1.txt": "a", "2.txt": "b", "3.TXT": "c"})
    assert [captions for _, captions in contents(tmp_path)] == [["a"], ["b"], ["c"]]
    assert [reason for _, reason in PairTable([str(tmp_path)]).problems] == ["no .txt caption"]
    assert contents(tmp_path, image_member="bmp") == [(1, ["a"])]
    write(tmp_path / "of_caption", {"1.png": image(1), "1.caption": "a"})
    with pytest.raises(InputError, match=r"but \.caption, \.png; set image_member and caption_member"):
        PairTable([str(tmp_path / "of_caption")])
    assert contents(tmp_path / "of_caption", caption_member="caption") == [(1, ["a"])]


@pytest.mark.parametrize("kind", ["shards", "files", "metadata", "parquet", "names of files", "names of shards"])
def test_of_a_folder_with_splits_one_is_read_and_the_rest_is_said(tmp_path, kind):
    for split, value in (("train", 1), ("validation", 2), ("test", 3)):
        folder = tmp_path / split
        if kind == "shards":
            tar_of(folder / "0.tar", pair(value))
        elif kind == "files":
            write(folder, dict(pair(value)))
        elif kind == "metadata":
            write(folder, {f"{value}.png": image(value), "metadata.csv": f"file_name,text\n{value}.png,a {value}\n"})
        elif kind == "names of shards":
            tar_of(tmp_path / f"cc3m-{split}-0000.tar", pair(value))
        elif kind == "parquet":
            folder.mkdir()
            parquet(folder / "0.parquet", image=[image(value)], caption=[f"a {value}"])
        else:
            (tmp_path / "data").mkdir(exist_ok=True)
            name = f"{split}-00000-of-00001.parquet"
            parquet(tmp_path / "data" / name, image=[image(value)], caption=[f"a {value}"])
    assert contents(tmp_path) == [(1, ["a 1"])]
    assert "1 files of its split train are read, of 3" in PairTable([str(tmp_path)]).notices[0][1]
    assert contents(tmp_path, split="val") == contents(tmp_path, prefer=("val", "test")) == [(2, ["a 2"])]
    assert read_captioned(tmp_path).captions == ["a 3"]
    with pytest.raises(InputError, match=r"has no split held_out, but (test|train), "):
        PairTable([str(tmp_path)], split="held_out")


def test_files_of_no_split_beside_those_of_one_are_not_dropped_in_silence(tmp_path):
    for name, value in (("train-0.tar", 1), ("more.tar", 2)):
        tar_of(tmp_path / name, pair(value))
    with pytest.raises(InputError, match="holds several splits"):
        PairTable([str(tmp_path)])
    assert contents(tmp_path / "*.tar") == [(2, ["a 2"]), (1, ["a 1"])]  # what the message advises
    write(tmp_path / "stations", {"train-1.png": image(1), "train-1.txt": "a", "bus.png": image(2), "bus.txt": "b"})
    assert len(PairTable([str(tmp_path / "stations")])) == 2  # names of images are no splits


def test_a_split_of_data_without_splits_is_refused(tmp_path):
    path = tar_of(tmp_path / "x.tar", pair(1))
    write(tmp_path, {**A_TO_C, "x.csv": "image,caption\n1.png,a\n"})
    for source in (path, str(tmp_path / "x.csv")):
        with pytest.raises(InputError, match=r"setting `split` test: .* holds no splits; leave it out"):
            PairTable([source], split="test")


def test_what_else_a_folder_holds_is_said(tmp_path):
    tar_of(tmp_path / "a" / "0.tar", pair(1))
    parquet(tmp_path / "a" / "0.parquet", url=["u"], caption=["a 1"], status=["success"])  # of img2dataset
    (tmp_path / "b").mkdir()
    parquet(tmp_path / "b" / "0.parquet", image=[image(2)], caption=["b"])
    assert contents(tmp_path) == [(1, ["a 1"])]
    (notice,) = PairTable([str(tmp_path)]).notices
    assert notice[1] == "its shards are read, its parquet files with images are not"
    assert PairTable([str(tmp_path / "a")]).notices == []


def test_tables_of_captions_are_told_from_what_lies_beside_them(tmp_path):
    write(tmp_path, {**A_TO_C, "info.json": '{"licence": "none"}', "x.csv": "image,caption\n1.png,a\n"})
    assert contents(tmp_path) == [(1, ["a"])]
    assert PairTable([str(tmp_path)]).notices == [(str(tmp_path), "its .csv files are read, its .json are not")]
    write(tmp_path, {"info.json": '{"annotations": [{"image": "2.png", "caption": "b"}]}', "x.csv": "a,b\n1,2\n"})
    assert contents(tmp_path) == [(2, ["b"])]
    (tmp_path / "info.json").unlink()
    with pytest.raises(InputError, match=r"x\.csv: needs an image column"):
        PairTable([str(tmp_path)])
    write(tmp_path, {"1.txt": "of a file"})
    assert contents(tmp_path) == [(1, ["of a file"])]
    assert PairTable([str(tmp_path)]).notices[0][1] == "is not read: the captions beside the images are"


def test_patterns_and_names_that_look_like_them(tmp_path):
    for name, value in (("x[1].tar", 1), ("y{1}.tar", 2), ("deep/er/z.tar", 3)):
        tar_of(tmp_path / name, pair(value))
    assert [contents(tmp_path / name)[0][0] for name in ("x[1].tar", "y{1}.tar", "deep/**/*.tar", "deep")] == [
        1,
        2,
        3,
        3,
    ]


def test_a_file_of_another_split_than_the_one_asked_for_is_refused(tmp_path):
    path = tar_of(tmp_path / "cc3m-train-0.tar", pair(1))
    with pytest.raises(InputError, match=r"train-0\.tar: is of the split train by its name, and `split` says val"):
        PairTable([path], split="val")
    assert contents(path, split="training") == [(1, ["a 1"])]


# ---- tables


@pytest.mark.parametrize("names", [("z/1.png", "z/2.png"), ("/export/a/1.png", "/export/b/2.png"), ("C:\\x\\1.png",)])
def test_folders_that_only_the_author_had_are_left_out_of_names(tmp_path, names):
    write(tmp_path / "pictures", A_TO_C)
    write(tmp_path, {"x.csv": "image,caption\n" + "".join(f"{name},a\n" for name in names)})
    assert [value for value, _ in contents(tmp_path / "x.csv")] == [1, 2][: len(names)]


def test_names_of_two_files_never_come_to_mean_one(tmp_path):
    write(tmp_path / "pictures", {**A_TO_C, "deep/1.png": image(9)})
    write(tmp_path, {"x.csv": "image,caption\ncats/1.png,a\ndogs/1.png,b\n"})
    with pytest.raises(InputError, match=r"there is no dogs/1\.png"):
        PairTable([str(tmp_path / "x.csv")])
    write(tmp_path, {"x.csv": "image,caption\nall/deep/1.png,a\nall/1.png,b\n"})  # all/ is left out of both
    assert contents(tmp_path / "x.csv") == [(9, ["a"]), (1, ["b"])]
    write(tmp_path, {"x.csv": "image,caption\n../1.png,a\n"})  # not pictures/../1.png, nor pictures/1.png
    with pytest.raises(InputError, match=r"there is no \.\./1\.png"):
        PairTable([str(tmp_path / "x.csv")])


def test_lists_of_cells_are_captions_and_brackets_of_a_caption_stay(tmp_path):
    cells = ["['a', \"it's\"]", '["\\ud83d\\ude00", "b\\/c"]', "[sic] a cat", "['a', 1]", "['cut'"]
    path = parquet(tmp_path / "x.parquet", image=[image(1)] * 5, caption=cells)
    wanted = [["a", "it's"], ["😀", "b/c"], *([cell] for cell in cells[2:])]
    assert [captions for _, captions in contents(path)] == wanted


def test_a_split_column_counts(tmp_path):
    rows = {"image": [image(v) for v in (1, 2, 3)], "caption": ["a", "b", "c"]}
    path = parquet(tmp_path / "x.parquet", **rows, split=["train", "validation", "test"])
    table = PairTable([str(path)])
    assert contents(path) == [(1, ["a"])] and "1 rows of its split train" in table.notices[0][1]
    assert contents(path, split="val") == [(2, ["b"])] and PairTable([str(path)], split="test").key(0).endswith(":2")
    assert contents(parquet(path, **rows, split=["A", "B", "C"])) == [(1, ["a"]), (2, ["b"]), (3, ["c"])]
    parquet(path, **rows, split=["train", "train", "spare"])
    with pytest.raises(InputError, match=r"x\.parquet: the column split holds 'spare'"):
        PairTable([str(path)])
    assert contents(path, split="spare") == [(3, ["c"])]


def test_several_columns_of_captions(tmp_path):
    path = parquet(tmp_path / "x.parquet", Image=[image(1)], caption=["a"], text=["b"])
    assert contents(path) == [(1, ["a"])] and "not from text" in PairTable([str(path)]).notices[0][1]
    assert contents(path, caption_column=["caption", "text"]) == [(1, ["a", "b"])]
    numbered = parquet(tmp_path / "y.parquet", image=[image(1)], caption_0=["a"], caption_1=["b"], caption_2=[None])
    assert contents(numbered) == [(1, ["a", "b"])]


def test_columns_are_named_by_settings_and_the_message_says_so(tmp_path):
    write(tmp_path, {**A_TO_C, "x.csv": "a:b:c\n1.png:x:y\n", "y.csv": "image,caption,caption\n1.png,a,b\n"})
    named = {"image_column": "a", "caption_column": ["b", "c"], "separator": ":"}
    assert contents(tmp_path / "x.csv", **named) == [(1, ["x", "y"])]
    with pytest.raises(InputError, match=r"found a, b, c: there is no column z; set image_column"):
        contents(tmp_path / "x.csv", **{**named, "image_column": "z"})
    with pytest.raises(InputError, match="two columns called caption"):
        contents(tmp_path / "y.csv")
    with pytest.raises(InputError, match="is not one character"):
        Layout(separator="::")


def test_encodings_of_tables_by_setting(tmp_path):
    for encoding in ("latin1", "utf-16-le"):
        write(tmp_path, {**A_TO_C, "x.csv": "image,caption\n1.png,ä\n".encode(encoding)})
        with pytest.raises(InputError, match=r"set `encoding`"):
            contents(tmp_path / "x.csv")
        assert contents(tmp_path / "x.csv", encoding=encoding) == [(1, ["ä"])]


def test_flickrs_lines_of_another_encoding_are_read_by_the_setting(tmp_path):
    write(tmp_path, {**A_TO_C, "x.token": "1.png#0\tcafé\r\n1.png#1\tb\r\n".encode("latin1")})
    with pytest.raises(InputError, match=r"x\.token:1: not UTF-8; .*or set `encoding`"):
        contents(tmp_path)
    assert contents(tmp_path, encoding="latin1") == [(1, ["café"]), (1, ["b"])]


def test_tables_as_excel_saves_them(tmp_path):
    text = 'sep=;\r\nimage;caption;note\r\n1.png;"a; b";\r\n2.png ; ä;x\r\n;;\r\n;;\r\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        write(tmp_path, {**A_TO_C, "x.csv": text.encode(encoding)})
        assert contents(tmp_path / "x.csv") == [(1, ["a; b"]), (2, [" ä"])]
        assert read_captioned(tmp_path / "x.csv").captions == ["a; b", "ä"]


def test_images_that_are_nowhere_are_named_before_training_with_the_setting_that_helps(tmp_path):
    write(tmp_path, {"images": b"", "t.csv": "image,caption\n1.png,a\n", "there/in/1.png": image(1)})
    with pytest.raises(InputError, match=r"there is no 1\.png in .*; set image_root"):
        contents(tmp_path / "t.csv")
    assert contents(tmp_path / "t.csv", image_root=str(tmp_path / "there" / "in")) == [(1, ["a"])]
    write(tmp_path / "there" / "in", {"t.csv": "image,caption\n1.png,a\n9.png,b\n"})
    table = PairTable([str(tmp_path / "there" / "in" / "t.csv")])
    with pytest.raises(BadSample, match=r"t\.csv:1: .*there is no 9\.png"):
        table[1]


def test_base64_and_data_addresses_hold_images(tmp_path):
    whole = base64.b64encode(image(1) + bytes(300)).decode()
    path = parquet(tmp_path / "x.parquet", image=[whole, f"data:image/png;base64,{whole}"], caption=["a", "b"])
    assert contents(path) == [(1, ["a"]), (1, ["b"])]
    parquet(path, image=[[image(1)]], caption=["a"])
    with pytest.raises(InputError, match="neither one encoded image a row nor a path"):
        PairTable([str(path)])


@pytest.mark.parametrize("content", ["", "image,caption\n"])
def test_a_table_without_rows_is_named(tmp_path, content):
    write(tmp_path, {**A_TO_C, "x.csv": content, "y.csv": "image,caption\n1.png,a\n"})
    if content:
        table = PairTable([str(tmp_path / "x.csv"), str(tmp_path / "y.csv")])
        assert len(table) == 1 and table.problems[0][1] == "the table holds no rows"
    else:
        with pytest.raises(InputError, match=r"x\.csv: is empty"):
            PairTable([str(tmp_path / "x.csv")])
    empty = parquet(tmp_path / "e.parquet", image=pyarrow.array([], pyarrow.binary()), caption=pyarrow.array([], "str"))
    assert PairTable([str(empty), str(tmp_path / "y.csv")]).ranges == [(0, 0), (0, 1)]


def test_broken_tables_are_named_with_the_line(tmp_path):
    texts = {"a.jsonl": ('{"image":"1.png","caption":"a"}\n{bad\n', r"a\.jsonl:2: not valid JSON")}
    texts["b.jsonl"] = ('["a"]\n', r"b\.jsonl:1: must be an object")
    texts["c.jsonl.gz"] = (gzip.compress(b"{}\n" * 100)[:-9], r"c\.jsonl\.gz: is no whole gzip file")
    texts["d.json"] = ('[{"id": 1, "image": "1.png", "conversations": []}]', "found id, image, conversations")
    texts["e.parquet"] = (b"PAR", r"e\.parquet: cannot be read as parquet")
    texts["f.xml"] = ("<a/>", r"f\.xml: unknown kind of data")
    write(tmp_path, {name: content for name, (content, _) in texts.items()})
    for name, (_, message) in texts.items():
        with pytest.raises(InputError, match=message):
            PairTable([str(tmp_path / name)])


def test_a_saved_dataset_and_the_splits_of_several(tmp_path):
    rows = datasets.Dataset.from_dict({"image": [image(1), image(2)], "caption": ["a", "b"]})
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(anything=rows).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(
        InputError, match=r"holds the splits train, test: name one, e\.g\. .*both/train, or set `split`"
    ):
        contents(tmp_path / "both")
    assert contents(tmp_path / "both", split="test") == contents(tmp_path / "both" / "test") == [(2, ["b"])]
    assert read_captioned(tmp_path / "both").captions == ["b"]
    assert contents(tmp_path / "one") == [(1, ["a"]), (2, ["b"])]
    paths = write(tmp_path, A_TO_C)
    named = datasets.Dataset.from_dict({"image": [str(paths / "3.png")], "label": [1]})
    named = named.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    named.save_to_disk(str(tmp_path / "labelled"))
    assert contents(tmp_path / "labelled", caption_column="label") == [(3, ["dog"])]


def test_rows_of_one_image_are_its_captions_in_a_retrieval(tmp_path):
    write(tmp_path, {**A_TO_C, "x.csv": "image,caption\n1.png,a\n2.png,b\n1.png,c\n"})
    table = PairTable([str(tmp_path / "x.csv")])
    assert len(table) == 3 and table.images() == [[0, 2], [1]]
    found = read_captioned(tmp_path / "x.csv")
    assert found.captions == ["a", "c", "b"] and found.owner == [0, 0, 1] and len(found.images) == 2


@pytest.mark.parametrize("weights", [(), (1, 0.5)])
def test_a_large_order_is_drawn_once_for_all_processes_and_is_the_same(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    write(
        tmp_path,
        {**A_TO_C, "x.csv": "image,caption\n" + "1.png,a\n" * 20, "y.csv": "image,caption\n" + "2.png,b\n" * 9},
    )
    table = PairTable([str(tmp_path / name) for name in ("x.csv", "y.csv")])

    def stream():
        return TrainingPairs(table, None, None, global_batch_size=4, epochs=3, seed=5, weights=weights)

    drawn = [stream().order(epoch).tolist() for epoch in range(3)]
    monkeypatch.setattr(training_pairs, "SHARED_FROM", 1)
    shared = stream()
    assert [shared.order(epoch).tolist() for epoch in range(3)] == drawn
    files = list((tmp_path / "cache" / "order").glob("*.int32"))
    assert len(files) == 1 and isinstance(shared.order(2), np.memmap)  # those of epochs that are over are gone
    monkeypatch.setattr(TrainingPairs, "_drawn_order", None)  # would fail if called
    monkeypatch.setattr(TrainingPairs, "__init__", lambda *args, **more: None)
    other = TrainingPairs()
    other.__dict__ |= {**shared.__dict__, "_order": (-1, None)}
    assert other.order(2).tolist() == drawn[2]


def test_the_settings_of_pretraining_reach_both_tables(tmp_path):
    rows = {"pic": [image(v) for v in (1, 2, 3)], "words": ["a", "b", "c"], "split": ["train", "val", "test"]}
    path = str(parquet(tmp_path / "x.parquet", **rows))
    config = PretrainConfig(train_data=[path], val_pairs=[path], image_column="pic", caption_column=["words"])
    train, val = pretraining.train_table(config), pretraining.val_table(config)
    assert [train[0][1], val[0][1], len(train), len(val)] == [["a"], ["b"], 1, 1]
    config.val_split = "test"
    assert pretraining.val_table(config)[0][1] == ["c"]
    parquet(tmp_path / "x.parquet", **{**rows, "pic": [image(1), b"broken", image(3)]})
    config.val_split = ""
    with pytest.raises(InputError, match=r"val_pairs: 1 of 1 pairs cannot be read, e\.g\. .*x\.parquet:1 "):
        pretraining.refuse_unreadable("val_pairs", pretraining.val_table(config))


@pytest.mark.parametrize("name", ["../1.png", "FOLDER/1.png", "a/../../1.png"])
def test_names_in_tables_lead_nowhere_outside(tmp_path, name):
    write(tmp_path, {"1.png": image(1), "home/a/2.png": image(2)})
    write(tmp_path / "home", {"x.csv": f"image,caption\n{name.replace('FOLDER', str(tmp_path))},a\n"})
    with pytest.raises(InputError, match=rf"leads outside {tmp_path}/home: copy .* or set image_root"):
        PairTable([str(tmp_path / "home/x.csv")])
    if name[0] == "F":  # whoever says so has any file
        assert contents(tmp_path / "home/x.csv", image_root="/") == [(1, ["a"])]
    inside = {"x.csv": f"image,caption\na/../a/2.png,a\n{tmp_path}/home/a/2.png,b\n"}
    write(tmp_path / "home", inside)
    assert [value for value, _ in contents(tmp_path / "home/x.csv")] == [2, 2]
