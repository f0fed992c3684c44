"""Directories of transformers' CLIPModel (openai/clip-vit-base-patch16 and its kin), read as open_clip models."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, cat
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from diffclip.base.images import cut_strip, to_rgb
from diffclip.weights import load_strictly, read_pickle, read_safetensors, refuse_auto_map, tensors

LAYER = (  # transformers' name, open_clip's
    ("self_attn.out_proj.", "attn.out_proj."),
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)
NAMES = {  # the same, outside of the layers
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.final_layer_norm.": "ln_final.",
}


def load_transformers_clip(directory: Path, config: dict[str, Any]) -> tuple[open_clip.CLIP, Callable, Callable]:
    """Return (model in evaluation mode, its transform for evaluation, its tokenizer) for a CLIPModel's directory.

    Images and texts are prepared by the directory's own image processor (on PIL) and tokenizer. `config` is the content
    of its config.json.

    Raises:
        InputError: for an activation that open_clip's CLIP does not have, weights that do not fit, or an image
            processor or tokenizer that cannot be followed.
    """
    try:
        whole = CLIPConfig.from_dict(config)
    except Exception as error:  # transformers checks each value in its own way
        raise InputError(f"{directory / 'config.json'}: not a CLIP's ({_in_one_line(error)})") from None
    vision: Any = whole.vision_config  # which transformers also lets be a dict, or None
    text: Any = whole.text_config
    if {vision.hidden_act, text.hidden_act} not in ({"quick_gelu"}, {"gelu"}):
        raise InputError(f"{directory}: activations {vision.hidden_act} and {text.hidden_act} are not CLIP's")
    # the embedding is read at the first end token; with 2, which old files say, transformers takes the largest id
    pooling = {} if text.eos_token_id == 2 else {"pool_type": "eos", "eos_id": text.eos_token_id}
    model = open_clip.CLIP(
        whole.projection_dim,
        {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "norm_kwargs": {"eps": vision.layer_norm_eps},
        },
        {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
            "norm_kwargs": {"eps": text.layer_norm_eps},
            **pooling,
        },
        quick_gelu=vision.hidden_act == "quick_gelu",
    )
    load_strictly(model, rename(read_weights(directory)), str(directory))
    transform = image_transform(directory, vision.image_size)
    return model.eval(), transform, tokenizer(directory, text.max_position_embeddings, text.vocab_size)


class ImageTransform:
    """A transformers image processor as a transform from a PIL image to (channels, height, width), float32."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __repr__(self) -> str:  # by which the cache of features tells transforms apart
        return f"ImageTransform({self.processor!r})"

    def __call__(self, image: Image.Image) -> Tensor:
        return self._pixels(image).float()

    def seen(self, nearest: bool = False) -> Callable[[Image.Image], Image.Image]:
        """Return what resizes and crops of it: PIL image -> PIL image; `nearest` for masks."""
        only: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
        only |= {"resample": Image.Resampling.NEAREST} if nearest else {}
        return lambda image: Image.fromarray(self._pixels(image, **only).byte().permute(1, 2, 0).numpy())

    def _pixels(self, image: Image.Image, **options: Any) -> Tensor:
        image = cut_strip(to_rgb(image)) if self.processor.do_center_crop else to_rgb(image)
        return self.processor(image, return_tensors="pt", **options)["pixel_values"][0]


def image_transform(directory: Path, side: int) -> ImageTransform:
    """Return the directory's image processor as a transform from a PIL image to (3, side, side).

    InputError if it cannot be read without running its code, or makes images of another size than the tower takes.
    """
    names = [name for name in ("preprocessor_config.json", "processor_config.json") if (directory / name).is_file()]
    for name in names:
        refuse_auto_map(directory / name, "AutoImageProcessor")
        refuse_auto_map(directory / name, "AutoFeatureExtractor")
    try:
        if names:
            processor = AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
        else:
            processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
            warnings.warn(f"{directory}: no preprocessor_config.json: images are prepared as CLIP's are", stacklevel=4)
        transform = ImageTransform(processor)
        for size in ((2 * side + 7, side + 3), (side + 3, 2 * side + 7)):
            made = tuple(transform(Image.new("RGB", size)).shape)
            if made != (3, side, side):
                raise InputError(
                    f"{directory / names[0]}: makes {made} of an image of {size[0]} x {size[1]} pixels, but the vision "
                    f"tower takes (3, {side}, {side}): correct its size, crop_size, do_resize or do_center_crop"
                )
    except InputError:
        raise
    except Exception as error:  # transformers raises whatever its processors do
        raise InputError(f"{directory}: its image processor cannot be used ({_in_one_line(error)})") from None
    return transform


