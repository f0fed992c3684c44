"""The Trainer of contrastive pretraining: the paper's loss over all ranks, parameter groups, schedule per iteration,
bounded temperature, validation after each epoch, and what the log shows beside the loss.
"""

import functools
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, default_data_collator

import diffclip
from diffclip.adaptation import layer_rates
from diffclip.attention import Differential, set_annealing
from diffclip.base.errors import InputError
from diffclip.base.files import append_jsonl, read_json, write_json
from diffclip.base.schema import BAD_SAMPLES, BEST, METRICS, NON_FINITE, NonFinite
from diffclip.benchmarks import datasets, prompts, retrieval, zero_shot
from diffclip.benchmarks.features import Encoder, shared
from diffclip.data.pairs import PairTable
from diffclip.data.training_pairs import TrainingPairs, cut_texts
from diffclip.models import DualEncoder
from diffclip.recipe import clamp_logit_scale, contrastive_loss, decay_parameter_names, learning_rate
from diffclip.variants import TOWERS
from diffclip.warm_start import tower_of
from stages.callbacks import check_weights
from stages.run import Run
from stages.settings import PretrainConfig
from stages.trainer import StageTrainer
from stages.training import attention_log, set_learning_rate


class Step(NamedTuple):
    """What a step leaves to be looked at once its device is through with it: the loop does not wait for that."""

    number: int
    told: torch.Tensor  # on the CPU, on its way there: whether the loss is not finite, and how many samples were bad
    arrived: torch.cuda.Event | None
    loss: torch.Tensor
    items: torch.Tensor
    image: torch.Tensor  # features (batch, width)
    text: torch.Tensor


