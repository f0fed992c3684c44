"""The named models: exact sizes, equality with open_clip and with the official models, starting weights."""

import json
import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from clips import in_official_layout
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diffclip import models, official, preprocessing, variants, warm_start, weights
from diffclip.attention import Differential, DifferentialAttention, lambda_init_schedule
from diffclip.attention_maps import attention_map
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError

PARAMETERS = {
    "CLIP-B-16": 149_619_969,
    "DiffCLIP-B-16": 149_629_185,
    "DiffCLIP-star-B-16": 149_629_185,
    "DiffCLIP-dagger-B-16": 149_624_577,
}
EXTRA = {  # parameters of a layer beyond ordinary attention's, by its kind: from the width and the number of heads
    "v1": lambda width, heads: 6 * width // heads,  # lambda's vectors and the norm
    "v2": lambda width, heads: width * width + width + (width + 1) * heads,  # second queries and lambdas
}


def ids(n=3, context=40, lengths=(5, 9, 12)):
    """Caption ids that end in the end token, padded with 0."""
    text = torch.zeros(n, context, dtype=torch.long)
    for row, length in zip(text, lengths):
        row[: length - 1] = torch.randint(1, 49406, (length - 1,))
        row[length - 1] = 49407
    return text


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_at_full_size(name):
    with torch.device("meta"):
        assert count(models.build(name)) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.MODELS)
def test_every_named_model_builds_and_counts(name):
    baseline = "CLIP-" + next(size for size in variants.SIZES if name.endswith(size))
    with torch.device("meta"):
        model, plain = models.build(name), models.build(baseline)
    layers = [m for m in model.modules() if isinstance(m, Differential)]
    extra = sum(EXTRA[m.name](m.num_heads * m.head_dim, m.num_heads) for m in layers)
    assert count(model) == count(plain) + extra
    assert model.logit_scale.shape == (1,)  # a 0-dim parameter crashes ZeRO
    assert json.loads(json.dumps(model.model_config)) == model.model_config


@pytest.mark.slow
@pytest.mark.parametrize("size", ["B-16", "S-16", "B-32", "L-14"])
def test_baseline_weights_are_open_clips_own(size):
    config = variants.MODELS[f"CLIP-{size}"]["model_cfg"]
    with torch.device("meta"):
        ours, theirs = models.build(f"CLIP-{size}").state_dict(), open_clip.CLIP(**config).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


@pytest.mark.slow
def test_baseline_computes_what_open_clip_does():
    model = models.build("CLIP-S-16").eval()
    theirs = open_clip.CLIP(**variants.MODELS["CLIP-S-16"]["model_cfg"]).eval()
    theirs.load_state_dict(model.state_dict())
    image, text = torch.randn(1, 3, 224, 224), ids(context=77)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), theirs.encode_image(image), rtol=0, atol=2e-5)
        torch.testing.assert_close(model.encode_text(text), theirs.encode_text(text), rtol=0, atol=2e-5)


SCHEDULE = [0.8 - 0.6 * math.exp(-0.3 * layer) for layer in range(12)]


@pytest.mark.parametrize(
    ("name", "vision", "text"),
    [
        ("CLIP-tiny", [], []),
        ("DiffCLIP-tiny", [0.8] * 4, [0.8] * 3),
        ("DiffCLIP-star-tiny", SCHEDULE[:4], SCHEDULE[:3]),
        ("DiffCLIP-dagger-tiny", [0.8] * 4, []),
    ],
)
def test_variants_differ_in_towers_and_lambda(name, vision, text):
    model = models.build(name)
    found = [
        [m.lambda_init for m in tower.modules() if isinstance(m, DifferentialAttention)]
        for tower in (model.visual, model.transformer)
    ]
    assert found == [pytest.approx(vision), pytest.approx(text)]


def test_schedule_base_counts_layers_from_one():
    config = json.loads(json.dumps(variants.MODELS["DiffCLIP-star-tiny"]))
    config["diffclip"]["attention"]["vision"]["schedule_base"] = 1
    model = models.build(config)
    assert model.visual.trunk.blocks[0].attn.lambda_init == pytest.approx(lambda_init_schedule(1))


