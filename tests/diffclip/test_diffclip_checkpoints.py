"""Checkpoints: one directory loads both ways, official files come in and go out bit for bit, nothing loads partly."""

import argparse
import collections
import copy
import datetime
import json
import os
import pathlib
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from clips import in_official_layout, transformers_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor

import diffclip
from diffclip import checkpoints, convert, models, variants, warm_start, weights
from diffclip import official as official_code
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.base.fingerprint import fingerprint
from diffclip.base.images import DECODING, to_rgb


@pytest.fixture(params=["CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-star-tiny", "DiffCLIP-dagger-tiny"])
def model(request):
    torch.manual_seed(0)
    return models.build(request.param)


@pytest.fixture
def official(tmp_path):
    """A file as the official trainer writes it, made from a tiny DiffCLIP; and the model."""
    model = models.build("DiffCLIP-tiny", init="official")
    state = {f"module.{name}": t for name, t in official_code.to_official(model.state_dict()).items()}
    path = tmp_path / "checkpoint_best.pt"
    torch.save({"epoch": 3, "state_dict": state, "best_acc1": 12.5, "args": argparse.Namespace(model="x")}, path)
    return path, model


@pytest.mark.slow
def test_a_saved_directory_loads_the_same_model(model, tmp_path):
    diffclip.save(model, tmp_path)
    loaded, transform, tokenizer = diffclip.load(tmp_path)
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded.model_config == model.model_config
    assert not loaded.training
    image, text = torch.randn(2, 3, 48, 48), tokenizer(["a red square", "two stars"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(image), model.eval().encode_image(image))
        assert torch.equal(loaded.encode_text(text), model.encode_text(text))
    assert "48" in str(transform)
    assert not list(tmp_path.glob("*.part"))


def test_saving_again_replaces_every_file(tmp_path):
    diffclip.save(models.build("CLIP-tiny"), tmp_path)
    model = models.build("DiffCLIP-tiny")
    diffclip.save(model, tmp_path)
    assert fingerprint(diffclip.load(tmp_path)[0]) == fingerprint(model)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tmp_path.iterdir())


def test_reduced_precision_is_kept(tmp_path):
    model = models.build("DiffCLIP-tiny").bfloat16()
    diffclip.save(model, tmp_path)
    assert load_file(tmp_path / checkpoints.WEIGHTS)["logit_scale"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_full_size_baseline_loads_in_plain_open_clip(tmp_path):
    """Without our package: the baseline's directory is an open_clip directory."""
    torch.manual_seed(0)
    model = models.build("CLIP-S-16").eval()
    diffclip.save(model, tmp_path)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval().encode_image(image), model.encode_image(image), rtol=0, atol=2e-5)


def test_plain_open_clip_directories_load(tmp_path):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8},
        "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 12},
    }
    theirs = open_clip.CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 16}}))
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    model, _, tokenizer = diffclip.load(tmp_path)
    text = tokenizer(["a cat"])
    assert text.shape == (1, 12)
    torch.testing.assert_close(model.encode_text(text), theirs.encode_text(text))


def test_official_file_is_recognised_with_a_notice(official):
    path, model = official
    with pytest.warns(UserWarning, match="lambda_init: took 0.8"):
        loaded, _, _ = diffclip.load(path)
    assert fingerprint(loaded) == fingerprint(model)
    options = loaded.model_config["diffclip"]
    assert (options["variant"], options["vision_norm_eps"], options["init"]) == ("DiffCLIP", 1e-5, "imported")
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(image), model.eval().encode_image(image))


@pytest.mark.parametrize("variant", in_official_layout())
def test_variant_is_recognised_by_its_keys(variant, tmp_path):
    expected = variants.MODELS[f"{variant}-tiny"]
    state = official_code.to_official(models.build(expected).state_dict())
    lambda_init = expected["diffclip"]["attention"].get("vision", {}).get("lambda_init", 0.8)
    config = official_code.official_config(state, lambda_init, heads=(4, 4))
    assert config["diffclip"]["variant"] == variant
    assert config["model_cfg"] == expected["model_cfg"]
    assert config["preprocess_cfg"] == expected["preprocess_cfg"]


@pytest.mark.slow
def test_heads_of_ordinary_towers_are_assumed_with_a_notice():
    state = official_code.to_official(models.build("CLIP-S-16").state_dict())
    with pytest.warns(UserWarning) as notices:
        config = official_code.official_config(state)
    assert {str(n.message).split(": ")[1] for n in notices} == {"took 12", "took 8"}
    assert config["model_cfg"]["vision_cfg"]["head_width"] == 32


