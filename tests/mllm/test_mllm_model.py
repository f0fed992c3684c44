"""The assembled model against transformers' own LLaVA, and every guard against a planted fault."""

import json
import shutil
from operator import attrgetter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import diffclip
import mllm.assemble as mllm_assemble
from diffclip import checkpoints
from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from mllm.assemble import assemble, assembled_config, whiten_projector
from mllm.conversation import IGNORE, NoSupervisionError, prompt
from mllm.data.examples import collate
from mllm.model import VisionLanguageModel, load
from mllm.weights import WeightsError, freeze, parts, verify


def ask(processor, pictures, questions):
    """Left-padded model inputs for one question about each image."""
    processor.tokenizer.padding_side = "left"
    texts = [prompt([{"from": "human", "value": f"<image>\n{q}"}], "vicuna") for q in questions]
    return processor(images=pictures, text=texts, padding=True, return_tensors="pt")


def batch(model, processor, picture):
    """Two examples with the last three tokens supervised in the first and the last one in the second."""
    inputs = ask(processor, [picture(0), picture(1)], ["Is there a red square?", "Yes"])
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[0, -3:] = inputs["input_ids"][0, -3:]
    labels[1, -1:] = inputs["input_ids"][1, -1:]
    return {**inputs, "labels": labels}


@torch.no_grad()
def test_loss_equals_transformers_llava_with_all_logits(assembled, picture):
    model, processor = assembled
    inputs = batch(model, processor, picture)
    reference = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=model.config.vision_config,
            text_config=model.config.text_config,
            image_token_index=model.config.image_token_id,
        )
    )
    reference.model.multi_modal_projector = torch.nn.Linear(32, 32)
    reference.load_state_dict(model.state_dict())
    reference.eval()
    expected = reference(**inputs).loss
    model.train()
    outputs = model(**inputs)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected)
    summed = model(**inputs, num_items_in_batch=torch.tensor(10)).loss
    torch.testing.assert_close(summed, expected * 4 / 10)  # four supervised tokens, averaged over ten
    model.eval()
    torch.testing.assert_close(model(**inputs).loss, expected)
    moved = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORE)
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(**inputs, shift_labels=moved).loss, expected)


def test_supervised_only_logits_are_never_larger(assembled, picture):
    model, processor = assembled
    inputs = batch(model, processor, picture)
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[:-1].numel()))
    model.train()(**inputs).loss.backward()
    assert rows == [4]


def test_only_the_named_parts_get_gradients_and_the_frozen_tower_stays_in_eval(assembled, picture):
    model, processor = assembled
    counts = freeze(model, {"projector"})
    assert counts["projector"] == 32 * 32 + 32
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())  # tied head counted once
    model.train()
    assert not model.model.vision_tower.training and model.model.language_model.training
    model(**batch(model, processor, picture)).loss.backward()
    for name, module in parts(model).items():
        assert all((p.grad is not None) == (name == "projector") for p in module.parameters())
    freeze(model, {"projector", "vision_tower"})
    model.train()
    assert model.model.vision_tower.training
    with pytest.raises(InputError, match="projector"):
        freeze(model, {"proyector"})


def test_batch_of_text_alone_still_runs_every_part(assembled):
    model, processor = assembled
    freeze(model, {"projector", "language_model"})
    ids = processor.tokenizer(["yes no yes"], return_tensors="pt")["input_ids"]
    plain = model.eval()(input_ids=ids, labels=ids).loss
    loss = model.train()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert all((p.grad == 0).all() for p in parts(model)["projector"].parameters())


def test_batched_generation_equals_single(assembled, picture):
    model, processor = assembled
    questions = ["Is there a red square in the image?", "a", "Is there a small blue circle left of the star?"]
    pictures = [picture(i) for i in range(3)]
    inputs = ask(processor, pictures, questions)
    together = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    answers = set()
    for i in range(3):
        alone = ask(processor, pictures[i : i + 1], questions[i : i + 1])
        single = model.generate(**alone, max_new_tokens=6)[0, alone["input_ids"].shape[1] :]
        assert together[i, : len(single)].tolist() == single.tolist()
        answers.add(tuple(single.tolist()))
    assert len(answers) > 1  # otherwise the model is too dull to tell


