"""Checkpoints of Trainer's, of a stranger or a failing disk perhaps, judged before training goes on from them."""

import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals  # what Trainer keeps of numpy's random state

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_text

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp", ".metadata")  # the last two: FSDP's
UNREAD = "training_args.bin"  # Trainer writes it, and nothing of ours reads it
COUNTED = ("global_step", "max_steps", "num_train_epochs", "epoch", "total_flos", "logging_steps", "save_steps")
LOADING = (  # Trainer's functions that read a checkpoint
    *("load_from_json", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state"),
    "_load_callback_state",
)


def check_checkpoint(folder: str | Path) -> None:
    """Raise InputError if a file of the checkpoint could run code, or if DeepSpeed would read from elsewhere.

    DeepSpeed reads its checkpoints with `torch.load(weights_only=False)`, which runs whatever a pickle says, and a run
    directory may come from somebody else. So every pickle of a checkpoint is first read by torch's restricted
    unpickler, which runs nothing but a list of constructors.
    """
    folder, remedy = Path(folder), without(folder)
    latest = folder / "latest"  # DeepSpeed reads the folder that it names
    harmless: list[Callable] = []  # what may be made beside tensors and plain types: it does nothing when it is made
    if latest.is_file():
        if not re.fullmatch(r"global_step\d+", read_text(latest).strip()):
            raise InputError(f"{latest}: names no folder of its checkpoint; {remedy}")
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        harmless = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in sorted(names))
    for path in files:
        if not path.is_file():  # a pipe would be waited for
            raise InputError(f"{path}: is no file, or a link to none; {remedy}")
        if not path.name.endswith(PICKLES) or path.name == UNREAD:
            continue
        try:  # reads no values
            with safe_globals(), torch.serialization.safe_globals([*harmless]):
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged pickle may raise anything
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            why = f"it would call {named[1]}" if named else "it is damaged, or no checkpoint of torch"
            raise InputError(f"{path}: is not safe to read ({why}); {remedy}") from None


def without(checkpoint: str | Path) -> str:
    """What to do about a checkpoint from which training cannot go on."""
    return f"delete {checkpoint} to go on from the checkpoint before it, or choose another --output_dir"


def check_state(folder: str | Path) -> None:
    """InputError if what Trainer counts and notes in a checkpoint is not there, or of another kind than it writes."""
    path, remedy = Path(folder) / "trainer_state.json", without(folder)
    if not path.is_file():
        raise InputError(f"{path}: is missing; {remedy}")
    state = read_json(path)
    known = TrainerState.__dataclass_fields__
    odd = [key for key in state if key not in known] if isinstance(state, dict) else ["the whole of it"]
    if not odd:
        counts = {key: state.get(key, 0) for key in COUNTED}
        kinds = {"log_history": list, "stateful_callbacks": dict, "train_batch_size": int}
        odd = [k for k, v in counts.items() if type(v) not in (int, float) or not 0 <= v < 1e30]
        odd += [key for key, kind in kinds.items() if not isinstance(state.get(key), kind | None)]
        odd += [key for key in ("global_step", "max_steps", "num_train_epochs") if not odd and counts[key] % 1]
    if odd:
        raise InputError(f"{path}: is not what was written ({', '.join(odd[:3])}); {remedy}")


def while_loading(error: Exception) -> bool:
    """Whether an error, of any kind but ours, comes from Trainer's reading of a checkpoint."""
    if isinstance(error, InputError | MemoryError):
        return False
    return any(frame.name in LOADING for frame in traceback.extract_tb(error.__traceback__))