def test_unknown_names_and_keys_are_one_sentence():
    with pytest.raises(InputError, match="unknown model 'CLIP-huge': choose one of"):
        models.build("CLIP-huge")
    with pytest.raises(InputError, match=r"unknown model 'DifCLIP-tiny': did you mean DiffCLIP-tiny\?"):
        variants.named("DifCLIP-tiny")
    with pytest.raises(InputError, match="init must be"):
        models.build("CLIP-tiny", init="random")
    config = json.loads(json.dumps(variants.MODELS["CLIP-tiny"]))
    config["model_cfg"]["text_cfg"]["depth"] = 3
    with pytest.raises(InputError, match="depth"):
        models.build(config)
    del config["model_cfg"]["text_cfg"]["depth"], config["model_cfg"]["vision_cfg"]["width"]
    with pytest.raises(InputError, match="width"):
        models.build(config)


# Text trimming


@pytest.mark.parametrize("name", ["CLIP-tiny", "DiffCLIP-tiny"])
def test_trimming_the_text_changes_nothing(name):
    model = models.build(name).double()
    text = ids()
    text[0, 20] = 49407  # a second end token: the first counts
    whole = text.clone()
    found, expected = model.encode_text(text), full_length_text(model, whole)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    table = model.token_embedding.weight
    grads = [torch.autograd.grad(out.sum(), table)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_a_causal_mask_is_recognised_and_another_one_is_read(monkeypatch):
    """Told by the arguments of torch's attention; the second mask lets each token see all of the text."""
    model, seen = models.build("DiffCLIP-tiny").double(), []
    for module in model.transformer.modules():
        if hasattr(module, "attn_implementation"):
            module.attn_implementation = "fused"
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, mask=None, dropout=0.0, is_causal=False, **options):
        seen.append((mask is None, is_causal))
        return real(q, k, v, mask, dropout, is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    causal, text = model.attn_mask, ids(lengths=(9, 5))
    for mask, wanted in ((causal, (True, True)), (torch.zeros_like(causal), (False, False)), (causal, (True, True))):
        model.attn_mask = mask
        seen.clear()
        found = model.encode_text(text)
        assert set(seen) == {wanted}
        if mask is causal:
            torch.testing.assert_close(found, full_length_text(model, text), rtol=0, atol=1e-12)
    model.attn_mask.zero_()  # changed where it lies
    seen.clear()
    model.encode_text(text)
    assert set(seen) == {(False, False)}


def full_length_text(model, text):
    """The text encoder without trimming, from its parts."""
    x = model.token_embedding(text) + model.positional_embedding
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    return x[torch.arange(len(x)), text.argmax(-1)] @ model.text_projection


def test_trimming_saves_the_padding():
    model, seen = models.build("CLIP-tiny"), []
    model.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model.encode_text(ids(lengths=(5, 9, 12)))
    model.encode_text(ids(lengths=(40, 3, 3)))
    assert seen == [12, 40]


# Training machinery


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP-tiny", "DiffCLIP-star-tiny"])
def test_every_parameter_learns_and_checkpointing_gives_the_same_gradients(name):
    torch.manual_seed(0)
    model = models.build(name).double().train()
    image, text = torch.randn(3, 3, 48, 48, dtype=torch.float64), ids()
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        clip_loss(model, image, text).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None and grad.abs().sum() > 0 for n, grad in found[0].items() if not key_bias(n))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=0, atol=1e-12)


def key_bias(name):
    return name.endswith("k_proj.bias")


def clip_loss(model, image, text):
    image_features, text_features, scale = model(image, text)
    logits = scale * image_features @ text_features.T
    target = torch.arange(len(logits))
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


