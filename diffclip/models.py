"""The dual encoder: open_clip's text transformer beside a timm vision transformer, under open_clip's parameter names.

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

from diffclip.base.backbones import TimmModel, TimmVisionTransformer, open_clip
from diffclip.base.errors import InputError
from diffclip.trunk import vision_trunk
from diffclip.variants import named
from diffclip.warm_start import differentiate


class CLIP(open_clip.CLIP):
    """open_clip's CLIP with a timm vision tower of any size, and text cut to the batch's longest caption.

    `model_config` is the dict it was built from, the content of its open_clip_config.json.
    """

    def __init__(self, model_config: dict[str, Any]) -> None:
        model_cfg = copy.deepcopy(model_config["model_cfg"])
        vision_cfg = model_cfg.pop("vision_cfg")
        # open_clip has no hook for the vision tower: let it make an empty one, and put ours in its place.
        super().__init__(vision_cfg={"layers": 0, "width": 8, "head_width": 8, "image_size": 16}, **model_cfg)
        trunk = vision_trunk(vision_cfg, model_config["diffclip"]["vision_norm_eps"])
        self.visual = VisionTower(trunk, model_cfg["embed_dim"])
        self.model_config = copy.deepcopy(model_config)

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, chunk: int = 0
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return unit-length features of image (batch, 3, H, W) and text (batch, context), and exp(logit_scale).

        With `chunk`, that many samples are encoded at a time, and once more in the backward pass (gradient caching,
        Gao et al. 2021): the gradients are those of the whole batch, the memory that of a chunk.
        """
        if not chunk or image is None or text is None:
            return super().forward(image, text)
        features = [
            torch.cat([checkpoint(encode, part, True, use_reentrant=False) for part in batch.split(chunk)])
            for encode, batch in ((self.encode_image, image), (self.encode_text, text))
        ]
        return *features, self.logit_scale.exp()

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Return (batch, embed_dim) for token ids (batch, up to context_length).

        The embedding is read at each row's largest id, its end token. Attention is causal, so the columns
        after the last of these positions cannot matter: they are cut off, except in a compiled graph, which
        wants one length.
        """
        ends = text.argmax(dim=-1)  # (batch,)
        if not torch.compiler.is_compiling():
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


class VisionTower(TimmModel):
    """open_clip's adapter (trunk, then head.proj) around a trunk that is already built."""

    def __init__(self, trunk: TimmVisionTransformer, embed_dim: int) -> None:
        nn.Module.__init__(self)
        self.image_size = trunk.patch_embed.img_size
        self.trunk = trunk
        projection = nn.Linear(trunk.embed_dim, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(0.0), proj=projection))


def build(name_or_config: str | dict[str, Any], *, init: str = "matched") -> CLIP:
    """Return a model with fresh weights.

    Args:
        name_or_config: a name in `variants.MODELS`, or a dict of the same form.
        init: "matched" gives every variant the same starting weights for the same torch seed (truncated
            normal 0.02 and zero biases in the vision blocks, as in timm; open_clip's in the text), with the
            lambda vectors drawn last. "official" is what the official code does: its differential layers keep
            torch's default for Linear where its baseline does not, and the layer norms of its differential
            vision tower have epsilon 1e-5.

    Raises:
        InputError: for an unknown name, a config with missing or unknown keys, or an impossible head count.
    """
    if init not in ("matched", "official"):
        raise InputError(f"init must be 'matched' or 'official': got {init!r}")
    config = named(name_or_config) if isinstance(name_or_config, str) else copy.deepcopy(name_or_config)
    options = config.setdefault("diffclip", {"variant": "CLIP", "towers": [], "vision_norm_eps": 1e-6})
    if init == "official" and "vision" in options["towers"]:
        options["vision_norm_eps"] = 1e-5
    options["init"] = init
    try:
        model = CLIP(config)
    except (KeyError, TypeError) as error:
        raise InputError(f"model config: {type(error).__name__} {error}; compare with diffclip/configs/") from error

    nn.init.normal_(model.get_parameter("visual.head.proj.weight"), std=model.visual.trunk.embed_dim**-0.5)
    if options["towers"]:
        version = options.get("version", 1)
        differentiate(model, options["towers"], options["lambda_init"], options["schedule_base"], version, False)
    if init == "official":
        _official_init(model)
    return model


def _official_init(model: CLIP) -> None:
    """Redraw what the official code leaves at torch's defaults: vision Linears, and text attention biases."""
    towers = model.model_config["diffclip"]["towers"]
    if "vision" in towers:
        for module in model.visual.trunk.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    if "text" in towers:
        bound = model.transformer.width**-0.5
        for name, parameter in model.transformer.named_parameters():
            if "attn" in name and name.endswith("bias"):
                nn.init.uniform_(parameter, -bound, bound)
