"""The paper's optimisation recipe, taken over from SLIP: the contrastive loss, which parameters decay, the learning
rate of every iteration, and the bound on the temperature. Plain functions; `stages.pretrain` puts them into a Trainer.
"""

import math

import torch
import torch.distributed as dist
from torch import nn

from diffclip.base.backbones import ClipLoss, SigLipLoss

MAX_LOGIT_SCALE = 4.6052  # ln 100, rounded as in SLIP


def contrastive_loss(gather_with_grad: bool = True, sigmoid: bool = False) -> ClipLoss | SigLipLoss:
    """A callable (image_features, text_features, logit_scale) -> mean loss of this rank's pairs.

    Features are (batch, width), of unit length; logit_scale is already exponentiated. Each rank compares its own
    pairs with those of every rank, so the mean over ranks is the loss of the whole batch.

    Args:
        gather_with_grad: let gradients flow through the gathered features, as one big batch would. SLIP and the
            official DiffCLIP gather without (the same loss value, a smaller gradient).
        sigmoid: SigLIP's loss (Zhai et al. 2023), for models with a bias beside their temperature; it is called with
            that as a fourth argument, and its gradient is always exact.
    """
    ranked = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if sigmoid:
        return SigLipLoss(rank=dist.get_rank() if ranked else 0, world_size=dist.get_world_size() if ranked else 1)
    return ClipLoss(
        local_loss=True,
        gather_with_grad=gather_with_grad,
        cache_labels=True,
        rank=dist.get_rank() if ranked else 0,
        world_size=dist.get_world_size() if ranked else 1,
    )


def accuracy_in_batch(image_features: torch.Tensor, text_features: torch.Tensor) -> float:
    """Share of the images in [0, 1] whose own caption is the nearest of the batch; inputs (batch, width)."""
    nearest = (image_features @ text_features.T).argmax(dim=1)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean().item()


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters under weight decay: at least 2-d, and no bias or norm by name (SLIP's rule).

    Lambda vectors, norm weights, biases and logit_scale are left out; class token, position tables and
    embeddings are in.
    """
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    return [name for name in matrices if not any(word in name for word in ("bias", "ln", "bn"))]


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
