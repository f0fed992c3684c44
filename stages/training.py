"""What the training stages share: how settings become transformers' TrainingArguments, and the training itself, from a
checkpoint that is safe to read.
"""

import logging as logs
import math
import os
import re
import shutil
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils as reporters
from transformers.utils import logging

from diffclip.attention import Differential, fastest
from diffclip.attention.base import set_recomputation
from diffclip.base.commands import near
from diffclip.base.errors import InputError, first_line, in_one_line, other_rank_gone
from diffclip.base.files import read_jsonl
from diffclip.base.lazy_compile import ease_deepspeed
from diffclip.base.lines import print_line
from diffclip.base.ranks import be_a_launcher, from_main, world
from diffclip.base.schema import BAD_SAMPLES, LOGS
from stages import signals
from stages.callbacks import PATIENCE
from stages.checkpoint_files import check_checkpoint, check_state, while_loading, without
from stages.other_ranks import divide_anew
from stages.run import Run
from stages.settings import TrainingConfig

PACKAGES = ("tensorboard", "wandb", "mlflow", "trackio", "swanlab", "clearml")  # reporters that are called like theirs
LATE = ("Timed out waiting", "timed out", "Timeout at")  # in what a collective raises whose other ranks do not come


def per_device_batch(config: TrainingConfig, micro_batch_size: int = 0) -> tuple[int, int]:
    """(samples per device and forward pass, accumulation steps) that make up `global_batch_size`.

    Args:
        micro_batch_size: most samples per device and pass; 0 = no limit, i.e. no accumulation.
    """
    share, rest = divmod(config.global_batch_size, world())
    if rest:
        raise InputError(f"global_batch_size {config.global_batch_size} is not a multiple of the {world()} devices")
    micro = min(micro_batch_size or share, share)
    if share % micro:
        fits = next(n for n in range(micro, 0, -1) if share % n == 0)
        raise InputError(
            f"each device's share of the batch, {share}, is not a multiple of micro_batch_size {micro}: "
            f"set micro_batch_size {fits}"
        )
    return micro, share // micro


def training_device(config: TrainingConfig) -> torch.device:
    """Where this process trains."""
    on_cpu = config.use_cpu or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_trainer(config: TrainingConfig) -> None:
    """Raise InputError, before any data are read, where `trainer` or `report_to` cannot be carried out.

    Numbers that YAML reads as text, such as 1e-8, become numbers.
    """
    for reporter in config.report_to:
        if reporter not in (known := [*reporters.INTEGRATION_TO_CALLBACK, "none", "all"]):
            raise InputError(f"setting `report_to`: there is no {reporter}{near(reporter, known)}")
        # of this one alone: asked for all, transformers imports wandb, which takes two seconds
        if reporter in PACKAGES and not getattr(reporters, f"is_{reporter}_available")():
            raise InputError(f"report_to asks for {reporter}, which is not installed: pip install {reporter}")
    types_by_key = get_type_hints(TrainingArguments)
    for key, value in config.trainer.items():
        if key not in types_by_key:
            hint = near(key, types_by_key)
            raise InputError(f"setting `trainer`: {key} is no key of transformers' TrainingArguments{hint}")
        if isinstance(value, str) and types_by_key[key] in (int, float):
            with suppress(ValueError):
                config.trainer[key] = value = types_by_key[key](value)
        if not _fits(value, types_by_key[key]):
            expected = getattr(types_by_key[key], "__name__", str(types_by_key[key]))
            raise InputError(f"setting `trainer`: {key} {value!r} must be of the type {expected}")


def _fits(value: object, expected: Any) -> bool:
    """Whether a value read from JSON or YAML is of the annotated type, the members of containers left aside."""
    kind = get_origin(expected) or expected
    if kind in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(expected))
    if kind is Literal:
        return value in get_args(expected)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(kind, Enum):
        return value in [member.value for member in kind]
    return isinstance(value, kind)


