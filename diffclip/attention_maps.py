"""Where a model looks."""

from torch import Tensor, nn

from diffclip.attention import DifferentialAttention, attention_scores, softmax_maps
from diffclip.attention_v2 import DifferentialAttentionV2


def both_maps(
    attention: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (A1, A2, lambda) of an attention module for its input x (batch, tokens, dim).

    Args:
        attention: differential attention of either version, or timm's `Attention`.

    Returns:
        A1, A2: softmax maps (batch, maps, tokens, tokens), with heads / 2 maps in version 1 and one per head
        otherwise; lambda broadcasts to them. A2 and lambda are None for ordinary attention.
    """
    if isinstance(attention, DifferentialAttention):
        q, k, _ = attention.project(x)
        first, second = softmax_maps(q, k, attn_mask, is_causal)
        return first, second, attention.compute_lambda().to(q.dtype)
    if isinstance(attention, DifferentialAttentionV2):
        maps = attention.softmax_maps(x, attn_mask, is_causal)
        return maps[:, 0::2], maps[:, 1::2], attention.compute_lambda(x)
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = attention_scores(attention.q_norm(q), attention.k_norm(k), attn_mask, is_causal)
    return scores.softmax(dim=-1), None, None


def attention_map(attention: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Return the map that multiplies the values in this module, given its input x (batch, tokens, dim).

    Returns:
        (batch, maps, tokens, tokens): signed, with rows summing to 1 - lambda, for differential attention.
    """
    first, second, lambda_ = both_maps(attention, x, attn_mask, is_causal)
    return first if second is None else first - lambda_ * second
