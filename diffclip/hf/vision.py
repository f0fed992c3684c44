"""The vision tower as a transformers model, for the Auto classes and as the tower of LLaVA.

`DiffCLIPVisionModel.trunk` is the same module, under the same names, as `visual.trunk` of the dual encoder.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffclip.attention import Differential, kind
from diffclip.attention.maps import count_maps, mapped
from diffclip.base.loaded import Whole
from diffclip.base.portable import Portable
from diffclip.base.ranges import check_numbers
from diffclip.base.timm_vit import Block, TimmVisionTransformer, resample_abs_pos_embed
from diffclip.trunk import vision_trunk

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of an attention; what else it has are lambdas


@strict
class DiffCLIPVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """Shape of the vision tower.

    `lambda_init` has one value per layer; None stands for ordinary attention, the CLIP baseline. `attention_version`
    is the kind's number in `attention.KINDS`. `num_attention_maps` follows from them: how many maps each layer has in
    `attentions`, which are fewer than heads where heads work in pairs. With `stop_early`, a call that selects hidden
    states by index computes no block after the last one selected, and gives no last_hidden_state: LLaVA reads
    hidden_states[-2] alone, so its last block is wasted work.
    """

    model_type = "diffclip_vision"
    base_config_key = "vision_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    mlp_ratio: float | int = 4.0
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    lambda_init: list[float] | None = None
    attention_version: str | int = "v1"
    num_attention_maps: int = 0
    stop_early: bool = False
    _out_features: list[str] | None = None  # which hidden states a backbone gives, by name and by index
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_numbers(vars(self), f"configuration of {self.model_type}")  # before a list as long as one of them says
        self.stage_names = ["stem", *(f"stage{layer + 1}" for layer in range(self.num_hidden_layers))]
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)
        differential = None if self.lambda_init is None else kind(self.attention_version)
        self.num_attention_maps = count_maps(self.num_attention_heads, differential)


class TowerBlock(GradientCheckpointingLayer, Block):
    """timm's block, which transformers can have computed once more in the backward pass, and which can give its map."""

    def forward(self, x: Tensor, with_map: bool = False) -> Any:  # type: ignore[override] # less than timm's takes
        """Return (batch, tokens, width) for x of that shape; `with_map` also the map that multiplied the values."""
        if not with_map:
            return super().forward(x)
        attended, map_ = mapped(self.attn, self.norm1(x))  # type: ignore[arg-type] # to mypy any module
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), map_


