"""Run directories: what is skipped, what goes on, what is refused."""

import json
import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffclip.base.errors import InputError
from diffclip.base.images import DECODING
from diffclip.base.schema import COMPLETE
from stages.provenance import digest, upstream_model
from stages.run import Run


@dataclass
class Settings:
    output_dir: str
    seed: int = 0
    rate: float = 0.1
    deepspeed: str = ""
    workers: int = field(default=8, metadata={"decides": False})
    data: str = ""


def paused(settings, inputs):
    """A run that came to a step and wrote no checkpoint yet."""
    run = Run("pretrain", settings, inputs)
    run.append_metrics({"step": 1, "loss": 1.0})
    return run


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("pairs")
    return file


def test_a_setting_that_took_one_value_once_is_the_list_of_it(tmp_path, data):
    @dataclass
    class Listed(Settings):
        members: list = field(default_factory=lambda: ["txt"])

    settings = Listed(str(tmp_path / "run"))
    run = paused(settings, {"data": data})
    file = run.path / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"settings": record["settings"] | {"members": "txt"}}))
    Run("pretrain", settings, {"data": data})
    with pytest.raises(InputError, match="members"):
        Run("pretrain", replace(settings, members=["json"]), {"data": data})


def test_finished_run_is_skipped_and_records_what_it_was(tmp_path, data):
    settings = Settings(str(tmp_path / "run"))
    run = Run("pretrain", settings, {"data": data})
    run.note(model="CLIP-tiny")
    (run.path / "checkpoint-5").mkdir()
    run.finish({"loss": 1.0})
    record = json.loads((run.path / "run.json").read_text())
    assert record["state"] == "finished" and record["inputs"]["data"]["digest"] == digest(data)
    assert record["versions"]["torch"] and json.loads((run.path / "metrics.json").read_text()) == {"loss": 1.0}
    assert not list(run.path.glob("checkpoint-*"))
    assert Run("pretrain", settings, {"data": data}).finished
    assert upstream_model(run.path) == "CLIP-tiny" and upstream_model(tmp_path) == tmp_path.name


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_model_is_read_by_whom_the_umask_lets_read_it(tmp_path, umask, mode):
    run = Run("pretrain", Settings(str(tmp_path / "run")), {})
    save_file({"x": torch.ones(1)}, run.path / "model.safetensors")
    before = os.umask(umask)
    try:
        run.finish({})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (run.path / "model.safetensors").stat().st_mode & 0o777 == mode


def test_a_run_that_began_by_other_rules_of_decoding_keeps_them(tmp_path, data):
    settings = Settings(str(tmp_path / "run"))
    paused(settings, {"data": data})
    assert Run("pretrain", settings, {"data": data}).record["decoding"] == DECODING
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["decoding"]  # as earlier versions wrote it
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    for _ in range(2):
        assert Run("pretrain", settings, {"data": data}).record["decoding"] == 1
        assert json.loads((tmp_path / "run" / "run.json").read_text())["decoding"] == 1


def test_other_settings_or_other_input_are_refused_by_name(tmp_path, data):
    settings = Settings(str(tmp_path / "run"))
    Run("pretrain", settings, {"data": data}).finish({})
    with pytest.raises(InputError, match=r"rate 0\.1 -> 0\.2"):
        Run("pretrain", replace(settings, rate=0.2), {"data": data})
    data.write_text("other pairs")
    with pytest.raises(InputError, match=r"data \(.*data\.txt [0-9a-f]{12} -> .*data\.txt [0-9a-f]{12}\)"):
        Run("pretrain", settings, {"data": data})
    with pytest.raises(InputError, match=r"nowhere: no such file or directory \(setting `data`\)"):
        Run("pretrain", settings, {"data": "nowhere"})


def test_a_paused_run_goes_on_with_what_decides_nothing_and_names_it(tmp_path, data, capsys):
    settings = Settings(str(tmp_path / "run"), data=str(data))
    paused(settings, {"data": data})
    os.makedirs(tmp_path / "scratch")
    moved = (tmp_path / "scratch" / "data.txt").resolve()
    moved.symlink_to(data)
    assert Run("pretrain", settings, {"data": data}) and "goes on" not in capsys.readouterr().out
    Run("pretrain", replace(settings, workers=2, data=str(moved)), {"data": moved})
    said = capsys.readouterr().out
    assert "goes on with workers 8 -> 2" in said and str(moved) in said and len(said.splitlines()) == 1
    Run("pretrain", replace(settings, workers=2, data=str(moved)), {"data": moved})  # now they are its own
    assert "goes on" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"rate 0\.1 -> 0\.2; give the old"):
        Run("pretrain", replace(settings, rate=0.2, workers=8), {"data": moved})


