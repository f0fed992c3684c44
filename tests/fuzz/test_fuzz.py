"""Hundreds of spoilt files, settings and arguments, none of which may end in a traceback; and that what may not happen
would be seen.
"""

import sys
import time
from pathlib import Path

import children
import pytest
from launch import ROOT, run_program

CASES = 2000  # of seed 0


@pytest.mark.slow
def test_whatever_is_read_ends_in_a_sentence_at_worst():
    ended = run_program([sys.executable, str(ROOT / "tests/fuzz"), "--cases", str(CASES)], check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    assert f"{CASES:,} cases" in ended.stdout


def hang():
    while True:
        pass


FAULTS = {
    "a traceback": (lambda folder: {}["x"], "KeyError"),
    "a hang": (lambda folder: hang(), "over 1 s of a CPU"),
    "waiting": (lambda folder: time.sleep(60), "over 2 s of waiting"),
    "memory": (lambda folder: bytearray(4 << 30), "MemoryError"),
    "a file outside": (lambda folder: (folder / "in" / "x").write_text(""), "open outside of the output folder"),
    "a folder outside": (lambda folder: (folder / "planted").mkdir(), "os.mkdir outside of the output folder"),
    "a program": (lambda folder: run_program(["true"], check=False), "subprocess.Popen"),
    "an exit code": (lambda folder: sys.exit(3), "exit code 3"),
    "a crash": (lambda folder: children.os._exit(7), "the process ended (exit code 7)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_and_the_next_case_is_tried(fault, tmp_path, monkeypatch):
    work, words = FAULTS[fault]

    def draw(rng, valid: Path, folder: Path, only: str) -> children.cases.Case:
        (folder / "out").mkdir(parents=True)
        (folder / "in").mkdir()
        fine = folder.name == "1"
        return children.cases.Case(fault, "told", lambda: (folder / "out/x").touch() if fine else work(folder) and None)

    monkeypatch.setattr(children.cases, "draw", draw)
    monkeypatch.setattr(children, "SECONDS", 1)
    monkeypatch.setattr(children, "WAITING", 2 if fault == "waiting" else 60)
    found = list(children.run(tmp_path, [0, 1], seed=0))
    assert words in found[0].what and "--seed 0 --case 0" in found[0].repeat
    assert found[1].how == "ended with None"


def test_a_seed_draws_the_same_case_again(tmp_path):
    source = tmp_path / "valid"
    for need in ("data/pope", "tables", "pairs", "rows"):
        (source / need).mkdir(parents=True)
    told = [
        children.cases.draw(children.Random("0:3"), source, tmp_path / name / "case", "settings").told
        for name in ("a", "b")
    ]
    assert told[0].replace("/a/", "/b/") == told[1]
