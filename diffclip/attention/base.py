"""What every kind of differential attention offers to models, checkpoints and maps, and what all compute with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffclip.attention.fastest import fastest
from diffclip.attention.kernel import takes
from diffclip.base.errors import InputError
from diffclip.base.graphs import recording, transformed, watched

FORMS = ("auto", "eager", "fused", "padded", "triton")
KEEP_BELOW = 64  # tokens
RECOMPUTE = True  # whether longer sequences are computed once more in the backward pass; see `without_recomputation`

# A1 and A2 (batch, maps, tokens, tokens), and lambda, which broadcasts to them; no A2 and lambda where there is one map
Maps = tuple[Tensor, Tensor | None, Tensor | None]
Inputs = tuple[Tensor, Tensor, Tensor]  # queries, keys and values


class Differential(nn.Module):
    """Self-attention by a difference of softmax maps; each kind is a subclass, and an entry of `KINDS`.

    A kind has `q_proj`, `k_proj`, `v_proj` and `out_proj`. `q_norm`, `k_norm`, `inner_norm` and `gate` do nothing until
    a tower that norms queries and keys, or norms or gates what goes into the output projection, puts its own there.
    A kind's own parameters are drawn by `reset_lambdas`, after all others. The methods that raise NotImplementedError
    are the kind's to write.

    Args:
        dim: width of the tokens.
        num_heads: heads of the ordinary attention in whose place it stands; a divisor of dim.
        lambda_init: what lambda starts from; a constant that is not part of the state dict.
        attn_drop: dropout on the entries of each map, before the difference.
        attn_implementation: "eager" writes the maps out, "fused" leaves them inside `scaled_dot_product_attention`,
            "padded" too, with queries and keys as wide as values, as the flash kernels want it; "triton" is one kernel
            of our own, and "fused" where that cannot run (see `kernel.takes`); "auto" is the fastest of these as
            measured on this machine (`fastest`).

    Raises:
        InputError: for an unknown implementation.
    """

    name: ClassVar[str]  # its key in `KINDS`
    default_lambda_init: ClassVar[float | str]  # or "schedule", by depth
    value_heads: ClassVar[int] = 1  # how many heads wide a value is
    in_official_layout: ClassVar[bool] = False  # whether the official code's checkpoints can hold its weights
    forms: ClassVar[tuple[str, ...]] = ("fused", "eager")  # that differ in it, the one that needs least memory first

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    gate: nn.Module | None

    def __init__(
        self, dim: int, num_heads: int, lambda_init: float, attn_drop: float, attn_implementation: str
    ) -> None:
        super().__init__()
        if attn_implementation not in FORMS:
            raise InputError(f"attn_implementation must be one of {', '.join(FORMS)}: got {attn_implementation!r}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.lambda_init = lambda_init
        self.attn_drop = attn_drop
        self.attn_implementation = attn_implementation
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.inner_norm: nn.Module = nn.Identity()
        self.gate = None
        self.seen_form = "fused"  # what "auto" was last: graphs that are recorded take it

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within x.

        Args:
            x: (batch, tokens, dim).
            attn_mask: broadcastable to (batch, num_heads, tokens, tokens); boolean (True = attend) or additive.
            is_causal: each token attends to itself and earlier ones. Not together with attn_mask.

        Returns:
            (batch, tokens, dim).
        """
        raise NotImplementedError

    def maps(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Maps:
        """Return (A1, A2, lambda) for x (batch, tokens, dim), or (A, None, None) in a kind with one map."""
        raise NotImplementedError

    def apply_map(self, x: Tensor, map_: Tensor) -> Tensor:
        """Return the output (batch, tokens, dim) for x with `map_` in the place of A1 - lambda A2, or of A."""
        raise NotImplementedError

    def start_from(self, qkv: Tensor, bias: Tensor | None, out: nn.Linear, preserve: bool) -> None:
        """Take over the weights of ordinary attention with the same number of heads.

        Args:
            qkv, bias: its (3 dim, dim) weight and (3 dim) bias of queries, keys and values.
            out: its output projection.
            preserve: keep its function too, in kinds that can.
        """
        raise NotImplementedError

    def take_projections(self, qkv: Tensor, bias: Tensor | None, out: nn.Linear) -> None:
        """`start_from` for kinds whose projections have the shapes of ordinary attention's."""
        for i, projection in enumerate((self.q_proj, self.k_proj, self.v_proj)):
            projection.weight.copy_(qkv.chunk(3)[i])
            if bias is not None:
                projection.bias.copy_(bias.chunk(3)[i])
        self.out_proj.load_state_dict(out.state_dict())

    def reset_lambdas(self) -> None:
        """Let lambda start from lambda_init, or close to it."""
        raise NotImplementedError

    def added(self) -> dict[str, Tensor | None]:
        """The parameters that ordinary attention has not, by name; of one that only in part is new, which of its rows:
        a boolean (rows) tensor.
        """
        raise NotImplementedError

    def mean_lambda(self) -> float:
        """Lambda as a number, for logs."""
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the heads' queries and keys of width d, and values, each (batch, heads, tokens, width)."""
        q, k = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (-1, self.value_heads * self.head_dim)).transpose(1, 2)
        return self.q_norm(q), self.k_norm(k), v

    def project_out(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Return the output (batch, tokens, dim) for the heads' mixed values side by side, of the same shape."""
        mixed = self.inner_norm(mixed)
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        return self.out_proj(mixed)

    def form_for(self, inputs: Inputs, attn_mask: Tensor | None, is_causal: bool, dropout: float) -> str:
        """Return which of `forms` is to compute with these queries, keys and values.

        What "auto" stands for is measured where it can be: not while a graph is recorded or a function transformed.
        """
        q, _, v = inputs
        form = self.attn_implementation
        if form == "auto" and (torch.jit.is_tracing() or torch.compiler.is_exporting() or transformed()):
            return "eager"  # operations that every format of graphs knows
        runs = takes(q, v, attn_mask, dropout) and not transformed()
        if form == "auto":
            if recording() or watched(q) or q.device.type not in ("cpu", "cuda") or not q.numel():
                form = self.seen_form
            else:
                here = [each for each in self.forms if each != "triton" or (runs and q.is_cuda)]
                form = self.seen_form = fastest(self.name, here, self.timed, inputs, attn_mask, is_causal)
        return form if form in self.forms and (form != "triton" or runs) else "fused"

    def settle(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device, is_causal: bool) -> None:
        """Find out what "auto" stands for with x (batch, tokens, dim): before a graph is recorded, which cannot."""
        widths = (self.head_dim, self.head_dim, self.value_heads * self.head_dim)
        inputs = (
            torch.empty(batch, tokens, projection.out_features, dtype=dtype, device=device)
            .unflatten(-1, (-1, width))
            .transpose(1, 2)
            for projection, width in zip((self.q_proj, self.k_proj, self.v_proj), widths)
        )
        self.form_for((*inputs,), None, is_causal, self.attn_drop)

    @staticmethod
    def timed(form: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """What the kind does between its projections, in one form, with parameters made up: to be timed."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, lambda_init={self.lambda_init:.4g}, form={self.attn_implementation}"


def as_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype of autocast where that is on: once, and not in each projection of x again."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def recomputed(mix: Callable[..., Tensor], q: Tensor, *args: Any, dropout: float, form: str) -> Tensor:
    """Return `mix(q, *args, dropout, form)`; of long sequences it is computed once more in the backward pass, not
    kept.

    What lies between the projections is a few percent of a block's arithmetic, but two maps, or two mixed values,
    and their difference are more memory than all that ordinary attention keeps. Of short sequences (q is (batch,
    heads, tokens, d)) the maps are small, and in a small model the arithmetic is not. The form "triton" keeps neither.
    torch.func and the recorders of graphs for inference know no recomputation, and get none.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or transformed():
        return mix(q, *args, dropout, form)
    if not RECOMPUTE or form == "triton" or q.shape[-2] < KEEP_BELOW or not torch.is_grad_enabled():
        return mix(q, *args, dropout, form)
    return checkpoint(
        mix, q, *args, dropout, form, use_reentrant=False, determinism_check="none", preserve_rng_state=dropout > 0
    )


def set_recomputation(wanted: bool) -> None:
    """Whether long sequences are computed once more in the backward pass (see `recomputed`), from now on."""
    global RECOMPUTE
    RECOMPUTE = wanted


@contextmanager
def without_recomputation() -> Iterator[None]:
    """Within, all is kept for the backward pass: faster where memory suffices, and for what knows no recomputation."""
    before = RECOMPUTE
    set_recomputation(False)
    try:
        yield
    finally:
        set_recomputation(before)


def by_parity(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float, padded: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the values as mixed by the even and by the odd queries, each (batch, pairs, tokens, width of v).

    One call of `scaled_dot_product_attention` for each, on the values as they are: nothing is repeated, and any of its
    kernels can take them, which is not so with enable_gqa.

    Args:
        q: (batch, 2 pairs, tokens, d).
        k: as q, or (batch, pairs, tokens, d) where both queries of a pair look at the same keys.
        v: (batch, pairs, tokens, width).
        attn_mask: broadcastable to (batch, 2 pairs, tokens, tokens).
        padded: fill queries and keys up to the width of the values; zeros do not change the products.
    """
    scale = q.shape[-1] ** -0.5
    if padded and v.shape[-1] > q.shape[-1]:
        q, k = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(q.dtype)

    keys = even_and_odd(k) if k.shape[1] == q.shape[1] else (k, k)
    masks = even_and_odd(attn_mask, dim=-3) if of_each_head(attn_mask) else (attn_mask, attn_mask)
    first, second = (
        F.scaled_dot_product_attention(queries, of_these, v, mask, dropout, is_causal, scale=scale)
        for queries, of_these, mask in zip(even_and_odd(q), keys, masks)
    )
    return first, second


def of_each_head(attn_mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether there is a mask, and it has a plane for each head."""
    return attn_mask is not None and attn_mask.ndim > 2 and attn_mask.shape[-3] > 1


def even_and_odd(heads: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Views of every second head, from the first and from the second on; of a mask, with `dim` from the end.

    The gradients of slices with a step would each be written into zeros, and the two added.

    Args:
        heads: an even number of heads in dimension `dim`, (batch, heads, ...) by default.
    """
    even, odd = heads.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
    return even, odd


def attention_scores(q: Tensor, k: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return the masked scores q k^T / sqrt(d), (batch, heads, tokens, tokens)."""
    if is_causal:
        if attn_mask is not None:
            raise ValueError("give either attn_mask or is_causal, not both")
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf)
    return scores + attn_mask.to(scores.dtype)
