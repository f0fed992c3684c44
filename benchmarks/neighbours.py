"""What a busy neighbour costs a training on the CPU, by how long OpenMP's threads spin at a barrier.

    python -m benchmarks.neighbours [--steps 60] [--rounds 3]

Each setting trains DiffCLIP-tiny on two threads, alone and beside a process that never rests, in turns; `ours` is what
every command sets (`diffclip.base.threads`).
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.functional import cross_entropy

from diffclip import models
from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error

SETTINGS = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "ours": {},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def train(steps: int) -> float:
    """Samples a second of a training step of DiffCLIP-tiny at batch 64."""
    torch.set_num_threads(2)
    model = models.build("DiffCLIP-tiny")
    size = model.model_config["preprocess_cfg"]["size"]
    images, texts = torch.randn(64, 3, size, size), torch.randint(1, 400, (64, model.context_length))
    optimizer = torch.optim.AdamW(model.parameters())
    start = 0.0
    for step in range(steps + 3):
        if step == 3:  # warmed up
            start = time.perf_counter()
        image, text, scale = model(images, texts)[:3]
        cross_entropy(scale * image @ text.T, torch.arange(64)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return 64 * steps / (time.perf_counter() - start)


def rate(settings: dict[str, str], steps: int, beside: bool) -> float:
    """`train` in a process of its own, with or without a busy one beside it."""
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP} | settings
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if beside else None
    try:
        command = [sys.executable, "-m", "benchmarks.neighbours", "--train", "--steps", str(steps)]
        return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    finally:
        if busy:
            busy.kill()
            busy.wait()


def main() -> None:
    parser = Parser("python -m benchmarks.neighbours", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="training steps a measurement (60)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind; the median is shown (3)")
    parser.add_argument("--train", action="store_true", help="measure once in this process")
    options = parser.parse_args()
    if options.train:
        print(train(options.steps))
        return
    kinds = [(name, beside) for name in SETTINGS for beside in (False, True)]
    rates: dict[tuple[str, bool], list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for name, beside in kinds:
            rates[name, beside].append(rate(SETTINGS[name], options.steps, beside))
    print(f"{'samples/s, median of ' + str(options.rounds):24}{'alone':>10}{'beside':>10}")
    for name in SETTINGS:
        alone, beside = (statistics.median(rates[name, busy]) for busy in (False, True))
        print(f"{name:24}{alone:10.0f}{beside:10.0f}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
