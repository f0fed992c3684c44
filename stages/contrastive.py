"""transformers' Trainer with the paper's recipe in it: loss over all ranks, parameter groups, schedule per
iteration, bounded temperature, zero-shot validation after each epoch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import diffclip
from diffclip.benchmarks import datasets, zero_shot
from diffclip.benchmarks.features import Encoder
from diffclip.losses import contrastive_loss
from diffclip.recipe import clamp_logit_scale, decay_parameter_names, learning_rate

if TYPE_CHECKING:
    from stages.pretrain import PretrainConfig
    from stages.run import Run


class ContrastiveTrainer(Trainer):
    """Trains an open_clip-style model on batches of `image` (batch, 3, H, W) and `text` (batch, context)."""

    def __init__(self, *, config: "PretrainConfig", steps_per_epoch: int, run: "Run", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, self.steps_per_epoch, self.run = config, steps_per_epoch, run
        self.loss = contrastive_loss(config.gather_with_grad)
        self.tokenize = diffclip.tokenizer(self.model.model_config)
        self.eval_transform = diffclip.transforms(self.model.model_config, train=False)
        self.val_set = read_val_set(config.val_data) if config.val_data else None
        self.add_callback(AfterStep(self))

    def _get_train_sampler(self, *args: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # TrainingPairs is already in training order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        **kwargs: object,
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
        """Zero-shot accuracy on `val_data` in percent, {"val/top1": …}; {} if no such data was named."""
        if self.val_set is None:
            return {}
        model = self.accelerator.unwrap_model(self.model).eval()
        prompts = self.val_set.templates or zero_shot.templates("imagenet7")
        vectors = zero_shot.classifier(model, self.tokenize, self.val_set.classnames, prompts)
        encoder = Encoder(model, self.eval_transform, self.tokenize, quiet=True)
        pictures = self.val_set.splits.get("val", self.val_set.splits["test"])
        features = encoder.images(pictures)
        metrics = zero_shot.classify(features.after, vectors, features.labels).metrics()
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
        if rest == 0 and state.global_step < state.max_steps and self.trainer.val_set:
            metrics = self.trainer.validate()
            self.trainer.run.say(f"pretrain epoch {epoch}: " + " ".join(f"{k} {v:.1f}" for k, v in metrics.items()))
            self.trainer.log(metrics)


def read_val_set(folder: str) -> datasets.Classification:
    """The labelled set in `folder` (val/ or test/ of class folders, classnames.json, templates.json)."""
    suite = {"classification": {"val": {"folder": "."}}}
    return datasets.read(Path(folder), suite).classification["val"]
