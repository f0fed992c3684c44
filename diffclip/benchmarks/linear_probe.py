"""Linear probe as the paper's evaluation code (lgssl) defines it: softmax regression on frozen features.

The strength of its regularisation is searched on validation rows. `exact` is the official solver step for
step (`lbfgs.py`), `fast` goes to the minimum of the same objective.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

from diffclip.base.errors import InputError
from diffclip.benchmarks.images import Images
from diffclip.benchmarks.lbfgs import lbfgs
from diffclip.benchmarks.protocol import Classification, Evaluation, Protocol
from diffclip.benchmarks.zero_shot import balanced, mean_per_class

METRICS = ("accuracy", "mean_per_class")
MODES = ("exact", "fast")
COARSE = tuple(float(10**power) for power in range(-6, 7, 2))

Weights = tuple[Tensor, Tensor]  # (classes, width), (classes,)


class Probe(NamedTuple):
    """Result of a linear probe; scores in percent."""

    score: float  # by the metric that C was chosen with
    predicted: Tensor  # (test rows,) int64
    C: float
    visited: list[tuple[float, float]]  # (C, validation score), in the order tried


def linear_probe(
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor] | None,
    test: tuple[Tensor, Tensor],
    *,
    metric: str = "accuracy",
    mode: str = "exact",
    refit_on_both: bool = True,
) -> Probe:
    """Choose C on the validation rows, refit, score the test rows.

    Features are used as they come (the protocol takes them before the projection, un-normalised).

    Args:
        train, valid, test: (features (N, width), labels (N,)) each; float64 is kept, all else fitted in float32.
            Without valid, a fifth of each class of train is set aside by a fixed shuffle.
        metric: "accuracy" or "mean_per_class".
        mode: "exact" or "fast". The official fit stops after 1,000 steps, before its minimum where the penalty is
            weak (C from some hundreds on), so the two may part by a row or two there; where few validation rows
            decide, that can choose another C, as rounding does for the official fit itself (`benchmarks.probes`).
        refit_on_both: fit the final weights on train and valid together.

    Raises:
        ValueError: unknown metric or mode, or a test label that is not among the training labels.
        InputError: without valid, no class has the rows to set one aside.
    """
    if metric not in METRICS or mode not in MODES:
        raise ValueError(f"metric is one of {METRICS} and mode one of {MODES}, not {metric!r} and {mode!r}")
    if not set(test[1].tolist()) <= set(train[1].tolist()):
        raise ValueError("the test set has classes without training rows")
    if valid is None:
        kept, held = hold_out(train[1])
        if not held:
            raise InputError("no class has the rows to set one aside for validation: give a val split, or more rows")
        train, valid = (train[0][kept], train[1][kept]), (train[0][held], train[1][held])
    classes = int(max(train[1].max(), valid[1].max())) + 1

    def solver(rows: tuple[Tensor, Tensor]) -> Callable[[float], Weights]:
        features, labels = at_least_float32(rows[0]), rows[1].long()
        if mode == "fast":
            return fast_solver(features, labels, classes)
        return lambda C: fit(features, labels, C, classes)

    final = (torch.cat([train[0], valid[0]]), torch.cat([train[1], valid[1]])) if refit_on_both else train
    small = train[0].numel() * classes < 5e8
    with single_thread() if small else nullcontext():
        fit_train = solver(train)
        C, visited = search(lambda C: percent(predict(valid[0], fit_train(C)), valid[1], metric))
        predicted = predict(test[0], solver(final)(C))
    return Probe(percent(predicted, test[1], metric), predicted, C, visited)


@contextmanager
def single_thread() -> Iterator[None]:
    """Keep torch and BLAS to one thread.

    A small fit is thousands of calls of microseconds; threads that wait for a busy core in each made it 90
    times slower on a loaded machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def search(validate: Callable[[float], float]) -> tuple[float, list[tuple[float, float]]]:
    """Find C by the official two passes: seven decades apart, then thirds of a 29-point grid around the best.

    The second pass keeps the lower half of the grid where its quarter point is best, else the upper half
    where the three-quarter point is, else the middle; equal scores count as best.

    Returns:
        the C of the best score, of equals the one tried first, and every (C, score) in the order tried.
    """
    coarse = [(C, validate(C)) for C in COARSE]
    best, score = max(coarse, key=lambda pair: pair[1])
    scores = {best: score}  # of the second pass, which begins with the best of the first
    centre = torch.tensor(best).log10()
    grid: list[float] = torch.logspace(centre - 2, centre + 2, 29).tolist()
    grid = [C for C in grid if COARSE[0] <= C <= COARSE[-1]]
    while len(grid) > 1:
        low, middle, high = len(grid) // 4, len(grid) // 2, -len(grid) // 4
        points = [grid[low], grid[middle], grid[high]]
        for C in points:
            if C not in scores:
                scores[C] = validate(C)
        top = max(scores[C] for C in points)
        if scores[points[0]] == top:
            grid = grid[:middle]
        elif scores[points[2]] == top:
            grid = grid[middle:]
        else:
            grid = grid[low:high]
    return max(scores, key=scores.__getitem__), coarse + list(scores.items())[1:]


