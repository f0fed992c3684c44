"""`python -m mllm.data`: every fault is named, the numbers are those of the rows; many rows open fast and small."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from launch import ROOT, call

from mllm.data.report import describe, kind
from mllm.data.rows import load_rows


def row(n, *values, image=None):
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": str(n), "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def folder(tmp_path, picture):
    picture(1).save(tmp_path / "a.png")
    picture(2).save(tmp_path / "b.png")
    return tmp_path


def test_check_names_every_fault_and_ends_with_2(folder, capsys):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    rows = [
        row(0, "<image>\nIs it?", "Yes", image="a.png"),
        row(1, "<image>\nIs it?", "Yes", image="absent.png"),
        row(2, "<image>\nIs it?", "Yes", image="broken.jpg"),
        row(3, "Is it?", "Yes", "Really?"),
        row(4, "Is it?", "Yes", image="a.png"),
        row(5, "Is it?", " "),
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    call("mllm.data", "check", str(folder / "rows.json"), f"--image_root={folder}", code=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "6 rows, 2 images: 5 faults"
    for number, words in [
        (1, "absent.png is not under"),
        (2, "broken.jpg cannot be read as an image"),
        (3, "a question has no answer"),
        (4, "has 1 images, but its conversation shows 0"),
        (5, "an answer is empty"),
    ]:
        assert sum(f"row {number} " in line and words in line for line in lines) == 1, words
    assert not any("row 0 " in line for line in lines)
    (folder / "good.json").write_text(json.dumps(rows[:1]))
    call("mllm.data", "check", str(folder / "good.json"), f"--image_root={folder}")
    assert capsys.readouterr().out.strip().endswith("1 rows, 1 images: no fault found")


def test_check_tells_machines_the_same(folder, assembled, capsys):
    assembled.save(folder / "model")
    rows = [
        row(0, "<image>\nIs it?", "Yes", image="a.png"),
        row(1, "<image>\nIs it?", "Yes", image="absent.png"),
        row(2, "Is it red? " * 300, "Yes"),
        row(3, "Is it red? " * 10, "Yes " * 200),
        row(4, "<image>\nIs it?", "Yes", image="a.png"),
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    options = [str(folder / "rows.json"), f"--image_root={folder}", f"--model={folder / 'model'}", "--max_length=200"]
    call("mllm.data", "check", *options, "--json", code=2)
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["readable"], found["images"]) == (5, 3, 1)
    assert [fault["key"].rpartition("id ")[2] for fault in found["faults"]] == ["1)", "2)"]
    assert "absent.png is not under" in found["faults"][0]["reason"]
    assert found["faults"][1]["reason"] == "no supervised token in the first 200; raise max_length"
    assert found["tokens"]["largest"] > found["max_length"] == 200 and found["longer_than_max_length"] == 2
    call("mllm.data", "check", *options, code=2)
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [f"{fault['key']}: {fault['reason']}" for fault in found["faults"]]
    assert told[2:] == [
        "2 rows are longer than max_length 200, which cuts their ends off",
        "5 rows, 1 images: 2 faults",
    ]


def test_stats_count_answers_and_tokens(folder, assembled, capsys):
    assembled.save(folder / "model")
    rows = [
        row(0, "<image>\nIs it red?", "Yes", "And blue?", "No, it is not.", image="a.png"),
        row(1, "<image>\nHow many?", "3", image="b.png"),
        row(2, "What colour?", "red"),
        row(3, "Describe it.", "a small blue circle left of the green star"),
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = [f"--image_root={folder}", f"--model={folder / 'model'}", f"--out={folder / 'out'}", "--max_length=30"]
    call("mllm.data", "stats", str(folder / "rows.jsonl"), *options)
    found = json.loads((folder / "out/stats.json").read_text())
    assert found["rows"] == 4 and found["answers"] == 5
    assert found["rows with no image, one, more"] == [2, 2, 0]
    assert found["kinds of answers, %"] == {"yes": 20.0, "no": 20.0, "number": 20.0, "one word": 20.0, "long": 20.0}
    assert found["yes among yes and no, %"] == 50.0
    assert found["rows longer than 30"] >= 2 and 0 < found["supervised tokens, %"] < 50
    assert (folder / "out/lengths.png").stat().st_size > 1000 and "tokens a row" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer, wanted",
    [("Yes.", "yes"), ("no, not here", "no"), ("Nobody", "one word"), ("12", "number"), ("two red cups", "short")],
)
def test_kinds_of_answers(answer, wanted):
    assert kind(answer) == wanted


def test_parquet_and_saved_datasets_give_the_rows_of_the_json(folder):
    from datasets import Dataset

    rows = [row(n, "<image>\nIs it?", ("Yes", "No")[n % 2], image="a.png") for n in range(5)]
    (folder / "rows.json").write_text(json.dumps(rows))
    table = Dataset.from_list(rows)
    table.to_parquet(str(folder / "rows.parquet"))
    table.save_to_disk(str(folder / "saved"))
    wanted = [(r.conversation, r.images) for r in load_rows([folder / "rows.json"], folder)]
    for other in ("rows.parquet", "saved"):
        assert [(r.conversation, r.images) for r in load_rows([folder / other], folder)] == wanted
    assert describe(load_rows([folder / "saved"], folder))["yes among yes and no, %"] == 60.0


def test_a_changed_file_is_read_anew(folder):
    (folder / "rows.json").write_text(json.dumps([row(0, "Is it?", "Yes")]))
    assert load_rows([folder / "rows.json"], folder)[0].conversation[1]["value"] == "Yes"
    (folder / "rows.json").write_text(json.dumps([row(0, "Is it?", "Never")]))
    assert load_rows([folder / "rows.json"], folder)[0].conversation[1]["value"] == "Never"


@pytest.mark.slow
def test_many_rows_cost_little_memory_once_they_were_checked(folder):
    """40,000 rows: a process that opens them grows by less than 40 MB (they are 27 MB of text)."""
    rng = np.random.default_rng(0)
    words = [" ".join(map(str, rng.integers(0, 10**6, 40))) for _ in range(100)]
    with open(folder / "rows.jsonl", "w") as file:
        for n in range(40_000):
            file.write(json.dumps(row(n, f"<image>\n{words[n % 100]}", words[(n * 7) % 100], image="a.png")) + "\n")
    rows = load_rows([folder / "rows.jsonl"], folder)
    assert len(rows) == 40_000 and rows[39_999].key.endswith("row 39999 (id 39999)")
    program = (
        "import datasets, psutil, sys; from mllm.data.rows import load_rows; p = psutil.Process();"
        "before = p.memory_full_info().uss; rows = load_rows([sys.argv[1]], sys.argv[2]);"
        "print(len(rows), rows[5].key, p.memory_full_info().uss - before)"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(folder / "rows.jsonl"), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    count, *_, grown = told.stdout.split()
    assert int(count) == 40_000 and int(grown) < 40e6, told.stderr[-500:]
