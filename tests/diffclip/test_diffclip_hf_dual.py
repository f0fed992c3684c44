"""The dual encoder in transformers: equal to ours, and taken by what takes a CLIPModel."""

import html
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import diffclip
from diffclip import hf, models
from diffclip.base.backbones import open_clip

NAMES = ["CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-star-tiny", "DiffCLIP-dagger-tiny", "DiffCLIP-V2-tiny"]
TEXTS = ["a photo of a cat", "a red circle left of a blue square", "hi"]


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory):
    """A run directory, the dual encoder that was saved there, pixels, and ids padded with 0."""
    torch.manual_seed(0)
    model = models.build(request.param).eval()
    directory = tmp_path_factory.mktemp(request.param)
    diffclip.save(model, directory)
    return directory, model, torch.randn(3, 3, 48, 48), diffclip.tokenizer(model.model_config)(TEXTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One run directory and its model, for what does not depend on the attention."""
    torch.manual_seed(0)
    model = models.build("DiffCLIP-tiny").eval()
    directory = tmp_path_factory.mktemp("saved")
    diffclip.save(model, directory)
    return directory, model


@pytest.mark.slow
@torch.no_grad()
def test_it_answers_as_clip_model_does_with_our_features(run):
    directory, model, pixels, ids = run
    dual = AutoModel.from_pretrained(directory).eval()
    assert type(dual) is hf.DiffCLIPModel
    inputs = AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")
    image, text, scale = model(pixels, ids)
    out = dual(**inputs, pixel_values=pixels, return_loss=True)
    torch.testing.assert_close(out.image_embeds, image, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.text_embeds, text, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.logits_per_image, scale * image @ text.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)
    loss = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dual.get_image_features(pixels).pooler_output, model.encode_image(pixels))
    torch.testing.assert_close(dual.get_text_features(ids).pooler_output, model.encode_text(ids), atol=1e-5, rtol=1e-5)
    without_mask = dual(inputs["input_ids"], pixels).text_embeds
    torch.testing.assert_close(without_mask, text, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_maps_of_both_towers_come_from_the_pass_and_their_number_from_the_config(run):
    directory, _, pixels, ids = run
    dual = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    out = dual(ids, pixels, output_attentions=True, output_hidden_states=True)
    towers = ((out.vision_model_output, dual.config.vision_config), (out.text_model_output, dual.config.text_config))
    for tower, config in towers:
        assert [a.shape[1] for a in tower.attentions] == [config.num_attention_maps] * config.num_hidden_layers
        assert len(tower.hidden_states) == config.num_hidden_layers + 1
    assert not out.text_model_output.attentions[0].triu(1).any()
    gradients = torch.autograd.grad(out.logits_per_image.sum(), [tower.attentions[0] for tower, _ in towers])
    assert all(gradient.any() for gradient in gradients)
    dual.set_attn_implementation("sdpa")
    torch.testing.assert_close(dual(ids, pixels).logits_per_image, out.logits_per_image, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_mask_hides_tokens_and_padding_changes_nothing(run):
    directory, _, _, ids = run
    text = AutoModel.from_pretrained(directory).text_model.eval()
    mask = torch.ones_like(ids)
    mask[:, 1] = 0
    shorter = torch.cat([ids[:, :1], ids[:, 2:]], dim=1)
    positions = torch.cat([torch.arange(1), torch.arange(2, ids.shape[1])]).expand(len(ids), -1)
    hidden = text(ids, mask).pooler_output
    torch.testing.assert_close(hidden, text(shorter, position_ids=positions).pooler_output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(hidden, text(ids).pooler_output)
    with pytest.raises(ValueError, match="truncation=True"):
        text(ids.new_ones(1, 41))


@pytest.mark.slow
def test_gradients_of_a_checkpointed_pass_are_the_same(run):
    directory, _, pixels, ids = run
    dual, found = AutoModel.from_pretrained(directory).train(), []
    for enable in (False, True):
        if enable:
            dual.gradient_checkpointing_enable()
        dual.zero_grad()
        dual(ids, pixels, return_loss=True).loss.backward()
        found.append([p.grad for p in dual.parameters()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_saved_copy_is_the_same_and_drawn_weights_start_as_ours(run, tmp_path):
    directory, *_ = run
    dual = AutoModel.from_pretrained(directory)
    dual.save_pretrained(tmp_path)
    again, info = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), dual.state_dict().values()))
    torch.manual_seed(1)
    drawn, wanted = AutoModel.from_config(dual.config).state_dict(), dual.state_dict()
    assert drawn.keys() == wanted.keys()
    for name, value in drawn.items():
        spread = wanted[name].double().std() if value.numel() > 1 else 0
        if name.startswith("text_model") and name.endswith("bias"):
            assert not value.any()  # open_clip leaves torch's in the MLP
        elif value.numel() >= 128 and spread:
            assert abs(value.double().std() / spread - 1) < 10 / value.numel() ** 0.5, name
            assert not torch.equal(value, wanted[name])
        elif not spread:
            torch.testing.assert_close(value, wanted[name], atol=1e-4, rtol=0)


CAPTIONS = [
    *TEXTS,
    "A man's dog isn't here; they'll say they've met. I'm sure we're late, he'd go",
    "naïve café Ünïcödé, x\u0301e\u0301, Москва, שלום, हिन्दी, 日本語のテキスト",
    "🙂🙂 emoji 👍🏽, “quoted” ‘text’ — dash… foo—bar",
    "&lt;p&gt; &quot;x&quot; &#39;y&#39; a &amp; b, &amp;lt;b&amp;gt; AT&T",
    "tab\tnew\nline   spaces\u00a0nbsp\x07 \x1b[31mred",
    "word " * 100,
    "",
    "   ",
    "123 4567 3.14 100% !!! ??? ...",
    "ﬁne ﬂow ﬀ, ΟΔΟΣ ΣΑΣ, İstanbul STRAẞE",
    "a<start_of_text> <END_OF_TEXT>b",
    "snake_case camelCase http://a.b/c?d=e&f=g it''s '' 's",
]


def random_captions(count):
    generator = torch.Generator().manual_seed(0)
    signs = "abcxyzABZ 0123456789 '’\"“.,!?-_/&<>;:()[]é ü ß ñ λ Д ж 中 あ 🙂 \n\t"
    for length in torch.randint(1, 60, (count,), generator=generator):
        picks = torch.randint(len(signs), (int(length),), generator=generator)
        yield "".join(signs[i] for i in picks)


@pytest.mark.slow
def test_the_tokenizer_gives_our_ids(saved):
    directory, model = saved
    ours, theirs = diffclip.tokenizer(model.model_config), AutoTokenizer.from_pretrained(directory)
    captions = [*CAPTIONS, *random_captions(300)]
    captions += [html.escape(caption) for caption in captions]
    wanted = ours(captions)
    found = theirs(captions, truncation=True, padding="max_length", return_tensors="pt")
    lengths = (wanted != 0).cumsum(1).argmax(1) + 1  # ours pads with 0, which is "!" too
    ends = (found["attention_mask"]).sum(1)
    for caption, ids, length, other, end in zip(captions, wanted, lengths, found["input_ids"], ends):
        assert ids[:length].tolist() == other[:end].tolist(), caption
        assert set(other[end:].tolist()) <= {49407}
    assert theirs.decode(theirs("A photo, of a cat!").input_ids, skip_special_tokens=True) == "a photo , of a cat ! "


@pytest.mark.slow
def test_pipeline_and_processor_take_a_run(saved, monkeypatch):
    directory, model = saved
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the directory's code"))
    classify = pipeline("zero-shot-image-classification", model=str(directory))
    image, labels = Image.new("RGB", (60, 50), "red"), ["a red square", "a blue circle", "a cat"]
    found = {
        each["label"]: each["score"] for each in classify(image, candidate_labels=labels, hypothesis_template="{}")
    }
    transform, tokenize = diffclip.transforms(model.model_config, train=False), diffclip.tokenizer(model.model_config)
    with torch.no_grad():
        one, texts, scale = model(transform(image)[None], tokenize(labels))
    wanted = dict(zip(labels, (scale * one @ texts.T).softmax(-1)[0].tolist()))
    assert found == pytest.approx(wanted, abs=1e-5)
    inputs = AutoProcessor.from_pretrained(directory)(text=labels, images=image, padding=True, return_tensors="pt")
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    torch.testing.assert_close(inputs["pixel_values"][0], transform(image), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_sentence_transformers_take_a_run(saved):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    directory, model = saved
    encoder = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    with torch.no_grad():
        wanted = model.encode_text(diffclip.tokenizer(model.model_config)(TEXTS))
    torch.testing.assert_close(torch.from_numpy(encoder.encode(TEXTS)), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_classifier_has_the_tower_and_a_new_layer_that_learns(saved, tmp_path):
    directory, model = saved
    pixels, labels = torch.randn(8, 3, 48, 48), torch.arange(8) % 3
    classifier, info = AutoModelForImageClassification.from_pretrained(
        directory, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    out = classifier(pixels, labels=labels)
    torch.testing.assert_close(out.logits, classifier.classifier(model.visual.trunk(pixels)))
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    optimizer = torch.optim.SGD(classifier.classifier.parameters(), lr=0.1)
    for _ in range(20):
        classifier(pixels, labels=labels).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert classifier(pixels, labels=labels).loss < 0.8 * out.loss
    classifier.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, classifier(pixels).logits)
    tower = hf.DiffCLIPVisionModel.from_pretrained(directory)
    tower.save_pretrained(tmp_path / "tower")
    alone = AutoModelForImageClassification.from_pretrained(tmp_path / "tower", num_labels=2)
    assert torch.equal(alone.vision_model.trunk.norm.weight, tower.trunk.norm.weight)


def test_backbone_gives_timms_intermediates(saved):
    directory, model = saved
    pixels = torch.randn(2, 3, 48, 48)
    backbone = hf.DiffCLIPBackbone.from_pretrained(directory, out_indices=[1, 4]).eval()
    maps = backbone(pixels).feature_maps
    wanted = model.visual.trunk.forward_intermediates(pixels, indices=[0, 3], intermediates_only=True, norm=False)
    assert all(torch.equal(found, want) for found, want in zip(maps, wanted)) and len(maps) == 2
    assert backbone.channels == [128, 128] and backbone.out_features == ["stage1", "stage4"]
    assert backbone(torch.randn(1, 3, 64, 40)).feature_maps[0].shape == (1, 128, 8, 5)
    of_dual = AutoBackbone.from_config(AutoConfig.from_pretrained(directory), out_features=["stem"])
    assert of_dual(pixels).feature_maps[0].shape == (2, 128, 6, 6)


def test_the_weights_lie_in_one_file_under_their_names(saved):
    directory, model = saved
    state = load_file(directory / "model.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in model.parameters())
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "diffclip" and config["vision_config"]["model_type"] == "diffclip_vision"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-V2-tiny"])
def test_whatever_one_tensor_a_file_lacks_is_drawn_as_ours_and_no_other(name, tmp_path):
    torch.manual_seed(0)
    dual = hf.files.to_dual_encoder(models.build(name))
    state = {key: torch.full_like(tensor, 9.0) for key, tensor in dual.state_dict().items()}
    layers = ("blocks.1", "resblocks.1")
    lacking = [key for key in state if not any(f"blocks.{i}." in key for i in (0, 2, 3))]
    assert any(layer in key for layer in layers for key in lacking)
    dual.save_pretrained(tmp_path, state_dict={key: t for key, t in state.items() if key not in lacking})
    again = AutoModel.from_pretrained(tmp_path, output_loading_info=True)[0].state_dict()
    for key, tensor in again.items():
        if key in lacking:
            assert tensor.isfinite().all() and tensor.abs().max() < 5, key
        else:
            assert torch.equal(tensor, state[key]), key
