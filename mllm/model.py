"""The multimodal model: vision tower, one linear layer, language model, on transformers' own LLaVA classes.

Assembling and loading are strict: keys are checked, and fingerprints prove that every part holds the weights
it was given. In training, logits are computed for supervised positions only.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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

import diffclip.hf  # noqa: F401 - registers the DiffCLIP vision tower for AutoModel
import mllm.open_clip_tower  # noqa: F401 - registers open_clip's
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, write_json
from diffclip.base.fingerprint import fingerprint
from mllm.conversation import IGNORE, NoSupervisionError

PARTS = ("vision_tower", "projector", "language_model")
FINGERPRINTS = "fingerprints.json"  # beside the weights, written last
# settings that change what the same weights compute
TRAINED_WITH = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "conversation_template",
    "projector",
    "own_logits",
)
# settings that say only where a model comes from
ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype")
# stands where LLaVA's projector names its activation: transformers' own classes, which would put a random projector in
# the place of the linear one and only warn, raise a KeyError that says this
NOT_PLAIN_LLAVA = (
    "a single linear layer, which transformers' own Llava classes do not have: `import diffclip`, then load this model "
    "with AutoModelForImageTextToText"
)


class WeightsError(RuntimeError):
    """A part does not hold the weights it should."""


@strict
class DiffCLIPLlavaConfig(LlavaConfig):
    """LLaVA's configuration, and what the conversations look like that the model was trained on."""

    model_type = "diffclip_llava"

    projector: Literal["linear", "mlp"] = "linear"
    conversation_template: str = "vicuna"
    own_logits: bool = True  # the fingerprints of earlier versions, which left out how logits are scaled, lack it

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.projector == "linear":
            self.projector_hidden_act = NOT_PLAIN_LLAVA


