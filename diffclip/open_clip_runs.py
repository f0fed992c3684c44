"""`open_clip.create_model("local-dir:RUN")` gives our model, differential or not, once diffclip is imported.

open_clip builds by its own classes alone. So its factory's `create_model`, which everything of open_clip's goes through
(open_clip_train too), is preceded by a look at the directory's config: those with a "diffclip" part are ours to build.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import read_settings

# arguments of open_clip's that are carried out, or mean nothing for a run, which has its weights with it
HONOURED = {"model_name", "precision", "device", "output_dict", "load_weights", "force_preprocess_cfg"}
WITHOUT_MEANING = {"pretrained", "pretrained_text", "pretrained_hf", "require_pretrained", "weights_only", "cache_dir"}


def take_runs(factory: ModuleType) -> None:
    """Let open_clip.factory, as it has been loaded, take runs of ours."""
    theirs = factory.create_model

    @functools.wraps(theirs)
    def create_model(model_name: str, *args: Any, **kwargs: Any) -> Any:
        config = run_config(factory, model_name)
        if config is None:
            return theirs(model_name, *args, **kwargs)
        bound = inspect.signature(theirs).bind(model_name, *args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments.get("model_kwargs", {})}
        defaults = {name: p.default for name, p in inspect.signature(theirs).parameters.items()}
        known = HONOURED | WITHOUT_MEANING | {"model_kwargs"}
        if others := [name for name, value in given.items() if name not in known and value != defaults.get(name)]:
            raise InputError(
                f"{model_name}: a run of diffclip's is built as it was trained, without {', '.join(others)}"
            )
        return build(factory, model_name, config, given)

    replace(factory, factory.__package__ or "", create_model)


def replace(factory: ModuleType, package: str, create_model: Callable[..., Any]) -> None:
    """Put a function in the place of the factory's `create_model`, and of the package's, if that has taken it over."""
    theirs = factory.create_model
    for module in (factory, sys.modules.get(package)):
        if getattr(module, "create_model", None) is theirs:
            setattr(module, "create_model", create_model)  # noqa: B010


def run_config(factory: ModuleType, model_name: str) -> dict[str, Any] | None:
    """Return the config of a run of ours, or None for what open_clip knows by itself or will refuse itself."""
    try:
        schema, name = factory.parse_model_name(model_name)
        if schema == "local-dir":
            config = read_settings(Path(name) / "open_clip_config.json")
        elif schema == "hf-hub":
            config = factory._get_hf_config(name)
        else:
            return None
    except Exception:  # open_clip meets it again, and says it in its own way
        return None
    return config if isinstance(config, dict) and "diffclip" in config else None


def build(factory: ModuleType, model_name: str, config: dict[str, Any], given: dict[str, Any]) -> Any:
    """Return the model, in training mode as open_clip does, and with the transform's settings at its `visual`."""
    import torch

    from diffclip import checkpoints, models
    from diffclip.base.backbones import open_clip

    if given["load_weights"]:
        model: Any = checkpoints.load(model_name.removeprefix("local-dir:"))[0]
    else:
        model = models.build(config)
    factory._set_model_device_and_precision(model, torch.device(given["device"]), given["precision"], True)
    if given["output_dict"]:
        model.output_dict = True
    preprocess = asdict(factory.PreprocessCfg())
    for more in (
        model.model_config["preprocess_cfg"],
        {"size": model.visual.image_size},
        given["force_preprocess_cfg"],
    ):
        preprocess = factory.merge_preprocess_dict(preprocess, more or {})
    open_clip.set_model_preprocess_cfg(model, preprocess)
    return model.train()
