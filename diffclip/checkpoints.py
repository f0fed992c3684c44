"""Weights in and out: our run directories, open_clip's, and the files of the official DiffCLIP and SLIP code.

python -m diffclip.checkpoints convert checkpoint_best.pt runs/official     # a directory that loads everywhere
python -m diffclip.checkpoints convert runs/official official.pt            # back to the official layout
"""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffclip.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffclip.models import CLIP

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
HUB_FILES = [CONFIG, WEIGHTS, "*.json", "*.txt", "open_clip_pytorch_model.bin", "model.safetensors"]


def save(model: CLIP, directory: str | Path) -> None:
    """Write the dual encoder and its vision tower into a directory, each file whole or not at all.

    The encoder is in open_clip's layout (open_clip_config.json, with what is ours under "diffclip", and
    open_clip_model.safetensors); the tower in transformers' (config.json, model.safetensors,
    preprocessor_config.json).

    Raises:
        InputError: for a model that does not come from `build` or `load`, and so has no config to write.
    """
    from safetensors.torch import save_file

    from diffclip import hf

    if not hasattr(model, "model_config"):
        raise InputError(f"cannot save a {type(model).__name__} without model_config: build it with diffclip.build")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    trunk = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.trunk.")}
    config = hf.vision_config(model.model_config)
    config.architectures = [hf.DiffCLIPVisionModel.__name__]
    config.dtype = trunk["trunk.cls_token"].dtype
    processor = hf.image_processor(model.model_config)
    text = json.dumps(model.model_config, indent=2) + "\n"

    _write(directory / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _write(directory / "model.safetensors", lambda path: save_file(trunk, path, metadata={"format": "pt"}))
    _write(directory / "config.json", lambda path: path.write_text(config.to_json_string()))
    _write(directory / "preprocessor_config.json", lambda path: path.write_text(processor.to_json_string()))
    _write(directory / CONFIG, lambda path: path.write_text(text))  # last: it makes the directory loadable


def _write(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` fill a temporary file, then put it in place of `path`."""
    temporary = path.with_name(path.name + ".part")
    writer(temporary)
    temporary.chmod(0o644)  # safetensors leaves files that nobody else may read
    os.replace(temporary, path)


def load(
    path_or_id: str | Path,
    *,
    lambda_init: float | str | None = None,
    schedule_base: int = 0,
    heads: tuple[int, int] | None = None,
) -> tuple[CLIP, Callable, Callable]:
    """Return (model in evaluation mode, its transform for evaluation, its tokenizer), as open_clip does.

    Args:
        path_or_id: a directory of ours, of open_clip or of transformers' CLIPModel, a checkpoint file of the
            official DiffCLIP or of SLIP, or the Hub id of a directory.
        lambda_init, schedule_base: for files of the official code, which do not hold them (see
            `models.differentiate`); 0.8 with a notice if not given.
        heads: (vision, text) number of heads, for files of ordinary towers, which do not hold them either; 64
            wide with a notice if not given, as in SLIP, whose ViT-S has 12 heads of 32.

    Raises:
        InputError: for what cannot be read or recognised, or does not fit; then nothing is loaded.
    """
    from diffclip import models

    path = _locate(path_or_id)
    if path.is_file():
        state = _official_state(path)
        config = official_config(state, lambda_init, schedule_base, heads)
        model = models.build(config)
        load_strictly(model, from_official(state), str(path))
    else:
        if not (path / CONFIG).is_file() and (found := _transformers_clip(path)):
            return found[0], models.decoding(found[1]), found[2]
        config = _read_config(path)
        if "diffclip" not in config:
            foreign, transform, tokenizer = _load_open_clip(path)
            return foreign, models.decoding(transform), tokenizer
        model = models.build(config)
        load_strictly(model, _read_safetensors(path / WEIGHTS), str(path / WEIGHTS))
    model.model_config = config
    return model.eval(), models.transforms(config, train=False), models.tokenizer(config)


def _locate(path_or_id: str | Path) -> Path:
    """Return an existing local path, or the local copy of a Hub repository."""
    path = Path(path_or_id)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        raise InputError(f"{path}: no such file or directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InputError(
            f"{path}: no such file or directory, nor a Hub repository in reach ({type(error).__name__})"
        ) from error


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG).is_file():
        tower_only = (directory / "config.json").is_file()
        hint = "; its config.json is for transformers: use AutoModel.from_pretrained" if tower_only else ""
        raise InputError(f"{directory}: no {CONFIG}, so this is not a finished dual encoder{hint}")
    try:
        return json.loads((directory / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{directory / CONFIG}: not valid JSON: {error}") from error


def _transformers_clip(directory: Path) -> tuple[nn.Module, Callable, Callable] | None:
    """Load a directory of transformers' CLIPModel; None if it is not one."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    if config.get("model_type") != "clip":
        return None
    from diffclip.hf_clip import load_transformers_clip

    return load_transformers_clip(directory, config, _read_safetensors(directory / "model.safetensors"))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def _load_open_clip(directory: Path) -> tuple[nn.Module, Callable, Callable]:
    import open_clip

    name = f"local-dir:{directory}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict whole, or raise one InputError that lists every key that does not fit."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in sorted(own.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - own.keys())]
    problems += [
        f"{name} is {list(state[name].shape)} but must be {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    if problems:
        raise InputError(f"{source}: does not fit the model, nothing was loaded: {'; '.join(problems)}")
    model.load_state_dict(state)


# The official code (DiffCLIP and SLIP) saves {"state_dict": {"module.NAME": tensor}, "args": Namespace, ...}. Its
# names are ours but for the vision tower's prefix and the image projection, which it keeps as (in, out).


def _official_state(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint file without running what may be pickled in it; return its tensors by plain name."""
    import pickle

    import torch

    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise InputError(f"{path}: cannot be read as plain weights: {str(error).splitlines()[0]}") from error
        state = state.get("state_dict", state)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "image_projection" not in state or "visual.cls_token" not in state:
        raise InputError(
            f"{path}: no image_projection or visual.cls_token, so not a file of the official DiffCLIP or SLIP"
        )
    return state


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official code's state dict (no "module.") to ours."""
    ours = {re.sub(r"^visual\.", "visual.trunk.", name): tensor for name, tensor in state.items()}
    ours["visual.head.proj.weight"] = ours.pop("image_projection").T.contiguous()
    ours["logit_scale"] = ours["logit_scale"].reshape(1)
    return ours


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict to the official code's, bit for bit: the inverse of `from_official`.

    Raises:
        InputError: for DiffCLIP-V2, which that code cannot hold.
    """
    if any(name.endswith("lambda_proj.weight") for name in state):
        raise InputError("the official code has no second version of differential attention: write a directory instead")
    official = {name.replace("visual.trunk.", "visual."): tensor for name, tensor in state.items()}
    official["image_projection"] = official.pop("visual.head.proj.weight").T.contiguous()
    official["logit_scale"] = official["logit_scale"].reshape(())
    return official


def official_config(
    state: dict[str, Tensor],
    lambda_init: float | str | None = None,
    schedule_base: int = 0,
    heads: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the model config that fits an official state dict; see `load` for the arguments."""
    from diffclip.models import IMAGENET_PREPROCESS, variant_name

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
    if towers and lambda_init is None:
        lambda_init = 0.8
        warnings.warn("the weights do not tell lambda_init: took 0.8 in all layers", stacklevel=3)
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
            "variant": variant_name(towers, lambda_init),
            "towers": towers,
            **({"lambda_init": lambda_init, "schedule_base": schedule_base} if towers else {}),
            "vision_norm_eps": 1e-5 if "vision" in towers else 1e-6,
            "init": "imported",
        },
    }


def convert(source: str, target: str, **options: Any) -> None:
    """Read any format and write a directory, or, for a target ending in .pt or .pth, the official layout."""
    import torch

    model, _, _ = load(source, **options)
    if Path(target).suffix not in (".pt", ".pth"):
        save(model, target)
        return
    state = {f"module.{name}": tensor for name, tensor in to_official(model.state_dict()).items()}
    args = argparse.Namespace(model=model.model_config["diffclip"]["variant"])
    _write(Path(target), lambda path: torch.save({"state_dict": state, "args": args}, path))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="diffclip.checkpoints"
    )
    command = parser.add_subparsers(required=True).add_parser("convert", help="read any format, write another")
    command.add_argument("source", help="directory, checkpoint file, or Hub id")
    command.add_argument("target", help="directory, or NAME.pt for the official layout")
    command.add_argument("--lambda-init", help="a number, or 'schedule' for DiffCLIP*")
    command.add_argument("--schedule-base", type=int, default=0, choices=(0, 1), help="what layer 1 counts as")
    command.add_argument("--heads", type=int, nargs=2, metavar=("VISION", "TEXT"), help="of ordinary towers")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        lambda_init = args.lambda_init
        if lambda_init not in (None, "schedule"):
            try:
                lambda_init = float(lambda_init)
            except ValueError:
                raise InputError(f"--lambda-init must be a number or 'schedule': got {lambda_init!r}") from None
        options = {"lambda_init": lambda_init, "schedule_base": args.schedule_base, "heads": args.heads}
        convert(args.source, args.target, **options)
        print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
