"""Dual encoders in and out: our directories, open_clip's and transformers', and the files of the official code."""

import runpy
import sys

if __name__ == "__main__":  # `python -m diffclip.checkpoints convert`: the command, before anything heavy is imported
    if sys.argv[1:2] == ["convert"]:
        del sys.argv[1]
    runpy.run_module("diffclip.convert", run_name="__main__")
    sys.exit()

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffclip import hf, hf_clip, hf_inputs, models, preprocessing, sources
from diffclip.architectures import config_of, plain_state, preprocess_cfg_of, unwrapped
from diffclip.attention import kind
from diffclip.base.archives import check_arrays
from diffclip.base.backbones import (
    PreprocessCfg,
    convert_state_dict,
    convert_to_custom_text_state_dict,
    find_checkpoint,
    get_model_config,
    load_checkpoint,
    resize_pos_embed,
    resize_text_pos_embed,
    set_model_preprocess_cfg,
)
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import read_settings, whole, write_whole
from diffclip.base.loaded import check_values
from diffclip.base.ranges import check_size
from diffclip.base.schema import RECORD
from diffclip.model_config import check_config
from diffclip.models import DualEncoder
from diffclip.official import from_official, official_config, read_official, to_official
from diffclip.sources import CONFIG, OFFICIAL, WEIGHTS
from diffclip.variants import current
from diffclip.weights import load_strictly, read_safetensors, refuse_foreign_code, write_safetensors

Loaded = tuple[DualEncoder, Callable, Callable]  # model in evaluation mode, transform for evaluation, tokenizer


def save(model: nn.Module, directory: str | Path) -> None:
    """Write the dual encoder into a directory, each file whole or not at all.

    The encoder is in open_clip's layout (open_clip_config.json, with what is ours under "diffclip", and
    open_clip_model.safetensors), whatever its architecture; beside it lie the tokenizer and image processor that it
    came with, if they are transformers'. An encoder of the paper's make is written once more in transformers' layout
    (see `diffclip.hf.files.write`). The wrappers of torch.compile, DistributedDataParallel and weight averaging are
    taken off.

    Raises:
        InputError: for a model that comes neither from `build` or `load` nor, whole, from open_clip.
    """
    model = unwrapped(model)
    config = config_of(model)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = plain_state(model)
    write_safetensors(state, directory / WEIGHTS)
    for part in beside(model, config):
        part.save_pretrained(directory)
    if models.papers(config):
        hf.write(config, state, directory)
    write_whole(directory / CONFIG, json.dumps(config, indent=2) + "\n")  # last: it makes all loadable


def beside(model: nn.Module, config: dict[str, Any]) -> list[Any]:
    """What is saved with a model by its own `save_pretrained`: the tokenizer and image processor that it came with."""
    parts = getattr(model, "beside", None)
    if parts is None and config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        try:
            parts = [preprocessing.tokenizer(config)]
        except InputError as error:
            warnings.warn(f"saved without its tokenizer: {error}", stacklevel=3)
    return parts or []


