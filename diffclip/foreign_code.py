"""Code that somebody put beside a model's weights is never run: where a directory asks for it, it is refused."""

from pathlib import Path
from typing import Any

from transformers import MODEL_MAPPING, AutoConfig

from diffclip.base.errors import InputError
from diffclip.base.files import read_json


def refuse_foreign_code(model_cfg: Any, source: str) -> None:
    """Look through an open_clip model config for code that loading it would fetch and run.

    Args:
        model_cfg: open_clip's, with vision_cfg and text_cfg.
        source: what the messages call it.

    Raises:
        InputError: it asks for such code, or its text tower cannot be had without.
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
            if type(AutoConfig.from_pretrained(name, trust_remote_code=False)) not in MODEL_MAPPING:
                raise ValueError("transformers has no model for its config")
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{source}: its text tower {name} cannot be had without code of its own ({reason})"
            ) from None


def refuse_auto_map(path: Path, kind: str) -> None:
    """Raise InputError if a configuration file says that its `kind` is code of its own.

    Without that code transformers would take a class of its own in its place, which need not do the same.
    """
    settings = read_json(path) if path.is_file() else {}
    nested = settings.get("image_processor") if isinstance(settings, dict) else {}  # in processor_config.json
    for part in (settings, nested):
        if isinstance(part, dict) and kind in (part.get("auto_map") or {}):
            raise InputError(
                f"{path}: names custom code for {kind} (auto_map), and code of a model's directory is never run"
            )