@pytest.mark.slow
def test_compiles_in_one_graph():
    model = models.build("DiffCLIP-tiny").eval()
    image, text = torch.randn(2, 3, 48, 48), ids(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for found, expected in zip(compiled(image, text), model(image, text)):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# Starting weights


def test_matched_arms_start_from_the_same_weights():
    states = {}
    for variant in in_official_layout():  # in other kinds' layouts queries lie between others, see their own tests
        torch.manual_seed(7)
        states[variant] = models.build(f"{variant}-tiny").state_dict()
    plain, checked = states.pop("CLIP"), 0
    for state in states.values():
        for name, tensor in state.items():
            if name in plain:
                assert torch.equal(tensor, plain[name]), name
            elif "_proj." in name:
                prefix, part = name.rsplit(".attn.", 1)
                order = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
                projection, end = part.split(".")
                vision = "trunk" in name
                if projection == "out_proj":
                    twin = plain[f"{prefix}.attn.proj.{end}"]
                else:
                    fused = f"{prefix}.attn.qkv.{end}" if vision else f"{prefix}.attn.in_proj_{end}"
                    twin = plain[fused].chunk(3)[order[projection]]
                assert torch.equal(tensor, twin), name
                checked += 1
    assert checked == (4 * 8 + 3 * 6) * 2 + 4 * 8  # in the text out_proj keeps its name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stats", "init"),
    [
        ("DiffCLIP-B-16", "diffclip_init_stats.json", "official"),
        ("CLIP-B-16", "slip_clip_init_stats.json", "official"),
        ("CLIP-B-16", "slip_clip_init_stats.json", "matched"),
    ],
)
def test_official_initialisation_has_the_official_statistics(golden, name, stats, init):
    """Mean, standard deviation and range of every tensor agree with one official draw, within sampling error."""
    expected = json.loads((golden("05_full_size") / stats).read_text())["params"]
    torch.manual_seed(11)
    state = official.to_official(models.build(name, init=init).state_dict())
    assert state.keys() == expected.keys()
    for key, want in expected.items():
        values = state[key].double()
        n, spread = values.numel(), want["std"]
        if spread == 0:
            assert (values.min(), values.max()) == (want["min"], want["max"]), key
            continue
        if n < 8:
            continue
        assert abs(values.mean() - want["mean"]) < 7 * spread * (2 / n) ** 0.5, key
        assert abs(values.std() / spread - 1) < 7 / n**0.5, key
        if n >= 512:  # a uniform draw stays within 1.74 standard deviations, a normal one of this size does not
            assert (values.abs().max() < 2 * spread) == (want["max"] < 2 * spread), key


def test_official_differs_from_matched_where_the_official_code_does():
    models_by_init = {init: models.build("DiffCLIP-tiny", init=init) for init in ("official", "matched")}
    biases = {init: m.visual.trunk.blocks[0].mlp.fc1.bias.abs().sum() for init, m in models_by_init.items()}
    assert biases["matched"] == 0 < biases["official"]
    eps = {init: m.visual.trunk.norm.eps for init, m in models_by_init.items()}
    assert eps == {"official": 1e-5, "matched": 1e-6}
    assert {init: m.model_config["diffclip"]["init"] for init, m in models_by_init.items()} == {
        "official": "official",
        "matched": "matched",
    }


# The official models


TINY = {"03_tiny_diffclip": None, "04_tiny_slip_clip": (4, 4)}


def official_tiny(golden, folder, dtype=torch.float32, scale=None):
    """A model with the fixture's weights, its inputs, and the fixture's folder."""
    folder_path = golden(folder)
    state = load_file(folder_path / "weights.safetensors")
    if scale:
        state = {name: scale(name, tensor) for name, tensor in state.items()}
    model = models.build(official.official_config(state, 0.8, heads=TINY[folder]))
    weights.load_strictly(model, official.from_official(state), folder)
    inputs = load_file(folder_path / "inputs.safetensors")
    return model.to(dtype), inputs["image"].to(dtype), inputs["text"], folder_path


