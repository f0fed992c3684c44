"""What align and instruct share: freeze, prove it, train on conversations, save. They differ in where the model
comes from, which parts learn, and the recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stages.training import TrainingConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mllm.data import ConversationDataset
    from stages.run import Run


@dataclass
class ConversationConfig(TrainingConfig):
    """Settings of the two multimodal stages."""

    data: list[str] = field(default_factory=list, metadata={"help": "LLaVA JSON or JSONL files"})
    image_root: str = field(default="", metadata={"help": "folder that the rows' image paths start from"})
    image_prefix: str = field(default="", metadata={"help": "keep only rows whose image path starts with this"})
    template: Literal["plain", "vicuna", "chatml"] = field(default="vicuna", metadata={"help": "prompt format"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    global_batch_size: int = field(default=192, metadata={"help": "conversations per optimiser step"})
    micro_batch_size: int = field(default=0, metadata={"help": "conversations per device and pass; 0 = no limit"})
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of the steps spent warming up"})
    projector_learning_rate: float = field(
        default=0.0, metadata={"help": "peak learning rate of the projector; 0 = learning_rate"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping, also under DeepSpeed"})


def train_on_conversations(
    model: Any,
    processor: Any,
    config: ConversationConfig,
    run: "Run",
    learns: set[str],
    start: Callable[["ConversationDataset"], None] | None = None,
) -> None:
    """Train the parts of `model` named in `learns`, prove the others unchanged, and write `config.output_dir`.

    Args:
        model, processor: from `mllm.model.assemble` or `mllm.model.load`.
        learns: names out of {"vision_tower", "projector", "language_model"}.
        start: called with the examples before training, e.g. to set weights from them.

    Raises:
        RuntimeError: a frozen part changed, or a trained part did not.
    """
    import torch
    from transformers import Trainer

    from diffclip.fingerprint import fingerprint
    from mllm.data import ConversationDataset, collate, load_rows
    from mllm.model import freeze, parts, save
    from stages.callbacks import Watch
    from stages.training import per_device_batch, train, training_arguments

    rows = load_rows(config.data, config.image_root, image_prefix=config.image_prefix)
    dataset = ConversationDataset(rows, processor, template=config.template)
    if start is not None:
        start(dataset)
    batch = per_device_batch(config, config.micro_batch_size)
    steps = max(1, int(len(dataset) * config.epochs) // config.global_batch_size)
    counts = freeze(model, learns)
    run.say(
        f"{run.stage}: {len(dataset):,} conversations from {', '.join(config.data)}, {steps:,} steps of "
        f"{config.global_batch_size}; "
        + ", ".join(f"{name} {n:,} {'learns' if name in learns else 'frozen'}" for name, n in counts.items())
    )
    before = {name: fingerprint(module) for name, module in parts(model).items()}
    run.note(parameters=counts, learns=sorted(learns), conversations=len(dataset), steps=steps, before=before)

    class ConversationTrainer(Trainer):
        def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
            made = super().create_optimizer(*args)
            if config.projector_learning_rate:
                give_own_rate(made, model.model.multi_modal_projector, config.projector_learning_rate)
            return made

    trainer = ConversationTrainer(
        model=model,
        args=training_arguments(
            config,
            steps,
            batch,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup_ratio,
            max_grad_norm=config.max_grad_norm,
        ),
        train_dataset=dataset,
        data_collator=collate(processor),
        callbacks=[Watch(run, config.global_batch_size)],
    )
    metrics = train(trainer, run)
    after = {name: fingerprint(module) for name, module in parts(model).items()}
    for name in after:
        if (after[name] == before[name]) == (name in learns):
            raise RuntimeError(f"{name} {'did not change' if name in learns else 'changed'}: the run is not valid")
    run.note(after=after)
    if run.is_main:
        save(model, processor, config.output_dir)
    run.finish(metrics)


def give_own_rate(optimizer: "torch.optim.Optimizer", module: "nn.Module", learning_rate: float) -> None:
    """Move the parameters of `module` into groups of their own, which differ from their old ones in the rate alone."""
    own = {id(p) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        group["params"] = [p for p in group["params"] if id(p) not in own]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def data_inputs(config: ConversationConfig) -> dict[str, str]:
    """The files and folders that decide the result, by setting, for `stages.run.Run`."""
    return {**{f"data[{i}]": path for i, path in enumerate(config.data)}, "image_root": config.image_root}
