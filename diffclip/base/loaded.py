"""Models that strangers made, judged in time: their files before anything is allocated for them, and the weights that
have been read before they are used, none missing, none that is no number.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffclip.base.errors import InputError
from diffclip.base.files import read_settings
from diffclip.base.ranges import check_header, check_numbers, check_size

# No weight of a trained model comes near it, and float32 with its highest bit flipped is far above it.
LARGEST = 1e9
LARGEST_SCALE = 80.0  # of logit_scale, whose exponential is what counts
NAMED = 5
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
SETTINGS = (  # what transformers reads whole as JSON, whatever its size
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json", "adapter_config.json"),
)
TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja")
MOST_TOKENIZER = 128 << 20  # bytes; Gemma's, of 262,144 tokens, has a quarter of it


def check_directory(directory: Path) -> None:
    """InputError if files of a directory of transformers' would cost far more time or memory than a model's do.

    What is missing is left to transformers.
    """
    read = {name: read_settings(directory / name) for name in SETTINGS if (directory / name).is_file()}
    for name in TOKENIZERS:
        if (directory / name).is_file() and (size := os.path.getsize(directory / name)) > MOST_TOKENIZER:
            raise InputError(
                f"{directory / name}: has {size:,} bytes, too many for a tokenizer; take it from its source"
            )
    generation = read.get("generation_config.json")
    for name, value in generation.items() if isinstance(generation, dict) else ():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and value is not None and not all(type(each) is int for each in ids):
            raise InputError(f"{directory / 'generation_config.json'}: {name} is no number of a token; mend it")
    weights = [path for path in directory.iterdir() if path.suffix in WEIGHTS] if directory.is_dir() else []
    for path in weights:
        if path.suffix == ".safetensors":
            check_header(path)
    for path in directory.glob("*.index.json"):
        listed = read_settings(path)
        named = listed.get("weight_map", {}) if isinstance(listed, dict) else {}
        if not isinstance(named, dict) or any(Path(str(name)).name != name for name in named.values()):
            raise InputError(f"{path}: lists no weight files of its own directory under weight_map")
    if config := read.get("config.json"):
        check_numbers(config, str(directory / "config.json"))
        if weights:
            check_size(config, str(directory / "config.json"), sum(map(os.path.getsize, weights)), whole=False)


def check_processor(directory: Path) -> None:
    """InputError for sizes, means and the like of an image processor that are out of range."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).is_file():
            check_numbers(read_settings(directory / name), str(directory / name))


def check_values(state: Mapping[str, Tensor], source: str | Path, buffers: Collection[str] = ()) -> None:
    """InputError, which names `source` and the first parameters, if values are NaN, infinite or absurdly large.

    `buffers`: names of those that are none, and may be infinite, as the limits of Gemma 4's activations are.
    """
    faults = []
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        low, high = (float(each) for each in torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float()))
        most = math.inf if name in buffers else LARGEST_SCALE if name.endswith("logit_scale") else LARGEST
        if not (-most <= low and high <= most):
            worst = low if low != low or -low > high else high
            faults.append(f"{name} ({worst:.3g})")
    if faults:
        raise InputError(
            f"{source}: nothing was loaded, since weights hold values that no trained model has: {first_of(faults)}; "
            "bring the file again from its source"
        )


class UnfitWeights(InputError, RuntimeError):
    """Weights that lack parts of a model, or have them in other shapes; transformers' own is a RuntimeError."""


class Whole:
    """Goes before a model class of transformers: `from_pretrained` gives a model that is loaded whole, or InputError.

    transformers draws parameters that a file lacks anew, with a warning. `new_parts`: how those begin that may be.
    """

    new_parts: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers' own; without a path, or with `output_loading_info`, the caller judges what is missing."""
        path = pretrained_model_name_or_path
        if path is not None and os.path.isdir(path):
            check_directory(Path(path))
        whole: Any = super()
        anew = kwargs.pop("ignore_mismatched_sizes", False)
        options = {"ignore_mismatched_sizes": True, **kwargs}  # what has other shapes is told below, with its names
        model, info = whole.from_pretrained(path, *args, output_loading_info=True, **options)
        if not anew:
            remedy = "ask for the same sizes, or draw them anew with ignore_mismatched_sizes=True"
            _tell(path, "has other shapes in", [key[0] for key in info["mismatched_keys"]], remedy)
        if path is not None and not output_loading_info:
            missing = [name for name in info["missing_keys"] if not name.startswith(cls.new_parts or "\0")]
            _tell(path, "lacks weights of the model", missing, "bring the file again from its source")
        drawn = set(info["missing_keys"])
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in drawn}
        check_values(state, weights_name(path), dict(model.named_buffers()))
        return (model, info) if output_loading_info else model


def _tell(path: Any, what: str, names: list[str], remedy: str) -> None:
    """UnfitWeights, if there are names of which this has to be said."""
    if names:
        raise UnfitWeights(f"{weights_name(path)}: {what}: {first_of(sorted(names))}; {remedy}")


def first_of(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def weights_name(path: Any) -> str:
    """The file of weights in a directory of transformers', where it has one alone; otherwise what names the model."""
    file = Path(str(path)) / "model.safetensors"
    return str(file if file.is_file() else path)