def capture(model, image, text):
    """What the fixtures record, under their names."""
    found, hooks = {}, []

    def keep(name):
        return lambda module, args, out: found.update({name: out})

    trunk = model.visual.trunk
    for i, block in enumerate(trunk.blocks):
        hooks.append(block.register_forward_hook(keep(f"vision.block{i}")))
    for i, block in enumerate(model.transformer.resblocks):
        hooks.append(block.register_forward_hook(keep(f"text.block{i}")))
    hooks.append(trunk.norm.register_forward_hook(keep("vision.norm")))
    hooks.append(trunk.blocks[0].register_forward_pre_hook(lambda m, args: found.update({"vision.embed": args[0]})))
    found["image_embed"], found["text_embed"] = model.encode_image(image), model.encode_text(text)
    found["vision.pooled"] = found["vision.norm"][:, 0]
    found["text.ln_final"] = model.ln_final(found["text.block1"])
    found["logit_scale"] = model.logit_scale.exp().squeeze(0)
    for hook in hooks:
        hook.remove()
    last = trunk.blocks[-1]
    maps = attention_map(last.attn, last.norm1(found["vision.block0"]))
    if isinstance(last.attn, DifferentialAttention):
        found |= {"vision.last.diff": maps, "vision.last.lambda": last.attn.compute_lambda()}
        text_last = model.transformer.resblocks[-1]
        found["text.last.diff"] = attention_map(text_last.attn, text_last.ln_1(found["text.block0"]), is_causal=True)
        found["text.last.lambda"] = text_last.attn.compute_lambda()
    else:
        found["vision.last.attn"] = maps
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("folder", TINY)
def test_tiny_official_models_and_their_intermediates(golden, folder, dtype):
    model, image, text, path = official_tiny(golden, folder, dtype)
    expected = load_file(path / "outputs.safetensors")
    tolerances = json.loads((path / "tolerances.json").read_text())
    found = capture(model.eval(), image, text)
    assert len(found) >= 11
    for name, value in found.items():
        want = expected[f"f64.{name}"].double()
        error = (value.detach().double() - want).abs().max()
        limit = tolerances[name]["suggest_atol"]
        if dtype == torch.float64:  # the fixture's float64 is stored rounded to float32
            limit = max(1e-9, 1.2e-7 * want.abs().max())
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("folder", TINY)
def test_tiny_official_loss_and_gradients(golden, folder):
    model, image, text, path = official_tiny(golden, folder, torch.float64)
    info = json.loads((path / "info.json").read_text())
    loss = clip_loss(model, image, text)
    assert loss.item() == pytest.approx(info["loss_f64"], abs=1e-7)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = official.to_official(grads)
    expected = load_file(path / "grads_f64_rounded.safetensors")
    assert grads.keys() == expected.keys()
    for name, want in expected.items():
        limit = max(1e-8, 2e-7 * float(want.abs().max()))
        error = (grads[name] - want.double()).abs().max()
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("folder", TINY)
def test_tiny_official_models_show_their_epsilons(golden, folder):
    """With small activations a wrong norm epsilon misses by more than a thousand tolerances."""
    vision = ("visual.cls_token", "visual.pos_embed", "visual.patch_embed.proj.")
    small = (*vision, "token_embedding.", "positional_embedding")
    outputs = ("attn.out_proj.", "attn.proj.", "mlp.fc2.", "mlp.c_proj.", "attn.v_proj.")

    def scale(name, tensor):
        shrinks = name.startswith(small) or any(part in name for part in outputs)
        return tensor * np.float32(0.02) if shrinks else tensor

    model, image, text, path = official_tiny(golden, folder, scale=scale)
    expected = load_file(path / "eps_probe.safetensors")
    found = capture(model.eval(), image, text)
    for name, limits in json.loads((path / "eps_probe_tolerances.json").read_text()).items():
        error = (found[name].detach() - expected[f"f32.{name}"]).abs().max()
        assert error <= limits["suggest_atol"], name


