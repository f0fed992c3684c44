"""What every training stage shows and writes while it runs: a bar with rate and ETA, log lines, metrics.jsonl,
and the marker that a checkpoint is whole.
"""

import math
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffclip.base.errors import InputError
from diffclip.base.lines import duration
from stages.run import Run
from stages.signals import Told
from stages.spread import OwnTime

PATIENCE = 600  # seconds by which a rank waits longer for the others at the start and around a checkpoint


class Watch(TrainerCallback):
    """Progress bar, human log lines, metrics.jsonl; stops at a loss or at weights that are not finite, and saves where
    the training is told to stop early.
    """

    def __init__(self, run: Run, samples_per_step: int) -> None:
        self.run, self.samples_per_step = run, samples_per_step
        self.saved = -1  # the step of the newest checkpoint
        self.patient: bool | None = None  # whether this rank waits longer for the others; None before the first step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.logged_step, self.logged_at, self.starting = state.global_step, time.time(), True
        self.own_time = OwnTime(kwargs["model"], args.device) if _several() else None  # type: ignore[arg-type]
        self.told = Told()
        state.compute_steps(args, state.max_steps)  # a checkpoint brings the logging_steps and save_steps of its time
        if state.global_step:
            self.run.log(f"{self.run.stage}: resumes at step {state.global_step} of {state.max_steps}")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.run.stage,
            unit="step",
            dynamic_ncols=True,
            disable=not self.run.is_main or not sys.stderr.isatty(),
        )

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        if self.own_time:
            self.own_time.begin_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        if self.told() and state.global_step < state.max_steps:
            control.should_training_stop = True
        self.on_epoch_end(args, state, control, **kwargs)
        # rank 0 seals a checkpoint, and writes a best model, while the others are at the next step
        busy = control.should_save or control.should_training_stop
        if _several() and busy != self.patient:
            wait_at_most(self.run.config.ddp_timeout + PATIENCE * busy)
            self.patient = busy
        if self.own_time:
            self.own_time.end_step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a checkpoint written where training ends, early or not, and none of weights that are not finite."""
        if control.should_training_stop and self.saved != state.global_step:
            control.should_save = True
        if control.should_save:
            check_weights(kwargs["model"], self.run, state.global_step, args.device)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = {k: v for k, v in (logs or {}).items() if k not in ("epoch", "total_flos")}
        if "loss" not in logs:
            return
        if self.own_time:
            logs |= self.own_time.spread()
        if not self.run.is_main:
            return
        now, steps = time.time(), state.global_step - self.logged_step
        # since the last line; three digits: a large model on a small machine takes a minute for a sample
        rate = float(f"{steps * self.samples_per_step / max(now - self.logged_at, 1e-9):.3g}")
        self.logged_step, self.logged_at = state.global_step, now
        left = (state.max_steps - state.global_step) * self.samples_per_step / max(rate, 1e-9)
        until_end = "" if self.starting else f", {duration(left)} left"  # the first steps tell nothing of the others
        self.starting = False
        line = " ".join(f"{k} {v:.4g}" for k, v in logs.items() if isinstance(v, float) and "/" not in k)
        self.bar.clear()
        self.run.log(
            f"{self.run.stage} step {state.global_step}/{state.max_steps} {line} | {rate:g} samples/s{until_end}"
        )
        self.run.append_metrics({"step": state.global_step, "samples_per_second": rate, **logs})
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"loss is {logs['loss']} at step {state.global_step}: start again with a lower learning rate "
                f"in another output_dir; the last good checkpoint is {self.run.resume_from or 'none'}"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.saved = state.global_step
        if _several():
            dist.barrier()  # other ranks write their part of it too
        if self.run.is_main:
            self.run.seal_checkpoint(state.global_step)

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.bar.close()
        if self.own_time:
            self.own_time.close()


def wait_at_most(seconds: float) -> None:
    """How long this rank waits for the others in what they do together, from here on."""
    dist.distributed_c10d.set_timeout(timedelta(seconds=seconds))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_weights(model: nn.Module, run: Run, step: int, device: torch.device) -> None:
    """Raise InputError on every rank if on any of them a weight that learns is not finite.

    Under ZeRO-3 each rank looks at its share of the weights.
    """
    broken = torch.zeros((), device=device)
    for parameter in model.parameters():
        share = getattr(parameter, "ds_tensor", parameter).detach()
        if parameter.requires_grad:
            broken = torch.maximum(broken, (~torch.isfinite(share)).any().to(broken))
    if _several():
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if broken.item():
        raise InputError(
            f"weights are not finite at step {step}, the model has diverged: start again with a lower learning rate in "
            f"another output_dir; the last good checkpoint is {run.resume_from or 'none'}"
        )
