"""Vision towers of open_clip, with timm's among them, as a transformers model for the Auto classes and for LLaVA."""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from diffclip.base.backbones import OpenClipVisionTransformer
from diffclip.base.loaded import Whole
from diffclip.base.portable import Portable
from diffclip.hf.images import PROCESSORS
from diffclip.models import vision_tower
from diffclip.warm_start import differentiate_tower, layer_lambda_inits

OPTIONS = ("vision_norm_eps", "trunk", "attention")  # what the tower needs of a model config's "diffclip" part


@strict
class OpenClipVisionConfig(PreTrainedConfig):
    """Shape of the tower: `embed_dim`, `vision_cfg` and `quick_gelu` are open_clip's own, `options` ours (`OPTIONS`).

    image_size and patch_size are pixels; for a convolutional tower patch_size is the stride of its last layer, and
    hidden_size the width of that layer. With `stop_early`, blocks after the last hidden state asked for are not
    computed, as in `DiffCLIPVisionConfig`.
    """

    model_type = "open_clip_vision"
    base_config_key = "vision_config"

    embed_dim: int = 512
    vision_cfg: dict[str, Any] | None = None  # never None in a tower
    options: dict[str, Any] | None = None
    quick_gelu: bool = False
    hidden_size: int = 768
    image_size: int = 224
    patch_size: int = 16
    num_hidden_layers: int = 12
    stop_early: bool = False


def tower_of(config: OpenClipVisionConfig) -> Any:
    """The tower of a config, with fresh weights."""
    options = config.options or {}
    visual = vision_tower(config.embed_dim, dict(config.vision_cfg or {}), config.quick_gelu, options)
    if how := options.get("attention", {}).get("vision"):
        values = layer_lambda_inits(how["lambda_init"], how["schedule_base"], config.num_hidden_layers)
        differentiate_tower(visual, values, how["kind"])
    return visual


AUTO_CLASSES = {  # what a directory of this tower needs open_clip for
    "AutoConfig": "diffclip.hf.open_clip_vision.OpenClipVisionConfig",
    "AutoModel": "diffclip.hf.open_clip_vision.OpenClipVisionModel",
}


class OpenClipVisionModel(Whole, Portable, PreTrainedModel):
    """A vision tower as open_clip builds it; `visual` holds its weights under open_clip's names."""

    auto_classes = AUTO_CLASSES
    config_class = OpenClipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment] # as transformers' own models say it
    supports_gradient_checkpointing = True

    def __init__(self, config: OpenClipVisionConfig, visual: nn.Module | None = None) -> None:
        """`visual` is the tower itself, where it is already there."""
        super().__init__(config)
        # Any: the towers of open_clip and timm share methods, but no class that declares them
        self.visual: Any = visual or tower_of(config)
        for module in self.visual.modules():  # transformers builds on the meta device, where what EVA's towers compute
            module._non_persistent_buffers_set.clear()  # of their own would be lost: it is saved with the weights
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave what open_clip drew; `load_strictly` lets no weight be missing."""

    def get_input_embeddings(self) -> nn.Module:
        return next(m for m in self.visual.modules() if isinstance(m, nn.Conv2d))

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple:
        """Encode images.

        Args:
            pixel_values: (batch, 3, image_size, image_size), normalised.
            output_hidden_states: True for all, or indices (as LLaVA passes) for these alone, None elsewhere.

        Returns:
            last_hidden_state (batch, tokens, width) of the last block, without the final norm; hidden_states: None (no
            embeddings are given), then each block's output with the class token, where there is one, in front. A
            convolutional tower has stages instead of blocks, whose cells are the tokens, and behind them the features
            that its head would pool.
        """
        count = self.config.num_hidden_layers
        if isinstance(output_hidden_states, bool) or output_hidden_states is None:
            wanted = set(range(1, count + 1)) if output_hidden_states else {count}
        else:
            indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
            wanted = {range(count + 1)[index] for index in indices}
        if 0 in wanted:
            raise ValueError("open_clip gives no embeddings: hidden state 0 is not there, use 1 or more, or count back")
        if hasattr(self.visual, "set_grad_checkpointing"):
            self.visual.set_grad_checkpointing(self.gradient_checkpointing and self.training)
        last = max(wanted) if self.config.stop_early else count
        outputs = self._states(pixel_values.to(next(self.visual.parameters()).dtype), last)
        states: list[Any] = [outputs.get(i) if i in wanted else None for i in range(count + 1)]
        output = BaseModelOutput(last_hidden_state=outputs.get(count), hidden_states=tuple(states))
        return output.to_tuple() if return_dict is False else output

    def _states(self, pixels: Tensor, last: int) -> dict[int, Tensor]:
        """Outputs of blocks or stages 1 to `last`, each (batch, tokens, width)."""
        count = self.config.num_hidden_layers
        if has_tokens(self.visual):
            options = {"stop_early": True, "intermediates_only": True, "output_fmt": "NLC", "output_extra_tokens": True}
            results = self.visual.forward_intermediates(pixels, indices=list(range(last)), **options)
            states = results["image_intermediates"]
            if "image_intermediates_prefix" in results:
                states = [torch.cat(both, dim=1) for both in zip(results["image_intermediates_prefix"], states)]
        else:
            maps = stages(self.visual, pixels, min(last, count - 1), final=last == count)
            states = [stage.flatten(2).transpose(1, 2) for stage in maps]
        return dict(enumerate(states, 1))


def has_tokens(visual: Any) -> bool:
    """Whether it is a transformer; otherwise its features are maps of stages."""
    return isinstance(visual, OpenClipVisionTransformer) or hasattr(getattr(visual, "trunk", None), "num_prefix_tokens")


def stages(visual: Any, pixels: Tensor, first: int | None, final: bool) -> list[Tensor]:
    """(batch, width, rows, columns) maps of a convolutional tower's first or all stages, and of what its head pools."""
    indices = None if first is None else list(range(first))
    if hasattr(visual, "trunk"):
        if not final:
            return visual.trunk.forward_intermediates(pixels, indices=indices, stop_early=True, intermediates_only=True)
        last, maps = visual.trunk.forward_intermediates(pixels, indices=indices)
        return [*maps, last]
    maps = visual.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
    return [*maps, maps[-1]] if final else maps[:first]


AutoConfig.register(OpenClipVisionConfig.model_type, OpenClipVisionConfig, exist_ok=True)
AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel, exist_ok=True)
AutoImageProcessor.register(OpenClipVisionConfig, image_processor_classes=PROCESSORS, exist_ok=True)
