"""The multimodal model: vision tower, one linear layer, language model, on transformers' own LLaVA classes.

Assembling and loading are strict: keys are checked, and fingerprints prove that every part holds the weights
it was given. In training, logits are computed for supervised positions only.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Cache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

import diffclip.hf  # noqa: F401 - registers the DiffCLIP vision tower for AutoModel
import mllm.open_clip_tower  # noqa: F401 - registers open_clip's
from diffclip.errors import InputError
from diffclip.fingerprint import fingerprint
from mllm.conversation import IGNORE, NoSupervisionError

PARTS = ("vision_tower", "projector", "language_model")
FINGERPRINTS = "fingerprints.json"  # beside the weights, written last
# settings that change what the same weights compute
TRAINED_WITH = ("vision_feature_layer", "vision_feature_select_strategy", "conversation_template", "projector")


class WeightsError(RuntimeError):
    """A part does not hold the weights it should."""


@strict
class DiffCLIPLlavaConfig(LlavaConfig):
    """LLaVA's configuration, and what the conversations look like that the model was trained on."""

    model_type = "diffclip_llava"

    projector: Literal["linear", "mlp"] = "linear"
    conversation_template: str = "vicuna"


class DiffCLIPLlavaModel(LlavaModel):
    """`LlavaModel` whose projector is a single linear layer (or LLaVA-1.5's two, with `projector="mlp"`)."""

    config: DiffCLIPLlavaConfig

    def __init__(self, config: DiffCLIPLlavaConfig) -> None:
        super().__init__(config)
        if config.projector == "linear":
            self.multi_modal_projector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As transformers', except that a training step on text alone encodes a black picture, and adds nothing of it.

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


class DiffCLIPLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA for training and generation; see `forward` for how it differs from transformers' class."""

    config: DiffCLIPLlavaConfig
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch: the loss is a mean over tokens, not batches

    def __init__(self, config: DiffCLIPLlavaConfig) -> None:
        super().__init__(config)
        self.model = DiffCLIPLlavaModel(config)
        self.post_init()

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
            pixel_values: (pictures, 3, height, width), or None for text alone.
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
        if labels is None:
            return super().forward(**inputs, logits_to_keep=logits_to_keep)
        targets = labels[:, 1:]
        supervised = targets != IGNORE  # (batch, tokens - 1): position t predicts token t + 1
        empty = (~supervised.any(1)).nonzero().flatten().tolist()
        if empty:
            raise NoSupervisionError(
                f"examples {empty} of this batch of {len(labels)} have no supervised token: "
                "wrong template for this tokenizer, or answers cut off"
            )
        if not self.training:
            return super().forward(**inputs, labels=labels, num_items_in_batch=num_items_in_batch)
        # no cache: it would cost memory, and transformers takes packed examples for one text when there is one
        outputs = self.model(**{**inputs, "use_cache": False})
        hidden = outputs.last_hidden_state[:, :-1][supervised]  # (supervised tokens, width)
        loss = self.loss_function(
            logits=self.lm_head(hidden),  # (supervised tokens, vocabulary)
            labels=None,
            shift_labels=targets[supervised],
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
        return LlavaCausalLMOutputWithPast(loss=loss)

    def train(self, mode: bool = True) -> "DiffCLIPLlavaForConditionalGeneration":
        """Set training mode, except that a frozen vision tower stays in evaluation mode."""
        super().train(mode)
        tower = self.model.vision_tower
        if not any(p.requires_grad for p in tower.parameters()):
            tower.eval()
        return self


AutoConfig.register(DiffCLIPLlavaConfig.model_type, DiffCLIPLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(DiffCLIPLlavaConfig, DiffCLIPLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(DiffCLIPLlavaConfig, LlavaProcessor, exist_ok=True)


def save(model: DiffCLIPLlavaForConditionalGeneration, processor: LlavaProcessor, directory: str | Path) -> None:
    """Write model, processor and the fingerprints of the parts; `load` and the Auto classes read it back."""
    directory = Path(directory)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    prints = {name: fingerprint(module) for name, module in parts(model).items()}
    prints["transform"] = transform_fingerprint(processor)
    prints["settings"] = {name: getattr(model.config, name) for name in TRAINED_WITH}
    temporary = directory / (FINGERPRINTS + ".tmp")
    temporary.write_text(json.dumps(prints, indent=1), encoding="utf-8")
    os.replace(temporary, directory / FINGERPRINTS)


def load(
    directory: str | Path, dtype: torch.dtype | None = None
) -> tuple[DiffCLIPLlavaForConditionalGeneration, LlavaProcessor]:
    """Read what `save` wrote, in evaluation mode; weights are proven equal to those that were saved.

    Args:
        directory: a run directory of align or instruct, or a Hub id.
        dtype: cast the weights to this after checking them; by default they stay as stored.

    Raises:
        InputError: not such a directory, weights missing or left over, pictures would be prepared in another way or
            features taken from another layer than in training.
        WeightsError: the weights differ from those that were saved.
    """
    model = load_strictly(AutoModelForImageTextToText, directory, dtype="auto")
    if not isinstance(model, DiffCLIPLlavaForConditionalGeneration):
        raise InputError(f"{directory}: holds a {type(model).__name__}; give a run of align or instruct")
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    file = Path(directory) / FINGERPRINTS
    if file.is_file():
        prints = json.loads(file.read_text(encoding="utf-8"))
        transform, settings = prints.pop("transform", None), prints.pop("settings", {})
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
                f"{directory}: its processor_config.json prepares pictures in another way than the model was trained "
                "with; put the file back that the training wrote"
            )
    model.eval()
    return model if dtype is None else model.to(dtype), processor


def transform_fingerprint(processor: LlavaProcessor) -> str:
    """A short hash of all that decides which pixels and how many placeholders a picture becomes."""
    images = processor.image_processor
    keys = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_pad", "do_rescale", "rescale_factor")
    settings = {key: getattr(images, key, None) for key in (*keys, "do_normalize", "image_mean", "image_std")}
    settings |= {key: dict(settings[key] or {}) for key in ("size", "crop_size")}
    settings |= {key: list(settings[key] or []) for key in ("image_mean", "image_std")}
    settings["resample"] = int(settings["resample"] or 0)
    settings["tokens"] = [processor.patch_size, processor.vision_feature_select_strategy]
    settings["tokens"].append(processor.num_additional_image_tokens)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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
