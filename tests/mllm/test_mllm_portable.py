"""Saved directories load with torch, transformers and timm alone, by the copies of our modules that lie in them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

import diffclip
from diffclip import hf
from diffclip.base import portable
from mllm.assemble import assemble

# What a process finds without our packages, and without others: None in sys.modules says that there is no such module.
# The refusals come first: loading with trust registers the classes.
ALONE = """
import os, sys
for name in ("diffclip", "mllm", "stages", "open_clip", "ftfy", "peft", "datasets", "lmms_eval", "matplotlib"):
    sys.modules[name] = None
import torch, transformers as t
from PIL import Image
from safetensors.torch import load_file, save_file
pixels, red = load_file("given.safetensors")["pixels"], Image.new("RGB", (60, 50), "red")
trust, found = {"trust_remote_code": True}, {}

for kind, name in ((t.AutoModel, "tower"), (t.AutoModel, "clip"), (t.AutoModelForImageTextToText, "llava"),
                   (t.AutoProcessor, "clip"), (t.AutoImageProcessor, "tower"), (t.AutoProcessor, "llava")):
    try:
        kind.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error) and "upgrade" not in str(error).lower(), error
        assert os.path.abspath(name) in str(error), error  # where a README.md names the package
    else:
        raise SystemExit(f"{kind} took {name}")

for name in ("clip", "v2"):
    model = t.AutoModel.from_pretrained(name, **trust).eval()
    processor = t.AutoProcessor.from_pretrained(name, **trust)
    inputs = processor(text=["a cat", "a red square"], images=red, padding=True, return_tensors="pt")
    found[name], found[f"{name}_ids"] = model(**inputs).logits_per_image, inputs["input_ids"]
found["image"] = t.AutoImageProcessor.from_pretrained("tower", **trust)(red, return_tensors="pt")["pixel_values"]
tower = t.AutoModel.from_pretrained("tower", **trust).eval()
out = tower(pixels, output_attentions=True)
found["tower"], found["map"] = out.pooler_output, out.attentions[0]
tower.save_pretrained("again")
found["again"] = t.AutoModel.from_pretrained("again", **trust).eval()(pixels, output_attentions=True).pooler_output
classifier = t.AutoModelForImageClassification.from_pretrained("clip", num_labels=2, **trust).eval()
found["classifier"] = classifier.vision_model(pixels, output_attentions=True).pooler_output

model = t.AutoModelForImageTextToText.from_pretrained("llava", **trust).eval()
processor = t.AutoProcessor.from_pretrained("llava", **trust)
inputs = processor(text=["<image>\\nIs it red?"], images=[red], return_tensors="pt")
found["logits"], found["tokens"] = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4)
try:
    t.LlavaForConditionalGeneration.from_pretrained("llava")
except KeyError as error:
    assert "diffclip" in str(error), error
else:
    raise SystemExit("LLaVA's own class took the directory")
