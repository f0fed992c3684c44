"""Which form of an attention is fastest on this machine: each is timed once for a device, dtype and shape, forward and
backward, and the times are kept on disk (`diffclip.base.cache`). Nobody's table of guesses decides.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from diffclip.base.cache import cache_dir, keep, kept_json

Mix = Callable[[str, Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]
LOG = logging.getLogger(__name__)
ROUNDS, SECONDS = 5, 1.0  # most rounds in which all forms take turns, and when no further one is begun
MOST_ENTRIES = {"cpu": 2**20, "cuda": 2**28}  # of the maps that are timed; larger batches are timed by a part of them
WITHIN = 1.03  # of the fastest: whichever comes first of the forms so close to it is taken, so that noise decides less

_known: dict[tuple, str] = {}  # of this process


def fastest(
    kind: str,
    forms: Sequence[str],
    mix: Mix,
    inputs: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
) -> str:
    """Return the form that computes `mix(form, q, k, v, attn_mask, is_causal)` and its gradients in the least time.

    Args:
        kind: whose forms they are.
        forms: those that there are here; of equally fast ones the first is taken.
        inputs: q, k, v as they come, (batch, heads, tokens, width): the timed ones are made up, but lie in memory and
            are cut to a batch alike.
    """
    if len(forms) == 1:
        return forms[0]
    q, _, v = inputs
    shape = (rows(q), q.shape[1], -(-q.shape[2] // 16) * 16, q.shape[3], v.shape[-1])  # captions differ in length
    key = (kind, tuple(forms), q.device, q.dtype, *shape, _mask_kind(attn_mask), is_causal)
    if key not in _known:
        facts = [torch.__version__, machine(q.device), *map(str, key)]
        times = _recalled(facts, forms)
        if times is None:
            with _alone(_path(facts)):
                times = _recalled(facts, forms)  # another rank's, in the meantime: all of them are to take one form
                if times is None:
                    times = measure(forms, mix, inputs, attn_mask, is_causal)
                    finite = {form: spent if math.isfinite(spent) else None for form, spent in times.items()}
                    keep(_path(facts), json.dumps({"facts": facts, "milliseconds": finite}).encode())
        least = min(times.values())  # infinite where none could be timed: then it is the plainest, which comes last
        _known[key] = next(form for form in forms if times[form] <= WITHIN * least) if least < math.inf else forms[-1]
        shown = ", ".join(f"{form} {spent:.3g} ms" for form, spent in times.items() if math.isfinite(spent))
        LOG.info(
            f"attention {kind}: {rows(q)} x {q.shape[1]} heads of {q.shape[-1]}, {q.shape[-2]} tokens, "
            f"{str(q.dtype).removeprefix('torch.')}, on {machine(q.device)}: {shown}; takes {_known[key]}"
        )
    return _known[key]


def measure(
    forms: Sequence[str],
    mix: Mix,
    inputs: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    is_causal: bool,
) -> dict[str, float]:
    """Return each form's least milliseconds, forward and backward; infinity for one that the device cannot run.

    Forms take turns, so that a busy neighbour slows all of them. No random numbers are drawn.
    """
    count = rows(inputs[0])
    times: dict[str, float] = dict.fromkeys(forms, math.inf)
    if attn_mask is not None:
        attn_mask = attn_mask[:count] if attn_mask.ndim == 4 and attn_mask.shape[0] > 1 else attn_mask
    device = inputs[0].device
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),  # a checkpoint around us counts nothing
    ):
        attn_mask = None if attn_mask is None else attn_mask.detach().clone()
        q, k, v = made = [_made(x, count) for x in inputs]
        end = 0.0
        for turn in range(ROUNDS + 1):
            for form in [form for form in forms if not turn or math.isfinite(times[form])]:
                try:
                    _wait(device)
                    start = time.perf_counter()
                    torch.autograd.grad(mix(form, q, k, v, attn_mask, is_causal).sum(), made)
                    _wait(device)
                except (RuntimeError, ValueError) as error:  # too little memory, registers, or no such kernel
                    LOG.info(f"attention form {form} is left out: {(str(error) or type(error).__name__)[:200]}")
                    times[form] = math.inf
                    continue
                spent = 1000 * (time.perf_counter() - start)
                times[form] = spent if turn < 2 else min(times[form], spent)  # the first turn warms up
            end = end or time.perf_counter() + SECONDS
            if turn and time.perf_counter() > end:
                break
    return times


def rows(q: Tensor) -> int:
    """How many of the batch are timed: a power of two, up to the batch."""
    _, heads, tokens, _ = q.shape
    most = max(1, MOST_ENTRIES.get(q.device.type, 2**20) // (heads * tokens * tokens))
    return 1 << min(len(q), most).bit_length() - 1


def _made(x: Tensor, count: int) -> Tensor:
    """Like x, but a batch of `count`: numbers in [-1, 1], in memory as (batch, tokens, heads, width)."""
    _, heads, tokens, width = x.shape
    numbers = torch.arange(count * tokens * heads * width, device=x.device, dtype=torch.float32).sin().to(x.dtype)
    return numbers.view(count, tokens, heads, width).transpose(1, 2).requires_grad_()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mask_kind(attn_mask: Tensor | None) -> str:
    if attn_mask is None:
        return "no mask"
    return f"{attn_mask.dtype} mask, {'one' if attn_mask.shape[:-2].numel() == 1 else 'many'}"


@lru_cache
def machine(device: torch.device) -> str:
    """The name of what computes: the GPU's, or the processor's with its instructions and our threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names: Any = ()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        pass
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else 'CPU'} ({capability}, {threads} thread{'s' if threads > 1 else ''})"


def _path(facts: list[str]) -> Path:
    return cache_dir() / "attention" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.json"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; where no lock can be written, nothing can be kept either."""
    folder = cache_dir() / "locks"
    lock = FileLock(folder / f"{path.name}.lock")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _recalled(facts: list[str], forms: Sequence[str]) -> dict[str, float] | None:
    """The times that an earlier process kept, if they are there and whole."""
    if (found := kept_json(_path(facts))) is None:
        return None
    times = {form: math.inf if (spent := found["milliseconds"][form]) is None else spent for form in forms}
    return times if any(map(math.isfinite, times.values())) else None
