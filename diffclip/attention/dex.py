"""Dex: ordinary attention that is kept, and a learnt part of each head's output that is subtracted from it, by degrees.

Source: Kong, Jang and Kwak, "Understanding Differential Transformer Unchains Pretrained Self-Attentions" (NeurIPS 2025,
arXiv 2505.16333), equations 3 to 5; its authors have published no code. What differs here from what the paper does to
language models:

- every head is differential until `select_heads` chooses half of them, which needs pictures or captions;
- what else learns is the trainer's business (the paper trains keys, values and outputs beside the new parameters);
- the share of the annealing is a number that a trainer sets (`set_annealing`), not a count of steps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffclip.attention.base import Differential, Maps, as_autocast, attention_scores, recomputed
from diffclip.base.errors import InputError


class Dex(Differential):
    """Self-attention whose heads' outputs O become O - lambda O W, with one learnt matrix W for all heads of a layer.

    With head width d = dim / num_heads, W is (d, d), drawn as torch draws a Linear without bias. Lambda is a number of
    the layer, annealed in from 0 while `annealing`, s, goes from 0 to 1:

        lambda(s) = s (1 - s) lambda_init + s lambda_learnt

    So at s = 0 it is ordinary attention, in between lambda_init drives what is new off its start (lambda_learnt starts
    at 0, where W would learn nothing), and at s = 1 lambda is what has been learnt. At s = 0 itself W and lambda_learnt
    have no gradient. Against ordinary attention there are d^2 + 1 more parameters. `annealing` and `selected`, which
    heads take part, are saved with the weights, but do not learn.

    There is one softmax map, all of whose weights are positive: what differs is the values, v (1 - lambda W).

    Args:
        num_heads: a divisor of dim.
        lambda_init: in the annealing; the paper's best is the schedule by depth.
        qkv_bias, out_bias: as in v1.

    Raises:
        InputError: for a head count that does not divide dim.
    """

    name = "dex"
    default_lambda_init = "schedule"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        lambda_init: float = 0.8,
        qkv_bias: bool = True,
        out_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_implementation: str = "auto",
    ) -> None:
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"num_heads must divide the width: got num_heads={num_heads}, width={dim}")
        super().__init__(dim, num_heads, lambda_init, attn_drop, attn_implementation)
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)
        self.subtracted = nn.Parameter(torch.empty(self.head_dim, self.head_dim))
        self.lambda_learnt = nn.Parameter(torch.empty(1))  # not 0-d, which ZeRO cannot shard
        self.out_proj = nn.Linear(dim, dim, bias=out_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.annealing: Tensor
        self.selected: Tensor
        self.register_buffer("annealing", torch.zeros(()))
        self.register_buffer("selected", torch.ones(num_heads))
        self.reset_lambdas()

    def reset_lambdas(self) -> None:
        """Draw W, and let all heads begin as ordinary attention."""
        nn.init.kaiming_uniform_(self.subtracted, a=math.sqrt(5))
        nn.init.zeros_(self.lambda_learnt)
        nn.init.zeros_(self.annealing)
        nn.init.ones_(self.selected)

    def set_annealing(self, share: float) -> None:
        """Set how much of the annealing is done, from 0 to 1."""
        self.annealing.fill_(share)

    def compute_lambda(self) -> Tensor:
        """Return lambda, a scalar, in float32 or wider."""
        dtype = torch.promote_types(self.lambda_learnt.dtype, torch.float32)
        share = self.annealing.to(dtype)
        return share * (1 - share) * self.lambda_init + share * self.lambda_learnt[0].to(dtype)

    def added(self) -> dict[str, Tensor | None]:
        return dict.fromkeys(("subtracted", "lambda_learnt"))

    def mean_lambda(self) -> float:
        """Lambda as it is at this point of the annealing."""
        return self.compute_lambda().item()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, dropout = as_autocast(x), self.attn_drop if self.training else 0.0
        inputs = self.project(x)
        form = self.form_for(inputs, attn_mask, is_causal, dropout)
        rest = (attn_mask, is_causal)
        if form == "eager":
            mixed = recomputed(self.mix, *inputs, *rest, dropout=dropout, form=form)
        else:  # nothing large is kept for the backward pass
            mixed = self.mix(*inputs, *rest, dropout, form)
        return self.proj_drop(self.project_out(self.merge(mixed), x))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float, form: str
    ) -> Tensor:
        """Return the heads' outputs as of ordinary attention, (batch, heads, tokens, d), for `project`'s output."""
        return ordinary(form, q, k, v, attn_mask, is_causal, dropout)

    @staticmethod
    def timed(form: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        return ordinary(form, q, k, v, attn_mask, is_causal)

    def merge(self, mixed: Tensor) -> Tensor:
        """Return the heads' outputs (batch, heads, tokens, d), less lambda f(O), side by side: (batch, tokens, dim)."""
        lambdas = (self.compute_lambda() * self.selected).to(mixed.dtype)[:, None, None]
        return (mixed - lambdas * F.linear(mixed, self.subtracted)).transpose(1, 2).flatten(2)

    def maps(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Maps:
        """Return the map of x (batch, tokens, dim), and no second one: the difference is between values."""
        q, k, _ = self.project(x)
        return attention_scores(q, k, attn_mask, is_causal).softmax(dim=-1), None, None

    def apply_map(self, x: Tensor, map_: Tensor) -> Tensor:
        """Return the output (batch, tokens, dim) for x with `map_` in the place of the one map."""
        return self.project_out(self.merge(map_ @ self.project(x)[2]), x)

    @torch.no_grad()
    def start_from(self, qkv: Tensor, bias: Tensor | None, out: nn.Linear, preserve: bool) -> None:
        """Take over the projections, and with them the function, whatever `preserve` says."""
        self.take_projections(qkv, bias, out)


def ordinary(
    form: str, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout: float = 0.0
) -> Tensor:
    """Return ordinary attention's mixed values (batch, heads, tokens, d), for inputs of that shape, in one form."""
    if form == "eager":
        return F.dropout(attention_scores(q, k, attn_mask, is_causal).softmax(dim=-1), dropout) @ v
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)


