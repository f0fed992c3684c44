"""What streaming takes to start and to hold at the size of CC12M and LAION-400M, and how fast it is from a slow server
beside webdataset's own reader, in one run.

    python -m benchmarks.streaming [--shapes CC12M LAION-400M] [--latency 0.03] [--rounds 3]

The first part simulates a store: a server on the loopback that lists so many shards of 10,000 pairs as S3 does and has
their manifest, but no contents. A process lists them, makes the order of a run, and forks a worker that takes 50,000
items from the middle of an epoch; "MB" is what each adds to its private memory (of /proc/self/smaps_rollup).
The second part reads 16 shards of 500 JPEGs over http with a wait before each answer: bytes and captions of every pair
once, one process, curl as webdataset's client; with litdata installed also by that, from its own format in an S3.
"""

import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.data import render
from benchmarks.rows import Row
from diffclip.base.commands import Parser, number
from diffclip.base.console import print_table
from diffclip.base.errors import exit_on_input_error
from diffclip.data.layout import Layout
from diffclip.data.node_cache import NodeCache
from diffclip.data.shard_sizes import sized_shards, write_manifest
from diffclip.data.stream import Stream
from diffclip.data.streamed import StreamedTable

SHAPES = {"CC12M": 1_240, "LAION-400M": 41_400}
IN_A_SHARD, BYTES = 10_000, 270_000_000
PAGE = 1_000  # keys of a listing


@contextmanager
def server(answer: object, latency: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """Serve what `answer(path)` returns, bytes or None; yields its address and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(latency)
            body = answer(self.path)  # type: ignore[operator]
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if body else None
            headers = {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
            if part:
                first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                body = body[first : last + 1]
            self.send_response(404 if body is None else 206 if part else 200)
            for name, value in (*headers.items(), ("Content-Length", str(len(body or b"")))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body or b"")

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}", asked
    running.shutdown()
    running.server_close()


def store(shards: int) -> object:
    """The answers of an S3 that lists so many shards and has their manifest."""
    names = [f"d/{i:05d}.tar" for i in range(shards)]
    entries = {f"{i:05d}.tar": {"samples": IN_A_SHARD, "bytes": BYTES} for i in range(shards)}
    manifest = json.dumps({"format": 1, "shards": entries}).encode()

    def answer(path: str) -> bytes | None:
        address = urllib.parse.urlsplit(path)
        if address.path.endswith("shards.json"):
            return manifest
        start = int(dict(urllib.parse.parse_qsl(address.query)).get("continuation-token", 0))
        page = "".join(
            f"<Contents><Key>{name}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>&quot;{name}&quot;"
            f"</ETag><Size>{BYTES}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for name in names[start : start + PAGE]
        )
        more = start + PAGE < shards
        token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>bucket</Name><Prefix>d/</Prefix>'
            f"<MaxKeys>{PAGE}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{token}{page}</ListBucketResult>"
        ).encode()

    return answer


def private() -> float:
    """MB that this process has for itself."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Private_")) / 1024


def start(shards: int) -> dict[str, float]:
    """Open so many shards of the store that the environment names, and fork a worker."""
    before, begin = private(), time.perf_counter()
    sized = sized_shards([f"s3://bucket/d/{{00000..{shards - 1:05d}}}.tar"], Layout())
    table = StreamedTable(sized, Layout())
    stream = Stream(table.sizes, global_batch_size=4096, epochs=2, seed=0)
    stream.row(0)
    result = {"seconds": time.perf_counter() - begin, "rank": private() - before}
    reading, writing = os.pipe()
    if os.fork() == 0:
        before, begin = private(), time.perf_counter()
        middle = stream.per_epoch // 2
        for k in range(middle, middle + 50_000):
            stream.soon(k)
            stream.row(k)
        seconds = (time.perf_counter() - begin) / 50_000
        os.write(writing, json.dumps({"worker": private() - before, "item": seconds * 1e6}).encode())
        os._exit(0)
    return result | json.loads(os.read(reading, 1000))


def ours(urls: str, cache: Path) -> int:
    """Every pair once, through a new cache; returns their number."""
    table = StreamedTable(sized_shards([urls], Layout()), Layout(), NodeCache(cache, 1 << 40))
    stream = Stream(table.sizes, global_batch_size=100, epochs=1, seed=0, lanes=4, window=2)
    for k in range(stream.per_epoch):
        table.prepare(*stream.soon(k))
        table.encoded(stream.row(k))
    return stream.per_epoch


def webdatasets(urls: str) -> int:
    """The same by webdataset, with a buffer to shuffle in of as many pairs as our windows hold."""
    import webdataset

    pairs = webdataset.WebDataset(urls, shardshuffle=100).shuffle(4000).to_tuple("jpg", "txt")
    return sum(1 for _ in pairs)


