"""The symmetric contrastive loss of CLIP over all ranks (open_clip's, with the settings that make it exact)."""

# isort: split
import torch
import torch.distributed as dist

from diffclip.base.backbones import ClipLoss


def contrastive_loss(gather_with_grad: bool = True) -> ClipLoss:
    """A callable (image_features, text_features, logit_scale) -> mean loss of this rank's pairs.

    Features are (batch, width), of unit length; logit_scale is already exponentiated. Each rank compares its own
    pairs with those of every rank, so the mean over ranks is the loss of the whole batch.

    Args:
        gather_with_grad: let gradients flow through the gathered features, as one big batch would. SLIP and the
            official DiffCLIP gather without (the same loss value, a smaller gradient).
    """
    ranked = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
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
