"""The optimisation recipe against SLIP's numbers and against closed forms."""

import json
import math

import pytest
import torch
from torch import nn

from diffclip.recipe import clamp_logit_scale, decay_parameter_names, learning_rate


def test_learning_rates_equal_the_official_schedule(golden):
    for case in json.loads((golden("06_optim") / "lr_schedule.json").read_text()):
        steps = case["epochs"] * case["niter_per_epoch"]
        ours = [
            learning_rate(
                i,
                steps=steps,
                warmup_steps=case["warmup_epochs"] * case["niter_per_epoch"],
                peak=case["base_value"],
                start=case["start_warmup_value"],
                end=case["final_value"],
            )
            for i in range(steps)
        ]
        assert ours == pytest.approx(case["values"], rel=1e-12)


def test_schedule_without_warmup_starts_at_the_peak_and_falls():
    rates = [learning_rate(i, steps=10, warmup_steps=0, peak=1.0, start=0.0, end=0.1) for i in range(10)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0.1
    assert rates[5] == pytest.approx(0.1 + 0.9 / 2)


def test_only_matrices_and_tables_decay():
    model = nn.ModuleDict({"linear": nn.Linear(3, 2), "ln_1": nn.LayerNorm(3), "table": nn.Embedding(4, 3)})
    model.register_parameter("lambda_q1", nn.Parameter(torch.zeros(5)))
    model.register_parameter("bias_matrix", nn.Parameter(torch.zeros(5, 5)))
    assert decay_parameter_names(model) == ["linear.weight", "table.weight"]


@pytest.mark.parametrize("value, bound", [(5.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)])
def test_temperature_is_bounded_in_place(value, bound):
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor([value]))
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(bound)
