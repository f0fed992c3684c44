"""Few-shot classification by nearest class mean, as the paper's evaluation code (lgssl) defines it.

Thousands of episodes are drawn and scored together as tensors; an episode is rows of a support and a query pool.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffclip.benchmarks.images import Images
from diffclip.benchmarks.protocol import Classification, Evaluation, Protocol


class Episodes(NamedTuple):
    """E episodes as row numbers; rows of one class stand together, -1 pads a class with too few queries."""

    support: Tensor  # (E, way * shot) int64
    query: Tensor  # (E, way * queries) int64
    way: int


def draw(
    support_labels: Tensor,
    query_labels: Tensor,
    *,
    way: int = 5,
    shot: int = 5,
    queries: int = 6,
    episodes: int = 5000,
    seed: int = 0,
) -> Episodes:
    """Draw `way` classes, `shot` support rows and up to `queries` query rows of each, without replacement.

    The same seed and labels give the same episodes, so two models can be compared episode by episode.

    Raises:
        ValueError: fewer than `way` classes have `shot` support rows and a query row.
    """
    generator = torch.Generator().manual_seed(seed)
    support_rows, query_rows = _rows_by_class(support_labels), _rows_by_class(query_labels)
    usable = [c for c, rows in support_rows.items() if len(rows) >= shot and c in query_rows]
    if len(usable) < way:
        raise ValueError(f"{way}-way {shot}-shot needs {way} classes with {shot} support rows, found {len(usable)}")
    support_table = pad_sequence([support_rows[c] for c in usable], batch_first=True, padding_value=-1)
    query_table = pad_sequence([query_rows[c] for c in usable], batch_first=True, padding_value=-1)
    if query_table.shape[1] < queries:  # (classes, most rows of a class)
        query_table = F.pad(query_table, (0, queries - query_table.shape[1]), value=-1)

    support, query = [], []
    for count in torch.arange(episodes).split(256):
        chosen = torch.rand(len(count), len(usable), generator=generator).topk(way).indices  # (episodes, way)
        support.append(_sample(support_table[chosen], shot, generator))
        query.append(_sample(query_table[chosen], queries, generator))
    return Episodes(torch.cat(support), torch.cat(query), way)


@torch.no_grad()
def accuracies(
    support_features: Tensor,
    query_features: Tensor,
    support_labels: Tensor,
    query_labels: Tensor,
    episodes: Episodes,
    *,
    center: bool = True,
    normalize: bool = True,
    average: bool = True,
    block: int = 32,
) -> Tensor:
    """The accuracy of each episode, (E,) float64 in [0, 1].

    Both sides are shifted by the mean of the support rows, scaled to unit length; a class is the plain mean of its
    support rows (each of them, without `average`), the nearest by Euclidean distance wins.
    """
    support_features, query_features = support_features.float(), query_features.float()
    if center:  # each episode's own centring follows; near zero, products of float32 lose least
        middle = support_features.mean(dim=0)
        support_features, query_features = support_features - middle, query_features - middle
    support_squares, query_squares = support_features.square().sum(dim=1), query_features.square().sum(dim=1)

    def inverse_length(squares: Tensor, along_mean: Tensor, mean: Tensor) -> Tensor:
        """1 / |x - mean| from |x|^2 and x mean, (E, rows); ones without `normalize`."""
        distances = (squares - 2 * along_mean + mean.square().sum(dim=2)).clamp_min(1e-12)
        return distances.rsqrt() if normalize else torch.ones_like(distances)

    found = []
    for support, query in zip(episodes.support.split(block), episodes.query.split(block)):
        s = support_features[support]  # (E, way * shot, width)
        labels = support_labels[support]
        mean = s.mean(dim=1, keepdim=True) if center else torch.zeros_like(s[:, :1])
        weight = inverse_length(support_squares[support], (s @ mean.transpose(1, 2))[..., 0], mean)[..., None]
        if average:  # of all (s - mean) weight of a class, without ever writing these out
            labels = labels.unflatten(1, (episodes.way, -1))[:, :, 0]
            s, weight = s.unflatten(1, (episodes.way, -1)), weight.unflatten(1, (episodes.way, -1))
            s = (weight.transpose(2, 3) @ s)[:, :, 0] / s.shape[2] - mean * weight.mean(dim=2)  # (E, way, width)
        else:
            s = (s - mean) * weight
        # of a query q too only products are needed: |q - s|^2 without |q|^2, which is the same for all classes
        rows = query.clamp_min(0)
        products = query_features[rows] @ torch.cat([s, mean], dim=1).transpose(1, 2)  # (E, queries, way + 1)
        along = products[..., :-1] - mean @ s.transpose(1, 2)  # (q - mean) s
        along = along * inverse_length(query_squares[rows], products[..., -1], mean)[..., None]
        distance = s.square().sum(-1)[:, None] - 2 * along  # (E, queries, way)
        predicted = labels.gather(1, distance.argmin(dim=2))
        real = query >= 0
        right = (predicted == query_labels[rows]) & real
        found.append(right.sum(1).double() / real.sum(1))
    return torch.cat(found)


def summary(accuracy: Tensor) -> dict[str, float]:
    """Mean, sd over episodes (unbiased) and half-width of the 95 % interval of the mean, percent."""
    sd = 100 * accuracy.std().item()
    return {"accuracy": 100 * accuracy.mean().item(), "sd": sd, "ci95": 1.96 * sd / len(accuracy) ** 0.5}


def _rows_by_class(labels: Tensor) -> dict[int, Tensor]:
    return {int(label): (labels == label).nonzero()[:, 0] for label in labels.unique()}


def _sample(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of each row of (E, way, rows) without replacement, padding last: (E, way * count)."""
    order = torch.rand(rows.shape, generator=generator).masked_fill(rows < 0, -1).topk(count).indices
    return rows.gather(2, order).flatten(1)


def images(name: str, labelled: Classification) -> dict[str, Images]:
    splits = ("train", "test") if "train" in labelled.splits else ()
    return {f"{name} {split}": labelled.splits[split] for split in splits}


def score(evaluation: Evaluation, name: str, labelled: Classification) -> None:
    """Add few_shot/NAME/{accuracy,sd,ci95}."""
    if "train" not in labelled.splits:
        evaluation.skipped[f"few_shot/{name}"] = "there is no train split"
        return
    train, train_labels = evaluation.probe_rows(name, labelled, "train")
    test, labels = evaluation.probe_rows(name, labelled, "test")
    use = evaluation.settings
    try:
        episodes = draw(train_labels, labels, way=use.way, shot=use.shot, episodes=use.episodes, seed=use.seed)
    except ValueError as error:
        evaluation.skipped[f"few_shot/{name}"] = str(error)
        return
    accuracy = accuracies(train, test, train_labels, labels, episodes)
    evaluation.add(f"few_shot/{name}", summary(accuracy), {"accuracy": accuracy})


PROTOCOL = Protocol(images, score)
