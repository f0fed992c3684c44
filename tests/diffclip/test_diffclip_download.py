"""Downloads from a real HTTP server on the loopback that breaks off, changes its mind, or lacks the file."""

import hashlib
import multiprocessing
import random

import pytest

from diffclip.base.download import download
from diffclip.base.errors import InputError
from diffclip.data.sources import expand

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture(autouse=True)
def file_to_serve(server):
    server.files["/a.bin"] = CONTENT


def test_a_file_arrives_whole(server, tmp_path):
    download(f"{server.address}/a.bin", tmp_path / "a.bin", digest="sha256:" + hashlib.sha256(CONTENT).hexdigest())
    download(f"{server.address}/a.bin", tmp_path / "a.bin", digest="md5:" + hashlib.md5(CONTENT).hexdigest())
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
        download(f"{server.address}/a.bin", tmp_path / "a.bin", digest="sha256:" + "0" * 64)
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "a.bin").exists()


def test_shards_on_the_web_are_fetched_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path))
    server.files |= {f"/{i:05d}.tar": f"shard {i}".encode() for i in range(3)}
    paths = expand([f"{server.address}/{{00000..00002}}.tar"])
    assert [open(p, "rb").read() for p in paths] == [b"shard 0", b"shard 1", b"shard 2"]  # noqa: SIM115
    assert expand([f"{server.address}/{{00000..00002}}.tar"]) == paths and len(server.sent) == 3


def interrupted(folder, server, have, content=CONTENT):
    """What an interrupt after `have` bytes leaves; returns the file's path."""
    (folder / "a.bin.part").write_bytes(content[:have])
    (folder / "a.bin.part.etag").write_text(f'"{hashlib.md5(content).hexdigest()}"')
    return folder / "a.bin"


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_part_that_is_whole_is_taken(server, tmp_path):
    """Killed between the last byte and the renaming: the server has nothing more to send, and says 416."""
    path = interrupted(tmp_path, server, len(CONTENT))
    download(f"{server.address}/a.bin", path)
    assert path.read_bytes() == CONTENT and server.sent == [0] and left(tmp_path) == ["a.bin"]


def test_a_part_longer_than_the_file_is_fetched_anew(server, tmp_path):
    path = interrupted(tmp_path, server, len(CONTENT))
    with open(tmp_path / "a.bin.part", "ab") as f:
        f.write(b"x")
    download(f"{server.address}/a.bin", path, wait=0)
    assert path.read_bytes() == CONTENT and server.sent == [0, len(CONTENT)]


@pytest.mark.parametrize("ranges", ["ignored", "shifted", "any file"])
def test_servers_that_take_ranges_in_their_own_way(server, tmp_path, ranges):
    server.ranges = ranges
    if ranges == "any file":  # sends the rest of another file than the one whose beginning lies there
        path = interrupted(tmp_path, server, 100_000, content=CONTENT[::-1])
    else:
        path = interrupted(tmp_path, server, 100_000)
    download(f"{server.address}/a.bin", path, wait=0)
    assert path.read_bytes() == CONTENT and server.sent[-1] == len(CONTENT)


