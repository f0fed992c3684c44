"""The dual encoders: open_clip's models, with differential attention where their config says so, under open_clip's
parameter names; the paper's have open_clip's text transformer beside a timm vision transformer of any size.

The variants differ only in which attention modules are replaced. So the baseline's weights are open_clip's own, and
everything made for an open_clip model (losses, benchmarks) takes ours.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffclip.base.backbones import TimmModel, TimmVisionTransformer, build_vision_tower, open_clip
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.graphs import recording, transformed
from diffclip.model_config import check_config
from diffclip.trunk import TRUNK_OPTIONS, vision_trunk
from diffclip.variants import TOWERS, current, named
from diffclip.warm_start import CalledLikeMultihead, differentiate


class DualEncoder(nn.Module):
    """What our models have beyond those of open_clip, which stand behind it in each class.

    `model_config` is the dict it was built from, the content of its open_clip_config.json.
    """

    model_config: dict[str, Any]
    beside: list[Any]  # tokenizer and image processor of transformers that are saved with it; see `checkpoints.save`
    visual: Any
    transformer: Any
    encode_image: Any
    encode_text: Any
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None

    def forward(self, image: Tensor | None = None, text: Tensor | None = None, chunk: int | None = None) -> Any:
        """Return unit-length features of image (batch, 3, H, W) and text (batch, context), exp(logit_scale), and
        logit_bias where the model has one; without `chunk`, whatever the class of open_clip returns.

        With a `chunk` above 0, that many samples are encoded at a time, and once more in the backward pass (gradient
        caching, Gao et al. 2021): the gradients are those of the whole batch, the memory that of a chunk.
        """
        if chunk is None or image is None or text is None:
            return super().forward(image, text)
        encoders = ((self.encode_image, image), (self.encode_text, text))
        features = [
            _in_chunks(encode, batch, chunk) if 0 < chunk < len(batch) else encode(batch, True)
            for encode, batch in encoders
        ]
        return *features, self.logit_scale.exp(), *([] if self.logit_bias is None else [self.logit_bias])


@torch.compiler.disable(recursive=False)  # the encoders are compiled, not the loop
def _in_chunks(encode: Any, batch: Tensor, chunk: int) -> Tensor:
    return torch.cat([checkpoint(encode, part, True, use_reentrant=False) for part in batch.split(chunk)])


class CLIP(DualEncoder, open_clip.CLIP):
    """open_clip's CLIP, whose texts are cut to the longest caption of the batch where they can be."""

    token_embedding: Any  # as in open_clip, of whose modules mypy knows nothing
    positional_embedding: Any
    transformer: Any
    ln_final: Any
    attn_mask: Any
    _mask_seen: tuple | None = None

    @property
    def ends_count_alone(self) -> bool:
        """Whether a text's embedding is read at its end token, and no token sees a later one."""
        own_projection = isinstance(self.text_projection, Tensor)
        return self.text_pool_type == "argmax" and self.attn_mask is not None and own_projection

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Return (batch, embed_dim) for token ids (batch, up to context_length).

        The embedding is read at each row's largest id, its end token. Attention is causal, so the columns
        after the last of these positions cannot matter: they are cut off, except where torch records a graph,
        which wants one length, or transforms the function.
        """
        if not self.ends_count_alone:
            return super().encode_text(text, normalize)
        ends = text.argmax(dim=-1)  # (batch,)
        if not (recording() or transformed()):
            self._recognise_causal_mask()
            if not (text.is_cuda and self.training):  # the device need not be waited for: batches come cut
                text = text[:, : int(ends.max()) + 1]
        tokens = text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype)  # (batch, tokens, width)
        x = x + self.positional_embedding[:tokens].to(dtype)
        x = self.transformer(x, attn_mask=self.attn_mask[:tokens, :tokens])
        # no index of torch.arange(batch): torch.export would write the batch size of its example into the graph
        x = self.ln_final(x.gather(1, ends[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1))  # (batch, width)
        x = x @ self.text_projection
        return F.normalize(x, dim=-1) if normalize else x

    def _recognise_causal_mask(self) -> None:
        """Tell the differential layers whether the mask is exactly the causal one; looked at when it has changed."""
        mask = self.attn_mask
        if mask.is_meta:
            return
        seen = (id(mask), mask.data_ptr(), 0 if mask.is_inference() else mask._version)
        if seen == self._mask_seen:
            return
        self._mask_seen = seen
        causal = torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))
        for block in self.transformer.resblocks:
            if isinstance(block.attn, CalledLikeMultihead):
                block.attn.causal = causal


class CustomTextCLIP(DualEncoder, open_clip.CustomTextCLIP):
    """open_clip's CLIP with a text tower of its own kind, SigLIP among them."""


class CoCa(DualEncoder, open_clip.CoCa):
    """open_clip's CoCa; its caption decoder is carried along, neither trained nor asked here."""


