"""Settings: YAML and flags mean the same, bad ones are one sentence and exit code 2."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from diffclip.base.errors import InputError
from stages.config import parse, read_yaml, require, write_yaml
from stages.settings import AlignConfig, EvaluateConfig, InstructConfig, LanguageConfig, PipelineConfig, PretrainConfig
from stages.zero import zero_stage

CONFIGS = Path(__file__).parents[2] / "stages" / "configs"
CLASSES = {
    "pretrain": PretrainConfig,
    "language": LanguageConfig,
    "align": AlignConfig,
    "instruct": InstructConfig,
    "evaluate": EvaluateConfig,
    "pipeline": PipelineConfig,
}


@dataclass
class Example:
    output_dir: str = ""
    rate: float = 1e-3
    count: int = 3
    files: list[str] = field(default_factory=list)
    fast: bool = False
    more: dict = field(default_factory=dict)


def test_flags_win_over_yaml_which_wins_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("rate: 5e-4\ncount: 7\nfiles: [a, b]\nfast: true\nmore: {x: 1}\n")
    config = parse(Example, "", ["--config", str(file), "--count", "9"])
    assert config == Example("", 5e-4, 9, ["a", "b"], True, {"x": 1})


def test_resolved_settings_read_back_equal(tmp_path):
    config = Example("out", 1e-8, 2, ["a"], True, {"y": [1, 2]})
    write_yaml(config, tmp_path / "c.yaml")
    assert Example(**read_yaml(tmp_path / "c.yaml", Example)) == config


@pytest.mark.parametrize(
    "text, message",
    [
        ("cuont: 3", "did you mean `count`"),
        ("zzz: 3", "known keys: output_dir"),
        ("count: three", "invalid int value: 'three'"),
        ("[1, 2]", "expected `key: value` lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_yaml_names_file_and_remedy(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse(Example, "", ["--config", str(file)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_missing_setting():
    with pytest.raises(InputError, match="no such configuration file"):
        parse(Example, "", ["--config", "nowhere.yaml"])
    with pytest.raises(InputError, match="`output_dir` is missing"):
        require(Example(), "output_dir")


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_config_loads_and_says_what_it_is_for(path):
    config_class = CLASSES[path.stem.split("_")[0]]
    config = parse(config_class, "", ["--config", str(path)])
    assert path.read_text().startswith("# ")
    values = yaml.safe_load(path.read_text())
    numbers = {k: v for k, v in values.items() if isinstance(v, int | bool)}
    assert {k: getattr(config, k) for k in numbers} == numbers


def test_a_shipped_config_and_its_deepspeed_file_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (CONFIGS / "paper/instruct.yaml", "stages/configs/paper/instruct.yaml"):
        assert zero_stage(parse(InstructConfig, "", ["--config", str(name)]).deepspeed) == 2
    (tmp_path / "own.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert zero_stage(parse(InstructConfig, "", ["--deepspeed", "own.json"]).deepspeed) == 3


@pytest.mark.parametrize("text, message", [(None, "no such DeepSpeed file"), ('{"a": 1,}', "not valid JSON")])
def test_a_deepspeed_file_that_cannot_be_read_is_named(tmp_path, text, message):
    file = tmp_path / "zero.json"
    if text:
        file.write_text(text)
    with pytest.raises(InputError, match=rf"zero\.json: {message}.*setting `deepspeed`"):
        parse(AlignConfig, "", ["--deepspeed", str(file)])


@pytest.mark.parametrize("stage", [*CLASSES, "report"])
def test_help_needs_no_heavy_library(stage):
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert ended.returncode == 0 and "--help" in ended.stdout and "argparse" in imported
    assert not imported & {"torch", "open_clip", "deepspeed", "datasets"}


def test_bad_input_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "stages.pretrain", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    ended = subprocess.run([*command, "--train_data", "missing/*.tar"], capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "error: missing/*.tar: no such file" in ended.stderr
    assert not (tmp_path / "run").exists()
