"""What a training step costs: arithmetic and activations, counted as the real model walks through a step of one and of
two samples in the run's precision, and what a whole run takes, by multiplication.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from diffclip.attention import Differential
from diffclip.base.errors import InputError
from diffclip.models import DualEncoder
from mllm.llava import DiffCLIPLlavaConfig, DiffCLIPLlavaForConditionalGeneration
from mllm.lora import add_lora
from mllm.weights import freeze

# Share of an A100's bf16 peak that published runs reached in steps as counted here, loading and communication included,
# with the source. None of them was compiled, and of other devices nothing is known: these stand for all.
UTILISATION = {
    "B-32": (0.11, "open_clip's 4,600 A100-hours for 32 epochs of LAION-400M"),
    "B-16": (0.16, "between open_clip's 10,700 A100-hours for LAION-400M, 0.13, and the paper's 240 for CC12M, 0.20"),
    "L-14": (0.12, "open_clip's 50,800 A100-hours for LAION-400M, of which recomputed activations are a part"),
}
OTHER = "B-16"  # stands for the sizes and models that are not in the table
LOADED = 150  # photos of 85 KB that a core decodes and crops in a second (`benchmarks.data`, on a busy machine)
BUCKET = 500_000_000  # numbers in DeepSpeed's reduce_bucket_size, unless its configuration sets another
FREE_SHARE = 0.9  # of a device's memory; the rest goes to the CUDA context, fragmentation and buffers


class Hardware(NamedTuple):
    """One device: FLOP/s without sparsity by precision, bytes, and what renting it for an hour may cost."""

    bf16: float
    fp32: float
    memory: float
    dollars: float  # assumed


HARDWARE = {
    "a100-40gb": Hardware(312e12, 19.5e12, 40e9, 1.5),
    "a100-80gb": Hardware(312e12, 19.5e12, 80e9, 2.0),
    "h100-80gb": Hardware(989e12, 67e12, 80e9, 3.0),
    "h200-141gb": Hardware(989e12, 67e12, 141e9, 4.0),
    "l40s-48gb": Hardware(362e12, 91.6e12, 48e9, 1.0),
    "rtx4090-24gb": Hardware(165e12, 82.6e12, 24e9, 0.5),
}


class Counted(NamedTuple):
    """What one sample costs in one training step."""

    flops: float  # forward, backward and what is recomputed for it
    forward_flops: float
    activation_bytes: float  # kept for the backward pass


class Estimate(NamedTuple):
    """A run on `devices` devices; bytes are per device, hours are wall-clock."""

    flops: float  # of the whole run
    hours: float
    device_days: float
    dollars: float
    weights: float
    gradients: float
    optimizer: float
    buckets: float  # that DeepSpeed gathers gradients in; on a CPU what is never written takes no memory
    activations: float

    @property
    def memory(self) -> float:
        """Bytes per device, all together."""
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations


def parse_hardware(text: str) -> tuple[str, Hardware, int]:
    """("a100-80gb", its numbers, 4) of "a100-80gb:4"; one device without a number."""
    name, _, count = text.partition(":")
    if name not in HARDWARE or not re.fullmatch(r"[1-9]\d*|", count):
        raise InputError(f"hardware {text!r} is unknown: use NAME or NAME:DEVICES with one of {', '.join(HARDWARE)}")
    return name, HARDWARE[name], int(count or 1)


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts its GPU brothers only
FORMULAS: dict[Any, Callable[..., int]] = {
    ATTENTION: lambda q, k, v, *rest, **named: flop_counter.sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **named: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
    ),
}
COUNTED = {*flop_counter.flop_registry, *FORMULAS}


class ShapesOnly(TorchDispatchMode):
    """Gives operations whose arithmetic is counted a result of the right shape, without carrying them out."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), named: dict | None = None) -> Any:
        if function.overloadpacket not in COUNTED:
            return function(*args, **named or {})
        args, named = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, named or {}))
        return tree_map_only(
            Tensor,
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"),
            function(*args, **named or {}),
        )


