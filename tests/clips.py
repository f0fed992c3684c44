"""Small dual encoders of transformers' kinds, as directories; and which of our own the official code can hold."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffclip import variants
from diffclip.attention import KINDS
from diffclip.variants import VARIANTS

TEXT = {"layers": 2, "width": 32, "heads": 4, "context_length": 12, "vocab_size": 49408}
VIT = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
OPEN_CLIP = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}  # a config of open_clip's


def shallow(name, vision=2, text=1):
    """A config of ours with so many layers in each tower: what is traced or exported takes time for each layer."""
    config = variants.named(name)
    config["model_cfg"]["vision_cfg"]["layers"], config["model_cfg"]["text_cfg"]["layers"] = vision, text
    return config


def in_official_layout():
    """The variants whose kinds of attention the official code's checkpoints can hold, the baseline among them."""
    return [v for v, towers in VARIANTS.items() if all(KINDS[t["kind"]].in_official_layout for t in towers.values())]


def transformers_clip(folder, act="quick_gelu"):
    """Save a CLIPModel of two layers, without its inputs' files, and return it."""
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    shared |= {"hidden_act": act}
    vision = shared | {"image_size": 32, "patch_size": 8}
    # with an end token of 2, transformers reads the embedding at the largest id, as open_clip does
    text = shared | {"vocab_size": 49408, "max_position_embeddings": 20, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def small_siglip(generator):
    """A SiglipModel of two layers, none of whose parameters is 0."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 96, "max_position_embeddings": 8, "projection_size": 32, "bos_token_id": 1}
    text |= {"eos_token_id": 2, "pad_token_id": 0}
    config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8})
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zero biases would hide what is not loaded
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def siglip_directory(folder, model):
    """Save it with a tokenizer of a few words and an image processor."""
    words = {
        "<pad>": 0,
        "</s>": 1,
        "<unk>": 2,
        **{word: i for i, word in enumerate(["a", "red", "square", "two", "stars", "and"], 3)},
    }
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    model.save_pretrained(folder)
