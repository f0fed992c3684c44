"""Weights in and out: run directories that load as an open_clip model and as a transformers tower."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffclip import models
from diffclip.errors import InputError

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def save(model: models.CLIP, directory: str | Path) -> None:
    """Write the dual encoder and its vision tower into a directory, each file whole or not at all.

    The encoder is in open_clip's layout (open_clip_config.json, with what is ours under "diffclip", and
    open_clip_model.safetensors); the tower in transformers' (config.json, model.safetensors,
    preprocessor_config.json).
    """
    from diffclip import hf

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    trunk = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.trunk.")}
    config = hf.vision_config(model.model_config)
    config.architectures = [hf.DiffCLIPVisionModel.__name__]
    config.dtype = str(next(iter(trunk.values())).dtype).removeprefix("torch.")
    processor = hf.image_processor(model.model_config)

    _write(directory / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _write(directory / "model.safetensors", lambda path: save_file(trunk, path, metadata={"format": "pt"}))
    _write(directory / "config.json", lambda path: path.write_text(config.to_json_string()))
    _write(directory / "preprocessor_config.json", lambda path: path.write_text(processor.to_json_string()))
    text = json.dumps(model.model_config, indent=2) + "\n"
    _write(directory / CONFIG, lambda path: path.write_text(text))  # last: its presence says complete


def _write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` fill a temporary file, then put it in place of `path`."""
    temporary = path.with_name(path.name + ".part")
    writer(temporary)
    os.replace(temporary, path)


def load(path_or_id: str | Path) -> tuple[models.CLIP, Callable, Callable]:
    """Return (model in evaluation mode, its transform for evaluation, its tokenizer), as open_clip does."""
    directory = Path(path_or_id)
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory}: no {CONFIG} here; give a directory that `diffclip.save` wrote")
    config = json.loads((directory / CONFIG).read_text())
    model = models.build(config)
    model.model_config = config
    load_strictly(model, load_file(directory / WEIGHTS), str(directory))
    return model.eval(), models.transforms(config, train=False), models.tokenizer(config)


def load_strictly(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict whole, or raise one InputError that lists every key that does not fit."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if problems:
        raise InputError(
            f"{source} does not fit the model, nothing was loaded: {'; '.join(sorted(problems))}"
        )
    model.load_state_dict(state)
