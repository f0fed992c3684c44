"""Models that are damaged or odd are named when they are loaded, with their file and parameter, and before memory is
taken for what their configurations say.
"""

import json
import math
import os
import re
import resource
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import diffclip
from diffclip import checkpoints, models, variants
from diffclip.base.bounded import comes_to_an_end
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.loaded import check_values
from diffclip.weights import from_pretrained, read_safetensors
from stages.cli import call

HF_WEIGHTS, HF_CONFIG = "model.safetensors", "config.json"
SECONDS, MEMORY = 1, 200 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = variants.named("DiffCLIP-tiny")
    config["model_cfg"]["text_cfg"]["vocab_size"] = 500  # most of its weights are words
    checkpoints.save(models.build(config), folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change_weights(folder, change):
    """Change, in both files, the tensor of one parameter, which `change` gives anew; None leaves it out."""
    for file, name in (
        (checkpoints.WEIGHTS, "transformer.resblocks.1.attn.q_proj.weight"),
        (HF_WEIGHTS, "text_model.transformer.resblocks.1.attn.q_proj.weight"),
    ):
        state = load_file(folder / file)
        state[name] = change(state[name].clone())
        save_file({k: v for k, v in state.items() if v is not None}, folder / file, {"format": "pt"})


def change_config(folder, path, value, file=checkpoints.CONFIG):
    config = json.loads((folder / file).read_text())
    part = config
    for key in path.split(".")[:-1]:
        part = part[key]
    part[path.split(".")[-1]] = value
    (folder / file).write_text(json.dumps(config))


def with_value(value):
    def change(tensor):
        tensor[3, 5] = value
        return tensor

    return change


def flipped(tensor):
    tensor.view(torch.int32)[3, 5] ^= 1 << 30  # the highest bit of the exponent
    return tensor


DAMAGE = {
    "NaN": with_value(float("nan")),
    "infinite": with_value(-float("inf")),
    "a flipped bit": flipped,
    "missing": lambda tensor: None,
    "of another shape": lambda tensor: tensor[:3].contiguous(),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_named_with_file_and_parameter(damage, copy):
    change_weights(copy, DAMAGE[damage])
    for load, file in ((diffclip.load, checkpoints.WEIGHTS), (AutoModel.from_pretrained, HF_WEIGHTS)):
        with pytest.raises(InputError, match=rf"{copy}/{file}: .*transformer\.resblocks\.1\.attn\.q_proj\.weight"):
            load(copy)


COMMANDS = {
    "convert": "convert {model} {out}",
    "benchmark": "benchmark --model {model} --data_root {data} --output_dir {out}",
    "evaluate": "evaluate --clip {model} --data_root {data} --output_dir {out}",
}


@pytest.mark.parametrize(("command", "damage"), zip(COMMANDS, ("NaN", "a flipped bit", "missing")))
def test_commands_name_damaged_weights(command, damage, copy, tmp_path, capsys):
    change_weights(copy, DAMAGE[damage])
    (tmp_path / "data").mkdir()
    words = COMMANDS[command].format(model=copy, out=tmp_path / "out", data=tmp_path / "data").split()
    with pytest.raises(SystemExit) as ended, exit_on_input_error():
        call(words)
    assert ended.value.code == 2
    named = rf"{copy}/{checkpoints.WEIGHTS}: .*transformer\.resblocks\.1\.attn\.q_proj"
    assert re.search(named, said := capsys.readouterr().err), said


def test_only_what_does_not_learn_may_be_infinite():
    state = {"weight": torch.ones(2), "limit": torch.tensor([-math.inf, math.inf])}  # as Gemma 4 has them
    check_values(state, "x", {"limit"})
    for bad, buffers in ((state, ()), (state | {"limit": torch.tensor(math.nan)}, {"limit"})):
        with pytest.raises(InputError, match=r"^x: .*limit \("):
            check_values(bad, "x", buffers)


def test_integers_and_lambdas_without_bounds_are_no_weights(copy):
    change_weights(copy, lambda tensor: tensor.to(torch.int8))
    with pytest.raises(InputError, match=r"another kind stand in transformer\.resblocks\.1\.attn\.q_proj"):
        diffclip.load(copy)
    change_weights(copy, lambda tensor: torch.zeros(tensor.shape))
    state = load_file(copy / checkpoints.WEIGHTS)
    state |= {key: torch.full_like(tensor, 100.0) for key, tensor in state.items() if "blocks.2.attn.lambda_" in key}
    save_file(state, copy / checkpoints.WEIGHTS)
    with pytest.raises(InputError, match=r"blocks\.2\.attn has a lambda of"):
        diffclip.load(copy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model_cfg.vision_cfg.layers", 10**9),
        ("model_cfg.vision_cfg.layers", 1000),
        ("model_cfg.vision_cfg.layers", float("nan")),
        ("model_cfg.vision_cfg.width", 1 << 17),
        ("model_cfg.vision_cfg.width", -8),
        ("model_cfg.vision_cfg.head_width", 0),
        ("model_cfg.vision_cfg.image_size", 10**6),
        ("model_cfg.vision_cfg.image_size", [32]),
        ("model_cfg.vision_cfg.mlp_ratio", 1e9),
        ("model_cfg.vision_cfg", None),
        ("model_cfg.text_cfg.vocab_size", 1 << 23),
        ("model_cfg.text_cfg.heads", "two"),
        ("model_cfg.text_cfg.context_length", True),
        ("preprocess_cfg.size", 10**6),
        ("preprocess_cfg.size", 16),
        ("preprocess_cfg.std", [0, 0, 0]),
        ("preprocess_cfg.std", [1, 1]),
        ("preprocess_cfg.mean", [float("nan")] * 3),
        ("preprocess_cfg.interpolation", "nobody's"),
        ("preprocess_cfg.resize_mode", 3),
        ("preprocess_cfg", []),
        ("preprocess_cfg", {}),
        ("preprocess_cfg", {"size": 32, "mean": [0, 0, 0]}),
        ("diffclip", 3),
        ("diffclip.attention.vision.lambda_init", float("inf")),
        ("diffclip.attention.vision.kind", []),
        ("diffclip.attention", {"nose": {}}),
        ("diffclip.decoding", "x"),
    ],
    ids=str,
)
def test_odd_configurations_are_refused_by_name_before_memory_is_taken(path, value, copy):
    change_config(copy, path, value)

    def load():
        with pytest.raises(InputError, match=rf"{copy}/{checkpoints.CONFIG}: "):
            diffclip.load(copy)

    assert within_limits(load)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_config.num_hidden_layers", 10**9),
        ("vision_config.num_hidden_layers", 1000),
        ("vision_config.hidden_size", 1 << 17),
        ("vision_config.image_size", 8192),
        ("vision_config.lambda_init", [float("inf")] * 4),
        ("vision_config.num_attention_heads", 0),
        ("text_config.vocab_size", 1 << 23),
        ("text_config.max_position_embeddings", 1 << 28),
        ("projection_dim", -1),
    ],
    ids=str,
)
def test_odd_configurations_of_transformers_too(path, value, copy):
    change_config(copy, path, value, HF_CONFIG)

    def load():
        with pytest.raises(InputError, match="config"):
            from_pretrained(AutoModel, copy)

    assert within_limits(load)


