"""The map that multiplies the values in an attention module, differential or ordinary, and what is made of it."""

import torch.nn.functional as F
from torch import Tensor, nn

from diffclip.attention.base import Differential, attention_scores
from diffclip.base.timm_vit import TimmAttention

Attention = Differential | TimmAttention | nn.MultiheadAttention


def both_maps(
    attention: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (A1, A2, lambda) of an attention module for its input x (batch, tokens, dim).

    A1 and A2 are softmax maps (batch, maps, tokens, tokens), with heads / 2 maps in v1 and one per head otherwise;
    lambda broadcasts to them. A2 and lambda are None for ordinary attention, and for dex, whose values differ instead.
    """
    if isinstance(attention, Differential):
        return attention.maps(x, attn_mask, is_causal)
    q, k, _ = _ordinary(attention, x)
    return attention_scores(q, k, attn_mask, is_causal).softmax(dim=-1), None, None


def _ordinary(attention: TimmAttention | nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of ordinary attention, each (batch, heads, tokens, width)."""
    if isinstance(attention, nn.MultiheadAttention):
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(q), attention.k_norm(k), v


def attention_map(attention: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return the map that multiplies the values in this module, given its input x (batch, tokens, dim).

    (batch, maps, tokens, tokens): signed, with rows summing to 1 - lambda, for v1 and v2. That of dex is a softmax map,
    of ordinary attention: the values that it multiplies are less a part of themselves, which no map shows.
    """
    first, second, lambda_ = both_maps(attention, x, attn_mask, is_causal)
    return first if second is None or lambda_ is None else first - lambda_ * second


def apply_map(attention: Attention, x: Tensor, map_: Tensor) -> Tensor:
    """Return what the module makes of x (batch, tokens, dim) with `map_` in the place of its own map."""
    if isinstance(attention, Differential):
        return attention.apply_map(x, map_)
    return _output(attention, map_ @ _ordinary(attention, x)[2])


def attend(attention: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return what the module makes of x (batch, tokens, dim), by torch's kernel for ordinary attention."""
    if isinstance(attention, Differential):
        return attention(x, attn_mask, is_causal)
    return _output(attention, F.scaled_dot_product_attention(*_ordinary(attention, x), attn_mask, is_causal=is_causal))


def _output(attention: TimmAttention | nn.MultiheadAttention, mixed: Tensor) -> Tensor:
    mixed = mixed.transpose(1, 2).flatten(2)  # (batch, tokens, dim)
    if isinstance(attention, nn.MultiheadAttention):
        return attention.out_proj(mixed)
    return attention.proj(attention.norm(mixed))


def mapped(attention: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> tuple:
    """Return what the module makes of x, and the map (batch, maps, tokens, tokens) that multiplied the values in it."""
    map_ = attention_map(attention, x, attn_mask, is_causal)
    return apply_map(attention, x, map_), map_


def count_maps(num_heads: int, kind: type[Differential] | None) -> int:
    """How many maps multiply values in a layer of so many heads; None is ordinary attention."""
    return num_heads if kind is None else num_heads // kind.value_heads