def training_arguments(config: TrainingConfig, steps: int, batch: tuple[int, int], **own: Any) -> TrainingArguments:
    """transformers' TrainingArguments for `steps` optimiser steps of `batch` = (micro batch, accumulation).

    cuDNN's attention is switched off for this process unless `config.cudnn_attention`: in torch 2.14 its backward gives
    NaN on H100 and H200 with a mask at some lengths (pytorch issue 196678). torch's flash and memory-efficient kernels
    take over.

    Raises:
        InputError: `config.trainer` holds what TrainingArguments does not take.
    """
    check_trainer(config)
    torch.backends.cuda.enable_cudnn_sdp(config.cudnn_attention)
    on_cpu = training_device(config).type == "cpu"
    alone = bool(config.deepspeed) and be_a_launcher()
    ease_deepspeed()
    if config.deepspeed and on_cpu:
        import deepspeed.ops  # not at the top: it takes seconds, and says so on the console

        # An all-reduce for inference that would be compiled for a minute with g++; training uses gloo's. The table is
        # made when it is first asked for, by compilers in each rank, and only for that all-reduce.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    values = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "max_steps": steps,
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "bf16": config.precision == "bf16",
        "torch_compile": config.torch_compile,
        "use_cpu": on_cpu,
        "dataloader_num_workers": config.num_workers,
        "dataloader_persistent_workers": config.num_workers > 0,
        "dataloader_pin_memory": not on_cpu,
        "accelerator_config": {"non_blocking": not on_cpu},
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
        "ddp_timeout": config.ddp_timeout + PATIENCE,
        **own,
        **config.trainer,
    }
    try:
        arguments = TrainingArguments(**values)
    except (TypeError, ValueError) as error:
        if not config.trainer:
            raise
        raise InputError(f"setting `trainer`: {error}; its keys are transformers' TrainingArguments") from None
    alone_on = torch.cuda.device_count() if alone and not on_cpu else 0  # transformers takes DeepSpeed for a launcher
    return on_one_device(arguments, max(arguments.n_gpu, alone_on))


def on_one_device(arguments: TrainingArguments, devices: int) -> TrainingArguments:
    """Keep Trainer from torch's DataParallel: without a launcher it would take every GPU that it sees, and multiply the
    batch by their number. One process is one device, so `global_batch_size` is what it says.

    Args:
        devices: GPUs that this process sees and no other uses.
    """
    if devices > 1:
        arguments._n_gpu = 1  # transformers has no setting for it
        print_line(
            f"{devices} GPUs, of which this process uses {arguments.device} and leaves the others idle: start it as "
            f"`torchrun --nproc_per_node {devices} -m ...` for all of them",
        )
    return arguments


def train(trainer: Trainer, run: Run) -> dict[str, float]:
    """Train from the newest whole checkpoint, if any; returns Trainer's closing metrics.

    Raises:
        InputError: a checkpoint could not be written, e.g. since the disk is full, or is not safe to read, or the
            weights are not finite; the one before it is whole.
        SystemExit: the training was told to stop before its last step (code `stages.run.NOT_FINISHED`).
    """
    logging.disable_progress_bar()  # of writing shards
    trainer.remove_callback(PrinterCallback)  # Watch says the same for people
    check_shared_memory(trainer)
    if run.config.resume_with:
        trainer.add_callback(TakeOver(trainer))
    set_recomputation(run.config.recompute != "never")
    if run.config.recompute == "auto" and trainer.args.device.type == "cuda":
        trainer.add_callback(KeepWhatFits(run))
    checkpoint = run.checkpoint()
    if checkpoint is not None:
        from_main(lambda: check_checkpoint(checkpoint))
        from_main(lambda: check_state(checkpoint))
        if divide_anew(trainer, checkpoint, run) and not run.config.resume_with:
            trainer.add_callback(TakeOver(trainer))  # ZeRO-3 gives all groups the rates of the first
    try:
        with signals.noticed(), attention_log(run):
            result = trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if other_rank_gone(error):
            raise
        if checkpoint is not None and while_loading(error):
            why = f"{type(error).__name__}: {in_one_line(error)}"
            raise InputError(f"{checkpoint}: cannot be gone on from ({why}); {without(checkpoint)}") from error
        if (reporter := type(error).__module__.split(".")[0]) in run.config.report_to:
            raise InputError(
                f"setting `report_to`: {reporter} does not take it ({in_one_line(error)}); mend that, or go on without "
                "it, as by --report_to tensorboard: it decides nothing about the result"
            ) from error
        if not isinstance(error, InputError | OSError | RuntimeError | SafetensorError):
            raise
        if said := re.search(r"^[\w.]*\.(?:InputError|BadSample): (.+)", str(error), re.MULTILINE):
            raise InputError(said[1]) from None  # a loader's worker adds its traceback
        if isinstance(error, InputError):
            raise
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise InputError(
                f"{in_one_line(error)} The system ends processes where memory runs out: lower `num_workers` and start "
                f"the same command again, it goes on from {run.resume_from or 'the start'}"
            ) from error
        if world() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in LATE):
            raise InputError(
                f"the other ranks did not answer within {run.config.ddp_timeout} s: one has died or hangs, see "
                f"{run.path / LOGS} for what each says; raise ddp_timeout if they were only slow; the same command "
                f"goes on from {run.resume_from or 'the start'}"
            ) from error
        run.sealed()  # says by itself what kept a rank from writing its part
        written = run.is_main or not isinstance(error, RuntimeError) or "PytorchStreamWriter" in str(error)
        half = run.half_written() if written else []  # on the other ranks also what rank 0 is still hashing
        if not half:
            raise
        raise InputError(
            f"{half[0]} could not be written ({first_line(error)}): free space on the disk and start the same "
            f"command again, it goes on from {run.resume_from or 'the start'}"
        ) from error
    step, steps = trainer.state.global_step, trainer.args.max_steps
    if step < steps:
        run.stop(step, steps)
    return {k: v for k, v in result.metrics.items() if k != "total_flos"}


