"""The fast linear probe beside the official solver, and vectorised few-shot beside a loop over episodes.

    OMP_NUM_THREADS=1 python -m benchmarks.probes [--features FILE.safetensors ...] [--rows 3000] [--episodes 2000]

Without features of your own (a file of the feature cache has `before` and `labels`) it draws classes of unequal spread
on features whose directions differ in scale a thousandfold, as a vision tower's do.
"""

import argparse
import time

import torch

from diffclip.benchmarks import few_shot, linear_probe


def draw(rows: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (rows, width) and labels; classes overlap so that the best probe is right four times in five."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, width)[torch.randperm(width, generator=generator)]
    centres = 0.35 * torch.randn(classes, width, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    spread = 0.5 + torch.rand(classes, 1, generator=generator)
    noise = torch.randn(rows, width, generator=generator) * spread[labels]
    return ((centres[labels] + noise) * scale + 0.3), labels


def episode_loop(s: torch.Tensor, q: torch.Tensor, ys: torch.Tensor, yq: torch.Tensor, e: few_shot.Episodes) -> float:
    """Mean accuracy in percent, one episode after the other."""
    found = []
    for support, query in zip(e.support, e.query):
        query = query[query >= 0]
        mean = s[support].mean(dim=0)
        a = torch.nn.functional.normalize(s[support] - mean, dim=1)
        b = torch.nn.functional.normalize(q[query] - mean, dim=1)
        classes = ys[support].unique()
        prototypes = torch.stack([a[ys[support] == c].mean(dim=0) for c in classes])
        predicted = classes[torch.cdist(b, prototypes).argmin(dim=1)]
        found.append((predicted == yq[query]).double().mean())
    return 100 * torch.stack(found).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", nargs=2, metavar=("TRAIN", "TEST"), help="two files of the feature cache")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=2000)
    options = parser.parse_args()
    if options.features:
        from safetensors.torch import load_file

        train, test = ((f["before"].float(), f["labels"]) for f in map(load_file, options.features))
    else:
        x, y = draw(2 * options.rows, options.width, options.classes)
        train, test = (x[: options.rows], y[: options.rows]), (x[options.rows :], y[options.rows :])
    print(f"{len(train[0])} + {len(test[0])} rows of width {train[0].shape[1]}, {torch.get_num_threads()} threads")

    seconds, scores = {}, {}
    for mode in ("fast", "exact"):
        start = time.perf_counter()
        found = linear_probe.linear_probe(train, None, test, mode=mode)
        seconds[mode], scores[mode] = time.perf_counter() - start, found.score
        print(f"probe, {mode:5s}  {seconds[mode]:7.2f} s   accuracy {found.score:.2f}   C {found.C:.3g}")
    print(f"ratio {seconds['exact'] / seconds['fast']:.1f}, {abs(scores['fast'] - scores['exact']):.2f} points apart")

    episodes = few_shot.draw(train[1], test[1], episodes=options.episodes)
    arguments = (train[0], test[0], train[1], test[1], episodes)
    start = time.perf_counter()
    ours = 100 * few_shot.accuracies(*arguments).mean().item()
    middle = time.perf_counter()
    loop = episode_loop(*arguments)
    end = time.perf_counter()
    print(f"few-shot, together {middle - start:.2f} s, in a loop {end - middle:.2f} s ({ours:.2f} and {loop:.2f} %)")
    print(f"ratio {(end - middle) / (middle - start):.1f}")


if __name__ == "__main__":
    main()
