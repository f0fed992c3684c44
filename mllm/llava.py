"""The network: vision tower, one linear layer, language model, on transformers' own LLaVA classes.

In training, logits are computed for supervised positions only. Importing the module registers it for the Auto classes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Cache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.utils import can_return_tuple

from diffclip.base.errors import InputError
from diffclip.base.loaded import Whole
from diffclip.base.portable import Portable
from diffclip.hf.vision import DiffCLIPVisionConfig  # noqa: F401 - importing it registers the tower
from mllm.conversation import IGNORE, NoSupervisionError

# stands where LLaVA's projector names its activation: transformers' own classes, which would put a random projector in
# the place of the linear one and only warn, raise a KeyError that says this
NOT_PLAIN_LLAVA = (
    "a single linear layer, which transformers' own Llava classes do not have: `import diffclip` (of diffclip-stack), "
    "then load this model with AutoModelForImageTextToText; or give that trust_remote_code=True"
)


@strict
class DiffCLIPLlavaConfig(LlavaConfig):
    """LLaVA's configuration, and what the conversations look like that the model was trained on."""

    model_type = "diffclip_llava"

    projector: Literal["linear", "mlp"] = "linear"
    conversation_template: str = "vicuna"
    own_logits: bool = True  # the fingerprints of earlier versions, which left out how logits are scaled, lack it

    if TYPE_CHECKING:  # what may be given as dictionaries has become configurations in __post_init__
        vision_config: PreTrainedConfig
        text_config: PreTrainedConfig

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.projector == "linear":
            self.projector_hidden_act = NOT_PLAIN_LLAVA


class PortableLlava(Whole, Portable):
    """What a directory with a multimodal model says of its classes, and copies of what code it holds."""

    config: DiffCLIPLlavaConfig

    def portable_classes(self) -> dict[str, str]:
        tower = self.config.vision_config.model_type
        module = "mllm.llava_open_clip" if tower == "open_clip_vision" else "mllm.llava"
        return {
            "AutoConfig": f"{module}.DiffCLIPLlavaConfig",
            "AutoModel": f"{module}.DiffCLIPLlavaModel",
            "AutoModelForImageTextToText": f"{module}.DiffCLIPLlavaForConditionalGeneration",
        }


