"""Dual encoders in and out: our run directories, open_clip's and transformers', and the files of the official code."""

import runpy
import sys

if __name__ == "__main__":  # `python -m diffclip.checkpoints convert`: the command, before anything heavy is imported
    if sys.argv[1:2] == ["convert"]:
        del sys.argv[1]
    runpy.run_module("diffclip.convert", run_name="__main__")
    sys.exit()

import argparse
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file

from diffclip import hf, models, preprocessing
from diffclip.attention import kind
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, whole, write_whole
from diffclip.hf_clip import load_transformers_clip
from diffclip.models import CLIP
from diffclip.official import from_official, official_config, read_official, to_official
from diffclip.weights import load_strictly, read_safetensors, refuse_auto_map, refuse_foreign_code

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OFFICIAL = "checkpoint_best.pt"  # as the official trainer calls it, alone in its Hub repositories
HUB_FILES = [CONFIG, WEIGHTS, "*.json", "*.txt", "*.py", "open_clip_pytorch_model.bin", "model.safetensors", OFFICIAL]


def save(model: CLIP, directory: str | Path) -> None:
    """Write the dual encoder into a directory, each file whole or not at all.

    It is there twice: in open_clip's layout (open_clip_config.json, with what is ours under "diffclip", and
    open_clip_model.safetensors) and in transformers' (see `diffclip.hf.files.write`). InputError
    for a model that does not come from `build` or `load`, and so has no config.
    """
    if not hasattr(model, "model_config"):
        raise InputError(f"cannot save a {type(model).__name__} without model_config: build it with diffclip.build")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole(directory / WEIGHTS) as path:
        save_file(state, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors leaves files that nobody else may read
    hf.write(model.model_config, state, directory)
    write_whole(directory / CONFIG, json.dumps(model.model_config, indent=2) + "\n")  # last: it makes all loadable


def load(
    path_or_id: str | Path,
    *,
    lambda_init: float | str | None = None,
    schedule_base: int = 0,
    heads: tuple[int, int] | None = None,
) -> tuple[CLIP, Callable, Callable]:
    """Return (model in evaluation mode, its transform for evaluation, its tokenizer), as open_clip does.

    Args:
        path_or_id: a directory of ours, of open_clip or of transformers' CLIPModel; a checkpoint file of the
            official DiffCLIP or of SLIP, or a directory that holds it as checkpoint_best.pt; or the Hub id of any
            such directory, like hammh0a/DiffCLIP_ViTB16_CC12M.
        lambda_init, schedule_base: for files of the official code, which do not hold them (see
            `warm_start.differentiate`), those that `convert` wrote excepted; 0.8 with a notice if not given.
        heads: (vision, text) number of heads, for files of ordinary towers, which do not hold them either; 64
            wide with a notice if not given, as in SLIP, whose ViT-S has 12 heads of 32.

    Raises:
        InputError: for what cannot be read or recognised, or does not fit; then nothing is loaded.
    """
    path = locate(path_or_id)
    if path.is_dir() and not (path / CONFIG).is_file():
        if (config := _transformers_config(path)).get("model_type") == "clip":
            return load_transformers_clip(path, config)
        if (path / OFFICIAL).is_file():
            path = path / OFFICIAL
    if path.is_file():
        state, args = read_official(path)
        config = official_config(state, lambda_init, schedule_base, heads, args)
        model = models.build(config)
        load_strictly(model, from_official(state), str(path))
    else:
        config = _read_config(path)
        if "diffclip" not in config:
            return _load_open_clip(path, config)
        model = models.build(config)
        load_strictly(model, read_safetensors(path / WEIGHTS), str(path / WEIGHTS))
    model.model_config = config
    return model.eval(), preprocessing.transforms(config, train=False), preprocessing.tokenizer(config)


def locate(path_or_id: str | Path) -> Path:
    """Return an existing local path, or the local copy of a Hub repository."""
    path = Path(path_or_id)
    if path.exists():
        return path
    name = str(path_or_id).removeprefix("hf-hub:").rstrip("/")  # open_clip's prefix
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{path}: no such file or directory")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"{path}: no such file or directory, nor a Hub repository in reach ({type(error).__name__})"
        ) from error


def official_file(path_or_id: str | Path) -> Path | None:
    """The official code's checkpoint file that a path, its folder or a Hub id names; None if there is none."""
    try:
        path = locate(path_or_id)
    except InputError:
        return None
    if path.is_dir():
        path = path / OFFICIAL
    return path if path.is_file() else None


