"""The named models: plain open_clip configs, and the one function that makes a CLIP differential.

A model is open_clip's text transformer beside a timm vision transformer, under open_clip's parameter names;
the variants differ only in which attention modules are replaced. So the baseline's weights are open_clip's
own, and everything made for an open_clip model (losses, benchmarks) takes ours.
"""

# isort: split
import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import regex as re  # open_clip's tokenizer needs its classes of letters and digits
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import transforms as T
from torchvision.transforms.functional import InterpolationMode

from diffclip.attention import DifferentialAttention, lambda_init_schedule
from diffclip.attention_v2 import DifferentialAttentionV2, start_from
from diffclip.base.backbones import (
    Block,
    CustomResidualAttentionBlock,
    OpenClipAttention,
    ResidualAttentionBlock,
    TimmAttention,
    TimmModel,
    TimmVisionTransformer,
    open_clip,
)
from diffclip.base.errors import InputError
from diffclip.base.images import cut_strip, to_rgb

# What is differential in each variant (section 3 and table 1 of the paper); the baseline has nothing. V2 is not the
# paper's: it has Microsoft's second version of differential attention.
VARIANTS: dict[str, dict[str, Any]] = {
    "CLIP": {"towers": []},
    "DiffCLIP": {"towers": ["vision", "text"], "lambda_init": 0.8, "schedule_base": 0},
    "DiffCLIP-star": {"towers": ["vision", "text"], "lambda_init": "schedule", "schedule_base": 0},
    "DiffCLIP-dagger": {"towers": ["vision"], "lambda_init": 0.8, "schedule_base": 0},
    "DiffCLIP-V2": {"towers": ["vision", "text"], "lambda_init": 0.5, "schedule_base": 0, "version": 2},
}
IMAGENET_PREPROCESS: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bilinear",
    "resize_mode": "shortest",
}
SIZES = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


def _named_config(variant: str, size: str) -> dict[str, Any]:
    config = json.loads(SIZES[size].read_text())
    # timm's epsilon for every variant, so that arms trained here differ in nothing but the attention.
    config["diffclip"] = {"variant": variant, **copy.deepcopy(VARIANTS[variant]), "vision_norm_eps": 1e-6}
    return config


MODELS: dict[str, dict[str, Any]] = {
    f"{variant}-{size}": _named_config(variant, size) for size in SIZES for variant in VARIANTS
}


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
        if not chunk:
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


class MaskPerHead:
    """Takes also masks of (batch * heads, tokens, tokens), which open_clip makes where captions are padded."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return (batch, tokens, dim) for x of that shape; `attn_mask` is additive, (tokens, tokens) or per head."""
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        return super().forward(x, attn_mask=attn_mask)


class CalledLikeMultihead(MaskPerHead):
    """Makes an attention module be called, and answer, like `nn.MultiheadAttention` over one sequence."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return ((batch, tokens, dim), None). open_clip's blocks pass the query as key and value too.

        Args:
            query: (batch, tokens, dim).
            attn_mask: additive, (tokens, tokens) or (batch * heads, tokens, tokens).
        """
        return super().forward(query, attn_mask=attn_mask), None


class TextDifferentialAttention(CalledLikeMultihead, DifferentialAttention):
    """The first version, for open_clip's blocks."""


class TextDifferentialAttentionV2(CalledLikeMultihead, DifferentialAttentionV2):
    """The second version, for open_clip's blocks."""


class CustomDifferentialAttention(MaskPerHead, DifferentialAttention):
    """The first version, for open_clip's custom blocks."""


class CustomDifferentialAttentionV2(MaskPerHead, DifferentialAttentionV2):
    """The second version, for open_clip's custom blocks."""


def vision_trunk(vision_cfg: dict[str, Any], norm_eps: float) -> TimmVisionTransformer:
    """Return a timm vision transformer with a class token, pooled at that token after the final norm.

    Args:
        vision_cfg: open_clip's keys: image_size, patch_size, width, layers, head_width, mlp_ratio.
        norm_eps: epsilon of its layer norms: 1e-6 in timm and SLIP, 1e-5 in the official DiffCLIP.
    """
    return TimmVisionTransformer(
        img_size=vision_cfg["image_size"],
        patch_size=vision_cfg["patch_size"],
        embed_dim=vision_cfg["width"],
        depth=vision_cfg["layers"],
        num_heads=vision_cfg["width"] // vision_cfg["head_width"],
        mlp_ratio=vision_cfg["mlp_ratio"],
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        num_classes=0,
    )


