"""The three parts of a network and their weights: read strictly, proven by fingerprints, frozen or let learn."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from diffclip.base.loaded import check_values, first_of, weights_name
from diffclip.weights import from_pretrained
from mllm.llava import DiffCLIPLlavaForConditionalGeneration


class WeightsError(InputError):
    """A part does not hold the weights it should."""


def parts(model: DiffCLIPLlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """The three parts by name; the language model includes its head."""
    return {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": nn.ModuleDict({"model": model.model.language_model, "lm_head": model.lm_head}),
    }


def freeze(model: DiffCLIPLlavaForConditionalGeneration, train: Collection[str]) -> dict[str, int]:
    """Let only the named parts learn; returns the parameters of every part. InputError for other names."""
    modules = parts(model)
    if unknown := sorted(set(train) - modules.keys()):
        raise InputError(f"learns: there is no part {', '.join(unknown)}; use {', '.join(modules)}")
    for name, module in modules.items():
        module.requires_grad_(name in train)
    model.train(model.training)  # a frozen tower goes to evaluation mode
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}


def verify(model: DiffCLIPLlavaForConditionalGeneration, expected: Mapping[str, str]) -> None:
    """Raise WeightsError unless the named parts have the expected fingerprints."""
    for name, wanted in expected.items():
        if (actual := fingerprint(parts(model)[name])) != wanted:
            raise WeightsError(
                f"{name} has fingerprint {actual}, expected {str(wanted)[:60]}: its weights were replaced; take the "
                "model from its source again"
            )


def fingerprints(model: DiffCLIPLlavaForConditionalGeneration) -> dict[str, str]:
    """The fingerprint of every part."""
    return {name: fingerprint(module) for name, module in parts(model).items()}


def load_strictly(auto_class: Any, path: str | Path, only: str = "", **options: Any) -> PreTrainedModel:
    """`from_pretrained` that raises InputError listing weights that are missing, misshapen, left over or no numbers.

    Leftover weights count only if their name contains `only`.
    """
    model, info = from_pretrained(auto_class, path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if keys := sorted(str(k) for k in info[kind] if kind != "unexpected_keys" or only in str(k)):
            raise InputError(
                f"{path}: {kind.replace('_', ' ')} in the weights: {first_of(keys)}; give the matching model"
            )
    check_values(model.state_dict(), weights_name(path), dict(model.named_buffers()))
    return model
