"""Directories of transformers' CLIPModel and SiglipModel (openai/clip-vit-base-patch16, google/siglip-base-patch16-224
and their kin), read as models of ours.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, cat
from transformers import CLIPConfig, SiglipConfig

from diffclip import models
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import read_settings
from diffclip.base.loaded import weights_name
from diffclip.base.ranges import check_size
from diffclip.models import DualEncoder
from diffclip.weights import load_strictly, read_pickle, read_safetensors, tensors

# transformers' name of a layer's parts, open_clip's, and timm's
LAYER = (
    ("self_attn.out_proj.", "attn.out_proj.", "attn.proj."),
    ("layer_norm1.", "ln_1.", "norm1."),
    ("layer_norm2.", "ln_2.", "norm2."),
    ("mlp.fc1.", "mlp.c_fc.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.c_proj.", "mlp.fc2."),
)
NAMES = {  # the same outside of the layers, of CLIP's
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.final_layer_norm.": "ln_final.",
}
SIGLIP_NAMES = {
    "vision_model.embeddings.patch_embedding.": "visual.trunk.patch_embed.proj.",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.post_layernorm.": "visual.trunk.norm.",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj.": "visual.trunk.attn_pool.proj.",
    "vision_model.head.layernorm.": "visual.trunk.attn_pool.norm.",
    "vision_model.head.mlp.": "visual.trunk.attn_pool.mlp.",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.": "text.ln_final.",
    "text_model.head.": "text.text_projection.",
}
ACTIVATIONS: dict[str, dict[str, Any]] = {"quick_gelu": {}, "gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"}}


def load_model(directory: Path, config: dict[str, Any]) -> DualEncoder:
    """Return the model of a directory; `config` is the content of its config.json.

    InputError for an activation that open_clip's models do not have, or weights that do not fit.
    """
    siglip = config.get("model_type") == "siglip"
    kind = "SigLIP" if siglip else "CLIP"
    try:
        theirs = (SiglipConfig if siglip else CLIPConfig).from_dict(config)
    except Exception as error:  # transformers checks each value in its own way
        raise InputError(f"{directory / 'config.json'}: not a {kind}'s ({in_one_line(error)})") from None
    vision: Any = theirs.vision_config  # which transformers also lets be a dict, or None
    text: Any = theirs.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if not acts <= ACTIVATIONS.keys() or (len(acts) > 1 and "quick_gelu" in acts):
        raise InputError(f"{directory}: activations {vision.hidden_act} and {text.hidden_act} are not {kind}'s")
    if siglip and not getattr(vision, "vision_use_head", True):
        raise InputError(f"{directory}: a SigLIP without its pooling head (vision_use_head false) has no embedding")
    model_cfg = {
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            "norm_kwargs": {"eps": text.layer_norm_eps},
            "act_kwargs": ACTIVATIONS[text.hidden_act] or None,
        },
    }
    ours: dict[str, Any] = {"variant": "CLIP", "attention": {}, "inputs": "transformers"}
    if siglip:
        ours |= siglip_parts(model_cfg, vision, text)
    else:
        clip_parts(model_cfg, vision, text, theirs.projection_dim)
    state = read_weights(directory)
    check_size(model_cfg, str(directory / "config.json"), sum(tensor.nbytes for tensor in state.values()))
    model = models.build({"model_cfg": model_cfg, "preprocess_cfg": {}, "diffclip": ours})
    load_strictly(model, (rename_siglip if siglip else rename)(state), weights_name(directory))
    return model


def clip_parts(model_cfg: dict[str, Any], vision: Any, text: Any, embed_dim: Any) -> None:
    """Complete a config that holds what both kinds have for a CLIPModel."""
    model_cfg["embed_dim"] = embed_dim
    act_kwargs = ACTIVATIONS[vision.hidden_act] or None
    model_cfg["vision_cfg"] |= {"norm_kwargs": {"eps": vision.layer_norm_eps}, "act_kwargs": act_kwargs}
    if text.eos_token_id != 2:  # the embedding is read at the first end token; with 2, which old files say,
        model_cfg["text_cfg"] |= {"pool_type": "eos", "eos_id": text.eos_token_id}  # it is at the largest id


def siglip_parts(model_cfg: dict[str, Any], vision: Any, text: Any) -> dict[str, Any]:
    """The same for a SiglipModel; returns what describes its vision tower, a timm one without a class token."""
    model_cfg |= {"embed_dim": vision.hidden_size, "custom_text": True, "init_logit_bias": -10.0}
    model_cfg["vision_cfg"]["timm_proj"] = "none"
    model_cfg["text_cfg"] |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    if text.projection_size != vision.hidden_size:
        model_cfg["embed_dim"] = text.projection_size  # which `load_strictly` then finds not to fit
    act = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}[vision.hidden_act]
    trunk = {"class_token": False, "global_pool": "map", "act_layer": act}
    return {"vision_norm_eps": vision.layer_norm_eps, "trunk": trunk}


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn CLIPModel's names into open_clip's: queries, keys and values become one matrix, projections (in, out).

    Names that are not known are kept, for `load_strictly` to list.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("position_ids") or ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if renamed := outside_of_layers(name, NAMES):
            out[renamed] = tensor
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T.contiguous()
        else:
            tower = "visual.transformer.resblocks" if name.startswith("vision_model.") else "transformer.resblocks"
            out |= of_layer(name, state, tower, timm=False) or {name: tensor}
    return out


def rename_siglip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn SiglipModel's names into those of open_clip's text tower and timm's vision transformer."""
    out: dict[str, Tensor] = {}
    pool = "visual.trunk.attn_pool"
    for name, tensor in state.items():
        if name.endswith("position_ids") or ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if renamed := outside_of_layers(name, SIGLIP_NAMES):
            out[renamed] = tensor[None] if renamed.endswith("pos_embed") else tensor
        elif name.startswith("vision_model.head.attention.in_proj_"):
            part, width = name.rsplit("_", 1)[1], len(tensor) // 3
            out |= {f"{pool}.q.{part}": tensor[:width].clone(), f"{pool}.kv.{part}": tensor[width:].clone()}
        elif name in ("logit_scale", "logit_bias"):
            out[name] = tensor.reshape(())
        else:
            timm = name.startswith("vision_model.")
            tower = "visual.trunk.blocks" if timm else "text.transformer.resblocks"
            out |= of_layer(name, state, tower, timm) or {name: tensor}
    return out


