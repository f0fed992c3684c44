"""A vision tower and a language model become one multimodal model; only the projector between them is new."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from diffclip import sources
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.fingerprint import fingerprint
from diffclip.base.images import DECODING
from diffclip.hf_inputs import image_transform
from diffclip.weights import from_pretrained
from mllm.conversation import AUTO, IMAGE, chat_template
from mllm.llava import DiffCLIPLlavaConfig, DiffCLIPLlavaForConditionalGeneration, own_head
from mllm.model import VisionLanguageModel
from mllm.open_clip_tower import load_tower
from mllm.processing import prepare_tokenizer, with_mode
from mllm.weights import load_strictly, verify


def assemble(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    projector: Literal["linear", "mlp"] = "linear",
    template: str = "vicuna",
    vision_feature_layer: int | list[int] = -2,
    class_token: bool = False,
    image_mode: str = "crop",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> VisionLanguageModel:
    """Put a vision tower and a language model together.

    Args:
        vision_tower: a pretraining run directory, any CLIP / SigLIP model (directory or Hub id), or any model of
            open_clip, see `mllm.open_clip_tower`.
        language_model: directory or Hub id of any causal language model.
        projector: "linear" (the paper) or "mlp" (LLaVA-1.5's two layers).
        template: conversation format that questions will be asked in, see `mllm.conversation`; "auto" is the
            language model's own.
        vision_feature_layer: which of the tower's hidden states the projector reads, several side by side; -2 is the
            paper's.
        class_token: whether the language model sees the tower's class token, too, before the patches.
        image_mode: how images become square, see `mllm.processing.with_mode`; "crop" is the paper's.
        seed: decides the projector's weights.
        dtype: of all weights; float32 for training, also under bf16 autocast.

    Raises:
        InputError: a path that is no model, missing or unexpected weights, a template the tokenizer
            cannot write.
        WeightsError: a part's weights changed while assembling.
    """
    template, own = ("vicuna", True) if template == AUTO else (template, False)
    tower, tower_processor = _load_tower(vision_tower, dtype)
    tower.to(dtype)  # type: ignore[arg-type] # as transformers declares it, it cannot be called on an instance
    image_processor: Any = with_mode(tower_processor, image_mode)
    image_processor.decoding = DECODING  # saved with it: by which rules the training's images became pixels
    tokenizer = from_pretrained(AutoTokenizer, language_model)
    lm = load_strictly(AutoModelForCausalLM, language_model, dtype=dtype)
    prepare_tokenizer(tokenizer, template, language_model)
    if not hasattr(lm.config, "tie_word_embeddings"):
        lm.config.tie_word_embeddings = False
    try:
        own_head(lm.config)  # refuses classes that are made otherwise
    except InputError as error:
        raise InputError(f"{language_model}: {error}") from None
    if len(tokenizer) > cast(nn.Embedding, lm.get_input_embeddings()).num_embeddings:  # most tables have spare rows
        lm.resize_token_embeddings(len(tokenizer))
    layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
    pixels = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    extra, tokens = _feature_tokens(tower, pixels.to(tower.dtype), layers)
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
    with_head = nn.ModuleDict({"model": lm.base_model, "lm_head": lm.get_output_embeddings()})
    loaded = {"vision_tower": fingerprint(tower), "language_model": fingerprint(with_head)}
    with torch.device("meta"):  # the skeleton costs no memory; real parts replace it
        model = DiffCLIPLlavaForConditionalGeneration(config)
    if model.model.language_model.state_dict().keys() != lm.base_model.state_dict().keys():  # Whisper's has an encoder
        raise _unusable(language_model, lm, "its layers alone are another model")
    if hasattr(tower.config, "stop_early"):  # our tower skips the blocks after the layer that is read
        tower.config.stop_early = True
    model.model.vision_tower = tower
    model.model.language_model = lm.base_model
    model.lm_head = lm.get_output_embeddings()
    model.model.multi_modal_projector = new_projector(model.model.multi_modal_projector, seed, dtype)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.eval()
    _check_logits(model, lm, tokenizer, pixels, language_model)
    verify(model, loaded)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=extra,
        image_token=IMAGE,
        chat_template=chat_template(template, tokenizer.eos_token),
    )
    vlm = VisionLanguageModel(model, processor)
    if own:
        vlm.use_template(AUTO)
    return vlm


def assembled_config(
    vision_tower: str | Path,
    language_model: str | Path,
    projector: Literal["linear", "mlp"] = "linear",
    class_token: bool = False,
) -> DiffCLIPLlavaConfig:
    """The configuration that `assemble` would give, from the parts' configurations alone; no weights are read.

    Their config.json is enough, but open_clip's names are loaded.
    """
    text = from_pretrained(AutoConfig, language_model)
    encoder = _dual_encoders_tower(vision_tower)
    vision = encoder[0].config if encoder else from_pretrained(AutoConfig, vision_tower)
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


def run_config(directory: str | Path) -> DiffCLIPLlavaConfig:
    """The configuration of a multimodal run; InputError if it is none."""
    config = from_pretrained(AutoConfig, directory)
    if not isinstance(config, DiffCLIPLlavaConfig):
        raise InputError(f"{directory}: holds a {type(config).__name__}; give a run of align or instruct")
    return config


def new_projector(skeleton: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """The projector with torch's own Linear initialisation, drawn from `seed`."""
    projector = skeleton.to_empty(device="cpu").to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return projector


@torch.no_grad()
def whiten_projector(model: DiffCLIPLlavaForConditionalGeneration, pixel_values: torch.Tensor, seed: int) -> None:
    """Start a linear projector such that all directions of the tower's features show alike, as widely as words do.

    In a few directions features vary a hundred times more than in those that tell shapes apart, and a projector that
    starts at random takes most of a short run to find the latter. With mean m and covariance C of the features of
    some images, and s the standard deviation of the word embeddings:

        weight = P (C + 0.01 c I)^(-1/2),  bias = -weight m,  P_ij ~ N(0, s^2 / width),  c the largest eigenvalue of C

    Args:
        pixel_values: (images, 3, height, width); a hundred images are enough.
        seed: decides P.

    Raises:
        InputError: the projector is not a single linear layer.
    """
    projector = model.model.multi_modal_projector
    if not isinstance(projector, nn.Linear):
        raise InputError("projector_init: whitened needs the linear projector; use default with the mlp")
    pixel_values = pixel_values.to(projector.weight)
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    layers = model.config.vision_feature_layer
    features = torch.cat([states[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    if model.config.vision_feature_select_strategy == "default":
        features = features[:, 1:]  # without the class token
    features = features.flatten(0, 1).double()  # (images x tokens, width)
    values, vectors = torch.linalg.eigh(features.T.cov())
    scale = (values.clamp(min=0) + 0.01 * values.max()).rsqrt()
    spread = cast(nn.Embedding, model.get_input_embeddings()).weight.double().std()
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(projector.weight.shape, generator=generator, dtype=torch.float64).to(features.device)
    weight = (spread * len(values) ** -0.5 * mixing) @ (vectors * scale) @ vectors.T
    projector.weight.copy_(weight)
    projector.bias.copy_(-weight @ features.mean(0))


@torch.no_grad()
def _check_logits(
    model: DiffCLIPLlavaForConditionalGeneration,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pixels: torch.Tensor,
    path: str | Path,
) -> None:
    """InputError unless a text has the logits that the language model itself gives it, and an answer can be written."""
    ids = tokenizer("The image shows a cat on a red mat.", return_tensors="pt")["input_ids"]
    config = model.config
    shown = torch.cat([ids.new_full((1, config.image_seq_length), config.image_token_index), ids], dim=1)
    try:
        wanted = lm.eval()(input_ids=ids, use_cache=False).logits.float()
        actual = model(input_ids=ids, use_cache=False).logits.float()
        model.generate(input_ids=shown, pixel_values=pixels.to(model.dtype), max_new_tokens=2)
        apart = float((actual - wanted).abs().max() / wanted.abs().max())
        reason = f"its logits are {apart:.1%} away from its own"
    except Exception as error:  # of any kind, by what the class lacks
        apart, reason = float("inf"), in_one_line(error, 200)
    if not apart < (0.001 if model.dtype == torch.float32 else 0.05):
        raise _unusable(path, lm, reason)


def _unusable(path: str | Path, lm: PreTrainedModel, reason: str) -> InputError:
    return InputError(
        f"{path}: language models of class {type(lm).__name__} cannot be used in a multimodal model ({reason}); "
        "use another, e.g. of Qwen2, Llama or Gemma"
    )


def _load_tower(path: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The vision tower of a pretraining run or of any CLIP-like model, without its text half; its image processor."""
    if encoder := _dual_encoders_tower(path):
        return encoder
    config = from_pretrained(AutoConfig, path)
    vision = getattr(config, "vision_config", None)
    only = "" if vision is None else "vision"
    tower = load_strictly(AutoModel, path, only, config=vision or config, dtype=dtype).eval()
    try:
        return tower, from_pretrained(AutoImageProcessor, path)
    except InputError:
        if config.model_type not in sources.TRANSFORMERS:
            raise InputError(f"{path}: has no image processor; put its preprocessor_config.json there") from None
    return tower, image_transform(sources.locate(path), tower.config.image_size).processor  # CLIP's, with a notice


def _dual_encoders_tower(path: str | Path) -> tuple[PreTrainedModel, BaseImageProcessor] | None:
    """The vision tower of a dual encoder in open_clip's or the official layout; None for what is transformers'."""
    if not str(path).startswith(sources.PREFIX):
        try:
            from_pretrained(AutoConfig, path)
            return None
        except InputError:
            if not sources.is_dual_encoder(path):
                return None
    return load_tower(path)


@torch.no_grad()
def _feature_tokens(tower: PreTrainedModel, pixels: torch.Tensor, layers: list[int]) -> tuple[int, int]:
    """(tokens that are no patches: 1 with CLS, 0 without; patch tokens), seen on one image.

    Raises:
        InputError: the processor's size is not the tower's, or the token count fits neither case.
    """
    height, width = pixels.shape[-2:]
    size = tower.config.image_size
    if (height, width) != (tuple(size) if isinstance(size, (list, tuple)) else (size, size)):
        raise InputError(
            f"the image processor makes images of {height}x{width}, but the vision tower takes {size}: "
            "their preprocessor_config.json and config.json do not belong together"
        )
    patch = tower.config.patch_size
    patches = (height // patch) * (width // patch)
    states = tower(pixels, output_hidden_states=True).hidden_states
    for layer in layers:
        if not -len(states) <= layer < len(states):
            raise InputError(f"vision_feature_layer {layer}: this vision tower has {len(states)} hidden states")
        _, tokens, width = states[layer].shape
        if width != tower.config.hidden_size:
            raise InputError(
                f"layer {layer} of this vision tower is {width} wide and not {tower.config.hidden_size}: the stages of "
                "a convolutional tower differ; set vision_feature_layer -1"
            )
    if tokens - patches not in (0, 1):
        raise InputError(f"the vision tower gives {tokens} tokens for {patches} patches; only one CLS token is known")
    return tokens - patches, patches
