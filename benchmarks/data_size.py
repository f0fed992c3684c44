"""What it takes to open pairs: seconds and memory by their number and format, and 12 million of them on a node.

    python -m benchmarks.data_size [--rows 10000 100000 1000000] [--ranks 8] [--workers 2]

Each opening is a process of its own, which imports everything before the clock starts. "MB" is how much its peak grows
(VmHWM). Images are of a few bytes, since none is decoded; shards are hard links to one of 10,000 pairs, and so are
their indices in the last part, in which each rank opens 1,200 of them, draws the order of an epoch, forks workers, and
all read pairs at random: the memory of the node is the sum of what each process adds (Pss), shared pages counted once.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from diffclip.base.commands import Parser, number
from diffclip.base.console import print_table
from diffclip.base.errors import exit_on_input_error
from diffclip.data.layout import Layout
from diffclip.data.pairs import PairTable
from diffclip.data.shards import index_file, index_shard
from diffclip.data.training_pairs import TrainingPairs

IN_A_SHARD = 10_000
SHARDS = 1_200
IMAGE = bytes(1024)


def memory(name: str, file: str) -> int:
    """Kilobytes of this process that a file of /proc names so."""
    with open(f"/proc/self/{file}") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name))


def write_shard(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i in range(IN_A_SHARD):
            for suffix, content in (("jpg", IMAGE), ("txt", b"an image of something, number %d" % i)):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def shards(folder: Path, count: int) -> str:
    for i in range(max(1, count // IN_A_SHARD)):
        if i == 0:
            write_shard(folder / "00000.tar")
        else:
            os.link(folder / "00000.tar", folder / f"{i:05d}.tar")
    return str(folder)


def csv(folder: Path, count: int) -> str:
    (folder / "images").mkdir()
    (folder / "images" / "0.jpg").write_bytes(IMAGE)
    with open(folder / "pairs.csv", "w") as f:
        f.write("image_path,caption\n")
        f.writelines(f'images/0.jpg,"an image of something, number {i}"\n' for i in range(count))
    return str(folder / "pairs.csv")


def jsonl(folder: Path, count: int) -> str:
    (folder / "0.jpg").write_bytes(IMAGE)
    with open(folder / "pairs.jsonl", "w") as f:
        f.writelines(json.dumps({"image": "0.jpg", "caption": f"an image, number {i}"}) + "\n" for i in range(count))
    return str(folder / "pairs.jsonl")


def parquet(folder: Path, count: int) -> str:
    table = pyarrow.table({"jpg": [IMAGE] * count, "caption": [f"an image, number {i}" for i in range(count)]})
    pyarrow.parquet.write_table(table, folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


FORMATS: dict[str, Callable[[Path, int], str]] = {"shards": shards, "csv": csv, "jsonl": jsonl, "parquet": parquet}


def opened(source: str) -> dict[str, float]:
    """Open once in this process, read 100 pairs."""
    start, before = time.perf_counter(), memory("VmHWM", "status")
    table = PairTable([source])
    seconds = time.perf_counter() - start
    for row in np.random.default_rng(0).integers(0, len(table), 100).tolist():
        table.encoded(row)
    return {"pairs": len(table), "seconds": seconds, "MB": (memory("VmHWM", "status") - before) / 1024}


def rank(source: str, workers: int) -> dict[str, float]:
    """What one rank and its forked workers add to the memory of the node, and how long opening took."""
    before = memory("Pss", "smaps_rollup")
    start = time.perf_counter()
    table = PairTable([source])
    pairs = TrainingPairs(table, lambda image: image, lambda texts: texts, global_batch_size=4096, epochs=2, seed=0)
    seconds = time.perf_counter() - start

    def read() -> None:
        start = time.perf_counter()
        for k in range(2000):
            table.encoded(pairs.row(k))
        print(f"a pair's bytes and caption: {(time.perf_counter() - start) / 2000 * 1e6:.0f} us", file=sys.stderr)

    pipes = []
    for _ in range(workers):
        ready, done = os.pipe(), os.pipe()
        if os.fork() == 0:
            read()
            os.write(ready[1], b"x")
            os.close(done[1])
            os.read(done[0], 1)  # until all have been measured
            os._exit(0)
        pipes.append((ready[0], done[1]))
    for ready_end, _ in pipes:
        os.read(ready_end, 1)
    read()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = memory("Pss", "smaps_rollup")
    for child in children:
        text = Path(f"/proc/{child}/smaps_rollup").read_text()
        total += int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss:")))
    for _, done_end in pipes:
        os.close(done_end)
    return {"pairs": len(table), "seconds": seconds, "MB": (total - before) / 1024}


def in_a_process(*arguments: str, cache: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "DIFFCLIP_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "hf")}
    command = [sys.executable, "-m", "benchmarks.data_size", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def main() -> None:
    parser = Parser("python -m benchmarks.data_size", description=__doc__)
    parser.add_argument("--rows", type=number(int, 1), nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", default=[*FORMATS], choices=[*FORMATS])
    parser.add_argument("--ranks", type=number(int, 0), default=8)
    parser.add_argument("--workers", type=number(int, 0), default=2)
    parser.add_argument("--open", default="", help="open this source in this process (used by the benchmark itself)")
    parser.add_argument("--rank", default="", help="be a rank on this source (used by the benchmark itself)")
    options = parser.parse_args()
    if options.open or options.rank:
        print(json.dumps(opened(options.open) if options.open else rank(options.rank, options.workers)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, write in ((name, FORMATS[name]) for name in options.formats):
            for count in options.rows:
                folder, cache = Path(place) / f"{name}{count}", Path(place) / f"cache{name}{count}"
                folder.mkdir()
                source = write(folder, count)
                for when in ("first", "again"):
                    out, _ = in_a_process("--open", source, cache=cache).communicate()
                    found = json.loads(out)
                    rows.append(
                        (f"{name}, {found['pairs']:,}, {when}", f"{found['seconds']:.2f}", f"{found['MB']:,.0f}")
                    )
                    print(*rows[-1], sep="\t", flush=True)
                shutil.rmtree(folder)
                shutil.rmtree(cache, ignore_errors=True)
        if options.ranks:
            folder, cache = Path(place) / "node", Path(place) / "cache"
            folder.mkdir()
            shards(folder, IN_A_SHARD * SHARDS)
            os.environ["DIFFCLIP_CACHE"] = str(cache)
            first = index_shard(str(folder / "00000.tar"), Layout()).file
            assert first is not None
            for path in sorted(folder.glob("*.tar"))[1:]:
                os.link(first, index_file(str(path), Layout()))
            ranks = [
                in_a_process("--rank", str(folder), "--workers", str(options.workers), cache=cache)
                for _ in range(options.ranks)
            ]
            results = [json.loads(process.communicate()[0]) for process in ranks]
            seconds, total = max(r["seconds"] for r in results), sum(r["MB"] for r in results)
            node = f"{results[0]['pairs']:,} pairs, {options.ranks} ranks of {options.workers} workers"
            rows.append((node, f"{seconds:.1f}", f"{total:,.0f}"))
            index = sum(os.path.getsize(index_file(str(path), Layout())) for path in folder.glob("*.tar"))
            rows.append(("index of these on the disk", "", f"{index / 2**20:,.0f}"))
    print_table(("", "seconds", "MB"), rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
