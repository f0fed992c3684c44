"""Differential attention V2: twice the query heads on the same keys and values, and lambda chosen by each token.

Source: Differential Transformer V2 (Ye et al., Microsoft, January 2026). Against the first version: no halved heads,
no norm after the difference, no exponential parametrisation, and so a warm start from ordinary attention that
computes the same function.
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
    of_each_head,
    recomputed,
)
from diffclip.attention.kernel import mixed as mixed_by_kernel
from diffclip.base.errors import InputError


class DifferentialAttentionV2(Differential):
    """Self-attention whose `num_heads` heads are each a difference of two softmax maps over one key and value.

    With head width d = dim / num_heads there are 2 num_heads queries, and num_heads keys and values of width d.
    Queries 2j and 2j + 1 both look at key and value j:

        out_j = (A_2j - sigmoid(lambda_j(x)) A_2j+1) v_j

    lambda_j(x) is a linear function of the token that asks. Ordinary attention has dim^2 + dim parameters less for
    queries, and none of lambda's (dim + 1) num_heads.

    Args:
        num_heads: number of differences; a divisor of dim.
        lambda_init: what sigmoid(lambda) starts from for every token, in (0, 1).
        qkv_bias, out_bias: as in v1.

    Raises:
        InputError: for a head count that does not divide dim, or a lambda_init outside (0, 1).
    """

    name = "v2"
    default_lambda_init = 0.5
    forms = ("triton", "fused", "eager")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lambda_init: float = default_lambda_init,
        qkv_bias: bool = True,
        out_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_implementation: str = "auto",
    ) -> None:
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"num_heads must divide the width: got num_heads={num_heads}, width={dim}")
        if not 0 < lambda_init < 1:
            raise InputError(f"lambda_init of v2 is a sigmoid's value, between 0 and 1: got {lambda_init}")
        super().__init__(dim, num_heads, lambda_init, attn_drop, attn_implementation)
        self.q_proj = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.lambda_proj = nn.Linear(dim, num_heads)
        self.out_proj = nn.Linear(dim, dim, bias=out_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_lambdas()

    def reset_lambdas(self) -> None:
        """Let sigmoid(lambda) be lambda_init for every token and head."""
        nn.init.zeros_(self.lambda_proj.weight)
        nn.init.constant_(self.lambda_proj.bias, math.log(self.lambda_init / (1 - self.lambda_init)))

    def compute_lambda(self, x: Tensor) -> Tensor:
        """Return sigmoid(lambda), (batch, heads, tokens, 1), for tokens x (batch, tokens, dim)."""
        return self.lambda_proj(x).sigmoid().transpose(1, 2).unsqueeze(-1)

    def added(self) -> dict[str, Tensor | None]:
        """Lambda's projection, and every second of the query heads."""
        second = torch.arange(2 * self.num_heads).remainder(2).bool().repeat_interleave(self.head_dim)
        queries = dict.fromkeys((f"q_proj.{name}" for name, _ in self.q_proj.named_parameters()), second)
        return {"lambda_proj.weight": None, "lambda_proj.bias": None, **queries}

    def mean_lambda(self) -> float:
        """Mean over the heads of the lambda that a token of zeros would have, for logs."""
        return self.lambda_proj.bias.detach().sigmoid().mean().item()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, dropout = as_autocast(x), self.attn_drop if self.training else 0.0
        inputs, lambda_ = self.project(x), self.compute_lambda(x)
        form = self.form_for(inputs, attn_mask, is_causal, dropout)
        mixed = recomputed(self.mix, *inputs, lambda_, attn_mask, is_causal, dropout=dropout, form=form)
        return self.proj_drop(self.project_out(mixed, x))

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lambda_: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        dropout: float,
        form: str,
    ) -> Tensor:
        """Return the differences of all heads side by side, (batch, tokens, dim)."""
        return differences(form, q, k, v, lambda_, attn_mask, is_causal, dropout)

    @staticmethod
    def timed(form: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        return differences(form, q, k, v, q.new_full((1, 1, 1, 1), 0.5), attn_mask, is_causal)

    def maps(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Maps:
        q, k, _ = self.project(x)
        first, second = even_and_odd(softmax_maps(q, k, attn_mask, is_causal))  # (batch, heads, tokens, tokens)
        return first, second, self.compute_lambda(x)

    def apply_map(self, x: Tensor, map_: Tensor) -> Tensor:
        return self.project_out((map_ @ self.project(x)[2]).transpose(1, 2).flatten(2), x)

    @torch.no_grad()
    def start_from(self, qkv: Tensor, bias: Tensor | None, out: nn.Linear, preserve: bool) -> None:
        """Take over the projections, and with `preserve` the function.

        That makes the second query of each head a copy of the first and divides the values by 1 - lambda, so that
        (A - lambda A) v / (1 - lambda) = A v, whatever norm or gate comes next. The two queries part in training, since
        their gradients differ in sign and size. Otherwise the second queries are drawn anew, with the spread of the
        first ones.
        """
        q, k, v = qkv.chunk(3)
        self.k_proj.weight.copy_(k)
        share = 1 - self.lambda_proj.bias.sigmoid().double() if preserve else torch.ones(self.num_heads).to(q.device)
        share = share.repeat_interleave(self.head_dim)  # of each value, as lambda is in this dtype
        self.v_proj.weight.copy_(v / share[:, None])
        second = q if preserve else torch.randn_like(q) * q.std()
        self.q_proj.weight.copy_(interleave_heads(q, second, self.num_heads))
        if bias is not None:
            q_bias, k_bias, v_bias = bias.chunk(3)
            self.k_proj.bias.copy_(k_bias)
            self.v_proj.bias.copy_(v_bias / share)
            self.q_proj.bias.copy_(interleave_heads(q_bias, q_bias, self.num_heads))
        self.out_proj.weight.copy_(out.weight)
        if out.bias is not None:
            self.out_proj.bias.copy_(out.bias)


def differences(
    form: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Return the differences of all heads side by side, (batch, tokens, heads * d), in the form named.

    q is (batch, 2 heads, tokens, d), k and v are (batch, heads, tokens, d); lambda_ broadcasts to (batch, heads,
    tokens, 1), attn_mask to (batch, heads, tokens, tokens).
    """
    if form == "triton":
        return mixed_by_kernel(q, k, v, lambda_, None, 0.0, attn_mask, is_causal)
    if form == "eager":
        first, second = even_and_odd(F.dropout(softmax_maps(q, k, attn_mask, is_causal), dropout))
        out = (first - lambda_ * second) @ v  # (batch, heads, tokens, d)
    else:
        first, second = by_parity(q, k, v, per_query(attn_mask), is_causal, dropout)
        out = first - lambda_ * second
    return out.transpose(1, 2).flatten(2)


def softmax_maps(q: Tensor, k: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return all maps, (batch, 2 heads, tokens, tokens), of q (batch, 2 heads, tokens, d) and k with half the heads."""
    k = k.repeat_interleave(2, dim=1)  # beside both of its queries
    return attention_scores(q, k, per_query(attn_mask), is_causal).softmax(dim=-1)


def per_query(attn_mask: Tensor | None) -> Tensor | None:
    """Return a mask that has one plane per head with one plane per query instead, any other as it is."""
    return attn_mask.repeat_interleave(2, dim=-3) if of_each_head(attn_mask) else attn_mask


def interleave_heads(first: Tensor, second: Tensor, heads: int) -> Tensor:
    """Return (2 dim, ...) in which head j of `first` (dim, ...) is followed by head j of `second`."""
    pairs = torch.stack([first.unflatten(0, (heads, -1)), second.unflatten(0, (heads, -1))], dim=1)
    return pairs.flatten(0, 2)
