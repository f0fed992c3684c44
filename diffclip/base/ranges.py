"""Numbers in the configuration of a model, or at the head of its weights, which a stranger may have written: in range
before anything is allocated.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import open_file

LONGEST_HEADER = 3 << 20  # bytes; a thousand tensors take 130,000, and safetensors itself would take 100 MB
DEEPEST = 20  # levels of a configuration; the largest of transformers' have five
MOST_BYTES = 1e12  # of weights that a configuration may describe, where no file says less

# key, wherever it stands -> least and most; whole numbers where both are written so. A list is one of each layer or
# side, and None stands for what a library takes by itself. Some way above the largest models that there are.
LAYERS, WIDTH, SIDE, TINY = (0, 1000), (1, 1 << 17), (1, 8192), (0.0, 1.0)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("layers", "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"), LAYERS),
    **dict.fromkeys(("width", "hidden_size", "embed_dim", "projection_dim", "n_embd", "d_model", "head_dim"), WIDTH),
    **dict.fromkeys(("heads", "num_attention_heads", "num_key_value_heads", "num_heads", "n_head"), (1, 4096)),
    **dict.fromkeys(("image_size", "timm_image_size"), SIDE),
    **dict.fromkeys(("intermediate_size", "projection_size", "n_inner", "ffn_dim"), (1, 1 << 21)),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps", "vision_norm_eps", "norm_eps", "eps"), TINY),
    "head_width": WIDTH,
    "patch_size": (1, 1024),
    "vocab_size": (1, 1 << 23),
    "context_length": (1, 1 << 17),
    "max_position_embeddings": (1, 1 << 28),  # most are turned into angles, and have no table
    "num_experts": (0, 4096),
    "num_local_experts": (0, 4096),
    "mlp_ratio": (0.01, 64.0),
    "lambda_init": (-100.0, 100.0),
    "init_logit_scale": (-50.0, 50.0),
    "logit_scale_init_value": (-50.0, 50.0),
    "init_logit_bias": (-1000.0, 1000.0),
    "rescale_factor": (1e-9, 1e3),
    **dict.fromkeys(("mean", "image_mean"), (-1000.0, 1000.0)),
    **dict.fromkeys(("std", "image_std"), (1e-6, 1000.0)),
}
SIZES = re.compile(r"(?:.*\.)?(?:crop_size|size)(?:\.\w+|\[\d+\])?")  # of an image, however it is written
WIDTHS = ("hidden_size", "width", "n_embd", "d_model")
DEPTHS = ("num_hidden_layers", "layers", "n_layer", "n_layers", "num_layers")
ROWS = ("vocab_size", "context_length")  # of tables; the second is open_clip's, and always one
FACTORED = ("embedding_size", "num_hidden_groups")  # of models whose layers share weights, as ALBERT's do
PARTS, SMALL = 8, 64_000_000  # of a model that its files may lack, and bytes that cost nobody anything
REMEDY = "mend it, or take the file from its source again"


def check_numbers(config: Any, name: str) -> None:
    """InputError, which begins with `name`, for a number of a configuration that is none, or out of `RANGES`."""
    for place, key, value in _values(config, name):
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"{name}: {place} is NaN: {REMEDY}")
        bounds = SIDE if SIZES.fullmatch(place) else RANGES.get(key)
        if bounds is None or value is None or value == "schedule":
            continue
        least, most = bounds
        whole = isinstance(most, int)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise InputError(f"{name}: {place} is {_short(value)}, and must be {kind} from {least} to {most}: {REMEDY}")
    if (size := least_bytes(config)) > MOST_BYTES:
        raise InputError(f"{name}: describes a model of more than {size:.0e} bytes: {REMEDY}")


def check_size(config: Any, name: str, size: int, whole: bool = True) -> None:
    """InputError if a configuration describes a model larger than its files of weights, which have `size` bytes.

    `whole`: all of it must be in them. Otherwise, as where a classifier keeps one tower of the two that its
    configuration describes, only far more than they have is refused.
    """
    if (least := least_bytes(config)) > (size if whole else max(SMALL, PARTS * size)):
        raise InputError(
            f"{name}: describes a model of more than {least:,} bytes, but the weights have {size:,}: one of both is of "
            "another model; take both from their source again"
        )


def check_header(path: Path) -> None:
    """InputError if a safetensors file says of its header that it is longer than one is; OSError if it is not there."""
    with open_file(path) as f:
        size = int.from_bytes(f.read(8), "little")
    if size > min(LONGEST_HEADER, os.path.getsize(path)):
        raise InputError(f"{path}: cannot be read as safetensors: its header would have {size:,} bytes")


def least_bytes(config: Any) -> int:
    """Bytes that the weights of this configuration have at least: fewer than they really have.

    Of open_clip's towers at least queries, keys, values, outputs and embeddings in 16 bits; of transformers', which
    may share, leave out and quantise, a fifth of a byte for the square of the width.
    """
    total = 0.0
    for part in _parts(config):
        width, depth = (next((part[key] for key in keys if key in part), 0) for keys in (WIDTHS, DEPTHS))
        depth = sum(d for d in depth if isinstance(d, int)) if isinstance(depth, list) else depth
        if any(key in part for key in FACTORED) or not isinstance(width, int) or not isinstance(depth, int):
            continue
        rows = sum(count for key in ROWS if isinstance(count := part.get(key), int))
        own = ("layers" in part and "width" in part) or str(part.get("model_type")).startswith("diffclip_")
        if own:
            side, patch = part.get("image_size"), part.get("patch_size")
            rows += (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) and patch else 0
            rows += positions if isinstance(positions := part.get("max_position_embeddings"), int) else 0
        total += depth * width**2 * (8 if own else 0.2) + rows * width * (2 if own else 0.2)
    return int(total)


def _values(value: Any, name: str, place: str = "", key: str = "", depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, the key that it stands under, value) of all that is no mapping or list."""
    if depth > DEEPEST:
        raise InputError(f"{name}: nested too deep for a configuration: {REMEDY}")
    if isinstance(value, Mapping):
        for inner, each in value.items():
            yield from _values(each, name, f"{place}.{inner}"[:200].lstrip("."), str(inner), depth + 1)
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from _values(each, name, f"{place}[{number}]", key, depth + 1)
    else:
        yield place, key, value


def _parts(value: Any, depth: int = 0) -> Iterator[Mapping]:
    """A mapping and all below it."""
    if depth > DEEPEST:
        return
    if isinstance(value, Mapping):
        yield value
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _parts(each, depth + 1)


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python writes no number of thousands of digits
        return f"a number of {value.bit_length():,} bits"
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