class DiffCLIPLlavaModel(PortableLlava, LlavaModel):
    """`LlavaModel` whose projector is a single linear layer (or LLaVA-1.5's two, with `projector="mlp"`)."""

    config: DiffCLIPLlavaConfig

    def __init__(self, config: DiffCLIPLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # LlavaModel's would build its own projector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.projector == "linear":
            layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
            width, text = layers * config.vision_config.hidden_size, config.text_config
            self.multi_modal_projector = nn.Linear(width, text.hidden_size)  # type: ignore[assignment]
        else:
            self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As transformers', except that a training step on text alone encodes a black image, and adds nothing of it.

        All ranks then run all parts in one order: DDP waits for every gradient, ZeRO-3 gathers weights part by part.
        """
        if self.training and pixel_values is None and inputs_embeds is None:
            size = self.config.vision_config.image_size
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            black = torch.zeros(1, 3, height, width, device=inputs_embeds.device, dtype=inputs_embeds.dtype)
            features = torch.cat(self.get_image_features(black, return_dict=True).pooler_output)
            input_ids, inputs_embeds = None, inputs_embeds + 0.0 * features.sum()
        return super().forward(input_ids, pixel_values, inputs_embeds=inputs_embeds, **kwargs)


@dataclass
class _Hidden(BaseModelOutputWithPast):
    """Hidden states as the layers of any language model return them; all else that a head may ask for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _pass_through(*args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Hidden:
    return _Hidden(last_hidden_state=inputs_embeds)


def own_head(config: PreTrainedConfig) -> tuple[PreTrainedModel, str, str]:
    """A language model without weights that does to hidden states what its class does behind its layers.

    Called with inputs_embeds it takes them for what the layers gave, so that nothing of it is written here again.

    Returns:
        the model, the name of its output layer, the name of the input embeddings in its layers.

    Raises:
        InputError: the class is not made of embeddings, layers and one linear layer behind them.
    """
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    layers, head = lm.base_model, lm.get_output_embeddings()
    heads = [name for name, module in lm.named_children() if module is head]
    others = [module for module in lm.children() if module is not layers and module is not head]
    try:
        words = layers.get_input_embeddings()
    except NotImplementedError:
        words = None
    embeddings = [name for name, module in layers.named_modules() if module is words]
    plain = heads and embeddings and isinstance(head, nn.Linear) and layers is not lm and hasattr(config, "hidden_size")
    if not plain or any(list(module.parameters()) for module in others):
        raise InputError(
            f"language models of class {type(lm).__name__} cannot be used, which are not made of embeddings, layers "
            "and one linear layer behind them; use another, e.g. of Qwen2, Llama or Gemma"
        )
    owner = layers.get_submodule(embeddings[0].rpartition(".")[0])  # OPT calls this part of its layers
    layers.forward = owner.forward = _pass_through
    return lm, heads[0], embeddings[0]


class DiffCLIPLlavaForConditionalGeneration(PortableLlava, LlavaForConditionalGeneration):
    """LLaVA for training and generation; see `forward` for how it differs from transformers' class."""

    config: DiffCLIPLlavaConfig
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch: the loss is a mean over tokens, not batches

    if TYPE_CHECKING:  # as transformers declares them, they cannot be called on an instance

        def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...  # type: ignore[override]
        def to(self, *args: Any, **kwargs: Any) -> "DiffCLIPLlavaForConditionalGeneration": ...  # type: ignore[override]

    def __init__(self, config: DiffCLIPLlavaConfig) -> None:
        head, name, embeddings = own_head(config.text_config)
        # transformers' LLaVA knows only the name that Llama gives to its embeddings
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{embeddings}.weight"}
        LlavaPreTrainedModel.__init__(self, config)
        self.model = DiffCLIPLlavaModel(config)
        biased = getattr(head, name).bias is not None
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=biased)
        self._own_head = (head, name)  # in a tuple, so as not to be a part: its only weights are those of `lm_head`
        self.post_init()

    def initialize_weights(self) -> None:
        """As transformers', except that the language model starts as a class of theirs, not as a part of ours.

        Of foreign classes modules without weights are passed over, in which Falcon-H1 computes what it does not save.
        """
        self.model.language_model.initialize_weights()
        super().initialize_weights()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocabulary) logits of hidden states (..., width), as the language model's own forward computes them.

        Some scale or cap what `lm_head` gives (Granite, Cohere, Gemma-2), or scale what it takes (MiniCPM-3).
        """
        head, name = self._own_head
        if getattr(head, name) is not self.lm_head:
            setattr(head, name, self.lm_head)
        logits = head(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    @torch.no_grad()
    def scales_logits(self) -> bool:
        """Whether the logits are something else than what the output layer gives."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, self.lm_head.in_features, generator=generator).to(self.lm_head.weight)
        return not torch.allclose(self.logits(hidden).float(), self.lm_head(hidden).float(), rtol=1e-3, atol=1e-3)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """As transformers' LLaVA, except that a training step computes no logits that carry no loss.

        Args:
            input_ids: (batch, tokens) int64, with one `<image>` placeholder per image feature.
            pixel_values: (images, 3, height, width), or None for text alone.
            attention_mask: (batch, tokens), 1 where there is a token.
            labels: (batch, tokens) int64, -100 where nothing is learnt.
            shift_labels: the same moved by one, each where its logits are, instead of labels.
            num_items_in_batch: supervised tokens of the whole optimiser step; the loss is the sum of the
                cross-entropies over it, or their mean where it is None.

        Returns:
            `loss` and, outside training or without labels, `logits` (batch, tokens, vocabulary).

        Raises:
            NoSupervisionError: an example has no supervised token.
            ValueError: placeholders and image features differ in number.
        """
        inputs = {"input_ids": input_ids, "pixel_values": pixel_values, "inputs_embeds": inputs_embeds, **kwargs}
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        targets: torch.Tensor | None = shift_labels
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position t predicts token t + 1
        if targets is not None:
            supervised = targets != IGNORE  # (batch, tokens)
            if empty := (~supervised.any(1)).nonzero().flatten().tolist():
                raise NoSupervisionError(
                    f"examples {empty} of this batch of {len(targets)} have no supervised token: "
                    "wrong template for this tokenizer, or answers cut off"
                )
        scaling = {"vocab_size": self.config.text_config.vocab_size, "num_items_in_batch": num_items_in_batch}
        if targets is not None and self.training:
            # no cache: it would cost memory, and transformers takes packed examples for one text when there is one
            outputs = self.model(**{**inputs, "use_cache": False})
            loss = self.loss_function(
                logits=self.logits(outputs.last_hidden_state[supervised]),  # (supervised tokens, vocabulary)
                labels=None,
                shift_labels=targets[supervised],
                **scaling,
            )
            return LlavaCausalLMOutputWithPast(loss=loss)
        outputs = self.model(**inputs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.logits(outputs.last_hidden_state[:, keep]), None
        if targets is not None:
            loss = self.loss_function(logits=logits, labels=None, shift_labels=targets, **scaling)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def train(self, mode: bool = True) -> "DiffCLIPLlavaForConditionalGeneration":
        """Set training mode, except that a frozen vision tower stays in evaluation mode."""
        super().train(mode)
        tower = self.model.vision_tower
        if not any(p.requires_grad for p in tower.parameters()):
            tower.eval()
        return self


AutoConfig.register(DiffCLIPLlavaConfig.model_type, DiffCLIPLlavaConfig, exist_ok=True)
AutoModel.register(DiffCLIPLlavaConfig, DiffCLIPLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(DiffCLIPLlavaConfig, DiffCLIPLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(DiffCLIPLlavaConfig, LlavaProcessor, exist_ok=True)
