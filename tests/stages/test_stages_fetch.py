"""Getting data, from a real server on the loopback; what lies on the Hub is tested up to the call that fetches it."""

import io
import json
import multiprocessing
import os
import shutil
import tarfile
import zipfile

import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image

from diffclip.base.archives import unpack
from diffclip.base.errors import InputError
from diffclip.data.pairs import PairTable
from stages import download, fetch
from stages.data_sets import SETS, Hub, Images, Web


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def pope(server, monkeypatch):
    """The set "pope" with its addresses on the loopback: two question files, three images of which one is gone."""
    for split in ("random", "popular"):
        rows = [{"image": f"{i}.jpg", "text": "Is there a dog?", "label": "no"} for i in range(3)]
        server.files[f"/coco_pope_{split}.json"] = "\n".join(map(json.dumps, rows)).encode()
    for i in range(2):
        server.files[f"/val2014/{i}.jpg"] = jpeg(i)
    sources = (
        *(Web(f"{server.address}/coco_pope_{split}.json") for split in ("random", "popular")),
        Images("coco_pope_*.json", f"{server.address}/val2014/"),
    )
    monkeypatch.setitem(SETS, "pope", SETS["pope"]._replace(sources=sources, expected=3))
    return server


def test_what_arrives_is_counted_and_the_same_command_goes_on(pope, tmp_path, capsys):
    fetch.main(["pope", "--out", str(tmp_path)])
    assert "pope: 2 of 3 files (66.7%)" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "pope" / "manifest.json").read_text())
    assert manifest["arrived"] == 2 and manifest["share"] == 0.6667
    assert manifest["files"]["images/0.jpg"] == len(jpeg(0)) and len(manifest["files"]) == 4
    pope.files["/val2014/2.jpg"] = jpeg(2)
    before = len(pope.sent)
    fetch.main(["pope", "--out", str(tmp_path)])
    assert "3 of 3 files (100.0%)" in capsys.readouterr().out and len(pope.sent) == before + 1


def test_dry_run_of_every_set_fetches_nothing(tmp_path, capsys):
    fetch.main([*SETS, "--dry-run", "--out", str(tmp_path / "data")])
    said = capsys.readouterr().out
    assert all(f"{name}: about" in said for name in SETS) and not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_are_unpacked_once_and_never_outside(server, tmp_path, monkeypatch, kind):
    def archive(name: str) -> bytes:
        buffer = io.BytesIO()
        if kind == "zip":
            with zipfile.ZipFile(buffer, "w") as packed:
                packed.writestr(name, b"content")
        else:
            with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
                info = tarfile.TarInfo(name)
                info.size = 7
                packed.addfile(info, io.BytesIO(b"content"))
        return buffer.getvalue()

    server.files |= {f"/good.{kind}": archive("train2017/1.jpg"), f"/bad.{kind}": archive("../../evil.jpg")}
    folder = tmp_path / "set"
    for _ in range(2):
        download.fetch_web(Web(f"{server.address}/good.{kind}", "coco"), folder)
    assert (folder / "coco" / "train2017" / "1.jpg").read_bytes() == b"content" and len(server.sent) == 1
    assert [p.name for p in (folder / "coco").iterdir() if not p.name.startswith(".")] == ["train2017"]
    with pytest.raises(InputError, match=r"bad\."):
        download.fetch_web(Web(f"{server.address}/bad.{kind}"), folder)
    assert not list(tmp_path.rglob("evil.jpg")) and not (tmp_path.parent / "evil.jpg").exists()