def load(
    path_or_id: str | Path,
    *,
    lambda_init: float | str | None = None,
    schedule_base: int = 0,
    heads: tuple[int, int] | None = None,
) -> Loaded:
    """Return (model in evaluation mode, its transform for evaluation, its tokenizer), as open_clip does.

    Args:
        path_or_id: whatever names a dual encoder, see `diffclip.sources`: a run directory, files of the official
            DiffCLIP or of SLIP, open_clip's `open_clip:NAME@WEIGHTS` and directories, transformers' CLIPModel and
            SiglipModel directories, or the Hub id of any such, like hammh0a/DiffCLIP_ViTB16_CC12M.
        lambda_init, schedule_base: for files of the official code, which do not hold them (see
            `warm_start.differentiate`), those that `convert` wrote excepted; 0.8 with a notice if not given.
        heads: (vision, text) number of heads, for files of ordinary towers, which do not hold them either; 64
            wide with a notice if not given, as in SLIP, whose ViT-S has 12 heads of 32.

    Raises:
        InputError: for what cannot be read or recognised, or does not fit; then nothing is loaded.
    """
    if named := sources.open_clip_name(path_or_id):
        config = {"model_cfg": get_model_config(named.architecture), "preprocess_cfg": named.tag}
        if named.tag:  # which activation the weights were trained with, whatever the architecture's name says
            config["model_cfg"]["quick_gelu"] = bool(named.tag.get("quick_gelu", False))
        return _load_open_clip(config, named.weights, str(path_or_id))
    path = sources.locate(path_or_id)
    if path.is_dir() and not (path / CONFIG).is_file():
        config = sources.transformers_config(path)
        if config.get("model_type") in sources.TRANSFORMERS:
            return _with_inputs(hf_clip.load_model(path, config), path)
        if (path / OFFICIAL).is_file():
            path = path / OFFICIAL
    if path.is_file():
        state, args = read_official(path)
        config = official_config(state, lambda_init, schedule_base, heads, args)
        check_size(config, str(path), path.stat().st_size)
        model = models.build(config)
        load_strictly(model, from_official(state), str(path))
        model.model_config = config
        return _with_inputs(model, path.parent)
    config = _read_config(path)
    if "diffclip" not in config:
        return _load_open_clip(config, find_checkpoint(path), str(path), path)
    refuse_foreign_code(config.get("model_cfg"), str(path / CONFIG))
    state = read_safetensors(path / WEIGHTS)
    check_size(config, str(path / CONFIG), (path / WEIGHTS).stat().st_size)
    model = models.build(config)
    load_strictly(model, state, str(path / WEIGHTS))
    model.model_config = current(config)
    if (path / RECORD).is_file():  # trained here, not converted: runs made before there were other rules name none
        model.model_config["diffclip"].setdefault("decoding", 1)
    return _with_inputs(model, path)


def unloaded(path_or_id: str | Path) -> DualEncoder:
    """The model that `load` would give; of open_clip's names with random weights, none of theirs fetched or read."""
    if parts := sources.split_open_clip(path_or_id):
        return _build_open_clip(get_model_config(parts[0]), {}, str(path_or_id))
    return load(path_or_id)[0]


