"""The text tower as a transformers model: CLIP's causal transformer, each layer's attention differential or not.

The modules have open_clip's names, so that a dual encoder's weights fit as they are.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from diffclip.attention import Differential, kind
from diffclip.attention.maps import attend, count_maps, mapped
from diffclip.base.loaded import Whole
from diffclip.base.portable import Portable
from diffclip.base.ranges import check_numbers
from diffclip.hf.vision import answer, draw_weights


@strict
class DiffCLIPTextConfig(PreTrainedConfig):
    """Shape of the text tower; `lambda_init`, `attention_version` and `num_attention_maps` as in the vision tower's."""

    model_type = "diffclip_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    lambda_init: list[float] | None = None
    attention_version: str | int = "v1"
    num_attention_maps: int = 0
    bos_token_id: int | None = 49406
    eos_token_id: int | list[int] | None = 49407
    pad_token_id: int | None = 49407

    def __post_init__(self, **kwargs: Any) -> None:
        check_numbers(vars(self), f"configuration of {self.model_type}")
        super().__post_init__(**kwargs)
        differential = None if self.lambda_init is None else kind(self.attention_version)
        self.num_attention_maps = count_maps(self.num_attention_heads, differential)


class TextBlock(GradientCheckpointingLayer):
    """A block of open_clip's text transformer."""

    def __init__(self, config: DiffCLIPTextConfig, layer: int) -> None:
        super().__init__()
        width, heads, hidden = config.hidden_size, config.num_attention_heads, config.intermediate_size
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.attn: Any
        if config.lambda_init is None:
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            make: Any = kind(config.attention_version)
            self.attn = make(width, heads, lambda_init=config.lambda_init[layer])
        act = ACT2FN[config.hidden_act]
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, hidden), gelu=act, c_proj=nn.Linear(hidden, width)))

    def forward(self, x: Tensor, mask: Tensor | None, maps: bool, eager: bool) -> tuple[Tensor, Tensor | None]:
        """Return (batch, tokens, width) for x of that shape, and with `maps` the map that multiplied the values.

        `mask`, broadcastable to (batch, heads, tokens, tokens), is True where to attend; None is causal.
        """
        attended, map_ = None, None
        if isinstance(self.attn, Differential):
            self.attn.attn_implementation = "eager" if eager else "auto"
        options: Any = {"attn_mask": mask, "is_causal": mask is None}
        if maps or (eager and not isinstance(self.attn, Differential)):
            attended, map_ = mapped(self.attn, self.ln_1(x), **options)
        else:
            attended = attend(self.attn, self.ln_1(x), **options)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), map_ if maps else None


class TextTransformer(nn.Module):
    """The blocks, under the name that open_clip gives them."""

    def __init__(self, config: DiffCLIPTextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(config, layer) for layer in range(config.num_hidden_layers))


class DiffCLIPTextModel(Whole, Portable, PreTrainedModel):
    """The text tower without its projection, answering like CLIPTextModel."""

    auto_classes: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "diffclip.hf.text.DiffCLIPTextConfig",
        "AutoModel": "diffclip.hf.text.DiffCLIPTextModel",
    }
    config_class = DiffCLIPTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)  # type: ignore[assignment] # a tuple, as transformers' own models have
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("TextBlock",)  # type: ignore[assignment] # the same
    _keys_to_ignore_on_load_unexpected = ("vision_model", "_projection", "logit_scale")  # type: ignore[assignment]

    def __init__(self, config: DiffCLIPTextConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positional_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        self.transformer = TextTransformer(config)
        self.ln_final = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw one module's weights as open_clip does, with zero biases, and lambdas as their kind does."""
        width, layers = self.config.hidden_size, self.config.num_hidden_layers
        if isinstance(module, DiffCLIPTextModel):
            init.normal_(module.positional_embedding, std=0.01)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.MultiheadAttention):
            init.normal_(module.in_proj_weight, std=width**-0.5)
            init.zeros_(module.in_proj_bias)
        else:
            draw_weights(self, module)
        if stds := [spread for part, spread in self._spreads(width, layers) if part is module]:
            init.normal_(module.get_parameter("weight"), std=stds[0])

    def _spreads(self, width: int, layers: int) -> Iterator[tuple[nn.Module, float]]:
        """What is drawn with a standard deviation of its own."""
        for block in self.transformer.resblocks:
            parts: Any = block
            yield parts.mlp.c_fc, (2 * width) ** -0.5
            yield parts.mlp.c_proj, width**-0.5 * (2 * layers) ** -0.5
            yield parts.attn.out_proj, width**-0.5 * (2 * layers) ** -0.5
            for name in ("q_proj", "k_proj", "v_proj"):
                if isinstance(parts.attn, Differential):
                    yield getattr(parts.attn, name), width**-0.5

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode texts.

        Args:
            input_ids: (batch, tokens), each row with the end token, which has the largest id.
            attention_mask: (batch, tokens), 0 where a token is not to be looked at. Attention is causal, so that what
                stands behind the end token needs none.
            position_ids: (batch, tokens), 0, 1, 2 ... if not given.
            output_attentions: also give each layer's map, (batch, num_attention_maps, tokens, tokens): the one that
                multiplies the values in this pass.

        Returns:
            last_hidden_state (batch, tokens, width) after the final norm; pooler_output (batch, width), at the end
            token; hidden_states: the embeddings, then each block's output; attentions.
        """
        if input_ids is None:
            raise ValueError("You have to specify input_ids")
        states_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        maps_wanted = self.config.output_attentions if output_attentions is None else output_attentions
        tokens, most = input_ids.shape[-1], self.config.max_position_embeddings
        if tokens > most:
            raise ValueError(
                f"texts are {tokens} tokens long, but the model takes {most}: tokenize with truncation=True"
            )
        positions = (
            self.positional_embedding[:tokens] if position_ids is None else self.positional_embedding[position_ids]
        )
        x = self.token_embedding(input_ids) + positions  # (batch, tokens, width)
        mask = None
        if attention_mask is not None:  # each token looks at itself at least, so that no row is empty
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            itself = torch.eye(tokens, dtype=torch.bool, device=x.device)
            mask = (causal & attention_mask[:, None, None].bool()) | itself  # (batch, 1, tokens, tokens)

        states, maps = [x], []
        for block in self.transformer.resblocks:
            x, map_ = block(x, mask, maps=bool(maps_wanted), eager=self.config._attn_implementation == "eager")
            states.append(x)
            maps.append(map_)
        last = self.ln_final(x)
        ends = input_ids.argmax(dim=-1)  # the first of the largest ids
        pooled = last.gather(1, ends[:, None, None].expand(-1, 1, last.shape[-1])).squeeze(1)
        output = BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=tuple(states) if states_wanted else None,
            attentions=tuple(maps) if maps_wanted else None,
        )
        return answer(output, return_dict, self.config)


AutoConfig.register("diffclip_text", DiffCLIPTextConfig, exist_ok=True)
AutoModel.register(DiffCLIPTextConfig, DiffCLIPTextModel, exist_ok=True)
