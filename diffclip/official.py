"""The files of the official DiffCLIP and SLIP code: read and renamed to ours, and back.

They hold {"state_dict": {"module.NAME": tensor}, "args": Namespace, ...}. Their names are ours but for the vision
tower's prefix and the image projection, which is kept as (in, out).
"""

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from diffclip.base.errors import InputError
from diffclip.sources import read_state, resembles
from diffclip.variants import IMAGENET_PREPROCESS, attention, current, variant_name


def read_official(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace]:
    """Read a checkpoint file; return its tensors by plain name, and the trainer's arguments.

    SLIP's head for its loss between images (`image_mlp`) is left out, with a notice.
    """
    state, content = read_state(path)
    if not {"image_projection", "visual.cls_token"} <= state.keys():
        lacks = "no image_projection or visual.cls_token"
        raise InputError(
            f"{path}: {lacks}, so not a file of the official DiffCLIP or SLIP{resembles(set(state), path)}"
        )
    if extra := [name for name in state if name.startswith("image_mlp.")]:
        state = {name: tensor for name, tensor in state.items() if name not in extra}
        warnings.warn(f"{path}: image_mlp, SLIP's head for views of an image, is left out", stacklevel=3)
    args = content.get("args")
    return state, args if isinstance(args, argparse.Namespace) else argparse.Namespace()


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official code's state dict (no "module.") to ours."""
    ours = {re.sub(r"^visual\.", "visual.trunk.", name): tensor for name, tensor in state.items()}
    ours["visual.head.proj.weight"] = ours.pop("image_projection").T.contiguous()
    if "logit_scale" in ours:  # if not, `load_strictly` says so
        ours["logit_scale"] = ours["logit_scale"].reshape(-1)
    return ours


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict to the official code's, bit for bit: the inverse of `from_official`."""
    official = {name.replace("visual.trunk.", "visual."): tensor for name, tensor in state.items()}
    official["image_projection"] = official.pop("visual.head.proj.weight").T.contiguous()
    official["logit_scale"] = official["logit_scale"].reshape(())
    return official


def official_config(
    state: dict[str, Tensor],
    lambda_init: float | str | None = None,
    schedule_base: int = 0,
    heads: tuple[int, int] | None = None,
    args: argparse.Namespace | None = None,
) -> dict[str, Any]:
    """Return the model config that fits an official state dict; see `load` for the arguments.

    `args` are the file's own; where `convert` has put a config into them it is returned, if it was not overruled.
    """
    if isinstance(written := getattr(args, "model_config", None), dict) and "model_cfg" in written:
        config = current(written)
        if lambda_init is not None and (there := config.get("diffclip", {}).get("attention")):
            there |= {tower: attention("v1", lambda_init, schedule_base) for tower in there}
            config["diffclip"]["variant"] = variant_name(there)
        return config

    def layers(prefix: str) -> int:
        return len({name.split(".")[prefix.count(".")] for name in state if name.startswith(prefix)})

    def head_count(tower: int, width: int, first_attention: str) -> int:
        if f"{first_attention}.lambda_q1" in state:
            return width // len(state[f"{first_attention}.lambda_q1"])
        if heads is not None:
            return heads[tower]
        count = 12 if width == 384 else max(1, width // 64)
        name = ("vision", "text")[tower]
        warnings.warn(f"the weights do not tell the {name} tower's number of heads: took {count}", stacklevel=3)
        return count

    blocks = {"vision": "visual.blocks.0.attn", "text": "transformer.resblocks.0.attn"}
    towers = [tower for tower, attention in blocks.items() if f"{attention}.lambda_q1" in state]
    try:
        width, _, patch, _ = state["visual.patch_embed.proj.weight"].shape
        image_size = patch * round((state["visual.pos_embed"].shape[1] - 1) ** 0.5)
        mlp_width = len(state["visual.blocks.0.mlp.fc1.bias"])
        vocab_size, text_width = state["token_embedding.weight"].shape
        context_length, embed_dim = len(state["positional_embedding"]), state["text_projection"].shape[1]
    except KeyError as error:
        raise InputError(f"the checkpoint lacks {error}, nothing was loaded") from error
    if lambda_init is None:
        lambda_init = 0.8
        if towers:
            warnings.warn("the weights do not tell lambda_init: took 0.8 in all layers", stacklevel=3)
    how = {tower: attention("v1", lambda_init, schedule_base) for tower in towers}
    return {
        "model_cfg": {
            "embed_dim": embed_dim,
            "quick_gelu": True,
            "nonscalar_logit_scale": True,
            "vision_cfg": {
                "image_size": image_size,
                "patch_size": patch,
                "width": width,
                "layers": layers("visual.blocks."),
                "head_width": width // head_count(0, width, blocks["vision"]),
                "mlp_ratio": mlp_width / width,
            },
            "text_cfg": {
                "context_length": context_length,
                "vocab_size": vocab_size,
                "width": text_width,
                "heads": head_count(1, text_width, blocks["text"]),
                "layers": layers("transformer.resblocks."),
            },
        },
        "preprocess_cfg": {"size": image_size, **IMAGENET_PREPROCESS},
        "diffclip": {
            "variant": variant_name(how),
            "attention": how,
            "vision_norm_eps": 1e-5 if "vision" in towers else 1e-6,
            "init": "imported",
        },
    }