@pytest.mark.slow
def test_round_trip_to_the_official_layout_is_bit_for_bit(official, tmp_path):
    path, _ = official
    checkpoints.convert(str(path), str(tmp_path / "run"), lambda_init=0.8)
    checkpoints.convert(str(tmp_path / "run"), str(tmp_path / "back.pt"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        before, after = (torch.load(p, weights_only=True)["state_dict"] for p in (path, tmp_path / "back.pt"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


@pytest.mark.parametrize("folder", ["03_tiny_diffclip", "04_tiny_slip_clip"])
def test_published_form_of_the_checkpoint(golden, folder, tmp_path):
    path = golden(folder) / "checkpoint_best.pt"
    checkpoints.convert(str(path), str(tmp_path / "run"), lambda_init=0.8, heads=(4, 4))
    model, _, _ = diffclip.load(tmp_path / "run")
    inputs = load_file(golden(folder) / "inputs.safetensors")
    expected = load_file(golden(folder) / "outputs.safetensors")
    tolerances = json.loads((golden(folder) / "tolerances.json").read_text())
    with torch.no_grad():
        found = {"image_embed": model.encode_image(inputs["image"]), "text_embed": model.encode_text(inputs["text"])}
    for name, value in found.items():
        assert (value - expected[f"f32.{name}"]).abs().max() <= tolerances[name]["suggest_atol"]
    weights = load_file(golden(folder) / "weights.safetensors")
    back = official_code.to_official(model.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items()) and back.keys() == weights.keys()


def configurations():
    """Configs that the official layout alone cannot tell apart from others."""
    for name in ("CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-star-tiny", "DiffCLIP-dagger-tiny"):
        yield name, copy.deepcopy(variants.MODELS[name])
    for name, tower, options in (
        ("exact GELU", None, {"quick_gelu": False}),
        ("wide text", "text_cfg", {"mlp_ratio": 2.0}),
        ("head width", "vision_cfg", {"head_width": 16}),
        ("layer scale", "text_cfg", {"ls_init_value": 0.5}),
        ("text epsilon", "text_cfg", {"norm_kwargs": {"eps": 1e-3}}),
    ):
        config = copy.deepcopy(variants.MODELS["CLIP-tiny"])
        (config["model_cfg"] if tower is None else config["model_cfg"][tower]).update(options)
        yield name, config
    custom = copy.deepcopy(variants.MODELS["DiffCLIP-tiny"])
    custom["diffclip"] |= {"vision_norm_eps": 1e-3, "variant": "custom"}
    custom["diffclip"]["attention"] = {"text": variants.attention("v1", 0.35)}
    custom["preprocess_cfg"] |= {"mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    yield "custom", custom
    counted_from_one = copy.deepcopy(variants.MODELS["DiffCLIP-star-tiny"])
    counted_from_one["diffclip"]["attention"]["text"]["schedule_base"] = 1
    yield "schedule from 1", counted_from_one


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*to be set in the official code by hand")
@pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in configurations()])
def test_to_the_official_layout_and_back_changes_no_output(config, tmp_path):
    torch.manual_seed(0)
    model = models.build(config).eval()
    diffclip.save(model, tmp_path / "run")
    checkpoints.convert(tmp_path / "run", tmp_path / "official.pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*took.*")  # nothing is guessed
        loaded, transform, tokenizer = diffclip.load(tmp_path / "official.pt")
    assert loaded.model_config == model.model_config
    assert repr(transform) == repr(diffclip.load(tmp_path / "run")[1])
    side = config["model_cfg"]["vision_cfg"]["image_size"]
    image, text = torch.randn(2, 3, side, side), tokenizer(["a red square", "two stars"])
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(image), model.encode_image(image))
        assert torch.equal(loaded.encode_text(text), model.encode_text(text))


def test_what_the_official_code_would_take_otherwise_is_told_and_can_be_overruled(tmp_path):
    diffclip.save(models.build("DiffCLIP-star-tiny"), tmp_path / "star")
    with pytest.warns(
        UserWarning, match="by hand: vision lambda_init schedule, not 0.8; text .*; vision_norm_eps 1e-06, not 1e-05"
    ):
        checkpoints.convert(tmp_path / "star", tmp_path / "star.pt")
    loaded = diffclip.load(tmp_path / "star.pt", lambda_init=0.8)[0]
    assert loaded.model_config["diffclip"]["variant"] == "DiffCLIP"
    assert loaded.visual.trunk.blocks[0].attn.lambda_init == 0.8


def test_models_that_the_official_layout_cannot_hold_are_refused(tmp_path):
    transformers_clip(tmp_path / "hf")
    diffclip.save(models.build("DiffCLIP-V2-tiny"), tmp_path / "v2")
    with pytest.raises(InputError, match="holds a timm vision transformer"):
        checkpoints.convert(tmp_path / "hf", tmp_path / "out.pt")
    with pytest.raises(InputError, match="no differential attention v2"):
        checkpoints.convert(tmp_path / "v2", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


# The published files, whose trainer pickles a path and numpy's numbers beside the weights


def published(path, prefix="module.", key="state_dict", **more):
    """Write a file as the published ones are, and return its model."""
    model = models.build("DiffCLIP-tiny", init="official").eval()
    state = {f"{prefix}{name}": t for name, t in official_code.to_official(model.state_dict()).items()}
    args = argparse.Namespace(model="DiffCLIP_VITB16", output_dir=pathlib.PosixPath("/out"), lr=5e-4)
    optimiser = {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": np.float32(1e-3)}]}
    extra = {"epoch": 39, "best_acc1": np.float64(12.5), "args": args, "optimizer": optimiser, "scaler": {"scale": 1.0}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**extra, key: state, **more}, path)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix", ["module.", "", "module.module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_published_files_load_from_their_folder_too(prefix, key, tmp_path):
    model = published(tmp_path / "checkpoint_best.pt", prefix, key)
    for path in (tmp_path, tmp_path / "checkpoint_best.pt"):
        assert fingerprint(diffclip.load(path, lambda_init=0.8)[0]) == fingerprint(model)


def test_the_case_of_a_published_file_loads(shared_cases, tmp_path):
    path = shared_cases("checkpoints/checkpoint_best.pt")
    expected = torch.load(path, weights_only=False)
    assert isinstance(expected["args"].output_dir, pathlib.PosixPath) and isinstance(expected["best_acc1"], np.floating)
    for source in (path, path.parent):
        model = diffclip.load(source, lambda_init=0.8, heads=(4, 4))[0]
        back = official_code.to_official(model.state_dict())
        assert {f"module.{name}" for name in back} == expected["state_dict"].keys()
        assert all(torch.equal(expected["state_dict"][f"module.{name}"], tensor) for name, tensor in back.items())


def hub_copy(cache, repository):
    """The folder in which huggingface_hub keeps a repository that it has fetched; HF_HUB_CACHE is `cache`."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


@pytest.mark.slow
def test_published_files_load_by_their_hub_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for repository in ("hammh0a/DiffCLIP_ViTB16_CC12M", "hammh0a/SynthCLIP_ViTB16_10M"):
        model = published(hub_copy(tmp_path, repository) / "checkpoint_best.pt")
        for name in (repository, f"{repository}/", f"hf-hub:{repository}"):
            assert fingerprint(diffclip.load(name, lambda_init=0.8)[0]) == fingerprint(model)
    hub_copy(tmp_path, "nobody/empty")
    with pytest.raises(InputError, match="it is empty"):
        diffclip.load("nobody/empty")


def test_the_optimiser_stays_on_disk(tmp_path):
    published(tmp_path / "checkpoint_best.pt")
    state, args = official_code.read_official(tmp_path / "checkpoint_best.pt")
    maps = pathlib.Path("/proc/self/maps")
    if maps.is_file():  # the file is mapped into memory, so that only what is used of it is read
        assert str(tmp_path / "checkpoint_best.pt") in maps.read_text()
    assert len(state) > 20 and args.lr == 5e-4 and not isinstance(args.output_dir, pathlib.PurePath)


def test_files_of_old_torch_load(tmp_path):
    path = tmp_path / "old.pt"
    model = published(path)
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    assert fingerprint(diffclip.load(path, lambda_init=0.8)[0]) == fingerprint(model)


# What must not load


class Call:
    """Pickled, it asks the reader to call something."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda marker: Call(os.system, f"touch {marker}"),
        lambda marker: Call(pathlib.PosixPath.touch, pathlib.PosixPath(marker)),
        lambda marker: Call(getattr, pathlib.PosixPath(marker), "touch"),
        lambda marker: Call(np.save, str(marker), 1),
        lambda marker: Call(exec, f"open({str(marker)!r}, 'w')"),
        lambda marker: Call(subprocess.check_call, ["touch", str(marker)]),
    ],
)
def test_no_code_of_a_file_runs(call, zipped, tmp_path):
    marker = tmp_path / "marker"
    for where in ("args", "best_acc1", "optimizer"):
        content = {"state_dict": {}, where: call(marker)}
        if zipped:
            torch.save(content, tmp_path / "checkpoint_best.pt")
        else:
            (tmp_path / "checkpoint_best.pt").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(InputError, match=r"checkpoint_best.pt: cannot be read as plain weights"):
            diffclip.load(tmp_path)
        assert not marker.exists()


def test_numpy_and_paths_of_a_file_are_not_even_made(tmp_path):
    """numpy's own way to make a scalar of bytes and a dtype of objects takes the bytes for addresses."""
    published(tmp_path / "x.pt", best_acc1=np.float64(1), extra=[np.int64(3), np.datetime64(5, "s"), np.bool_(True)])
    content = weights.read_pickle(tmp_path / "x.pt")
    assert {type(value) for value in content["extra"]} == {weights.Unread} == {type(content["best_acc1"])}


class Foreign:
    """Something a checkpoint must not be able to run."""

    def __reduce__(self):
        return (sys.exit, (99,))


def test_foreign_objects_are_not_run(tmp_path):
    torch.save({"state_dict": {}, "args": Foreign()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil.pt: cannot be read as plain weights"):
        diffclip.load(tmp_path / "evil.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (datetime.datetime(2024, 1, 1), "datetime.datetime"),
        (np.zeros(2), "numpy.*_reconstruct"),
        (collections.defaultdict(list), "collections.defaultdict"),
    ],
)
def test_what_a_file_may_not_hold_is_named_and_can_be_left_out(official, thing, name):
    path, model = official
    content = torch.load(path, weights_only=False)
    torch.save(content | {"extra": thing}, path)
    with pytest.raises(InputError, match=f"checkpoint_best.pt: .* holds a {name}, .* save its state dict alone"):
        diffclip.load(path)
    torch.save(content["state_dict"], path)  # as it says
    assert fingerprint(diffclip.load(path)[0]) == fingerprint(model)


def test_every_misfit_is_listed_and_nothing_is_loaded(official):
    path, model = official
    state = official_code.from_official(official_code.read_official(path)[0])
    before = fingerprint(model)
    del state["ln_final.bias"], state["visual.trunk.norm.weight"]
    state["visual.extra"] = torch.zeros(2)
    state["logit_scale"] = torch.zeros(3)
    state["ln_final.weight"] = torch.zeros(128)
    with pytest.raises(InputError) as error:
        weights.load_strictly(model, state, "file.pt")
    message = str(error.value)
    assert message.startswith("file.pt: does not fit the model, nothing was loaded")
    for part in ("missing ln_final.bias", "missing visual.trunk.norm.weight", "unexpected visual.extra", "[3]", "[1]"):
        assert part in message
    assert fingerprint(model) == before


def test_an_official_file_without_a_layer_is_refused(official):
    path, _ = official
    data = torch.load(path, weights_only=False)
    del data["state_dict"]["module.visual.blocks.1.mlp.fc1.weight"]
    torch.save(data, path)
    with pytest.raises(InputError, match=r"missing visual.trunk.blocks.1.mlp.fc1.weight"):
        diffclip.load(path, lambda_init=0.8)


def test_unreadable_inputs_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="no such file or directory"):
        diffclip.load(tmp_path / "absent")
    with pytest.raises(InputError, match="nor a Hub repository in reach"):
        diffclip.load("nobody/nothing")
    with pytest.raises(InputError, match=r"no open_clip_config.json"):
        diffclip.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="use AutoModel"):
        diffclip.load(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"broken.pt"):
        diffclip.load(tmp_path / "broken.pt")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a file of the official"):
        diffclip.load(tmp_path / "other.safetensors")
    diffclip.save(models.build("CLIP-tiny"), tmp_path)
    (tmp_path / checkpoints.WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"open_clip_model.safetensors: cannot be read"):
        diffclip.load(tmp_path)
    with pytest.raises(InputError, match="cannot save this Linear"):
        diffclip.save(torch.nn.Linear(1, 1), tmp_path)