def count(loss_of: Callable[[int], Tensor], model: nn.Module, bf16: bool) -> Counted:
    """Run `loss_of(n)`, the loss of n samples, forward and backward for n = 1 and 2, and take the difference.

    The difference leaves out what does not grow with the batch, e.g. the bf16 copies of the weights. The operations
    whose arithmetic is counted are not carried out: their results get the right shape, and no number in it is used. In
    bf16 they would take many minutes on a processor that has no instructions for it.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    counts = []
    for samples in (1, 2):
        saved: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

        def save(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            ShapesOnly(),
            flop_counter.FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter,
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(samples)
            forward, size = counter.get_total_flops(), sum(t.untyped_storage().nbytes() for t in saved.values())
            loss.backward()
        counts.append((counter.get_total_flops(), forward, size))
        model.zero_grad(set_to_none=True)
    (total1, forward1, size1), (total2, forward2, size2) = counts
    return Counted(total2 - total1, forward2 - forward1, size2 - size1)


def count_pair(model: DualEncoder, bf16: bool) -> tuple[dict[str, int], Counted]:
    """Parameters by part, and the cost of one image-text pair whose caption fills the context."""
    config = model.model_config["model_cfg"]
    for module in model.modules():
        if isinstance(module, Differential):
            module.attn_implementation = "padded"  # on a CPU what keeps no maps, as on a GPU
    size, context = config["vision_cfg"]["image_size"], config["text_cfg"].get("context_length", 77)

    def loss_of(samples: int) -> Tensor:
        text = torch.ones(samples, context, dtype=torch.long)
        text[:, -1] = config["text_cfg"]["vocab_size"] - 1
        outputs = model(torch.zeros(samples, 3, size, size), text, chunk=0)
        return torch.stack([output.float().sum() for output in outputs]).sum()

    vision = sum(p.numel() for p in model.visual.parameters())
    parts = {"vision tower": vision, "text tower": sum(p.numel() for p in model.parameters()) - vision}
    return parts, count(loss_of, model, bf16)


def count_conversation(
    llava_config: DiffCLIPLlavaConfig, learns: set[str], text_tokens: int, lora_rank: int, bf16: bool
) -> tuple[dict[str, int], int, Counted]:
    """Parameters by part, how many of them learn, and the cost of a conversation about one image.

    The model is built from its configuration with random weights: nothing is loaded, and no weight decides a size.

    Args:
        text_tokens: of a conversation; an eighth of them are supervised.
    """
    model = DiffCLIPLlavaForConditionalGeneration(llava_config)
    if hasattr(model.model.vision_tower.config, "stop_early"):
        model.model.vision_tower.config.stop_early = True
    parts = freeze(model, learns - {"language_model"} if lora_rank else learns)
    if lora_rank:
        add_lora(model, lora_rank)
    model.train()
    size, features = llava_config.vision_config.image_size, llava_config.image_seq_length

    def loss_of(samples: int) -> Tensor:
        ids = torch.ones(samples, features + text_tokens, dtype=torch.long)
        ids[:, :features] = llava_config.image_token_index
        labels = ids.clone()
        labels[:, : features + text_tokens - max(1, text_tokens // 8)] = -100
        return model(input_ids=ids, pixel_values=torch.zeros(samples, 3, size, size), labels=labels).loss * samples

    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return parts, learning, count(loss_of, model, bf16)


def estimate(
    counted: Counted,
    parameters: int,
    *,
    frozen: int = 0,
    samples: int,
    batch: int,
    chunked: bool,
    bf16: bool,
    zero_stage: int,
    hardware: Hardware,
    devices: int,
    utilisation: float = UTILISATION[OTHER][0],
) -> Estimate:
    """Multiply out.

    Args:
        parameters: that learn; AdamW keeps two numbers for each.
        frozen: parameters that do not.
        samples: seen in the whole run.
        batch: samples that a device holds activations of at once.
        chunked: whether gradient caching computes every forward pass twice.
        utilisation: share of the devices' peak that the run reaches.
        zero_stage: 0 to 3; from 1 on the optimiser's state is shared out, from 2 the gradients, from 3 the weights.
    """
    flops = samples * (counted.flops + (counted.forward_flops if chunked else 0))
    seconds = flops / (devices * utilisation * (hardware.bf16 if bf16 else hardware.fp32))
    share = [devices if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    everything = parameters + frozen
    if zero_stage:  # DeepSpeed: weights in the run's precision, and beside them float32 copies of those that learn
        size = 2 if bf16 else 4
        weights = everything * size / share[2]
        gradients = parameters * (size / share[1] + 4 / share[0])  # as they come, and summed up in float32
        optimizer = parameters * 12 / share[0]  # the copy and AdamW's two numbers
        buckets = BUCKET * size * (1 if zero_stage == 3 else 2)  # whatever learns; a second one for overlap_comm
    else:
        weights = everything * (4 + (2 if bf16 else 0))  # autocast keeps copies
        gradients, optimizer, buckets = parameters * 4, parameters * 8, 0
    return Estimate(
        flops=flops,
        hours=seconds / 3600,
        device_days=devices * seconds / 86400,
        dollars=devices * seconds / 3600 * hardware.dollars,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=buckets,
        activations=batch * counted.activation_bytes,
    )