def build(name_or_config: str | dict[str, Any], *, init: str = "matched") -> CLIP:
    """Return a model with fresh weights.

    Args:
        name_or_config: a name in `MODELS`, or a dict of the same form.
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
    if isinstance(name_or_config, str):
        if name_or_config not in MODELS:
            raise InputError(f"unknown model {name_or_config!r}: choose one of {', '.join(MODELS)}")
        name_or_config = MODELS[name_or_config]
    config = copy.deepcopy(name_or_config)
    options = config.setdefault("diffclip", {"variant": "CLIP", "towers": [], "vision_norm_eps": 1e-6})
    if init == "official" and "vision" in options["towers"]:
        options["vision_norm_eps"] = 1e-5
    options["init"] = init
    try:
        model = CLIP(config)
    except (KeyError, TypeError) as error:
        raise InputError(f"model config: {type(error).__name__} {error}; compare with diffclip/configs/") from error

    nn.init.normal_(model.visual.head.proj.weight, std=model.visual.trunk.embed_dim**-0.5)
    if options["towers"]:
        version = options.get("version", 1)
        differentiate(model, options["towers"], options["lambda_init"], options["schedule_base"], version, False)
    if init == "official":
        _official_init(model)
    return model


def differentiate(
    model: nn.Module,
    towers: Iterable[str] = ("vision", "text"),
    lambda_init: float | str | None = None,
    schedule_base: int = 0,
    version: int = 1,
    preserve: bool = True,
) -> nn.Module:
    """Replace, in place, the self-attention of an open_clip model's blocks by differential attention.

    Works on open_clip's own transformers and on timm vision transformers (also SigLIP's; its pooling head
    stays as it is). In version 1 the projections keep their weights as a starting point, but the function changes:
    heads now work in pairs, under a new norm. Version 2 is a warm start: the model computes what it did before, and
    its new parameters learn from there.

    Args:
        model: any open_clip CLIP or CustomTextCLIP.
        towers: "vision", "text" or both.
        lambda_init: one number for all layers, or "schedule" for `lambda_init_schedule`; None is 0.8 in version 1,
            0.5 in version 2, where it is where every token's lambda starts.
        schedule_base: what the schedule counts the first layer as, 0 or 1.
        version: 1 for the paper's differential attention, 2 for Microsoft's second (`attention_v2`).
        preserve: version 2 only: False draws its second queries anew, for training from scratch.

    Returns:
        the same model.

    Raises:
        InputError: for a tower without blocks that are known here, or with an odd number of heads, or for a
            model that is differential already.
    """
    if version not in (1, 2):
        raise InputError(f"version of differential attention must be 1 or 2: got {version!r}")
    if lambda_init is None:
        lambda_init = 0.8 if version == 1 else 0.5
    towers, replaced = list(towers), []
    before = model.model_config["diffclip"] if isinstance(model, CLIP) else {"towers": []}
    had = [before.get("lambda_init"), before.get("schedule_base"), before.get("version", 1)]
    if before["towers"] and had != [lambda_init, schedule_base, version]:
        raise InputError(
            f"the {' and '.join(before['towers'])} tower is differential already, and a saved model holds one "
            f"lambda_init, schedule_base and version for all its towers: give {had}"
        )
    for name in towers:
        if name not in ("vision", "text"):
            raise InputError(f"unknown tower {name!r}: choose vision or text")
        tower = model.visual if name == "vision" else getattr(model, "text", None) or model.transformer
        lambda_inits = layer_lambda_inits(lambda_init, schedule_base, len(_self_attention_blocks(tower)))
        replaced += _replacements(tower, lambda_inits, version, preserve)
    for block, attention in replaced:  # all that is refused has been refused: never one tower without the other
        block.attn = attention
    if isinstance(model, CLIP):
        options = model.model_config["diffclip"]
        towers = [name for name in ("vision", "text") if name in (*options["towers"], *towers)]
        options.update(towers=towers, lambda_init=lambda_init, schedule_base=schedule_base)
        if version == 2:
            options["version"] = 2
        options["variant"] = variant_name(options["towers"], lambda_init, version)
    return model


def layer_lambda_inits(lambda_init: float | str, schedule_base: int, layers: int) -> list[float]:
    """Return each layer's lambda_init: all the same, or the schedule's."""
    if lambda_init == "schedule":
        return [lambda_init_schedule(layer, schedule_base) for layer in range(layers)]
    try:
        return [float(lambda_init)] * layers
    except ValueError:
        raise InputError(f"lambda_init must be a number or 'schedule': got {lambda_init!r}") from None


def variant_name(towers: list[str], lambda_init: float | str | None, version: int = 1) -> str:
    """Return the variant's name in `VARIANTS`, or "custom"."""
    for name, options in VARIANTS.items():
        same = options["towers"] == towers and options.get("version", 1) == version
        if same and (not towers or options["lambda_init"] == lambda_init):
            return name
    return "custom"


