"""A dry run prints what a training would take, without training: sizes, memory per device, steps, hours and cost, and
what of it is assumed, not counted.
"""

import math

from diffclip.adaptation import let_learn
from diffclip.base.console import print_table
from diffclip.base.errors import InputError
from diffclip.base.lines import print_line
from mllm.assemble import assembled_config, run_config
from mllm.llava import DiffCLIPLlavaConfig
from stages import costs
from stages.config import zero_stage
from stages.pretraining import planned_model, run_title, train_table
from stages.settings import AlignConfig, ConversationConfig, InstructConfig, PretrainConfig
from stages.streaming import shards_of


def estimate_pretraining(config: PretrainConfig) -> None:
    """Print what the run would take on `config.hardware`."""
    hardware = costs.parse_hardware(config.hardware)
    if not (config.samples or config.train_data):
        raise InputError("a dry run needs --train_data, or the number of pairs as --samples (CC3M 2900000)")
    pairs = config.samples or len(train_table(config, shards_of(config)))
    steps = pairs // config.global_batch_size * config.epochs
    model = planned_model(config)
    let_learn(model, config.learns)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts, counted = costs.count_pair(model, config.precision == "bf16")
    title = f"{run_title(config)}: {pairs:,} pairs x {config.epochs} epochs in batches of {config.global_batch_size}"
    if learning < sum(parts.values()):
        title += f", {learning:,} parameters learn"
    print_estimate(config, hardware, title, steps, parts, learning, counted)


def estimate_alignment(config: AlignConfig) -> None:
    """Print what the run would take on `config.hardware`; of the models only the configurations are read."""
    llava = assembled_config(config.vision_tower, config.language_model, config.projector, config.class_token)
    estimate_conversations(config, llava)


def estimate_instruction(config: InstructConfig) -> None:
    """Print what the run would take on `config.hardware`; of the model only the configuration is read."""
    estimate_conversations(config, run_config(config.model))


def estimate_conversations(config: ConversationConfig, llava_config: DiffCLIPLlavaConfig) -> None:
    """As the two above, for a model of the given configuration."""
    hardware = costs.parse_hardware(config.hardware)
    samples, tokens, devices = config.samples, config.tokens, hardware[2]
    if not (samples and tokens):
        raise InputError(
            "a dry run needs --samples and --tokens, the number of conversations and their mean length in text tokens: "
            "558128 and 25 for LLaVA-Pretrain; diffclip stats counts your own"
        )
    if config.global_batch_size % devices:
        raise InputError(f"global_batch_size {config.global_batch_size} is not a multiple of the {devices} devices")
    learns, bf16 = set(config.learns), config.precision == "bf16"
    parts, learning, counted = costs.count_conversation(llava_config, learns, tokens, config.lora_rank, bf16)
    steps = max(1, int(samples * config.epochs) // config.global_batch_size)
    image_tokens = llava_config.image_seq_length
    title = f"{samples:,} conversations of {image_tokens} + {tokens} tokens, {learning:,} parameters learn"
    print_estimate(config, hardware, title, steps, parts, learning, counted)


def print_estimate(
    config: PretrainConfig | ConversationConfig,
    hardware: tuple[str, costs.Hardware, int],
    title: str,
    steps: int,
    parts: dict[str, int],
    learning: int,
    counted: costs.Counted,
) -> None:
    """Print what `steps` steps take as a table, with its assumptions and, if it does not fit, the remedy."""
    size = config.model.split("-", 1)[-1] if isinstance(config, PretrainConfig) else costs.OTHER
    size = next((known for known in costs.UTILISATION if size.endswith(known)), costs.OTHER)
    utilisation, source = costs.UTILISATION[size]
    name, device, devices = hardware
    share = -(-config.global_batch_size // devices)
    batch = min(config.micro_batch_size or share, share)
    beside = isinstance(config, ConversationConfig) and config.lora_rank  # LoRA's parameters are in none of the parts
    result = costs.estimate(
        counted,
        learning,
        frozen=sum(parts.values()) - (0 if beside else learning),
        samples=steps * config.global_batch_size,
        batch=batch,
        chunked=isinstance(config, PretrainConfig) and batch < share,
        bf16=config.precision == "bf16",
        zero_stage=zero_stage(config.deepspeed),
        hardware=device,
        devices=devices,
        utilisation=utilisation,
    )
    photos = steps * config.global_batch_size / (result.hours * 3600) / devices  # a second and device
    labels = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer's state",
        "buckets": "DeepSpeed's buckets",
        "activations": f"activations of {batch}",
        "memory": "memory per device",
    }
    rows = [
        *((part, f"{number:,} parameters, {4 * number / 1e6:,.0f} MB") for part, number in parts.items()),
        (),
        ("steps", f"{steps:,}"),
        ("arithmetic", f"{result.flops:.3g} FLOP"),
        (f"time on {devices} x {name}", f"{result.hours:,.1f} h = {result.device_days:,.2f} device-days"),
        ("cost", f"${result.dollars:,.0f}"),
        ("loading", f"{photos:,.0f} images/s a device, {math.ceil(photos / costs.LOADED)} cores for it"),
        (),
        *((label, f"{getattr(result, kind) / 1e9:,.1f} GB") for kind, label in labels.items()),
    ]
    notes = [
        f"Assumed: {utilisation:.0%} of the device's peak, loading included ({size}: {source}); "
        f"${device.dollars:.2f} for a device-hour; {costs.LOADED} photos of 85 KB a second and core. "
        "Counted: arithmetic and activations, in a step of this model."
    ]
    if result.memory > costs.FREE_SHARE * device.memory:
        notes.append(
            f"This does not fit into {device.memory / 1e9:.0f} GB: set a smaller micro_batch_size, take more devices, "
            "or DeepSpeed's ZeRO."
        )
    print_line(title)  # not the table's title, which would be wrapped to its width
    print_table(("", ""), rows, notes=notes)
