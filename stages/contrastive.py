"""transformers' Trainer with the paper's recipe in it: loss over all ranks, parameter groups, schedule per
iteration, bounded temperature, zero-shot validation after each epoch.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffclip.losses import contrastive_loss
from diffclip.recipe import clamp_logit_scale, decay_parameter_names, learning_rate

if TYPE_CHECKING:
    from stages.pretrain import PretrainConfig
    from stages.run import Run


class ContrastiveTrainer(Trainer):
    """Trains an open_clip-style model on batches of `image` (batch, 3, H, W) and `text` (batch, context)."""

    def __init__(self, *, config: "PretrainConfig", steps_per_epoch: int, run: "Run", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.config, self.steps_per_epoch, self.run = config, steps_per_epoch, run
        self.loss = contrastive_loss(config.gather_with_grad)
        self.add_callback(AfterStep(self))

    def _get_train_sampler(self, *args: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # TrainingPairs is already in training order

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: object
    ) -> torch.Tensor:
        image_features, text_features, logit_scale = model(image=inputs["image"], text=inputs["text"])[:3]
        return self.loss(image_features, text_features, logit_scale)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        peak = self.config.learning_rate

        def factor(step: int) -> float:
            return (
                learning_rate(
                    step,
                    steps=num_training_steps,
                    warmup_steps=round(self.config.warmup_epochs * self.steps_per_epoch),
                    peak=peak,
                    start=self.config.start_learning_rate,
                    end=self.config.end_learning_rate,
                )
                / peak
            )

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def validate(self) -> dict[str, float]:
        """Zero-shot accuracy on the folder `val_data`, if one was named: {"val/top1": share in [0, 1]}."""
        if not self.config.val_data:
            return {}
        from diffclip.benchmarks.zero_shot import evaluate_folder

        metrics = evaluate_folder(self.model, self.config.val_data, device=self.args.device)
        return {f"val/{name}": value for name, value in metrics.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["logit_scale"] = self.model.logit_scale.detach().exp().item()
        super().log(logs, start_time)


class AfterStep(TrainerCallback):
    """Bounds the temperature after each optimiser step and validates at the end of each epoch."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        clamp_logit_scale(self.trainer.model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        epoch, rest = divmod(state.global_step, self.trainer.steps_per_epoch)
        if rest == 0 and state.global_step < state.max_steps and self.trainer.config.val_data:
            metrics = self.trainer.validate()
            self.trainer.run.say(f"pretrain epoch {epoch}: " + " ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
            self.trainer.log(metrics)
