"""How fast the built-in world is made on one core: `python -m benchmarks.scenes --size 64 --count 4000`.

Prints images per second for images alone, with five captions, with a conversation, and encoded as PNG.
"""

import time
from collections.abc import Callable
from itertools import islice

from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from diffclip.scenes import drawing as scenes
from diffclip.scenes import parts, questions, text


def rate(make: Callable[[int], object], count: int) -> float:
    for i in range(200):  # fills the caches of shapes and textures
        make(i)
    start = time.perf_counter()
    for i in range(count):
        make(i)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = Parser("python -m benchmarks.scenes", description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--count", type=int, default=4000, help="images per measurement")
    options = parser.parse_args()
    rng = scenes.stream_rng(0, "benchmark/words", 0)

    def scene(i: int) -> scenes.Scene:
        return scenes.make_scene(0, "benchmark", i)

    measured = {
        "image": lambda i: scenes.draw(scene(i), options.size),
        "image and masks": lambda i: (
            scenes.draw(scene(i), options.size),
            scenes.masks(scene(i), options.size),
        ),
        "image and 5 captions": lambda i: (
            scenes.draw(scene(i), options.size),
            text.captions(scene(i), rng, 5),
        ),
        "image and 6 questions": lambda i: (
            scenes.draw(scene(i), options.size),
            questions.rounds(scene(i), rng, 6),
        ),
        "image as PNG": lambda i: parts.png(scene(i), options.size),
    }
    for name, make in measured.items():
        print(f"{name:26s} {rate(make, options.count):8.0f} /s at {options.size} px, one core")
    start = time.perf_counter()
    for _ in islice(scenes.stream(0, "benchmark", options.size), options.count):
        pass
    print(f"{'stream()':26s} {options.count / (time.perf_counter() - start):8.0f} /s")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
