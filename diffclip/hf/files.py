"""Our dual encoders in transformers' files: configurations, weights under their names, processor and tokenizer."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers.image_utils import PILImageResampling

from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import write_json, write_whole
from diffclip.base.portable import auto_map, write_code
from diffclip.hf.dual import DiffCLIPConfig, DiffCLIPModel
from diffclip.hf.images import DiffCLIPImageProcessor
from diffclip.hf.text import DiffCLIPTextConfig
from diffclip.hf.vision import DiffCLIPVisionConfig
from diffclip.warm_start import layer_lambda_inits
from diffclip.weights import write_safetensors

NAMES = {  # how the dual encoder's parameters begin, and how DiffCLIPModel's do
    "visual.trunk.": "vision_model.trunk.",
    "visual.head.proj.": "visual_projection.",
    "token_embedding.": "text_model.token_embedding.",
    "positional_embedding": "text_model.positional_embedding",
    "transformer.": "text_model.transformer.",
    "ln_final.": "text_model.ln_final.",
}
# What open_clip does to a text before its byte pairs (ftfy, html.unescape, lower case), as far as the steps of a
# tokenizer.json can say it. Not in it: text in a wrong encoding, full-width letters, and the rarer entities of HTML.
CLEANING = {
    r"&(amp;?)+": "&",
    r"&lt;?": "<",
    r"&gt;?": ">",
    r"&quot;?|&#34;|&#x22;": '"',
    r"&apos;|&#0?39;|&#x27;|&[lr]squo;": "'",
    r"&[lr]dquo;": '"',
    r"&nbsp;?|&#160;|&#xa0;": " ",
    r"[\u02bc\u2018-\u201b]": "'",
    r"[\u201c-\u201f]": '"',
    r"\ufb00": "ff",
    r"\ufb01": "fi",
    r"\ufb02": "fl",
    r"\ufb03": "ffi",
    r"\ufb04": "ffl",
    r"\x1b\[[\d;]*[a-zA-Z]": "",
    r"[\x00-\x08\x0b\x0e-\x1b\x7f\ufeff\u206a-\u206f\ufff9-\ufffb]": "",
    r"(?<=\p{L})Σ(?!\p{L})": "ς",
}


def vision_config(model_config: dict[str, Any]) -> DiffCLIPVisionConfig:
    """Return the vision tower's part of a model config of `diffclip.models`; InputError if it has no such form."""
    vision_cfg, options = model_config["model_cfg"]["vision_cfg"], model_config["diffclip"]
    try:
        return DiffCLIPVisionConfig(
            hidden_size=vision_cfg["width"],
            num_hidden_layers=vision_cfg["layers"],
            num_attention_heads=vision_cfg["width"] // vision_cfg["head_width"],
            mlp_ratio=vision_cfg["mlp_ratio"],
            image_size=vision_cfg["image_size"],
            patch_size=vision_cfg["patch_size"],
            layer_norm_eps=options["vision_norm_eps"],
            **_attention(options, "vision", vision_cfg["layers"]),
        )
    except StrictDataclassError as error:  # two numbers for a size, which open_clip takes
        raise InputError(f"the vision tower has no form of transformers': {in_one_line(error)}") from None


