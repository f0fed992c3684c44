"""Getting data, from a real server on the loopback; what lies on the Hub is tested up to the call that fetches it."""

import io
import json
import shutil
import tarfile
import zipfile

import pytest
from launch import run
from PIL import Image

from diffclip.data import PairTable
from diffclip.errors import InputError
from stages import fetch


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def pope(server, monkeypatch):
    """The set "pope" with its addresses on the loopback: two question files, three pictures of which one is gone."""
    for split in ("random", "popular"):
        rows = [{"image": f"{i}.jpg", "text": "Is there a dog?", "label": "no"} for i in range(3)]
        server.files[f"/coco_pope_{split}.json"] = "\n".join(map(json.dumps, rows)).encode()
    for i in range(2):
        server.files[f"/val2014/{i}.jpg"] = jpeg(i)
    sources = (
        *(fetch.Web(f"{server.address}/coco_pope_{split}.json") for split in ("random", "popular")),
        fetch.Pictures("coco_pope_*.json", f"{server.address}/val2014/"),
    )
    monkeypatch.setitem(fetch.SETS, "pope", fetch.SETS["pope"]._replace(sources=sources, expected=3))
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
    fetch.main([*fetch.SETS, "--dry-run", "--out", str(tmp_path / "data")])
    said = capsys.readouterr().out
    assert all(f"{name}: about" in said for name in fetch.SETS) and not (tmp_path / "data").exists()


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
        fetch.fetch_web(fetch.Web(f"{server.address}/good.{kind}", "coco"), folder)
    assert (folder / "coco" / "train2017" / "1.jpg").read_bytes() == b"content" and len(server.sent) == 1
    assert [p.name for p in (folder / "coco").iterdir() if not p.name.startswith(".")] == ["train2017"]
    with pytest.raises(InputError, match=r"bad\."):
        fetch.fetch_web(fetch.Web(f"{server.address}/bad.{kind}"), folder)
    assert not list(tmp_path.rglob("evil.jpg")) and not (tmp_path.parent / "evil.jpg").exists()


def test_counting_pairs_and_pictures(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("1.jpg", "1.txt", "2.jpg", "2.cls"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert fetch.count(tmp_path, "pairs", "*.tar") == 1 and fetch.count(tmp_path, "pictures", "*.tar") == 2


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


def test_bad_input_is_one_sentence():
    for arguments in (["nix"], ["pairs"], ["pairs", "missing.tsv"]):
        ended = run("stages.fetch", *arguments, check=False)
        assert ended.returncode == 2 and ended.stderr.startswith("error: ") and "Traceback" not in ended.stderr
