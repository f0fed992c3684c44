"""Vision towers of open_clip, with timm's among them, as transformers models for the Auto classes and for LLaVA.

`vision_tower: open_clip:ViT-B-16@laion2b_s34b_b88k` names one, and so does whatever else `diffclip.sources` knows.
"""

from pathlib import Path
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

from diffclip.base.backbones import OpenClipVisionTransformer
from diffclip.base.errors import InputError
from diffclip.checkpoints import load
from diffclip.hf import DiffCLIPImageProcessor, DiffCLIPVisionModel, image_processor, vision_config
from diffclip.models import papers, vision_tower
from diffclip.warm_start import differentiate_tower, layer_lambda_inits
from mllm.processing import with_mode

OPTIONS = ("vision_norm_eps", "trunk", "attention")  # what the tower needs of a model config's "diffclip" part


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


def tower_of(config: OpenClipVisionConfig) -> Any:
    """The tower of a config, with fresh weights."""
    options = config.options or {}
    visual = vision_tower(config.embed_dim, dict(config.vision_cfg or {}), config.quick_gelu, options)
    if how := options.get("attention", {}).get("vision"):
        layers = config.num_hidden_layers
        values = layer_lambda_inits(how["lambda_init"], how["schedule_base"], layers)
        differentiate_tower(visual, values, how["kind"])
    return visual


@torch.no_grad()
def load_tower(name: str | Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the vision half of any dual encoder that `diffclip.load` reads, and its image processor.

    A tower of the paper's make is a `DiffCLIPVisionModel`, any other an `OpenClipVisionModel`.

    InputError for what that refuses, and for a tower that a saved directory could not give back.
    """
    model, _, _ = load(name)
    config = model.model_config
    if papers(config):
        ours = DiffCLIPVisionModel(vision_config(config))
        ours.trunk.load_state_dict(model.visual.trunk.state_dict())
        return ours.eval(), image_processor(config)
    model_cfg, cfg = config["model_cfg"], config["preprocess_cfg"]
    mode = {"shortest": "crop", "squash": "squash"}.get(cfg.get("resize_mode", "shortest"))
    if mode is None or not isinstance(cfg["size"], int):
        raise InputError(
            f"{name}: prepares images by resize_mode {cfg['resize_mode']} to size {cfg['size']}; only squares that are "
            "cropped or squashed are supported"
        )
    options = {key: config["diffclip"][key] for key in OPTIONS if key in config["diffclip"]}
    tower = wrap(
        model.visual.float().eval(),
        model_cfg["embed_dim"],
        {**model_cfg["vision_cfg"], "image_size": cfg["size"]},
        model_cfg.get("quick_gelu", False),
        options,
    )
    return tower, with_mode(image_processor(config), mode)


@torch.no_grad()
def wrap(
    visual: Any,
    embed_dim: int,
    vision_cfg: dict[str, Any],
    quick_gelu: bool = False,
    options: dict[str, Any] | None = None,
) -> OpenClipVisionModel:
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
    config = OpenClipVisionConfig(
        embed_dim=embed_dim, vision_cfg=vision_cfg, quick_gelu=quick_gelu, options=options, **shape
    )
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