def predict(features: Tensor, weights: Weights) -> Tensor:
    """The most likely class of each row, (N,) int64."""
    W, b = weights
    return (at_least_float32(features).to(W) @ W.T + b).argmax(dim=1).cpu()


def at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def percent(predicted: Tensor, labels: Tensor, metric: str) -> float:
    """Accuracy, or the mean of the recalls of the classes present, in percent."""
    correct = predicted == labels.cpu()
    return mean_per_class(correct, labels.cpu()) if metric == "mean_per_class" else 100 * correct.double().mean().item()


def hold_out(labels: Tensor, share: float = 0.2, seed: int = 93) -> tuple[list[int], list[int]]:
    """Rows (kept, held out) within each class as the official code has them, classes in order of first appearance."""
    rows = defaultdict(list)
    for row, label in enumerate(labels.tolist()):
        rows[label].append(row)
    kept, held = [], []
    for members in rows.values():
        random.Random(seed).shuffle(members)  # anew for each class
        cut = int(share * len(members))
        held += members[:cut]
        kept += members[cut:]
    return kept, held


@torch.no_grad()
def fit(features: Tensor, labels: Tensor, C: float, classes: int, max_iter: int = 1000) -> Weights:
    """Minimise the mean cross-entropy + 0.5/C * ||W||_F as the official code does: from zero, L-BFGS with strong Wolfe
    search, full batch. The norm is not squared, the bias is free.

    For C of 0.01 and below the first step goes uphill, the weights stay zero and every row is class 0;
    that is part of the protocol.

    Args:
        features: (N, width) float32 or float64.
        labels: (N,) int64 below `classes`.
    """
    rows, width = features.shape
    strength, of_label = 0.5 / C, labels[:, None]
    share = features.new_full((rows, 1), 1 / rows)

    def objective(theta: Tensor) -> tuple[float, Tensor]:
        """Its value and gradient at the weights, (classes * width,), followed by the biases, (classes,)."""
        W, b = theta[:-classes].view(classes, width), theta[-classes:]
        log_p = torch.addmm(b, features, W.T).log_softmax(dim=1)  # (N, classes)
        length = W.norm()
        value = float(strength * length - log_p.gather(1, of_label).mean())  # summed, and so rounded, in its dtype
        norm = float(length)
        error = log_p.exp_().div_(rows).scatter_add_(1, of_label, -share)
        slope = torch.addmm(W, error.T, features, beta=strength / norm if norm else 0)
        return value, torch.cat([slope.flatten(), error.sum(dim=0)])

    theta = lbfgs(objective, features.new_zeros(classes * width + classes), max_iter)
    return theta[:-classes].view(classes, width), theta[-classes:]


