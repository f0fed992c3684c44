"""Tiny parts of a multimodal model with seeded random weights, written once per test session."""

from importlib.metadata import entry_points

import pytest

# torch and transformers are imported where they are used: pytest reads this file once more than it runs tests

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: Is there a red square "
    "in the image? Yes No yes no a small blue circle left of the green star"
)
THINGS = ("dog", "dogs", "cat", "person", "table", "bench")  # with plurals and synonyms of COCO's categories


@pytest.fixture(scope="session")
def tower_dir(tmp_path_factory):
    """A CLIP vision model: 32 px, patch 8 (16 patches and CLS), width 32, 3 layers; and its processor."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    path = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    CLIPVisionModel(config).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def language_dir(tmp_path_factory):
    return write_language(tmp_path_factory.mktemp("language"), TEXT)


def write_language(path, text, size=400):
    """A Qwen2 of width 32 with tied embeddings, a table with spare rows, and no `<image>` token; it knows the text."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).train_new_from_iterator(
        [text] * 4, size, show_progress=False, new_special_tokens=[]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.save_pretrained(path)
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,  # so that random weights say different things about different inputs
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def assembled(tower_dir, language_dir):
    """(model, processor), fresh for each test."""
    from mllm.assemble import assemble

    return assemble(tower_dir, language_dir, seed=3)


@pytest.fixture
def saying(assembled):
    """saying(words) -> the model, made to write nothing but these words, as its images have it."""
    return lambda *words: only_saying(assembled, *words)


def only_saying(vlm, *words, ends=True):
    """Keep a model from all tokens but those of these words, each of which is one, and the end."""
    ids = [vlm.tokenizer(f" {word}")["input_ids"] for word in words]
    assert all(len(tokens) == 1 for tokens in ids), dict(zip(words, ids))
    allowed = {tokens[0] for tokens in ids} | ({vlm.tokenizer.eos_token_id} if ends else set())
    everything = set(range(vlm.model.config.text_config.vocab_size))
    vlm.model.generation_config.suppress_tokens = sorted(everything - allowed)
    return vlm


@pytest.fixture
def talking(tower_dir, tmp_path_factory):
    """A model that goes on naming things, `THINGS`, as its images have it."""
    from mllm.assemble import assemble

    language = write_language(tmp_path_factory.mktemp("talking"), f"{TEXT} {' '.join(THINGS)}", 440)
    return only_saying(assemble(tower_dir, language, seed=3), *THINGS, ends=False)


@pytest.fixture(scope="session")
def picture():
    """image(seed, size) -> a PIL image of noise."""
    import numpy as np
    from PIL import Image

    def make(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The entry point as an installation of this package would register it."""
    if not any(e.name == "diffclip_llava" for e in entry_points(group="lmms_eval.models")):
        info = tmp_path / "site" / "diffclip_stack-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: diffclip-stack\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[lmms_eval.models]\ndiffclip_llava = mllm.lmms_plugin:manifest\n")
        monkeypatch.syspath_prepend(str(info.parent))
        monkeypatch.setenv("PYTHONPATH", str(info.parent))