class DiffCLIPLlavaModel(LlavaModel):
    """`LlavaModel` whose projector is a single linear layer (or LLaVA-1.5's two, with `projector="mlp"`)."""

    config: DiffCLIPLlavaConfig

    def __init__(self, config: DiffCLIPLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # LlavaModel's would build its own projector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        if config.projector == "linear":
            self.multi_modal_projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
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
    """Hidden states as the layers of any language model return them, with nothing else that its head may ask for."""

    router_logits = cross_attentions = None


def _through(*args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Hidden:
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
    if (
        layers is lm
        or not (heads and embeddings and isinstance(head, nn.Linear))
        or any(list(module.parameters()) for module in others)
    ):
        raise InputError(
            f"language models of class {type(lm).__name__} cannot be used, which are not made of embeddings, layers "
            "and one linear layer behind them; use another, e.g. of Qwen2, Llama or Gemma"
        )
    owner = layers.get_submodule(embeddings[0].rpartition(".")[0])  # OPT calls this part of its layers
    layers.forward = owner.forward = _through
    return lm, heads[0], embeddings[0]


class DiffCLIPLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA for training and generation; see `forward` for how it differs from transformers' class."""

    config: DiffCLIPLlavaConfig
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch: the loss is a mean over tokens, not batches

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
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """As transformers' LLaVA, except that a training step computes no logits that carry no loss.

        Args:
            input_ids: (batch, tokens) int64, with one `<image>` placeholder per image feature.
            pixel_values: (images, 3, height, width), or None for text alone.
            attention_mask: (batch, tokens), 1 where there is a token.
            position_ids, past_key_values, inputs_embeds, logits_to_keep: as in transformers, for generation.
            labels: (batch, tokens) int64, -100 where nothing is learnt.
            num_items_in_batch: supervised tokens of the whole optimiser step; the loss is the sum of the
                cross-entropies over it, or their mean where it is None.

        Returns:
            `loss` and, outside training or without labels, `logits` (batch, tokens, vocabulary).

        Raises:
            NoSupervisionError: an example has no supervised token.
            ValueError: placeholders and image features differ in number.
        """
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        if labels is not None:
            targets = labels[:, 1:]
            supervised = targets != IGNORE  # (batch, tokens - 1): position t predicts token t + 1
            empty = (~supervised.any(1)).nonzero().flatten().tolist()
            if empty:
                raise NoSupervisionError(
                    f"examples {empty} of this batch of {len(labels)} have no supervised token: "
                    "wrong template for this tokenizer, or answers cut off"
                )
        vocabulary = self.config.text_config.vocab_size
        if labels is not None and self.training:
            # no cache: it would cost memory, and transformers takes packed examples for one text when there is one
            outputs = self.model(**{**inputs, "use_cache": False})
            loss = self.loss_function(
                logits=self.logits(outputs.last_hidden_state[:, :-1][supervised]),  # (supervised tokens, vocabulary)
                labels=None,
                shift_labels=targets[supervised],
                vocab_size=vocabulary,
                num_items_in_batch=num_items_in_batch,
            )
            return LlavaCausalLMOutputWithPast(loss=loss)
        outputs = self.model(**inputs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.logits(outputs.last_hidden_state[:, keep]), None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch
            )
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


def save(model: DiffCLIPLlavaForConditionalGeneration, processor: LlavaProcessor, directory: str | Path) -> None:
    """Write model, processor and the fingerprints of the parts; `load` and the Auto classes read it back.

    The processor pads on the left from then on, as generation needs it; training pads by itself
    (`mllm.data.examples`).
    """
    directory = Path(directory)
    model.save_pretrained(directory)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what is written
    processor.save_pretrained(directory)
    prints = {name: fingerprint(module) for name, module in parts(model).items()}
    prints["transform"] = transform_fingerprint(processor)
    prints["settings"] = {name: getattr(model.config, name) for name in TRAINED_WITH}
    write_json(directory / FINGERPRINTS, prints)


def load(
    directory: str | Path, dtype: torch.dtype | None = None
) -> tuple[DiffCLIPLlavaForConditionalGeneration, LlavaProcessor]:
    """Read what `save` wrote, in evaluation mode; weights are proven equal to those that were saved.

    Args:
        directory: a run directory of align or instruct, or a Hub id.
        dtype: cast the weights to this after checking them; by default they stay as stored.

    Raises:
        InputError: not such a directory, weights missing or left over, images would be prepared in another way or
            features taken from another layer than in training.
        WeightsError: the weights differ from those that were saved.
    """
    model = load_strictly(AutoModelForImageTextToText, directory, dtype="auto")
    if not isinstance(model, DiffCLIPLlavaForConditionalGeneration):
        raise InputError(f"{directory}: holds a {type(model).__name__}; give a run of align or instruct")
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    processor.tokenizer.padding_side = "left"  # runs of earlier versions say right
    never_cut(processor.tokenizer)
    file = Path(directory) / FINGERPRINTS
    if file.is_file():
        prints = read_json(file)
        transform, settings = prints.pop("transform", None), prints.pop("settings", {})
        if "own_logits" not in settings and scales_logits(model):
            raise InputError(
                f"{directory}: trained by an earlier version, which left out how its language model "
                f"({model.config.text_config.model_type}) scales its logits; train it again from the alignment on"
            )
        for name, value in settings.items():
            found = getattr(model.config, name)
            if found != value:
                raise InputError(
                    f"{directory}: {name} is {found} in its config.json, but the model was trained with {value}; "
                    "put the file back that the training wrote"
                )
        verify(model, prints)
        if transform not in (None, transform_fingerprint(processor)):
            raise InputError(
                f"{directory}: its processor_config.json prepares images in another way than the model was trained "
                "with; put the file back that the training wrote"
            )
    model.eval()
    return model if dtype is None else model.to(dtype), processor


@torch.no_grad()
def scales_logits(model: DiffCLIPLlavaForConditionalGeneration) -> bool:
    """Whether the language model's logits are something else than what its output layer gives."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, model.lm_head.in_features, generator=generator).to(model.lm_head.weight)
    return not torch.allclose(model.logits(hidden).float(), model.lm_head(hidden).float(), rtol=1e-3, atol=1e-3)


def never_cut(tokenizer: Any) -> None:
    """Have a fast tokenizer neither cut texts nor fill them up, which a tokenizer.json may ask for.

    transformers hands such a length on to processors, so that questions would lose their ends without a word.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for name in ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of"):
        tokenizer.init_kwargs.pop(name, None)


def transform_fingerprint(processor: LlavaProcessor) -> str:
    """A short hash of all that decides which pixels and how many placeholders an image becomes."""
    images = processor.image_processor
    keys = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_pad", "do_rescale", "rescale_factor")
    settings = {key: getattr(images, key, None) for key in (*keys, "do_normalize", "image_mean", "image_std")}
    settings |= {key: dict(settings[key] or {}) for key in ("size", "crop_size")}
    settings |= {key: list(settings[key] or []) for key in ("image_mean", "image_std")}
    settings["resample"] = int(settings["resample"] or 0)
    settings["tokens"] = [processor.patch_size, processor.vision_feature_select_strategy]
    settings["tokens"].append(processor.num_additional_image_tokens)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def identity(model: DiffCLIPLlavaForConditionalGeneration, processor: LlavaProcessor) -> str:
    """A short hash of all in a loaded model that decides its answers: weights, dtype, settings, processor."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    told = {
        "weights": [fingerprint(module) for module in parts(model).values()],
        "dtype": str(model.dtype),
        "config": _without_origin(model.config.to_diff_dict()),
        "generation": _without_origin(model.generation_config.to_diff_dict()),
        "transform": transform_fingerprint(processor),
        "tokenizer": {**tokenizer, "padding": None, "truncation": None},  # the last call's
        "end": processor.tokenizer.eos_token,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _without_origin(settings: Any) -> Any:
    """Settings without `ORIGIN`, at every depth."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without_origin(value) for name, value in settings.items() if name not in ORIGIN}


def parts(model: DiffCLIPLlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """The three parts by name; the language model includes its head."""
    return {
        "vision_tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": nn.ModuleDict({"model": model.model.language_model, "lm_head": model.lm_head}),
    }


def freeze(model: DiffCLIPLlavaForConditionalGeneration, train: Collection[str]) -> dict[str, int]:
    """Let only the parts named in `train` learn; returns the number of parameters of every part.

    Raises:
        InputError: a name that is none of vision_tower, projector, language_model.
    """
    unknown = sorted(set(train) - set(PARTS))
    if unknown:
        raise InputError(f"learns: there is no part {', '.join(unknown)}; use {', '.join(PARTS)}")
    for name, module in parts(model).items():
        module.requires_grad_(name in train)
    model.train(model.training)  # a frozen tower goes to evaluation mode
    return {name: sum(p.numel() for p in module.parameters()) for name, module in parts(model).items()}


def verify(model: DiffCLIPLlavaForConditionalGeneration, expected: Mapping[str, str]) -> None:
    """Raise WeightsError unless the named parts have the expected fingerprints."""
    modules = parts(model)
    for name, wanted in expected.items():
        found = fingerprint(modules[name])
        if found != wanted:
            raise WeightsError(f"{name} has fingerprint {found}, expected {wanted}: its weights were replaced")


def from_pretrained(auto_class: type, path: str | Path, **options: Any) -> Any:
    """`auto_class.from_pretrained` with what a user can mend said in one sentence."""
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: no model that {auto_class.__name__} can load ({reason})") from None


def load_strictly(auto_class: type, path: str | Path, only: str = "", **options: Any) -> PreTrainedModel:
    """`from_pretrained` that raises InputError listing weights that are missing, misshapen or left over.

    Args:
        only: leftover weights count only if their name contains this.
    """
    model, info = from_pretrained(auto_class, path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(k) for k in info[kind] if kind != "unexpected_keys" or only in str(k))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise InputError(f"{path}: {kind.replace('_', ' ')} in the weights: {shown}; give the matching model")
    return model
