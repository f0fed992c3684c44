"""Vision towers of open_clip, with timm's among them, as transformers models for the Auto classes and for LLaVA.

`vision_tower: open_clip:ViT-B-16@laion2b_s34b_b88k` names one: an architecture of open_clip and a pretrained tag or
file of weights; or `open_clip:hf-hub:ORG/NAME`, `open_clip:local-dir:FOLDER`, which carry their weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from diffclip.base.backbones import (
    OpenClipVisionTransformer,
    QuickGELU,
    build_vision_tower,
    get_model_config,
    open_clip,
)
from diffclip.base.errors import InputError
from diffclip.hf import DiffCLIPImageProcessor, image_processor
from diffclip.weights import refuse_foreign_code
from mllm.processing import with_mode

PREFIX = "open_clip:"


class OpenClipVisionConfig(PreTrainedConfig):
    """Shape of the tower: `embed_dim`, `vision_cfg` and `quick_gelu` are open_clip's own.

    image_size and patch_size are pixels; for a convolutional tower patch_size is the stride of its last layer, and
    hidden_size the width of that layer. With `stop_early`, blocks after the last hidden state asked for are not
    computed, as in `DiffCLIPVisionConfig`.
    """

    model_type = "open_clip_vision"
    base_config_key = "vision_config"

    embed_dim: int = 512
    vision_cfg: dict[str, Any] | None = None  # never None in a tower
    quick_gelu: bool = False
    hidden_size: int = 768
    image_size: int = 224
    patch_size: int = 16
    num_hidden_layers: int = 12
    stop_early: bool = False


class OpenClipVisionModel(PreTrainedModel):
    """A vision tower as open_clip builds it; `visual` holds its weights under open_clip's names."""

    config_class = OpenClipVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment] # as transformers' own models say it
    supports_gradient_checkpointing = True

    def __init__(self, config: OpenClipVisionConfig, visual: nn.Module | None = None) -> None:
        """`visual` is the tower itself, where it is already there."""
        super().__init__(config)
        # Any: the towers of open_clip and timm share methods, but no class that declares them
        self.visual: Any = visual or build_vision_tower(
            config.embed_dim, dict(config.vision_cfg or {}), config.quick_gelu
        )
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
        if _has_tokens(self.visual):
            options = {"stop_early": True, "intermediates_only": True, "output_fmt": "NLC", "output_extra_tokens": True}
            results = self.visual.forward_intermediates(pixels, indices=list(range(last)), **options)
            states = results["image_intermediates"]
            if "image_intermediates_prefix" in results:
                states = [torch.cat(both, dim=1) for both in zip(results["image_intermediates_prefix"], states)]
        else:
            maps = _stages(self.visual, pixels, min(last, count - 1), final=last == count)
            states = [stage.flatten(2).transpose(1, 2) for stage in maps]
        return dict(enumerate(states, 1))


@torch.no_grad()
def from_open_clip(name: str) -> tuple[OpenClipVisionModel, BaseImageProcessor]:
    """Load the vision half of an open_clip model and its image processor.

    Args:
        name: "open_clip:ARCHITECTURE@PRETRAINED" with a tag or a file, or "open_clip:hf-hub:ORG/NAME" or
            "open_clip:local-dir:FOLDER".

    Raises:
        InputError: open_clip cannot load it, or it is a tower that a saved directory could not give back.
    """
    architecture, _, pretrained = name.removeprefix(PREFIX).partition("@")
    if not pretrained and not architecture.startswith(("hf-hub:", "local-dir:")):
        raise InputError(f"{name}: names no weights; write {PREFIX}{architecture}@TAG or @FILE")
    try:
        config = get_model_config(architecture)
        if config is not None:  # if it is, open_clip says which names it knows
            refuse_foreign_code(config, name)
        model = open_clip.create_model(architecture, pretrained=pretrained or None, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # open_clip raises whatever its loaders do
        raise InputError(f"{name}: open_clip cannot load it ({' '.join(str(error).split())[:300]})") from None
    cfg = open_clip.get_model_preprocess_cfg(model)
    mode = {"shortest": "crop", "squash": "squash"}.get(cfg["resize_mode"])
    if mode is None:
        raise InputError(f"{name}: prepares images by resize_mode {cfg['resize_mode']}, which is not supported")
    side = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    visual = model.visual.float().eval()
    quick_gelu = any(isinstance(module, QuickGELU) for module in visual.modules())  # a tag may have decided it
    vision_cfg = {**config["vision_cfg"], "image_size": side, "timm_model_pretrained": False}
    tower = wrap(visual, config["embed_dim"], vision_cfg, quick_gelu)
    return tower, with_mode(image_processor({"preprocess_cfg": {**cfg, "size": side}}), mode)


@torch.no_grad()
def wrap(visual: Any, embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False) -> OpenClipVisionModel:
    """Make a transformers model of an open_clip tower, having proved that its configuration gives the same tower back.

    Raises:
        InputError: it does not.
    """
    side = vision_cfg["image_size"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    if _has_tokens(visual):
        trunk = getattr(visual, "trunk", visual)
        states = visual.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"]
        count = len(trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks)
    else:
        states = _stages(visual, pixels, None, final=True)
        count = len(states)
    _, width, rows, _ = states[-1].shape
    shape = {"hidden_size": width, "image_size": side, "patch_size": side // rows, "num_hidden_layers": count}
    config = OpenClipVisionConfig(embed_dim=embed_dim, vision_cfg=vision_cfg, quick_gelu=quick_gelu, **shape)
    tower, again = OpenClipVisionModel(config, visual).eval(), OpenClipVisionModel(config).eval()
    again.load_state_dict(tower.state_dict())
    if not torch.equal(tower(pixels).last_hidden_state, again(pixels).last_hidden_state):
        raise InputError("this open_clip tower is not the one that its configuration describes; it cannot be saved")
    return tower


def _has_tokens(visual: Any) -> bool:
    """Whether it is a transformer; otherwise its features are maps of stages."""
    return isinstance(visual, OpenClipVisionTransformer) or hasattr(getattr(visual, "trunk", None), "num_prefix_tokens")


def _stages(visual: Any, pixels: Tensor, first: int | None, final: bool) -> list[Tensor]:
    """(batch, width, rows, columns) maps of a convolutional tower's first or all stages, and of what its head pools."""
    indices = None if first is None else list(range(first))
    if hasattr(visual, "trunk"):
        if not final:
            return visual.trunk.forward_intermediates(pixels, indices=indices, stop_early=True, intermediates_only=True)
        last, maps = visual.trunk.forward_intermediates(pixels, indices=indices)
        return [*maps, last]
    maps = visual.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
    return [*maps, maps[-1]] if final else maps[:first]


AutoConfig.register(OpenClipVisionConfig.model_type, OpenClipVisionConfig)
AutoModel.register(OpenClipVisionConfig, OpenClipVisionModel)
AutoImageProcessor.register(
    OpenClipVisionConfig, image_processor_classes={"pil": DiffCLIPImageProcessor, "torchvision": DiffCLIPImageProcessor}
)
