"""Weights in and out: our run directories, open_clip's, and the files of the official DiffCLIP and SLIP code.

python -m diffclip.checkpoints convert checkpoint_best.pt runs/official     # a directory that loads everywhere
python -m diffclip.checkpoints convert runs/official official.pt            # back to the official layout
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffclip.models import CLIP

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OFFICIAL = "checkpoint_best.pt"  # as the official trainer calls it, alone in its Hub repositories
HUB_FILES = [CONFIG, WEIGHTS, "*.json", "*.txt", "open_clip_pytorch_model.bin", "model.safetensors", OFFICIAL]


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
        path_or_id: a directory of ours, of open_clip or of transformers' CLIPModel; a checkpoint file of the
            official DiffCLIP or of SLIP, or a directory that holds it as checkpoint_best.pt; or the Hub id of any
            such directory, like hammh0a/DiffCLIP_ViTB16_CC12M.
        lambda_init, schedule_base: for files of the official code, which do not hold them (see
            `models.differentiate`), those that `convert` wrote excepted; 0.8 with a notice if not given.
        heads: (vision, text) number of heads, for files of ordinary towers, which do not hold them either; 64
            wide with a notice if not given, as in SLIP, whose ViT-S has 12 heads of 32.

    Raises:
        InputError: for what cannot be read or recognised, or does not fit; then nothing is loaded.
    """
    from diffclip import models

    path = locate(path_or_id)
    if path.is_dir() and not (path / CONFIG).is_file():
        if found := _transformers_clip(path):
            return found
        if (path / OFFICIAL).is_file():
            path = path / OFFICIAL
    if path.is_file():
        state, args = _read_official(path)
        config = official_config(state, lambda_init, schedule_base, heads, args)
        model = models.build(config)
        load_strictly(model, from_official(state), str(path))
    else:
        config = _read_config(path)
        if "diffclip" not in config:
            foreign, transform, tokenizer = _load_open_clip(path, config)
            return foreign, models.decoding(transform), tokenizer
        model = models.build(config)
        load_strictly(model, _read_safetensors(path / WEIGHTS), str(path / WEIGHTS))
    model.model_config = config
    return model.eval(), models.transforms(config, train=False), models.tokenizer(config)


def locate(path_or_id: str | Path) -> Path:
    """Return an existing local path, or the local copy of a Hub repository."""
    path = Path(path_or_id)
    if path.exists():
        return path
    name = str(path_or_id).removeprefix("hf-hub:").rstrip("/")  # open_clip's prefix
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{path}: no such file or directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

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
        kind = read_json(directory / "config.json")
        kind = kind.get("model_type") if isinstance(kind, dict) else None
        if kind in ("siglip", "siglip2"):
            return (
                f"; it is transformers' {kind}, which is not read here: take open_clip's release of the same weights, "
                "like timm/ViT-B-16-SigLIP"
            )
        return f"; its config.json ({kind or 'no model_type'}) is for transformers: use AutoModel.from_pretrained"
    if any(name.startswith("checkpoint-") for name in names):
        return "; it has the checkpoints of a run that is not finished: give the run's command again"
    weights = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]
    if weights:
        return f"; if one of its files ({', '.join(weights[:5])}) is the official DiffCLIP's or SLIP's, give its path"
    return f"; it holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "; it is empty"


