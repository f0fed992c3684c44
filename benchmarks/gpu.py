"""What only a GPU can show, in one table: forms of attention, cuDNN's NaN, waits, step times, memory, compiling.

    python -m benchmarks.gpu --out gpu.json     # on a GPU: B/16, bf16, batch 256
    python -m benchmarks.gpu --tiny             # the same code on a CPU: does every part run?

Every part runs by itself: one that fails is a row with its error, and the exit code is 1. On a CPU the table says so,
and its numbers say nothing about a GPU.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention import Ordinary, peak_megabytes
from benchmarks.train_step import loss_of, make
from diffclip.attention import DifferentialAttention, DifferentialAttentionV2, fastest
from diffclip.attention.base import without_recomputation
from diffclip.attention.kernel import takes
from diffclip.base.commands import Parser
from diffclip.base.devices import pick_device
from diffclip.base.errors import exit_on_input_error, first_line
from diffclip.base.files import write_json
from diffclip.variants import MODELS

BACKENDS = {-1: "error", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}
NAN_LENGTHS = (192, 200, 256, 320)  # 64 modulo 128 are the first and the last
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest number, between forms
ARMS = (  # a model, whether its attention is recomputed, whether it is compiled
    ("CLIP", True, False),
    ("DiffCLIP", True, False),
    ("DiffCLIP", False, False),
    ("DiffCLIP-V2", True, False),
    ("CLIP", True, True),
    ("DiffCLIP", False, True),
    ("DiffCLIP-V2", False, True),
)


class Row(NamedTuple):
    part: str
    what: str
    value: float | str
    unit: str = ""
    note: str = ""


class Setting(NamedTuple):
    """Where and at what size to measure."""

    device: str
    size: str
    batch: int
    dtype: torch.dtype
    seconds: float  # of each figure
    shapes: dict[str, tuple[int, int, int, bool]]  # tokens, width, heads, causal


FULL = {
    "B/16 vision": (197, 768, 12, False),
    "B/16 text": (77, 512, 8, True),
    "L/14 at 336": (577, 1024, 16, False),
}
TINY = {"vision": (37, 64, 4, False), "text": (16, 64, 4, True)}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], setting: Setting) -> float:
    """Median seconds of `step`, after two calls that warm up."""
    for _ in range(2):
        step()
    times: list[float] = []
    wait(setting.device)
    end = time.perf_counter() + setting.seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        start = time.perf_counter()
        step()
        wait(setting.device)
        times.append(time.perf_counter() - start)
    return median(times)


def forms(setting: Setting) -> list[Row]:
    """Each form of each kind: its distance from the maps written out, time, peak; and what `auto` takes."""
    rows = []
    for shape, (tokens, width, heads, causal) in setting.shapes.items():
        x = torch.randn(setting.batch, tokens, width, device=setting.device, dtype=setting.dtype, requires_grad=True)

        def step(module: nn.Module, x: Tensor = x, causal: bool = causal) -> list[Tensor]:
            out = module(x, is_causal=causal)
            inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
            return [out.detach(), *torch.autograd.grad(out.float().square().mean(), inputs)]

        plain = Ordinary(width, heads, qkv_bias=True).to(setting.device, setting.dtype)
        usual = seconds_of(partial(step, plain), setting)
        rows.append(Row("forms", f"{shape}: CLIP", 1e3 * usual, "ms"))
        for kind in (DifferentialAttention, DifferentialAttentionV2):
            torch.manual_seed(0)
            module: Any = kind(width, heads).to(setting.device, setting.dtype)
            module.attn_implementation = "eager"
            wanted = step(module)
            for form in kind.forms:
                label = f"{shape}: {kind.name} {form}"
                q, _, v = module.project(x)
                if form == "triton" and not takes(q, v, None, 0.0):
                    rows.append(Row("forms", label, "no Triton here"))
                    continue
                module.attn_implementation = form
                try:
                    apart = max(distance(a, b) for a, b in zip(step(module), wanted))
                    spent, peak = seconds_of(partial(step, module), setting), 0.0
                    peak = peak_megabytes(partial(step, module), setting.device)
                except RuntimeError as error:  # which is a finding
                    rows.append(Row("forms", label, "FAILS", note=first_line(error)))
                    continue
                note = f"{spent / usual:.2f} of CLIP, peak {peak:,.0f} MB, {apart:.1e} from eager"
                close = apart <= TOLERANCE[setting.dtype]
                rows.append(Row("forms", label, 1e3 * spent if close else "FAILS", "ms", note))
            module.attn_implementation = "auto"
            module(x, is_causal=causal)
            rows.append(Row("forms", f"{shape}: {kind.name} auto takes", module.seen_form))
    return rows


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number; of gradients that are rounding alone, of one."""
    largest = wanted.float().abs().max().clamp(min=1e-3)
    return float((found.float() - wanted.float()).abs().max() / largest)


