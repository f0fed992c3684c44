"""The multimodal model: vision tower, one linear layer, language model, on transformers' own LLaVA classes.

Assembling and loading are strict: keys are checked, and fingerprints prove that every part holds the weights
it was given. In training, logits are computed for supervised positions only.
"""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Cache,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast

import diffclip.hf  # noqa: F401 - registers the DiffCLIP vision tower for AutoModel
from diffclip.errors import InputError
from diffclip.fingerprint import fingerprint
from mllm.conversation import IGNORE, IMAGE, TEMPLATES, NoSupervisionError, chat_template
from mllm.image_modes import with_mode

PARTS = ("vision_tower", "projector", "language_model")
FINGERPRINTS = "fingerprints.json"  # beside the weights, written last


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


def assemble(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    projector: Literal["linear", "mlp"] = "linear",
    template: str = "vicuna",
    vision_feature_layer: int = -2,
    class_token: bool = False,
    image_mode: str = "crop",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[DiffCLIPLlavaForConditionalGeneration, LlavaProcessor]:
    """Put a vision tower and a language model together; only the projector between them is new.

    Args:
        vision_tower: a pretraining run directory, or any CLIP / SigLIP model (directory or Hub id).
        language_model: directory or Hub id of any causal language model.
        projector: "linear" (the paper) or "mlp" (LLaVA-1.5's two layers).
        template: conversation format that questions will be asked in, see `mllm.conversation`.
        vision_feature_layer: which of the tower's hidden states the projector reads; -2 is the paper's.
        class_token: whether the language model sees the tower's class token too, before the patches; the paper's
            does not.
        image_mode: how pictures become square, see `mllm.image_modes`; "crop" is the paper's.
        seed: decides the projector's weights.
        dtype: of all weights; float32 for training, also under bf16 autocast.

    Raises:
        InputError: a path that is no model, missing or unexpected weights, a template the tokenizer
            cannot write.
        WeightsError: a part's weights changed while assembling.
    """
    tower = _load_tower(vision_tower, dtype)
    image_processor = with_mode(AutoImageProcessor.from_pretrained(vision_tower), image_mode)
    tokenizer = _from_pretrained(AutoTokenizer, language_model)
    lm = _load_strictly(AutoModelForCausalLM, language_model, dtype=dtype)
    _prepare_tokenizer(tokenizer, template, language_model)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:  # most tables have spare rows
        lm.resize_token_embeddings(len(tokenizer))
    extra, tokens = _feature_tokens(tower, image_processor, vision_feature_layer)
    if class_token and not extra:
        raise InputError(f"{vision_tower}: class_token is set, but this vision tower has no class token")
    config = DiffCLIPLlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=tokens + class_token,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default" if extra and not class_token else "full",
        tie_word_embeddings=lm.config.tie_word_embeddings,
        projector=projector,
        conversation_template=template,
    )
    loaded = {"vision_tower": fingerprint(tower), "language_model": fingerprint(_with_head(lm))}
    with torch.device("meta"):  # the skeleton costs no memory; real parts replace it
        model = DiffCLIPLlavaForConditionalGeneration(config)
    if hasattr(tower.config, "stop_early"):  # our tower skips the blocks after the layer that is read
        tower.config.stop_early = True
    model.model.vision_tower = tower
    model.model.language_model = lm.base_model
    model.lm_head = lm.get_output_embeddings()
    model.model.multi_modal_projector = _new_projector(model.model.multi_modal_projector, seed, dtype)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    verify(model, loaded)
    model.eval()
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=extra,
        image_token=IMAGE,
        chat_template=chat_template(template, tokenizer.eos_token),
    )
    return model, processor


def plan(
    vision_tower: str | Path, language_model: str | Path, projector: str = "linear", class_token: bool = False
) -> DiffCLIPLlavaConfig:
    """The configuration that `assemble` would give, from the parts' configurations alone; no weights are read.

    Args:
        vision_tower, language_model: as in `assemble`; their config.json is enough.
    """
    vision, text = _from_pretrained(AutoConfig, vision_tower), _from_pretrained(AutoConfig, language_model)
    vision = getattr(vision, "vision_config", None) or vision
    return DiffCLIPLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + class_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if class_token else "default",
        tie_word_embeddings=text.tie_word_embeddings,
        projector=projector,
    )


def planned(directory: str | Path) -> DiffCLIPLlavaConfig:
    """The configuration of a multimodal run; InputError if it is none."""
    config = _from_pretrained(AutoConfig, directory)
    if not isinstance(config, DiffCLIPLlavaConfig):
        raise InputError(f"{directory}: holds a {type(config).__name__}; give a run of align or instruct")
    return config