save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, "found.safetensors")
"""
RED = Image.new("RGB", (60, 50), "red")


@pytest.fixture(scope="module")
def runs(language_dir, tmp_path_factory):
    """A folder with `clip` and `v2`, runs of pretraining, `tower`, a tower alone, `llava`, and pixels for them."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for name, model in (("clip", "DiffCLIP-tiny"), ("v2", "DiffCLIP-V2-tiny")):
        diffclip.save(diffclip.build(model), folder / name)
    hf.DiffCLIPVisionModel.from_pretrained(folder / "clip").save_pretrained(folder / "tower")
    hf.image_processor(diffclip.MODELS["DiffCLIP-tiny"]).save_pretrained(folder / "tower")
    assemble(folder / "clip", language_dir).save(folder / "llava")
    save_file({"pixels": torch.randn(2, 3, 48, 48)}, folder / "given.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(runs, tmp_path_factory):
    """What `ALONE` finds, whose refusals are checked there."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    environment["DIFFCLIP_CACHE"] = os.environ["DIFFCLIP_CACHE"]  # so that both take the same form of attention
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, cwd=runs, env=environment)
    assert done.returncode == 0, done.stderr
    return load_file(runs / "found.safetensors")


@pytest.mark.slow
@torch.no_grad()
def test_dual_encoders_and_towers_load_without_the_package(runs, found):
    for name in ("clip", "v2"):
        processor = AutoProcessor.from_pretrained(runs / name)
        inputs = processor(text=["a cat", "a red square"], images=RED, padding=True, return_tensors="pt")
        model = AutoModel.from_pretrained(runs / name).eval()
        assert torch.equal(found[f"{name}_ids"], inputs["input_ids"])
        assert torch.equal(found[name], model(**inputs).logits_per_image)
    assert torch.equal(found["image"], inputs["pixel_values"])
    out = AutoModel.from_pretrained(runs / "tower").eval()(load_file(runs / "given.safetensors")["pixels"], None, True)
    assert torch.equal(found["map"], out.attentions[0])
    for name in ("tower", "again", "classifier"):
        assert torch.equal(found[name], out.pooler_output), name


@pytest.mark.slow
@torch.no_grad()
def test_the_multimodal_model_loads_without_the_package(runs, found):
    model = AutoModelForImageTextToText.from_pretrained(runs / "llava").eval()
    inputs = AutoProcessor.from_pretrained(runs / "llava")(
        text=["<image>\nIs it red?"], images=[RED], return_tensors="pt"
    )
    assert torch.equal(found["logits"], model(**inputs).logits)
    assert torch.equal(found["tokens"], model.generate(**inputs, max_new_tokens=4))


@pytest.mark.slow
def test_what_was_loaded_without_the_package_is_saved_with_the_same_code(runs, found):
    names = {path.name for path in (runs / "again").glob("*.py")}
    assert "diffclip_hf_vision.py" in names and names <= {path.name for path in (runs / "tower").glob("*.py")}
    assert all((runs / "again" / name).read_text() == (runs / "tower" / name).read_text() for name in names)
    auto_map = json.loads((runs / "again" / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel"} <= auto_map.keys()
    assert {f"{reference.split('.')[0]}.py" for reference in auto_map.values()} <= names


def test_what_is_copied_imports_nothing_else_of_ours(runs):
    for name in ("clip", "v2", "tower", "llava"):
        files = {path.name: path.read_text() for path in (runs / name).glob("*.py")}
        assert files
        for text in files.values():
            assert not portable.OURS.search(text) and "import diffclip\n" not in text
        settings = [json.loads(path.read_text()) for path in (runs / name).glob("*config.json")]
        maps = [part for whole in settings for part in (whole, *whole.values()) if isinstance(part, dict)]
        maps = [part["auto_map"] for part in maps if "auto_map" in part]
        assert len(maps) >= 2
        for reference in (each for auto_map in maps for each in auto_map.values()):
            module, class_name = reference.split(".")
            assert f"\nclass {class_name}(" in files[f"{module}.py"]


def test_what_a_refusal_sends_to_names_the_package(runs):
    for name in ("clip", "tower", "llava"):
        assert "pip install diffclip-stack" in (runs / name / "README.md").read_text()
        files = list((runs / name).glob("*.py"))
        assert files and all("diffclip-stack" in file.read_text().splitlines()[0] for file in files)


def test_a_readme_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    hf.image_processor(diffclip.MODELS["DiffCLIP-tiny"]).save_pretrained(tmp_path)
    portable.write_code(["diffclip.hf.vision.DiffCLIPVisionModel"], tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "diffclip_hf_vision.py").is_file()


def test_a_tower_of_open_clip_brings_its_own_module():
    files = portable.copies("mllm.llava_open_clip")
    assert {"mllm_llava_open_clip.py", "diffclip_hf_open_clip_vision.py", "mllm_llava.py"} <= files.keys()
    assert "import open_clip" in files["diffclip_base_backbones.py"]
    assert "diffclip_base_backbones.py" not in portable.copies("mllm.llava")
