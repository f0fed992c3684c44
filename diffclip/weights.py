"""Files of weights, read without running anything in them, and state dicts loaded whole or not at all.

Code that somebody put beside a model's weights is never run either: where a directory asks for it, it is refused.
"""

import argparse
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoProcessor
from transformers.utils import cached_file

from diffclip.attention import Differential
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import read_settings, whole
from diffclip.base.loaded import check_directory, check_processor, check_values
from diffclip.base.ranges import check_header


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict whole, or raise one InputError that lists every key that does not fit, or whose values cannot
    be those of a trained model.
    """
    shapes, own = ({name: list(t.shape) for name, t in tensors.items()} for tensors in (state, model.state_dict()))
    problems = [f"missing {name}" for name in sorted(own.keys() - shapes.keys())]
    problems += [f"unexpected {name}" for name in sorted(shapes.keys() - own.keys())]
    both = [name for name in sorted(own.keys() & shapes.keys()) if shapes[name] != own[name]]
    if problems := problems + [f"{name} is {shapes[name]} but must be {own[name]}" for name in both]:
        raise InputError(f"{source}: does not fit the model, nothing was loaded: {'; '.join(problems)}")
    floats = {name: tensor.is_floating_point() for name, tensor in model.state_dict().items()}
    if others := [name for name, tensor in state.items() if tensor.is_floating_point() != floats[name]]:
        raise InputError(f"{source}: numbers of another kind stand in {', '.join(others[:5])}: nothing was loaded")
    check_values(state, source)
    model.load_state_dict(state)
    for name, module in model.named_modules():
        if isinstance(module, Differential) and not math.isfinite(value := module.mean_lambda()):
            raise InputError(f"{source}: {name} has a lambda of {value}; bring the file again from its source")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, or raise InputError."""
    try:
        check_header(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def write_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Write weights, whole or not at all, for all to read: safetensors leaves files that nobody else may."""
    with whole(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)


class Unread:
    """Stands for objects of the official trainer's files that are of no use here: paths and numpy's numbers."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What these files import beyond tensors and plain values (their own list, with both names that numpy has had).
UNREAD = ("pathlib.PosixPath", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def read_pickle(path: Path) -> Any:
    """Read a file of torch.save without running what may be pickled in it; tensors stay on disk until they are used."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *((Unread, name) for name in UNREAD)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # any of a dozen kinds, by what is broken
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if named := re.search(r"GLOBAL (\S+)", str(error)):  # what a pickle asks for, after much advice of torch's
            reason = f"it holds a {named[1]}, which is not made from a file; save its state dict alone with torch.save"
        raise InputError(f"{path}: cannot be read as plain weights: {reason}") from error


def from_pretrained(auto_class: Any, path: str | Path, **options: Any) -> Any:
    """`from_pretrained` of one of transformers' Auto classes, which never runs code that lies beside the weights.

    InputError for what it cannot load, and for files that would take more time or memory than a model does.
    """
    try:
        missing_is_fine = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
        config = cached_file(str(path), "config.json", **missing_is_fine)
        directory = Path(config).parent if config else Path(path)
        check_directory(directory)
        if auto_class in (AutoImageProcessor, AutoProcessor):
            check_processor(directory)
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except InputError:
        raise
    except Exception as error:  # transformers raises whatever its loaders do
        reason = f"{'' if isinstance(error, OSError | ValueError) else f'{type(error).__name__}: '}{in_one_line(error)}"
        raise InputError(f"{path}: no model that {auto_class.__name__} can load ({reason})") from None


def tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """Return `state`, read from `path`, if it is a state dict of tensors, or raise InputError."""
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path}: holds no state dict of tensors")
    return state


def refuse_foreign_code(model_cfg: Any, source: str) -> None:
    """Raise InputError if loading a model of this open_clip config would fetch and run code.

    `model_cfg` has vision_cfg and text_cfg; `source` is what the message calls it.
    """
    text_cfg = model_cfg.get("text_cfg") if isinstance(model_cfg, dict) else None
    if not isinstance(text_cfg, dict):
        raise InputError(f"{source}: has no text_cfg, so it does not describe an open_clip model")
    options = text_cfg.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or options.get("trust_remote_code"):
        raise InputError(
            f"{source}: its tokenizer_kwargs say trust_remote_code, and code of a model's directory is never run: "
            "remove that key, if the tokenizer can be read without"
        )
    if name := text_cfg.get("hf_model_name"):
        try:  # open_clip would leave it to transformers, which asks on the terminal
            if type(from_pretrained(AutoConfig, name)) not in MODEL_MAPPING:
                raise InputError("transformers has no model for its config")
        except InputError as error:
            reason = f"cannot be had without code of its own ({in_one_line(error)})"
            raise InputError(f"{source}: its text tower {name} {reason}") from None


def refuse_auto_map(path: Path, kind: str) -> None:
    """Raise InputError if a configuration file says that its `kind` is code of its own.

    Without that code transformers would take a class of its own in its place, which need not do the same.
    """
    settings = read_settings(path) if path.is_file() else {}
    nested = settings.get("image_processor") if isinstance(settings, dict) else {}  # in processor_config.json
    for part in (settings, nested):
        if isinstance(part, dict) and kind in (part.get("auto_map") or {}):
            raise InputError(
                f"{path}: names custom code for {kind} (auto_map), and code of a model's directory is never run"
            )
