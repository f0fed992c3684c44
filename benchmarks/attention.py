"""Time and peak memory of attention modules, side by side in one run: CLIP's, DiffCLIP's and V2's in every form.

    python -m benchmarks.attention                 # on the CPU, or on the GPU where there is one
    python -m benchmarks.attention --batch 64 --seconds 5
    python -m benchmarks.attention --tokens 50 197 577 --batch 4     # other lengths, of B/16's vision tower

B/16 shapes: 197 image tokens of width 768 in 12 heads, 77 text tokens of width 512 in 8 heads, causal. Ratios are to
ordinary attention in the same dtype; rounds of all candidates take turns, so that a busy machine slows them alike.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import Row
from diffclip.attention import DifferentialAttention, DifferentialAttentionV2
from diffclip.base.backbones import TimmAttention
from diffclip.base.commands import Parser
from diffclip.base.devices import pick_device
from diffclip.base.errors import exit_on_input_error

SHAPES = {"vision": (197, 768, 12, False), "text": (77, 512, 8, True)}


class Ordinary(TimmAttention):
    """timm's attention, called like ours."""

    def forward(self, x: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.proj(x.transpose(1, 2).flatten(2))


def candidates(width: int, heads: int, device: str) -> dict[str, nn.Module]:
    """CLIP's attention, then each kind in each form that runs here."""
    found: dict[str, nn.Module] = {"CLIP, fused": Ordinary(width, heads, qkv_bias=True)}
    for name, kind in {"DiffCLIP": DifferentialAttention, "V2": DifferentialAttentionV2}.items():
        for form in kind.forms:
            if form != "triton" or device == "cuda":
                found[f"{name}, {form}"] = kind(width, heads, attn_implementation=form)
    return found


def once(module: nn.Module, x: torch.Tensor, causal: bool, train: bool) -> float:
    """Seconds of one forward pass, or of one forward and backward pass."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        out = module(x, is_causal=causal)
        if train:
            out.float().square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_megabytes(step: Callable[[], object], device: str) -> float:
    """Most megabytes that tensors took at any moment of `step`, above what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # negative where memory was freed
    return max(accumulate(sizes)) / 2**20


def medians_of(modules: dict[str, nn.Module], x: torch.Tensor, causal: bool, seconds: float) -> dict[tuple, float]:
    """Seconds by (module, whether with backward): the median of rounds in which they take turns, three at least."""
    times: dict[tuple[str, bool], list[float]] = {(k, t): [] for k in modules for t in (False, True)}
    for name, train in times:
        once(modules[name], x, causal, train)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, train in times:
            times[name, train].append(once(modules[name], x, causal, train))
    return {key: sorted(values)[len(values) // 2] for key, values in times.items()}


def rows() -> list[Row]:
    """A step of each kind in the form that is fastest, by tokens and by batch."""
    found, device = [], pick_device().type
    for tokens, batch in ((50, 2), (197, 2), (197, 8), (577, 2)):
        modules = {k: m.to(device) for k, m in candidates(768, 12, device).items()}
        x = torch.randn(batch, tokens, 768, device=device, requires_grad=True)
        medians = medians_of(modules, x, False, 4)
        for kind in ("DiffCLIP", "V2"):
            best = min((n for n in modules if n.startswith(kind)), key=lambda name: medians[name, True])
            work = f"attention {best}, {batch} x {tokens} tokens"
            found.append(Row(work, "CLIP's", medians["CLIP, fused", True], medians[best, True], "s"))
            peaks = [peak_megabytes(partial(once, modules[n], x, False, True), device) for n in ("CLIP, fused", best)]
            found.append(Row(work, "CLIP's", *peaks, "MB"))
    return found


def main() -> None:
    parser = Parser("python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring for each table")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="lengths, in place of B/16's shapes")
    device = pick_device().type
    args = parser.parse_args()
    print(f"{device}, {torch.get_num_threads()} threads, batch {args.batch}; median of rounds, ratio to CLIP")
    shapes = {"vision" if n == 197 else f"{n} tokens": (n, 768, 12, False) for n in args.tokens} or SHAPES
    for tower, (tokens, width, heads, causal) in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            modules = {k: m.to(device, dtype) for k, m in candidates(width, heads, device).items()}
            x = torch.randn(args.batch, tokens, width, device=device, dtype=dtype, requires_grad=True)
            medians = medians_of(modules, x, causal, args.seconds)
            print(f"\n{tower}, {tokens} tokens, {str(dtype).removeprefix('torch.')}")
            memory = {
                name: peak_megabytes(partial(once, module, x, causal, True), device) for name, module in modules.items()
            }
            for name, module in modules.items():
                with FlopCounterMode(display=False) as counter:
                    module(x, is_causal=causal)
                cells = [
                    f"{1000 * medians[name, t]:8.1f} ms {medians[name, t] / medians['CLIP, fused', t]:5.2f}x"
                    for t in (False, True)
                ]
                print(
                    f"  {name:16} forward {cells[0]}   with backward {cells[1]}   peak {memory[name]:6.1f} MB "
                    f"{memory[name] / memory['CLIP, fused']:5.2f}x   {counter.get_total_flops() / 1e9:6.1f} GFLOP"
                )


if __name__ == "__main__":
    with exit_on_input_error():
        main()
