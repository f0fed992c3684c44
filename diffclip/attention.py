"""Differential attention: a pair of adjacent heads gives the difference of two softmax maps, for one value.

Two forms compute the same function: `eager` writes the maps out, `fused` leaves them inside
`scaled_dot_product_attention`. Sources: DiffCLIP (Hammoud and Ghanem 2025, section 3) and Differential
Transformer (Ye et al. 2024, equations 1-3); where the DiffCLIP text and its released weights differ in how
heads are paired, this follows the weights.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffclip.base.errors import InputError

FORMS = ("auto", "eager", "fused")
KEEP_BELOW = 64  # tokens


def lambda_init_schedule(layer: int, base: int = 0) -> float:
    """Depth-dependent lambda_init of the "*" variant: 0.8 - 0.6 exp(-0.3 l), from 0.2 towards 0.8.

    Args:
        layer: index of the block, from 0.
        base: what the first block counts as; DiffCLIP* counts from 0, Differential Transformer's text from 1.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * (layer + base))


class DifferentialAttention(nn.Module):
    """Self-attention with `num_heads` softmax maps that work as `num_heads / 2` differences.

    With head width d = dim / num_heads, queries and keys have num_heads heads of width d, values have
    num_heads / 2 heads of width 2d. Pair j takes the maps of heads 2j and 2j + 1:

        out_j = (1 - lambda_init) * RMSNorm((A_2j - lambda A_2j+1) v_j)
        lambda = exp(<lambda_q1, lambda_k1>) - exp(<lambda_q2, lambda_k2>) + lambda_init

    Lambda and the norm's weight (length 2d) are shared by all heads of the layer. lambda_init is a constant
    that is not part of the state dict.

    Args:
        dim: width of the tokens.
        num_heads: number of softmax maps; even, and a divisor of dim.
        qkv_bias, out_bias: whether the projections of queries, keys and values, and that of the output, have biases.
        attn_drop: dropout on the entries of each map, before the difference.
        attn_implementation: "eager", "fused", or "auto": the one measured faster (`faster_form`).

    `q_norm` and `k_norm` do nothing until a tower with normalised queries and keys puts its own there.

    Raises:
        InputError: for an odd number of heads, or one that does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lambda_init: float = 0.8,
        qkv_bias: bool = True,
        out_bias: bool = True,
        norm_eps: float = 1e-5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_implementation: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 2 or num_heads % 2 or dim % num_heads:
            raise InputError(
                f"differential attention pairs its heads, so num_heads must be even and divide the width: "
                f"got num_heads={num_heads}, width={dim}"
            )
        if attn_implementation not in FORMS:
            raise InputError(f"attn_implementation must be one of {', '.join(FORMS)}: got {attn_implementation!r}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.lambda_init = lambda_init
        self.attn_drop = attn_drop
        self.attn_implementation = attn_implementation

        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.out_proj = nn.Linear(dim, dim, bias=out_bias)
        self.lambda_q1 = nn.Parameter(torch.empty(self.head_dim))
        self.lambda_k1 = nn.Parameter(torch.empty(self.head_dim))
        self.lambda_q2 = nn.Parameter(torch.empty(self.head_dim))
        self.lambda_k2 = nn.Parameter(torch.empty(self.head_dim))
        self.diff_norm = HeadNorm(2 * self.head_dim, eps=norm_eps, scale=1 - lambda_init)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_lambdas()

    def reset_lambdas(self) -> None:
        """Draw the four lambda vectors from N(0, 0.1), so that lambda starts close to lambda_init."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def compute_lambda(self) -> Tensor:
        """Return lambda, a scalar, in float32 or wider."""
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        first = (self.lambda_q1.to(dtype) * self.lambda_k1.to(dtype)).sum().exp()
        second = (self.lambda_q2.to(dtype) * self.lambda_k2.to(dtype)).sum().exp()
        return first - second + self.lambda_init

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k (batch, heads, tokens, d) and v (batch, heads / 2, tokens, 2d)."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.num_heads // 2, 2 * self.head_dim)).transpose(1, 2)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within x.

        Args:
            x: (batch, tokens, dim).
            attn_mask: broadcastable to (batch, heads, tokens, tokens); boolean (True = attend) or additive.
            is_causal: each token attends to itself and earlier ones. Not together with attn_mask.

        Returns:
            (batch, tokens, dim).
        """
        dropout = self.attn_drop if self.training else 0.0
        mixed = recomputed(self.mix, *self.project(x), attn_mask, is_causal, dropout)
        return self.proj_drop(self.out_proj(mixed))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
        """Return the normalised differences of all pairs side by side, (batch, tokens, dim), for `project`'s output."""
        lambda_ = self.compute_lambda().to(q.dtype)
        form = self.attn_implementation
        if form == "auto":
            form = faster_form(q)
        if form == "eager":
            first, second = softmax_maps(q, k, attn_mask, is_causal)
            difference = F.dropout(first, dropout) - lambda_ * F.dropout(second, dropout)
            out = difference @ v  # (batch, pairs, tokens, 2d)
        else:
            first, second = fused_attention(q, k, v, attn_mask, is_causal, dropout)
            out = first - lambda_ * second  # (batch, pairs, tokens, 2d)
        return self.diff_norm(out).transpose(1, 2).flatten(2)

    def mean_lambda(self) -> float:
        """Lambda as a number, for logs."""
        return self.compute_lambda().item()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, lambda_init={self.lambda_init:.4g}, form={self.attn_implementation}"


