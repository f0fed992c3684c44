"""LoRA and QLoRA on the language model, by peft: small matrices learn beside weights that stay as they are.

The adapter is written inside the run directory, with what else was trained whole, for peft on the model that training
began with; and it is merged into the language model before saving, so that the run loads like any other.
"""

import importlib.util
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from diffclip.base.errors import InputError, in_one_line
from mllm.llava import DiffCLIPLlavaForConditionalGeneration
from mllm.weights import WeightsError

WHOLE = {"projector": "multi_modal_projector", "vision_tower": "vision_tower"}  # parts that learn without adapters
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of Qwen2, Llama and their kin


def add_lora(
    model: DiffCLIPLlavaForConditionalGeneration, rank: int, *, alpha: float = 0.0, dropout: float = 0.0, seed: int = 0
) -> PeftModel:
    """Add adapters to the linear layers of `model`'s language model, in place; only they learn there.

    Args:
        rank: of the added matrices.
        alpha: the adapters' output is scaled by alpha / rank; 0 means 2 * rank.
        seed: decides their first weights (the second matrix of each pair starts at zero).

    Raises:
        InputError: the language model has no layers of the usual names.
    """
    lm = model.model.language_model
    if not (targets := {name.rsplit(".", 1)[-1] for name, _ in lm.named_modules()} & set(TARGETS)):
        raise InputError(
            f"lora_rank: the language model {type(lm).__name__} has none of the layers {', '.join(TARGETS)}"
        )
    scale: Any = alpha or 2 * rank  # any number does, though peft declares an integer
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=sorted(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # under ZeRO-3 with bf16 all must be of one dtype
        return get_peft_model(lm, config, autocast_adapter_dtype=False)


def base_weights(model: DiffCLIPLlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The language model's own weights under their own names, adapters left out."""
    state = model.model.language_model.state_dict()
    own = {f"model.{name.replace('.base_layer', '')}": w for name, w in state.items() if ".lora_" not in name}
    return own | {f"lm_head.{name}": w for name, w in model.lm_head.state_dict().items()}  # Phi's has a bias


def save_adapter(
    model: DiffCLIPLlavaForConditionalGeneration, peft_model: PeftModel, directory: Path, learns: Collection[str]
) -> None:
    """Write adapter_config.json and weights, as `PeftModel.from_pretrained(model, directory)` takes them.

    Args:
        model: the multimodal model, whose language model `peft_model` is; peft puts the adapter onto it as it was when
            training began.
        learns: the parts that learnt, see `mllm.weights.parts`; all of them but the language model are saved whole.
    """
    prefix = "base_model.model."
    weights = get_peft_model_state_dict(peft_model)
    state = {f"{prefix}model.language_model.{name.removeprefix(prefix)}": w for name, w in weights.items()}
    whole = [name for part, name in WHOLE.items() if part in learns]
    for name in whole:
        own = model.model.get_submodule(name).state_dict()
        state |= {f"{prefix}model.{name}.{key}": weight for key, weight in own.items()}
    config: Any = peft_model.peft_config["default"]
    targets = "|".join(map(re.escape, sorted(config.target_modules)))
    scale = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    saved = LoraConfig(
        **scale, target_modules=rf"model\.language_model\..*\.(?:{targets})", modules_to_save=whole or None
    )
    saved.base_model_name_or_path, saved.inference_mode = model.name_or_path or None, True
    saved.save_pretrained(str(directory))
    cpu = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
    save_file(cpu, directory / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def merge(peft_model: PeftModel, originals: Mapping[str, nn.Linear] | None = None) -> None:
    """Add the adapter to the weights and take the adapter layers out again.

    Args:
        originals: from `quantise`; the adapter is added to these, which were never rounded, and they go back in place.

    Raises:
        WeightsError: an adapter layer is left over.
    """
    lm: nn.Module = peft_model.get_base_model()
    for name, original in (originals or {}).items():
        layer: Any = lm.get_submodule(name)  # one of peft's layers around a linear one
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        original.to(first.device).weight += (
            layer.scaling["default"] * second.to(original.weight) @ first.to(original.weight)
        )
        _replace(lm, name, original)
    peft_model.merge_and_unload()
    if left := [name for name, _ in lm.named_parameters() if ".lora_" in name or ".base_layer" in name]:
        raise WeightsError(f"merging left {', '.join(left[:3])} in the language model")


def quantise(model: DiffCLIPLlavaForConditionalGeneration, device: torch.device) -> dict[str, nn.Linear]:
    """Put 4-bit linear layers (NF4, doubly quantised) in place of the language model's own in `TARGETS`, for QLoRA.

    Returns:
        the layers that were replaced, by name, for `merge`.

    Raises:
        InputError: bitsandbytes is not installed or does not work on this device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("lora_bits: 4 (QLoRA) needs bitsandbytes: pip install bitsandbytes, or set lora_bits: 16")
    lm = model.model.language_model
    originals = {
        name: module
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    }
    for name, module in originals.items():
        try:
            _replace(lm, name, _four_bit(module, device))
        except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
            reason = in_one_line(error, 200)
            raise InputError(
                f"lora_bits: 4 (QLoRA): bitsandbytes has no backend for {device.type} ({reason}); set lora_bits: 16"
            ) from error
    return originals


def _four_bit(module: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    options = {"compute_dtype": torch.bfloat16, "quant_type": "nf4", "compress_statistics": True}
    layer = Linear4bit(module.in_features, module.out_features, bias=module.bias is not None, **options)
    layer.load_state_dict(module.state_dict())
    layer.requires_grad_(False)
    layer.to(device)
    layer(torch.zeros(1, module.in_features, dtype=torch.bfloat16, device=device))  # fails here, not hours later
    return layer


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(root.get_submodule(parent), own, module)
