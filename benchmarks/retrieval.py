"""Retrieval at the size of COCO's test set, ours beside clip-benchmark on the same features: time and memory.

    OMP_NUM_THREADS=1 python -m benchmarks.retrieval [--images 5000] [--captions 5]

clip-benchmark's evaluation is run whole, with an encoder that returns the stored features. Memory is what the process
grew by at its largest, in a process of its own for each side.
"""

import json
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.rows import Row
from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from diffclip.benchmarks.retrieval import recall_at_k

WIDTH = 512


def features(images: int, captions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit vectors that retrieve each other about as well as a CLIP on COCO: images, texts, owner of each text."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(images, WIDTH, generator=generator), dim=1)
    owner = torch.arange(images * captions) // captions
    text = F.normalize(0.12 * image[owner] + 0.05 * torch.randn(len(owner), WIDTH, generator=generator), dim=1)
    return image, text, owner


def ours(images: int, captions: int) -> dict[str, float]:
    return {k: round(v, 3) for k, v in recall_at_k(*features(images, captions)).items()}


def clip_benchmarks(images: int, captions: int) -> dict[str, float]:
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    image, text, _ = features(images, captions)
    model = SimpleNamespace(encode_image=lambda rows: image[rows], encode_text=lambda rows: text[rows])
    batches = [torch.arange(start, min(start + 64, images)) for start in range(0, images, 64)]
    loader = [(rows, [[captions * int(i) + c for c in range(captions)] for i in rows]) for rows in batches]
    scores = evaluate(model, loader, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10])
    names = {"image_retrieval_recall@": "text_to_image/R@", "text_retrieval_recall@": "image_to_text/R@"}
    return {
        new + key[len(old) :]: round(100 * v, 3)
        for key, v in scores.items()
        for old, new in names.items()
        if old in key
    }


def measure(side: str, images: int, captions: int) -> None:
    """Print time, growth of memory and scores as JSON."""
    features(images, captions)
    (ours if side == "ours" else clip_benchmarks)(50, captions)  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    scores = (ours if side == "ours" else clip_benchmarks)(images, captions)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": round(seconds, 2), "megabytes": round(grown), "scores": scores}))


def both(images: int, captions: int) -> dict[str, dict]:
    """What `measure` says of each side, in a process of its own."""
    measured: dict[str, dict] = {}
    for side in ("ours", "clip-benchmark"):
        command = [sys.executable, "-m", "benchmarks.retrieval", "--side", side]
        command += ["--images", str(images), "--captions", str(captions)]
        measured[side] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    return measured


def rows() -> list[Row]:
    """Time and memory by the number of images, with five captions each."""
    found = []
    for images in (500, 1000):
        measured = both(images, 5)
        for key, unit in (("seconds", "s"), ("megabytes", "MB")):
            theirs, mine = (measured[side][key] for side in ("clip-benchmark", "ours"))
            found.append(Row(f"retrieval, {images} images, 5 captions each", "clip-benchmark", theirs, mine, unit))
    return found


def main() -> None:
    parser = Parser("python -m benchmarks.retrieval", description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--side", choices=("ours", "clip-benchmark"), help="measure one side only, as JSON")
    options = parser.parse_args()
    if options.side:
        return measure(options.side, options.images, options.captions)
    measured = both(options.images, options.captions)
    for side in measured:
        print(f"{side:15s} {measured[side]['seconds']:8.2f} s   {measured[side]['megabytes']:6d} MB more")
    print(f"ratio           {measured['clip-benchmark']['seconds'] / measured['ours']['seconds']:8.1f}")
    theirs = measured["clip-benchmark"]["scores"]
    apart = max(abs(value - theirs[name]) for name, value in measured["ours"]["scores"].items())
    print(f"scores differ by at most {apart:.3f} points (one text is {100 / options.images / options.captions:.3f})")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
