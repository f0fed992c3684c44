"""The measurements of this folder at a small size, in one run: work, peer, ours, theirs, and how many times better.

    OMP_NUM_THREADS=1 python -m benchmarks.all --out all.json      # ten to fifteen minutes on two idle cores
    python -m benchmarks.all --only retrieval probes --minutes 5
    python -m benchmarks.all --table all.json                      # the same table again, for docs/performance.md

Ours and the peer take turns in one process, or have one each; numbers of different rows are of different minutes. Where
a peer or its package is not there the row says so, and a part that fails is a row with its error, exit code 1.
"""

import importlib
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Row
from diffclip.base.commands import Parser, number
from diffclip.base.devices import pick_device
from diffclip.base.errors import exit_on_input_error, first_line
from diffclip.base.files import read_json, write_json
from diffclip.base.lines import print_line

PARTS = ("retrieval", "probes", "mllm", "attention", "train_step", "data", "conversations", "streaming")
BY_THEMSELVES = {  # what needs more than this command, and how it is had
    "pope": "needs a trained run: python -m benchmarks.pope RUN --pope POPE --image_root IMAGES",
    "gpu": "needs a GPU: python -m benchmarks.gpu --out gpu.json",
    "data_size": "opens up to a million pairs: python -m benchmarks.data_size",
}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    named = Path("/proc/cpuinfo").read_text().split("model name") if Path("/proc/cpuinfo").exists() else []
    return {
        "processor": named[1].split("\n")[0].strip("\t: ") if len(named) > 1 else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": pick_device().type,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def measured(part: str) -> list[dict[str, Any]]:
    """The rows of one part with the load before it; of one that fails, a row with the error as its note."""
    load = os.getloadavg()[0]
    try:
        rows: Sequence[Row] = importlib.import_module(f"benchmarks.{part}").rows()
    except Exception as error:  # of any kind: the other parts are measured all the same
        return [without_numbers(part, f"failed: {type(error).__name__}: {first_line(error)}")]
    return [{**row._asdict(), "ratio": row.ratio, "part": part, "load": round(load, 1)} for row in rows]


def without_numbers(part: str, why: str) -> dict[str, Any]:
    """The row of a part that was not measured."""
    return {**Row(part, "", None, 0.0, "", why)._asdict(), "ratio": None, "part": part, "load": ""}


def table(result: Mapping[str, Any]) -> list[str]:
    """The lines of the run as Markdown, with what it was measured on."""
    on = result["machine"]
    lines = [
        f"`python -m benchmarks.all`, {on['time']}, {on['device']}, {on['processor']}, {on['threads']} of "
        f"{on['cores']} cores, torch {on['torch']}. Load is that of the minute before, our own included.",
        "",
        "| work | peer | ours | theirs | times better | load | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        shown = ["" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (row["ours"], row["theirs"])]
        ours, theirs = f"{shown[0]} {row['unit']}" if row["unit"] else "", shown[1]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['work']} | {row['peer']} | {ours} | {theirs} | {ratio} | {row['load']} | {row['note']} |")
    return lines


def print_table(result: Mapping[str, Any]) -> None:
    for line in table(result):
        print_line(line)


def main() -> None:
    parser = Parser("python -m benchmarks.all", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="these parts (all)")
    parser.add_argument("--minutes", type=number(float, 0), default=30.0, help="start no part after so many (30)")
    parser.add_argument("--out", type=Path, help="keep the numbers there, as JSON")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print_table(read_json(options.table))
        return
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    start = time.monotonic()
    for part in options.only:
        if time.monotonic() - start > 60 * options.minutes:
            result["rows"].append(without_numbers(part, f"not measured: {options.minutes:g} minutes were over"))
            continue
        print_line(f"{part} ({(time.monotonic() - start) / 60:.1f} minutes)", error=True)
        result["rows"] += measured(part)
        if options.out:
            write_json(options.out, result)  # also what a run that is ended has measured
    result["rows"] += [without_numbers(part, why) for part, why in BY_THEMSELVES.items()]
    if options.out:
        write_json(options.out, result)
    print_table(result)
    if any(row["note"].startswith("failed") for row in result["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
