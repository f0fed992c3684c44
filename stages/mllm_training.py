"""What align and instruct share: freeze, prove it, train on conversations, save. They differ in where the model
comes from, which parts learn, and the recipe.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from diffclip.base.errors import InputError
from stages.training import TrainingConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mllm.data.examples import ConversationDataset
    from mllm.llava import DiffCLIPLlavaConfig
    from mllm.model import VisionLanguageModel
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
    micro_batch_size: int = field(
        default=0, metadata={"help": "conversations per device and pass; 0 = no limit", "decides": False}
    )
    warmup_ratio: float = field(default=0.03, metadata={"help": "share of the steps spent warming up"})
    learns: list[str] = field(
        default_factory=list, metadata={"help": "parts that learn: vision_tower, projector, language_model"}
    )
    vision_tower_learning_rate: float = field(
        default=0.0, metadata={"help": "peak learning rate of the tower; 0 = learning_rate"}
    )
    projector_learning_rate: float = field(
        default=0.0, metadata={"help": "peak learning rate of the projector; 0 = learning_rate"}
    )
    language_model_learning_rate: float = field(
        default=0.0, metadata={"help": "peak learning rate of the language model; 0 = learning_rate"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "the language model learns by LoRA of this rank; 0 = all of it"}
    )
    lora_alpha: float = field(
        default=0.0, metadata={"help": "scale of LoRA's output times its rank; 0 = 2 x lora_rank"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before LoRA's matrices"})
    lora_bits: Literal[4, 16] = field(default=16, metadata={"help": "4 = QLoRA: frozen weights in NF4 (GPU)"})
    order: Literal["length", "random", "file"] = field(
        default="length",
        metadata={"help": "batches of like length, the longest first; any at random; or as the file has them"},
    )
    packing: bool = field(
        default=False, metadata={"help": "examples of a pass stand behind each other in one row, without padding"}
    )
    tokens: int = field(
        default=0, metadata={"help": "dry run: text tokens of a conversation, in the mean", "decides": False}
    )
    max_length: int = field(default=2048, metadata={"help": "longer conversations are cut, image tokens counted"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping, also under DeepSpeed"})


def train_on_conversations(
    vlm: "VisionLanguageModel",
    config: ConversationConfig,
    run: "Run",
    start: Callable[["ConversationDataset"], None] | None = None,
) -> None:
    """Train the parts of `vlm` named in `config.learns`, prove the others unchanged, and write `config.output_dir`.

    Args:
        vlm: from `mllm.assemble.assemble` or `mllm.model.load`.
        start: called with the examples before training, e.g. to set weights from them.

    Raises:
        RuntimeError: a frozen part changed, or a trained part did not.
    """
    import torch
    from torch.utils.data import SequentialSampler, Subset
    from transformers import Trainer, TrainerCallback

    from diffclip.base.fingerprint import fingerprint
    from mllm.conversation import control_tokens
    from mllm.data.examples import ConversationDataset, collate, training_order
    from mllm.data.rows import load_rows
    from mllm.lora import add_lora, base_weights, merge, quantise
    from mllm.weights import freeze, parts
    from stages.callbacks import Watch
    from stages.training import per_device_batch, train, training_arguments, training_device

    learns = set(config.learns)
    lora = bool(config.lora_rank)
    if lora and "language_model" not in learns:
        raise InputError("lora_rank: the language model does not learn; add language_model to `learns`")
    model, processor = vlm
    vlm.use_template(config.template)
    rows = load_rows(
        config.data,
        config.image_root,
        image_prefix=config.image_prefix,
        template=config.template,
        control=control_tokens(processor.tokenizer),
    )
    dataset = ConversationDataset(rows, processor, template=config.template, max_length=config.max_length)
    if start is not None:
        start(dataset)
    batch = per_device_batch(config, config.micro_batch_size)
    steps = max(1, int(len(dataset) * config.epochs) // config.global_batch_size)
    order = training_order(dataset, config.order, config.global_batch_size, steps, config.seed)
    counts = freeze(model, learns - {"language_model"} if lora else learns)
    exact = computed_buffers(model)
    if config.deepspeed and config.precision == "bf16":
        # DeepSpeed will, keeping float32 copies of what learns; what is proven unchanged are the rounded weights
        model.to(torch.bfloat16)
        put_back(model, exact)
    before = {name: fingerprint(module) for name, module in parts(model).items()}
    originals = quantise(model, training_device(config)) if lora and config.lora_bits == 4 else {}
    adapter = (
        add_lora(model, config.lora_rank, alpha=config.lora_alpha, dropout=config.lora_dropout, seed=config.seed)
        if lora
        else None
    )
    run.say(
        f"{run.stage}: {len(dataset):,} conversations from {', '.join(config.data)}, {steps:,} steps of "
        f"{config.global_batch_size}; "
        + ", ".join(f"{name} {n:,} {'learns' if name in learns else 'frozen'}" for name, n in counts.items())
        + (
            f" by LoRA of rank {config.lora_rank}, {adapter.num_parameters(only_trainable=True):,} parameters"
            if lora
            else ""
        )
    )
    run.note(parameters=counts, learns=sorted(learns), conversations=len(dataset), steps=steps, before=before)
    ready = {name: fingerprint(module) for name, module in parts(model).items()} if lora else before

    class AfterInit(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            put_back(model, exact)
            if state.global_step:
                return  # resumed: the weights are those of the checkpoint
            with whole_weights(model, config):
                for name, module in parts(model).items():
                    if fingerprint(module) != ready[name]:
                        raise RuntimeError(f"{name} is not what it was before DeepSpeed took it: the run is not valid")

    rates = {
        name: getattr(config, f"{name}_learning_rate") for name in counts if getattr(config, f"{name}_learning_rate")
    }

    class ConversationTrainer(Trainer):
        def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
            made = super().create_optimizer(*args)
            for name, rate in rates.items():
                give_own_rate(made, parts(model)[name], rate)
            return made

        def _get_train_sampler(self, *args: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)  # `order` holds the whole run, so that it resumes exactly

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
        train_dataset=Subset(dataset, order),
        data_collator=collate(processor, config.packing),
        callbacks=[Watch(run, config.global_batch_size), AfterInit()],
    )
    metrics = train(trainer, run)
    with whole_weights(model, config):
        if lora:
            if not originals and fingerprint(base_weights(model)) != before["language_model"]:
                raise RuntimeError("weights of the language model beside LoRA's changed: the run is not valid")
            merge(adapter, config.output_dir if run.is_main else None, originals)
        after = {name: fingerprint(module) for name, module in parts(model).items()}
        for name in after:
            if (after[name] == before[name]) == (name in learns):
                raise RuntimeError(f"{name} {'did not change' if name in learns else 'changed'}: the run is not valid")
        run.note(after=after)
        if run.is_main:
            vlm.save(config.output_dir)
    run.finish(metrics)


def dry_run(config: ConversationConfig, llava_config: "DiffCLIPLlavaConfig") -> None:
    """Print what the run would take: steps, memory per device, hours and cost.

    Args:
        llava_config: of the model to train.
    """
    from stages.dry_run import count_conversation, estimate, parse_hardware, say
    from stages.training import zero_stage

    name, hardware, devices = parse_hardware(config.hardware)
    samples, tokens = config.samples, config.tokens
    if not (samples and tokens):
        raise InputError(
            "a dry run needs --samples and --tokens, the number of conversations and their mean length in text tokens: "
            "558128 and 25 for LLaVA-Pretrain; python -m mllm.data stats counts your own"
        )
    if config.global_batch_size % devices:
        raise InputError(f"global_batch_size {config.global_batch_size} is not a multiple of the {devices} devices")
    bf16 = config.precision == "bf16"
    parts, learning, counted = count_conversation(llava_config, set(config.learns), tokens, config.lora_rank, bf16)
    share = config.global_batch_size // devices
    batch = min(config.micro_batch_size or share, share)
    steps = max(1, int(samples * config.epochs) // config.global_batch_size)
    found = estimate(
        counted,
        learning,
        frozen=sum(parts.values()) - (0 if config.lora_rank else learning),
        samples=steps * config.global_batch_size,
        batch=batch,
        chunked=False,
        bf16=bf16,
        zero_stage=zero_stage(config),
        hardware=hardware,
        devices=devices,
    )
    title = (
        f"{samples:,} conversations of {llava_config.image_seq_length} + {tokens} tokens, {learning:,} parameters learn"
    )
    say(title, parts, steps, batch, found, name, devices)


@contextmanager
def whole_weights(model: Any, config: ConversationConfig) -> Iterator[None]:
    """Under ZeRO-3 gather on every rank the weights that training left in pieces."""
    from stages.training import zero_stage

    if zero_stage(config) < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
        yield


def computed_buffers(model: "nn.Module") -> dict[str, "torch.Tensor"]:
    """Copies of what a model computes for itself and does not save, such as the frequencies of rotary embeddings."""
    saved = model.state_dict().keys()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name not in saved}


def put_back(model: "nn.Module", buffers: "dict[str, torch.Tensor]") -> None:
    """Undo that a cast to bfloat16 rounded `computed_buffers`: positions of long texts would run together."""
    for name, buffer in buffers.items():
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, own_name, buffer.to(getattr(module, own_name).device))


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
