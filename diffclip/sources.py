"""What a name of a dual encoder means: files and directories found here or on the Hub, and what they hold.

| name | what it is |
| --- | --- |
| `runs/diffclip/pretrain` | a run directory, or whatever `diffclip.save` wrote |
| `checkpoint_best.pt`, its folder | a file of the official DiffCLIP or of SLIP |
| `open_clip:ViT-B-32@laion2b_s34b_b79k` | an architecture of open_clip's with one of its tags |
| `open_clip:ViT-B-32@epoch_5.pt` | the same with a file that `open_clip_train` wrote, or .safetensors |
| `open_clip:local-dir:FOLDER`, `FOLDER` | a directory in open_clip's layout |
| `FOLDER` | a directory of transformers' CLIPModel or SiglipModel |
| `hf-hub:ORG/NAME`, `ORG/NAME` | a repository of the Hub that holds any of these directories or files |
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, snapshot_download
from torch import Tensor

from diffclip.base.backbones import get_model_config, open_clip
from diffclip.base.commands import closest
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import read_settings
from diffclip.base.hub import hub_errors
from diffclip.base.ranges import check_numbers
from diffclip.weights import read_pickle, read_safetensors, tensors

PREFIX = "open_clip:"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
OFFICIAL = "checkpoint_best.pt"  # as the official trainer calls it, alone in its Hub repositories
TRANSFORMERS = ("clip", "siglip")  # model types of theirs that are read
# of the weights that a Hub repository holds, the first of these are fetched, with all small files
HUB_WEIGHTS = (
    (WEIGHTS,),
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("open_clip_pytorch_model.safetensors",),
    ("open_clip_pytorch_model.bin",),
    ("pytorch_model.bin",),
    (OFFICIAL,),
)
SMALL = ["*.json", "*.txt", "*.model", "*.py"]  # code is fetched for those who trust it; nothing here runs it


class Named(NamedTuple):
    """An architecture of open_clip's and its weights: a file, and what open_clip says of a tag ({} for a file)."""

    architecture: str
    weights: Path
    tag: dict[str, Any]


def plain(name: str | Path) -> str:
    """A name without the prefixes that say no more than the path or Hub id behind them."""
    text = str(name)
    for prefix in (f"{PREFIX}local-dir:", "local-dir:", f"{PREFIX}hf-hub:", "hf-hub:"):
        text = text.removeprefix(prefix)
    return text


def locate(path_or_id: str | Path) -> Path:
    """Return an existing local path, or the local copy of a Hub repository."""
    name = plain(path_or_id)
    if not name:  # which as a path would be the folder that the command runs in
        raise InputError(f"{str(path_or_id)!r} names no model: give a path, a Hub id or open_clip:NAME@WEIGHTS")
    path = Path(name)
    if path.exists():
        return path
    name = name.rstrip("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{path}: no such file or directory")
    try:
        return Path(snapshot_download(name, allow_patterns=[*SMALL, *_weights_of(name)]))
    except hub_errors() as error:
        raise InputError(
            f"{path}: no such file or directory, nor a Hub repository in reach ({type(error).__name__})"
        ) from error


def _weights_of(repository: str) -> list[str]:
    """Patterns of the weights to fetch: one form of those a repository holds; all where only its copy is at hand."""
    try:
        files = set(HfApi().list_repo_files(repository))
    except hub_errors() + (OSError,):
        return [pattern for form in HUB_WEIGHTS for pattern in form]
    return list(next((form for form in HUB_WEIGHTS if files & set(form)), ()))


def split_open_clip(name: str | Path) -> tuple[str, str] | None:
    """Return (architecture, tag or file) of `open_clip:ARCHITECTURE@TAG_OR_FILE`; None for all other names.

    InputError for an architecture that open_clip does not have.
    """
    text = str(name)
    if not text.startswith(PREFIX) or plain(text) != text:
        return None
    architecture, _, pretrained = text.removeprefix(PREFIX).partition("@")
    architecture = architecture.replace("/", "-")  # open_clip takes both
    if get_model_config(architecture) is None:
        hint = nearest(architecture, open_clip.list_models())
        raise InputError(f"{name}: open_clip has no architecture {architecture}{hint}")
    return architecture, pretrained


