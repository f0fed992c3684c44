"""The vision tower as an image classifier, and as a backbone of transformers' detectors and segmenters."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from diffclip.base.loaded import Whole
from diffclip.base.portable import Portable
from diffclip.hf.dual import AUTO_CLASSES, DiffCLIPConfig
from diffclip.hf.vision import DiffCLIPVisionConfig, DiffCLIPVisionModel, answer


class DiffCLIPForImageClassification(Whole, Portable, PreTrainedModel):
    """A linear layer on the tower's class token; from a dual encoder's directory it takes the tower alone."""

    auto_classes: ClassVar[Mapping[str, str]] = AUTO_CLASSES
    new_parts = ("classifier",)
    config_class: Any = DiffCLIPConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment] # a tuple, as transformers' own models have
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("TowerBlock",)  # type: ignore[assignment] # the same
    _keys_to_ignore_on_load_unexpected = ("text_model", "_projection", "logit_scale")  # type: ignore[assignment]

    def __init__(self, config: DiffCLIPConfig | DiffCLIPVisionConfig) -> None:
        super().__init__(config)
        vision: Any = getattr(config, "vision_config", config)
        self.vision_model = DiffCLIPVisionModel._from_config(vision)
        self.classifier = nn.Linear(vision.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # of the tower's it draws its own
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Return logits (batch, num_labels), hidden_states and attentions; with labels (batch,) the loss."""
        options = {"interpolate_pos_encoding": interpolate_pos_encoding, "return_dict": True, **kwargs}
        output: Any = self.vision_model(pixel_values, **options)
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        result = ImageClassifierOutput(loss, logits, output.hidden_states, output.attentions)
        return answer(result, return_dict, self.config)


class DiffCLIPVisionForImageClassification(DiffCLIPForImageClassification):
    """The same for a tower that was saved alone."""

    auto_classes = DiffCLIPVisionModel.auto_classes
    config_class = DiffCLIPVisionConfig
    base_model_prefix = "vision_model"


class DiffCLIPBackbone(BackboneMixin, DiffCLIPVisionModel):
    """The tower whose blocks' outputs are maps of features: "stem", the embeddings, then "stage1" and so on."""

    def __init__(self, config: DiffCLIPVisionConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    def forward(  # type: ignore[override] # another output, as transformers' backbones have
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """Return feature_maps, each (batch, width, rows, columns), of the stages in `config.out_features`.

        They are what leaves a block, before the final norm. Images may have any size.
        """
        states_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        options: Any = {"output_attentions": output_attentions, "interpolate_pos_encoding": interpolate_pos_encoding}
        output: Any = DiffCLIPVisionModel.forward(self, pixel_values, True, return_dict=True, **options)
        rows, columns = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        chosen = [output.hidden_states[self.stage_names.index(name)] for name in self.out_features]
        result = BackboneOutput(
            feature_maps=tuple(s[:, 1:].transpose(1, 2).unflatten(2, (rows, columns)) for s in chosen),
            hidden_states=output.hidden_states if states_wanted else None,
            attentions=output.attentions,
        )
        return answer(result, return_dict, self.config)


class DiffCLIPBackboneOfDualEncoder(DiffCLIPBackbone):
    """The same from a dual encoder's directory."""

    config_class = DiffCLIPConfig  # type: ignore[assignment]

    def __init__(
        self,
        config: DiffCLIPConfig,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        vision: Any = config.vision_config
        if out_features or out_indices:
            vision.set_output_features_output_indices(
                out_features and list(out_features), out_indices and list(out_indices)
            )
        super().__init__(vision)


AutoModelForImageClassification.register(DiffCLIPConfig, DiffCLIPForImageClassification, exist_ok=True)
AutoModelForImageClassification.register(DiffCLIPVisionConfig, DiffCLIPVisionForImageClassification, exist_ok=True)
AutoBackbone.register(DiffCLIPConfig, DiffCLIPBackboneOfDualEncoder, exist_ok=True)
AutoBackbone.register(DiffCLIPVisionConfig, DiffCLIPBackbone, exist_ok=True)