def write_litdata(shards: Path, folder: Path) -> None:
    """The pairs of tars in litdata's own format, in chunks of a shard's size."""
    from litdata.streaming.writer import BinaryWriter

    writer, count = BinaryWriter(str(folder), chunk_bytes=max(p.stat().st_size for p in shards.glob("*.tar"))), 0
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in filter(lambda name: name.endswith(".jpg"), contents):
            writer.add_item(count, {"jpg": contents[name], "txt": contents[f"{name[:-4]}.txt"].decode()})
            count += 1
    writer.done()
    writer.merge()


def litdatas(address: str, cache: Path) -> int:
    """The same by litdata, from its own format in an S3."""
    import litdata

    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # it has no setting for a test's server
    place = litdata.streaming.resolver.Dir(path=str(cache), url="s3://bucket/lit")
    pairs = litdata.StreamingDataset(place, shuffle=True, storage_options={"endpoint_url": address})
    return sum(1 for _ in pairs)


def read_rates(shards: int, per_shard: int, latency: float, rounds: int) -> dict[str, list[float]]:
    """Pairs a second from a slow server, by reader, in turns."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "shards"
        folder.mkdir()
        render(folder, shards, per_shard, 256)
        write_manifest(f"{folder}/*.tar")
        content = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
        with server(content.get, latency) as (address, asked):
            urls = f"{address}/{{00000..{shards - 1:05d}}}.tar"
            cache = Path(place) / "cache"
            readers: dict[str, Callable[[], int]] = {"diffclip": lambda: ours(urls, cache)}
            readers["webdataset"] = lambda: webdatasets(urls)
            if importlib.util.find_spec("litdata"):
                write_litdata(folder, Path(place) / "lit")
                content |= {f"/bucket/lit/{path.name}": path.read_bytes() for path in (Path(place) / "lit").iterdir()}
                readers["litdata"] = lambda: litdatas(address, cache)
            rates: dict[str, list[float]] = {name: [] for name in readers}
            for _ in range(rounds):
                for name, read in readers.items():
                    asked.clear()
                    begin = time.perf_counter()
                    pairs = read()
                    rates[name].append(pairs / (time.perf_counter() - begin))
                    print(f"{name}: {pairs:,} pairs, {len(asked)} requests, {rates[name][-1]:,.0f} pairs/s", flush=True)
                    shutil.rmtree(cache, ignore_errors=True)
    return rates


def started(shards: int, latency: float) -> tuple[dict[str, float], int]:
    """What `start` says of so many shards in a process of its own, and how many requests it made."""
    with server(store(shards), latency) as (address, asked):
        named = {"AWS_ENDPOINT_URL": address, "AWS_SKIP_SIGNATURE": "true", "AWS_REGION": "x"}
        command = [sys.executable, "-m", "benchmarks.streaming", "--start", str(shards)]
        out = subprocess.run(command, env=os.environ | named, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out), len(asked)


def rows() -> list[Row]:
    """Reading from a slow server, and what opening takes by the number of shards."""
    rates = {name: median(each) for name, each in read_rates(4, 250, 0.03, 3).items()}
    work = "streaming 1,000 pairs, answers after 30 ms"
    found = [Row(work, name, rates[name], rates["diffclip"], "pairs/s") for name in [*rates][1:]]
    if "litdata" not in rates:
        found.append(Row(work, "litdata", None, rates["diffclip"], "pairs/s", "litdata is not installed"))
    for name, shards in SHAPES.items():
        measured, _ = started(shards, 0.03)
        for key in ("rank", "worker"):
            note = "no peer knows the order of a run"
            found.append(Row(f"a {key}'s memory, {name}", "none", None, measured[key], "MB", note))
    return found


def main() -> None:
    parser = Parser("python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--latency", type=number(float, 0), default=0.03, help="seconds before each answer")
    parser.add_argument("--rounds", type=number(int, 0), default=3, help="readings of each, in turns")
    parser.add_argument("--start", type=number(int, 1), default=0, help="shards (used by the benchmark itself)")
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start)))
        return
    rows = []
    for name in options.shapes:
        found, requests = started(SHAPES[name], options.latency)
        label = f"{name}: {SHAPES[name]:,} shards, {SHAPES[name] * IN_A_SHARD / 1e6:,.1f} M pairs"
        numbers = (f"{found[key]:.1f}" for key in ("rank", "worker"))
        rows.append((label, f"{found['seconds']:.1f}", str(requests), *numbers, f"{found['item']:.0f}"))
    if rows:
        print_table(("", "seconds to start", "requests", "MB a rank", "MB a worker", "us an item"), rows)
    if not options.rounds:
        return
    rates = read_rates(16, 500, options.latency, options.rounds)
    for name, measured in rates.items():
        print(f"{name:10s} {median(measured):8,.0f} pairs/s ({', '.join(f'{rate:,.0f}' for rate in measured)})")
    for name in [*rates][1:]:
        print(f"ratio to {name} {median(rates['diffclip']) / median(rates[name]):.2f}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
