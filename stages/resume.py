"""Whether a checkpoint may be resumed: nothing in it runs when it is unpickled, whoever wrote it.

DeepSpeed reads its checkpoints with `torch.load(weights_only=False)`, which runs whatever a pickle says, and a run
directory may come from somebody else. So every pickle of a checkpoint is first read by torch's restricted unpickler,
which runs nothing but a list of constructors.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals  # what Trainer keeps of numpy's random state

from diffclip.base.errors import InputError
from diffclip.base.files import read_text

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp", ".metadata")  # the last two: FSDP's
UNREAD = "training_args.bin"  # Trainer writes it, and nothing of ours reads it


def check_checkpoint(folder: str | Path) -> None:
    """Raise InputError if a file of the checkpoint could run code, or if DeepSpeed would read from elsewhere."""
    folder = Path(folder)
    latest = folder / "latest"  # DeepSpeed reads the folder that it names
    if latest.is_file() and not re.fullmatch(r"global_step\d+", read_text(latest).strip()):
        raise InputError(f"{latest}: names no folder of its checkpoint; {_remedy(folder)}")
    types = _of_deepspeed() if latest.is_file() else []
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            path = Path(parent, name)
            if name.endswith(PICKLES) and name != UNREAD:
                check_pickle(path, folder, types)


def check_pickle(path: Path, folder: Path, types: list[Callable]) -> None:
    """Raise InputError if the restricted unpickler, which may make `types`, refuses `path`; reads no values."""
    try:
        with safe_globals(), torch.serialization.safe_globals([*types]):
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it would call {named[1]}" if named else "it is damaged, or no checkpoint of torch"
        raise InputError(f"{path}: is not safe to read ({why}); {_remedy(folder)}") from None


def _of_deepspeed() -> list[Callable]:
    """What DeepSpeed keeps in a checkpoint beside tensors and plain types; none of it does anything when it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _remedy(folder: Path) -> str:
    return f"delete {folder} to go on from the checkpoint before it, or choose another --output_dir"