def tokenizer(directory: Path, context_length: int, vocab_size: int) -> Callable[[str | list[str]], Tensor]:
    """Return the directory's tokenizer: str or list of str -> ids (n, context_length), int64; CLIP's if it has none.

    InputError if it cannot be read without running its code, or gives ids that the model has no embedding for.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")
    if not any((directory / name).is_file() for name in files):
        if vocab_size != 49408:
            raise InputError(f"{directory}: no tokenizer beside a vocabulary of {vocab_size}: add its tokenizer.json")
        warnings.warn(f"{directory}: no tokenizer: texts are read by CLIP's", stacklevel=4)
        return open_clip.SimpleTokenizer(context_length=context_length)
    refuse_auto_map(directory / "tokenizer_config.json", "AutoTokenizer")
    try:
        theirs = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its loaders do
        raise InputError(f"{directory}: its tokenizer cannot be read ({_in_one_line(error)})") from None
    if max(theirs.get_vocab().values(), default=0) >= vocab_size:
        raise InputError(f"{directory}: its tokenizer has {len(theirs)} tokens, but the model embeds {vocab_size}")
    if theirs.padding_side != "right":
        raise InputError(f"{directory}: its tokenizer pads on the left, which would move a CLIP's positions")
    return partial(_ids, theirs, context_length)


def _ids(theirs: Any, context_length: int, texts: str | list[str]) -> Tensor:
    """Ids (n, context_length) of texts, cut and padded as a transformers tokenizer does."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = theirs(texts, truncation=True, max_length=min(context_length, theirs.model_max_length))["input_ids"]
    ids = torch.full((len(rows), context_length), theirs.pad_token_id or 0)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn transformers' names into open_clip's: queries, keys and values become one matrix, projections (in, out).

    Names that are not known are kept, for `load_strictly` to list.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if renamed := next((new + name[len(old) :] for old, new in NAMES.items() if name.startswith(old)), None):
            out[renamed] = tensor
        elif name in ("visual_projection.weight", "text_projection.weight"):
            out["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T.contiguous()
        elif ".encoder.layers." in name:
            tower, rest = name.split(".encoder.layers.")
            layer, rest = rest.split(".", 1)
            start = ("visual." if tower == "vision_model" else "") + f"transformer.resblocks.{layer}."
            if rest.startswith("self_attn.q_proj."):
                parts = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
                if all(part in state for part in parts):
                    out[f"{start}attn.in_proj_{rest.rsplit('.', 1)[1]}"] = cat([state[part] for part in parts])
            elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
                old, new = next(((o, n) for o, n in LAYER if rest.startswith(o)), ("", ""))
                out[start + new + rest[len(old) :]] = tensor
        else:
            out[name] = tensor
    return out


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Read model.safetensors, the files that model.safetensors.index.json lists, or pytorch_model.bin."""
    if (index := directory / "model.safetensors.index.json").is_file():
        listed = read_json(index)
        names = set(listed["weight_map"].values()) if isinstance(listed, dict) and "weight_map" in listed else set()
        if not names or any(Path(str(name)).name != name for name in names):
            raise InputError(f"{index}: lists no weight files of its own directory under weight_map")
        return {key: tensor for name in sorted(names) for key, tensor in read_safetensors(directory / name).items()}
    if not (directory / "model.safetensors").is_file() and (directory / "pytorch_model.bin").is_file():
        return tensors(read_pickle(directory / "pytorch_model.bin"), directory / "pytorch_model.bin")
    return read_safetensors(directory / "model.safetensors")
