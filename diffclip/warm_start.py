"""The one function that makes a CLIP differential: it replaces the attention of any open_clip model's blocks."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffclip import variants
from diffclip.attention import Differential, lambda_init_schedule
from diffclip.attention import kind as kind_named
from diffclip.base.backbones import (
    Block,
    CustomResidualAttentionBlock,
    OpenClipAttention,
    ResidualAttentionBlock,
    TimmAttention,
    open_clip,
)
from diffclip.base.errors import InputError
from diffclip.variants import TOWERS

CROSS_ATTENTION = "ln_1_kv"  # the norm of what is looked at, which open_clip's blocks have for it alone


def differentiate(
    model: open_clip.CLIP,
    towers: Iterable[str] = TOWERS,
    lambda_init: float | str | list[float] | None = None,
    schedule_base: int = 0,
    kind: str | int = "v1",
    preserve: bool = True,
) -> open_clip.CLIP:
    """Replace, in place, the self-attention of an open_clip model's blocks by differential attention.

    Works on open_clip's own transformers and on timm vision transformers (also SigLIP's; its pooling head
    stays as it is). In "v1" the projections keep their weights as a starting point, but the function changes:
    heads now work in pairs, under a new norm. The other kinds are warm starts: the model computes what it did before,
    and dex goes on doing so until `attention.set_annealing` is told how much of the annealing is done.
    Where the ordinary attention was locked (its `requires_grad` False), what replaces it is locked too. Towers may be
    made differential one after the other, each in its own way.

    Args:
        model: any open_clip CLIP, CustomTextCLIP or CoCa.
        towers: "vision", "text" or both.
        lambda_init: one number for all layers, a list with one for each, or "schedule" for `lambda_init_schedule`;
            None is the kind's default.
        schedule_base: what the schedule counts the first layer as, 0 or 1.
        kind: one of `attention.KINDS`: "v1" is the paper's differential attention, "v2" Microsoft's second, "dex" that
            of Kong et al.; or its number in configs of earlier releases.
        preserve: False draws anew what a warm start would set, for training from scratch.

    Raises:
        InputError: for a tower without blocks that are known here, or with an odd number of heads, or for one that is
            differential already.
    """
    chosen = kind_named(kind)
    if lambda_init is None:
        lambda_init = chosen.default_lambda_init
    towers, replaced = list(towers), []
    for name in towers:
        tower = tower_of(model, name)
        lambda_inits = layer_lambda_inits(lambda_init, schedule_base, len(_self_attention_blocks(tower)))
        replaced += _replacements(tower, lambda_inits, kind, preserve)
    for block, differential in replaced:  # all that is refused has been refused: never one tower without the other
        block.attn = differential
    if config := getattr(model, "model_config", None):  # of our own models
        how = {name: variants.attention(chosen.name, lambda_init, schedule_base) for name in towers}
        options = config["diffclip"]
        options["attention"] = {**options["attention"], **how}
        options["variant"] = variants.variant_name(options["attention"])
    return model


def tower_of(model: open_clip.CLIP, name: str) -> nn.Module:
    """The module that holds the blocks of the "vision" or "text" tower; InputError for another name."""
    if name not in TOWERS:
        raise InputError(f"unknown tower {name!r}: choose {' or '.join(TOWERS)}")
    return model.visual if name == "vision" else getattr(model, "text", None) or model.transformer


def attention_of(model: open_clip.CLIP) -> dict[str, dict[str, Any]]:
    """How each differential tower of a model is so, told from its modules; what a model config holds as "attention"."""
    found = {}
    for name in TOWERS:
        modules = [module for module in tower_of(model, name).modules() if isinstance(module, Differential)]
        if modules:
            values: list[float] = [module.lambda_init for module in modules]
            found[name] = variants.attention(modules[0].name, values[0] if len(set(values)) == 1 else values)
    return found


def layer_lambda_inits(lambda_init: float | str | list[float], schedule_base: int, layers: int) -> list[float]:
    """Return each layer's lambda_init: all the same, those of a list, or the schedule's."""
    if lambda_init == "schedule":
        return [lambda_init_schedule(layer, schedule_base) for layer in range(layers)]
    values = lambda_init if isinstance(lambda_init, list) else [lambda_init] * layers
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise InputError(f"lambda_init must be a number or 'schedule': got {lambda_init!r}") from None


def differentiate_tower(
    tower: nn.Module, lambda_inits: list[float], kind: str | int = "v1", preserve: bool = True
) -> None:
    """Replace, in place, the self-attention of one tower's blocks; one lambda_init per block, in order."""
    for block, attention in _replacements(tower, lambda_inits, kind, preserve):
        block.attn = attention


