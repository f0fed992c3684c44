"""Downloads from a real HTTP server on the loopback that breaks off, changes its mind, or lacks the file."""

import hashlib
import random

import pytest

from diffclip.data import expand
from diffclip.download import download
from diffclip.errors import InputError

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def file_to_serve(server):
    server.files["/a.bin"] = CONTENT


def test_a_file_arrives_whole(server, tmp_path):
    download(f"{server.address}/a.bin", tmp_path / "a.bin", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_broken_connections_go_on_where_they_were(server, tmp_path):
    server.most = 70_000
    download(f"{server.address}/a.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.sent) == 5 and sum(server.sent) == len(CONTENT)  # no byte twice


def test_a_later_call_goes_on_and_notices_another_file(server, tmp_path):
    server.most = 70_000
    server.failures = 0
    path = tmp_path / "a.bin"
    part = tmp_path / "a.bin.part"

    def interrupted():
        """What an interrupt during the download leaves."""
        tag = hashlib.md5(CONTENT).hexdigest()
        part.write_bytes(CONTENT[:100_000])
        (tmp_path / "a.bin.part.etag").write_text(f'"{tag}"')

    interrupted()
    server.most = 0
    download(f"{server.address}/a.bin", path)
    assert path.read_bytes() == CONTENT and server.sent == [200_000]
    interrupted()
    server.files["/a.bin"] = CONTENT[::-1]
    download(f"{server.address}/a.bin", path)
    assert path.read_bytes() == CONTENT[::-1] and server.sent[-1] == 300_000


def test_a_busy_server_is_asked_again_and_a_dead_one_given_up(server, tmp_path):
    server.failures = 3
    download(f"{server.address}/a.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    server.failures = 99
    with pytest.raises(InputError, match=r"no progress in 5 tries \(503"):
        download(f"{server.address}/a.bin", tmp_path / "b.bin", wait=0)


def test_refusals_and_wrong_content_are_named(server, tmp_path):
    with pytest.raises(InputError, match=r"/none\.bin: the server answers 404"):
        download(f"{server.address}/none.bin", tmp_path / "none.bin")
    with pytest.raises(InputError, match="the file has changed"):
        download(f"{server.address}/a.bin", tmp_path / "a.bin", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "a.bin").exists()


def test_shards_on_the_web_are_fetched_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path))
    server.files |= {f"/{i:05d}.tar": f"shard {i}".encode() for i in range(3)}
    paths = expand([f"{server.address}/{{00000..00002}}.tar"])
    assert [open(p, "rb").read() for p in paths] == [b"shard 0", b"shard 1", b"shard 2"]  # noqa: SIM115
    assert expand([f"{server.address}/{{00000..00002}}.tar"]) == paths and len(server.sent) == 3
