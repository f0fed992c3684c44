"""The acceptance check for GPUs, as far as a CPU goes: each part runs, and says where it ran."""

import json

import pytest
from clips import shallow

from benchmarks import gpu
from diffclip import variants


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_runs_on_a_cpu_and_says_so(part, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "TINY", {"vision": (20, 32, 2, False)})
    monkeypatch.setattr(gpu, "NAN_LENGTHS", (64, 72))
    monkeypatch.setattr(gpu, "ARMS", (("CLIP", True, False), ("DiffCLIP", False, True)))
    for name in ("CLIP-tiny", "DiffCLIP-tiny"):
        monkeypatch.setitem(variants.MODELS, name, shallow(name, 1, 1))
    assert gpu.main(["--tiny", "--only", part, "--out", str(tmp_path / "gpu.json"), "--batch", "2"]) == 0
    assert "This ran on a CPU" in capsys.readouterr().out
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["device"] == "cpu" and {row["part"] for row in record["rows"]} == {"machine", part}
    assert not [row for row in record["rows"] if row["value"] == "FAILS"]


def test_a_part_that_fails_is_a_row_and_the_exit_code(monkeypatch, capsys):
    def broken(setting):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "PARTS", {"waits": broken})
    assert gpu.main(["--tiny", "--only", "waits"]) == 1
    assert "FAILS" in (out := capsys.readouterr().out) and "no such kernel" in out


@pytest.mark.slow
def test_another_result_than_eagers_fails(monkeypatch):
    monkeypatch.setattr(gpu, "distance", lambda found, wanted: 1.0)
    setting = gpu.setting_of(True, 1)._replace(shapes={"vision": (5, 32, 2, False)}, seconds=0.0)
    assert {row.value for row in gpu.forms(setting) if "fused" in row.what} == {"FAILS"}