FULL = {"DiffCLIP-B-16": "diffclip", "CLIP-B-16": "slip_clip"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_official_models(golden, name):
    folder = golden("05_full_size")
    outputs = json.loads((folder / f"{FULL[name]}_outputs.json").read_text())
    layout = json.loads((folder / f"{FULL[name]}_layout.json").read_text())
    expected, inputs = np.load(folder / f"{FULL[name]}_outputs.npz"), np.load(folder / "inputs.npz")
    state = {key: draw(key, tensor["shape"], outputs["salt"]) for key, tensor in layout["tensors"].items()}
    for key, check in outputs["check_values"].items():
        np.testing.assert_allclose(state[key].flatten()[: len(check["first"])], check["first"], rtol=1e-7)

    model = models.build(official.official_config(state, 0.8, heads=(12, 8)))
    assert count(model) == layout["n_params"] == PARAMETERS[name]
    weights.load_strictly(model, official.from_official(state), name)
    model.eval()
    mean, std = (torch.tensor(model.model_config["preprocess_cfg"][k]).view(3, 1, 1) for k in ("mean", "std"))
    image = (torch.from_numpy(inputs["image_u8"]).float() / 255 - mean) / std
    text = torch.from_numpy(inputs["text"]).long()
    assert torch.equal(text, preprocessing.tokenizer(model.model_config)(outputs["captions"]))
    ends = text.argmax(-1)

    found = {}
    per_block = {"vision_cls_per_block": [], "text_eot_per_block": []}
    for block in model.visual.trunk.blocks:
        block.register_forward_hook(lambda m, a, out: per_block["vision_cls_per_block"].append(out[:, 0]))
    for block in model.transformer.resblocks:
        block.register_forward_hook(
            lambda m, a, out: per_block["text_eot_per_block"].append(out[torch.arange(2), ends])
        )
    with torch.no_grad():
        found["image_features"] = model.visual.trunk(image)
        found["image_embed"] = model.visual.head(found["image_features"])
        found["text_embed"] = model.encode_text(text)
    found |= {key: torch.stack(value) for key, value in per_block.items()}
    for key, value in found.items():
        error = np.abs(value.numpy() - expected[f"f32.{key}"]).max()
        assert error <= outputs["tolerances"][key]["suggest_atol"], f"{key}: {error:.2e}"


def draw(key, shape, salt):
    """The fixture's rule for weights."""
    z = np.random.default_rng(zlib.crc32((salt + key).encode())).standard_normal(shape)
    if key == "logit_scale":
        z = np.asarray(math.log(1 / 0.07))
    elif ".lambda_" in key:
        z = 0.1 * z
    elif len(shape) == 1 and key.endswith(".weight"):
        z = 1 + 0.02 * z
    else:
        z = 0.02 * z
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


# Any open_clip model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vision_layers", "text_layers"),
    [("ViT-L-14", 24, 12), ("ViT-H-14", 32, 24), ("ViT-B-16-SigLIP", 12, 12), ("ViT-B-32-256", 12, 12)],
)
def test_differentiate_any_open_clip_model(name, vision_layers, text_layers):
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta", load_weights=False)
        before = count(model)
        warm_start.differentiate(model, lambda_init="schedule")
    differential = [m for m in model.modules() if isinstance(m, DifferentialAttention)]
    assert len(differential) == vision_layers + text_layers
    vision = [m.lambda_init for m in model.visual.modules() if isinstance(m, DifferentialAttention)]
    assert vision[:12] == pytest.approx(SCHEDULE)
    assert count(model) == before + sum(6 * m.head_dim for m in differential)


@pytest.mark.parametrize("custom_text", [False, True])
def test_differentiated_open_clip_model_runs_and_keeps_its_projections(custom_text):
    vision = {"layers": 2, "width": 32, "head_width": 8, "image_size": 16, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2}
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    model = kind(16, vision, text).eval()
    tower = model.text.transformer if custom_text else model.transformer
    in_proj = tower.resblocks[0].attn.in_proj_weight.clone()
    image, ids_ = torch.randn(2, 3, 16, 16), torch.randint(1, 63, (2, 12))
    before = model.encode_text(ids_)
    assert warm_start.differentiate(model, towers=["text"], lambda_init=0.5) is model
    assert torch.equal(torch.cat([getattr(tower.resblocks[0].attn, f"{n}_proj").weight for n in "qkv"]), in_proj)
    after = model.encode_text(ids_)
    assert after.shape == before.shape
    assert not torch.allclose(after, before)
    changed = ids_.clone()
    changed[:, -1] = 1  # causal: earlier positions must not notice
    hidden = [tower(model_embed(model, custom_text)(i), attn_mask=mask(model, custom_text)) for i in (ids_, changed)]
    torch.testing.assert_close(hidden[0][:, :-1], hidden[1][:, :-1])
    assert model.encode_image(image).isfinite().all()