def test_inputs_are_compared_one_by_one_and_what_is_no_file_by_its_address(tmp_path, data):
    other = tmp_path / "other.txt"
    other.write_text("other pairs")
    both = {"data[0]": data, "data[1]": other}
    paused(Settings(str(tmp_path / "run"), data="*.txt"), both)
    for inputs in ({"data[0]": other, "data[1]": data}, {"data[0]": data}):
        with pytest.raises(InputError, match="data "):
            Run("pretrain", Settings(str(tmp_path / "run"), data="d*.txt"), inputs)
    Run("pretrain", Settings(str(tmp_path / "run"), data="../*.txt"), both)
    paused(Settings(str(tmp_path / "hub"), data="hf:a/b"), {"data": "hf:a/b"})
    with pytest.raises(InputError, match="hf:a/c"):
        Run("pretrain", Settings(str(tmp_path / "hub"), data="hf:a/c"), {"data": "hf:a/c"})


def test_a_deepspeed_file_counts_with_its_content(tmp_path):
    for name, stage in (("a.json", 2), ("b.json", 2), ("c.json", 3)):
        (tmp_path / name).write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    settings = [Settings(str(tmp_path / "run"), deepspeed=str(tmp_path / f"{name}.json")) for name in "abc"]
    paused(settings[0], {})
    Run("pretrain", settings[1], {})
    with pytest.raises(InputError, match=r"deepspeed \(.*b\.json .* -> .*c\.json "):
        Run("pretrain", settings[2], {})


def test_a_start_that_came_to_no_step_leaves_its_directory_free(tmp_path, data):
    settings = Settings(str(tmp_path / "run"))
    run = Run("pretrain", settings, {"data": data})
    run.log("12 bad samples")
    (run.path / "bad_samples.jsonl").write_text("{}\n")
    data.write_text("mended pairs")
    again = Run("pretrain", replace(settings, rate=0.2), {"data": data})
    assert again.resume_from is None and not (run.path / "bad_samples.jsonl").exists()
    again.append_metrics({"step": 1, "loss": 1.0})
    with pytest.raises(InputError, match=r"rate 0\.2 -> 0\.1"):
        Run("pretrain", settings, {"data": data})


def test_a_start_that_fails_leaves_nothing_but_the_names_of_bad_samples(tmp_path, data):
    settings = Settings(str(tmp_path / "runs" / "run"))
    for bad in (False, True):
        with pytest.raises(InputError), Run("pretrain", settings, {"data": data}) as run:
            run.log("a line")
            (run.path / "runs" / "today").mkdir(parents=True)
            if bad:
                (run.path / "bad_samples.jsonl").write_text("{}\n")
            raise InputError("no such model")
        left = [path.name for path in run.path.iterdir()] if run.path.exists() else []
        assert left == ["bad_samples.jsonl"] * bad
    with pytest.raises(KeyboardInterrupt), Run("pretrain", replace(settings, rate=3), {}) as run:
        run.append_metrics({"step": 1, "loss": 1.0})
        raise KeyboardInterrupt
    assert {"run.json", "config.yaml", "metrics.jsonl"} <= {path.name for path in run.path.iterdir()}


def test_lines_that_an_encoding_lacks_are_said_all_the_same(tmp_path, data, capsys):
    run = Run("pretrain", Settings(str(tmp_path / "run")), {"data": data})
    run.log("bad: \udce9t\u00e9.jpg\u2028")
    assert "\\udce9t\u00e9.jpg" in capsys.readouterr().out
    assert "\\udce9t\u00e9.jpg" in (run.path / "log.txt").read_text(encoding="utf-8")


def test_resume_takes_the_newest_whole_checkpoint_and_drops_half_written_ones(tmp_path, data):
    run = Run("pretrain", Settings(str(tmp_path / "run")), {"data": data})
    assert run.resume_from is None
    for step, whole in ((9, True), (10, True), (11, False)):
        (run.path / f"checkpoint-{step}").mkdir()
        if whole:
            (run.path / f"checkpoint-{step}" / COMPLETE).touch()
    again = Run("pretrain", Settings(str(tmp_path / "run")), {"data": data})
    assert not again.finished and again.checkpoint().endswith("checkpoint-10")
    assert not (run.path / "checkpoint-11").exists()


def test_a_large_file_is_read_once_and_again_when_it_was_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    file, read = tmp_path / "table.parquet", []
    file.write_bytes(bytes(17 << 20))
    first = digest(file)
    monkeypatch.setattr("stages.provenance.file_sha256", lambda path: read.append(path) or "ab" * 32)
    assert digest(file) == first and not read
    with open(file, "r+b") as f:
        f.write(b"x")  # its size stays
    assert digest(file) != first and len(read) == 1
    for kept in (tmp_path / "cache" / "sha256").iterdir():
        kept.write_text("damaged")
    assert digest(file) and len(read) == 2


def test_of_a_large_shard_little_is_read_and_another_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "shard.tar"
    content = np.random.default_rng(0).bytes(17 << 20)
    file.write_bytes(content)
    first = digest(file)
    monkeypatch.setattr("stages.provenance.file_sha256", None)  # would fail if called
    assert digest(file) == first
    file.write_bytes(content[::-1])
    assert digest(file) != first
    file.write_bytes(content + bytes(512))
    assert digest(file) != first


def test_digest_of_a_model_directory_is_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = digest(tmp_path)
    (tmp_path / "log.txt").write_text("more lines")
    assert digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert digest(tmp_path) != before
