"""Settings: every number has a range, every name is known, and `trainer` overrules nothing."""

import subprocess
import sys
from dataclasses import fields
from typing import get_type_hints

import pytest
from transformers import TrainingArguments

from diffclip.base.errors import InputError
from diffclip.benchmarks.protocol import Settings
from stages import language
from stages.config import parse
from stages.settings import (
    DECIDED,
    INEXACT,
    AlignConfig,
    EvaluateConfig,
    InstructConfig,
    LanguageConfig,
    PipelineConfig,
    PretrainConfig,
    TrainingConfig,
    check,
)
from stages.shipped import shipped
from stages.training import check_trainer

CLASSES = (PretrainConfig, LanguageConfig, AlignConfig, InstructConfig, EvaluateConfig, PipelineConfig)
GROUPS = {"data", "model", "optimisation", "LoRA", "run", "dry run", "stages"}


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_setting_has_a_group_and_every_number_a_range_that_holds_its_default(config_class):
    kinds = get_type_hints(config_class)
    for setting in fields(config_class):
        assert setting.metadata["help"] and setting.metadata["group"] in GROUPS, setting.name
        assert ("range" in setting.metadata) == (kinds[setting.name] in (int, float, list[int], list[float])), (
            setting.name
        )
    check(config_class())


@pytest.mark.parametrize(
    "config_class, flag, message",
    [
        *((PretrainConfig, f"--learning_rate={rate}", "`learning_rate`") for rate in ("nan", "inf", "-1", "0")),
        (PretrainConfig, "--micro_batch_size=-1", "`micro_batch_size` -1: must be at least 0"),
        (PretrainConfig, "--num_workers=-1", "`num_workers`"),
        (PretrainConfig, "--epochs=0", "`epochs`"),
        (PretrainConfig, "--min_crop=nan", "`min_crop`"),
        (PretrainConfig, "--global_batch_size=0", "`global_batch_size`"),
        (PretrainConfig, "--seed=-1", "`seed`"),
        (PretrainConfig, "--train_weights=-0.5", "`train_weights`"),
        (PretrainConfig, "--save_total_limit=1", "`save_total_limit` 1: must be at least 2"),
        (PretrainConfig, "--model=DifCLIP-B16", "did you mean DiffCLIP-B-16?"),
        (LanguageConfig, "--heads=0", "`heads`"),
        (LanguageConfig, "--hidden_size=132", "each of the 4 heads would be 33 wide"),
        (LanguageConfig, "--vocabulary=3", "`vocabulary`"),
        (InstructConfig, "--lora_rank=-1", "`lora_rank`"),
        (InstructConfig, "--lora_dropout=1", "`lora_dropout` 1: must be at least 0 and below 1"),
        (AlignConfig, "--learns=projektor", "did you mean projector?"),
        (EvaluateConfig, "--batch_size=0", "`batch_size`"),
        (EvaluateConfig, "--linear_probe=fats", "linear_probe"),
        (PipelineConfig, "--ranks=0", "`ranks`"),
        (PipelineConfig, "--variants=DiffClip", "did you mean DiffCLIP?"),
        (PipelineConfig, "--size=tiney", "did you mean tiny?"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_by_name_for_flags_and_yaml(config_class, flag, message, tmp_path):
    key, value = flag[2:].split("=")
    listed = "list" in str(get_type_hints(config_class)[key])
    (tmp_path / "c.yaml").write_text(f"{key}: [{value}]" if listed else f"{key}: {value}")
    for arguments in ([flag], [f"--config={tmp_path / 'c.yaml'}"]):
        with pytest.raises(InputError) as refused:
            parse(config_class, "", arguments)
        assert message in str(refused.value)


def test_settings_need_no_heavy_library():
    code = (
        "import sys; sys.orig_argv[1:] = ['-m', 'stages.pretrain']; import stages.settings; "
        "assert not {'torch', 'transformers', 'open_clip'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what `trainer` may say


def test_trainer_may_not_overrule_any_named_setting():
    """Every stage refuses every key that one of its settings decides; all of them are keys of TrainingArguments."""
    known = {argument.name for argument in fields(TrainingArguments)}
    assert known >= {key for keys in DECIDED.values() for key in keys} | {*INEXACT}
    for config_class in CLASSES[:4]:
        own = {setting.name for setting in fields(config_class)}
        same_name = own & known - {"output_dir"}
        assert same_name <= {key for name in own for key in DECIDED.get(name, ())}
        for name in own & DECIDED.keys():
            for key in DECIDED[name]:
                with pytest.raises(InputError, match=f"{key} is what the setting `{name}` decides"):
                    check(config_class(trainer={key: 3}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("adam_beta2", "high"),
        ("adam_beta2", float("nan")),
        ("gradient_checkpointing", "yes"),
        ("dataloader_prefetch_factor", 1.5),
        ("optim", 3),
        ("torch_compile", 1),
    ],
)
def test_a_value_of_trainer_of_another_type_is_one_sentence(key, value):
    with pytest.raises(InputError, match=f"setting `trainer`: {key} {value!r} must be of the type"):
        check_trainer(TrainingConfig(trainer={key: value}))


def test_numbers_of_trainer_that_yaml_reads_as_text_are_numbers_and_near_misses_are_suggested():
    config = TrainingConfig(trainer={"adam_epsilon": "1e-8", "adam_beta2": 1, "fsdp_config": {"a": 1}})
    check_trainer(config)
    assert config.trainer["adam_epsilon"] == 1e-8
    with pytest.raises(InputError, match=r"adam_betta2 is no key .*did you mean adam_beta2\?"):
        check_trainer(TrainingConfig(trainer={"adam_betta2": 0.9}))


def test_language_has_no_dry_run_and_says_so(tmp_path):
    with pytest.raises(InputError, match="no dry run"):
        language.main(["--dry_run", "--text=x.jsonl", f"--output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_the_official_linear_probe_is_the_default_everywhere():
    assert EvaluateConfig().linear_probe == Settings().probe == "exact"
    for name, file in shipped().items():
        assert "linear_probe: fast" not in file.read_text(encoding="utf-8"), name


@pytest.mark.parametrize(
    ("config", "remedy"), [(LanguageConfig(packing=True), "set `packing` false"), (AlignConfig(), "leave it out")]
)
def test_smoothed_labels_would_be_learnt_a_place_too_early_and_are_refused(config, remedy):
    config.trainer = {"label_smoothing_factor": 0.1}
    with pytest.raises(InputError, match=f"label_smoothing_factor is not for a loss that the model computes; {remedy}"):
        check(config)
    check(LanguageConfig(trainer={"label_smoothing_factor": 0.1}))


@pytest.mark.parametrize("config", [LanguageConfig(packing=True), AlignConfig(packing=True)])
def test_noise_that_depends_on_the_length_of_a_row_is_refused_for_packed_rows(config):
    config.trainer = {"neftune_noise_alpha": 5}
    with pytest.raises(InputError, match="packing makes one row of many examples; set `packing` false"):
        check(config)
    config.packing = False
    check(config)
