"""The transformers tower: Auto classes, equal outputs, LLaVA around it, weights that stay, pixels that agree."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

import diffclip
from diffclip import checkpoints, hf, models, preprocessing, variants
from diffclip.attention import DifferentialAttention, maps
from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from diffclip.base.timm_vit import TimmVisionTransformer

NAMES = ["CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-star-tiny"]


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory):
    """A run directory and the dual encoder that was saved there."""
    torch.manual_seed(0)
    model = models.build(request.param).eval()
    directory = tmp_path_factory.mktemp(request.param)
    diffclip.save(model, directory)
    return directory, model


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def llava_config(tower_config):
    text = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlavaConfig(
        vision_config=tower_config,
        text_config=text,
        image_token_index=63,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


@pytest.mark.slow
def test_the_tower_loads_alone_from_a_run_directory(run):
    directory, model = run
    config = AutoConfig.from_pretrained(directory).vision_config
    towers = [AutoModel.from_pretrained(directory, config=config), hf.DiffCLIPVisionModel.from_pretrained(directory)]
    for tower in towers:
        assert isinstance(tower, hf.DiffCLIPVisionModel)
        assert fingerprint(tower.trunk) == fingerprint(model.visual.trunk)
    assert isinstance(AutoImageProcessor.from_pretrained(directory), hf.DiffCLIPImageProcessor)


@pytest.mark.slow
def test_runs_of_earlier_versions_load_as_their_tower(run, tmp_path):
    _, model = run
    old = hf.vision_config(model.model_config).to_dict()
    for new in ("num_attention_maps", "num_channels", "stage_names", "out_features", "out_indices"):
        del old[new]  # they hold the tower's config.json, and under trunk the tower's weights
    (tmp_path / "config.json").write_text(json.dumps(old))
    trunk = {f"trunk.{name}": tensor for name, tensor in model.visual.trunk.state_dict().items()}
    save_file(trunk, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tower, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert fingerprint(tower.trunk) == fingerprint(model.visual.trunk)
    assert not any(info.values())


@pytest.mark.slow
def test_outputs_are_the_dual_encoders(run, image):
    directory, model = run
    tower, seen = hf.DiffCLIPVisionModel.from_pretrained(directory).eval(), []
    hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in model.visual.trunk.blocks]
    with torch.no_grad():
        pooled = model.visual.trunk(image)
        out = tower(image, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert torch.equal(out.pooler_output, pooled)
    assert torch.equal(out.last_hidden_state[:, 0], pooled)
    assert len(out.hidden_states) == 5
    assert all(torch.equal(found, want) for found, want in zip(out.hidden_states[1:], seen))
    plain = tower(image)
    assert plain.hidden_states is None and plain.attentions is None
    assert torch.equal(tower(image, return_dict=False)[0], plain.last_hidden_state)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "DiffCLIP-V2-tiny"])
def test_maps_are_those_of_the_forward_pass_and_their_number_is_in_the_config(name, image):
    torch.manual_seed(0)
    tower = hf.DiffCLIPVisionModel(hf.vision_config(variants.MODELS[name])).eval()
    planes = {"CLIP-tiny": 4, "DiffCLIP-V2-tiny": 4}.get(name, 2)
    assert tower.config.to_dict()["num_attention_maps"] == planes
    out = tower(image, output_hidden_states=True, output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(2, planes, 37, 37)] * 4
    torch.testing.assert_close(out.pooler_output, tower(image).pooler_output, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(out.pooler_output.square().sum(), out.attentions)
    for layer in (0, 3):  # each is the derivative by the map, found by nudging it in one place
        block, places = tower.trunk.blocks[layer], (0, 1, 5, 7)
        map_ = maps.attention_map(block.attn, block.norm1(out.hidden_states[layer]))
        torch.testing.assert_close(map_, out.attentions[layer], rtol=0, atol=1e-6)
        change = torch.zeros_like(map_)
        change[places] = 1e-2

        def moved(sign, change=change, layer=layer, map_=map_):
            block = tower.double().trunk.blocks[layer]
            attention = block.attn
            attention.forward = lambda x, **_: maps.apply_map(attention, x, map_.double() + sign * change.double())
            try:
                return tower(image.double()).pooler_output.square().sum()
            finally:
                del attention.forward

        with torch.no_grad():
            slope = (moved(1) - moved(-1)) / 2e-2
        tower.float()
        torch.testing.assert_close(gradients[layer][places].double(), slope, rtol=0.02, atol=1e-5)


def test_maps_survive_gradient_checkpointing(image):
    tower, found = hf.DiffCLIPVisionModel(hf.vision_config(variants.MODELS["DiffCLIP-tiny"])).train(), []
    for enable in (False, True):
        if enable:
            tower.gradient_checkpointing_enable()
        tower.zero_grad()
        out = tower(image, output_attentions=True)
        (out.attentions[1].square().sum() + out.pooler_output.square().sum()).backward()
        found.append([p.grad for p in tower.parameters()])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(48, 48), (64, 40), (53, 100)])
def test_other_image_sizes_get_timms_resampled_positions(name, size):
    torch.manual_seed(0)
    tower = hf.DiffCLIPVisionModel(hf.vision_config(variants.MODELS[name])).eval()
    pixels = torch.randn(2, 3, *size)
    found = tower(pixels, interpolate_pos_encoding=True).pooler_output
    theirs = TimmVisionTransformer(
        img_size=48, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=0, dynamic_img_size=True
    )
    for mine, other in zip(tower.trunk.blocks, theirs.blocks):
        other.attn = mine.attn
    theirs.load_state_dict(tower.trunk.state_dict())
    torch.testing.assert_close(found, theirs.eval()(pixels[..., : size[0] // 8 * 8, : size[1] // 8 * 8]))
    if size != (48, 48):
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            tower(pixels)


@pytest.mark.slow
def test_hidden_states_can_be_selected_and_the_rest_left_out(run, image):
    directory, _ = run
    tower = hf.DiffCLIPVisionModel.from_pretrained(directory).eval()
    computed = []
    for i, block in enumerate(tower.trunk.blocks):
        block.register_forward_hook(lambda m, a, out, i=i: computed.append(i))
    everything = tower(image, output_hidden_states=True)
    for selection, kept in [(-2, [3]), ([0, -1], [0, 4]), (1, [1])]:
        for stop_early in (False, True):
            tower.config.stop_early = stop_early
            computed.clear()
            out = tower(image, output_hidden_states=selection)
            assert [i for i, state in enumerate(out.hidden_states) if state is not None] == kept
            assert all(torch.equal(out.hidden_states[i], everything.hidden_states[i]) for i in kept)
            stopped = stop_early and kept[-1] < 4
            assert (out.last_hidden_state is None) == stopped
            assert computed == list(range(kept[-1] if stopped else 4))
    with pytest.raises(IndexError):
        tower(image, output_hidden_states=[9])


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["03_tiny_diffclip", "04_tiny_slip_clip"])
def test_hidden_states_equal_the_official_intermediates(golden, folder, tmp_path):
    path = golden(folder)
    checkpoints.convert(str(path / "checkpoint_best.pt"), str(tmp_path), lambda_init=0.8, heads=(4, 4))
    tower = hf.DiffCLIPVisionModel.from_pretrained(tmp_path).eval()
    inputs, expected = load_file(path / "inputs.safetensors"), load_file(path / "outputs.safetensors")
    tolerances = json.loads((path / "tolerances.json").read_text())
    with torch.no_grad():
        out = tower(inputs["image"], output_hidden_states=True, output_attentions=True)
    found = dict(zip(["vision.embed", "vision.block0", "vision.block1"], out.hidden_states))
    found |= {"vision.norm": out.last_hidden_state, "vision.pooled": out.pooler_output}
    found["vision.last.diff" if "diffclip" in folder else "vision.last.attn"] = out.attentions[-1]
    torch.testing.assert_close(out.hidden_states[-2], found["vision.block0"])
    for name, value in found.items():
        assert (value - expected[f"f32.{name}"]).abs().max() <= tolerances[name]["suggest_atol"], name


@pytest.mark.slow
def test_round_trip_is_identical(run, tmp_path):
    directory, _ = run
    tower = hf.DiffCLIPVisionModel.from_pretrained(directory)
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(tower)
    assert again.config.to_dict() | {"_name_or_path": ""} == tower.config.to_dict() | {"_name_or_path": ""}
    lambdas = [[b.attn.lambda_init for b in t.trunk.blocks if hasattr(b.attn, "lambda_init")] for t in (tower, again)]
    assert lambdas[0] == lambdas[1]


@pytest.mark.slow
def test_llava_around_the_tower(run, image, tmp_path):
    directory, model = run
    tower = hf.DiffCLIPVisionModel.from_pretrained(directory)
    torch.manual_seed(3)
    llava = LlavaForConditionalGeneration(llava_config(tower.config)).eval()
    assert fingerprint(llava.model.vision_tower) != fingerprint(tower)
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    llava.post_init()  # must leave the weights alone
    llava.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    for whole in (llava, again):
        assert fingerprint(whole.model.vision_tower) == fingerprint(tower)
        lambdas = [b.attn.lambda_init for b in whole.model.vision_tower.trunk.blocks if hasattr(b.attn, "lambda_init")]
        assert lambdas == [b.attn.lambda_init for b in model.visual.trunk.blocks if hasattr(b.attn, "lambda_init")]
    ids = torch.full((2, 40), 5)
    ids[:, 1:37] = 63
    reads = []
    again.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: reads.append(args[0]))
    with torch.no_grad():
        logits = again(input_ids=ids, pixel_values=image).logits
        again.model.vision_tower.config.stop_early = True
        early = again(input_ids=ids, pixel_values=image).logits
        wanted = tower.eval()(image, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(reads[0], wanted) and torch.equal(reads[1], wanted)
    assert torch.equal(logits, early)
    torch.testing.assert_close(llava(input_ids=ids, pixel_values=image).logits, logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_from_config_starts_as_build_does(name):
    config = hf.vision_config(variants.MODELS[name])
    torch.manual_seed(0)
    tower, built = AutoModel.from_config(config).trunk, models.build(name).visual.trunk
    for key, value in tower.state_dict().items():
        want = built.state_dict()[key].double()
        spread = want.std() if want.numel() > 1 else torch.zeros(())
        if spread == 0:
            assert torch.equal(value.double(), want), key
        elif value.numel() >= 128:
            assert abs(value.double().std() / spread - 1) < 10 / value.numel() ** 0.5, key


@pytest.mark.slow
def test_missing_weights_alone_are_drawn(run, tmp_path):
    """They are refused, or drawn for a caller who asks what is missing; all else must come from the file."""
    directory, _ = run
    tower = hf.DiffCLIPVisionModel.from_pretrained(directory)
    state = tower.state_dict()
    dropped = "trunk.blocks.1.mlp.fc1.weight"
    tower.save_pretrained(tmp_path, state_dict={name: t for name, t in state.items() if name != dropped})
    with pytest.raises(InputError, match=rf"{tmp_path}/model\.safetensors: lacks weights of the model: {dropped}"):
        AutoModel.from_pretrained(tmp_path)
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {dropped}
    again = model.state_dict()
    assert {name for name, tensor in again.items() if not torch.equal(tensor, state[name])} == {dropped}
    assert again[dropped].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradients(run, image):
    directory, _ = run
    tower, grads = hf.DiffCLIPVisionModel.from_pretrained(directory).train(), []
    for enable in (False, True):
        if enable:
            tower.gradient_checkpointing_enable()
        tower.zero_grad()
        tower(image).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in tower.parameters()])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_the_form_of_attention_can_be_asked_for_and_changed(run, image):
    directory, _ = run
    tower = hf.DiffCLIPVisionModel.from_pretrained(directory)
    auto, attention = tower(image).pooler_output, tower.trunk.blocks[0].attn
    eager = hf.DiffCLIPVisionModel.from_pretrained(directory, attn_implementation="eager")
    torch.testing.assert_close(eager(image).pooler_output, auto, rtol=0, atol=1e-5)
    for implementation, form, fused in (("eager", "eager", False), ("sdpa", "auto", True)):
        tower.set_attn_implementation(implementation)
        torch.testing.assert_close(tower(image).pooler_output, auto, rtol=0, atol=1e-5)
        wanted = form if isinstance(attention, DifferentialAttention) else fused
        assert getattr(attention, "attn_implementation", None) == wanted or attention.fused_attn == wanted


@pytest.mark.slow
@pytest.mark.parametrize("size", [(48, 48), (100, 77), (37, 90), (301, 200), (49, 50), (20, 31), (48, 51)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_image_processor_gives_the_transforms_pixels(run, size, mode):
    directory, model = run
    processor = AutoImageProcessor.from_pretrained(directory)
    transform = preprocessing.transforms(model.model_config, train=False)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    found = processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(found, transform(image), rtol=0, atol=1e-6)


def test_image_processor_takes_batches_and_survives_saving(run, tmp_path):
    directory, _ = run
    processor = AutoImageProcessor.from_pretrained(directory)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    again = AutoImageProcessor.from_pretrained(tmp_path)
    images = [Image.new("RGB", size, (9, 99, 200)) for size in [(50, 60), (80, 48)]]
    batch = processor(images, return_tensors="pt").pixel_values
    assert batch.shape == (2, 3, 48, 48)
    assert torch.equal(again(images, return_tensors="pt").pixel_values, batch)


@pytest.mark.slow
def test_llava_reads_a_list_of_feature_layers(run, image):
    directory, _ = run
    tower = hf.DiffCLIPVisionModel.from_pretrained(directory).eval()
    config = llava_config(tower.config)
    config.vision_feature_layer = [-3, 0, -2]
    features = LlavaForConditionalGeneration(config).model
    features.vision_tower, features.multi_modal_projector, seen = tower, torch.nn.Identity(), []
    states = tower(image, output_hidden_states=True).hidden_states
    for tower.config.stop_early in (False, True):
        seen.append(torch.stack(features.get_image_features(image).pooler_output))
    wanted = torch.cat([states[layer][:, 1:] for layer in (-3, 0, -2)], dim=-1)
    assert torch.equal(seen[0], wanted) and torch.equal(seen[1], wanted)
