"""Training the multimodal model on conversations: freeze, prove it, train, save. Align and instruct differ in where the
model comes from, which parts learn, and the recipe.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from diffclip.base.schema import BAD_SAMPLES
from diffclip.data.training_pairs import name_bad_samples
from mllm.assemble import assemble, whiten_projector
from mllm.data.examples import ConversationDataset, TrainingConversations, collate, training_order
from mllm.data.judge import judged
from mllm.data.rows import Rows, load_rows, refuse_too_bad
from mllm.literal import control_tokens
from mllm.llava import DiffCLIPLlavaForConditionalGeneration
from mllm.lora import add_lora, base_weights, merge, quantise, save_adapter
from mllm.model import VisionLanguageModel, load
from mllm.packed import BY_EXAMPLE, keeps_apart
from mllm.weights import fingerprints, freeze, parts
from stages.attention import attention_of, check_attention, set_attention
from stages.callbacks import Watch
from stages.config import zero_stage
from stages.gathering import Gathered, gather_on_main
from stages.provenance import upstream_model
from stages.run import Run
from stages.settings import AlignConfig, ConversationConfig, InstructConfig
from stages.trainer import StageTrainer
from stages.training import (
    check_trainer,
    log_bad_samples,
    per_device_batch,
    set_learning_rate,
    train,
    training_arguments,
    training_device,
)

LOOKED_AT = 128  # examples whose images give the statistics of a whitened projector


def train_assembled(config: AlignConfig, run: Run) -> None:
    """Stage align: assemble vision tower and language model, train what learns, write `config.output_dir`."""
    check_trainer(config)
    check_attention(config)
    run.note(model=upstream_model(config.vision_tower))
    vlm = assemble(
        config.vision_tower,
        config.language_model,
        projector=config.projector,
        template="vicuna",
        vision_feature_layer=config.vision_feature_layer,
        class_token=config.class_token,
        image_mode=config.image_mode,
        seed=config.seed,
    )
    train_on_conversations(vlm, config, run)


def train_aligned(config: InstructConfig, run: Run) -> None:
    """Stage instruct: train projector and language model of an aligned model, write `config.output_dir`."""
    check_trainer(config)
    check_attention(config)
    run.note(model=upstream_model(config.model))
    train_on_conversations(load(config.model, dtype=torch.float32), config, run)


def train_on_conversations(vlm: VisionLanguageModel, config: ConversationConfig, run: Run) -> None:
    """Train the parts of `vlm` named in `config.learns`, prove the others unchanged, and write `config.output_dir`.

    Raises:
        RuntimeError: a frozen part changed, or a trained part did not.
    """
    learns = set(config.learns)
    lora = bool(config.lora_rank)
    if lora and "language_model" not in learns:
        raise InputError("lora_rank: the language model does not learn; add language_model to `learns`")
    template = vlm.use_template(config.template)
    model, processor = vlm
    processor.image_processor.decoding = run.record["decoding"]  # saved with it
    language_model, attention = model.model.language_model, attention_of(config)
    # flash and flex attention, which go by the same positions, do not compute on a CPU, where the model still is
    tried = attention if attention == BY_EXAMPLE else language_model.config._attn_implementation
    if config.packing and not keeps_apart(model, tried):
        raise InputError(
            f"packing: this language model ({type(language_model).__name__}) does not keep examples apart that stand "
            "in one row; set packing false"
        )
    set_attention(language_model, attention)
    rows = judged_rows(vlm, config, run, template)
    dataset = ConversationDataset(rows, processor, template=template, max_length=config.max_length)
    if isinstance(config, AlignConfig) and config.projector_init == "whitened":
        whiten(model, dataset, config)
    batch = per_device_batch(config, config.micro_batch_size)
    steps = max(1, int(len(dataset) * config.epochs) // config.global_batch_size)
    if math.ceil(config.warmup_ratio * steps) >= steps:  # whose first step has a rate of 0
        raise InputError(
            f"{len(dataset)} conversations in batches of global_batch_size {config.global_batch_size} make {steps} "
            f"steps, all of them warm-up: set warmup_ratio 0, lower global_batch_size, raise epochs or give more data"
        )
    order = training_order(dataset, config.order, config.global_batch_size, steps, config.seed)
    counts = freeze(model, learns - {"language_model"} if lora else learns)
    exact = computed_buffers(model)
    if config.deepspeed and config.precision == "bf16":
        # DeepSpeed will, keeping float32 copies of what learns; what is proven unchanged are the rounded weights
        model.to(torch.bfloat16)
        restore_buffers(model, exact)
    before = fingerprints(model)
    originals = quantise(model, training_device(config)) if lora and config.lora_bits == 4 else {}
    adapter = (
        add_lora(model, config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout, seed=config.seed)
        if lora
        else None
    )
    summary = ", ".join(f"{name} {n:,} {'learns' if name in learns else 'frozen'}" for name, n in counts.items())
    if adapter is not None:
        trainable = adapter.num_parameters(only_trainable=True)
        summary += f" by LoRA of rank {config.lora_rank}, {trainable:,} parameters"
    run.log(
        f"{run.stage}: {len(dataset):,} conversations from {', '.join(config.data)}, {steps:,} steps of "
        f"{config.global_batch_size}; {summary}"
    )
    run.note(parameters=counts, learns=sorted(learns), steps=steps, before=before)
    trainer = ConversationTrainer(
        learning_rates={name: rate for name in counts if (rate := getattr(config, f"{name}_learning_rate"))},
        model=model,
        args=training_arguments(
            config,
            steps,
            batch,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_ratio,
            max_grad_norm=config.max_grad_norm,
        ),
        train_dataset=TrainingConversations(
            dataset,
            order,
            seed=config.seed,
            bad_samples=run.path / BAD_SAMPLES,
            max_bad_share=config.max_bad_share,
        ),
        data_collator=collate(processor, config.packing),
        callbacks=[
            Watch(run, config.global_batch_size),
            CheckStart(model, config, exact, fingerprints(model) if lora else before),
        ],
    )
    metrics = train(trainer, run)
    if zero_stage(config.deepspeed) == 3:
        gather_on_main(model)
    if run.is_main:
        if adapter is not None:
            if not originals and fingerprint(base_weights(model)) != before["language_model"]:
                raise RuntimeError("weights of the language model beside LoRA's changed: the run is not valid")
            save_adapter(model, adapter, run.path / "adapter", learns)
            merge(adapter, originals)
        after = fingerprints(model)
        for name in after:
            if (after[name] == before[name]) == (name in learns):
                raise RuntimeError(f"{name} {'did not change' if name in learns else 'changed'}: the run is not valid")
        run.note(after=after)
        vlm.save(config.output_dir)
    log_bad_samples(run)
    run.finish(metrics)


def judged_rows(vlm: VisionLanguageModel, config: ConversationConfig, run: Run, template: str) -> Rows:
    """The rows to learn, as training will see them; those that cannot be learnt from are named in bad_samples.jsonl.

    Raises:
        InputError: more than `max_bad_share` of them cannot, or a paused run began with others.
    """
    began = run.record.get("conversations"), run.record.get("rows")
    any_rows = not run.resume_from or config.data_changed == "accept"
    for fresh in (False, True):
        rows = read_and_judge(vlm, config, template, fresh)
        if any_rows or began in ((len(rows), rows.chosen), (len(rows), None), (None, None)):
            break
    else:
        raise InputError(
            f"{run.path} began with {began[0]:,} rows that can be learnt from, and now there are {len(rows):,}, or "
            "others, so their order would be another one: put images and data back as they were, go on with what is "
            "there by --data_changed accept, or choose another --output_dir"
        )
    if rows.problems and run.is_main and run.resume_from is None:
        (run.path / BAD_SAMPLES).unlink(missing_ok=True)  # of a start that came to no step
        name_bad_samples(run.path / BAD_SAMPLES, rows.problems)
    refuse_too_bad(rows, config.max_bad_share, run.path / BAD_SAMPLES)
    run.note(conversations=len(rows), rows=rows.chosen)
    if rows.problems:
        key, reason = rows.problems[0]
        run.log(f"{run.stage}: {len(rows.problems):,} rows cannot be learnt from, e.g. {key}: {reason}")
    return rows


def read_and_judge(vlm: VisionLanguageModel, config: ConversationConfig, template: str, fresh: bool = False) -> Rows:
    """The rows that the settings name, with the `problems` of those that cannot be learnt from; `fresh`: all anew."""
    rows = load_rows(
        config.data,
        config.image_root,
        image_prefix=config.image_prefix,
        split=config.split,
        template=template,
        control=control_tokens(vlm.tokenizer),
        max_bad_share=math.inf,
        fresh=fresh,
    )
    positions = getattr(vlm.model.config.text_config, "max_position_embeddings", None)
    settings: dict[str, Any] = {"template": template, "max_length": config.max_length, "positions": positions}
    return judged(rows, vlm.processor, **settings, fresh=fresh)


def whiten(model: DiffCLIPLlavaForConditionalGeneration, dataset: ConversationDataset, config: AlignConfig) -> None:
    """Start the projector from the statistics of the features of some examples' images."""
    rows = range(0, len(dataset), max(1, len(dataset) // LOOKED_AT))[:LOOKED_AT]
    pixels = [example["pixel_values"] for example in map(dataset.__getitem__, rows) if "pixel_values" in example]
    if not pixels:
        raise InputError(
            f"{', '.join(config.data)}: none of {len(rows)} rows looked at has an image, which "
            "`projector_init: whitened` needs; give images or set `projector_init: default`"
        )
    whiten_projector(model, torch.cat(pixels), config.seed)


class ConversationTrainer(StageTrainer):
    """transformers' Trainer over examples in a given order, with learning rates by part of the model."""

    def __init__(self, *, learning_rates: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts, self.examples, self.learning_rates = parts(kwargs["model"]), kwargs["train_dataset"], learning_rates

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        for name, rate in self.learning_rates.items():
            set_learning_rate(optimizer, self.parts[name].parameters(), rate)
        return optimizer

    def _get_train_sampler(self, *args: object) -> SequentialSampler:
        return SequentialSampler(self.examples)  # the order of the whole run, so that it resumes exactly


class CheckStart(TrainerCallback):
    """Undoes what casting did to computed buffers, and raises RuntimeError if a launcher has changed any weight."""

    def __init__(
        self,
        model: DiffCLIPLlavaForConditionalGeneration,
        config: ConversationConfig,
        buffers: Mapping[str, torch.Tensor],
        expected: Mapping[str, str],
    ) -> None:
        self.model, self.config, self.buffers, self.expected = model, config, buffers, expected

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        restore_buffers(self.model, self.buffers)
        if state.global_step:
            return  # resumed: the weights are those of the checkpoint
        for name, part in parts(self.model).items():
            weights = Gathered(part) if zero_stage(self.config.deepspeed) == 3 else part
            if fingerprint(weights) != self.expected[name]:
                raise RuntimeError(f"{name} is not what it was before DeepSpeed took it: the run is not valid")


def computed_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what a model computes for itself and does not save, such as the frequencies of rotary embeddings."""
    saved = model.state_dict().keys()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}


def restore_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Undo that a cast to bfloat16 rounded `computed_buffers`: positions of long texts would run together."""
    for name, buffer in buffers.items():
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, own_name, buffer.to(getattr(module, own_name).device))
