"""A dry run prints what a training would take, without training: sizes, memory per device, steps, hours and cost, and
what of it is assumed, not counted.
"""

from diffclip.base.console import print_table
from diffclip.base.errors import InputError
from diffclip.data.pairs import PairTable
from mllm.assemble import assembled_config, run_config
from mllm.llava import DiffCLIPLlavaConfig
from stages.costs import (
    FREE_SHARE,
    HARDWARE,
    UTILISATION,
    Estimate,
    count_conversation,
    count_pair,
    estimate,
    parse_hardware,
)
from stages.settings import AlignConfig, ConversationConfig, InstructConfig, PretrainConfig
from stages.zero import zero_stage


def estimate_pretraining(config: PretrainConfig) -> None:
    """Print what the run would take on `config.hardware`."""
    name, hardware, devices = parse_hardware(config.hardware)
    if not (config.samples or config.train_data):
        raise InputError("a dry run needs --train_data, or the number of pairs as --samples (CC3M 2900000)")
    pairs = config.samples or len(PairTable(config.train_data, config.caption_member))
    steps = pairs // config.global_batch_size * config.epochs
    share = -(-config.global_batch_size // devices)
    batch = min(config.micro_batch_size or share, share)
    bf16 = config.precision == "bf16"
    parts, counted = count_pair(config.model, bf16)
    result = estimate(
        counted,
        sum(parts.values()),
        samples=steps * config.global_batch_size,
        batch=batch,
        chunked=batch < share,
        bf16=bf16,
        zero_stage=zero_stage(config.deepspeed),
        hardware=hardware,
        devices=devices,
    )
    title = f"{config.model}: {pairs:,} pairs x {config.epochs} epochs in batches of {config.global_batch_size}"
    print_estimate(title, parts, steps, batch, result, name, devices)


def estimate_alignment(config: AlignConfig) -> None:
    """Print what the run would take on `config.hardware`; of the models only the configurations are read."""
    llava = assembled_config(config.vision_tower, config.language_model, config.projector, config.class_token)
    estimate_conversations(config, llava)


def estimate_instruction(config: InstructConfig) -> None:
    """Print what the run would take on `config.hardware`; of the model only the configuration is read."""
    estimate_conversations(config, run_config(config.model))


def estimate_conversations(config: ConversationConfig, llava_config: DiffCLIPLlavaConfig) -> None:
    """As the two above, for a model of the given configuration."""
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
    result = estimate(
        counted,
        learning,
        frozen=sum(parts.values()) - (0 if config.lora_rank else learning),
        samples=steps * config.global_batch_size,
        batch=batch,
        chunked=False,
        bf16=bf16,
        zero_stage=zero_stage(config.deepspeed),
        hardware=hardware,
        devices=devices,
    )
    title = (
        f"{samples:,} conversations of {llava_config.image_seq_length} + {tokens} tokens, {learning:,} parameters learn"
    )
    print_estimate(title, parts, steps, batch, result, name, devices)


def print_estimate(
    title: str, parts: dict[str, int], steps: int, batch: int, result: Estimate, name: str, devices: int
) -> None:
    """Print the estimate as a table, with its assumptions and, if it does not fit, the remedy."""
    device = HARDWARE[name]
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
        (),
        *((label, f"{getattr(result, kind) / 1e9:,.1f} GB") for kind, label in labels.items()),
    ]
    notes = [
        f"Assumed: {UTILISATION:.0%} of the device's peak, loading included; ${device.dollars:.2f} for a device-hour. "
        "Counted: arithmetic and activations, in a step of this model."
    ]
    if result.memory > FREE_SHARE * device.memory:
        notes.append(
            f"This does not fit into {device.memory / 1e9:.0f} GB: set a smaller micro_batch_size, take more devices, "
            "or DeepSpeed's ZeRO."
        )
    print(title)  # not the table's title, which would be wrapped to its width
    print_table(("", ""), rows, notes=notes)