def test_features_are_the_penultimate_layer_without_cls(assembled, picture):
    model, processor = assembled
    pixels = processor.image_processor([picture(0)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = model.get_image_features(pixels, return_dict=True).pooler_output[0]
        expected = parts(model)["projector"](states[len(states) - 2][0, 1:])
    torch.testing.assert_close(features, expected)


def test_save_and_auto_classes_give_the_same_model(assembled, picture, tmp_path):
    model, processor = assembled
    assembled.save(tmp_path)
    inputs = ask(processor, [picture(0)], ["Is there a red square?"])
    with torch.no_grad():
        expected = model(**inputs).logits
        for again, again_processor in (
            (AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)),
            load(tmp_path),
        ):
            again_inputs = ask(again_processor, [picture(0)], ["Is there a red square?"])
            assert torch.equal(again_inputs["input_ids"], inputs["input_ids"])
            assert torch.equal(again_inputs["pixel_values"], inputs["pixel_values"])
            assert torch.equal(again(**again_inputs).logits, expected)
            assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
            assert again.config.conversation_template == "vicuna"


def test_plain_llava_classes_refuse_a_linear_projector(assembled, tmp_path):
    """They would put random weights in its place and only warn."""
    assembled.save(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for kind in (LlavaForConditionalGeneration, LlavaModel):
        for given in ({}, {"config": config}):
            with pytest.raises(KeyError, match=r"import diffclip.*AutoModelForImageTextToText"):
                kind.from_pretrained(tmp_path, **given)


def test_plain_llava_loads_its_own_projector_whole(tower_dir, language_dir, picture, tmp_path):
    model, processor = assemble(tower_dir, language_dir, projector="mlp", seed=3)
    VisionLanguageModel(model, processor).save(tmp_path)
    plain, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = ask(processor, [picture(0)], ["Is there a red square?"])
    torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits)


def test_auto_model_loads_every_weight(assembled, picture, tmp_path):
    model, processor = assembled
    assembled.save(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == "DiffCLIPLlavaModel" and not any(info.values())
    inputs = ask(processor, [picture(0)], ["Is there a red square?"])
    torch.testing.assert_close(loaded(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_a_saved_processor_pads_left_and_training_pads_right(assembled, picture, tmp_path):
    model = assembled.model
    assembled.save(tmp_path)
    read = AutoProcessor.from_pretrained(tmp_path)
    texts = [prompt([{"from": "human", "value": f"<image>\n{q}"}], "vicuna") for q in ("Is there a red square?", "a")]
    shown = [picture(0), picture(1)]
    inputs = read(text=texts, images=shown, padding=True, return_tensors="pt")
    assert inputs["attention_mask"].sum(1).unique().numel() == 2
    together = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    for text, image, found in zip(texts, shown, together):
        alone = read(text=[text], images=[image], return_tensors="pt")
        single = model.generate(**alone, max_new_tokens=6)[0, alone["input_ids"].shape[1] :].tolist()
        assert found.tolist()[: len(single)] == single
    ids = [torch.arange(5), torch.arange(3)]
    batch = collate(read)([{"input_ids": one, "labels": one} for one in ids])
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]


def test_a_run_saved_by_earlier_versions_loads(assembled, tmp_path):
    model, processor = assembled
    assembled.save(tmp_path)
    for name, key, value in (
        ("config.json", "projector_hidden_act", "gelu"),
        ("tokenizer_config.json", "padding_side", "right"),
    ):
        written = json.loads((tmp_path / name).read_text())
        assert written[key] != value
        (tmp_path / name).write_text(json.dumps({**written, key: value}))
    read, processor = load(tmp_path)
    assert processor.tokenizer.padding_side == "left"
    assert all(torch.equal(value, read.state_dict()[key]) for key, value in model.state_dict().items())
    VisionLanguageModel(read, processor).save(tmp_path / "again")
    assert "import diffclip" in json.loads((tmp_path / "again/config.json").read_text())["projector_hidden_act"]


@pytest.mark.slow
def test_identity_tells_models_apart_and_stays(assembled, tower_dir, language_dir, tmp_path):
    model, processor = assembled
    VisionLanguageModel(model, processor).save(tmp_path)
    same = VisionLanguageModel(model, processor).identity()
    assert load(tmp_path).identity() == same and assemble(tower_dir, language_dir, seed=3).identity() == same
    others = [assemble(tower_dir, language_dir, seed=4).identity()]
    model.to(torch.bfloat16)
    others.append(VisionLanguageModel(model, processor).identity())
    model.to(torch.float32).config.conversation_template = "chatml"
    others.append(assemble(tower_dir, language_dir, seed=3, image_mode="pad").identity())
    assert len({same, VisionLanguageModel(model, processor).identity(), *others}) == 5
    for part, name, value in (  # equal weights
        ("config.text_config", "rms_norm_eps", 0.1),
        ("generation_config", "repetition_penalty", 2.0),
        ("tokenizer", "eos_token", "<|endoftext|>"),
    ):
        model, processor = load(tmp_path)
        setattr(attrgetter(part)(processor if part == "tokenizer" else model), name, value)
        assert VisionLanguageModel(model, processor).identity() != same, name
    moved = load(shutil.copytree(tmp_path, tmp_path / "moved"))
    moved.ask("Is there?", max_new_tokens=1)  # sets the tokenizer's padding
    assert moved.identity() == same


def test_image_token_takes_a_spare_row_or_grows_the_table(assembled, language_dir, tower_dir, tmp_path):
    model, processor = assembled
    assert model.lm_head.weight.shape[0] == 409 and model.config.image_token_id == len(processor.tokenizer) - 1
    tight = tmp_path / "tight"
    shutil.copytree(language_dir, tight)
    lm = AutoModelForCausalLM.from_pretrained(language_dir)
    lm.resize_token_embeddings(402)
    lm.save_pretrained(tight)
    model, processor = assemble(tower_dir, tight)
    assert model.lm_head.weight.shape[0] == 403 == model.config.text_config.vocab_size
    torch.testing.assert_close(model.lm_head.weight[:402], lm.lm_head.weight)


def test_class_token_stands_before_the_patches(tower_dir, language_dir, picture, tmp_path):
    model, processor = assemble(tower_dir, language_dir, class_token=True)
    inputs = ask(processor, [picture(0)], ["Is there a red square?"])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 17
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(features, model.model.multi_modal_projector(states)[0])
    VisionLanguageModel(model, processor).save(tmp_path / "out")
    again, processor = load(tmp_path / "out")
    assert torch.equal(ask(processor, [picture(0)], ["Is there a red square?"])["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("class_token", [False, True])
def test_whitened_projector_shows_all_directions_alike(tower_dir, language_dir, class_token):
    from scipy.linalg import sqrtm

    model, _ = assemble(tower_dir, language_dir, class_token=class_token)
    pixels = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whiten_projector(model, pixels, seed=3)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    features = states[:, 0 if class_token else 1 :].flatten(0, 1).double()
    projector = model.model.multi_modal_projector
    torch.testing.assert_close(projector(features.float()).mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    covariance = np.cov(features.detach().numpy().T)
    covariance += 0.01 * np.linalg.eigvalsh(covariance).max() * np.eye(32)
    mixing = projector.weight.detach().double().numpy() @ sqrtm(covariance).real
    wanted = float(model.get_input_embeddings().weight.detach().std()) / 32**0.5
    assert mixing.std() == pytest.approx(wanted, rel=0.1) and abs(mixing.mean()) < 0.2 * wanted
    again, _ = assemble(tower_dir, language_dir, class_token=class_token)
    whiten_projector(again, pixels, seed=3)
    assert torch.equal(again.model.multi_modal_projector.weight, projector.weight)
    deeper, _ = assemble(tower_dir, language_dir, projector="mlp")
    with pytest.raises(InputError, match="linear projector"):
        whiten_projector(deeper, pixels, seed=3)


def test_siglip_tower_without_cls(language_dir, picture, tmp_path):
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, processor = assemble(tmp_path, language_dir, projector="mlp")
    assert model.config.vision_feature_select_strategy == "full"
    inputs = ask(processor, [picture(0)], ["a"])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    assert model(**inputs).logits.isfinite().all()
    with pytest.raises(InputError, match="no class token"):
        assemble(tmp_path, language_dir, class_token=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP-tiny", "DiffCLIP-tiny"])
def test_tower_of_a_pretraining_run(language_dir, picture, tmp_path, name):
    clip = diffclip.build(name)
    diffclip.save(clip, tmp_path / "pretrain")
    model, processor = assemble(tmp_path / "pretrain", language_dir)
    blocks = []
    for block in model.model.vision_tower.trunk.blocks:
        block.register_forward_hook(lambda *_: blocks.append(1))
    inputs = ask(processor, [picture(0)], ["Is there a red square?"])
    logits = model(**inputs).logits
    assert len(blocks) == 3  # the fourth block's output is never read
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 36
    pixels = diffclip.transforms(clip.model_config, train=False)(picture(0))
    torch.testing.assert_close(inputs["pixel_values"][0], pixels)
    VisionLanguageModel(model, processor).save(tmp_path / "out")
    torch.testing.assert_close(load(tmp_path / "out")[0](**inputs).logits, logits)
    assert fingerprint(model.model.vision_tower.trunk) == fingerprint(clip.visual.trunk)


def test_seed_decides_the_projector(tower_dir, language_dir):
    a, b, c = (parts(assemble(tower_dir, language_dir, seed=s)[0])["projector"].weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# Planted faults, one per guard.


def test_example_without_supervision_is_named(assembled, picture):
    model, processor = assembled
    inputs = batch(model, processor, picture)
    inputs["labels"][1] = IGNORE
    for mode in (True, False):
        with pytest.raises(NoSupervisionError, match=r"\[1\]"):
            model.train(mode)(**inputs)


def test_placeholder_count_mismatch_raises(assembled, picture):
    model, processor = assembled
    inputs = ask(processor, [picture(0)], ["a"])
    ids = inputs["input_ids"]
    ids[0, (ids[0] == model.config.image_token_id).nonzero()[0]] = 5
    with pytest.raises(ValueError, match="15"):
        model(**inputs)


def test_a_tower_that_turns_random_while_assembling_is_found(tower_dir, language_dir, monkeypatch):
    def reinitialise(skeleton, seed, dtype):
        for p in towers[0][0].parameters():
            torch.nn.init.normal_(p)
        return original(skeleton, seed, dtype)

    towers, original, load_tower = [], mllm_assemble.new_projector, mllm_assemble._load_tower
    monkeypatch.setattr(mllm_assemble, "_load_tower", lambda *a: towers.append(load_tower(*a)) or towers[0])
    monkeypatch.setattr(mllm_assemble, "new_projector", reinitialise)
    with pytest.raises(WeightsError, match="vision_tower"):
        assemble(tower_dir, language_dir)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vision_tower", "projector", "language_model"])
def test_weights_swapped_on_disk_are_found(assembled, tmp_path, part):
    assembled.save(tmp_path)
    keys = {"vision_tower": "vision_tower", "projector": "projector", "language_model": "language_model"}
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if keys[part] in k)
    weights[key] = weights[key] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=part):
        load(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "left over", "misshapen"])
def test_tower_with_foreign_weights_is_refused(tower_dir, language_dir, tmp_path, fault):
    shutil.copytree(tower_dir, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    key = next(k for k in weights if "layers.1" in k and "q_proj.weight" in k)
    tensor = weights.pop(key)
    if fault == "left over":
        weights |= {key: tensor, "encoder.layers.1.foreign": tensor.clone()}
    if fault == "misshapen":
        weights[key] = tensor[:, :3].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"foreign|q_proj"):
        assemble(tmp_path, language_dir)


def test_processor_of_another_size_is_refused(tower_dir, language_dir, tmp_path):
    shutil.copytree(tower_dir, tmp_path, dirs_exist_ok=True)
    CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="48x48"):
        assemble(tmp_path, language_dir)


@pytest.mark.slow
def test_paths_that_are_no_models_are_named(tower_dir, language_dir, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        assemble(tmp_path / "nowhere", language_dir)
    with pytest.raises(InputError, match="nowhere"):
        assemble(tower_dir, tmp_path / "nowhere")
    with pytest.raises(InputError, match="AutoModelForImageTextToText"):
        load(tower_dir)
    with pytest.raises(InputError, match="chatml"):
        assemble(tower_dir, language_dir, template="chatlm")


def test_verify_names_the_part(assembled, tmp_path):
    model = assembled.model
    assembled.save(tmp_path)
    prints = json.loads((tmp_path / "fingerprints.json").read_text())
    del prints["transform"], prints["settings"]  # not of weights
    verify(model, prints)
    with torch.no_grad():
        parts(model)["projector"].bias[0] += 1
    with pytest.raises(WeightsError, match="projector"):
        verify(model, prints)


def test_whole_clip_model_gives_its_vision_half(language_dir, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=50, **small).to_dict(),
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **small).to_dict(),
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, _ = assemble(tmp_path, language_dir)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = clip.eval().vision_model(pixels).last_hidden_state
        torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"image_mean": [0.5, 0.5, 0.5]}, {"resample": 0}, {"do_center_crop": False}, {"size": {"shortest_edge": 40}}],
)
def test_another_transform_than_in_training_is_refused(assembled, tmp_path, change):
    assembled.save(tmp_path)
    load(tmp_path)
    file = tmp_path / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"] |= change
    file.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"prepares images in another way than the model was trained"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("vision_feature_layer", -1), ("conversation_template", "chatml")])
