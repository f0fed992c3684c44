"""Directories of transformers' CLIPModel: their own image processor and tokenizer are followed, or refused by name."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import diffclip
from diffclip.attention_maps import seen_part
from diffclip.base.errors import InputError

WORDS = ["a", "red", "mug", "Red", "Mug", "two", "dogs", "on", "the", "beach"]


def clip_directory(folder, vision=None, text=None, processor=None, weights=True):
    """Write a small CLIPModel, with `processor` as its preprocessor_config.json, and return the model."""
    torch.manual_seed(0)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    config = CLIPConfig(
        vision_config=shared | {"image_size": 32, "patch_size": 8} | (vision or {}),
        text_config=shared | {"vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 2} | (text or {}),
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder) if weights else config.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def add_tokenizer(folder, eos=63, lowercase=True, pad="<|endoftext|>", **settings):
    """A word-level tokenizer that puts its start in front and its end behind."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(WORDS, 5)} | {"<unk>": 1, "<s>": 62, "<|endoftext|>": eos}
    vocabulary |= {pad: vocabulary.get(pad, 0)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase() if lowercase else None
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 62), ("<|endoftext|>", eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A <|endoftext|>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"model_max_length": 12, "padding_side": "right", **settings}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


PROCESSORS = {
    "as OpenAI's old files": {
        "size": 32,
        "crop_size": 32,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "resample": 3,
    },
    "shortest edge above the crop": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    "squashed": {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    "squashed, then cropped": {"size": {"height": 48, "width": 40}, "crop_size": 32},
    "crop alone": {"do_resize": False, "crop_size": 32},
    "bilinear": {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 2},
    "nearest": {"size": {"shortest_edge": 32}, "crop_size": 32, "resample": 0},
    "other numbers": {"size": 32, "crop_size": 32, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.5]},
    "no normalisation": {"size": 32, "crop_size": 32, "do_normalize": False},
    "another scale": {
        "size": 32,
        "crop_size": 32,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1, 1, 1],
        "image_std": [1, 1, 1],
    },
    "no scale": {"size": 32, "crop_size": 32, "do_rescale": False, "do_normalize": False},
    "as ViT's": {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "as the fast one's": {
        "image_processor_type": "CLIPImageProcessorFast",
        "size": {"shortest_edge": 35},
        "crop_size": 32,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_the_directory_says(name, tmp_path):
    told = {"image_processor_type": "CLIPImageProcessor"} | PROCESSORS[name]
    theirs = clip_directory(tmp_path, processor=told)
    add_tokenizer(tmp_path)
    model, transform, _ = diffclip.load(tmp_path)
    if told["image_processor_type"] == "ViTImageProcessor":
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil as Kind
    else:
        Kind = CLIPImageProcessorPil
    processor = Kind(**{key: value for key, value in told.items() if not key.endswith("_type")})
    rng = np.random.default_rng(0)
    for height, width in ((47, 61), (90, 33), (35, 128), (32, 32)):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        image = coarse.resize((width, height), Image.Resampling.BICUBIC)
        pixels = processor(image, return_tensors="pt")["pixel_values"].float()
        torch.testing.assert_close(transform(image)[None], pixels, rtol=0, atol=0)
        with torch.no_grad():
            ours, other = model.encode_image(transform(image)[None]), theirs.get_image_features(pixel_values=pixels)
        other = getattr(other, "pooler_output", other)
        assert F.cosine_similarity(ours, other).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_what_maps_are_laid_over_is_what_the_tower_sees(name, tmp_path):
    clip_directory(tmp_path, processor={"image_processor_type": "CLIPImageProcessor"} | PROCESSORS[name])
    add_tokenizer(tmp_path)
    transform = diffclip.load(tmp_path)[1]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    seen = seen_part(transform)(image)
    assert seen.size == (32, 32) and seen.mode == "RGB"
    about = transform.processor
    pixels = torch.from_numpy(np.asarray(seen)).permute(2, 0, 1).float()
    if about.do_rescale:
        pixels = pixels * about.rescale_factor
    if about.do_normalize:
        pixels = (pixels - torch.tensor(about.image_mean)[:, None, None]) / torch.tensor(about.image_std)[:, None, None]
    torch.testing.assert_close(transform(image), pixels, rtol=1e-5, atol=1e-5)
    mask = Image.fromarray(np.arange(70 * 90).reshape(70, 90) % 2 > 0).convert("RGB")
    assert set(np.unique(np.asarray(seen_part(transform, nearest=True)(mask)))) <= {0, 255}


def test_saved_processors_of_today_are_followed(tmp_path):
    """transformers 5 writes processor_config.json, with the image processor inside it."""
    from transformers import CLIPProcessor

    clip_directory(tmp_path)
    add_tokenizer(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 44}, crop_size={"height": 32, "width": 32}, resample=2)
    CLIPProcessor(processor, AutoTokenizer.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (51, 70, 3), dtype=np.uint8))
    made = diffclip.load(tmp_path)[1](image)
    torch.testing.assert_close(made, processor(image, return_tensors="pt")["pixel_values"][0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_images_of_other_modes_are_prepared(mode, tmp_path):
    clip_directory(tmp_path, processor={"size": 32, "crop_size": 32, "do_convert_rgb": False})
    add_tokenizer(tmp_path)
    assert diffclip.load(tmp_path)[1](Image.new("RGB", (50, 40), "red").convert(mode)).shape == (3, 32, 32)


def test_transform_and_tokenizer_travel_to_other_processes_and_print_what_they_do(tmp_path):
    clip_directory(tmp_path, processor={"size": 32, "crop_size": 32, "image_mean": [0.25] * 3})
    add_tokenizer(tmp_path)
    _, transform, tokenizer = diffclip.load(tmp_path)
    again, words = pickle.loads(pickle.dumps((transform, tokenizer)))
    assert torch.equal(again(Image.new("RGB", (40, 50))), transform(Image.new("RGB", (40, 50))))
    assert torch.equal(words("a red mug"), tokenizer(["a red mug"]))
    assert "0.25" in repr(transform)  # by which the cache of features tells transforms apart


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"size": 224, "crop_size": 224}, r"makes \(3, 224, 224\) of an image of 71 x 35 pixels.*takes \(3, 32, 32\)"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, r"preprocessor_config.json: makes \(3, 32, "),
        ({"size": {"longest": 3}}, "its image processor cannot be used"),
        ({"image_processor_type": "NobodysProcessor"}, "its image processor cannot be used"),
        ({"image_mean": [0.1, 0.2], "size": 32, "crop_size": 32}, "its image processor cannot be used"),
    ],
)
def test_what_cannot_be_followed_is_refused(processor, message, tmp_path):
    clip_directory(tmp_path, processor=processor)
    add_tokenizer(tmp_path)
    with pytest.raises(InputError, match=message):
        diffclip.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize(
    ("eos", "told", "pad"), [(63, 2, "<|endoftext|>"), (63, 63, "<|endoftext|>"), (30, 30, "<pad>"), (30, 30, "!")]
)
def test_texts_are_read_by_the_directorys_tokenizer_and_at_its_end_token(eos, told, pad, lowercase, tmp_path):
    theirs = clip_directory(tmp_path, text={"eos_token_id": told}, processor={"size": 32, "crop_size": 32})
    add_tokenizer(tmp_path, eos, lowercase, pad)
    model, _, tokenizer = diffclip.load(tmp_path)
    texts = ["a Red mug", "two dogs on the beach", "", "red " * 30]
    ids = tokenizer(texts)
    assert ids.shape == (4, 12) and ids.dtype == torch.int64
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"])
    assert (ids[0] == ids[0].new_tensor([62, 5, 6 if lowercase else 8, 7, eos, *ids[0, 5:]])).all()
    with torch.no_grad():
        ours = model.encode_text(ids)
        other = theirs.get_text_features(**{k: v for k, v in expected.items() if k != "token_type_ids"})
    torch.testing.assert_close(ours, getattr(other, "pooler_output", other), atol=1e-5, rtol=1e-4)