def model_embed(model, custom_text):
    return model.text.token_embedding if custom_text else model.token_embedding


def mask(model, custom_text):
    return model.text.attn_mask if custom_text else model.attn_mask


def test_differentiate_records_what_it_did_and_refuses_a_second_time():
    model = warm_start.differentiate(models.build("CLIP-tiny"), towers=["vision"])
    assert model.model_config["diffclip"]["variant"] == "DiffCLIP-dagger"
    with pytest.raises(InputError, match="differential already"):
        warm_start.differentiate(model)
    with pytest.raises(InputError, match="unknown tower 'image'"):
        warm_start.differentiate(models.build("CLIP-tiny"), towers=["image"])
    with pytest.raises(InputError, match="lambda_init must be"):
        warm_start.differentiate(models.build("CLIP-tiny"), lambda_init="high")
    three_heads = {"layers": 1, "width": 24, "head_width": 8, "image_size": 16, "patch_size": 8}
    odd = open_clip.CLIP(16, three_heads, {"layers": 1})
    with pytest.raises(InputError, match="must be even"):
        warm_start.differentiate(odd, towers=["vision"])


# Transforms


def test_evaluation_transform_is_open_clips_for_the_same_config():
    config = variants.MODELS["CLIP-B-16"]
    theirs = open_clip.image_transform(
        **{"image_size" if k == "size" else k: v for k, v in config["preprocess_cfg"].items()}, is_train=False
    )
    rng = np.random.default_rng(0)
    for shape in [(300, 240), (224, 224), (100, 517)]:
        image = Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8))
        torch.testing.assert_close(
            preprocessing.transforms(config, train=False)(image), theirs(image), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
@pytest.mark.parametrize("train", [False, True])
def test_transforms_take_any_mode(mode, train):
    image = Image.new("RGB", (60, 50), (200, 10, 10)).convert(mode)
    assert preprocessing.transforms(variants.MODELS["CLIP-tiny"], train=train)(image).shape == (3, 48, 48)


def test_training_transform_crops_within_the_scale_and_never_flips():
    """On an image whose red grows to the right, every crop keeps red growing to the right."""
    ramp = np.zeros((96, 96, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 250, 96, dtype=np.uint8)
    transform = preprocessing.transforms(variants.MODELS["CLIP-tiny"], train=True, crop_scale=(0.25, 1.0))
    torch.manual_seed(0)
    widths = []
    for _ in range(50):
        red = transform(Image.fromarray(ramp))[0].mean(0) * 0.229 + 0.485
        assert red[-1] > red[0]
        widths.append(red[-1] - red[0])
    assert max(widths) > 0.9 and min(widths) < 0.7


@pytest.mark.slow
def test_our_modules_start_without_wandb_and_leave_it_importable():
    pytest.importorskip("wandb", reason="nothing to leave out where it is not installed")
    told = "import sys, diffclip.recipe, diffclip.models, mllm; print('timm' in sys.modules, 'wandb' in sys.modules);"
    told += "import wandb; print(wandb.__name__)"
    ended = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "False", "wandb"]


@pytest.mark.slow
@pytest.mark.parametrize("height,width", [(33, 33), (224, 224), (1000, 1000), (60, 48), (48, 49)])
def test_a_crop_of_all_is_torchvisions(height, width):
    """Of a square there is one alone; of others its draws, most of which do not fit, leave several."""
    from torchvision.transforms import v2 as T

    transform = preprocessing.transforms(
        variants.MODELS["CLIP-tiny"], train=True, crop_scale=(1.0, 1.0), normalized=False
    )
    theirs = T.RandomResizedCrop(48, scale=(1.0, 1.0), antialias=True)
    pixels = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for seed in range(100):
        torch.manual_seed(seed)
        ours = transform(pixels)
        torch.manual_seed(seed)
        assert torch.equal(ours, theirs(pixels))
