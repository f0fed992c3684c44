"""Few-shot episodes against the official ones, an episode-by-episode loop, and the rules of drawing."""

import json

import numpy as np
import pytest
import torch

from diffclip.benchmarks import few_shot


@pytest.fixture(scope="module")
def official(golden):
    folder = golden("07b_fewshot")
    features = {k: torch.from_numpy(v) for k, v in np.load(folder / "features.npz").items()}
    return features, np.load(folder / "episodes.npz"), json.loads((folder / "expected.json").read_text())


VARIANTS = (
    "default",
    "no_center",
    "no_normalize",
    "nearest_neighbour_no_average",
    "3shot_10way_q4",
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_episodes_score_as_officially(official, variant):
    f, stored, expected = official
    want = expected[f"{variant}|n_iter=200"]
    config = want["config"]
    rows = [torch.from_numpy(stored[f"{variant}.{side}"]).long() for side in ("support", "query")]
    found = few_shot.accuracies(
        f["train_x"],
        f["test_x"],
        f["train_y"],
        f["test_y"],
        few_shot.Episodes(*rows, config["n_way"]),
        center=config["center_feats"],
        normalize=config["normalize_feats"],
        average=config["average_feats"],
    )
    assert (found - torch.from_numpy(stored[f"{variant}.acc"])).abs().max() < 1e-3
    summary = few_shot.summary(found)
    assert summary["accuracy"] == pytest.approx(want["mean"], abs=1e-3)
    assert summary["sd"] == pytest.approx(want["std_over_episodes_unbiased"], abs=1e-3)
    assert summary["ci95"] == pytest.approx(want["ci95_halfwidth"], abs=1e-3)


def test_own_episodes_agree_with_the_official_mean(official):
    f, _, expected = official
    want = expected["default|n_iter=5000"]
    episodes = few_shot.draw(f["train_y"], f["test_y"])
    found = few_shot.accuracies(f["train_x"], f["test_x"], f["train_y"], f["test_y"], episodes)
    slack = 3 * 2**0.5 * want["ci95_halfwidth"]
    assert few_shot.summary(found)["accuracy"] == pytest.approx(want["mean"], abs=slack)


def pool(per_class, width=8, seed=0):
    labels = torch.cat([torch.full((count,), label) for label, count in per_class.items()])
    generator = torch.Generator().manual_seed(seed)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return torch.randn(len(labels), width, generator=generator) + labels[:, None] / 3, labels


@pytest.mark.parametrize("shot", [1, 3])
def test_blocks_of_episodes_equal_a_plain_loop(shot):
    support_x, support_y = pool({c: 4 + c for c in range(6)})
    query_x, query_y = pool({c: 2 + c for c in range(6)}, seed=1)
    episodes = few_shot.draw(support_y, query_y, way=3, shot=shot, queries=4, episodes=50, seed=5)
    found = few_shot.accuracies(support_x, query_x, support_y, query_y, episodes, block=7)
    for support, query, accuracy in zip(episodes.support, episodes.query, found):
        query = query[query >= 0]
        mean = support_x[support].mean(0)
        unit = [torch.nn.functional.normalize(x - mean, dim=1) for x in (support_x[support], query_x[query])]
        labels = support_y[support]
        classes = labels.unique()
        prototypes = torch.stack([unit[0][labels == c].mean(0) for c in classes])
        nearest = classes[torch.cdist(unit[1], prototypes).argmin(1)]
        assert (nearest == query_y[query]).double().mean().item() == pytest.approx(accuracy.item())


def test_draws_keep_the_rules():
    _, support_y = pool({0: 2, 1: 9, 2: 9, 3: 9, 4: 9, 5: 9})
    _, query_y = pool({0: 9, 1: 2, 2: 9, 3: 9, 4: 9, 6: 9}, seed=1)
    episodes = few_shot.draw(support_y, query_y, way=3, shot=3, queries=4, episodes=400)
    support_labels = support_y[episodes.support].view(400, 3, 3)
    assert (support_labels == support_labels[:, :, :1]).all()  # one class per block
    assert all(len(set(row.tolist())) == 9 for row in episodes.support)  # without replacement
    # class 0 has too few support rows, class 5 no query rows, class 6 no support rows
    assert set(support_labels.unique().tolist()) == {1, 2, 3, 4}
    counts = torch.bincount(support_labels[:, :, 0].flatten())[1:]
    assert counts.min() > 250 and counts.max() < 350  # 300 expected of each
    for row, labels in zip(episodes.query.view(400, 3, 4), support_labels[:, :, 0]):
        for members, label in zip(row, labels):
            real = members[members >= 0]
            assert len(set(real.tolist())) == len(real) == (2 if label == 1 else 4)
            assert (query_y[real] == label).all()


def test_a_seed_fixes_the_episodes():
    _, labels = pool(dict.fromkeys(range(8), 10))
    draws = [few_shot.draw(labels, labels, episodes=20, seed=seed).support for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_too_few_classes_are_refused():
    _, labels = pool({0: 10, 1: 10, 2: 3})
    with pytest.raises(ValueError, match=r"3-way 5-shot needs 3 classes.*found 2"):
        few_shot.draw(labels, labels, way=3)