def test_a_tokenizer_that_cuts_earlier_than_the_model_is_followed(tmp_path):
    clip_directory(tmp_path, processor={"size": 32, "crop_size": 32})
    add_tokenizer(tmp_path, model_max_length=6)
    model, _, tokenizer = diffclip.load(tmp_path)
    ids = tokenizer("red " * 30)
    assert ids.shape == (1, 12) and (ids == 6).sum() == 4 and model.encode_text(ids).shape == (1, 16)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    clip_directory(tmp_path, processor={"size": 32, "crop_size": 32})
    with pytest.raises(InputError, match="no tokenizer beside a vocabulary of 64"):
        diffclip.load(tmp_path)
    add_tokenizer(tmp_path, padding_side="left")
    with pytest.raises(InputError, match="pads on the left"):
        diffclip.load(tmp_path)
    add_tokenizer(tmp_path, eos=64)
    with pytest.raises(InputError, match="but the model embeds 64"):
        diffclip.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        diffclip.load(tmp_path)


def test_epsilons_of_the_configuration_are_kept(tmp_path):
    theirs = clip_directory(tmp_path, {"layer_norm_eps": 0.1}, {"layer_norm_eps": 0.3}, {"size": 32, "crop_size": 32})
    add_tokenizer(tmp_path)
    model, _, tokenizer = diffclip.load(tmp_path)
    pixels, ids = torch.randn(2, 3, 32, 32), tokenizer(["a red mug", "dogs"])
    out = theirs(input_ids=ids, pixel_values=pixels)
    torch.testing.assert_close(model.encode_image(pixels, normalize=True), out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.encode_text(ids, normalize=True), out.text_embeds, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_weights_in_several_files_or_pickled_load(form, tmp_path):
    theirs = clip_directory(tmp_path, processor={"size": 32, "crop_size": 32}, weights=False)
    add_tokenizer(tmp_path)
    if form == "bin":
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        theirs.save_pretrained(tmp_path, max_shard_size="40KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    pixels = torch.randn(1, 3, 32, 32)
    other = theirs.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(
        diffclip.load(tmp_path)[0].encode_image(pixels), getattr(other, "pooler_output", other), atol=1e-5, rtol=1e-4
    )
    if form == "sharded":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
        with pytest.raises(InputError, match="of its own directory"):
            diffclip.load(tmp_path)


def test_siglip_and_other_directories_are_told_what_they_are(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')  # whose patches vary in number
    with pytest.raises(InputError, match=r"config.json \(siglip2\).*google/siglip2-base-patch16-224"):
        diffclip.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(InputError, match=r"config.json \(llava\) is for transformers"):
        diffclip.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="no model_type"):
        diffclip.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {"hidden_size": "wide"}}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"config.json: vision_config.hidden_size is 'wide'"):
        diffclip.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"one of its files \(pytorch_model.bin\)"):
        diffclip.load(tmp_path)
    (tmp_path / "checkpoint-30").mkdir()
    with pytest.raises(InputError, match="a run that is not finished"):
        diffclip.load(tmp_path)
