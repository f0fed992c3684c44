"""Training on from a CLIP that is there: made differential, locked in part, at other rates in other layers, resumed."""

import json

import pytest
import torch
from launch import ROOT, call
from safetensors.torch import load_file, save_file

import diffclip
from diffclip import adaptation
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from stages import pretrain

SETTINGS = [
    *("--epochs=2", "--global_batch_size=8", "--learning_rate=1e-3", "--warmup_epochs=0", "--use_cpu=true"),
    *("--num_workers=0", "--logging_steps=1", "--save_steps=2", "--report_to=none", "--min_crop=1.0"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = {"pairs": 16, "class_train": 10, "class_val": 20, "class_test": 10}
    parts = "--only=pretrain,classification"
    call("diffclip.scenes", "export", str(folder), parts, *(f"--{k}={n}" for k, n in sizes.items()))
    torch.manual_seed(0)
    diffclip.save(diffclip.build("CLIP-tiny"), folder / "clip")
    return folder


def adapt(world, out, *more):
    places = [f"--train_data={world}/pretrain/*.tar", f"--output_dir={out}"]
    pretrain.main([*places, *SETTINGS, *more])
    return load_file(out / "open_clip_model.safetensors")


def start(world, *more):
    return f"--init_from={world / 'clip'}", *more


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def held_out(world):
    return f"--val_pairs={world}/pretrain/*.tar", f"--val_data={world}/classification/shape"


@pytest.fixture(scope="module")
def kept(world, tmp_path_factory):
    """The first validation of the model as it was."""
    out = tmp_path_factory.mktemp("kept") / "run"
    adapt(world, out, *start(world), *held_out(world), "--epochs=1", "--global_batch_size=16")
    return next(row for row in rows(out) if "val/top1" in row)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v1", "v2", "dex"])
def test_a_trained_clip_becomes_differential_and_is_validated_before_its_first_step(world, kept, tmp_path, kind):
    adapt(world, tmp_path / "run", *start(world, f"--attention={kind}"), *held_out(world))
    model, _, _ = diffclip.load(tmp_path / "run")
    assert {tower: how["kind"] for tower, how in model.model_config["diffclip"]["attention"].items()} == {
        "vision": kind,
        "text": kind,
    }
    validated = [row for row in rows(tmp_path / "run") if "val/top1" in row]
    assert [row["step"] for row in validated] == [0, 2, 4] and "val/text_to_image/R@1" in validated[0]
    if kind != "v1":  # which starts as another function
        assert validated[0] == kept
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["model"] == f"clip+{kind}" and record["inputs"]["init_from"]["path"] == str(world / "clip")
    if kind == "dex":
        attention = model.visual.trunk.blocks[0].attn
        assert attention.annealing == 1 and attention.lambda_learnt.abs() > 0


LEARNS = {
    "text logit_scale": ({"text", "logit_scale"}, "keep"),
    "vision": ({"vision"}, "keep"),
    "new": ({"new"}, "v2"),
    "text new": ({"text", "new"}, "v2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("learns", LEARNS)
def test_only_what_learns_changes(world, tmp_path, learns):
    parts, attention = LEARNS[learns]
    more = [f"--attention={attention}", "--towers", "vision", "--learns", *learns.split(), "--weight_decay=0.5"]
    after = adapt(world, tmp_path / "run", *start(world, *more))
    torch.manual_seed(0)
    model = diffclip.load(world / "clip")[0]
    if attention != "keep":
        diffclip.differentiate(model, ["vision"], kind=attention)
    before, added = model.state_dict(), adaptation.added_parameters(model)
    for name, tensor in after.items():
        was, moved = before[name].reshape(tensor.shape), name in added and "new" in parts
        if adaptation.part_of(name) in parts:
            assert not torch.equal(tensor, was) or tensor.ndim < 2, name
        elif not moved:
            assert torch.equal(tensor, was), name
        elif (rows := added[name]) is not None:
            assert torch.equal(tensor[~rows], was[~rows]), name
            assert not torch.equal(tensor[rows], was[rows]) or "bias" in name, name
        else:
            assert not torch.equal(tensor, was), name


@pytest.mark.slow
def test_layers_learn_at_rates_that_fall_with_depth(world, tmp_path):
    """Adam's first steps are as long as its rate, whatever the gradient."""
    out = tmp_path / "run"
    schedule = ["--epochs=1", "--end_learning_rate=1e-3", "--start_learning_rate=1e-3", "--weight_decay=0"]
    after = adapt(world, out, *start(world, "--layer_decay=0.5", *schedule, "--global_batch_size=16"))
    before = load_file(world / "clip" / "open_clip_model.safetensors")
    for name, times in {
        "visual.head.proj.weight": 1,
        "visual.trunk.blocks.3.mlp.fc1.weight": 0.5,
        "visual.trunk.blocks.0.mlp.fc1.weight": 0.0625,
        "visual.trunk.patch_embed.proj.weight": 0.03125,
        "transformer.resblocks.0.mlp.c_fc.weight": 0.125,  # of three
        "text_projection": 1,
    }.items():
        step = (after[name] - before[name]).abs().median()
        assert step == pytest.approx(1e-3 * times, rel=0.05), name


@pytest.mark.slow
def test_a_finished_run_is_trained_on_in_another_directory_and_resumes(world, tmp_path):
    more = start(world, "--attention=dex", "--precision=bf16")
    calm = adapt(world, tmp_path / "calm", *more)
    (tmp_path / "run").mkdir()

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2

    from stages.callbacks import Watch

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Watch, "on_step_end", stop, raising=False)
        adapt(world, tmp_path / "run", *more)
    resumed = adapt(world, tmp_path / "run", *more)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in calm.items())
    adapt(world, tmp_path / "on", f"--init_from={tmp_path / 'calm'}", "--image_size=64")
    model, transform, _ = diffclip.load(tmp_path / "on")
    assert model.model_config["diffclip"]["attention"]["vision"]["kind"] == "dex" and "64" in repr(transform)


SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "none", "image_size": 160},
    "text_cfg": {"layers": 1, "width": 32, "heads": 4, "context_length": 12, "no_causal_mask": True}
    | {"proj_bias": True, "pool_type": "last"},
}