def masked_backward(setting: Setting) -> list[Row]:
    """Gradients of masked attention where all scores are far below zero, with cuDNN's attention off and on."""
    rows = []
    for cudnn in (False, True):
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            for tokens in NAN_LENGTHS:
                torch.manual_seed(0)
                q, k, v = (
                    0.1 * torch.randn(2, 4, tokens, 64, device=setting.device, dtype=setting.dtype) for _ in range(3)
                )
                q[..., 0], k[..., 0] = 8.0, -120.0  # scores near -120 after division by 8
                leaves = [one.requires_grad_() for one in (q, k, v)]
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=setting.device).tril()

                def step(leaves: list[Tensor] = leaves, mask: Tensor = mask) -> tuple[Tensor, ...]:
                    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
                    return torch.autograd.grad(out.float().square().sum(), leaves)

                bad = sum(int((~grad.isfinite()).sum()) for grad in step())
                backend = BACKENDS[torch._fused_sdp_choice(q, k, v, mask, 0.0, False)]
                value = "finite" if not bad else "NaN" if cudnn else "FAILS"  # with cuDNN it is known
                note = f"{bad} gradients not finite, {backend}, {1e3 * seconds_of(step, setting):.2f} ms"
                rows.append(Row("cudnn", f"{'on' if cudnn else 'off'}, {tokens} tokens, masked", value, note=note))
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
    return rows


def steps(setting: Setting) -> list[Row]:
    """A contrastive training step of each model, eager and compiled, with and without recomputing attention."""
    rows: list[Row] = []
    usual = 0.0
    for name, recompute, compiled in ARMS:
        label = f"{name}-{setting.size}{'' if recompute else ', kept'}{', compiled' if compiled else ''}"
        try:
            step = training_step(name, compiled, setting)
            with without_recomputation() if not recompute else warnings.catch_warnings():
                start = time.perf_counter()
                step()
                wait(setting.device)
                first = time.perf_counter() - start
                spent, peak = seconds_of(step, setting), peak_megabytes(step, setting.device)
        except Exception as error:  # the next arm may still tell something
            rows.append(Row("step", label, "FAILS", note=first_line(error)))
            continue
        usual = usual or spent
        note = f"{spent / usual:.2f} of CLIP's, peak {peak:,.0f} MB, first step {first:.1f} s"
        rows.append(Row("step", label, setting.batch / spent, "pairs/s", note))
    return rows


def training_step(name: str, compiled: bool, setting: Setting) -> Callable[[], None]:
    """A whole optimiser step on one batch that stays on the device."""
    model: Any = make(f"{name}-{setting.size}", "auto", setting.device).train()
    config = MODELS[f"{name}-{setting.size}"]["model_cfg"]
    pixels, context = config["vision_cfg"]["image_size"], config["text_cfg"].get("context_length", 77)
    images = torch.randn(setting.batch, 3, pixels, pixels, device=setting.device)
    texts = torch.randint(1, config["text_cfg"]["vocab_size"] - 3, (setting.batch, context), device=setting.device)
    texts[:, -1] = config["text_cfg"]["vocab_size"] - 1
    optimizer = torch.optim.AdamW(model.parameters(), fused=setting.device == "cuda")
    if compiled:
        with torch.no_grad(), torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
            model(images, texts)  # a graph cannot choose forms of attention
        # on a CPU only whether it is one graph: inductor would compile for minutes
        model = torch.compile(model, fullgraph=True, backend="inductor" if setting.device == "cuda" else "aot_eager")

    def step() -> None:
        loss_of(model, images, texts, setting.dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def waits(setting: Setting) -> list[Row]:
    """Which lines make the processor wait for the device in a training step: there should be none."""
    if setting.device != "cuda":
        return [Row("waits", "sync debug mode", "needs CUDA")]
    step = training_step("DiffCLIP", False, setting)
    for _ in range(2):
        step()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [f"{Path(one.filename).name}:{one.lineno}" for one in seen if "synchroniz" in str(one.message)]
    return [Row("waits", "in a training step", float(len(found)), "waits", ", ".join(sorted(set(found))))]


PARTS: dict[str, Callable[[Setting], list[Row]]] = {
    "forms": forms,
    "cudnn": masked_backward,
    "step": steps,
    "waits": waits,
}


def setting_of(tiny: bool, batch: int) -> Setting:
    device = pick_device().type
    if tiny or device == "cpu":
        return Setting(device, "tiny", batch or 4, torch.float32, 0.05, TINY)
    return Setting(device, "B-16", batch or 256, torch.bfloat16, 1.0, FULL)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes in float32; so it is on a CPU anyhow")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the table as JSON")
    options = parser.parse_args(argv)
    setting = setting_of(options.tiny, options.batch)
    machine = fastest.machine(torch.device(setting.device))
    rows = [Row("machine", machine, torch.__version__, note=f"cuDNN {torch.backends.cudnn.version()}, {setting.dtype}")]
    if setting.device == "cpu":
        print("This ran on a CPU: it shows that every part runs, and nothing about a GPU.")
    for part in options.only:
        try:
            rows += PARTS[part](setting)
        except Exception as error:  # the next part may still tell something
            rows.append(Row(part, "the part", "FAILS", note=first_line(error)))
    for row in rows:
        shown = f"{row.value:,.4g}" if isinstance(row.value, float) else row.value
        print(f"{row.part:8} {row.what:40} {shown:>14} {row.unit:8} {row.note}")
    if options.out:
        write_json(options.out, {"device": setting.device, "machine": machine, "rows": [row._asdict() for row in rows]})
    return int(any(row.value == "FAILS" for row in rows))


if __name__ == "__main__":
    with exit_on_input_error():
        raise SystemExit(main())