def _transformers_clip(directory: Path) -> tuple[nn.Module, Callable, Callable] | None:
    """Load a directory of transformers' CLIPModel; None if it is not one."""
    if not (directory / "config.json").is_file():
        return None
    config = read_json(directory / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != "clip":
        return None
    from diffclip.hf_clip import load_transformers_clip

    return load_transformers_clip(directory, config, _transformers_weights(directory))


def _transformers_weights(directory: Path) -> dict[str, Tensor]:
    """Read model.safetensors, the files that model.safetensors.index.json lists, or pytorch_model.bin."""
    if (index := directory / "model.safetensors.index.json").is_file():
        listed = read_json(index)
        names = set(listed["weight_map"].values()) if isinstance(listed, dict) and "weight_map" in listed else set()
        if not names or any(Path(str(name)).name != name for name in names):
            raise InputError(f"{index}: lists no weight files of its own directory under weight_map")
        return {key: tensor for name in sorted(names) for key, tensor in _read_safetensors(directory / name).items()}
    if not (directory / "model.safetensors").is_file() and (directory / "pytorch_model.bin").is_file():
        return _tensors(_read_pickle(directory / "pytorch_model.bin"), directory / "pytorch_model.bin")
    return _read_safetensors(directory / "model.safetensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def _load_open_clip(directory: Path, config: dict[str, Any]) -> tuple[nn.Module, Callable, Callable]:

    # isort: split
    from diffclip.base.backbones import open_clip

    model_cfg = config.get("model_cfg", config)
    refuse_foreign_code(model_cfg, str(directory / CONFIG))
    untrusting = {}
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):  # the tokenizer is transformers', and in this directory
        refuse_auto_map(directory / "tokenizer_config.json", "AutoTokenizer")
        untrusting = {"trust_remote_code": False}
    name = f"local-dir:{directory}"
    try:
        model, _, transform = open_clip.create_model_and_transforms(name)
        return model.eval(), transform, open_clip.get_tokenizer(name, **untrusting)
    except Exception as error:  # open_clip raises whatever its loaders do
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{directory}: open_clip cannot load it ({type(error).__name__}: {reason})") from error


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
        from transformers import MODEL_MAPPING, AutoConfig

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
    told = read_json(path) if path.is_file() else {}
    told = told if isinstance(told, dict) else {}
    nested = told.get("image_processor")  # in processor_config.json
    for part in (told, nested if isinstance(nested, dict) else {}):
        if kind in (part.get("auto_map") or {}):
            raise InputError(
                f"{path}: names custom code for {kind} (auto_map), and code of a model's directory is never run"
            )


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


class Unread:
    """Stands for objects of the official trainer's files that are of no use here: paths and numpy's numbers."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What these files import beyond tensors and plain values (their own list, with both names that numpy has had).
UNREAD = ("pathlib.PosixPath", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def _read_pickle(path: Path) -> Any:
    """Read a file of torch.save without running what may be pickled in it; tensors stay on disk until they are used."""
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace, *((Unread, name) for name in UNREAD)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if named := re.search(r"GLOBAL (\S+)", str(error)):  # what a pickle asks for, after much advice of torch's
            reason = f"it holds a {named[1]}, which is not made from a file; save its state dict alone with torch.save"
        raise InputError(f"{path}: cannot be read as plain weights: {reason}") from error


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    import torch

    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{path}: holds no state dict of tensors")
    return state


def _read_official(path: Path) -> tuple[dict[str, Tensor], argparse.Namespace]:
    """Read a checkpoint file; return its tensors by plain name, and the trainer's arguments."""
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no state dict, but a {type(content).__name__}")
    args = content.get("args")
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {}
    for name, tensor in _tensors(content, path).items():  # of DistributedDataParallel, twice at times, and compile
        state[re.sub(r"^(module\.)+", "", str(name).replace("_orig_mod.", ""))] = tensor
    if "image_projection" not in state or "visual.cls_token" not in state:
        raise InputError(
            f"{path}: no image_projection or visual.cls_token, so not a file of the official DiffCLIP or SLIP"
        )
    return state, args if isinstance(args, argparse.Namespace) else argparse.Namespace()


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official code's state dict (no "module.") to ours."""
    ours = {re.sub(r"^visual\.", "visual.trunk.", name): tensor for name, tensor in state.items()}
    ours["visual.head.proj.weight"] = ours.pop("image_projection").T.contiguous()
    if "logit_scale" in ours:  # if not, `load_strictly` says so
        ours["logit_scale"] = ours["logit_scale"].reshape(-1)
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
    args: argparse.Namespace | None = None,
) -> dict[str, Any]:
    """Return the model config that fits an official state dict; see `load` for the arguments.

    `args` are the file's own; where `convert` has put a config into them it is returned, if it was not overruled.
    """
    from diffclip.models import IMAGENET_PREPROCESS, variant_name

    if isinstance(written := getattr(args, "model_config", None), dict) and "model_cfg" in written:
        config = copy.deepcopy(written)
        options = config.get("diffclip")
        if lambda_init is not None and isinstance(options, dict) and options.get("towers"):
            options.update(lambda_init=lambda_init, schedule_base=schedule_base)
            options["variant"] = variant_name(options["towers"], lambda_init)
        return config

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
    """Read any format and write a directory, or, for a target ending in .pt or .pth, the official layout.

    That layout has no place for lambda_init, epsilons and numbers of heads: they are written, as the whole config, into
    its `args`, where `load` finds them; a notice says which of them the official code would take by itself as something
    else.

    Raises:
        InputError: for what cannot be read, or not be written in that layout.
    """
    import torch

    from diffclip.models import CLIP

    model, _, _ = load(source, **options)
    if not isinstance(model, CLIP):
        raise InputError(
            f"{source}: a {type(model).__module__.split('.')[0]} model, which neither our directories nor the official "
            "layout can hold: every command takes it as it is"
        )
    if Path(target).suffix not in (".pt", ".pth"):
        save(model, target)
        return
    state = {f"module.{name}": tensor for name, tensor in to_official(model.state_dict()).items()}
    config = model.model_config
    options = config["diffclip"]
    there = {"lambda_init": 0.8} if options["towers"] else {}
    there["vision_norm_eps"] = 1e-5 if "vision" in options["towers"] else 1e-6
    if differing := [f"{key} {options[key]}, not {value}" for key, value in there.items() if options[key] != value]:
        warnings.warn(f"{target}: to be set in the official code by hand: {'; '.join(differing)}", stacklevel=2)
    args = argparse.Namespace(model=config["diffclip"]["variant"], model_config=config)
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
