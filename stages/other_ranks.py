"""A checkpoint of DeepSpeed that another number of ranks has written: put together, to be divided anew."""

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from diffclip.base.files import read_text, write_whole
from diffclip.base.ranks import from_main, world
from stages.run import Run

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"  # files in which DeepSpeed says which folder it reads


def divide_anew(trainer: Trainer, checkpoint: str | Path, run: Run) -> bool:
    """Let DeepSpeed read a checkpoint of N ranks with as many as there are now; whether that was needed.

    ZeRO keeps the optimiser in as many pieces as there were ranks. DeepSpeed puts them together on rank 0 (its
    "universal checkpoint", as large as the checkpoint), and every rank takes its share of that. Without ZeRO there are
    no pieces, and nothing is done.
    """
    settings = getattr(trainer.args, "hf_deepspeed_config", None)
    if settings is None or from_main(lambda: ranks_of(checkpoint)) in (0, world()):
        return False
    from_main(lambda: put_together(Path(checkpoint), run))
    settings.config["checkpoint"] = {**settings.config.get("checkpoint", {}), "load_universal": True}
    trainer.add_callback(OwnSteps())
    return True


class OwnSteps(TrainerCallback):
    """Gives each group of parameters a count of steps of its own: ZeRO-3 of DeepSpeed 0.19 reads one for all of them
    from a universal checkpoint, which then counts a step for each group.
    """

    def on_train_begin(self, *args: object, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        for state in optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def ranks_of(checkpoint: str | Path) -> int:
    """How many ranks a checkpoint's optimiser is divided among; 0 where it is not divided."""
    latest = Path(checkpoint) / LATEST
    if not latest.is_file():
        return 0
    return len([*(latest.parent / read_text(latest).strip()).glob("*zero_pp_rank_*_optim_states.pt")])


def put_together(checkpoint: Path, run: Run) -> None:
    """Write a checkpoint's universal form beside it, unless it is there; the pieces were found safe to read before."""
    if (checkpoint / LATEST_UNIVERSAL).is_file():  # which is written last
        return
    from deepspeed.checkpoint.ds_to_universal import main as convert  # not at the top: it takes seconds

    run.log(
        f"{run.stage}: {checkpoint.name} is of {ranks_of(checkpoint)} ranks, and now there are {world()}: it is put "
        "together and divided anew"
    )
    step = read_text(checkpoint / LATEST).strip()
    half = checkpoint / f".{step}_universal"  # what a kill leaves of it is no checkpoint
    shutil.rmtree(half, ignore_errors=True)
    (half / step).mkdir(parents=True)
    options = Namespace(
        input_folder=str(checkpoint / step),
        output_folder=str(half / step),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # its steps
        convert(options)
    shutil.rmtree(checkpoint / f"{step}_universal", ignore_errors=True)
    (half / step).rename(checkpoint / f"{step}_universal")
    shutil.rmtree(half)
    write_whole(checkpoint / LATEST_UNIVERSAL, f"{step}_universal")