def differentiate_tower(tower: nn.Module, lambda_inits: list[float], version: int = 1, preserve: bool = True) -> None:
    """Replace, in place, the self-attention of one tower's blocks; one lambda_init per block, in order."""
    for block, attention in _replacements(tower, lambda_inits, version, preserve):
        block.attn = attention


def _replacements(
    tower: nn.Module, lambda_inits: list[float], version: int, preserve: bool
) -> list[tuple[nn.Module, DifferentialAttention | DifferentialAttentionV2]]:
    """Return each block of a tower with the attention that is to replace its own; nothing is changed yet."""
    blocks = _self_attention_blocks(tower)
    if any(isinstance(block.attn, DifferentialAttention | DifferentialAttentionV2) for block in blocks):
        raise InputError(f"{type(tower).__name__} is differential already")
    if not blocks or len(blocks) != len(lambda_inits):
        others = {
            type(m).__name__ for m in tower.modules() if re.search("attention|attn|block", type(m).__name__.lower())
        }
        raise InputError(
            f"{type(tower).__name__} has {len(blocks)} blocks with self-attention known here, for {len(lambda_inits)} "
            f"values of lambda_init{'; it is made of ' + ', '.join(sorted(others)) if others and not blocks else ''}"
        )
    return [
        (block, _differential_like(block.attn, lambda_init, version, preserve, f"{type(tower).__name__}'s block {i}"))
        for i, (block, lambda_init) in enumerate(zip(blocks, lambda_inits))
    ]


def _self_attention_blocks(tower: nn.Module) -> list[nn.Module]:
    kinds = (Block, ResidualAttentionBlock, CustomResidualAttentionBlock)
    blocks = [module for module in tower.modules() if isinstance(module, kinds)]
    return [block for block in blocks if not hasattr(block, "ln_1_kv")]  # which marks cross-attention


def _differential_like(
    attention: nn.MultiheadAttention | OpenClipAttention | TimmAttention,
    lambda_init: float,
    version: int,
    preserve: bool,
    where: str,
) -> DifferentialAttention | DifferentialAttentionV2:
    """Return differential attention with an ordinary one's projections, on its device and in its dtype.

    Raises:
        InputError: it has an option that would be lost; the message begins with `where`.
    """
    if refused := _options_without_differential_form(attention):
        raise InputError(f"{where}: attention with {refused} has no differential form here")
    if isinstance(attention, TimmAttention):
        qkv_weight, qkv_bias, out = attention.qkv.weight, attention.qkv.bias, attention.proj
        kinds = DifferentialAttention, DifferentialAttentionV2
        dropouts = {"attn_drop": attention.attn_drop.p, "proj_drop": attention.proj_drop.p}
        norms = attention.q_norm, attention.k_norm
    else:
        qkv_weight, qkv_bias, out = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj
        if isinstance(attention, OpenClipAttention):
            kinds = CustomDifferentialAttention, CustomDifferentialAttentionV2
            dropouts = {"attn_drop": attention.attn_drop.p, "proj_drop": attention.out_drop.p}
            norms = attention.ln_q, attention.ln_k
        else:
            kinds = TextDifferentialAttention, TextDifferentialAttentionV2
            dropouts, norms = {"attn_drop": attention.dropout}, (nn.Identity(), nn.Identity())
    new = kinds[version - 1](
        out.out_features,
        attention.num_heads,
        lambda_init=lambda_init,
        qkv_bias=qkv_bias is not None,
        out_bias=out.bias is not None,
        **dropouts,
    ).to(qkv_weight)
    new.q_norm, new.k_norm = norms
    if version == 2:
        start_from(new, qkv_weight, qkv_bias, out, preserve)
        return new.train(attention.training)
    with torch.no_grad():
        for projection, weight in zip((new.q_proj, new.k_proj, new.v_proj), qkv_weight.chunk(3)):
            projection.weight.copy_(weight)
        if qkv_bias is not None:
            for projection, bias in zip((new.q_proj, new.k_proj, new.v_proj), qkv_bias.chunk(3)):
                projection.bias.copy_(bias)
        new.out_proj.load_state_dict(out.state_dict())
    return new.train(attention.training)


