"""Attention of examples that stand behind each other in one row, each by itself: no pair of tokens of two examples is
computed, and no padding. transformers' own sdpa and eager keep them apart by a mask of tokens x tokens, which takes
longer than padding does.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mllm.llava import DiffCLIPLlavaForConditionalGeneration

BY_EXAMPLE = "by_example"  # unknown to transformers' masks, which leaves them out


@torch.compiler.disable
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example of one row, as a function of transformers' attention interface.

    Args:
        query, key, value: (1, heads, tokens, width); of the last two fewer heads where groups share them.
        position_ids: (1, tokens) int64, 0 at the first token of each example.
        sliding_window: tokens that each token sees, itself included; None is all before it.

    Returns:
        (1, tokens, heads, width), and no maps.

    Raises:
        ValueError: there is a mask, or more than one row.
    """
    if len(query) != 1 or attention_mask is not None:
        raise ValueError("examples are told apart by their positions in one row, without a mask")
    outputs = []
    for q, k, v in zip(*(states.split(lengths(position_ids), dim=2) for states in (query, key, value))):
        window = None
        if sliding_window and sliding_window < q.shape[2]:
            window = torch.ones(2 * q.shape[2:3], dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)
        outputs.append(sdpa_attention_forward(module, q, k, v, window, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


@lru_cache(1)  # by the tensor itself: all layers of a pass are given the same
def lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each example in a row (1, tokens) of positions."""
    first = (position_ids[0] == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(first, [*first[1:], position_ids.shape[1]])]


AttentionInterface.register(BY_EXAMPLE, attend)


@torch.no_grad()
def keeps_apart(model: DiffCLIPLlavaForConditionalGeneration, attention: str = BY_EXAMPLE) -> bool:
    """Whether two examples in one row have, with attention of that name, the states that each has alone.

    Recurrent layers and those that go by no positions let the first show through in the second; and some classes take
    no attention but their own, or do not tell it the positions.
    """
    training, language, device = model.training, model.model.language_model, model.lm_head.weight.device
    usual = language.config._attn_implementation
    ids = torch.arange(24, device=device)[None] % min(24, model.config.image_token_index)
    positions = torch.cat([torch.arange(16), torch.arange(8)])[None].to(device)
    model.eval()
    alone = model.model(input_ids=ids[:, 16:], use_cache=False).last_hidden_state.float()
    try:
        language.set_attn_implementation(attention)
        taken = language.config._attn_implementation == attention
        states = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[:, 16:].float()
    except (TypeError, ValueError, RuntimeError):  # whatever a class makes of what it is not told
        return False
    finally:
        language.set_attn_implementation(usual)
        model.train(training)
    return taken and bool((states - alone).abs().max() <= 1e-4 * alone.abs().max())
