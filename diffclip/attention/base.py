"""What every kind of differential attention offers to models, checkpoints and maps, and what all compute with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffclip.base.errors import InputError
from diffclip.base.graphs import transformed

FORMS = ("auto", "eager", "fused")
KEEP_BELOW = 64  # tokens
RECOMPUTE = True  # whether longer sequences are computed once more in the backward pass; see `without_recomputation`

# A1 and A2 (batch, maps, tokens, tokens), and lambda, which broadcasts to them; no A2 and lambda where there is one map
Maps = tuple[Tensor, Tensor | None, Tensor | None]


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
            "auto" is the one measured faster (`faster_form`).

    Raises:
        InputError: for an unknown implementation.
    """

    name: ClassVar[str]  # its key in `KINDS`
    default_lambda_init: ClassVar[float | str]  # or "schedule", by depth
    value_heads: ClassVar[int] = 1  # how many heads wide a value is
    in_official_layout: ClassVar[bool] = False  # whether the official code's checkpoints can hold its weights

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

    def form_for(self, q: Tensor) -> str:
        """Return "eager" or "fused" for queries (batch, heads, tokens, d)."""
        return faster_form(q) if self.attn_implementation == "auto" else self.attn_implementation

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, lambda_init={self.lambda_init:.4g}, form={self.attn_implementation}"


def recomputed(mix: Callable[..., Tensor], q: Tensor, *args: Tensor | bool | float | None) -> Tensor:
    """Return `mix(q, *args)`; of long sequences it is computed once more in the backward pass, not kept for it.

    What lies between the projections is a few percent of a block's arithmetic, but two maps, or two mixed values,
    and their difference are more memory than all that ordinary attention keeps. Of short sequences (q is (batch,
    heads, tokens, d)) the maps are small, and in a small model the arithmetic is not. torch.func and the recorders of
    graphs for inference know no recomputation, and get none.
    """
    if not RECOMPUTE or q.shape[-2] < KEEP_BELOW or not torch.is_grad_enabled():
        return mix(q, *args)
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or transformed():
        return mix(q, *args)
    return checkpoint(mix, q, *args, use_reentrant=False, determinism_check="none")


@contextmanager
def without_recomputation() -> Iterator[None]:
    """Within, all is kept for the backward pass: faster where memory suffices, and for what knows no recomputation."""
    global RECOMPUTE
    before, RECOMPUTE = RECOMPUTE, False
    try:
        yield
    finally:
        RECOMPUTE = before


def faster_form(q: Tensor) -> str:
    """Return the form that is faster, forward and backward, for queries (batch, heads, tokens, d) like these.

    On a CPU, writing out the maps wins up to some 200 tokens, and in bfloat16 throughout (width 768, 197 tokens, one
    core: 198 ms against 241 ms in float32, 76 ms against 114 ms in bfloat16). Elsewhere, not measured, the maps are
    left inside the kernel.
    """
    if q.device.type == "cpu" and (q.shape[-2] <= 256 or q.dtype != torch.float32):
        return "eager"
    return "fused"


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
