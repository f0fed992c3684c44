"""The fast linear probe beside the official solver, and vectorised few-shot beside a loop over episodes.

    OMP_NUM_THREADS=1 python -m benchmarks.probes [--model RUN ... --data-root DATA] [--rows 3000] [--episodes 2000]

Without models it draws classes of unequal spread on features whose directions differ in scale a thousandfold, as a
vision tower's do. The official solver runs in float32, as published, and in float64: how far apart these two end is
what rounding alone does to a score where few validation rows choose C.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import diffclip
from benchmarks.rows import Row
from diffclip.base.commands import Parser
from diffclip.base.errors import exit_on_input_error
from diffclip.benchmarks import datasets, features, few_shot, linear_probe

Rows = tuple[torch.Tensor, torch.Tensor]


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
    accuracies = []
    for support, query in zip(e.support, e.query):
        query = query[query >= 0]
        mean = s[support].mean(dim=0)
        a = torch.nn.functional.normalize(s[support] - mean, dim=1)
        b = torch.nn.functional.normalize(q[query] - mean, dim=1)
        classes = ys[support].unique()
        prototypes = torch.stack([a[ys[support] == c].mean(dim=0) for c in classes])
        predicted = classes[torch.cdist(b, prototypes).argmin(dim=1)]
        accuracies.append((predicted == yq[query]).double().mean())
    return 100 * torch.stack(accuracies).mean().item()


def drawn(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Rows], str]]:
    x, y = draw(2 * options.rows, options.width, options.classes)
    yield "drawn", {"train": (x[: options.rows], y[: options.rows]), "test": (x[options.rows :], y[options.rows :])}, ""


def of_models(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Rows], str]]:
    """Every set with a train split under the data root, with the features of every model."""
    data = datasets.read(options.data_root, datasets.suite_from_folder(options.data_root))
    for source in options.model:
        encoder = features.Encoder(*diffclip.load(source), cache_dir=options.cache, quiet=True)
        for name, labelled in data.classification.items():
            if "train" in labelled.splits:
                features_of = {split: encoder.images(images, name) for split, images in labelled.splits.items()}
                yield (
                    f"{Path(source).name} {name}",
                    {s: (f.before, f.labels) for s, f in features_of.items()},
                    labelled.metric,
                )


def torchs_fit(
    features: torch.Tensor, labels: torch.Tensor, C: float, classes: int, max_iter: int = 1000, history_size: int = 100
) -> tuple[torch.Tensor, torch.Tensor]:
    """The official fit as the official code does it, by torch's optimiser."""
    W = features.new_zeros(classes, features.shape[1], requires_grad=True)
    b = features.new_zeros(classes, requires_grad=True)
    options = {"max_iter": max_iter, "history_size": history_size, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([W, b], lr=1, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(features @ W.T + b, labels) + (1 / C) * 0.5 * W.norm(p=2)
        loss.backward()
        return loss

    optimizer.step(closure)
    return W.detach(), b.detach()


def rows() -> list[Row]:
    """Both solvers on drawn features, the official one by torch as well, and few-shot over all episodes at once."""
    x, y = draw(1200, 96, 10)
    train, test = (x[:600], y[:600]), (x[600:], y[600:])
    fits = []
    for fit in (torchs_fit, linear_probe.fit):
        fit(train[0][:50], train[1][:50], 1.0, 10)  # what is imported at a first call is not measured
        start = time.perf_counter()
        for C in (1e2, 1e4):
            fit(*train, C, 10)
        fits.append(time.perf_counter() - start)
    seconds, scores = [], []
    for mode in ("exact", "fast"):
        start = time.perf_counter()
        scores.append(linear_probe.linear_probe(train, None, test, mode=mode).score)
        seconds.append(time.perf_counter() - start)
    episodes = few_shot.draw(train[1], test[1], episodes=500)
    times = [time.perf_counter()]
    for do in (episode_loop, few_shot.accuracies):
        do(train[0], test[0], train[1], test[1], episodes)
        times.append(time.perf_counter())
    note = f"score {scores[1]:.2f}, the official {scores[0]:.2f}"
    return [
        Row("linear probe `exact`, two fits of 600 rows", "torch.optim.LBFGS", *fits, "s"),
        Row("linear probe `fast`, 600 rows", "`exact`", *seconds, "s", note),
        Row("few-shot, 500 episodes", "a loop over them", times[1] - times[0], times[2] - times[1], "s"),
    ]


def main() -> None:
    parser = Parser("python -m benchmarks.probes", description=__doc__)
    parser.add_argument("--model", nargs="*", help="towers whose features are probed, with --data_root")
    parser.add_argument("--data_root", type=Path, help="folder with classification/")
    parser.add_argument("--cache", type=Path, help="where their features are kept")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--episodes", type=int, default=2000)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; scores in percent, C in brackets")
    print(
        f"{'':32s} {'rows':>6s}  {'fast':>18s} {'exact':>18s} {'exact, float64':>18s}   few-shot: together, in a loop"
    )
    seconds: dict[str, list[float]] = {}
    scores: dict[str, list[float]] = {}
    for name, rows, metric in (of_models if options.model else drawn)(options):
        cells = []
        for mode in ("fast", "exact", "float64"):
            given = {s: (x.double() if mode == "float64" else x, y) for s, (x, y) in rows.items()}
            start = time.perf_counter()
            fitted = linear_probe.linear_probe(
                given["train"],
                given.get("val"),
                given["test"],
                metric=metric or "accuracy",
                mode="fast" if mode == "fast" else "exact",
            )
            seconds.setdefault(mode, []).append(time.perf_counter() - start)
            scores.setdefault(mode, []).append(fitted.score)
            cells.append(f"{fitted.score:5.2f} ({fitted.C:6.3g}) {seconds[mode][-1]:4.1f}s")
        (train, y), (test, z) = rows["train"], rows["test"]
        episodes = few_shot.draw(y, z, episodes=options.episodes)
        start = time.perf_counter()
        together = 100 * few_shot.accuracies(train, test, y, z, episodes).mean().item()
        middle = time.perf_counter()
        loop = episode_loop(train, test, y, z, episodes)
        end = time.perf_counter()
        cells.append(f"  {together:.2f} {middle - start:.2f}s, {loop:.2f} {end - middle:.2f}s")
        seconds.setdefault("together", []).append(middle - start)
        seconds.setdefault("loop", []).append(end - middle)
        print(f"{name:32s} {len(y):6d}  {' '.join(cells)}", flush=True)

    total = {mode: sum(times) for mode, times in seconds.items()}
    exact = torch.tensor(scores["exact"])
    for mode in ("fast", "float64"):
        apart = torch.tensor(scores[mode]) - exact
        print(f"{mode} - exact: mean {apart.mean():+.2f} points, mean size {apart.abs().mean():.2f}")
    print(
        f"probe: exact / fast = {total['exact'] / total['fast']:.1f}; few-shot: {total['loop'] / total['together']:.1f}"
    )


if __name__ == "__main__":
    with exit_on_input_error():
        main()
