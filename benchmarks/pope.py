"""POPE by exact margins beside the usual ways to answer it, on one trained run, side by side.

    OMP_NUM_THREADS=1 python -m benchmarks.pope RUN --pope POPE --image_root IMAGES [--images 12]

- exact: all questions of an image in one row behind their common beginning (`mllm.pope.margins.margins`)
- batches: greedy generation of 16 questions at a time, each asked once about an image
- one at a time: greedy generation question by question, as evaluation scripts do, repetitions between splits included
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from mllm.model import load
from mllm.pope.images import find_images
from mllm.pope.margins import generate, margins, predictions
from mllm.pope.parsers import parse_strict
from mllm.pope.questions import POST_PROMPT, read


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = do()
    return time.perf_counter() - start, result


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.pope", description=__doc__)
    parser.add_argument("run", help="a run of stages.instruct")
    parser.add_argument("--pope", type=Path, required=True)
    parser.add_argument("--image_root", type=Path, required=True)
    parser.add_argument("--images", "--pictures", type=int, default=12, help="images whose questions are asked (12)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds in which the ways take turns (2)")
    options = parser.parse_args(argv)
    questions = read(options.pope)
    chosen = set(list(dict.fromkeys(q.image for q in questions))[: options.images])
    questions = [q for q in questions if q.image in chosen]
    places = find_images(questions, options.image_root)
    vlm = load(options.run, device=None)

    def open_image(name: str) -> Any:
        return places[name].open()

    def one_at_a_time() -> list[str]:
        return [vlm.ask(q.text + POST_PROMPT, [open_image(q.shown)], max_new_tokens=16) for q in questions]

    ways = {
        "exact": lambda: margins(vlm, questions, open_image),
        "batches": lambda: generate(vlm, questions, open_image),
        "one at a time": one_at_a_time,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    margins(vlm, questions[:8], open_image)  # warms up
    for _ in range(options.rounds):
        for name, do in ways.items():
            spent, results[name] = timed(do)
            seconds[name].append(spent)
    unique = len({(q.shown, q.text) for q in questions})
    counts = f"{len(questions)} questions ({unique} different) about {len(chosen)} images"
    print(f"{counts}, {torch.get_num_threads()} threads")
    usual = min(seconds["one at a time"])
    for name, times in seconds.items():
        print(f"{name:14s} {1e3 * min(times) / len(questions):8.1f} ms a question, {usual / min(times):5.1f}x")
    generated = [parse_strict(text) for text in results["one at a time"]]
    same = np.mean([a == b for a, b in zip(predictions(results["exact"]), generated)])
    print(f"the likelier of yes and no is the generated answer for {100 * same:.1f} % of the questions")


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