class VisionTower(TimmModel):
    """open_clip's adapter (trunk, then head.proj) around a trunk that is already built."""

    def __init__(self, trunk: TimmVisionTransformer, embed_dim: int | None) -> None:
        """`embed_dim` None leaves the projection out, as SigLIP does."""
        nn.Module.__init__(self)
        self.image_size = trunk.patch_embed.img_size
        self.trunk = trunk
        layers: dict[str, nn.Module] = {}
        if embed_dim is not None:
            layers = {"drop": nn.Dropout(0.0), "proj": nn.Linear(trunk.embed_dim, embed_dim, bias=False)}
        self.head = nn.Sequential(OrderedDict(layers))


def papers(config: dict[str, Any]) -> bool:
    """Whether a model config is of the paper's make, the only one that the official code and `diffclip.hf` know."""
    return "vision_norm_eps" in config["diffclip"] and "trunk" not in config["diffclip"]


def vision_tower(
    embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False, options: dict[str, Any] | None = None
) -> Any:
    """Return a vision tower with fresh weights and ordinary attention: open_clip's, or, where `options` (the "diffclip"
    part of a model config) has `vision_norm_eps`, one of ours.
    """
    options, vision_cfg = options or {}, copy.deepcopy(vision_cfg)
    if "vision_norm_eps" in options:
        more = {key: value for key, value in options.get("trunk", {}).items() if key in TRUNK_OPTIONS}
        trunk = vision_trunk(vision_cfg, options["vision_norm_eps"], **more)
        return VisionTower(trunk, None if vision_cfg.get("timm_proj") == "none" else embed_dim)
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_model_pretrained"] = False  # the weights come with the model, not from elsewhere
    visual = build_vision_tower(embed_dim, vision_cfg, quick_gelu)
    patches = getattr(getattr(visual, "trunk", None), "patch_embed", None)  # of timm's vision transformers
    if getattr(patches, "img_size", None) not in (None, visual.image_size):
        visual.set_input_size(vision_cfg["image_size"])  # open_clip leaves timm's towers at their own size
    return visual


def construct(config: dict[str, Any]) -> DualEncoder:
    """Return the model of a config with open_clip's fresh weights, and ordinary attention throughout."""
    model_cfg = copy.deepcopy(config["model_cfg"])
    vision_cfg, text_cfg = model_cfg.pop("vision_cfg"), model_cfg["text_cfg"]
    if "hf_model_name" in text_cfg:
        text_cfg["hf_model_pretrained"] = False
    kind: type[DualEncoder] = CLIP
    if model_cfg.pop("custom_text", False) or "hf_model_name" in text_cfg:
        kind = CoCa if "multimodal_cfg" in model_cfg else CustomTextCLIP
    # open_clip has no hook for the vision tower: let it make an empty one, and put the right one in its place
    model = kind(vision_cfg={"layers": 0, "width": 8, "head_width": 8, "image_size": 16}, **model_cfg)
    quick_gelu = model_cfg.get("quick_gelu", False)
    model.visual = vision_tower(model_cfg["embed_dim"], vision_cfg, quick_gelu, config["diffclip"])
    return model


def build(name_or_config: str | dict[str, Any], *, init: str = "matched") -> DualEncoder:
    """Return a model with fresh weights.

    Args:
        name_or_config: a name in `variants.MODELS`, or a dict of the same form.
        init: "matched" gives every variant the same starting weights for the same torch seed (truncated
            normal 0.02 and zero biases in the vision blocks, as in timm; open_clip's in the text), with the
            lambda vectors drawn last. "official" is what the official code does: its differential layers keep
            torch's default for Linear where its baseline does not, and the layer norms of its differential
            vision tower have epsilon 1e-5.

    Raises:
        InputError: for an unknown name, a config with missing or unknown keys, numbers out of range, or an impossible
            head count.
    """
    if init not in ("matched", "official"):
        raise InputError(f"init must be 'matched' or 'official': got {init!r}")
    config = named(name_or_config) if isinstance(name_or_config, str) else name_or_config
    check_config(config, "model config")
    config = current(config)
    options = config.setdefault("diffclip", {"variant": "CLIP", "attention": {}, "vision_norm_eps": 1e-6})
    attention = options.setdefault("attention", {})
    own = "vision_norm_eps" in options
    if init == "official" and own and "vision" in attention:
        options["vision_norm_eps"] = 1e-5
    options["init"] = init
    try:
        model = construct(config)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError, RuntimeError) as error:
        reason = in_one_line(error)
        raise InputError(
            f"model config: {type(error).__name__} {reason}; compare with diffclip/configs/ or open_clip's"
        ) from error

    if own and hasattr(model.visual.head, "proj"):
        nn.init.normal_(model.get_parameter("visual.head.proj.weight"), std=model.visual.trunk.embed_dim**-0.5)
    for tower in sorted(attention, key=TOWERS.index):
        differentiate(model, [tower], **attention[tower], preserve=False)
    model.model_config = config
    if init == "official":
        _official_init(model)
    return model


def _official_init(model: DualEncoder) -> None:
    """Redraw what the official code leaves at torch's defaults: vision Linears, and text attention biases."""
    towers = model.model_config["diffclip"]["attention"]
    if "vision" in towers:
        for module in model.visual.trunk.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    if "text" in towers:
        bound = model.transformer.width**-0.5
        for name, parameter in model.transformer.named_parameters():
            if "attn" in name and name.endswith("bias"):
                nn.init.uniform_(parameter, -bound, bound)