def test_other_settings_than_in_training_are_refused(assembled, tmp_path, name, value):
    assembled.save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(InputError, match=f"{name} is {value} in its config.json"):
        load(tmp_path)


@pytest.mark.slow
def test_tower_of_an_official_file_or_the_folder_that_holds_it(language_dir, tmp_path):
    diffclip.save(diffclip.build("DiffCLIP-tiny"), tmp_path / "run")
    (tmp_path / "official").mkdir()
    with pytest.warns(UserWarning, match="by hand"):
        checkpoints.convert(tmp_path / "run", tmp_path / "official" / "checkpoint_best.pt")
    expected = assemble(tmp_path / "run", language_dir)[0].model.vision_tower
    for path in (tmp_path / "official", tmp_path / "official" / "checkpoint_best.pt"):
        model = assemble(path, language_dir)[0]
        assert fingerprint(model.model.vision_tower) == fingerprint(expected)
        assert assembled_config(path, language_dir).vision_config.lambda_init == expected.config.lambda_init


@torch.no_grad()
def test_features_of_several_layers_stand_side_by_side(tower_dir, language_dir, picture, tmp_path):
    model, processor = assemble(tower_dir, language_dir, vision_feature_layer=[-1, 1])
    inputs = ask(processor, [picture(0)], ["Yes"])
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    wanted = model.model.multi_modal_projector(torch.cat([states[-1][:, 1:], states[1][:, 1:]], dim=-1))
    torch.testing.assert_close(model.get_image_features(inputs["pixel_values"]).pooler_output[0], wanted[0])
    whiten_projector(model, torch.randn(8, 3, 32, 32), seed=0)
    VisionLanguageModel(model, processor).save(tmp_path)
    assert torch.equal(load(tmp_path).model(**inputs).logits, model(**inputs).logits)
    with pytest.raises(InputError, match="4 hidden states"):
        assemble(tower_dir, language_dir, vision_feature_layer=[-5])
