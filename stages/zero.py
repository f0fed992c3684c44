"""The DeepSpeed configuration that a run names: where its file lies, and which ZeRO stage it asks for."""

from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from stages.shipped import find


def find_deepspeed_file(config: Any) -> None:
    """Let `config.deepspeed` name a file that is there, a shipped one by its name. Settings without DeepSpeed stay as
    they are.

    Raises:
        InputError: there is no such file, or it is no DeepSpeed configuration.
    """
    name = getattr(config, "deepspeed", "")
    if not name:
        return
    try:
        config.deepspeed = name if Path(name).is_file() else str(find(name))
    except InputError:
        raise InputError(
            f"{name}: no such DeepSpeed file (setting `deepspeed`); shipped ones lie in stages/configs/deepspeed/, and "
            "--deepspeed= goes without"
        ) from None
    try:
        zero_stage(config.deepspeed)
    except InputError as error:
        raise InputError(f"{error} (setting `deepspeed`)") from None


def zero_stage(deepspeed: str) -> int:
    """The ZeRO stage of a DeepSpeed file, 0 for no file.

    Raises:
        InputError: it is no DeepSpeed configuration.
    """
    if not deepspeed:
        return 0
    settings = read_json(deepspeed)
    try:
        return int(settings.get("zero_optimization", {}).get("stage", 0))
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{deepspeed}: no DeepSpeed configuration, whose zero_optimization has a stage") from None