class HeadNorm(nn.RMSNorm):
    """RMSNorm times a constant, in its input's dtype: under autocast torch has no fused kernel for mixed ones."""

    def __init__(self, width: int, eps: float, scale: float) -> None:
        super().__init__(width, eps=eps)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, (self.weight * self.scale).to(x.dtype), self.eps)


def recomputed(mix: Callable[..., Tensor], q: Tensor, *args: Tensor | bool | float | None) -> Tensor:
    """Return `mix(q, *args)`; of long sequences it is computed once more in the backward pass, not kept for it.

    What lies between the projections is a few percent of a block's arithmetic, but two maps, or two mixed values,
    and their difference are more memory than all that ordinary attention keeps. Of short sequences (q is (batch,
    heads, tokens, d)) the maps are small, and in a small model the arithmetic is not.
    """
    if q.shape[-2] < KEEP_BELOW or not torch.is_grad_enabled():
        return mix(q, *args)
    return checkpoint(mix, q, *args, use_reentrant=False, determinism_check="none")


def faster_form(q: Tensor) -> str:
    """Return the form that is faster, forward and backward, for queries (batch, heads, tokens, d) like these.

    On a CPU, writing out the maps wins up to some 200 tokens, and in bfloat16 throughout (width 768, 197 tokens, one
    core: 198 ms against 241 ms in float32, 76 ms against 114 ms in bfloat16). Elsewhere, not measured, the maps are
    left inside the kernel.
    """
    if q.device.type == "cpu" and (q.shape[-2] <= 256 or q.dtype != torch.float32):
        return "eager"
    return "fused"


def softmax_maps(
    q: Tensor, k: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the even and the odd heads' softmax maps, each (batch, heads / 2, tokens, tokens).

    Args:
        q, k: (batch, heads, tokens, d).
        attn_mask, is_causal: as in `DifferentialAttention.forward`.
    """
    maps = attention_scores(q, k, attn_mask, is_causal).softmax(dim=-1)
    return maps[:, 0::2], maps[:, 1::2]


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


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return the values as mixed by the even and the odd heads, each (batch, heads / 2, tokens, 2d)."""
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        # Its kernel wants equal widths, else it falls back to the maps; zeros do not change the products.
        q, k = F.pad(q, (0, q.shape[-1])), F.pad(k, (0, k.shape[-1]))
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(q.dtype)
    v = v.repeat_interleave(2, dim=1)  # (batch, heads, tokens, 2d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, scale=scale)
    return out[:, 0::2], out[:, 1::2]