def _replacements(
    tower: nn.Module, lambda_inits: list[float], kind: str | int, preserve: bool
) -> list[tuple[nn.Module, Differential]]:
    """Return each block of a tower with the attention that is to replace its own; nothing is changed yet."""
    blocks, name, chosen = _self_attention_blocks(tower), type(tower).__name__, kind_named(kind)
    if any(isinstance(block.attn, Differential) for block in blocks):
        raise InputError(f"{name} is differential already: keep its attention, or start from the plain model")
    if blocks and (others := sorted(_attending(tower, blocks))):
        raise InputError(f"{name} attends not only in blocks known here but also by {', '.join(others)}, which is not")
    if not blocks or len(blocks) != len(lambda_inits):
        kinds = sorted({type(module).__name__ for module in tower.modules()})
        others = [each for each in kinds if re.search("attention|attn|block", each.lower())]
        raise InputError(
            f"{name} has {len(blocks)} blocks with self-attention known here, for {len(lambda_inits)} "
            f"values of lambda_init{'; it is made of ' + ', '.join(others) if others and not blocks else ''}"
        )
    return [
        (block, _differential_like(block.attn, lambda_init, chosen, preserve, f"{name}'s block {i}"))
        for i, (block, lambda_init) in enumerate(zip(blocks, lambda_inits))
    ]


def _self_attention_blocks(tower: nn.Module) -> list[nn.Module]:
    kinds = (Block, ResidualAttentionBlock, CustomResidualAttentionBlock)  # and no class made from them
    return [module for module in tower.modules() if type(module) in kinds and not hasattr(module, CROSS_ATTENTION)]


def _attending(module: nn.Module, blocks: list[nn.Module]) -> set[str]:
    """Return the classes in a tower that look like self-attention outside `blocks`; pooling by attention is none."""
    kind = type(module).__name__
    if module in blocks or "pool" in kind.lower() or hasattr(module, CROSS_ATTENTION):
        return set()
    names = [kind, *(name for name, _ in module.named_children())]
    looks = any(re.search("attn|attention|qkv", name.lower()) and "pool" not in name.lower() for name in names)
    return {kind} if looks else set().union(*(_attending(child, blocks) for child in module.children()))