def open_clip_name(name: str | Path) -> Named | None:
    """What `open_clip:ARCHITECTURE@TAG_OR_FILE` names, the tag's file fetched; None for all other names.

    InputError for one that names no architecture, tag or file.
    """
    if (parts := split_open_clip(name)) is None:
        return None
    architecture, pretrained = parts
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not pretrained:
        known = f", with TAG one of {', '.join(tags)}," if tags else ""
        raise InputError(f"{name}: names no weights; write {PREFIX}{architecture}@TAG{known} or @FILE")
    if (path := Path(pretrained)).is_file():
        return Named(architecture, path, {})
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    if not tag:
        hint = nearest(pretrained, tags)
        raise InputError(f"{name}: neither a file nor weights that open_clip has of {architecture}{hint}")
    try:
        return Named(architecture, Path(open_clip.download_pretrained(tag)), tag)
    except Exception as error:  # of the Hub, of urllib, of open_clip
        reason = in_one_line(error, 200)
        raise InputError(f"{name}: its weights are not in reach ({type(error).__name__}: {reason})") from None


def nearest(word: str, known: Sequence[str]) -> str:
    """How a message goes on after a name that is not known."""
    if close := closest(word, known):
        return f"; did you mean {close}?"
    return f"; choose one of {', '.join(known)}" if 0 < len(known) <= 12 else ""


def transformers_config(directory: Path) -> dict[str, Any]:
    """The content of a config.json, its numbers in range; empty if there is none."""
    config = read_settings(directory / "config.json") if (directory / "config.json").is_file() else None
    check_numbers(config, str(directory / "config.json"))
    return config if isinstance(config, dict) else {}


def weights_of(path_or_id: str | Path) -> Path:
    """The file or directory, here, that holds the weights of whatever names a dual encoder."""
    named = open_clip_name(path_or_id)
    return named.weights if named else locate(path_or_id)


def is_dual_encoder(path_or_id: str | Path) -> bool:
    """Whether a path, a folder or a Hub id holds what is not transformers': a file of weights, or our or open_clip's
    config, or the official code's file.
    """
    try:
        path = locate(path_or_id)
    except InputError:
        return False
    return path.is_file() or any((path / name).is_file() for name in (CONFIG, OFFICIAL))


def read_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read a file of weights; return its tensors by plain name, and what the file holds in all.

    Looks under the keys `state_dict` and `model`, and takes off what DistributedDataParallel and torch.compile put in
    front of names.
    """
    content: Any = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no state dict, but a {type(content).__name__}")
    inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    state = {}
    for name, tensor in tensors(inner, path).items():  # of DistributedDataParallel, twice at times, and compile
        state[re.sub(r"^(module\.)+", "", str(name).replace("_orig_mod.", ""))] = tensor
    return state, content


def resembles(names: set[str], path: Path) -> str:
    """What a state dict may be, by its names, and how to give it; "" if that is not known."""
    starts = {name.split(".")[0] for name in names}
    if "vision_model" in starts or "text_model" in starts:
        return "; it looks like transformers' CLIPModel or SiglipModel: give the folder that holds its config.json too"
    if "visual" in starts and ({"text", "transformer", "token_embedding"} & starts):
        return f"; it looks like weights of an open_clip model: give {PREFIX}ARCHITECTURE@{path}"
    if "cls_token" in starts or "trunk" in starts or "blocks" in starts:
        return "; it looks like a vision tower alone, and a dual encoder needs its text tower too"
    return ""


def directory_resembles(directory: Path) -> str:
    """Say what a directory that is no dual encoder may be, and what to do with it."""
    names = sorted(path.name for path in directory.iterdir())
    if "config.json" in names:
        model_type = transformers_config(directory).get("model_type")
        what = f"; its config.json ({model_type or 'no model_type'}) is for transformers"
        if model_type == "siglip2":
            return f"{what}, with patches of any number: take one of a fixed size, like google/siglip2-base-patch16-224"
        return f"{what}: use AutoModel.from_pretrained"
    if any(name.startswith("checkpoint-") for name in names):
        return "; it has the checkpoints of a run that is not finished: give the run's command again"
    if weights := [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]:
        return f"; if one of its files ({', '.join(weights[:5])}) is the official DiffCLIP's or SLIP's, give its path"
    return f"; it holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "; it is empty"