def test_command_line(official, tmp_path, capsys):
    path, model = official
    convert.main([str(path), str(tmp_path / "run"), "--lambda-init", "schedule"])
    assert "wrote" in capsys.readouterr().out
    loaded, _, _ = diffclip.load(tmp_path / "run")
    assert loaded.model_config["diffclip"]["variant"] == "DiffCLIP-star"
    assert loaded.visual.trunk.blocks[0].attn.lambda_init == pytest.approx(0.2)
    assert fingerprint(loaded) == fingerprint(model)
    for bad, message in (
        (["absent.pt", "out"], "no such file"),
        ([str(path), "out", "--lambda-init", "high"], "must be a number or 'schedule': got 'high'"),
        ([str(path), "out", "--lambda_init", "nan"], "must be a number or 'schedule': got 'nan'"),
        ([str(path), "out", "--heads", "0", "4"], "must be at least 1"),
        ([str(path), "out", "--lambda_int", "1"], "did you mean --lambda_init"),
    ):
        with pytest.raises(InputError, match=message):
            convert.main(bad)


@pytest.mark.parametrize("old", ["diffclip.checkpoints", "diffclip.attention_maps"])
def test_commands_keep_their_old_names_and_their_help_imports_nothing_heavy(old):
    command = [sys.executable, "-X", "importtime", "-m", old, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: diffclip ")
    lines = done.stderr.splitlines()
    assert all(line.startswith("import time:") for line in lines)  # no warning either
    imported = {line.split("|")[-1].strip() for line in lines}
    assert "argparse" in imported and not imported & {"torch", "transformers", "open_clip", "numpy"}


def test_the_old_spelling_of_convert_reaches_the_command():
    command = [sys.executable, "-m", "diffclip.checkpoints", "convert", "absent.pt", "out", "--lambda_init", "high"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --lambda_init must be a number or 'schedule': got 'high'\n"


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_directories_of_transformers_clip_give_its_features(tmp_path, act):
    theirs = transformers_clip(tmp_path, act)
    ours, transform, tokenize = checkpoints.load(tmp_path)
    images, texts = torch.randn(2, 3, 32, 32), tokenize(["a red mug", "two dogs on a beach"])
    out = theirs(input_ids=texts, pixel_values=images)
    torch.testing.assert_close(ours.encode_image(images, normalize=True), out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.encode_text(texts, normalize=True), out.text_embeds, atol=1e-5, rtol=1e-4)
    assert ours.logit_scale.item() == theirs.logit_scale.item()
    assert transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    before = ours.encode_image(images)
    warm_start.differentiate(ours, kind="v2")  # the warm start of what people have
    torch.testing.assert_close(ours.encode_image(images), before, atol=1e-5, rtol=1e-4)


def test_broken_directories_of_transformers_clip_list_every_key(tmp_path):
    transformers_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    state["text_model.surprise"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        checkpoints.load(tmp_path)
    assert "missing visual.transformer.resblocks.1.attn.in_proj_weight" in str(caught.value)
    assert "unexpected text_model.surprise" in str(caught.value)


@pytest.mark.slow
def test_a_run_trained_by_other_rules_of_decoding_sees_images_as_then(tmp_path):
    model = diffclip.build("CLIP-tiny")
    diffclip.save(model, tmp_path)  # converted or exported: nobody knows
    clear = Image.new("RGBA", (40, 60), (255, 0, 0, 0))
    red, white = (Image.new("RGB", (40, 60), colour) for colour in ("red", "white"))
    transform = diffclip.load(tmp_path)[1]
    assert torch.equal(transform(clear), transform(white))
    (tmp_path / "run.json").write_text("{}")
    for directory in (tmp_path, tmp_path / "again"):
        before, transform, _ = diffclip.load(directory)
        assert torch.equal(transform(clear), transform(red))
        assert torch.equal(transform(to_rgb(clear)), transform(red))
        diffclip.save(before, tmp_path / "again")  # which says by which rules, and is no run
    processor = AutoImageProcessor.from_pretrained(tmp_path / "again")
    assert torch.equal(torch.as_tensor(processor(clear)["pixel_values"][0]), transform(red))
    before.model_config["diffclip"]["decoding"] = 3
    diffclip.save(before, tmp_path / "newer")
    with pytest.raises(InputError, match="decoding 3 is unknown: a newer diffclip-stack"):
        diffclip.load(tmp_path / "newer")
    model.model_config["diffclip"]["decoding"] = DECODING  # as pretraining does
    diffclip.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = diffclip.load(tmp_path)[0]
    assert loaded.model_config["diffclip"]["decoding"] == DECODING
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["decoding"] == DECODING
