"""Names out of strangers' files lead below the folder that was named, or are refused with what names them."""

import os

import pytest

from diffclip.base.errors import InputError
from diffclip.base.paths import folder_of, inside, matching
from diffclip.data.sources import expand


@pytest.mark.parametrize(
    "name", ["a.jpg", "coco/train2017/1.jpg", "a b/ü 日本.png", "..a/b..jpg", "./x.jpg", "12:30.jpg"]
)
def test_ordinary_names(tmp_path, name):
    assert inside(tmp_path, name, "rows.json: row 3") == tmp_path / name
    assert inside(tmp_path, name, "rows.json: row 3", writing=True) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "a/..", "..", "..\\a.jpg", "C:\\a.jpg", "C:/a.jpg", "C:a.jpg"]
    + ["\\\\host\\share\\a.jpg", "", ".", "a\0.jpg", "\ud800.jpg", "x" * 300 + ".jpg", None, 7, ["a.jpg"], b"a.jpg"],
)
def test_all_others_are_refused_with_their_entry(tmp_path, name):
    for writing in (False, True):
        with pytest.raises(InputError, match=r"^rows\.json: row 3: ") as error:
            inside(tmp_path, name, "rows.json: row 3", writing=writing)
        assert str(error.value).isprintable() and len(str(error.value)) < 300 + len(str(tmp_path))


def test_absolute_names_below_the_folder(tmp_path, monkeypatch):
    assert inside(tmp_path, f"{tmp_path}/a.jpg", "") == tmp_path / "a.jpg"
    assert inside("/", "/data/a.jpg", "") == inside("/", "data/a.jpg", "")
    monkeypatch.chdir(tmp_path)
    assert inside(".", f"{tmp_path}/a.jpg", "") == tmp_path / "a.jpg"
    with pytest.raises(InputError, match="leads outside"):
        inside(tmp_path / "a", f"{tmp_path}/ab/c.jpg", "")


def test_links_are_followed_in_reading_alone(tmp_path):
    for folder in ("root", "elsewhere", "root/real"):
        (tmp_path / folder).mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "coco")
    os.symlink(tmp_path / "elsewhere" / "new.jpg", tmp_path / "root" / "one.jpg")
    os.symlink("real", tmp_path / "root" / "linked")
    for name in ("coco/1.jpg", "one.jpg"):
        assert inside(tmp_path / "root", name, "x") == tmp_path / "root" / name
        with pytest.raises(InputError, match="through a link"):
            inside(tmp_path / "root", name, "x", writing=True)
    assert inside(tmp_path / "root", "linked/1.jpg", "x", writing=True)  # stays inside
    os.symlink(tmp_path / "root", tmp_path / "root link")
    assert inside(tmp_path / "root link", "real/1.jpg", "x", writing=True)  # the user's own way to the folder


def test_patterns_name_files_in_order_and_names_that_look_like_patterns_stay(tmp_path):
    for name in ("b1.json", "b0.json", "c[1].json", "x{0,1}.json"):
        (tmp_path / name).write_text("")
    at = lambda *names: [str(tmp_path / name) for name in names]  # noqa: E731
    assert matching(at("b*.json")) == at("b0.json", "b1.json") == matching(at("b{0..1}.json"))
    assert matching(at("c[1].json", "x{0,1}.json", "absent")) == at("c[1].json", "x{0,1}.json", "absent")
    with pytest.raises(InputError, match="no such file"):
        matching(at("d*.json"))


def test_folders_that_are_there_by_their_name_are_no_patterns(tmp_path, monkeypatch):
    folder = tmp_path / "a [1] {x,y} *"
    (folder / "b").mkdir(parents=True)
    for name in ("0.json", "1.json"):
        (folder / "b" / name).write_text("")
    wanted = [str(folder / "b" / name) for name in ("0.json", "1.json")]
    for pattern in ("b/*.json", "b/{0,1}.json", "{b,b}/?.json", "*/[01].json"):
        assert sorted({*matching([f"{folder}/{pattern}"])}) == wanted == sorted({*expand([f"{folder}/{pattern}"])})
    monkeypatch.chdir(folder)
    assert matching(["b/*.json"]) == ["b/0.json", "b/1.json"] == expand(["b/{0,1}.json"])
    assert matching(["*/0.json"]) == ["b/0.json"]
    for absent in (f"{folder}/b/*.txt", f"{folder}/b/{{0,1}}.txt"):
        with pytest.raises(InputError, match=r"a \[1\].*no such file"):
            expand([absent])


def test_the_folder_of_files_is_theirs_or_a_folder_itself(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder_of(["photos"]) == folder_of(["photos/a.json", "photos/b.json"]) == f"{tmp_path}/photos"
    assert folder_of(["a.json"]) == str(tmp_path)
    with pytest.raises(InputError, match=r"several folders, .*give --image_root"):
        folder_of(["a.json", "photos"])