def check_shared_memory(trainer: Trainer, folder: str = "/dev/shm") -> None:
    """Raise InputError where the batches that workers hold ready do not fit into the memory that processes share.

    A container has 64 MB of it unless it was started with more. A worker whose batch finds no room tells nobody, and
    the training would wait for it for ever.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = trainer.args.dataloader_num_workers * here
    if not workers or not os.path.isdir(folder) or trainer.train_dataset is None:
        return
    ahead = trainer.args.dataloader_prefetch_factor or 2
    example = trainer.train_dataset[0]
    values = example.values() if isinstance(example, dict) else ()
    batch = sum(v.nbytes for v in values if isinstance(v, torch.Tensor)) * trainer.args.per_device_train_batch_size
    need, free = workers * ahead * batch, shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{folder} has {free >> 20:,} MB free, and the batches that {workers} loading processes hold ready take "
            f"{need >> 20:,} MB: start the container with --shm-size={max(1, need * 2 >> 30)}g or --ipc=host, or lower "
            f"`num_workers` to {free // (ahead * batch) // here}"
        )


@contextmanager
def attention_log(run: Run) -> Iterator[None]:
    """Within, the run's log says which forms of attention were timed, and which was taken."""

    class ToRun(logs.Handler):
        def emit(self, record: logs.LogRecord) -> None:
            run.log(f"{run.stage}: {record.getMessage()}")

    handler, before = ToRun(), fastest.LOG.level
    fastest.LOG.propagate = False  # it would be said once more where a library has set up logging
    fastest.LOG.addHandler(handler)
    fastest.LOG.setLevel(logs.INFO)
    try:
        yield
    finally:
        fastest.LOG.removeHandler(handler)
        fastest.LOG.propagate = True
        fastest.LOG.setLevel(before)


class KeepWhatFits(TrainerCallback):
    """Ends the recomputation of differential attention after two steps of which there is memory enough to do without.

    What is recomputed is less than half of what a step keeps, unless maps are written out.
    """

    STEPS, FREE_SHARE, MORE = 2, 0.9, 1.5

    def __init__(self, run: Run) -> None:
        self.run, self.first = run, -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.first < 0:
            self.first = state.global_step
        if state.global_step != self.first + self.STEPS - 1:
            return
        device, layers = args.device, [m for m in kwargs["model"].modules() if isinstance(m, Differential)]
        at_rest, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        total = torch.cuda.mem_get_info(device)[1]
        if not layers or any(layer.seen_form == "eager" for layer in layers):
            return
        if at_rest + self.MORE * (peak - at_rest) <= self.FREE_SHARE * total:
            set_recomputation(False)
            self.run.log(
                f"{self.run.stage}: attention is not recomputed from here on: a step took {peak / 1e9:.1f} of "
                f"{total / 1e9:.1f} GB"
            )


class TakeOver(TrainerCallback):
    """Gives the optimiser of a resumed run the rates of today's settings, where its checkpoint has brought old ones."""

    def __init__(self, trainer: Trainer) -> None:
        self.groups: list[dict[str, Any]] = []
        create = trainer.create_optimizer

        def noted(*args: Any) -> torch.optim.Optimizer:
            optimizer = create(*args)
            self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            return optimizer

        trainer.create_optimizer = noted  # type: ignore[assignment,method-assign] # before a checkpoint is loaded

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **kwargs: Any) -> None:
        schedule = kwargs["lr_scheduler"]
        if not state.global_step or not self.groups:
            return
        for group, now in zip(kwargs["optimizer"].param_groups, self.groups, strict=True):
            group.update(now, initial_lr=now["lr"])
        schedule.base_lrs = [group["lr"] for group in self.groups]
        rates = [base * rate(state.global_step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas)]
        for group, rate in zip(kwargs["optimizer"].param_groups, rates):
            group["lr"] = rate
        schedule._last_lr = rates


def log_bad_samples(run: Run) -> None:
    """One line, and a note in run.json, on what was skipped and why, if anything."""
    path = run.path / BAD_SAMPLES
    if run.is_main and path.is_file():
        lines = (line for _, line in read_jsonl(path, damaged="skip"))
        bad = {str(line.get("key")) for line in lines if isinstance(line, dict)}
        run.log(f"{run.stage}: {len(bad):,} bad samples skipped, named in {path}")
        run.note(bad_samples=len(bad))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float
) -> None:
    """Move parameters into groups of their own, which differ from their old ones in the rate alone."""
    own = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        group["params"] = [p for p in group["params"] if id(p) not in own]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