def _with_inputs(model: DualEncoder, directory: Path | None) -> Loaded:
    """Add to a model what prepares its images and texts: by its config, or by transformers' files of its directory."""
    config = model.model_config
    if directory and config["diffclip"].get("inputs") == "transformers":
        transform, tokens, model.beside = hf_inputs.inputs(directory, config)
        config["preprocess_cfg"] = hf_inputs.preprocess_cfg(transform, config["model_cfg"]["vision_cfg"]["image_size"])
        return model.eval(), transform, tokens
    tokenizer = preprocessing.tokenizer(config, directory=directory)
    model.beside = [tokenizer] if hasattr(tokenizer, "save_pretrained") else []
    return model.eval(), preprocessing.transforms(config, train=False), tokenizer


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise InputError(f"{directory}: is no folder of a model, nor a file of weights; give one of these")
    if not (directory / CONFIG).is_file():
        reason = sources.directory_resembles(directory)
        raise InputError(f"{directory}: no {CONFIG}, so this is not a finished dual encoder{reason}")
    config = read_settings(directory / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{directory / CONFIG}: not a model's config, but a {type(config).__name__}")
    check_config(config, str(directory / CONFIG))
    return config


def _load_open_clip(
    config: dict[str, Any], weights: str | Path | None, source: str, directory: Path | None = None
) -> Loaded:
    """A model of open_clip's, from the config of an architecture or directory and its file of weights."""
    if weights is None:
        raise InputError(f"{source}: has a config but no weights; {WEIGHTS} is missing")
    check_size(config, source, Path(weights).stat().st_size)
    model = _build_open_clip(config.get("model_cfg"), config.get("preprocess_cfg") or {}, source)
    try:
        if Path(weights).suffix in (".npz", ".npy"):  # big_vision's own
            check_arrays(Path(weights))
            load_checkpoint(model, str(weights))
            check_values(model.state_dict(), weights)
        else:
            _load_open_clip_state(model, Path(weights))
    except InputError:
        raise
    except Exception as error:  # open_clip raises whatever its loaders do
        reason = in_one_line(error)
        raise InputError(f"{weights}: open_clip cannot load it ({type(error).__name__}: {reason})") from None
    return _with_inputs(model, directory)


def _build_open_clip(model_cfg: Any, preprocess_cfg: dict[str, Any], source: str) -> DualEncoder:
    """A model of open_clip's with fresh weights; what its `preprocess_cfg` leaves open is as open_clip has it."""
    refuse_foreign_code(model_cfg, source)
    vision_cfg = model_cfg.get("vision_cfg") if isinstance(model_cfg, dict) else None
    side = vision_cfg.get("image_size") if isinstance(vision_cfg, dict) else None
    preprocess = asdict(PreprocessCfg(**_known(preprocess_cfg))) | ({"size": side} if side else {})
    ours = {"variant": "CLIP", "attention": {}}
    model = models.build({"model_cfg": model_cfg, "preprocess_cfg": preprocess, "diffclip": ours})
    set_model_preprocess_cfg(model, {**preprocess, "size": model.visual.image_size})
    model.model_config["preprocess_cfg"] = preprocess_cfg_of(model)
    return model


def _load_open_clip_state(model: DualEncoder, path: Path) -> None:
    """Load a file of weights as open_clip does, into the forms of today's model, but whole or not at all."""
    state = convert_state_dict(model, sources.read_state(path)[0])
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and getattr(model, name) is not None:
            state[name] = state[name].reshape(getattr(model, name).shape)
    if model.logit_bias is not None and "logit_scale" in state:
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    state.pop("text.transformer.embeddings.position_ids", None)  # of transformers before 4.31
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    load_strictly(model, state, str(path))


def _known(preprocess: dict[str, Any]) -> dict[str, Any]:
    """Those keys of a preprocess_cfg that open_clip knows, with a value."""
    known = PreprocessCfg.__dataclass_fields__
    return {key: value for key, value in preprocess.items() if key in known and value is not None}


def convert(source: str | Path, target: str | Path, **imported: Any) -> None:
    """Read any format and write a directory, or, for a target ending in .pt or .pth, the official layout.

    That layout has no place for lambda_init, epsilons and numbers of heads: they are written, as the whole config, into
    its `args`, where `load` finds them; a notice says which of them the official code would take by itself as something
    else. InputError for what cannot be read, or not be written in that layout.
    """
    model, _, _ = load(source, **imported)
    if Path(target).suffix in (".pt", ".pth"):
        write_official(model, target)
    else:
        save(model, target)


def write_official(model: DualEncoder, target: str | Path) -> None:
    """Write a model in the official code's layout, see `convert`; InputError if that cannot hold it."""
    options = model.model_config["diffclip"]
    if not models.papers(model.model_config):
        raise InputError(
            f"{target}: the official layout holds a timm vision transformer beside CLIP's text transformer, and not "
            f"this {type(model).__name__}: write a directory instead"
        )
    towers, differing = options["attention"], []
    for tower, how in towers.items():
        if not kind(how["kind"]).in_official_layout:
            what = f"the official code has no differential attention {how['kind']}"
            raise InputError(f"{target}: {what}: write a directory instead")
        if how["lambda_init"] != 0.8:
            differing.append(f"{tower} lambda_init {how['lambda_init']}, not 0.8")
    if options["vision_norm_eps"] != (usual := 1e-5 if "vision" in towers else 1e-6):
        differing.append(f"vision_norm_eps {options['vision_norm_eps']}, not {usual}")
    if differing:
        warnings.warn(f"{target}: to be set in the official code by hand: {'; '.join(differing)}", stacklevel=3)
    state = {f"module.{name}": tensor for name, tensor in to_official(plain_state(model)).items()}
    args = argparse.Namespace(model=options["variant"], model_config=model.model_config)
    with whole(target) as path:
        torch.save({"state_dict": state, "args": args}, path)
