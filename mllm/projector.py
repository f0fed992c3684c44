"""The projector between vision tower and language model: how its weights begin."""

from typing import cast

import torch
from torch import nn

from diffclip.base.errors import InputError
from mllm.llava import DiffCLIPLlavaForConditionalGeneration


def new_projector(skeleton: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """The projector with torch's own Linear initialisation, drawn from `seed`."""
    projector = skeleton.to_empty(device="cpu").to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return projector


@torch.no_grad()
def whiten_projector(model: DiffCLIPLlavaForConditionalGeneration, pixel_values: torch.Tensor, seed: int) -> None:
    """Start a linear projector such that all directions of the tower's features show alike, as widely as words do.

    In a few directions features vary a hundred times more than in those that tell shapes apart, and a projector that
    starts at random takes most of a short run to find the latter. With mean m and covariance C of the features of
    some images, and s the standard deviation of the word embeddings:

        weight = P (C + 0.01 c I)^(-1/2),  bias = -weight m,  P_ij ~ N(0, s^2 / width),  c the largest eigenvalue of C

    Args:
        pixel_values: (images, 3, height, width); a hundred images are enough.
        seed: decides P.

    Raises:
        InputError: the projector is not a single linear layer.
    """
    projector = model.model.multi_modal_projector
    if not isinstance(projector, nn.Linear):
        raise InputError("projector_init: whitened needs the linear projector; use default with the mlp")
    pixel_values = pixel_values.to(projector.weight)
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]  # without the class token
    features = features.flatten(0, 1).double()  # (images x tokens, width)
    values, vectors = torch.linalg.eigh(features.T.cov())
    scale = (values.clamp(min=0) + 0.01 * values.max()).rsqrt()
    spread = cast(nn.Embedding, model.get_input_embeddings()).weight.double().std()
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(projector.weight.shape, generator=generator, dtype=torch.float64).to(features.device)
    weight = (spread * len(values) ** -0.5 * mixing) @ (vectors * scale) @ vectors.T
    projector.weight.copy_(weight)
    projector.bias.copy_(-weight @ features.mean(0))
