"""Settings: YAML and flags mean the same, bad ones are one sentence and exit code 2."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from diffclip.base.commands import Range
from diffclip.base.errors import InputError
from stages.config import SettingsParser, parse, read_yaml, require, write_yaml, zero_stage
from stages.settings import (
    AlignConfig,
    EvaluateConfig,
    InstructConfig,
    LanguageConfig,
    PipelineConfig,
    PretrainConfig,
    check_value,
)

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
    config_class = CLASSES[path.stem.split("_")[0].replace("adapt", "pretrain")]
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


@pytest.mark.parametrize("name", ["paper/align", "paper/align.yaml", "stages/configs/paper/align.yaml"])
def test_a_shipped_config_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(AlignConfig, "", ["--config", name, "--deepspeed="]).global_batch_size == 192
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "align.yaml").write_text("epochs: 3")
    assert parse(AlignConfig, "", ["--config", "paper/align.yaml"]).epochs == 3  # a file of the user's comes first


def test_a_shipped_config_that_is_nearly_named_is_suggested():
    with pytest.raises(InputError, match="no such configuration file; did you mean quickstart/align"):
        parse(AlignConfig, "", ["--config", "quickstart/alin"])


@pytest.mark.parametrize("name", ["quickstart/pipeline", "fast/pipeline"])
def test_the_shipped_pipelines_work_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = parse(PipelineConfig, "", ["--config", name])
    for stage in ("pretrain", "language", "align", "instruct", "evaluate"):
        parse(CLASSES[stage], "", ["--config", getattr(pipeline, stage)])


@dataclass
class Checked:
    rate: float = field(default=1e-3, metadata={"help": "how fast", "group": "optimisation", "range": Range(above=0)})
    weights: list[float] = field(default_factory=list, metadata={"range": Range(least=0)})
    source: str = field(default="", metadata={"help": "a folder", "flag": "data_root", "aliases": ["folder"]})
    kind: Literal["plain", "vicuna"] = "plain"
    bits: Literal[4, 16] = 16
    model: str = field(default="CLIP", metadata={"names": ("CLIP", "DiffCLIP")})
    fast: bool = True
    limit: int | None = None
    more: dict = field(default_factory=dict)


@pytest.mark.parametrize("typed", ["nan", "inf", "-inf", "-1", "-1e-3", "0"])
def test_a_number_out_of_its_range_is_refused_in_flags_and_yaml_alike(typed, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"rate: .{typed}" if typed[-1] in "nf" and typed[0] != "-" else f"rate: {typed}")
    with pytest.raises(InputError, match=rf"^setting `rate` {float(typed):g}: must be (finite and )?above 0$"):
        parse(Checked, "", ["--rate", typed])
    with pytest.raises(InputError, match=rf"c\.yaml: setting `rate` {float(typed):g}: must be (finite and )?above 0$"):
        parse(Checked, "", ["--config", str(file)])
    with pytest.raises(InputError, match="`weights` -1: must be at least 0"):
        parse(Checked, "", ["--weights", "1", "-1"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rat", "1"], r"unknown flag --rat: did you mean --rate\?"),
        (["--data-rot", "x"], r"unknown flag --data-rot: did you mean --data_root\?"),
        (["--kind", "vicunia"], r"--kind vicunia: did you mean vicuna\?"),
        (["--kind", "zzz"], "--kind zzz: must be one of plain, vicuna"),
        (["--bits", "8"], "--bits 8: must be one of 4, 16"),
        (["--model", "DifCLIP"], r"setting `model`: there is no DifCLIP: did you mean DiffCLIP\?"),
        (["--rate", "fast"], "--rate: invalid float value: 'fast'"),
        (["--fast", "maybe"], "--fast: 'maybe' is neither true nor false"),
        (["--more", "{x"], "--more: '{x': not valid JSON"),
        (["--more", "[]"], r"--more: '\[\]' is no mapping"),
        (["--rate"], "--rate: expected one argument"),
        (["stray"], "unknown argument stray"),
    ],
)
def test_what_is_nearly_right_is_suggested(argv, message):
    with pytest.raises(InputError, match=message):
        parse(Checked, "", argv)


def test_every_way_to_give_a_setting(tmp_path):
    assert parse(Checked, "", []) == Checked()
    assert parse(Checked, "", ["--no_fast"]) == parse(Checked, "", ["--no-fast"]) == Checked(fast=False)
    assert parse(Checked, "", ["--fast", "false"]) == parse(Checked, "", ["--fast=0"]) == Checked(fast=False)
    assert parse(Checked, "", ["--fast", "--bits", "4", "--limit", "3"]) == Checked(bits=4, limit=3)
    assert parse(Checked, "", ["--weights", "1", "0.5", '--more={"x": [1]}']).more == {"x": [1]}
    for launcher in ("--local_rank=0", "--local-rank=0"):
        assert parse(Checked, "", [launcher]) == Checked()
    for name in ("--data_root", "--data-root", "--source", "--folder"):
        assert parse(Checked, "", [name, "x"]) == Checked(source="x")
    for name in ("data_root", "source", "folder"):
        (tmp_path / "c.yaml").write_text(f"{name}: x\nlimit: null\nmore: {{y: 2}}")
        assert parse(Checked, "", ["--config", str(tmp_path / "c.yaml")]) == Checked(source="x", more={"y": 2})


def test_a_yaml_value_of_another_shape_is_named(tmp_path):
    for text, message in (("rate: [1, 2]", "`rate` is not a list but one value"), ("rate: {a: 1}", "not a dict")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(InputError, match=rf"c\.yaml: .*{message}"):
            parse(Checked, "", ["--config", str(tmp_path / "c.yaml")])


def test_help_is_grouped_and_ends_with_the_example(capsys):
    with pytest.raises(SystemExit):
        parse(
            Checked, "What it does.\n\n    diffclip checked --rate 1         --fast\n", ["--config=nowhere", "--help"]
        )
    shown = capsys.readouterr().out
    assert shown.startswith("usage: diffclip checked") and "\nWhat it does.\n" in shown
    assert shown.index("\noptimisation:") < shown.index("--rate X") < shown.index("\nsettings:")
    assert "how fast (above 0; default: 0.001)" in shown and "--data_root TEXT" in shown
    assert "--folder" not in shown and "--source" not in shown and "local_rank" not in shown
    assert shown.endswith("example:\n  diffclip checked --rate 1 \\\n      --fast\n")


@pytest.mark.parametrize("config_class", CLASSES.values())
def test_every_default_is_a_value_that_its_setting_may_have(config_class):
    parser = SettingsParser(config_class, "")
    for setting in dataclasses.fields(config_class):
        check_value(setting, parser.get_default(setting.name))
