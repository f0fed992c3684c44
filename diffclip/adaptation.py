"""Training a dual encoder that is already there: what of it learns, and how fast each layer does."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffclip.attention import Differential
from diffclip.base.errors import InputError
from diffclip.models import DualEncoder

TEXT = ("text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
BLOCK = re.compile(r"(?:blocks|resblocks|layers|layer|stages)\.(\d+)\.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to: "vision", "text", "logit_scale" or, for CoCa's caption decoder, ""."""
    if name.startswith("visual."):
        return "vision"
    if name.startswith("logit_"):
        return "logit_scale"
    return "text" if name.startswith(TEXT) else ""


def added_parameters(model: nn.Module) -> dict[str, Tensor | None]:
    """The parameters that differential attention has added to a model, see `Differential.added`."""
    return {
        f"{path}.{name}": rows
        for path, module in model.named_modules()
        if isinstance(module, Differential)
        for name, rows in module.added().items()
    }


def let_learn(model: DualEncoder, learns: Sequence[str]) -> dict[str, Tensor | None]:
    """Lock all parameters but those of the parts in `learns`, of `variants.PARTS`.

    "new" are the parameters that differential attention adds, wherever they lie. One of which only some rows are new
    (the second queries of v2) gets its gradient there alone, and has to be left out of weight decay.

    Returns:
        what learns, by name: None, or which rows of it do, a boolean (rows) tensor.

    Raises:
        InputError: nothing learns.
    """
    added = added_parameters(model) if "new" in learns else {}
    if "new" in learns and not added:
        raise InputError("learns: new has nothing to learn, since no attention is differential: set `attention`")
    learning: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        if part_of(name) in learns:
            learning[name] = None
        elif name in added:
            learning[name] = rows = added[name]
            if rows is not None:
                parameter.register_hook(_only(rows))
        parameter.requires_grad_(name in learning)
    if not learning:
        raise InputError(f"learns: {' '.join(learns)} leaves nothing that learns")
    return learning


def _only(rows: Tensor) -> Any:
    """A gradient hook that lets through the gradient of some rows of a parameter."""

    def hook(gradient: Tensor) -> Tensor:
        keep = rows.to(gradient.device).view(-1, *[1] * (gradient.ndim - 1))
        return torch.where(keep, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))

    return hook


def layer_rates(model: DualEncoder, decay: float) -> dict[str, float]:
    """What each parameter's learning rate is times: `decay` to the power of how many layers lie above it in its tower.

    The last block, and what stands behind it, have the full rate times `decay` and the full rate; embeddings and
    patches the smallest (Clark et al. 2020, BEiT). Parameters that are new learn at the full rate everywhere.
    """
    blocks: dict[str, int] = {}
    for name, _ in model.named_parameters():
        if found := BLOCK.search(name):
            blocks[part_of(name)] = max(blocks.get(part_of(name), 0), int(found[1]) + 1)
    added = added_parameters(model)
    rates = {}
    for name, _ in model.named_parameters():
        part, found = part_of(name), BLOCK.search(name)
        if name in added or part not in blocks:
            above = 0
        elif found:
            above = blocks[part] - int(found[1])
        else:
            above = blocks[part] + 1 if _is_input(name) else 0
        rates[name] = decay**above
    return rates


def _is_input(name: str) -> bool:
    """Whether a parameter outside of the blocks comes before them."""
    parts = ("patch_embed", "conv1", "embedding", "pos_embed", "cls_token", "reg_token", "ln_pre", "norm_pre", "stem")
    return any(part in name for part in (*parts, "bn1", "cls_emb"))


def with_vector_scale(model: DualEncoder) -> DualEncoder:
    """Give the model logit_scale and logit_bias of one element, in place: ZeRO cannot shard parameters of none."""
    for name in ("logit_scale", "logit_bias"):
        if (parameter := getattr(model, name)) is not None and parameter.ndim == 0:
            setattr(model, name, nn.Parameter(parameter.detach().reshape(1)))
    model.model_config["model_cfg"]["nonscalar_logit_scale"] = True
    return model