class DiffCLIPVisionModel(Whole, Portable, PreTrainedModel):
    """A timm vision transformer with a class token, differential or not, answering like CLIPVisionModel."""

    auto_classes: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "diffclip.hf.vision.DiffCLIPVisionConfig",
        "AutoModel": "diffclip.hf.vision.DiffCLIPVisionModel",
        "AutoModelForImageClassification": "diffclip.hf.heads.DiffCLIPVisionForImageClassification",
        "AutoBackbone": "diffclip.hf.heads.DiffCLIPBackbone",
    }
    config_class = DiffCLIPVisionConfig
    base_model_prefix = "vision_model"  # in the dual encoder, from whose directory the tower can be loaded alone
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment] # a tuple, as transformers' own models have
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("TowerBlock",)  # type: ignore[assignment] # the same
    _keys_to_ignore_on_load_unexpected = ("text_model", "_projection", "logit_scale")  # type: ignore[assignment]

    def __init__(self, config: DiffCLIPVisionConfig) -> None:
        super().__init__(config)
        vision_cfg = {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "head_width": config.hidden_size // config.num_attention_heads,
            "mlp_ratio": config.mlp_ratio,
        }
        self.trunk = vision_trunk(vision_cfg, config.layer_norm_eps, TowerBlock)
        if config.lambda_init is not None:
            make: Any = kind(config.attention_version)
            blocks: Any = self.trunk.blocks  # to mypy they are modules of which it knows nothing
            for block, lambda_init in zip(blocks, config.lambda_init, strict=True):
                block.attn = make(config.hidden_size, config.num_attention_heads, lambda_init=lambda_init)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's weights as `diffclip.build(init="matched")` does; loaded ones are left alone."""
        draw_weights(self, module)

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.patch_embed

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Return (batch, 1 + patches, width), the class token and the patches with their positions."""
        trunk, (height, width) = self.trunk, pixel_values.shape[-2:]
        side = self.config.image_size
        if not interpolate_pos_encoding and (height, width) != (side, side):
            raise ValueError(
                f"images are {height} x {width}, but the model takes {side} x {side}: resize them, or give "
                "interpolate_pos_encoding=True"
            )
        positions = trunk.get_parameter("pos_embed")
        patches = trunk.patch_embed.proj(pixel_values.to(positions.dtype))  # (batch, width, rows, columns)
        if interpolate_pos_encoding:
            positions = resample_abs_pos_embed(
                positions, new_size=list(patches.shape[-2:]), old_size=list(trunk.patch_embed.grid_size)
            )
        token = trunk.get_parameter("cls_token").expand(len(patches), -1, -1)
        return torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1) + positions

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | tuple[int, ...] | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images.

        Args:
            pixel_values: (batch, 3, image_size, image_size), normalised.
            output_hidden_states: True for all, or indices (as LLaVA passes) for these alone, None elsewhere.
            output_attentions: also give each layer's map, (batch, num_attention_maps, tokens, tokens): the one that
                multiplies the values in this pass, and so part of the graph; signed for differential attention.
            interpolate_pos_encoding: take images of any size, with positions resampled as timm does it.

        Returns:
            last_hidden_state (batch, 1 + patches, width) after the final norm; pooler_output (batch, width),
            its class token; hidden_states: the embeddings, then each block's output; attentions.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        blocks: Any = self.trunk.blocks
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states or False
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        every, stop = range(len(blocks) + 1), len(blocks)
        if isinstance(output_hidden_states, bool):
            wanted = set(every) if output_hidden_states else set()
        else:
            indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
            wanted = {every[index] for index in indices}
            stop = max(wanted) if self.config.stop_early else stop

        use_form(blocks, self.config._attn_implementation)
        x = self.embed(pixel_values, interpolate_pos_encoding)  # (batch, 1 + patches, width)
        hidden_states: list[Tensor | None] = [x]
        attentions = []
        for block in blocks[:stop]:
            if output_attentions:
                x, map_ = block(x, with_map=True)
                attentions.append(map_)
            else:
                x = block(x)
            hidden_states.append(x)

        last = self.trunk.norm(x) if stop == len(blocks) else None
        hidden_states += [None] * (len(blocks) - stop)
        selected = [state if i in wanted else None for i, state in enumerate(hidden_states)]
        output = BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=None if last is None else last[:, 0],
            hidden_states=tuple(selected) if wanted else None,  # type: ignore[arg-type] # None where not asked for
            attentions=tuple(attentions) if output_attentions else None,
        )
        return answer(output, return_dict, self.config)


def answer(output: Any, return_dict: bool | None, config: PreTrainedConfig) -> Any:
    """Return a model's output as it is, or as the tuple that a call, or else the configuration, asks for."""
    wanted = config.return_dict if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


@torch.no_grad()
def draw_weights(model: nn.Module, module: nn.Module, std: float = 0.02) -> None:
    """Draw the weights of one module of a tower, those of its children excepted: lambdas as their kind does.

    transformers calls this for each module that has weights of its own, and sees to it that those loaded stay.
    """
    if attention := _lambdas_of(model, module):
        attention.reset_lambdas()
    elif isinstance(module, TimmVisionTransformer):
        init.trunc_normal_(module.get_parameter("pos_embed"), std=std)
        init.normal_(module.get_parameter("cls_token"), std=1e-6)
    elif isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.Conv2d)):
        module.reset_parameters()


def _lambdas_of(model: nn.Module, module: nn.Module) -> Differential | None:
    """The attention of which a module is itself, or holds lambdas."""
    for attention in model.modules():
        if isinstance(attention, Differential):
            held = (
                part for name, part in attention.named_children() if not name.endswith(("norm", "_drop", *PROJECTIONS))
            )
            if attention is module or any(part is module for part in held):
                return attention
    return None


def use_form(blocks: Any, implementation: str | None) -> None:
    """Let blocks write their maps out ("eager"), or choose for themselves, as transformers' configs say it."""
    eager = implementation == "eager"
    for block in blocks:
        if isinstance(block.attn, Differential):
            block.attn.attn_implementation = "eager" if eager else "auto"
        elif block.attn.fused_attn == eager:
            block.attn.fused_attn = not eager


AutoConfig.register("diffclip_vision", DiffCLIPVisionConfig, exist_ok=True)
AutoModel.register(DiffCLIPVisionConfig, DiffCLIPVisionModel, exist_ok=True)
