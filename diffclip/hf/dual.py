"""The dual encoder as a transformers model that answers like CLIPModel."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from diffclip.base.loaded import Whole
from diffclip.base.portable import Portable
from diffclip.hf.images import PROCESSORS
from diffclip.hf.text import DiffCLIPTextConfig, DiffCLIPTextModel
from diffclip.hf.vision import DiffCLIPVisionConfig, DiffCLIPVisionModel, answer


@strict
class DiffCLIPConfig(PreTrainedConfig):
    """Both towers' shapes, and the width that they are projected to."""

    model_type = "diffclip"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": DiffCLIPVisionConfig,
        "text_config": DiffCLIPTextConfig,
    }

    vision_config: dict | DiffCLIPVisionConfig | None = None
    text_config: dict | DiffCLIPTextConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592


AUTO_CLASSES = {
    "AutoConfig": "diffclip.hf.dual.DiffCLIPConfig",
    "AutoModel": "diffclip.hf.dual.DiffCLIPModel",
    "AutoModelForZeroShotImageClassification": "diffclip.hf.dual.DiffCLIPModel",
    "AutoModelForImageClassification": "diffclip.hf.heads.DiffCLIPForImageClassification",
    "AutoBackbone": "diffclip.hf.heads.DiffCLIPBackboneOfDualEncoder",
}


class DiffCLIPModel(Whole, Portable, PreTrainedModel):
    """Vision and text tower with their projections: `diffclip.models.CLIP` under transformers' names."""

    auto_classes = AUTO_CLASSES
    config_class = DiffCLIPConfig
    base_model_prefix = "diffclip"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment] # a tuple, as transformers' own models have
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("TowerBlock", "TextBlock")  # type: ignore[assignment] # the same

    def __init__(self, config: DiffCLIPConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config  # dictionaries have become configurations
        text: Any = config.text_config
        self.vision_model = DiffCLIPVisionModel._from_config(vision)
        self.text_model = DiffCLIPTextModel._from_config(text)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([float(config.logit_scale_init_value)]))  # ZeRO wants no 0-d ones
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what is this class's own; towers draw theirs."""
        if module is self:
            init.constant_(self.logit_scale, float(self.config.logit_scale_init_value))
        elif module in (self.visual_projection, self.text_projection):
            init.normal_(module.get_parameter("weight"), std=module.in_features**-0.5)

    @property
    def trunk(self) -> nn.Module:
        """timm's vision transformer, where the vision tower alone has it."""
        return self.vision_model.trunk

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the vision tower's output for pixels (batch, 3, size, size); pooler_output (batch, projection_dim)."""
        options = {"interpolate_pos_encoding": interpolate_pos_encoding, **kwargs}
        output: Any = self.vision_model(pixel_values, return_dict=True, **options)
        output.pooler_output = self.visual_projection(output.pooler_output)
        return answer(output, return_dict, self.config)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the text tower's output for ids (batch, tokens); pooler_output is (batch, projection_dim)."""
        output: Any = self.text_model(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        output.pooler_output = self.text_projection(output.pooler_output)
        return answer(output, return_dict, self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CLIPOutput | BaseModelOutputWithPooling | tuple:
        """Compare images with texts; with images alone, also as the first argument, answer as the vision tower does.

        Returns:
            image_embeds and text_embeds (batch, projection_dim) of unit length; logits_per_image (images, texts), their
            cosines times exp(logit_scale), and logits_per_text, which is its transpose; with `return_loss`, loss: the
            mean cross-entropy of each image's own text among all, and the reverse; the towers' own outputs.
        """
        if input_ids is not None and input_ids.is_floating_point() and pixel_values is None:
            input_ids, pixel_values = None, input_ids
        if input_ids is None and pixel_values is not None:
            options = {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": return_dict, **kwargs}
            return self.vision_model(pixel_values, **options)
        if input_ids is None or pixel_values is None:
            raise ValueError("You have to specify input_ids and pixel_values")
        options = {**kwargs, "return_dict": True}
        vision: Any = self.get_image_features(pixel_values, interpolate_pos_encoding, **options)
        text: Any = self.get_text_features(input_ids, attention_mask, position_ids, **options)
        image_embeds, text_embeds = (F.normalize(output.pooler_output, dim=-1) for output in (vision, text))
        logits = self.logit_scale.exp().to(image_embeds.device) * image_embeds @ text_embeds.to(image_embeds.device).T
        loss = None
        if return_loss:
            own = torch.arange(len(logits), device=logits.device)
            loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        output = CLIPOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )
        return answer(output, return_dict, self.config)


AutoConfig.register("diffclip", DiffCLIPConfig, exist_ok=True)
AutoModel.register(DiffCLIPConfig, DiffCLIPModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(DiffCLIPConfig, DiffCLIPModel, exist_ok=True)
AutoImageProcessor.register(DiffCLIPConfig, image_processor_classes=PROCESSORS, exist_ok=True)
AutoProcessor.register(DiffCLIPConfig, CLIPProcessor, exist_ok=True)
