"""A folder's files are sealed under their names in it, wherever the folder is named from."""

import hashlib

from diffclip.base.sealed import damage, files_of, seal


def test_files_of_a_folder_named_from_here_or_from_the_root_are_sealed_alike(tmp_path, monkeypatch):
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "a.txt").write_text("a")
    (tmp_path / "run" / "deep" / "b.txt").write_text("bb")
    wanted = {"a.txt": [1, hashlib.sha256(b"a").hexdigest()], "deep/b.txt": [2, hashlib.sha256(b"bb").hexdigest()]}
    monkeypatch.chdir(tmp_path)
    for folder in ("run", tmp_path / "run", "./run"):
        assert seal(folder, files_of(folder)) == seal(folder, ["deep/b.txt", "a.txt"]) == wanted
        assert not damage(folder, wanted)
    monkeypatch.chdir(tmp_path / "run")
    assert seal(".", files_of(".")) == wanted
