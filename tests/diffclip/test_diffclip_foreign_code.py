"""Code that a stranger put beside a model's weights is never run: each test plants code that would write a file."""

import ast
import io
import json
import os
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import diffclip
from diffclip import checkpoints, convert
from diffclip.base.archives import check_arrays
from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.benchmarks.__main__ import main as benchmarks
from stages import evaluate

TREE = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(TREE).with_suffix("").parts): ast.parse(path.read_text())
    for folder in ("diffclip", "mllm", "stages", "benchmarks")
    for path in (TREE / folder).rglob("*.py")
}
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
    with pytest.raises(InputError, match=reason):
        evaluate.main(["--clip", str(folder), "--data_root", str(tmp_path), "--output_dir", str(tmp_path / "stage")])
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


# Raw calls that open what strangers wrote: pattern of the call -> the modules that are its doors, or whose files are
# their own (caches, what a command of theirs has just written).
DOORS = {
    r"json\.loads?": (
        "base.files",
        "base.ranks",
        "base.objects",  # and its client: what they say to each other
        "base.object_client",
        "architectures",
        "data.captions",
        "data.shards",
        "mllm.data",
        "mllm.model",
    )
    + ("mllm.own_template", "mllm.literal", "mllm.lmms_plugin", "stages.manifest"),
    r"yaml\.(?!safe_dump).*": ("base.files",),
    r"(PIL\.)?Image\.open": ("base.images",),
    r"tarfile\.open|zipfile\.ZipFile|shutil\.unpack_archive": ("base.archives", "scenes.parts"),
    r"gzip\.(open|GzipFile|decompress)|(bz2|lzma|zlib)\..*": ("base.files", "data.records", "stages.manifest"),
    r"torch\.load|load_file|safe_open|.*\.load_file|.*\.(torch|numpy)\.load": ("diffclip.weights", "stages.verify")
    + ("stages.checkpoint_files", "report.significance"),
    r"(np|numpy)\.(load|fromfile|memmap|genfromtxt|loadtxt|lib\.format\..*)": ("base.cache", "base.archives"),
    r"(c?[pP]ickle|marshal|shelve|dill|joblib)\..*": (),
    r"eval|exec|compile|__import__|os\.(system|popen|exec\w+|spawn\w+)": (),
    r"(pd|pandas)\.read_\w+|datasets\.load_dataset|load_dataset": ("data.tables",),
    r"(datasets\.)?load_from_disk": ("data.tables", "mllm.data.files"),
    r"(pq|pyarrow\.parquet)\.(read\w*|Parquet(File|Dataset))|ParquetFile": ("base.parquet",),
    r"(webdataset|wds)\..*": (),
    r"(subprocess)\.(run|Popen|call|check_\w+)": (
        "base.objects",
        "base.ranks",
        "stages.download",
        "stages.pipeline",
        "stages.provenance",
    )
    + ("mllm.pope.lmms",),
    r".*\.from_pretrained": ("diffclip.weights", "base.loaded"),
}
# What benchmarks/ may call, whose files are its own or those of a peer that it times in its own environment.
PEERS = ("json.loads", "tarfile.open", "wds.x", "subprocess.run", "AutoTokenizer.from_pretrained", "torch.load")
MEASURED = [call for call in DOORS if any(re.fullmatch(call, each) for each in PEERS)]


@pytest.mark.slow
@pytest.mark.parametrize("call", DOORS)
def test_what_strangers_wrote_is_opened_at_the_doors_alone(call):
    raw = {
        f"{name}:{node.lineno} {ast.unparse(node.func)}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.fullmatch(call, ast.unparse(node.func))
        if not any(f"{door}." in f"{name}." for door in DOORS[call])
        if not (name.startswith("benchmarks.") and call in MEASURED)
    }
    assert not raw


def test_a_raw_call_would_be_seen():
    calls = [
        "json.load(f)",
        "yaml.load(x)",
        "Image.open(p)",
        "torch.load(p)",
        "AutoModel.from_pretrained(p)",
        "eval(x)",
    ]
    for text in calls:
        func = ast.unparse(ast.parse(text).body[0].value.func)
        assert any(re.fullmatch(call, func) for call in DOORS), text


def test_transformers_is_told_that_no_code_may_run():
    tree = MODULES["diffclip.weights"]
    said = [
        {word.arg: ast.unparse(word.value) for word in node.keywords}.get("trust_remote_code")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert said == ["False"]


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_arrays_of_numpy_are_not_unpickled_and_take_no_more_memory_than_their_bytes(kind, tmp_path):
    marker = tmp_path / "marker"

    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    def written(content):
        path = tmp_path / f"x.{kind}"
        path.write_bytes(content)
        if kind == "npz":
            with zipfile.ZipFile(path, "w") as packed:
                packed.writestr("x.npy", content)
        return path

    def array(shape, content=b"\0" * 20):
        text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content

    buffer = io.BytesIO()
    np.save(buffer, np.array([Planted()], dtype=object), allow_pickle=True)
    check_arrays(written(array("(5,)")))
    hostile = [
        buffer.getvalue(),
        *map(array, ("(10**9,)", "(999999999999,)", "(1 << 40, 1 << 40)", "(" * 400)),
        b"",
        b"PK",
    ]
    for content in hostile:
        with pytest.raises(InputError, match=rf"x\.{kind}: .*download it again"):
            check_arrays(written(content))
    assert not marker.exists()


@pytest.mark.slow
def test_torch_reads_no_pickled_objects():
    said = [
        {word.arg: ast.unparse(word.value) for word in node.keywords}.get("weights_only")
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert said and set(said) == {"True"}