@torch.no_grad()
def whiten_projector(model: DiffCLIPLlavaForConditionalGeneration, pixel_values: torch.Tensor, seed: int) -> None:
    """Start a linear projector such that all directions of the tower's features show alike, as widely as words do.

    In a few directions features vary a hundred times more than in those that tell shapes apart, and a projector that
    starts at random takes most of a short run to find the latter. With mean m and covariance C of the features of
    some pictures, and s the standard deviation of the word embeddings:

        weight = P (C + 0.01 c I)^(-1/2),  bias = -weight m,  P_ij ~ N(0, s^2 / width),  c the largest eigenvalue of C

    Args:
        pixel_values: (pictures, 3, height, width); a hundred pictures are enough.
        seed: decides P.

    Raises:
        InputError: the projector is not a single linear layer.
    """
    projector = model.model.multi_modal_projector
    if not isinstance(projector, nn.Linear):
        raise InputError("projector_init: whitened needs the linear projector; use default with the mlp")
    pixel_values = pixel_values.to(projector.weight)
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    features = states[model.config.vision_feature_layer]
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]  # without the class token
    features = features.flatten(0, 1).double()  # (pictures x tokens, width)
    values, vectors = torch.linalg.eigh(features.T.cov())
    scale = (values.clamp(min=0) + 0.01 * values.max()).rsqrt()
    spread = model.get_input_embeddings().weight.double().std()
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(projector.weight.shape, generator=generator, dtype=torch.float64).to(features.device)
    weight = (spread * len(values) ** -0.5 * mixing) @ (vectors * scale) @ vectors.T
    projector.weight.copy_(weight)
    projector.bias.copy_(-weight @ features.mean(0))


def save(model: DiffCLIPLlavaForConditionalGeneration, processor: LlavaProcessor, directory: str | Path) -> None:
    """Write model, processor and the fingerprints of the parts; `load` and the Auto classes read it back."""
    directory = Path(directory)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    prints = {name: fingerprint(module) for name, module in parts(model).items()}
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
        InputError: not such a directory, or weights missing or left over.
        WeightsError: the weights differ from those that were saved.
    """
    model = _load_strictly(AutoModelForImageTextToText, directory, dtype="auto")
    if not isinstance(model, DiffCLIPLlavaForConditionalGeneration):
        raise InputError(f"{directory}: holds a {type(model).__name__}; give a run of align or instruct")
    prints = Path(directory) / FINGERPRINTS
    if prints.is_file():
        verify(model, json.loads(prints.read_text(encoding="utf-8")))
    model.eval()
    return model if dtype is None else model.to(dtype), AutoProcessor.from_pretrained(directory)


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
        ValueError: a name that is none of vision_tower, projector, language_model.
    """
    unknown = sorted(set(train) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown parts {unknown}: use {', '.join(PARTS)}")
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


def _with_head(lm: PreTrainedModel) -> nn.ModuleDict:
    return nn.ModuleDict({"model": lm.base_model, "lm_head": lm.get_output_embeddings()})


def _from_pretrained(auto_class: type, path: str | Path, **options: Any) -> Any:
    """`auto_class.from_pretrained` with what a user can mend said in one sentence."""
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: no model that {auto_class.__name__} can load ({reason})") from None


def _load_strictly(auto_class: type, path: str | Path, only: str = "", **options: Any) -> PreTrainedModel:
    """`_from_pretrained` that raises InputError listing weights that are missing, misshapen or left over.

    Args:
        only: leftover weights count only if their name contains this.
    """
    model, info = _from_pretrained(auto_class, path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(str(k) for k in info[kind] if kind != "unexpected_keys" or only in str(k))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise InputError(f"{path}: {kind.replace('_', ' ')} in the weights: {shown}; give the matching model")
    return model


def _load_tower(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The vision tower of a pretraining run or of any CLIP-like model, whose text half is left out."""
    config = _from_pretrained(AutoConfig, path)
    vision = getattr(config, "vision_config", None)
    only = "" if vision is None else "vision"
    return _load_strictly(AutoModel, path, only, config=vision or config, dtype=dtype).eval()


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str, path: str | Path) -> None:
    """Give the tokenizer `<image>`, a padding token, and as its eos the token that ends an answer."""
    if template not in TEMPLATES:
        raise InputError(f"unknown template `{template}`: use one of {', '.join(TEMPLATES)}")
    if not tokenizer.is_fast:
        raise InputError(f"{path}: needs a fast tokenizer (tokenizer.json), which knows where tokens begin and end")
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    if template == "chatml" and not {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys():
        raise InputError(f"{path}: template chatml needs the tokens <|im_start|> and <|im_end|>; use vicuna")
    if "<|im_end|>" in vocabulary:  # base models have it too, but stop at another token
        tokenizer.eos_token = "<|im_end|>"
    if tokenizer.eos_token is None:
        raise InputError(f"{path}: the tokenizer has neither <|im_end|> nor an end-of-sequence token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


@torch.no_grad()
def _feature_tokens(tower: PreTrainedModel, image_processor: Any, layer: int) -> tuple[int, int]:
    """(tokens that are no patches: 1 with CLS, 0 without; patch tokens), seen on a black picture.

    Raises:
        InputError: the processor's size is not the tower's, or the token count fits neither case.
    """
    pixels = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].to(tower.dtype)
    height, width = pixels.shape[-2:]
    size = tower.config.image_size
    if (height, width) != (tuple(size) if isinstance(size, (list, tuple)) else (size, size)):
        raise InputError(
            f"the image processor makes pictures of {height}x{width}, but the vision tower takes {size}: "
            "their preprocessor_config.json and config.json do not belong together"
        )
    patch = tower.config.patch_size
    patches = (height // patch) * (width // patch)
    tokens = tower(pixels, output_hidden_states=True).hidden_states[layer].shape[1]
    if tokens - patches not in (0, 1):
        raise InputError(f"the vision tower gives {tokens} tokens for {patches} patches; only one CLS token is known")
    return tokens - patches, patches


def _new_projector(skeleton: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """The projector with torch's own Linear initialisation, drawn from `seed`."""
    projector = skeleton.to_empty(device="cpu").to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return projector