class ContrastiveTrainer(StageTrainer):
    """Trains a dual encoder on batches of pairs."""

    def __init__(
        self,
        *,
        model: DualEncoder,
        train_dataset: TrainingPairs,
        config: PretrainConfig,
        run: Run,
        inputs: tuple[Callable, Callable],
        learning: dict[str, torch.Tensor | None],
        val_pairs: PairTable | None = None,
        **kwargs: Any,
    ) -> None:
        # the loss before the weights, of which a checkpoint would only say that they are not finite
        callbacks = [LookAtLoss(self), *kwargs.pop("callbacks", ())]
        super().__init__(model, train_dataset=train_dataset, callbacks=callbacks, **kwargs)
        self.clip, self.pairs = model, train_dataset  # Trainer's own `model` and `train_dataset`, with their types
        self.config, self.run = config, run
        self.steps_per_epoch = train_dataset.per_epoch // config.global_batch_size
        self.loss = contrastive_loss(config.gather_with_grad, sigmoid=model.logit_bias is not None)
        self.eval_transform, self.tokenize = inputs
        self.anneal_steps = round(config.anneal_epochs * self.steps_per_epoch)
        self.no_decay = {name for name, rows in learning.items() if rows is not None}  # it would move the other rows
        self.bounded = "logit_scale" in learning and model.logit_bias is None
        self.val_set = read_val_set(config.val_data) if config.val_data else None
        self.val_pairs = val_pairs
        self.lambdas = lambda_modules(model)
        self.unseen: Step | None = None
        self.seen = self.bad = 0  # samples of this process, since it started
        self.waited, self.last_log = 0.0, time.perf_counter()
        self.add_callback(AfterStep(self))
        if getattr(model, "ends_count_alone", False):
            self.data_collator = collate_cut
        if config.torch_compile:
            self.settle_attention()

    def settle_attention(self) -> None:
        """Choose the forms of attention, which a compiled graph cannot; texts as long as they may be."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        batch = min(self.config.micro_batch_size or 10**9, self.args.per_device_train_batch_size)
        with attention_log(self.run):
            for tower in TOWERS:
                tokens = tokens_of(self.clip, tower)
                for layer in tower_of(self.clip, tower).modules():
                    if isinstance(layer, Differential) and tokens:
                        layer.settle(batch, tokens, dtype, self.args.device, tower == "text")

    def _get_train_sampler(self, *args: object) -> SequentialSampler:
        return SequentialSampler(self.pairs)  # TrainingPairs is already in training order

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.waited += time.perf_counter() - start
        return batches

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: object, **kwargs: object
    ) -> torch.Tensor:
        self.look()  # at the step before: there the device has been through it
        chunk = self.config.micro_batch_size
        pixels = diffclip.normalize(self.clip.model_config, inputs["image"])
        image, text, *scale_and_bias = model(image=pixels, text=inputs["text"], chunk=chunk)
        loss = self.loss(image, text, *scale_and_bias)
        told = torch.stack([~torch.isfinite(loss.detach()), inputs["bad"].sum()]).to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None
        self.unseen = Step(
            self.state.global_step + 1, told, arrived, loss.detach(), inputs["item"], image.detach(), text.detach()
        )
        return loss

    def look(self) -> None:
        """Stop if the loss of the last step is not finite, or if too many samples could not be read."""
        step, self.unseen = self.unseen, None
        if step is None:
            return
        if step.arrived is not None:
            step.arrived.synchronize()
        broken, bad = step.told.tolist()
        if broken:
            self.stop_at_non_finite(step)
        self.count_bad(step.number, len(step.items), bad)

    def stop_at_non_finite(self, step: Step) -> NoReturn:
        """Name this rank's share of the batch in non_finite.jsonl, and raise InputError."""
        keys = [self.pairs.table.key(self.pairs.row(int(k))) for k in step.items.tolist()]
        finite = torch.isfinite(step.image).all(dim=1) & torch.isfinite(step.text).all(dim=1)
        culprits = [key for key, fine in zip(keys, finite.tolist()) if not fine]
        loss, rank, path = step.loss.item(), self.args.process_index, self.run.path / NON_FINITE
        append_jsonl(path, [NonFinite(step=step.number, rank=rank, loss=str(loss), culprits=culprits, keys=keys)])
        blame = f"the features of {culprits[0]} are not finite" if len(culprits) == 1 else "the model has diverged"
        raise InputError(
            f"loss is {loss} at step {step.number} ({blame}): the samples are named in {path}; start again without "
            "them or with a lower learning rate in another output_dir; the last good checkpoint is "
            f"{self.run.resume_from or 'none'}"
        )

    def count_bad(self, step: int, samples: int, bad: int) -> None:
        """Stop when more than `max_bad_share` of the samples so far could not be read; looked at now and then."""
        self.seen, self.bad = self.seen + samples, self.bad + bad
        often_enough = self.seen >= 1000 or step % self.steps_per_epoch == 0
        if often_enough and self.bad > self.config.max_bad_share * (self.seen + self.bad):
            raise InputError(
                f"{self.bad} of {self.seen + self.bad} samples could not be read, more than max_bad_share "
                f"{self.config.max_bad_share:g}: see {self.run.path / BAD_SAMPLES}, mend the data or raise it"
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in decay_parameter_names(model) if name not in self.no_decay]

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        if self.config.layer_decay < 1:
            by_rate: dict[float, list[nn.Parameter]] = {}
            parameters = dict(self.clip.named_parameters())
            for name, times in layer_rates(self.clip, self.config.layer_decay).items():
                by_rate.setdefault(times * self.config.learning_rate, []).append(parameters[name])
            for rate, group in by_rate.items():
                set_learning_rate(optimizer, group, rate)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        peak = self.config.learning_rate
        rate = functools.partial(
            learning_rate,
            steps=num_training_steps,
            warmup_steps=round(self.config.warmup_epochs * self.steps_per_epoch),
            peak=peak,
            start=self.config.start_learning_rate,
            end=self.config.end_learning_rate,
        )
        optimizer = optimizer or self.optimizer
        assert optimizer is not None  # Trainer makes it first
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / peak)
        return self.lr_scheduler

    def validate(self) -> dict[str, float]:
        """Zero-shot accuracy on `val_data` and R@k on `val_pairs`, in percent; {} if neither was named.

        The model of the best epoch so far, by top-1 or else by mean R@1, is written to `best/`.
        """
        if self.val_set is None and self.val_pairs is None:
            return {}
        model = self.accelerator.unwrap_model(self.model)
        precision = "bfloat16" if self.config.precision == "bf16" else "float32"
        encoder = Encoder(model, self.eval_transform, self.tokenize, quiet=True, precision=precision)
        metrics: dict[str, float] = {}
        if self.val_set is not None:
            templates = self.val_set.templates or prompts.templates("imagenet7")
            vectors = prompts.classifier(model, self.tokenize, self.val_set.classnames, templates)
            features = encoder.images_shared(self.val_set.splits.get("val", self.val_set.splits["test"]))
            metrics |= zero_shot.classify(features.after, vectors, features.labels).metrics()
        if self.val_pairs is not None:
            metrics |= retrieval_of_pairs(encoder, self.val_pairs)
        model.train()
        metrics = {f"val/{name}": value for name, value in metrics.items()}
        self.run.append_metrics({"step": self.state.global_step, **metrics})
        if self.run.is_main:
            self.save_if_best(model, metrics)
        return metrics

    def save_if_best(self, model: nn.Module, metrics: dict[str, float]) -> None:
        """Write `model` to `best/`, whole or not at all, if it is better than what is there."""
        recalls = [metrics.get(f"val/{way}/R@1", 0.0) for way in ("text_to_image", "image_to_text")]
        score = metrics.get("val/top1", sum(recalls) / 2)
        best, temporary = self.run.path / BEST, self.run.path / f"{BEST}.tmp"
        if score_of(best) >= score:
            return
        shutil.rmtree(temporary, ignore_errors=True)
        diffclip.save(model, temporary)
        write_json(temporary / METRICS, {"score": score, "step": self.state.global_step, **metrics})
        shutil.rmtree(best, ignore_errors=True)
        os.replace(temporary, best)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["logit_scale"] = self.clip.logit_scale.detach().exp().item()
            logs |= {f"lambda/{name}": m.mean_lambda() for name, m in self.lambdas.items()}
            now = time.perf_counter()
            logs["data_wait"] = self.waited / max(now - self.last_log, 1e-9)
            self.waited, self.last_log = 0.0, now
        super().log(logs, start_time)


