"""What align and instruct share."""

import pytest
import torch
from torch import nn

from stages.training import set_learning_rate


def test_projector_learns_at_its_own_rate_and_decays_as_before():
    torch.manual_seed(0)
    model = nn.ModuleDict({"projector": nn.Linear(3, 2), "language_model": nn.Linear(2, 2)})
    weights, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}], lr=1e-2
    )
    set_learning_rate(optimizer, model["projector"].parameters(), 1e-4)
    rates = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates == {
        model["projector"].weight: (1e-4, 0.1),
        model["projector"].bias: (1e-4, 0.0),
        model["language_model"].weight: (1e-2, 0.1),
        model["language_model"].bias: (1e-2, 0.0),
    }
    before = [p.detach().clone() for p in model.parameters()]
    model["language_model"](model["projector"](torch.randn(5, 3))).square().sum().backward()
    optimizer.step()  # Adam's first step is as long as the rate
    steps = [float((a - b).detach().abs().max()) for a, b in zip(before, model.parameters())]
    assert steps == pytest.approx([1e-4, 1e-4, 1e-2, 1e-2], rel=0.2)
