"""`diffclip convert --to`: what it writes against the run, and what each format refuses, with the reason."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from diffclip import checkpoints, convert, export, models, variants
from diffclip.base.errors import InputError

# The smallest vision transformer with a class token that timm has a name for
TIMM = {"image_size": 160, "patch_size": 16, "width": 64, "layers": 6, "head_width": 32, "mlp_ratio": 3.0}
TIMM |= {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}


def config(name, **vision):
    """A named tiny model's config, of one layer a tower, or with timm's smallest tower."""
    made = copy.deepcopy(variants.MODELS[name])
    made["model_cfg"]["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    made["model_cfg"]["vision_cfg"] |= vision or {"layers": 1, "width": 64, "head_width": 16}
    made["preprocess_cfg"]["size"] = made["model_cfg"]["vision_cfg"]["image_size"]
    return made


@pytest.fixture
def run(tmp_path):
    def make(name, norm_eps=1e-6, **vision):
        made = config(name, **vision)
        made["diffclip"]["vision_norm_eps"] = norm_eps
        torch.manual_seed(0)
        checkpoints.save(models.build(made), tmp_path / "run")
        return tmp_path / "run"

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,form",
    [("CLIP-tiny", "onnx"), ("DiffCLIP-tiny", "onnx"), ("DiffCLIP-V2-tiny", "onnx"), ("DiffCLIP-tiny", "pt2")],
)
def test_programs_of_both_towers_give_the_runs_features(name, form, run, tmp_path, capsys):
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} of the extra `export` is not installed")
    convert.main([str(run(name)), "--to", form, str(tmp_path / "out")])
    assert "differ from those of" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"image.{form}", f"text.{form}", "encoders.json"}
    model, _, tokenizer = checkpoints.load(tmp_path / "run")
    inputs = {"image": torch.randn(7, 3, 48, 48), "text": tokenizer(["a star", "two small dogs"] * 2)}
    for tower, x in inputs.items():
        with torch.no_grad():
            expected = getattr(model, f"encode_{tower}")(x, normalize=True)
        file = tmp_path / "out" / f"{tower}.{form}"
        if form == "pt2":
            found = torch.export.load(file).module()(x)
        else:
            import onnxruntime

            found = torch.from_numpy(onnxruntime.InferenceSession(file).run(None, {tower: x.numpy()})[0])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    described = json.loads((tmp_path / "out" / "encoders.json").read_text())
    assert described["preprocess_cfg"] == model.model_config["preprocess_cfg"] and described["context_length"] == 40
    assert described["logit_scale"] == pytest.approx(1 / 0.07)


@pytest.mark.slow
def test_a_clip_leaves_as_open_clips_own(run, tmp_path):
    """Read, and trained on, where our package cannot be imported."""
    folder, out = run("CLIP-tiny", **TIMM), tmp_path / "out"
    assert max(export.export(folder, "open_clip", out).values()) <= 1e-6
    x = torch.randn(2, 3, 160, 160)
    torch.save(x, tmp_path / "x.pt")
    Image.new("RGB", (160, 160), "red").save(tmp_path / "red.png")
    (tmp_path / "pairs.csv").write_text("filepath\ttitle\n" + "red.png\tred\n" * 2)
    train = f"--model local-dir:{out} --dataset-type csv --train-data pairs.csv --batch-size 2 --epochs 1 --workers 0"
    code = f"""
import sys; sys.modules["diffclip"] = None
import open_clip, torch
from open_clip_train.main import main
model, _, transform = open_clip.create_model_and_transforms("local-dir:{out}")
text = open_clip.get_tokenizer("local-dir:{out}")(["a star"])
with torch.no_grad():
    both = model.eval().encode_image(torch.load("x.pt")), model.encode_text(text)
torch.save((*both, repr(transform)), "found.pt")
main("{train} --logs . --name trained".split())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "trained" / "checkpoints" / "epoch_1.pt").is_file()
    image, text, transform = torch.load(tmp_path / "found.pt")
    model, ours, tokenizer = checkpoints.load(folder)
    with torch.no_grad():
        torch.testing.assert_close(image, model.encode_image(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(text, model.encode_text(tokenizer(["a star"])), atol=1e-5, rtol=1e-4)
    assert "size=160" in transform and str(ours.transforms[-1]) in transform


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,vision,eps,form,said",
    [
        ("DiffCLIP-tiny", {}, 1e-6, "open_clip", "open_clip has no differential attention; after `import diffclip`"),
        ("CLIP-tiny", {}, 1e-6, "open_clip", r"no named model of this size \(width 64, 1 layers\)"),
        ("CLIP-tiny", {**TIMM, "layers": 2}, 1e-6, "open_clip", "open_clip builds another model from test_vit"),
        ("CLIP-tiny", TIMM, 1e-5, "open_clip", r"epsilons of layer norms: visual\.trunk.* 1e-05, not 1e-06"),
        ("DiffCLIP-V2-tiny", {}, 1e-6, "official", "the official code has no differential attention v2"),
    ],
)
def test_a_format_that_cannot_hold_a_model_says_why(name, vision, eps, form, said, run, tmp_path):
    folder, out = run(name, eps, **vision), tmp_path / ("out.pt" if form == "official" else "out")
    with pytest.raises(InputError, match=said):
        export.export(folder, form, out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.filterwarnings("ignore:.*to be set in the official code by hand")
def test_the_official_layout_is_checked_too(run, tmp_path):
    found = export.export(run("DiffCLIP-star-tiny"), "official", tmp_path / "out.pt")
    assert found == {"image": 0, "text": 0}


def test_another_model_than_the_runs_is_not_written(run, tmp_path, monkeypatch):
    """A form whose reader gives other features leaves what was there as it was."""

    def broken(model, transform, tokenizer, folder):
        (folder / "weights").write_text("new")
        model.visual.head.proj.weight.data[0] *= -1
        return export.encoder(copy.deepcopy(model), transform, tokenizer)

    monkeypatch.setitem(export.FORMS, "pt2", broken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").write_text("old")
    reference = export.encoder
    monkeypatch.setattr(export, "encoder", lambda model, *rest: reference(copy.deepcopy(model), *rest))
    with pytest.raises(InputError, match="as pt2 its features differ by"):
        export.export(run("CLIP-tiny"), "pt2", tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_where_to_write_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for form, target, said in (
        ("pt2", tmp_path / "file", "file: is a file; give the name of a folder for pt2"),
        ("pt2", tmp_path / "no" / "out", "there is no folder .*no; make it first"),
        ("official", tmp_path / "out", r"must end in \.pt or \.pth"),
        ("gguf", tmp_path / "out", "form 'gguf' is unknown: use one of open_clip"),
    ):
        with pytest.raises(InputError, match=said):
            export.export(tmp_path / "absent", form, target)