def collate_cut(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of `TrainingPairs` whose texts are cut to the longest, to a multiple of 8 tokens."""
    batch = default_data_collator([{**item, "image": item["image"].permute(1, 2, 0)} for item in items])
    # images are channels last, and laid behind each other as they lie
    return {**batch, "image": batch["image"].permute(0, 3, 1, 2), "text": cut_texts(batch["text"])}


def tokens_of(model: DualEncoder, tower: str) -> int:
    """How many tokens a tower sees at most, told from its table of positions; 0 where it has none."""
    if tower == "text":
        return int(getattr(model, "context_length", 0))
    tables = (p for name, p in model.visual.named_parameters() if name.endswith(("pos_embed", "positional_embedding")))
    return next((table.numel() // table.shape[-1] for table in tables), 0)


def score_of(best: Path) -> float:
    """The score of the model in `best/`; minus infinity if there is none, or none that can be read."""
    try:
        return float(read_json(best / METRICS)["score"])
    except (InputError, KeyError, TypeError, ValueError):
        return -math.inf


def lambda_modules(model: DualEncoder) -> dict[str, Any]:
    """The differential attention modules of a model by tower and layer, e.g. "vision.0"."""
    return {
        f"{tower}.{layer}": module
        for tower in TOWERS
        for layer, module in enumerate(m for m in tower_of(model, tower).modules() if isinstance(m, Differential))
    }


def retrieval_of_pairs(encoder: Encoder, pairs: PairTable) -> dict[str, float]:
    """R@1/5/10 in percent over held-out pairs, each caption of an image a query of its own."""
    encode_image = cast(Callable[[torch.Tensor], torch.Tensor], encoder.model.encode_image)
    each = pairs.images()
    starts = range(0, len(each), encoder.batch_size)

    def encoded(first: int, step: int) -> list[tuple[torch.Tensor, list[list[str]]]]:
        """Features and captions of every so-many-th batch of images."""
        batches = []
        for start in starts[first::step]:
            rows = each[start : start + encoder.batch_size]
            pixels = torch.stack([encoder.preprocess(pairs[own[0]][0]) for own in rows])
            captions = [[caption for row in own for caption in pairs.captions(row)] for own in rows]
            with encoder.autocast():
                features = encode_image(pixels.to(encoder.device))
            batches.append((features.float().cpu(), captions))
        return batches

    with torch.inference_mode():
        batches = shared(encoded)
    captions = [own for _, batch in batches for own in batch]
    texts = [text for own in captions for text in own]
    owners = torch.tensor([i for i, own in enumerate(captions) for _ in own])
    return retrieval.recall_at_k(torch.cat([images for images, _ in batches]), encoder.texts(texts), owners)


class LookAtLoss(TrainerCallback):
    """Looks at a step's loss at its end, where it is logged, a checkpoint is written, or an epoch or the run ends."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        ends = control.should_training_stop or state.global_step % self.trainer.steps_per_epoch == 0
        if control.should_log or control.should_save or ends:
            self.trainer.look()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.trainer.look()


class AfterStep(TrainerCallback):
    """Bounds the temperature after each optimiser step and validates at the end of each epoch, and before the first of
    a model that is there; lets dex's lambda in.
    """

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.trainer.config.init_from and state.global_step == 0:
            self.trainer.validate()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.trainer.config.attention == "dex":
            set_annealing(self.trainer.clip, min(1.0, state.global_step / max(1, self.trainer.anneal_steps)))

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        if self.trainer.bounded:
            clamp_logit_scale(self.trainer.clip)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        epoch, rest = divmod(state.global_step, self.trainer.steps_per_epoch)
        if rest == 0 and state.global_step < state.max_steps:
            check_weights(self.trainer.clip, self.trainer.run, state.global_step, args.device)  # before best/ has them
            metrics = self.trainer.validate()
            if metrics:
                scores = " ".join(f"{name} {value:.1f}" for name, value in metrics.items())
                self.trainer.run.log(f"pretrain epoch {epoch}: {scores}")
                log_loss = control.should_log
                self.trainer.log(metrics)  # for TensorBoard; afterwards Trainer holds this step's loss for logged
                control.should_log = log_loss


def read_val_set(folder: str) -> datasets.Classification:
    """The labelled set in `folder` (val/ or test/ of class folders, classnames.json, templates.json)."""
    suite = {"classification": {"val": {"folder": "."}}}
    return datasets.read(Path(folder), suite).classification["val"]