def tar_with(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for info in members:
            packed.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def member(name: str, size: int = 7, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def test_links_in_archives_lead_nowhere(server, tmp_path):
    """A link to a folder outside, and then a file below it; a link to a file that then would be served as an image."""
    outside = tmp_path / "outside"
    outside.mkdir()
    server.files["/x.tar.gz"] = tar_with(
        member("./", 0, type=tarfile.DIRTYPE),
        member("way", 0, type=tarfile.SYMTYPE, linkname=str(outside)),
        member("way/evil.jpg"),
        member("secret.jpg", 0, type=tarfile.SYMTYPE, linkname="/etc/hostname"),
        member("hard.jpg", 0, type=tarfile.LNKTYPE, linkname="../../outside"),
        member("./good.jpg"),
    )
    download.fetch_web(Web(f"{server.address}/x.tar.gz"), tmp_path / "set")
    assert not list(outside.iterdir()) and not any(path.is_symlink() for path in tmp_path.rglob("*"))
    found = [str(p.relative_to(tmp_path / "set")) for p in (tmp_path / "set").rglob("*.jpg")]
    assert sorted(found) == ["good.jpg", "way/evil.jpg"]


def test_an_interrupted_unpacking_is_done_by_the_same_command(server, tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(tar_with(member("a.jpg")))
    (tmp_path / "x.tar.gz.unpacking").mkdir()
    (tmp_path / "x.tar.gz.unpacking" / "half.jpg").touch()
    download.fetch_web(Web(f"{server.address}/x.tar.gz"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.tar.gz.unpacked", "a.jpg"] and not server.sent


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_is_not_unpacked(server, tmp_path, kind):
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("bomb.jpg", bytes(20_000_000))
        content = buffer.getvalue()
    else:
        content = tar_with(member("bomb.jpg", 20_000_000))
    server.files[f"/bomb.{kind}"] = content
    with pytest.raises(InputError, match="100 times its size"):
        download.fetch_web(Web(f"{server.address}/bomb.{kind}"), tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [f"bomb.{kind}"]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_half_an_archive_is_named(tmp_path, kind):
    good = tar_with(*(member(f"{i}.jpg", 9000) for i in range(50)))
    (tmp_path / f"x.{kind}").write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=rf"x\.{kind}: not unpacked .*delete it and start again"):
        unpack(tmp_path / f"x.{kind}", tmp_path / "into")
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "link/evil.jpg", "", None, 3])
def test_names_in_fetched_lists_stay_inside(pope, tmp_path, name):
    folder = tmp_path / "pope"
    (folder / "images").mkdir(parents=True)
    os.symlink(tmp_path, folder / "images" / "link")
    pope.files["/evil.jpg"] = pope.files["/val2014/link/evil.jpg"] = jpeg(1)
    lines = [{"image": "0.jpg", "text": "Is there a\u2028dog?"}, {"image": name}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    pope.files["/coco_pope_random.json"] = text.encode()
    with pytest.raises(InputError, match=r"coco_pope_random\.json:2: image: .* (leads outside|no file name|Windows)"):
        fetch.main(["pope", "--out", str(tmp_path)])
    assert not list(tmp_path.rglob("evil.jpg")) and not os.path.exists("/tmp/evil.jpg")


def test_pictures_with_odd_names_arrive(pope, tmp_path):
    pope.files["/val2014/a%20%23%3F%E6%97%A5.jpg"] = jpeg(9)
    pope.files["/coco_pope_random.json"] = json.dumps({"image": "a #?日.jpg"}).encode()
    fetch.main(["pope", "--out", str(tmp_path)])
    assert (tmp_path / "pope" / "images" / "a #?日.jpg").read_bytes() == jpeg(9)


def test_the_same_command_twice_at_once(pope, tmp_path):
    pope.slow = 0.1
    start = multiprocessing.get_context("fork")
    pair = [start.Process(target=fetch.main, args=(["pope", "--out", str(tmp_path)],)) for _ in range(2)]
    for one in pair:
        one.start()
    for one in pair:
        one.join(60)
    assert [one.exitcode for one in pair] == [0, 0] and len(pope.sent) == 4  # two lists, two images
    assert (tmp_path / "pope" / "images" / "1.jpg").read_bytes() == jpeg(1)


def test_an_archive_of_the_hub_is_fetched_once(tmp_path):
    """Without network, asking the Hub ends in a refusal; what was unpacked is not asked for."""
    source = Hub("liuhaotian/LLaVA-Pretrain", ("images.zip",))
    for message in ("not fetched", "nothing of it arrived"):  # the second where the folder holds something already
        with pytest.raises(InputError, match=message):
            download.fetch_hub(source, tmp_path)
        (tmp_path / ".lock").touch()
    (tmp_path / ".images.zip.unpacked").touch()
    download.fetch_hub(source, tmp_path)


@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet"])
def test_lists_of_addresses_lead_to_the_web_alone(tmp_path, kind):
    def written(addresses, column="url"):
        table = pyarrow.table({column: addresses, "caption": ["a file:///x, said he"] * len(addresses)})
        path = tmp_path / f"list.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            options = pyarrow.csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
            pyarrow.csv.write_csv(table, path, options)
        return path

    download.check_addresses(written(["http://a/1.jpg", "HTTPS://b/2.jpg", None]))
    for address in ("file:///etc/hostname", "/etc/hostname", "ftp://a/b.jpg", " http://a"):
        with pytest.raises(InputError, match="is not http or https"):
            download.check_addresses(written(["http://a/1.jpg", address]))
    with pytest.raises(InputError, match="no column url, but link, caption"):
        download.check_addresses(written(["http://a/1.jpg"], column="link"))


def test_counting_pairs_and_pictures(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("1.jpg", "1.txt", "2.jpg", "2.cls"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert download.count(tmp_path, "pairs", "*.tar") == 1 and download.count(tmp_path, "pictures", "*.tar") == 2


def test_a_list_with_dead_links_becomes_shards_of_what_is_left(server, tmp_path, capsys):
    if shutil.which("img2dataset") is None:
        pytest.skip("img2dataset is not on the path: it clashes with our packages, see scripts/0_data.sh")
    rows = ["url\tcaption"]
    for i in range(20):
        rows.append(f"{server.address}/{i}.jpg\tcaption {i}")
        if i % 10 < 7:
            server.files[f"/{i}.jpg"] = jpeg(10 * i)
    (tmp_path / "list.tsv").write_text("\n".join(rows) + "\n")
    fetch.main(["pairs", str(tmp_path / "list.tsv"), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert "14 of 20 pairs (70.0%)" in capsys.readouterr().out
    table = PairTable([str(tmp_path / "out" / "*.tar")])
    found = {captions[0]: image.getpixel((0, 0))[0] for image, captions in (table[i] for i in range(len(table)))}
    assert len(table) == 14 and all(abs(found[f"caption {i}"] - 10 * i) < 6 for i in (0, 3, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix"], "unknown data set 'nix'"),
        (["popee"], "unknown data set 'popee': did you mean pope"),
        (["pairs"], "pairs needs one list"),
        (["pairs", "missing.tsv"], r"missing\.tsv: no such file"),
        (["pairs", __file__], "unknown kind of list"),
        (["pope", "--workers", "0"], "--workers"),
        (["pope", "--output_dir", __file__], "cannot be made .*choose another --output_dir"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(InputError, match=message):
        fetch.main(arguments)


def test_a_file_with_another_digest_than_the_known_one_is_not_kept(pope, tmp_path, monkeypatch):
    sources = tuple(s._replace(digest="sha256:" + "0" * 64) if isinstance(s, Web) else s for s in SETS["pope"].sources)
    monkeypatch.setitem(SETS, "pope", SETS["pope"]._replace(sources=sources))
    with pytest.raises(InputError, match=r"coco_pope_random\.json: arrived with the sha256"):
        fetch.main(["pope", "--out", str(tmp_path)])
    assert not list((tmp_path / "pope").glob("*.json*"))
