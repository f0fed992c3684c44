"""The paper's optimisation recipe, taken over from SLIP: which parameters decay, the learning rate of every
iteration, and the bound on the temperature. Plain functions; `stages.pretrain` puts them into a Trainer.
"""

import math

import torch
from torch import nn

MAX_LOGIT_SCALE = 4.6052  # ln 100, rounded as in SLIP


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters under weight decay: at least 2-d, and no bias or norm by name (SLIP's rule).

    Lambda vectors, norm weights, biases and logit_scale are left out; class token, position tables and
    embeddings are in.
    """
    return [
        name
        for name, p in model.named_parameters()
        if p.ndim >= 2 and not any(word in name for word in ("bias", "ln", "bn"))
    ]


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, start: float, end: float) -> float:
    """Learning rate of iteration `step` in [0, steps): linear from `start` to `peak`, both included, over
    `warmup_steps` iterations, then half a cosine towards `end`, which is never quite reached (SLIP's scheduler).
    """
    if step < warmup_steps:
        return start + (peak - start) * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the temperature parameter in [0, ln 100]; called after every optimiser step."""
    model.get_parameter("logit_scale").clamp_(0, MAX_LOGIT_SCALE)