def dual_config(model_config: dict[str, Any]) -> DiffCLIPConfig:
    """Return a model config of `diffclip.models` in transformers' form."""
    model_cfg = model_config["model_cfg"]
    text_cfg = model_cfg["text_cfg"]
    text = DiffCLIPTextConfig(
        vocab_size=text_cfg["vocab_size"],
        hidden_size=text_cfg["width"],
        intermediate_size=int(text_cfg["width"] * text_cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=text_cfg["layers"],
        num_attention_heads=text_cfg["heads"],
        max_position_embeddings=text_cfg["context_length"],
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
        layer_norm_eps=text_cfg.get("norm_kwargs", {}).get("eps", 1e-5),
        bos_token_id=text_cfg["vocab_size"] - 2,
        eos_token_id=text_cfg["vocab_size"] - 1,
        pad_token_id=text_cfg["vocab_size"] - 1,
        **_attention(model_config["diffclip"], "text", text_cfg["layers"]),
    )
    return DiffCLIPConfig(
        vision_config=vision_config(model_config), text_config=text, projection_dim=model_cfg["embed_dim"]
    )


def _attention(options: dict[str, Any], tower: str, layers: int) -> dict[str, Any]:
    if not (how := options["attention"].get(tower)):
        return {}
    lambda_init = layer_lambda_inits(how["lambda_init"], how["schedule_base"], layers)
    return {"lambda_init": lambda_init, "attention_version": how["kind"]}


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a dual encoder's state dict to DiffCLIPModel's; the tensors are the same."""
    renamed = {}
    for name, tensor in state.items():
        old = next((old for old in NAMES if name.startswith(old)), None)
        renamed[NAMES[old] + name[len(old) :] if old else name] = tensor
    renamed["text_projection.weight"] = renamed.pop("text_projection").T.contiguous()
    renamed["logit_scale"] = renamed["logit_scale"].reshape(1)
    return renamed


def to_dual_encoder(model: Any) -> DiffCLIPModel:
    """Return a `diffclip.models.CLIP` as a DiffCLIPModel with copies of its weights, in evaluation mode."""
    dual = DiffCLIPModel(dual_config(model.model_config))
    dual.load_state_dict(to_transformers(model.state_dict()))
    return dual.to(next(model.parameters()).dtype).eval()


def write(model_config: dict[str, Any], state: dict[str, Tensor], directory: Path) -> None:
    """Write a dual encoder, of which `state` is the state dict, in transformers' files, each whole or not at all.

    They are config.json, model.safetensors, processor_config.json (and preprocessor_config.json, for those who know
    only that), tokenizer.json, tokenizer_config.json, and the code with which all of it loads where this package is
    not installed (`diffclip.base.portable`).
    """
    config, renamed = dual_config(model_config), to_transformers(state)
    config.architectures = [DiffCLIPModel.__name__]
    config.dtype = renamed["logit_scale"].dtype
    config.auto_map = auto_map(DiffCLIPModel.auto_classes)
    write_safetensors(renamed, directory / "model.safetensors")
    processor = image_processor(model_config)
    settings = processor.to_dict()
    write_json(directory / "processor_config.json", {"processor_class": "CLIPProcessor", "image_processor": settings})
    del settings["auto_map"]  # in this file transformers' pipelines would look for a processor of videos by it
    write_json(directory / "preprocessor_config.json", settings)
    for name, content in tokenizer_files(model_config["model_cfg"]["text_cfg"]["context_length"]).items():
        write_whole(directory / name, content)
    write_code([*DiffCLIPModel.auto_classes.values(), *processor.auto_classes.values()], directory)
    write_whole(directory / "config.json", config.to_json_string())


def image_processor(model_config: dict[str, Any]) -> DiffCLIPImageProcessor:
    """Return the processor that does what `transforms(model_config, train=False)` does."""
    cfg = model_config["preprocess_cfg"]
    return DiffCLIPImageProcessor(
        size={"shortest_edge": cfg["size"]},
        crop_size={"height": cfg["size"], "width": cfg["size"]},
        resample=getattr(PILImageResampling, cfg["interpolation"].upper()),
        image_mean=cfg["mean"],
        image_std=cfg["std"],
        **({"decoding": trained_by} if (trained_by := model_config["diffclip"].get("decoding")) else {}),
    )


@lru_cache
def tokenizer_files(context_length: int) -> dict[str, str]:
    """The files of `byte_pairs` as a transformers tokenizer: name -> content.

    It pads with the end token, as transformers' CLIP does, where open_clip's pads with 0; the embedding is read at the
    first end token, so it is the same.
    """
    tokenizer = byte_pairs()
    start, end = (token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "CLIPProcessor",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "model_max_length": context_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings, indent=1) + "\n"}


def byte_pairs() -> Tokenizer:
    """Return open_clip's tokenizer as one of the tokenizers library: the same ids, up to what `CLEANING` leaves out."""
    theirs = open_clip.SimpleTokenizer()
    start, end = (theirs.decoder[index] for index in theirs.all_special_ids)
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.get)
    bpe = BPE(theirs.encoder, merges, end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=end)
    tokenizer = Tokenizer(bpe)
    cleaning = [normalizers.Replace(Regex(pattern), text) for pattern, text in CLEANING.items()]
    tokenizer.normalizer = normalizers.Sequence([*cleaning, normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in (start, end)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=list(zip((start, end), theirs.all_special_ids))
    )
    return tokenizer
