"""Directories of transformers' CLIPModel (openai/clip-vit-base-patch16 and its kin), read as open_clip models."""

import diffclip.lean_timm  # noqa: F401 - before open_clip and timm

# isort: split
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, cat

from diffclip.checkpoints import load_strictly
from diffclip.errors import InputError

LAYER = (  # transformers' name, open_clip's
    ("self_attn.out_proj.", "attn.out_proj."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
}
NORMS = {
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.final_layer_norm.": "ln_final.",
}


def load_transformers_clip(
    directory: Path, config: dict[str, Any], state: dict[str, Tensor]
) -> tuple[open_clip.CLIP, Callable, Callable]:
    """Return (model in evaluation mode, its transform for evaluation, its tokenizer) for a CLIPModel's directory.

    Args:
        config: of its config.json.
        state: of its model.safetensors.

    Raises:
        InputError: for an activation that open_clip's CLIP does not have, or weights that do not fit.
    """
    from transformers import CLIPConfig

    whole = CLIPConfig.from_dict(config)
    vision, text = whole.vision_config, whole.text_config
    if {vision.hidden_act, text.hidden_act} not in ({"quick_gelu"}, {"gelu"}):
        raise InputError(f"{directory}: activations {vision.hidden_act} and {text.hidden_act} are not CLIP's")
    model = open_clip.CLIP(
        whole.projection_dim,
        {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
        quick_gelu=vision.hidden_act == "quick_gelu",
    )
    load_strictly(model, rename(state), str(directory))
    preprocess = {}
    if (directory / "preprocessor_config.json").is_file():
        told = json.loads((directory / "preprocessor_config.json").read_text())
        preprocess = {"mean": told.get("image_mean"), "std": told.get("image_std")}
    size = model.visual.image_size
    transform = open_clip.image_transform(size, is_train=False, interpolation="bicubic", **preprocess)
    return model.eval(), transform, open_clip.SimpleTokenizer(context_length=text.max_position_embeddings)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn transformers' names into open_clip's: queries, keys and values become one matrix, projections (in, out).

    Names that are not known are kept, for `load_strictly` to list.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix = next((new + name[len(old) :] for old, new in NORMS.items() if name.startswith(old)), None)
        if name in NAMES or prefix:
            out[prefix or NAMES[name]] = tensor
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T.contiguous()
        elif ".encoder.layers." in name:
            tower, rest = name.split(".encoder.layers.")
            layer, rest = rest.split(".", 1)
            start = ("visual." if tower == "vision_model" else "") + f"transformer.resblocks.{layer}."
            if rest.startswith("self_attn.q_proj."):
                parts = [state.get(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
                if all(part is not None for part in parts):
                    out[f"{start}attn.in_proj_{rest.rsplit('.', 1)[1]}"] = cat(parts)
            elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
                old, new = next(((o, n) for o, n in LAYER if rest.startswith(o)), ("", ""))
                out[start + new + rest[len(old) :]] = tensor
        else:
            out[name] = tensor
    return out
