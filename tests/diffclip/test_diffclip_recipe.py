"""The optimisation recipe against SLIP's numbers and against closed forms."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffclip import models, official, weights
from diffclip.recipe import clamp_logit_scale, contrastive_loss, decay_parameter_names, learning_rate


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


@pytest.mark.parametrize("value, bound", [(5.0, 4.6052), (-1.0, 0.0), (2.0, 2.0)])
def test_temperature_is_bounded_in_place(value, bound):
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.tensor([value]))
    clamp_logit_scale(model)
    assert model.logit_scale.item() == pytest.approx(bound)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["main", "clamp_high", "clamp_low"])
@pytest.mark.parametrize(("name", "heads"), [("diffclip", None), ("clip", (4, 4))])
def test_five_training_steps_equal_the_official_ones(golden, name, heads, run):
    """Losses, gradient norms, temperature, and where every parameter ends: AdamW, its groups, the clamp, the loss."""
    told = json.loads((golden("06_optim") / f"{name}_steps.json").read_text())
    state = load_file(golden("06_optim") / told["weights"])
    inputs = load_file(golden("06_optim") / told["inputs"])
    model = models.build(official.official_config(state, 0.8, heads=heads))
    weights.load_strictly(model, official.from_official(state), name)
    settings = told["runs"][run]
    with torch.no_grad():
        model.logit_scale.fill_(settings["initial_logit_scale"])
    start = official.to_official({k: v.detach().clone() for k, v in model.named_parameters()})

    decayed = set(decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": settings["weight_decay"]},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    assert len(groups[0]["params"]) == len(told["weight_decay_params"])
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"])
    loss_of = contrastive_loss()
    tolerance = {"main": 5e-5, "clamp_high": 2e-4, "clamp_low": 1e-5}[run]
    for want in settings["log_f32"]:
        optimizer.zero_grad()
        loss = loss_of(*model(inputs["image"], inputs["text"]))
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        optimizer.step()
        clamp_logit_scale(model)
        assert loss.item() == pytest.approx(want["loss"], abs=tolerance)
        assert norm.item() == pytest.approx(want["grad_l2"], rel=2e-3)
        assert model.logit_scale.item() == pytest.approx(want["logit_scale_param"], abs=5e-6)

    if (name, run) != ("diffclip", "main"):  # whose final parameters are the ones on record
        return
    final = load_file(golden("06_optim") / "diffclip_final_params_f32.safetensors")
    ours = official.to_official({k: v.detach() for k, v in model.named_parameters()})
    assert ours.keys() == final.keys()
    for key, want in final.items():
        if key.endswith("k_proj.bias"):  # the true gradient is zero: Adam makes steps of rounding noise
            continue
        moved = (want - start[key]).norm()
        assert (ours[key] - want).norm() < 0.01 * moved, key
