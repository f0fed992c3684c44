"""What the training stages share: their common settings, and how those become transformers' TrainingArguments."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffclip.base.errors import InputError
from diffclip.base.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainingArguments

    from stages.run import Run

# Keys of TrainingArguments that a named setting decides, where the stage has it: `trainer` may not overrule that.
NAMED = {
    "auto_find_batch_size": "global_batch_size",
    "bf16": "precision",
    "dataloader_num_workers": "num_workers",
    "deepspeed": "deepspeed",
    "fp16": "precision",
    "gradient_accumulation_steps": "global_batch_size",
    "learning_rate": "learning_rate",
    "logging_steps": "logging_steps",
    "logging_strategy": "logging_steps",
    "lr_scheduler_type": "end_learning_rate",
    "max_grad_norm": "max_grad_norm",
    "max_steps": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "output_dir",
    "per_device_train_batch_size": "global_batch_size",
    "report_to": "report_to",
    "save_steps": "save_steps",
    "save_strategy": "save_steps",
    "save_total_limit": "save_total_limit",
    "seed": "seed",
    "train_sampling_strategy": "order",
    "use_cpu": "use_cpu",
    "warmup_steps": "warmup_ratio",
    "weight_decay": "weight_decay",
}
INEXACT = ("ignore_data_skip", "save_only_model", "resume_from_checkpoint")  # a resumed run would be another one


@dataclass
class TrainingConfig:
    """Settings that every training stage has.

    A paused run may go on with other values of those whose metadata say `decides: False`: none of them changes which
    sample is learnt when, or by what rule.
    """

    output_dir: str = field(default="", metadata={"help": "the run directory to write", "decides": False})
    seed: int = field(default=0, metadata={"help": "decides weights, data order and augmentation"})
    global_batch_size: int = field(default=4096, metadata={"help": "samples per optimiser step, over all devices"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled (AdamW)"})
    precision: Literal["fp32", "bf16"] = field(default="fp32", metadata={"help": "bf16 = mixed precision"})
    num_workers: int = field(
        default=8, metadata={"help": "data loading processes per device; 0 = in the main one", "decides": False}
    )
    logging_steps: int = field(default=50, metadata={"help": "steps between log lines", "decides": False})
    save_steps: int = field(default=500, metadata={"help": "steps between resume checkpoints", "decides": False})
    save_total_limit: int = field(default=2, metadata={"help": "resume checkpoints kept; at least 2", "decides": False})
    report_to: list[str] = field(
        default_factory=lambda: ["tensorboard"], metadata={"help": "tensorboard, wandb, or none", "decides": False}
    )
    deepspeed: str = field(default="", metadata={"help": "DeepSpeed JSON, e.g. stages/configs/deepspeed/zero2.json"})
    cudnn_attention: bool = field(
        default=False,
        metadata={"help": "allow cuDNN's attention; version 9.24 gives NaN gradients on H100 and H200 at some lengths"},
    )
    use_cpu: bool = field(
        default=False, metadata={"help": "run on the CPU even where there is a GPU", "decides": False}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print sizes, memory, hours and cost; train nothing", "decides": False}
    )
    hardware: str = field(
        default="a100-80gb:8", metadata={"help": "dry run: device and how many of them", "decides": False}
    )
    samples: int = field(
        default=0, metadata={"help": "dry run: size of the data, where it is not at hand", "decides": False}
    )
    trainer: dict = field(default_factory=dict, metadata={"help": "any other TrainingArguments, as JSON"})

    def __post_init__(self) -> None:
        """Refuse what `trainer` may not say; find the DeepSpeed file from here or, as the shipped configurations name
        theirs, from above `stages`.
        """
        if not isinstance(self.trainer, dict):
            raise InputError(
                f"setting `trainer`: expected a mapping such as {{adam_beta2: 0.98}}, found {self.trainer!r}"
            )
        for key, setting in NAMED.items():
            setting = "warmup_epochs" if key == "warmup_steps" and hasattr(self, "warmup_epochs") else setting
            if key in self.trainer and hasattr(self, setting):
                raise InputError(f"setting `trainer`: {key} is what the setting `{setting}` decides: set that instead")
        for key in INEXACT:
            if self.trainer.get(key):
                raise InputError(
                    f"setting `trainer`: with {key} a resumed run would not be the undisturbed one; leave it out, the "
                    "same command resumes by itself"
                )
        if not self.deepspeed:
            return
        shipped = Path(__file__).parents[1] / self.deepspeed
        if not Path(self.deepspeed).is_file() and shipped.is_file():
            self.deepspeed = str(shipped)
        if not Path(self.deepspeed).is_file():
            raise InputError(
                f"{self.deepspeed}: no such DeepSpeed file (setting `deepspeed`); shipped ones lie in "
                "stages/configs/deepspeed/, and --deepspeed= goes without"
            )
        try:
            zero_stage(self)
        except InputError as error:
            raise InputError(f"{error} (setting `deepspeed`)") from None


def per_device_batch(config: TrainingConfig, micro_batch_size: int = 0) -> tuple[int, int]:
    """(samples per device and forward pass, accumulation steps) that make up `global_batch_size`.

    Args:
        micro_batch_size: most samples per device and pass; 0 = no limit, i.e. no accumulation.
    """
    import os

    world = int(os.environ.get("WORLD_SIZE", 1))
    share, rest = divmod(config.global_batch_size, world)
    if rest:
        raise InputError(f"global_batch_size {config.global_batch_size} is not a multiple of the {world} devices")
    micro = min(micro_batch_size or share, share)
    if share % micro:
        raise InputError(f"each device's share of the batch, {share}, is not a multiple of micro_batch_size {micro}")
    return micro, share // micro


def training_device(config: TrainingConfig) -> "torch.device":
    """Where this process trains."""
    import os

    import torch

    on_cpu = config.use_cpu or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def zero_stage(config: TrainingConfig) -> int:
    """The ZeRO stage of `config.deepspeed`, 0 without DeepSpeed."""
    if not config.deepspeed:
        return 0
    settings = read_json(config.deepspeed)
    try:
        return int(settings.get("zero_optimization", {}).get("stage", 0))
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"{config.deepspeed}: no DeepSpeed configuration, whose zero_optimization has a stage"
        ) from None


def training_arguments(config: TrainingConfig, steps: int, batch: tuple[int, int], **own: Any) -> "TrainingArguments":
    """transformers' TrainingArguments for `steps` optimiser steps of `batch` = (micro batch, accumulation).

    cuDNN's attention is switched off for this process unless `config.cudnn_attention`: in torch 2.14 its backward gives
    NaN on H100 and H200 with a mask at some lengths (pytorch issue 196678). torch's flash and memory-efficient kernels
    take over.

    Raises:
        InputError: `config.trainer` holds what TrainingArguments does not take.
    """
    import torch
    from transformers import TrainingArguments

    if config.save_total_limit < 2:
        raise InputError("save_total_limit must be at least 2: one checkpoint is kept whole while the next is written")
    if "wandb" in config.report_to and importlib.util.find_spec("wandb") is None:
        raise InputError("report_to asks for wandb, which is not installed: pip install wandb")
    torch.backends.cuda.enable_cudnn_sdp(config.cudnn_attention)
    on_cpu = training_device(config).type == "cpu"
    if config.deepspeed and on_cpu:
        import deepspeed.ops

        # An all-reduce for inference that would be compiled for a minute with g++; training uses gloo's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    values = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "max_steps": steps,
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "bf16": config.precision == "bf16",
        "use_cpu": on_cpu,
        "dataloader_num_workers": config.num_workers,
        "dataloader_persistent_workers": config.num_workers > 0,
        "dataloader_pin_memory": not on_cpu,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN must be seen, not logged as 0
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "report_to": config.report_to,
        "disable_tqdm": True,  # stages.callbacks.Watch draws the bar
        "remove_unused_columns": False,
        "deepspeed": config.deepspeed or None,
        **own,
        **config.trainer,
    }
    try:
        return on_one_device(TrainingArguments(**values))
    except (TypeError, ValueError) as error:
        if not config.trainer:
            raise
        raise InputError(f"setting `trainer`: {error}; its keys are transformers' TrainingArguments") from None


def on_one_device(arguments: "TrainingArguments") -> "TrainingArguments":
    """Keep Trainer from torch's DataParallel: without a launcher it would take every GPU that it sees, and multiply the
    batch by their number. One process is one device, so `global_batch_size` is what it says.
    """
    devices = arguments.n_gpu
    if devices > 1:
        arguments._n_gpu = 1  # transformers has no setting for it
        print(
            f"{devices} GPUs, of which this process uses {arguments.device} and leaves the others idle: start it as "
            f"`torchrun --nproc_per_node {devices} -m ...` for all of them",
            flush=True,
        )
    return arguments


def train(trainer: "Trainer", run: "Run") -> dict[str, float]:
    """Train from the newest whole checkpoint, if any; returns Trainer's closing metrics.

    Raises:
        InputError: a checkpoint could not be written, e.g. since the disk is full, or is not safe to read, or the
            weights are not finite; the one before it is whole.
        SystemExit: the training was told to stop before its last step (code `stages.run.NOT_FINISHED`).
    """
    from safetensors import SafetensorError
    from transformers import PrinterCallback
    from transformers.utils import logging

    from stages.resume import check_checkpoint

    logging.disable_progress_bar()  # of writing shards
    trainer.remove_callback(PrinterCallback)  # Watch says the same for people
    checkpoint = run.resume_from
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except (OSError, RuntimeError, SafetensorError) as error:
        half = run.half_written()
        if not half:
            raise
        raise InputError(
            f"{half[0]} could not be written ({str(error).splitlines()[0]}): free space on the disk and start the same "
            f"command again, it goes on from {run.resume_from or 'the start'}"
        ) from error
    step, steps = trainer.state.global_step, trainer.args.max_steps
    if step < steps:
        run.stop(step, steps)
    return {k: v for k, v in result.metrics.items() if k != "total_flos"}
