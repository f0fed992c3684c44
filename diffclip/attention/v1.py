"""Differential attention: a pair of adjacent heads gives the difference of two softmax maps, for one value.

Several forms compute the same function (`attention.base.Differential`). Sources: DiffCLIP (Hammoud and Ghanem 2025,
section 3) and Differential Transformer (Ye et al. 2024, equations 1-3); where the DiffCLIP text and its released
weights differ in how heads are paired, this follows the weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffclip.attention.base import (
    Differential,
    Maps,
    as_autocast,
    attention_scores,
    by_parity,
    even_and_odd,
    recomputed,
)
from diffclip.attention.kernel import mixed as mixed_by_kernel
from diffclip.base.errors import InputError


def lambda_init_schedule(layer: int, base: int = 0) -> float:
    """Depth-dependent lambda_init of the "*" variant: 0.8 - 0.6 exp(-0.3 l), from 0.2 towards 0.8.

    `layer` counts from 0; the first counts as `base`: 0 in DiffCLIP*, 1 in Differential Transformer's text.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * (layer + base))


class DifferentialAttention(Differential):
    """Self-attention with `num_heads` softmax maps that work as `num_heads / 2` differences.

    With head width d = dim / num_heads, queries and keys have num_heads heads of width d, values have
    num_heads / 2 heads of width 2d. Pair j takes the maps of heads 2j and 2j + 1:

        out_j = (1 - lambda_init) * RMSNorm((A_2j - lambda A_2j+1) v_j)
        lambda = exp(<lambda_q1, lambda_k1>) - exp(<lambda_q2, lambda_k2>) + lambda_init

    Lambda and the norm's weight (length 2d) are shared by all heads of the layer.

    Args:
        num_heads: number of softmax maps; even, and a divisor of dim.
        qkv_bias, out_bias: whether the projections of queries, keys and values, and that of the output, have biases.

    Raises:
        InputError: for an odd number of heads, or one that does not divide dim.
    """

    name = "v1"
    default_lambda_init = 0.8
    value_heads = 2
    in_official_layout = True
    forms = ("triton", "fused", "padded", "eager")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lambda_init: float = default_lambda_init,
        qkv_bias: bool = True,
        out_bias: bool = True,
        norm_eps: float = 1e-5,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_implementation: str = "auto",
    ) -> None:
        if num_heads < 2 or num_heads % 2 or dim % num_heads:
            raise InputError(
                f"differential attention pairs its heads, so num_heads must be even and divide the width: "
                f"got num_heads={num_heads}, width={dim}"
            )
        super().__init__(dim, num_heads, lambda_init, attn_drop, attn_implementation)
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, dropout = as_autocast(x), self.attn_drop if self.training else 0.0
        inputs = self.project(x)
        form = self.form_for(inputs, attn_mask, is_causal, dropout)
        mixed = recomputed(self.mix, *inputs, attn_mask, is_causal, dropout=dropout, form=form)
        return self.proj_drop(self.project_out(mixed, x))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float, form: str
    ) -> Tensor:
        """Return the normalised differences of all pairs side by side, (batch, tokens, dim), for `project`'s output."""
        return differences(form, q, k, v, self.compute_lambda(), self.diff_norm, attn_mask, is_causal, dropout)

    @staticmethod
    def timed(form: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        lambda_ = torch.full((), 0.8, device=q.device)
        norm = HeadNorm(v.shape[-1], 1e-5, 0.2, device=q.device)
        return differences(form, q, k, v, lambda_, norm, attn_mask, is_causal)

    def maps(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Maps:
        q, k, _ = self.project(x)
        return *softmax_maps(q, k, attn_mask, is_causal), self.compute_lambda().to(q.dtype)

    def apply_map(self, x: Tensor, map_: Tensor) -> Tensor:
        mixed = self.diff_norm(map_ @ self.project(x)[2])
        return self.project_out(mixed.transpose(1, 2).flatten(2), x)

    @torch.no_grad()
    def start_from(self, qkv: Tensor, bias: Tensor | None, out: nn.Linear, preserve: bool) -> None:
        """Take over the projections; the function changes: heads now work in pairs, under a new norm."""
        self.take_projections(qkv, bias, out)

    def added(self) -> dict[str, Tensor | None]:
        return dict.fromkeys(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "diff_norm.weight"))

    def mean_lambda(self) -> float:
        return self.compute_lambda().item()


class HeadNorm(nn.RMSNorm):
    """RMSNorm times a constant, in its input's dtype: under autocast torch has no fused kernel for mixed ones."""

    def __init__(self, width: int, eps: float, scale: float, device: torch.device | None = None) -> None:
        super().__init__(width, eps=eps, device=device)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, (self.weight * self.scale).to(x.dtype), self.eps)


def differences(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_: Tensor,
    norm: HeadNorm,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Return the normed differences of all pairs side by side, (batch, tokens, pairs * 2d), in the form named.

    q and k are (batch, 2 pairs, tokens, d), v is (batch, pairs, tokens, 2d), lambda_ a scalar in float32 or wider.
    """
    if form == "triton":
        return mixed_by_kernel(q, k, v, lambda_, norm.weight * norm.scale, norm.eps or 0.0, attn_mask, is_causal)
    lambda_ = lambda_.to(q.dtype)
    if form == "eager":
        first, second = (F.dropout(map_, dropout) for map_ in softmax_maps(q, k, attn_mask, is_causal))
        out = (first - lambda_ * second) @ v  # (batch, pairs, tokens, 2d)
    else:
        first, second = by_parity(q, k, v, attn_mask, is_causal, dropout, padded=form == "padded")
        out = first - lambda_ * second
    return norm(out).transpose(1, 2).flatten(2)


def softmax_maps(
    q: Tensor, k: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the even and the odd heads' softmax maps, each (batch, heads / 2, tokens, tokens), of q and k."""
    return even_and_odd(attention_scores(q, k, attn_mask, is_causal).softmax(dim=-1))
