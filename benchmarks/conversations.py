"""What conversations cost to open, at the sizes that matter: the first time, their lengths, and every time after that.

    python -m benchmarks.conversations [--rows 10000 100000 665000 1000000] [--tokenizer Qwen/Qwen2.5-0.5B-Instruct]

Rows are synthetic, of the length of LLaVA-665K's (1.5 kB of JSON, one image each, a few turns). Each number is of a
process of its own: seconds without imports (and those of CPU time, the loading processes' included), and megabytes
beyond what the imports take, at most (with what its loading processes have for themselves) or (after) kept.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import numpy as np
import psutil
from PIL import Image

from benchmarks.rows import Row
from diffclip.base.commands import Parser
from diffclip.base.console import print_table
from diffclip.base.errors import exit_on_input_error

IMAGES = 1000  # files; rows show them in turn, and each is looked for anew


def write_rows(path: Path, count: int) -> None:
    """A JSON array of `count` rows like LLaVA-665K's, which show one of IMAGES files each."""
    rng = np.random.default_rng(0)
    syllables = ["ka", "lo", "mi", "ren", "tu", "sa", "bel", "or", "in", "ta", "de", "fu"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(5000)]
    texts = [" ".join(words[i] for i in rng.zipf(1.3, 60) % len(words)) for _ in range(500)]
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            turns = [{"from": "human", "value": f"<image>\n{texts[n % 500][:60]}?"}]
            for k in range(4):
                turns.append({"from": "gpt", "value": texts[(n * 7 + k) % 500]})
                turns.append({"from": "human", "value": f"{texts[(n * 3 + k) % 500][:60]}?"})
            row = {"id": f"{n:012d}", "image": f"coco/{n % IMAGES:012d}.png", "conversations": [*turns[:-1]]}
            file.write(("[" if n == 0 else ",\n") + json.dumps(row))
        file.write("]")


def measure(what: str, folder: str, tokenizer: str, lengths_too: bool) -> None:
    """In a process of its own: print seconds, and megabytes at most and kept, of one way to open the rows."""
    import torch  # noqa: F401 - its memory is not the rows'
    from transformers import AutoTokenizer

    from mllm.data.judge import token_lengths
    from mllm.data.rows import load_rows

    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    process, own, ended = psutil.Process(), [0], Event()
    Thread(target=watch_children, args=(own, ended), daemon=True).start()
    before, peak_before, start, cpu = process.memory_full_info().uss, peak(), time.perf_counter(), cpu_time()
    rows = load_rows([f"{folder}/rows.json"], folder)
    if what == "lengths" or (what == "after" and lengths_too):
        lengths = token_lengths(rows, words, 196, "vicuna")
        assert int(lengths.min()) > 196
    seconds, cpu = time.perf_counter() - start, cpu_time() - cpu
    ended.set()
    kept = process.memory_full_info().uss - before
    assert rows[len(rows) - 1].images
    print(json.dumps([seconds, cpu, (peak() - peak_before + max(own)) / 1e6, kept / 1e6]))


def watch_children(own: list[int], ended: Event) -> None:
    """Append, four times a second, the bytes that the processes below this one have for themselves."""
    while not ended.wait(0.25):
        total = 0
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it has just ended
                total += child.memory_full_info().uss
        own.append(total)


def cpu_time() -> float:
    """Seconds of CPU of this process, and of those below it that have ended."""
    return sum(os.times()[:4])


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def a_tokenizer(folder: Path) -> str:
    """A small byte-level BPE of Qwen2's class, learnt from the rows' own words."""
    from stages.language_modeling import train_tokenizer

    texts = [turn["value"] for row in json.loads((folder / "some.json").read_text()) for turn in row["conversations"]]
    train_tokenizer(texts, 4000).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def prepared(folder: Path, count: int) -> None:
    """Images and so many rows."""
    (folder / "coco").mkdir()
    for n in range(IMAGES):
        Image.new("RGB", (8, 8)).save(folder / f"coco/{n:012d}.png")
    write_rows(folder / "rows.json", count)
    write_rows(folder / "some.json", 500)


def opened(what: str, folder: Path, tokenizer: str, counted: bool) -> list[float]:
    """What `measure` prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.conversations", "--measure", what, str(folder), tokenizer]
    command.append("counted" if counted else "")
    environment = {**os.environ, "DIFFCLIP_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "true"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(told.stdout.splitlines()[-1])


def rows() -> list[Row]:
    """Opening for the first time and again, and what stays in memory, by the number of rows."""
    found = []
    for count in (10_000, 40_000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepared(folder, count)
            tokenizer = a_tokenizer(folder)
            before, start = psutil.Process().memory_full_info().uss, time.process_time()
            whole = json.loads((folder / "rows.json").read_text())
            limit, size = time.process_time() - start, (psutil.Process().memory_full_info().uss - before) / 1e6
            del whole
            for what, label in (("first", "first time"), ("after", "again")):
                _, cpu, _, kept = opened(what, folder, tokenizer, False)
                found.append(Row(f"opening {count:,} conversations, {label}", "json.loads alone", limit, cpu, "s"))
            found.append(Row(f"{count:,} conversations, kept", "json.loads alone", size, kept, "MB"))
    return found


def main() -> None:
    parser = Parser("python -m benchmarks.conversations", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 665_000, 1_000_000])
    parser.add_argument("--lengths", type=int, default=100_000, help="count tokens of up to so many rows (100,000)")
    parser.add_argument("--tokenizer", default="", help="a directory or Hub id (a small one, learnt from the rows)")
    parser.add_argument("--measure", nargs=4, help="of the processes that are measured")
    options = parser.parse_args()
    if options.measure:
        what, folder, tokenizer, counted = options.measure
        return measure(what, folder, tokenizer, counted == "counted")
    table = []
    for count in options.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepared(folder, count)
            tokenizer = options.tokenizer or a_tokenizer(folder)
            size = (folder / "rows.json").stat().st_size / 1e6
            cells = [f"{count:,}", f"{size:,.0f}"]
            for what in ("first", "lengths", "after"):
                if what == "lengths" and count > options.lengths:
                    cells += ["", ""]
                    continue
                seconds, cpu, most, kept = opened(what, folder, tokenizer, count <= options.lengths)
                cells += [f"{seconds:.2f} s ({cpu:.2f})", f"{kept if what == 'after' else most:,.0f} MB"]
            table.append(cells)
            print(cells, flush=True)
    print_table(("rows", "MB of JSON", "first", "at most", "+ lengths", "at most", "after that", "kept"), table)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