@pytest.mark.parametrize("most", [0, 200_000])
def test_files_without_a_length(server, tmp_path, most):
    """In chunks an early end shows, and the download goes on; the file's validator is its date here."""
    server.length, server.most, server.dated = "chunked", most, True
    download(f"{server.address}/a.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and (len(server.sent) > 1) == (most > 0)
    server.length, server.most = "none", 0
    download(f"{server.address}/a.bin", tmp_path / "b.bin", wait=0)
    assert (tmp_path / "b.bin").read_bytes() == CONTENT


def test_a_body_that_is_always_too_short_is_no_file(server, tmp_path):
    server.most, server.ranges = 70_000, "ignored"
    with pytest.raises(InputError, match=r"no progress in 5 tries \(the connection ended at 70,000 of 300,000 bytes"):
        download(f"{server.address}/a.bin", tmp_path / "a.bin", wait=0)
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/a.bin", "/etc/hostname", "data:,x", ""])
def test_the_web_alone(server, tmp_path, address):
    server.moved["/moved.bin"] = address
    with pytest.raises(InputError, match="http or https"):
        download(address, tmp_path / "x.bin")
    if ":" in address:
        with pytest.raises(InputError, match=r"/moved\.bin: "):
            download(f"{server.address}/moved.bin", tmp_path / "x.bin")
    assert left(tmp_path) == []
    server.moved["/moved.bin"] = "/a.bin"
    download(f"{server.address}/moved.bin", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_odd_addresses(server, tmp_path):
    server.files["/a%20b/%C3%BC.bin"] = b"found"
    download(f"{server.address}/a b/ü.bin", tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == b"found"
    for address in ("http://127.0.0.1:port/a.bin", "http://[1/a.bin"):
        with pytest.raises(InputError, match="address"):
            download(address, tmp_path / "y.bin", wait=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        download(f"{server.address}/a.bin", tmp_path / "file" / "a.bin")


def test_two_processes_at_once_fetch_one_file_once(server, tmp_path):
    server.slow = 0.5
    path = tmp_path / "a.bin"
    start = multiprocessing.get_context("fork")
    pair = [start.Process(target=download, args=(f"{server.address}/a.bin", path)) for _ in range(3)]
    for one in pair:
        one.start()
    for one in pair:
        one.join(60)
    assert [one.exitcode for one in pair] == [0, 0, 0]
    assert path.read_bytes() == CONTENT and server.sent == [len(CONTENT)] and left(tmp_path) == ["a.bin"]


def test_the_one_who_waited_fetches_where_the_first_failed(server, tmp_path):
    server.slow = 0.5
    start = multiprocessing.get_context("fork")
    first = start.Process(target=download, args=(f"{server.address}/a.bin", tmp_path / "a.bin"))
    first.start()
    while not (tmp_path / "a.bin.part").exists():
        pass
    second = start.Process(target=download, args=(f"{server.address}/a.bin", tmp_path / "a.bin"))
    second.start()
    first.kill()
    first.join()
    second.join(60)
    assert second.exitcode == 0 and (tmp_path / "a.bin").read_bytes() == CONTENT and left(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Encoding": "gzip"}, "sends it as gzip, which was not asked for"),
        ({"Content-Length": "many"}, "gives the length 'many'"),
    ],
    ids=["gzip", "no number"],
)
def test_an_answer_that_is_not_the_file_is_none(server, tmp_path, headers, words):
    server.also, server.length = headers, "none"
    with pytest.raises(InputError, match=words):
        download(f"{server.address}/a.bin", tmp_path / "a.bin", wait=0)
    assert left(tmp_path) == []


@pytest.mark.parametrize("length", ["known", "chunked", "none"])
def test_a_body_that_goes_on_for_ever_is_cut(server, tmp_path, length):
    server.endless, server.length = 10_000, length
    with pytest.raises(InputError, match=r"a\.bin: sends more than 5,000,000 bytes"):
        download(f"{server.address}/a.bin", tmp_path / "a.bin", most=5_000_000)
    assert left(tmp_path) == []


def test_a_file_larger_than_the_disk_is_not_begun(server, tmp_path, monkeypatch):
    monkeypatch.setattr("diffclip.base.download.ROOM", 1 << 60)
    with pytest.raises(InputError, match=r"sends more than the disk of .* has room for; make room"):
        download(f"{server.address}/a.bin", tmp_path / "a.bin")


def test_a_range_of_a_file_of_unknown_length_is_not_taken_for_its_end(server, tmp_path):
    path = interrupted(tmp_path, server, 100_000)
    server.ranges = "of unknown length"
    download(f"{server.address}/a.bin", path, wait=0)
    assert path.read_bytes() == CONTENT and server.sent == [1000, len(CONTENT)]


def test_a_validator_that_no_header_can_hold_is_none(server, tmp_path):
    """As a folded header has it, or a file that something else has written."""
    server.also, server.most = {"ETag": '"a\r\n b"'}, 70_000
    with pytest.raises(InputError, match="no progress in 5 tries"):
        download(f"{server.address}/a.bin", tmp_path / "a.bin", wait=0)
    server.also, server.most = {}, 0
    (tmp_path / "a.bin.part.etag").write_bytes(b"a\n\xff")
    download(f"{server.address}/a.bin", tmp_path / "a.bin", wait=0)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