def _options_without_differential_form(attention: nn.Module) -> str:
    """Return what an ordinary attention has beyond projections, dropout and norms of queries and keys, or ""."""
    if type(attention) is TimmAttention:
        found = {
            "scale_norm (a norm before the output projection)": not isinstance(attention.norm, nn.Identity),
            "gated output": attention.gate is not None,
            "heads of a width other than width / heads": attention.attn_dim != attention.qkv.in_features,
            "an output of another width": attention.proj.out_features != attention.qkv.in_features,
        }
    elif type(attention) is OpenClipAttention:
        found = {
            "scaled_cosine_attn": attention.scaled_cosine,
            "scale_heads": attention.scale_heads,
            "scale_attn_inner (a norm before the output projection)": not isinstance(attention.ln_inner, nn.Identity),
        }
    elif type(attention) is nn.MultiheadAttention:
        found = {
            "add_bias_kv": attention.bias_k is not None,
            "add_zero_attn": attention.add_zero_attn,
            "keys of another width": attention.in_proj_weight is None,
            "the sequence first (batch_first=False)": not attention.batch_first,
        }
    else:
        found = {f"the computation of {type(attention).__module__}.{type(attention).__name__}": True}
    return ", ".join(name for name, here in found.items() if here)


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


def tokenizer(model_config: dict[str, Any], legacy: bool = False) -> Callable[[str | list[str]], Tensor]:
    """Return CLIP's byte-pair tokenizer: str or list of str -> ids (n, context_length), int64, padded with 0.

    A caption that is too long is cut so that it still ends in the end token, at which its embedding is read.
    `legacy` reproduces the tokenizer of SLIP and the official DiffCLIP, which loses that end token.
    """
    kind = LegacyTokenizer if legacy else open_clip.SimpleTokenizer
    return kind(context_length=model_config["model_cfg"]["text_cfg"]["context_length"])


class LegacyTokenizer(open_clip.SimpleTokenizer):
    """SLIP's tokenizer: over-long captions lose their end token, and OpenAI's names mark start and end."""

    def __init__(self, context_length: int) -> None:
        super().__init__(context_length=context_length)
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        pattern = self.pat.pattern
        for old, new in names.items():
            self.encoder[new] = self.encoder.pop(old)
            self.cache[new] = new
            pattern = pattern.replace(old, re.escape(new))
        self.pat = re.compile(pattern, re.IGNORECASE)
        self.decoder = {index: token for token, index in self.encoder.items()}

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Return ids (n, context_length), int64, cut without care for the end token."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), context_length or self.context_length, dtype=torch.long)
        for row, text in zip(ids, texts):
            tokens = [self.sot_token_id, *self.encode(text), self.eot_token_id][: len(row)]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids


def transforms(
    model_config: dict[str, Any], train: bool, crop_scale: tuple[float, float] = (0.5, 1.0), normalized: bool = True
) -> Callable[..., Tensor]:
    """Return the transform from a PIL image to a normalised (3, size, size) float tensor.

    Training: a random crop of `crop_scale` of the area, bilinear, no flip, as in SLIP.
    Otherwise: the shorter side to `size`, bilinear, then the centre.
    With `normalized` False the tensor is uint8, and `normalize` does the rest for a whole batch.
    """
    cfg = model_config["preprocess_cfg"]
    interpolation = InterpolationMode(cfg["interpolation"])
    if train:
        crop = [T.RandomResizedCrop(cfg["size"], scale=crop_scale, interpolation=interpolation)]
    else:
        crop = [cut_strip, T.Resize(cfg["size"], interpolation=interpolation), T.CenterCrop(cfg["size"])]
    last = [T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])] if normalized else [T.PILToTensor()]
    return T.Compose([to_rgb, *crop, *last])


def decoding(transform: T.Compose) -> T.Compose:
    """open_clip's transform with the rules of `diffclip.base.images` in front, for any PIL image and for strips."""
    crops = any(isinstance(step, T.CenterCrop) for step in transform.transforms)
    return T.Compose([to_rgb, *([cut_strip] if crops else []), *transform.transforms])


def normalize(model_config: dict[str, Any], pixels: Tensor) -> Tensor:
    """Return floats for a batch of uint8 pixels (batch, 3, size, size), bit for bit what `transforms` gives one by one.

    Batches travel between processes, and to a device, in a quarter of the bytes.
    """
    cfg = model_config["preprocess_cfg"]
    mean, std = (torch.tensor(cfg[key], device=pixels.device)[:, None, None] for key in ("mean", "std"))
    return pixels.float().div_(255).sub_(mean).div_(std)
