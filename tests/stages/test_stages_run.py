"""Run directories: what is skipped, what goes on, what is refused."""

import json
from dataclasses import dataclass, replace

import pytest

from diffclip.errors import InputError
from stages.run import COMPLETE, Run, digest, upstream_model


@dataclass
class Settings:
    output_dir: str
    seed: int = 0
    rate: float = 0.1


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("pairs")
    return file


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


def test_other_settings_or_other_input_are_refused_by_name(tmp_path, data):
    settings = Settings(str(tmp_path / "run"))
    Run("pretrain", settings, {"data": data}).finish({})
    with pytest.raises(InputError, match="another rate"):
        Run("pretrain", replace(settings, rate=0.2), {"data": data})
    data.write_text("other pairs")
    with pytest.raises(InputError, match="another data"):
        Run("pretrain", settings, {"data": data})
    with pytest.raises(InputError, match=r"nowhere: no such file or directory \(setting `data`\)"):
        Run("pretrain", settings, {"data": "nowhere"})


def test_resume_takes_the_newest_whole_checkpoint_and_drops_half_written_ones(tmp_path, data):
    run = Run("pretrain", Settings(str(tmp_path / "run")), {"data": data})
    assert run.resume_from is None
    for step, whole in ((9, True), (10, True), (11, False)):
        (run.path / f"checkpoint-{step}").mkdir()
        if whole:
            (run.path / f"checkpoint-{step}" / COMPLETE).touch()
    again = Run("pretrain", Settings(str(tmp_path / "run")), {"data": data})
    assert not again.finished and again.resume_from.endswith("checkpoint-10")
    assert not (run.path / "checkpoint-11").exists()


def test_digest_of_a_model_directory_is_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = digest(tmp_path)
    (tmp_path / "log.txt").write_text("more lines")
    assert digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"WEIGHTS")
    assert digest(tmp_path) != before
