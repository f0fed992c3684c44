"""Time and peak memory of a contrastive training step at B/16, side by side in one run.

    python -m benchmarks.train_step                        # tiny batch on the CPU, or a GPU where there is one
    python -m benchmarks.train_step --batch 256 --steps 20 --dtype bfloat16

Candidates take turns. Peak memory is the most that tensors take at any moment of a step (activations, gradients and
what comes and goes), without the weights and the optimiser's state. Wanted: a DiffCLIP step within 1.10 of CLIP's
in both.
"""

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from benchmarks.attention import peak_megabytes
from benchmarks.rows import Row
from diffclip import models
from diffclip.base.backbones import ClipLoss
from diffclip.base.commands import Parser
from diffclip.base.devices import pick_device
from diffclip.base.errors import exit_on_input_error


def make(name: str, form: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.build(name).to(device)
    for module in model.modules():
        if hasattr(module, "attn_implementation"):
            module.attn_implementation = form
    return model


def loss_of(model: nn.Module, images: torch.Tensor, texts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        image, text, scale = model(images, texts)[:3]
    return ClipLoss()(image.float(), text.float(), scale)


def measure(
    size: str, batch: int, steps: int, dtype: torch.dtype, named: Sequence[tuple[str, str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step and its peak of memory in MB, by "model, form" of `named`."""
    device = pick_device().type
    images = torch.randn(batch, 3, 224, 224, device=device)
    texts = torch.randint(1, 49405, (batch, 77), device=device)
    texts[:, -1] = 49407  # no caption ends early: the longest text there can be
    arms = {f"{n}, {f}": make(f"{n}-{size}", f, device) for n, f in named}
    times: dict[str, list[float]] = {name: [] for name in arms}
    optimizers = {k: torch.optim.AdamW(m.parameters()) for k, m in arms.items()}

    def step(name: str) -> None:
        loss_of(arms[name], images, texts, dtype).backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    for turn in range(steps + 1):
        for name in arms:
            start = time.perf_counter()
            step(name)
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    peaks = {name: peak_megabytes(partial(step, name), device) for name in arms}
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}, peaks


def rows() -> list[Row]:
    """A step at S/16, by the batch."""
    found = []
    for batch in (2, 4):
        measured = measure("S-16", batch, 3, torch.float32, [(n, "auto") for n in ("CLIP", "DiffCLIP", "DiffCLIP-V2")])
        for name in ("DiffCLIP", "DiffCLIP-V2"):
            for of, unit in zip(measured, ("s", "MB")):
                work = f"training step {name}-S-16, batch {batch}"
                found.append(Row(work, "CLIP's", of["CLIP, auto"], of[f"{name}, auto"], unit))
    return found


def main() -> None:
    parser = Parser("python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--size", default="B-16", help="S-16, B-32, B-16 or L-14")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each candidate")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    device = pick_device().type
    dtype = getattr(torch, args.dtype)
    named = [
        ("CLIP", "auto"),
        ("DiffCLIP", "eager"),
        ("DiffCLIP", "fused"),
        ("DiffCLIP", "auto"),
        ("DiffCLIP-V2", "auto"),
    ]
    print(f"{args.size}, {device}, {torch.get_num_threads()} threads, batch {args.batch}, {args.dtype}")
    medians, peaks = measure(args.size, args.batch, args.steps, dtype, named)
    for name in medians:
        print(
            f"  {name:16} {1000 * medians[name]:9.0f} ms {medians[name] / medians['CLIP, auto']:5.2f}x   "
            f"{peaks[name]:8.0f} MB {peaks[name] / peaks['CLIP, auto']:5.2f}x"
        )


if __name__ == "__main__":
    with exit_on_input_error():
        main()