def set_annealing(model: nn.Module, share: float) -> None:
    """Set how much of the annealing is done, from 0 to 1, in every `Dex` of a model; others have none.

    A trainer calls it before each step, with min(1, step / steps of annealing), counting from 0. ValueError for a share
    outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the annealing that is done must be from 0 to 1: got {share}")
    for module in model.modules():
        if isinstance(module, Dex):
            module.set_annealing(share)


@torch.no_grad()
def select_heads(model: nn.Module, encode: Callable[[], object], share: float = 0.5) -> None:
    """Let only the heads that attend most evenly be differential: `share` of each layer's, in every `Dex` of a model.

    Entropy of the maps is averaged over all that `encode()` has the model compute; to be done before training. Heads of
    the highest entropy, which look at nothing in particular, have least to lose (the paper's choice, a half of them).
    """
    layers = [module for module in model.modules() if isinstance(module, Dex)]
    entropies: dict[Dex, list[Tensor]] = {layer: [] for layer in layers}

    def measured(layer: Dex) -> Callable[..., Tensor]:
        def mix(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, *rest: Any) -> Tensor:
            map_ = attention_scores(q.float(), k.float(), attn_mask, is_causal).softmax(dim=-1)
            entropies[layer].append(torch.special.entr(map_).sum(dim=-1).mean(dim=(0, 2)))
            return Dex.mix(layer, q, k, v, attn_mask, is_causal, *rest)

        return mix

    for layer in layers:
        layer.mix = measured(layer)  # type: ignore[method-assign] # of this one, for a while
    try:
        encode()
    finally:
        for layer in layers:
            del layer.mix  # the class's own is found again
    for layer, seen in entropies.items():
        if seen:
            most_even = torch.stack(seen).mean(dim=0).topk(max(1, round(share * layer.num_heads))).indices
            layer.selected.zero_()[most_even] = 1
