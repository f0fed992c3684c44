"""The cache is written where it can be, and nothing ends where it cannot."""

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffclip.base.cache import NOWHERE, cache_dir, keep, kept, kept_array, kept_json
from diffclip.data import shards, training_pairs
from diffclip.data.pairs import PairTable
from diffclip.data.training_pairs import TrainingPairs
from stages.manifest import folder_manifest

NOBODY = 60_123  # a number that no user has


def shade(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, *values: int) -> None:
    with tarfile.open(path, "w") as file:
        for value in values:
            for name, content in ((f"{value}.png", shade(value)), (f"{value}.txt", str(value).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))


def pairs_of(table: PairTable) -> dict[int, list[str]]:
    return {table[i][0].getpixel((0, 0))[0]: table[i][1] for i in range(len(table))}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary folder of this test, without a cache named by the environment."""
    monkeypatch.delenv("DIFFCLIP_CACHE", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_the_cache_is_where_it_is_named_or_in_the_home(temporary, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "diffclip"
    monkeypatch.setenv("DIFFCLIP_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


@pytest.mark.parametrize("home", ["a file", "a file/deeper"])
def test_without_a_home_that_can_be_written_it_is_a_temporary_folder(temporary, tmp_path, monkeypatch, home):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    found = cache_dir()
    assert found == temporary / f"diffclip-{os.getuid()}" and found.stat().st_mode & 0o777 == 0o700
    assert keep(found / "a" / "b", b"x") and kept(cache_dir() / "a" / "b") == b"x"
    found.chmod(0o777)  # anybody could have written what is there
    assert cache_dir() == NOWHERE


def test_a_user_without_home_and_name_has_a_cache(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    everybodys = Path(tempfile.mkdtemp())  # not below pytest's, into which others do not come
    everybodys.chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(everybodys))
    child = os.fork()  # who another user is cannot be undone
    if not child:
        os.environ.pop("HOME", None)
        code = 1
        try:
            os.setuid(NOBODY)
            code = 0 if cache_dir() == everybodys / f"diffclip-{NOBODY}" else 2
        except PermissionError:
            code = 3
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(everybodys)
    if code == 3:
        pytest.skip("only root can become another user")
    assert code == 0


def test_nothing_is_kept_where_there_is_no_temporary_folder_either(temporary, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert cache_dir() == NOWHERE and not keep(NOWHERE / "a", b"x")


def test_what_is_kept_is_read_as_it_was_written_or_not_at_all(tmp_path):
    path = tmp_path / "kept"
    for content in (b"", b"\0" * 8, b'{"a": 1}'):
        assert keep(path, content) and kept(path) == content
    assert kept_json(path) == {"a": 1}
    numbers = np.array([1, -2, 3], np.int32)
    assert keep(path, numbers.data) and kept_array(path).tolist() == [1, -2, 3]
    written = path.read_bytes()
    changed = [bytes(byte ^ (4 * (i == at)) for i, byte in enumerate(written)) for at in range(len(written))]
    for other in (
        *changed,
        b"",
        written[:-1],
        written[4:],
        written[:4],
        written + b"\0",
        bytes(len(written)),
        b"\0" * 4,
    ):
        path.write_bytes(other)
        assert kept_array(path) is kept_json(path) is kept(path) is None
    path.unlink()
    assert kept(path) is None
    os.mkfifo(path)
    assert kept(path) is None


@pytest.mark.parametrize("place", ["/proc/nothing", "/dev/full", "/dev/null/x"])
def test_pairs_orders_and_manifests_do_without_a_cache(tmp_path, monkeypatch, place):
    monkeypatch.setenv("DIFFCLIP_CACHE", place)
    monkeypatch.setattr(shards, "CACHE_FROM", 0)
    monkeypatch.setattr(training_pairs, "SHARED_FROM", 1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
    tar(tmp_path / "x.tar", 1, 2, 3)
    rows = {"image": [shade(4)], "caption": ["4"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "x.rows.parquet")
    table = PairTable([str(tmp_path / "x.tar"), str(tmp_path / "x.rows.parquet")])
    assert pairs_of(table) == {value: [str(value)] for value in (1, 2, 3, 4)}
    stream = TrainingPairs(table, None, None, global_batch_size=2, epochs=2, seed=0)
    assert sorted(stream.order(1).tolist()) == [0, 1, 2, 3]
    assert set(folder_manifest(tmp_path)) == {"x.tar", "x.rows.parquet"}
    assert not Path(place).is_dir()


def test_a_cache_whose_files_are_damaged_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "CACHE_FROM", 0)
    tar(tmp_path / "x.tar", 1, 2)
    wanted = {1: ["1"], 2: ["2"]}
    assert pairs_of(PairTable([str(tmp_path / "x.tar")])) == wanted
    (index,) = (tmp_path / "cache" / "index").iterdir()
    whole = index.read_bytes()
    for damaged in (b"", whole[:-1], b"[]\n", b"{}\n", b"\xff\n", whole + b"x"):
        index.write_bytes(damaged)
        table = PairTable([str(tmp_path / "x.tar")])
        assert pairs_of(table) == wanted and index.read_bytes() == whole
    index.write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])  # among the places of the second pair
    assert pairs_of(PairTable([str(tmp_path / "x.tar")])) == wanted
    digests = folder_manifest(tmp_path / "cache" / "index")
    for path in (cache_dir() / "manifests").iterdir():
        before = path.read_bytes(), path.stat().st_mtime_ns
        assert folder_manifest(tmp_path / "cache" / "index") == digests
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before  # nothing new, nothing written
        path.write_bytes(b"damaged")
        assert folder_manifest(tmp_path / "cache" / "index") == digests
