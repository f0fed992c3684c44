"""Shards in object stores: found by pattern, fetched whole and once a node into a cache that is bounded."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import environment
from shards import write_shard
from stores import moto, s3, slow_server, upload  # noqa: F401 - fixtures

from diffclip.base import objects
from diffclip.base.errors import InputError
from diffclip.base.objects import Object
from diffclip.data.layout import Layout
from diffclip.data.node_cache import NodeCache
from diffclip.data.pairs import PairTable
from diffclip.data.shard_sizes import SizedShard, sized_shards, write_manifest
from diffclip.data.streamed import StreamedTable, check_room


def shards(folder: Path, *pairs: int) -> Path:
    folder.mkdir()
    for i, count in enumerate(pairs):
        write_shard(folder / f"{i:05d}.tar", count, i)
    return folder


@pytest.mark.slow
def test_patterns_name_objects_in_one_listing_a_folder(s3):  # noqa: F811
    for key in ("d/0.tar", "d/1.tar", "d/2.tar", "d/1.json", "d/deep/3.tar", "e/0.tar"):
        s3.client.put_object(Bucket="bucket", Key=key, Body=b"x" * len(key))

    def names(pattern: str) -> list[str]:
        return [each.url.removeprefix("s3://bucket/") for each in objects.matching(f"s3://bucket/{pattern}")]

    before = len(s3.requests)
    assert names("d/{0..2}.tar") == ["d/0.tar", "d/1.tar", "d/2.tar"] and len(s3.requests) == before + 1
    assert names("d/?.tar") == names("d/{0..2}.tar")
    assert names("**/*.tar") == ["d/0.tar", "d/1.tar", "d/2.tar", "d/deep/3.tar", "e/0.tar"]
    assert names("*/0.tar") == ["d/0.tar", "e/0.tar"] and names("{e,d}/0.tar") == ["e/0.tar", "d/0.tar"]
    found = objects.matching("s3://bucket/d/1.tar")[0]
    assert found.size == 7 and found.version
    with pytest.raises(InputError, match=r"s3://bucket/d/7\.tar: no such object .*\{1,7\}\.tar"):
        objects.matching("s3://bucket/d/{1,7}.tar")


@pytest.mark.slow
def test_what_a_store_refuses_is_said_with_address_and_remedy(s3, tmp_path, monkeypatch):  # noqa: F811
    with pytest.raises(InputError, match=r"s3://bucket/no\.tar: no such object; check the address"):
        objects.get("s3://bucket/no.tar", tmp_path / "x")
    with pytest.raises(InputError, match=r"s3://nobody/: the store does not give it .*NoSuchBucket.*AWS_ACCESS_KEY_ID"):
        objects.matching("s3://nobody/*.tar")
    s3.client.put_object(Bucket="bucket", Key="a", Body=b"x")
    with pytest.raises(InputError, match=r"nowhere/x: cannot be written .* make room, or choose another place"):
        objects.get("s3://bucket/a", tmp_path / "nowhere" / "x")
    with pytest.raises(InputError, match=r"nostore://a: is an address that cannot be read"):
        objects.matching("nostore://a/*.tar")


@pytest.mark.slow
def test_stores_that_fsspec_knows_are_read_the_same(tmp_path):
    folder = shards(tmp_path / "d", 3, 2)
    url = f"file://{folder}"
    assert [(o.url, o.size) for o in objects.matching(f"{url}/*.tar")] == [
        (f"{url}/{path.name}", path.stat().st_size) for path in sorted(folder.iterdir())
    ]
    objects.put(f"{url}/a.txt", "text")
    assert objects.read_all([f"{url}/a.txt", f"{url}/b.txt"]) == ["text", None]
    objects.get(f"{url}/00001.tar", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == (folder / "00001.tar").read_bytes()
    with pytest.raises(InputError, match=r"b\.tar: no such object; check the address"):
        objects.get(f"{url}/b.tar", tmp_path / "x")


@pytest.mark.slow
def test_pairs_of_a_store_are_those_of_the_files_with_one_request_a_shard(s3, tmp_path):  # noqa: F811
    folder = shards(tmp_path / "d", 5, 9, 4)
    upload(s3, folder, "d")
    pattern = "s3://bucket/d/{00000..00002}.tar"
    with pytest.raises(InputError, match=r"00000\.tar: how many samples .*shards\.json .* `diffclip data index`"):
        sized_shards([pattern], Layout())
    assert write_manifest(pattern) == "s3://bucket/d/shards.json"
    s3.requests.clear()
    sized = sized_shards([pattern], Layout())
    assert [(s.samples, s.size) for s in sized[0]] == [
        (count, (folder / f"{i:05d}.tar").stat().st_size) for i, count in enumerate((5, 9, 4))
    ]
    assert len(s3.requests) == 2  # a listing and the manifest
    table, local = StreamedTable(sized, Layout(), NodeCache(tmp_path / "c", 1 << 30)), PairTable([str(folder)])
    for row in (17, 0, 3, 5, 13, 14, 4):
        assert table.encoded(row) == local.encoded(row)
    assert table.key(17) == local.key(17).replace(str(folder), "s3://bucket/d")
    again = StreamedTable(sized, Layout(), NodeCache(tmp_path / "c", 1 << 30))
    assert [again.encoded(row) for row in range(18)] == [local.encoded(row) for row in range(18)]
    assert {path: n for path, n in s3.objects().items() if path.endswith(".tar")} == {
        f"/bucket/d/{i:05d}.tar": 1 for i in range(3)
    }
    assert PairTable([pattern]).encoded(17) == local.encoded(17)  # a table downloads them


def test_the_cache_is_bounded_and_the_longest_unused_goes_first(s3, tmp_path):  # noqa: F811
    for i in range(6):
        s3.client.put_object(Bucket="bucket", Key=f"{i}.tar", Body=bytes(1000))
    cache, every = NodeCache(tmp_path, 3500), objects.matching("s3://bucket/*.tar")

    def there() -> list[int]:
        return [i for i in range(6) if cache.touch(every[i])]

    for i in range(3):
        cache.fetched(every[i])
        os.utime(cache._home(every[i]), (i, i))
    cache.touch(every[0])
    cache.fetched(every[3])
    assert there() == [0, 2, 3]
    for each in every:
        cache.fetched(each)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.tar")) <= 3500
    with pytest.raises(InputError, match=r"shard_cache_gb.*take up to 4e-06 GB.*raise it"):
        check_room(cache, [SizedShard(each.url, 1, each.size) for each in every], 1, 2)


@pytest.mark.slow
def test_a_shard_that_another_has_removed_is_fetched_again(s3, tmp_path):  # noqa: F811
    folder = shards(tmp_path / "d", 5)
    upload(s3, folder, "d")
    write_manifest("s3://bucket/d/*.tar")
    cache = NodeCache(tmp_path / "c", 1 << 30)
    table = StreamedTable(sized_shards(["s3://bucket/d/*.tar"], Layout()), Layout(), cache)
    first = table.encoded(1)
    next((tmp_path / "c").rglob("*.tar")).unlink()
    assert table.encoded(1) == first and s3.objects()["/bucket/d/00000.tar"] == 3  # one of them by `write_manifest`


FETCH = """
import sys
from pathlib import Path
from diffclip.base.objects import Object
from diffclip.data.node_cache import NodeCache
print(NodeCache(Path(sys.argv[1]), 1 << 30).fetched(Object(sys.argv[2], int(sys.argv[3]))))
"""


def fetching(folder: Path, url: str, size: int, **more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, str(folder), url, str(size)]
    return subprocess.Popen(
        command, env=environment() | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_processes_fetch_a_shard_once_and_a_killed_one_leaves_nothing_half(tmp_path, scheme):
    if scheme == "s3":
        pytest.importorskip("obstore")
    body = os.urandom(9_000_000)
    path = "/bucket/a.tar"

    def address(server: str) -> tuple[str, dict[str, str]]:
        settings = {"AWS_ENDPOINT_URL": server, "AWS_SKIP_SIGNATURE": "true", "AWS_REGION": "x"}
        return ("s3://bucket/a.tar", settings) if scheme == "s3" else (server + path, {})

    with slow_server({path: body}, stall_after=8_500_000) as (server, asked):
        url, settings = address(server)
        process = fetching(tmp_path, url, len(body), **settings)
        deadline = time.monotonic() + 30
        while not asked or not any(p.stat().st_size for p in tmp_path.rglob("*") if ".tar" in p.name):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not [*tmp_path.rglob("a.tar")]
    port = 0 if scheme == "s3" else int(server.rpartition(":")[2])  # the killed one's client may ask once more
    with slow_server({path: body}, latency=0.3, port=port) as (server, asked):
        url, settings = address(server)
        processes = [fetching(tmp_path, url, len(body), **settings) for _ in range(2)]
        told = [process.communicate(timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], told
        assert [method for method, _ in asked].count("GET") == 1
    (found,) = tmp_path.rglob("a.tar")
    assert found.read_bytes() == body and told[0][0].strip() == str(found)
    assert [p.name for p in found.parent.iterdir()] == ["a.tar"]


def test_a_shard_of_another_size_than_was_told_is_refused(tmp_path):
    with slow_server({"/a.tar": bytes(1000)}) as (server, _):
        cache = NodeCache(tmp_path, 1 << 20)
        with pytest.raises(InputError, match=r"a\.tar: has 1,000 bytes, and 900 when .* `diffclip data index`"):
            cache.fetched(Object(f"{server}/a.tar", 900))
        assert cache.fetched(Object(f"{server}/a.tar", None)).stat().st_size == 1000
        assert not re.findall("tmp|part", " ".join(p.name for p in tmp_path.rglob("*")))