def _differential_like(
    attention: nn.MultiheadAttention | OpenClipAttention | TimmAttention,
    lambda_init: float,
    chosen: type[Differential],
    preserve: bool,
    where: str,
) -> Differential:
    """Return differential attention with an ordinary one's projections, on its device and in its dtype.

    InputError, which begins with `where`, if it has an option that would be lost.
    """
    if refused := _options_without_differential_form(attention):
        raise InputError(f"{where}: attention with {refused} has no differential form here")
    make: Callable[..., Differential] = chosen
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    kept: dict[str, nn.Module | None] = {}
    if isinstance(attention, TimmAttention):
        qkv_weight, qkv_bias, out = attention.qkv.weight, attention.qkv.bias, attention.proj
        dropouts = {"attn_drop": attention.attn_drop.p, "proj_drop": attention.proj_drop.p}
        kept = {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
        kept |= {"inner_norm": attention.norm, "gate": attention.gate}
    else:
        qkv_weight, qkv_bias, out = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
        if isinstance(attention, OpenClipAttention):
            make = called_by(MaskPerHead, chosen)
            dropouts = {"attn_drop": attention.attn_drop.p, "proj_drop": attention.out_drop.p}
            kept = {"q_norm": attention.ln_q, "k_norm": attention.ln_k, "inner_norm": attention.ln_inner}
            if attention.head_scale is not None:  # a factor of each head's output, and so of its values
                qkv_weight, qkv_bias = _with_scaled_values(attention)
        else:
            make = called_by(CalledLikeMultihead, chosen)
            dropouts = {"attn_drop": attention.dropout}
    biases = {"qkv_bias": qkv_bias is not None, "out_bias": out.bias is not None}
    new = make(out.out_features, attention.num_heads, lambda_init=lambda_init, **biases, **dropouts).to(qkv_weight)
    for name, module in kept.items():
        setattr(new, name, module)
    new.start_from(qkv_weight, qkv_bias, out, preserve)
    if not qkv_weight.requires_grad:  # of a locked tower
        new.requires_grad_(False)
    new.out_proj.requires_grad_(out.weight.requires_grad)
    return new.train(attention.training)


def _with_scaled_values(attention: OpenClipAttention) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of queries, keys and values, the latter times `scale_heads`' factors."""
    factors = torch.ones_like(attention.in_proj_weight[:, 0])
    factors[-attention.in_proj_weight.shape[1] :] = attention.head_scale.flatten().repeat_interleave(attention.head_dim)
    bias = attention.in_proj_bias
    return attention.in_proj_weight * factors[:, None], None if bias is None else bias * factors


def _options_without_differential_form(attention: nn.Module) -> str:
    """Return what an ordinary attention has beyond projections, dropout, norms, factors and a gate, or ""."""
    options: dict[str, object]
    if type(attention) is TimmAttention:
        options = {
            "heads of a width other than width / heads": attention.attn_dim != attention.qkv.in_features,
            "an output of another width": attention.proj.out_features != attention.qkv.in_features,
        }
    elif type(attention) is OpenClipAttention:
        options = {
            "scaled_cosine_attn": attention.scaled_cosine,  # with which open_clip 3.3 itself cannot compute
        }
    elif type(attention) is nn.MultiheadAttention:
        options = {
            "add_bias_kv": attention.bias_k is not None,
            "add_zero_attn": attention.add_zero_attn,
            "keys of another width": attention.in_proj_weight is None,
            "the sequence first (batch_first=False)": not attention.batch_first,
        }
    else:
        options = {f"the computation of {type(attention).__module__}.{type(attention).__name__}": True}
    return ", ".join(name for name, here in options.items() if here)


class MaskPerHead(Differential):
    """In front of a kind of attention: takes also masks of (batch * heads, tokens, tokens), of padded captions."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (batch, tokens, dim) for x of that shape; `attn_mask` is additive, (tokens, tokens) or per head."""
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        return super().forward(x, attn_mask, is_causal)

    def __reduce__(self) -> tuple:  # `called_by` makes classes that pickle cannot find by their names
        return _empty, type(self).__bases__, self.__dict__


class CalledLikeMultihead(MaskPerHead):
    """In front of a kind of attention: is called, and answers, like `nn.MultiheadAttention` over one sequence.

    `causal` says that the (tokens, tokens) mask which its tower calls it with is exactly the causal one (the tower's
    model has compared them): then no kernel has to read it.
    """

    causal = False

    def forward(  # type: ignore[override] # as open_clip's blocks call it
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Return ((batch, tokens, dim), None). open_clip's blocks pass the query as key and value too."""
        if self.causal and attn_mask is not None and attn_mask.ndim == 2:
            return super().forward(query, None, True), None
        return super().forward(query, attn_mask), None


_MADE: dict[tuple[type, type], type[Differential]] = {}


def called_by(adapter: type[MaskPerHead], new_kind: type[Differential]) -> type[Differential]:
    """Return a kind of attention with `adapter` in front, for the blocks that call it so; always the same class."""
    made = type(f"{adapter.__name__}{new_kind.__name__}", (adapter, new_kind), {})
    return _MADE.setdefault((adapter, new_kind), made)


def _empty(adapter: type[MaskPerHead], new_kind: type[Differential]) -> Differential:
    made = called_by(adapter, new_kind)
    return made.__new__(made)
