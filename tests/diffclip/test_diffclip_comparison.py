"""Tables of models and seeds: means, sample deviations, and intervals against scipy's own tests."""

import json

import numpy as np
import pytest
from scipy import stats

from diffclip.base.errors import InputError
from diffclip.benchmarks.comparison import compare, markdown, model_groups, model_names


def test_groups_of_seeds():
    assert model_groups(["runs/clip", "new=a/0,b/1"][:1]) == {"clip": ["runs/clip"]}
    assert model_groups(["CLIP=a/0,a/1", "D=b/0,b/1"]) == {"CLIP": ["a/0", "a/1"], "D": ["b/0", "b/1"]}
    with pytest.raises(InputError, match="two models are called x"):
        model_groups(["a/x", "a/x"])
    with pytest.raises(InputError, match="two models are called x"):
        model_groups(["x=a", "x=b"])
    with pytest.raises(InputError, match="the same number of seeds"):
        model_groups(["CLIP=a/0,a/1", "D=b/0"])


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(tmp_path):
    runs = [f"{tmp_path}/runs/{arm}/pretrain" for arm in ("clip", "diffclip")]
    assert model_groups(runs) == {"clip": [runs[0]], "diffclip": [runs[1]]}
    assert model_names(["a/x", "b/y"]) == ["x", "y"]
    assert model_names([*runs, "other/best.pt"]) == ["clip", "diffclip", "best.pt"]
    assert model_names(["runs/a", "runs/a/a"]) == ["a", "a-a"]


def test_a_run_is_called_by_the_model_that_it_records(tmp_path):
    runs = [tmp_path / f"seed{seed}" / model / "pretrain" for seed in (0, 1) for model in ("CLIP", "DiffCLIP")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"model": f"{run.parent.name}-tiny"}))
    assert model_names(list(map(str, runs[:2]))) == ["CLIP-tiny", "DiffCLIP-tiny"]
    assert model_names(list(map(str, runs[:3]))) == ["CLIP-tiny-seed0", "DiffCLIP-tiny", "CLIP-tiny-seed1"]


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    run = tmp_path / "lr=0.1" / "best"
    run.mkdir(parents=True)
    assert model_groups([str(run)]) == {"best": [str(run)]}


def test_one_seed_is_judged_by_items_and_several_by_seeds():
    right = np.array([1, 0] * 50, dtype=float)
    better = np.maximum(right, np.arange(100) % 10 == 1)  # ten of the wrong ones right
    outcomes = {"a": [{"zero_shot/x/top1": right}], "b": [{"zero_shot/x/top1": better}]}
    scores = {"a": [{"zero_shot/x/top1": 50.0, "linear_probe/x/C": 3.0}], "b": [{"zero_shot/x/top1": 60.0}]}
    head, row = compare(scores, outcomes)
    assert head == ["percent", "a", "b", "b - a"] and row[:3] == ["zero_shot/x/top1", "50.0", "60.0"]
    assert row[3].startswith("+10.0 [+") and "n.s." not in row[3]
    assert row[3].endswith(f"p={stats.binomtest(10, 10).pvalue:.2g}")

    scores = {"a": [{"s/top1": v} for v in (50.0, 54.0)], "b": [{"s/top1": v} for v in (51.0, 57.0)]}
    row = compare(scores, {"a": [{}, {}], "b": [{}, {}]})[1]
    assert row[:3] == ["s/top1", "52.0 ± 2.8", "54.0 ± 4.2"]
    assert row[3] == "+2.0 [-10.7, +14.7] n.s."  # t(0.975, 1) = 12.706 and the error of (1, 3) is 1
    assert markdown([["h", "a"], ["x", "1"]]) == "| h | a |\n| --- | --- |\n| x | 1 |\n"