def outside_of_layers(name: str, names: dict[str, str]) -> str:
    """The new name of what is in no layer; "" for the rest."""
    return next((new + name[len(old) :] for old, new in names.items() if name.startswith(old)), "")


def of_layer(name: str, state: dict[str, Tensor], tower: str, timm: bool) -> dict[str, Tensor]:
    """One entry of a layer under its new name; queries, keys and values come together at the queries' turn."""
    if ".encoder.layers." not in name:
        return {}
    layer, rest = name.split(".encoder.layers.")[1].split(".", 1)
    start = f"{tower}.{layer}."
    if rest.startswith("self_attn.q_proj."):
        parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if all(part in state for part in parts):
            kind = rest.rsplit(".", 1)[1]
            return {f"{start}attn.{'qkv.' if timm else 'in_proj_'}{kind}": cat([state[part] for part in parts])}
    for old, native, timms in LAYER:
        if rest.startswith(old):
            return {start + (timms if timm else native) + rest[len(old) :]: state[name]}
    return {}


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Read model.safetensors, the files that model.safetensors.index.json lists, or pytorch_model.bin."""
    if (index := directory / "model.safetensors.index.json").is_file():
        listed = read_settings(index)
        names = set(listed["weight_map"].values()) if isinstance(listed, dict) and "weight_map" in listed else set()
        if not names or any(Path(str(name)).name != name for name in names):
            raise InputError(f"{index}: lists no weight files of its own directory under weight_map")
        return {key: tensor for name in sorted(names) for key, tensor in read_safetensors(directory / name).items()}
    if not (directory / "model.safetensors").is_file() and (directory / "pytorch_model.bin").is_file():
        return tensors(read_pickle(directory / "pytorch_model.bin"), directory / "pytorch_model.bin")
    return read_safetensors(directory / "model.safetensors")
