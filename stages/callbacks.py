"""What every training stage shows and keeps while it runs: a bar with rate and ETA, log lines, metrics.jsonl,
and the marker that a checkpoint is whole.
"""

import math
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffclip.errors import InputError
from stages.run import COMPLETE, Run


class Watch(TrainerCallback):
    """Progress bar, human log lines, metrics.jsonl; stops at a loss that is not finite."""

    def __init__(self, run: Run, samples_per_step: int) -> None:
        self.run, self.samples_per_step = run, samples_per_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.first_step, self.started = state.global_step, time.time()
        if state.global_step:
            self.run.say(f"{self.run.stage}: resumes at step {state.global_step} of {state.max_steps}")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.run.stage,
            unit="step",
            dynamic_ncols=True,
            disable=not self.run.is_main or not sys.stderr.isatty(),
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = {k: v for k, v in (logs or {}).items() if k not in ("epoch", "total_flos")}
        if "loss" not in logs or not self.run.is_main:
            return
        elapsed = time.time() - self.started
        # three digits: a large model on a small machine takes a minute for a sample
        rate = float(f"{(state.global_step - self.first_step) * self.samples_per_step / elapsed:.3g}")
        left = (state.max_steps - state.global_step) * self.samples_per_step / max(rate, 1e-9)
        line = " ".join(f"{k} {v:.4g}" for k, v in logs.items() if isinstance(v, float) and "/" not in k)
        self.bar.clear()
        self.run.say(
            f"{self.run.stage} step {state.global_step}/{state.max_steps} {line} "
            f"| {rate:g} samples/s, {left:.0f} s left"
        )
        self.run.append_metrics({"step": state.global_step, "samples_per_second": rate, **logs})
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"loss is {logs['loss']} at step {state.global_step}: lower the learning rate; "
                f"the last good checkpoint is {self.run.resume_from or 'none'}"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # other ranks write their part of it too
        if self.run.is_main:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.bar.close()