@pytest.mark.slow
def test_a_siglip_of_open_clip_learns_by_its_own_loss(world, tmp_path):
    (tmp_path / "adapt-sig.json").write_text(json.dumps(SIGLIP))
    open_clip.add_model_config(tmp_path / "adapt-sig.json")
    try:
        theirs = open_clip.create_model("adapt-sig")
        save_file(theirs.state_dict(), tmp_path / "w.safetensors")
        name = f"open_clip:adapt-sig@{tmp_path / 'w.safetensors'}"
        more = ["--attention=v2", "--towers", "vision", "--micro_batch_size=4", "--epochs=1", "--learns", "vision"]
        adapt(world, tmp_path / "run", f"--init_from={name}", *more, "logit_scale", "--learning_rate=1e-4")
        first = rows(tmp_path / "run")[0]
        assert first["loss"] > 0 and first["logit_scale"] == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-3)
        learnt = diffclip.load(tmp_path / "run")[0]
        assert learnt.logit_bias.item() != -10
    finally:
        del open_clip.factory._MODEL_CONFIGS["adapt-sig"]


@pytest.mark.slow
def test_a_dry_run_needs_no_weights_of_open_clips_names(capsys):
    name = "--init_from=open_clip:ViT-S-32-alt@nothing"
    pretrain.main(
        [name, "--attention=v2", "--dry_run=true", "--samples=1000", "--global_batch_size=8", "--learns", "new"]
    )
    said = capsys.readouterr().out
    assert "parameters learn" in said and "vision tower" in said


REFUSED = {
    "--model=CLIP-tiny --init_from={clip}": "leave one out",
    "--attention=v2": "setting `attention`: changes a model that is there",
    "--init_from={clip} --lambda_init=0.3": "set `attention` to v1, v2 or dex",
    "--init_from={clip} --attention=v2 --lambda_init=much": "must be a number or schedule",
    "--init_from={clip} --attention=v2 --lambda_init=2": "lambda_init of v2 .*between 0 and 1",
    "--init_from={clip} --learns new": "set `attention`",
    "--init_from={clip} --learns visio": "did you mean vision",
    "--init_from={clip} --init=official": "leave it out",
    "--init_from={clip} --image_size=50": "whole number of patches",
    "--init_from=nowhere": "nowhere: no such file",
    "--init_from={clip} --layer_decay=0": "layer_decay",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_adapted_is_refused_before_the_directory_is_claimed(world, tmp_path, words):
    arguments = words.format(clip=world / "clip").split()
    with pytest.raises(InputError, match=REFUSED[words]):
        adapt(world, tmp_path / "run", *arguments)


def test_recipes_for_one_gpu_do_not_say_use_cpu():
    for path in (ROOT / "stages" / "configs").rglob("*.yaml"):
        assert path.parent.name in ("quickstart", "fast") or "use_cpu" not in path.read_text(), path