HEADERS = {
    "longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "90 MB": struct.pack("<Q", 90 << 20) + b" " * (90 << 20),
    "offsets outside": {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}},
    "a shape that overflows": {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}},
    "an unknown type": {"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}},
    "a type that lies": {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}},
    "nested": b'{"a":' + b"[" * 100_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_safetensors_are_refused(kind, tmp_path):
    header = HEADERS[kind]
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    whole = text if text[:1] != b"{" else struct.pack("<Q", len(text)) + text + b"1234"
    (tmp_path / "x.safetensors").write_bytes(whole)

    def read():
        with pytest.raises(InputError, match=r"x\.safetensors: cannot be read as safetensors"):
            read_safetensors(tmp_path / "x.safetensors")

    assert within_limits(read)


def within_limits(work):
    """Whether `work` ends without an exception in a second of a CPU and 200 MB beyond what this process has."""
    outcome = []

    def judged():
        try:
            work()
        except BaseException as error:
            outcome.append(error)
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            raise MemoryError from None

    return comes_to_an_end(judged, SECONDS, MEMORY)


@pytest.mark.slow
def test_the_limits_of_these_tests_hold():
    assert within_limits(lambda: bytearray(1 << 20))
    assert not within_limits(lambda: bytearray(50 * MEMORY))  # this process may have freed some of its own
    assert not within_limits(lambda: [None for _ in iter(int, 1)])
    assert not within_limits(lambda: pytest.fail("no"))
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] == resource.RLIM_INFINITY
