"""The vision tower as a transformers model, for the Auto classes and as the tower of LLaVA.

`DiffCLIPVisionModel.trunk` is the same module, under the same names, as `visual.trunk` of the dual encoder.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffclip.attention import Differential
from diffclip.attention_maps import attention_map
from diffclip.base.backbones import TimmVisionTransformer
from diffclip.base.images import cut_strip, to_rgb
from diffclip.models import vision_trunk
from diffclip.warm_start import differentiate_tower, layer_lambda_inits


class DiffCLIPVisionConfig(PreTrainedConfig):
    """Shape of the vision tower.

    `lambda_init` has one value per layer; None stands for ordinary attention, the CLIP baseline. `attention_version`
    is the kind's name in `attention.KINDS`. With `stop_early`, a call that selects hidden states by index computes
    no block after the last one selected, and gives no last_hidden_state: LLaVA reads hidden_states[-2] alone, so its
    last block is wasted work.
    """

    model_type = "diffclip_vision"
    base_config_key = "vision_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4.0
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    lambda_init: list[float] | None = None
    attention_version: str | int = "v1"
    stop_early: bool = False


class DiffCLIPVisionModel(PreTrainedModel):
    """A timm vision transformer with a class token, differential or not, answering like CLIPVisionModel."""

    config_class = DiffCLIPVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment] # a tuple, as transformers' own models have
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("Block",)  # type: ignore[assignment] # the same

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
        self.trunk = vision_trunk(vision_cfg, config.layer_norm_eps)
        if config.lambda_init is not None:
            differentiate_tower(self.trunk, config.lambda_init, config.attention_version)
        if config._attn_implementation == "eager":
            for block in self.trunk.blocks:
                attention: Any = block.attn  # ours asks for the first, timm's for the second
                attention.attn_implementation, attention.fused_attn = "eager", False
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's weights as `diffclip.build(init="matched")` does; loaded ones are left alone."""
        if isinstance(module, TimmVisionTransformer):
            init.trunc_normal_(module.get_parameter("pos_embed"), std=0.02)
            init.normal_(module.get_parameter("cls_token"), std=1e-6)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.Conv2d)):
            module.reset_parameters()
        elif isinstance(module, Differential):
            module.reset_lambdas()

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.patch_embed

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images.

        Args:
            pixel_values: (batch, 3, image_size, image_size), normalised.
            output_hidden_states: True for all, or indices (as LLaVA passes) for these alone, None elsewhere.
            output_attentions: also give each layer's attention map (see `attention_maps.attention_map`).

        Returns:
            last_hidden_state (batch, 1 + patches, width) after the final norm; pooler_output (batch, width),
            its class token; hidden_states: the embeddings, then each block's output; attentions.
        """
        blocks: Any = self.trunk.blocks  # to mypy they are modules of which it knows nothing
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

        x = self.trunk.patch_embed(pixel_values.to(self.trunk.get_parameter("pos_embed").dtype))
        x = self.trunk._pos_embed(x)  # (batch, 1 + patches, width)
        hidden_states: list[Tensor | None] = [x]
        attentions = []
        for block in blocks[:stop]:
            if output_attentions:
                attentions.append(attention_map(block.attn, block.norm1(x)))
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x)
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
        return output.to_tuple() if return_dict is False else output


class DiffCLIPImageProcessor(PilBackend):
    """`diffclip.transforms(config, train=False)` as a transformers image processor: the same pixels."""

    resample = PILImageResampling.BILINEAR
    size: ClassVar = {"shortest_edge": 224}
    crop_size: ClassVar = {"height": 224, "width": 224}
    default_to_square = False
    image_mean: ClassVar = [0.485, 0.456, 0.406]
    image_std: ClassVar = [0.229, 0.224, 0.225]
    do_convert_rgb = True
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Turn a PIL image into (3, height, width) by the rules of `diffclip.base.images`; a strip loses its ends."""
        if isinstance(image, Image):
            image = cut_strip(to_rgb(image)) if self.do_center_crop else to_rgb(image)
        return super().process_image(image, *args, **kwargs)

    def center_crop(  # type: ignore[override] # as transformers' own backend is called
        self, image: np.ndarray, size: Any, **kwargs: Any
    ) -> np.ndarray:
        """Crop (channels, height, width) as torchvision does, which rounds an odd margin differently."""
        return center_crop(torch.from_numpy(image), [size.height, size.width]).numpy()


def vision_config(model_config: dict[str, Any]) -> DiffCLIPVisionConfig:
    """Return the vision tower's part of a model config of `diffclip.models`."""
    vision_cfg, options = model_config["model_cfg"]["vision_cfg"], model_config["diffclip"]
    layers, lambda_init = vision_cfg["layers"], None
    if how := options["attention"].get("vision"):
        lambda_init = layer_lambda_inits(how["lambda_init"], how["schedule_base"], layers)
    return DiffCLIPVisionConfig(
        hidden_size=vision_cfg["width"],
        num_hidden_layers=layers,
        num_attention_heads=vision_cfg["width"] // vision_cfg["head_width"],
        mlp_ratio=vision_cfg["mlp_ratio"],
        image_size=vision_cfg["image_size"],
        patch_size=vision_cfg["patch_size"],
        layer_norm_eps=options["vision_norm_eps"],
        lambda_init=lambda_init,
        attention_version=how["kind"] if how else "v1",
    )


def image_processor(model_config: dict[str, Any]) -> DiffCLIPImageProcessor:
    """Return the processor that does what `transforms(model_config, train=False)` does."""
    cfg = model_config["preprocess_cfg"]
    return DiffCLIPImageProcessor(
        size={"shortest_edge": cfg["size"]},
        crop_size={"height": cfg["size"], "width": cfg["size"]},
        resample=getattr(PILImageResampling, cfg["interpolation"].upper()),
        image_mean=cfg["mean"],
        image_std=cfg["std"],
    )


AutoConfig.register("diffclip_vision", DiffCLIPVisionConfig)
AutoModel.register(DiffCLIPVisionConfig, DiffCLIPVisionModel)
AutoImageProcessor.register(
    DiffCLIPVisionConfig, image_processor_classes=dict.fromkeys(("pil", "torchvision"), DiffCLIPImageProcessor)
)