def fast_solver(features: Tensor, labels: Tensor, classes: int) -> Callable[[float], Weights]:
    """Return C -> weights that minimise what `fit` does, each from the solution of the nearest C so far.

    Works in the eigenbasis of the features' covariance S, scaled by (S + r)^(-1/2), where r is the curvature of the
    norm over that of the cross-entropy: there the objective's curvature is about the same in all directions, which
    takes L-BFGS some tens of steps instead of a thousand. The curvature of the cross-entropy falls a thousandfold
    once the classes are separated, so that r is taken anew until that gains nothing. float64 on the CPU. Where the
    official fit cannot leave zero this one stays there too.
    """
    mean = features.double().mean(dim=0)
    spread, basis = torch.linalg.eigh((features.double() - mean).T.cov(correction=0))
    spread = spread.clamp_min(0)
    rotated = (features.double() - mean) @ basis  # (N, width); shifting by the mean only moves the bias
    onehot = F.one_hot(labels, classes).double()
    # gradient of the data term at zero, for the official features: the direction of the official first step
    error = (1 / classes - onehot) / len(features)
    first_W, first_b = error.T @ features.double(), error.sum(dim=0)
    solved: dict[float, Weights] = {}  # in the rotated basis

    def descend(W: Tensor, b: Tensor, strength: float, r: float) -> tuple[Weights, float, bool]:
        """The weights after at most 100 steps, by how much of itself the objective fell, and if it ended."""
        scale = (spread + r + 1e-9 * spread.max()).rsqrt()
        inputs = rotated * scale

        def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            """The objective over `strength`, which keeps the tolerances' meaning however small it is."""
            theta = torch.from_numpy(flat).view(classes, -1)  # (classes, width + 1), bias last
            V, b = theta[:, :-1], theta[:, -1]
            log_p = torch.addmm(b, inputs, V.T).log_softmax(dim=1)  # (N, classes)
            error = (log_p.exp() - onehot) / len(inputs)
            W = V * scale
            slope = error.T @ inputs + strength * W * scale / W.norm().clamp_min(1e-12)
            loss = -(log_p * onehot).sum() / len(inputs) + strength * W.norm()
            gradient = torch.cat([slope, error.sum(dim=0)[:, None]], dim=1).flatten()
            return loss.item() / strength, (gradient / strength).numpy()

        start = torch.cat([W / scale, b[:, None]], dim=1).flatten().numpy()
        of_norm = (W * scale / W.norm()).abs().max().item()  # at the minimum both gradients are as long
        options = {"maxiter": 100, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-3 * of_norm}
        found = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
        theta = torch.from_numpy(found.x).view(classes, -1)
        fell = (value_and_gradient(start)[0] - found.fun) / found.fun
        return (theta[:, :-1] * scale, theta[:, -1]), fell, found.status != 1  # 1: the steps were too few

    def solve(C: float) -> Weights:
        strength = 0.5 / C
        if first_W.square().sum() + first_b.square().sum() <= strength * first_W.norm():
            return features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
        if solved:
            W, b = solved[min(solved, key=lambda done: abs(math.log(done / C)))]
        else:  # just beside zero, where the norm has no gradient and its curvature no bound
            W, b = -1e-3 * first_W @ basis / first_W.norm(), torch.zeros(classes, dtype=torch.float64)
            (W, b), _, _ = descend(W, b, strength, strength)
        for _ in range(30):
            p = torch.addmm(b, rotated, W.T).softmax(dim=1)
            curvature = (p * (1 - p)).mean().item()
            (W, b), fell, ended = descend(W, b, strength, strength / W.norm().item() / max(curvature, 1e-30))
            if ended and fell < 1e-5:
                break
        solved[C] = W, b
        W = W @ basis.T
        return W.to(features), (b - W @ mean).to(features)

    return solve


def images(name: str, labelled: Classification) -> dict[str, Images]:
    """All splits, where there is one to train on."""
    return {f"{name} {s}": rows for s, rows in labelled.splits.items()} if "train" in labelled.splits else {}


def score(evaluation: Evaluation, name: str, labelled: Classification) -> None:
    """Add linear_probe/NAME/{accuracy,mean_per_class,C}."""
    if "train" not in labelled.splits:
        evaluation.skipped[f"linear_probe/{name}"] = "there is no train split"
        return
    rows = {split: evaluation.probe_rows(name, labelled, split) for split in labelled.splits}
    mode = evaluation.settings.probe
    try:
        fitted = linear_probe(rows["train"], rows.get("val"), rows["test"], metric=labelled.metric, mode=mode)
    except InputError as error:
        evaluation.skipped[f"linear_probe/{name}"] = str(error)
        return
    labels = rows["test"][1]
    correct = fitted.predicted == labels
    scores = {metric: percent(fitted.predicted, labels, metric) for metric in METRICS}
    outcomes = {"accuracy": correct, "mean_per_class": balanced(correct, labels)}
    evaluation.add(f"linear_probe/{name}", scores | {"C": fitted.C}, outcomes)


PROTOCOL = Protocol(images, score)