def load_tower(path_or_id: str | Path) -> tuple[hf.DiffCLIPVisionModel, hf.DiffCLIPImageProcessor]:
    """Return the vision tower, in evaluation mode, of what has no config.json of one: the official code's files.

    InputError if it cannot be read, or is no dual encoder of ours.
    """
    model = load(path_or_id)[0]
    if not hasattr(model, "model_config"):
        raise InputError(f"{path_or_id}: a {type(model).__name__} that is not ours: its tower is read by transformers")
    tower = hf.DiffCLIPVisionModel(hf.vision_config(model.model_config))
    tower.trunk.load_state_dict(model.visual.trunk.state_dict())
    return tower.eval(), hf.image_processor(model.model_config)


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG).is_file():
        raise InputError(f"{directory}: no {CONFIG}, so this is not a finished dual encoder{_resembles(directory)}")
    config = read_json(directory / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{directory / CONFIG}: not a model's config, but a {type(config).__name__}")
    return config


def _resembles(directory: Path) -> str:
    """Say what a directory that is no dual encoder may be, and what to do with it."""
    names = sorted(path.name for path in directory.iterdir())
    if "config.json" in names:
        model_type = _transformers_config(directory).get("model_type")
        if model_type in ("siglip", "siglip2"):
            instead = "take open_clip's release of the same weights, like timm/ViT-B-16-SigLIP"
            return f"; it is transformers' {model_type}, which is not read here: {instead}"
        return f"; its config.json ({model_type or 'no model_type'}) is for transformers: use AutoModel.from_pretrained"
    if any(name.startswith("checkpoint-") for name in names):
        return "; it has the checkpoints of a run that is not finished: give the run's command again"
    if weights := [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]:
        return f"; if one of its files ({', '.join(weights[:5])}) is the official DiffCLIP's or SLIP's, give its path"
    return f"; it holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "; it is empty"


def _transformers_config(directory: Path) -> dict[str, Any]:
    """The content of a config.json; empty if there is none."""
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else None
    return config if isinstance(config, dict) else {}


def _load_open_clip(directory: Path, config: dict[str, Any]) -> tuple[open_clip.CLIP, Callable, Callable]:
    model_cfg = config.get("model_cfg", config)
    refuse_foreign_code(model_cfg, str(directory / CONFIG))
    untrusting = {}
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):  # the tokenizer is transformers', and in this directory
        refuse_auto_map(directory / "tokenizer_config.json", "AutoTokenizer")
        untrusting = {"trust_remote_code": False}
    name = f"local-dir:{directory}"
    try:
        model, _, transform = open_clip.create_model_and_transforms(name)
        return model.eval(), preprocessing.decoding(transform), open_clip.get_tokenizer(name, **untrusting)
    except Exception as error:  # open_clip raises whatever its loaders do
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{directory}: open_clip cannot load it ({type(error).__name__}: {reason})") from error


def convert(source: str | Path, target: str | Path, **imported: Any) -> None:
    """Read any format and write a directory, or, for a target ending in .pt or .pth, the official layout.

    That layout has no place for lambda_init, epsilons and numbers of heads: they are written, as the whole config, into
    its `args`, where `load` finds them; a notice says which of them the official code would take by itself as something
    else. InputError for what cannot be read, or not be written in that layout.
    """
    model, _, _ = load(source, **imported)
    if not isinstance(model, CLIP):
        raise InputError(
            f"{source}: a {type(model).__module__.split('.')[0]} model, which neither our directories nor the official "
            "layout can hold: every command takes it as it is"
        )
    if Path(target).suffix not in (".pt", ".pth"):
        save(model, target)
        return
    options = model.model_config["diffclip"]
    version = options.get("version", 1)
    if options["towers"] and not kind(version).in_official_layout:
        reason = f"the official code has no version {version} of differential attention"
        raise InputError(f"{reason}: write a directory instead")
    state = {f"module.{name}": tensor for name, tensor in to_official(model.state_dict()).items()}
    there = {"lambda_init": 0.8} if options["towers"] else {}
    there["vision_norm_eps"] = 1e-5 if "vision" in options["towers"] else 1e-6
    if differing := [f"{key} {options[key]}, not {value}" for key, value in there.items() if options[key] != value]:
        warnings.warn(f"{target}: to be set in the official code by hand: {'; '.join(differing)}", stacklevel=2)
    args = argparse.Namespace(model=options["variant"], model_config=model.model_config)
    with whole(target) as path:
        torch.save({"state_dict": state, "args": args}, path)
