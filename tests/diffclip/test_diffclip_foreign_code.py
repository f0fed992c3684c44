"""Code that a stranger put beside a model's weights is never run: each test plants code that would write a file."""

import ast
import io
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import diffclip
from diffclip import checkpoints, convert
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.benchmarks.__main__ import main as benchmarks

TREE = Path(__file__).resolve().parents[2]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8},
    "text_cfg": {"layers": 1, "width": 16, "heads": 2, "context_length": 12},
}


@pytest.fixture(autouse=True)
def a_user_who_says_yes(monkeypatch, tmp_path):
    """transformers asks on the terminal whether to run code, where it was not told."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def plant(folder, **auto_map):
    """Put code into a folder and say in its configuration files that it is needed; return the file it would write."""
    marker = folder / "the_code_ran"
    code = f"open({str(marker)!r}, 'w')\n"
    code += "from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer\n"
    code += "class Planted(PreTrainedConfig):\n    model_type = 'planted'\nclass PlantedModel(PreTrainedModel): pass\n"
    code += "class PlantedTokenizer(PreTrainedTokenizer): pass\nclass PlantedProcessor(BaseImageProcessor): pass\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "planted.py").write_text(code)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PlantedTokenizer",
                "auto_map": {"AutoTokenizer": ["planted.PlantedTokenizer", "planted.PlantedTokenizer"]},
            }
        )
    )
    maps = {"AutoConfig": "planted.Planted", "AutoModel": "planted.PlantedModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "planted", "auto_map": maps, **auto_map}))
    processor = {"auto_map": {"AutoImageProcessor": "planted.PlantedProcessor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return marker


def open_clip_directory(folder, **text):
    folder.mkdir(exist_ok=True)
    model = open_clip.CLIP(**CONFIG)
    config = {"model_cfg": {**CONFIG, "text_cfg": CONFIG["text_cfg"] | text}, "preprocess_cfg": {"size": 16}}
    (folder / checkpoints.CONFIG).write_text(json.dumps(config))
    save_file(model.state_dict(), folder / checkpoints.WEIGHTS)


TEXT = {
    "trust_remote_code": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}},
    "custom code": {"hf_tokenizer_name": "x"},
}


@pytest.mark.parametrize("reason", TEXT)
def test_open_clip_directories_bring_no_code(reason, tmp_path):
    folder = tmp_path / "clip"
    open_clip_directory(folder, **TEXT[reason])
    marker = plant(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=reason):
        diffclip.load(folder)
    with pytest.raises(InputError, match=reason):
        convert.main([str(folder), str(tmp_path / "out")])
    with pytest.raises(InputError, match=reason):
        benchmarks(["--model", str(folder), "--data_root", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert not marker.exists()


def test_text_towers_of_transformers_bring_no_code(tmp_path):
    folder = tmp_path / "clip"
    marker = plant(tmp_path / "text")
    open_clip_directory(folder, hf_model_name=str(tmp_path / "text"), hf_tokenizer_name="x")
    with pytest.raises(InputError, match=r"text tower .* cannot be had without code of its own"):
        diffclip.load(folder)
    from mllm.open_clip_tower import load_tower

    with pytest.raises(InputError, match=r"text tower .* cannot be had without code of its own"):
        load_tower(f"open_clip:local-dir:{folder}")
    assert not marker.exists()


def test_directories_of_transformers_bring_no_code(tmp_path):
    clip = tmp_path / "clip"
    marker = plant(clip, model_type="clip", vision_config={}, text_config={})
    with pytest.raises(InputError, match=r"model\.safetensors"):
        diffclip.load(clip)
    from diffclip import hf_inputs
    from diffclip.weights import from_pretrained

    with pytest.raises(InputError, match="custom code"):
        hf_inputs.image_transform(clip, 16)
    with pytest.raises(InputError, match="custom code"):
        hf_inputs.tokenizer(clip, 12, 100)
    from transformers import AutoConfig, AutoTokenizer

    other = tmp_path / "other"
    planted = plant(other)
    for kind in (AutoConfig, AutoTokenizer):
        with pytest.raises(InputError, match="custom code"):
            from_pretrained(kind, other)
    assert not marker.exists() and not planted.exists()


def test_without_the_guard_the_planted_code_would_run(tmp_path):
    """What is planted here is what transformers would run."""
    from transformers import AutoTokenizer

    marker = plant(tmp_path / "x")
    with pytest.raises(Exception):  # noqa: B017 - what the planted class does afterwards is no matter
        AutoTokenizer.from_pretrained(tmp_path / "x", trust_remote_code=True)
    assert marker.exists()


def test_every_call_of_from_pretrained_by_an_auto_class_says_that_no_code_may_run():
    calls = 0
    for path in (p for folder in ("diffclip", "mllm", "stages", "benchmarks") for p in (TREE / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
            ):
                calls += 1
                said = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                assert isinstance(said, ast.Constant) and said.value is False, f"{path}:{node.lineno}"
    assert calls > 5
