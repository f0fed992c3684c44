"""Any attention module run with its map written out, where its own kernel leaves it inside; or with a given map.

Differential attention and torch's are computed here from their projections. Others (timm's and open_clip's own, with
norms, gates, rotary positions and whatever else) run as they are, but for `scaled_dot_product_attention`.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffclip.attention import Differential
from diffclip.attention.base import attention_scores
from diffclip.base.backbones import OpenClipAttention
from diffclip.base.errors import InputError
from diffclip.warm_start import CalledLikeMultihead


def can_be_written(attention: nn.Module) -> bool:
    """Whether `written` knows this module, as far as can be told without running it."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention.batch_first and attention.bias_k is None and not attention.add_zero_attn
    known = isinstance(attention, Differential | OpenClipAttention)
    return known or bool(getattr(attention, "fused_attn", False))  # timm's, when it does not multiply by itself


def written(attention: nn.Module, map_: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Return the map that multiplies the values when the module is called so, and what it returns.

    Args:
        map_: takes the place of the module's own, (batch, maps, queries, keys); None for its own.
        args, kwargs: as the model calls the module.

    Raises:
        InputError: the module does not compute its map by `scaled_dot_product_attention`.
    """
    if isinstance(attention, Differential):
        if map_ is None:
            first, second, lambda_ = attention.maps(args[0])
            map_ = first if second is None or lambda_ is None else first - lambda_ * second
        out = attention.apply_map(args[0], map_)
        return map_, (out, None) if isinstance(attention, CalledLikeMultihead) else out
    if isinstance(attention, nn.MultiheadAttention):
        return _multihead(attention, map_, *args[:3])
    with _Writing(map_) as writing:
        out = attention(*args, **kwargs)
    if writing.map is None:
        raise InputError(f"no attention maps for this model: its {type(attention).__name__} does not tell its map")
    return writing.map, out


def _multihead(
    attention: nn.MultiheadAttention, map_: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, tuple[Tensor, None]]:
    """`written` for torch's attention, of a sequence to itself or, in pooling heads, of queries to a sequence."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases)
    )
    map_ = attention_scores(q, k).softmax(dim=-1) if map_ is None else map_
    return map_, (attention.out_proj((map_ @ v).transpose(1, 2).flatten(2)), None)


class _Writing(TorchFunctionMode):
    """Within, `scaled_dot_product_attention` multiplies the values by `map`, which is its own softmax if it is None."""

    def __init__(self, map_: Tensor | None) -> None:
        super().__init__()
        self.map = map_

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.map is None:
            scale = kwargs.get("scale")
            scaled = query if scale is None else query * (scale * query.shape[-1] ** 0.5)
            self.map = attention_scores(scaled, key, attn_mask).softmax(dim=-1)
        return self.map @ value
