"""The report from made-up run directories: numbers, gaps and their reasons, several seeds, hostile text."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from diffclip.base.errors import InputError
from stages.report.build import build_report, print_scores
from stages.report.cells import percent
from stages.report.data import gather
from stages.report.methods import jumps, methods
from stages.report.pope import pope_verdict
from stages.report.setup import checks, setup, stand_in
from stages.report.tables import comparison, evidence, headline, result

pytestmark = pytest.mark.usefixtures("coarse_figures")

SPLITS = ("random", "popular", "adversarial")
HOSTILE = '<script>alert(1)</script>|`$x$_"&amp;\u202e\x1b[31m'


def write_run(
    path: Path, stage: str, *, model="CLIP-tiny", seed=0, state="finished", metrics=None, config=None, **facts
):
    """One run directory as `stages.run.Run` writes it."""
    path.mkdir(parents=True, exist_ok=True)
    record = {
        "stage": stage,
        "state": state,
        "seed": seed,
        "command": f"python -m stages.{stage} --seed={seed}",
        "started": "2026-05-01T10:00:00+0000",
        "wall_seconds": 120.0,
        "inputs": {},
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
        "git": "abc1234",
        "hardware": "2 CPU cores (x86_64)",
        **facts,
    }
    if stage != "language":
        record["model"] = model
    (path / "run.json").write_text(json.dumps(record))
    (path / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(path), "seed": seed, **(config or {})}))
    if state == "finished":
        (path / "metrics.json").write_text(json.dumps(metrics or {}))
    if stage != "evaluate":
        lines = [{"step": s, "loss": 5 / s + 0.1 * seed, "learning_rate": 1e-3} for s in (1, 10, 20, 30)]
        if stage == "pretrain":
            lines = [line | {"logit_scale": 14 + line["step"] / 10} for line in lines]
            if "Diff" in model:
                layers = {f"lambda/{tower}.{i}": 0.8 - 0.01 * i for tower in ("vision", "text") for i in range(3)}
                lines = [line | layers for line in lines]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')


def scores(lift=0.0, pope=80.0, blind=70.0) -> dict[str, float]:
    """Flat metrics of an evaluate run, in percent."""
    found = {
        "zero_shot/shape/top1": 60 + lift,
        "zero_shot/color/top1": 70 + lift,
        "zero_shot/shape/top5": 90,
        "shift/v2/top1": 55 + lift,
        "shift/a/top1": 35 + lift,
        "shift/r/top1": 45 + lift,
        "shift/sketch/top1": 25 + lift,
        "linear_probe/shape/accuracy": 75 + lift,
        "linear_probe/shape/C": 0.316,
        "few_shot/shape/accuracy": 65 + lift,
        "few_shot/shape/ci95": 0.5,
        "mmvp/Color": 40 + lift,
        "mmvp/Count": 20 + lift,
        "mmvp/Orientation and Direction": 10 + lift,
        "mmvp/average": 30 + lift,
    }
    for direction in ("text_to_image", "image_to_text"):
        found |= {f"retrieval/{direction}/R@{k}": min(99, 20 + 4 * k + lift) for k in (1, 5, 10)}
    for i, split in enumerate(SPLITS):
        found |= {
            f"pope/{split}/{name}": pope - i for name in ("accuracy", "precision", "recall", "f1", "accuracy_strict")
        }
        found |= {f"pope/{split}/yes_rate": 48.0, f"pope/{split}/invalid_rate": 0.0, f"pope/{split}/questions": 3000}
        found |= {f"pope_shuffled/{split}/accuracy": 55.0, f"pope_blind/{split}/accuracy": blind}
        found |= {f"pope_always_yes/{split}/accuracy": 50.0}
    return found


def write_examples(path: Path, answer: str, question="Is there a red circle in the image?", image="examples/0.png"):
    (path / "examples").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 48), (200, 30, 30)).save(path / "examples" / "0.png")
    rows = [
        {
            "split": split,
            "question_id": i,
            "question": question,
            "label": "yes",
            "answer": answer,
            "answer_shuffled": "no",
            "image": image,
            "query": "a red circle",
            "heat": [[0, 40], [255, 90]],
        }
        for split in SPLITS
        for i in range(12)
    ]
    (path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_attention(path: Path, images: int = 3):
    """Maps and scores of objects as `stages.overlays` writes them."""
    (path / "attention").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(images):
        Image.new("RGB", (48, 48), (30, 60 * i, 200)).save(path / "attention" / f"{i:03d}.png")
        for query in ("a circle", "a star"):
            heat = [[0, 10, 20], [30, 255, 40], [0, 0, 5]]
            row = {"image": f"attention/{i:03d}.png", "file": f"{i}.png", "query": query, "heat": heat}
            row |= {"outline": [[0, 255], [0, 0]], "maps": dict.fromkeys(("A1", "A2", "difference"), heat)}
            rows.append(json.dumps(row) + "\n")
    (path / "attention.jsonl").write_text("".join(rows))


def write_arm(root: Path, model: str, seed=0, lift=0.0, **evaluated):
    """All stages of one model at one seed below `root`, with a stand-in language model beside them."""
    arm, own = root / f"seed{seed}" / model, {"model": model, "seed": seed}
    language = root / f"seed{seed}" / "language"
    write_run(language, "language", seed=seed, stand_in=True, parameters=400_000)
    write_run(
        arm / "pretrain",
        "pretrain",
        **own,
        parameters=9_000_000,
        pairs=20_000,
        steps=234,
        config={"init": "matched", "epochs": 3, "global_batch_size": 256},
        inputs={f"train_data[{i}]": {"path": f"scenes/{i:05d}.tar", "digest": f"d{seed}{i}"} for i in range(10)},
    )
    parts = {"vision_tower": 5_000_000, "projector": 16_000, "language_model": 400_000}
    for stage, learnt in (("align", ["projector"]), ("instruct", ["language_model", "projector"])):
        before = {part: f"{i:016x}" for i, part in enumerate(parts)}
        write_run(
            arm / stage,
            stage,
            **own,
            parameters=parts,
            learns=learnt,
            conversations=8000,
            steps=62,
            before=before,
            after={p: "f" * 16 if p in learnt else mark for p, mark in before.items()},
            config={"language_model": str(language), "global_batch_size": 128},
            inputs={"language_model": {"path": str(language), "digest": "1a"}},
        )
    inputs = {"clip": {"path": "c", "digest": "1"}, "mllm": {"path": "m", "digest": "2"}}
    write_run(arm / "evaluate", "evaluate", **own, inputs=inputs, metrics=scores(lift, **evaluated))
    write_examples(arm / "evaluate", "yes")
    write_attention(arm / "evaluate")
    return arm


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += f" {data}"

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def rows_of(table) -> dict[str, list[str]]:
    """{"heading / row": cells} of a table."""
    found, heading = {}, ""
    for row in table.rows:
        if len(row) == 1:
            heading = row[0]
        else:
            found[f"{heading} / {row[0]}"] = row[1:]
    return found


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, Path]:
    """(runs of two complete arms at one seed, their report)."""
    root = tmp_path_factory.mktemp("quickstart")
    write_arm(root / "runs", "CLIP-tiny")
    write_arm(root / "runs", "DiffCLIP-tiny", lift=1.26)
    build_report([root / "runs"], root / "report")
    return root / "runs", root / "report"


@pytest.mark.slow
def test_page_shows_every_score_and_difference(quickstart):
    runs, out = quickstart
    rows = rows_of(comparison(gather([runs])))
    assert rows["Zero-shot classification, top-1 / shape"][:3] == ["60.0", "61.3", "+1.3"]
    assert rows["Zero-shot classification, top-1 / average"][:3] == ["65.0", "66.3", "+1.3"]
    assert rows["Distribution shifts, zero-shot top-1 / average"][:3] == ["40.0", "41.3", "+1.3"]
    assert rows["POPE, accuracy / mean"][:3] == ["79.0", "79.0", "0.0"]
    page = Page(out / "index.html")
    for name, cells in rows.items():
        assert " ".join([name.split(" / ")[1], *cells]) in page.words


def test_links_to_runs_are_followed_once(quickstart, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(quickstart[0])
    (tmp_path / "above").symlink_to(tmp_path)
    assert len(gather([tmp_path]).runs) == len(gather([quickstart[0]]).runs)


def test_the_result_comes_first_with_pope_and_its_controls(quickstart):
    runs, out = quickstart
    arms = gather([runs])
    rows = rows_of(result(arms))
    assert [name.removeprefix(" / ") for name in rows] == [
        *("Linear probing", "Few-shot", "Image retrieval", "Text retrieval", "Zero-shot", "Zero-shot OOD", "POPE")
    ]
    assert rows[" / Zero-shot"][:3] == ["65.0", "66.3", "+1.3"] and rows[" / POPE"][-1] == "9,000"
    assert headline(arms).startswith("On the test items of one seed, no difference between DiffCLIP-tiny and CLIP-tiny")
    words = Page(out / "index.html").words
    order = [headline(arms), "uses the image", "not significant evidence", "At a glance", "What was run"]
    assert [*order] == sorted(order, key=words.rindex) and all(words.index(text) > 0 for text in order)
    paragraph = methods(arms)
    assert paragraph in words
    for fact in ("9,000,000 parameters", "20,000 pairs × 3 epochs", "a stand-in language model", "one seed (0)"):
        assert fact in paragraph


@pytest.mark.parametrize(
    ("lifts", "words"),
    [
        ((2.0, 2.2, 2.1), "Over the seeds, B is better on linear probing"),
        ((-2.0, -2.2, -2.1), "Over the seeds, B is worse on linear probing"),
        ((2.0, -2.0, 0.1), "Over the seeds, no difference between B and A is shown on any of 7 tasks."),
    ],
    ids=["better", "worse", "neither"],
)
def test_the_headline_says_what_the_intervals_say(tmp_path, lifts, words):
    for seed, lift in enumerate(lifts):
        write_run(tmp_path / f"a{seed}", "evaluate", model="A", seed=seed, metrics=scores())
        write_run(tmp_path / f"b{seed}", "evaluate", model="B", seed=seed, metrics=scores(lift))
    assert headline(gather([tmp_path])).startswith(words)


def test_the_jumps_of_a_curriculum_are_explained(tmp_path):
    write_run(tmp_path / "a", "instruct", config={"order": "file"})
    write_run(tmp_path / "b", "align", config={"order": "random"})
    write_run(tmp_path / "c", "language", config={"trainer": {"train_sampling_strategy": "sequential"}})
    write_run(tmp_path / "d", "pretrain", config={"trainer": None})
    arms = gather([tmp_path])
    told = [stage for stage in ("language", "pretrain", "align", "instruct") if "jumps" in jumps(arms, stage)]
    assert told == ["language", "instruct"]


def test_sections_stand_in_the_papers_order(quickstart):
    rows = list(rows_of(comparison(gather([quickstart[0]]))))
    headings = list(dict.fromkeys(row.split(",")[0] for row in rows))
    assert headings == [
        "Linear probe",
        "Few-shot",
        "Zero-shot classification",
        "Retrieval",
        "Distribution shifts",
        "MMVP-VLM",
        "POPE",
    ]
    order = [row.split(" / ")[1] for row in rows if row.startswith(("Distribution", "Retrieval, text"))]
    assert order == ["R@1", "R@5", "R@10", "v2", "a", "r", "sketch", "average"]
    assert [r.split(" / ")[1] for r in rows if r.startswith("POPE, acc")] == [*SPLITS, "mean"]


def test_markdown_and_csv_hold_the_comparison(quickstart):
    out = quickstart[1]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| shape | 60.0 | 61.3 | +1.3 |" in text and "![" in text and "(figures/figure1.svg)" in text
    assert "not significant evidence" in text and "stand-in" in text
    with open(out / "table.csv", encoding="utf-8", newline="") as f:
        rows = {row["metric"]: row for row in csv.DictReader(f)}
    row = rows["zero_shot/shape/top1"]
    assert (row["CLIP-tiny mean"], row["CLIP-tiny sd"], row["CLIP-tiny seeds"]) == ("60.0000", "", "1")
    assert row["DiffCLIP-tiny - CLIP-tiny mean"] == "1.2600"


def test_page_says_what_was_run(quickstart):
    words = Page(quickstart[1] / "index.html").words
    assert "stand-in" in words and "not significant evidence" in words
    assert "20,000 pairs × 3 epochs = 234 steps of 256" in words
    for fact in ("matched", "9,000,000", "2 CPU cores", "torch 2.14.1", "abc1234", "finished, 2.0 min", "10 files"):
        assert fact in words
    # per run: what learnt, what was frozen, fingerprints, digests of inputs, the command
    assert "projector learnt, 16,000 parameters, fingerprint 0000000000000001 → ffffffffffffffff" in words
    assert "vision_tower frozen, 5,000,000 parameters, fingerprint 0000000000000000 → 0000000000000000" in words
    assert "scenes/00000.tar (d00)" in words and "python -m stages.pretrain --seed=0" in words


def test_numbers_outside_the_tables_are_shown_as_written(quickstart):
    words = Page(quickstart[1] / "index.html").words
    assert "linear_probe/shape/C 0.316 0.316" in words
    assert "pope/random/accuracy_strict 80 80" in words


@pytest.mark.slow
def test_same_runs_give_the_same_files(quickstart, tmp_path):
    runs, out = quickstart
    build_report([runs, runs / "seed0" / "CLIP-tiny"], tmp_path)  # given twice, counted once
    for file in [p for p in out.rglob("*") if p.suffix in (".html", ".md", ".csv", ".svg")]:
        assert file.read_bytes() == (tmp_path / file.relative_to(out)).read_bytes(), file.name
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_report_that_cannot_be_written_leaves_the_one_that_is_there(quickstart, tmp_path, monkeypatch):
    out = tmp_path / "report"
    shutil.copytree(quickstart[1], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_arm(tmp_path / "more", "CLIP-tiny", lift=5)
    monkeypatch.setattr("stages.report.build.html_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_report([tmp_path / "more"], out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert {path.name for path in out.iterdir()} == {path.relative_to(out).parts[0] for path in before}


def test_several_seeds_give_mean_and_sd_and_paired_differences(tmp_path):
    clip, diff = [60.0, 64.0, 62.5], [61.0, 66.5, 62.0]
    for seed, (a, b) in enumerate(zip(clip, diff)):
        for model, value in (("CLIP-tiny", a), ("DiffCLIP-tiny", b)):
            write_run(
                tmp_path / f"{model}{seed}", "evaluate", model=model, seed=seed, metrics={"zero_shot/x/top1": value}
            )
    cells = rows_of(comparison(gather([tmp_path])))["Zero-shot classification, top-1 / x"]

    def expected(values, sign=""):
        mean = sum(values) / 3
        sd = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        return f"{mean:{sign}.1f} ± {sd:.1f}"

    differences = [b - a for a, b in zip(clip, diff)]
    assert cells[:3] == [expected(clip), expected(diff), expected(differences, "+")]
    assert evidence(gather([tmp_path])).startswith("Scores are mean ± sample standard deviation over seeds")


def test_differences_use_only_common_seeds(tmp_path):
    for model, seed, value in (("CLIP-tiny", 0, 50), ("CLIP-tiny", 1, 90), ("DiffCLIP-tiny", 0, 52)):
        write_run(tmp_path / f"{model}{seed}", "evaluate", model=model, seed=seed, metrics={"mmvp/average": value})
    arms = gather([tmp_path])
    assert rows_of(comparison(arms))["MMVP-VLM, pairs right / average"] == [
        "70.0 ± 28.3",
        "52.0",
        "+2.0",
        "– [16]",
        "–",
        "–",
        "–",
    ]
    assert "With one seed" in evidence(arms)
    assert (False, "The arms have other seeds: CLIP-tiny: 0, 1; DiffCLIP-tiny: 0.") in checks(arms)


def missing(tmp_path: Path, row: str) -> tuple[str, str]:
    """(cell of model B, the note it points at) in a row that model A has."""
    write_run(tmp_path / "a", "evaluate", model="A", metrics=scores())
    table = comparison(gather([tmp_path]))
    cell = rows_of(table)[row][1]
    number = re.fullmatch(r"– \[(\d+)\]", cell)
    assert number, cell
    return cell, table.notes[int(number[1]) - 1]


ZERO_SHOT = "Zero-shot classification, top-1 / shape"


def test_a_missing_cell_says_that_nothing_was_evaluated(tmp_path):
    write_run(tmp_path / "b", "pretrain", model="B")
    _, note = missing(tmp_path, ZERO_SHOT)
    assert note == "no evaluate run of B, seed 0, was found; finished there: pretrain"


def test_a_missing_cell_says_that_the_run_is_not_finished(tmp_path):
    write_run(tmp_path / "b", "evaluate", model="B", state="running")
    assert missing(tmp_path, ZERO_SHOT)[1] == "evaluate of B, seed 0, has not finished (state: running)"


def test_a_missing_cell_repeats_why_the_benchmark_was_skipped(tmp_path):
    write_run(tmp_path / "b", "evaluate", model="B", metrics={"mmvp/average": 30})
    skipped = {"skipped": {"few_shot/shape": "class 'star' has 3 images"}}
    (tmp_path / "b" / "clip_benchmarks.json").write_text(json.dumps(skipped))
    note = missing(tmp_path, "Few-shot, accuracy / shape")[1]
    assert note == "evaluate of B, seed 0: few_shot/shape was left out: class 'star' has 3 images"


def test_a_missing_cell_names_the_half_that_was_not_given(tmp_path):
    inputs = {"clip": {"path": "c", "digest": "1"}}
    write_run(tmp_path / "b", "evaluate", model="B", inputs=inputs, metrics={"zero_shot/shape/top1": 50})
    note = missing(tmp_path, "POPE, accuracy / random")[1]
    assert note == "evaluate of B, seed 0, was started without a multimodal model (setting `mllm`)"


@pytest.mark.parametrize("value", [float("nan"), -3.0, 250.0, None, "many", True, [1]])
def test_a_value_that_is_no_percentage_is_not_shown_as_one(tmp_path, value):
    write_run(tmp_path / "b", "evaluate", model="B", metrics={"zero_shot/shape/top1": value, "mmvp/average": 30})
    assert missing(tmp_path, ZERO_SHOT)[1].endswith("which is no percentage")


def test_the_two_halves_of_an_evaluation_may_be_two_runs(tmp_path):
    write_run(tmp_path / "clip", "evaluate", metrics={"zero_shot/shape/top1": 61.0})
    write_run(tmp_path / "pope", "evaluate", metrics={f"pope/{s}/accuracy": 80.0 for s in SPLITS})
    rows = rows_of(comparison(gather([tmp_path])))
    assert rows[ZERO_SHOT] == ["61.0", "–"] and rows["POPE, accuracy / mean"] == ["80.0", "–"]


def test_a_newer_run_of_the_same_stage_wins_and_the_older_is_named(tmp_path):
    for name, started, steps in (("new", "2026-05-02", 20), ("old", "2026-05-01", 10)):
        write_run(tmp_path / name, "pretrain", started=started, steps=steps)
    arms = gather([tmp_path])
    assert [run.path.name for run in arms.latest("pretrain", "CLIP-tiny")] == ["new"]
    assert arms.problems == [f"{tmp_path}/old: an older run of pretrain of CLIP-tiny, seed 0; only the newest is shown"]


@pytest.mark.slow
def test_one_model_that_is_still_running(tmp_path):
    write_run(tmp_path / "runs" / "pretrain", "pretrain", model="DiffCLIP-tiny", state="running", steps=100)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text('{"stage": "ali')
    (tmp_path / "runs" / "list").mkdir()
    (tmp_path / "runs" / "list" / "run.json").write_text("[1, 2]")
    page = Page(build_report([tmp_path / "runs"], tmp_path / "report"))
    assert "There is one model, so nothing is compared" in page.words
    assert "0 of 1 finished; running" in page.words
    assert "no evaluate run of DiffCLIP-tiny, seed 0, was found; no stage has finished there" in page.words
    assert "broken/run.json: cannot be read" in page.words
    assert (tmp_path / "report" / "figures" / "loss-pretrain.svg").exists()


def test_only_the_language_model_so_far(tmp_path):
    write_run(tmp_path / "language", "language", stand_in=True, parameters=10)
    assert "(no model yet)" in Page(build_report([tmp_path], tmp_path / "report")).words


@pytest.mark.parametrize("record", [{}, {"stage": None, "inputs": [1], "versions": "x", "learns": 3, "before": []}])
def test_a_run_with_nothing_useful_in_it_does_not_stop_the_report(tmp_path, record):
    (tmp_path / "runs" / "odd").mkdir(parents=True)
    (tmp_path / "runs" / "odd" / "run.json").write_text(json.dumps(record))
    (tmp_path / "runs" / "odd" / "config.yaml").write_text("a: [")
    (tmp_path / "runs" / "odd" / "metrics.json").write_text("[]")
    assert build_report([tmp_path / "runs"], tmp_path / "report").is_file()


@pytest.mark.slow
def test_damaged_values_do_not_stop_the_report(tmp_path):
    arm = write_arm(tmp_path / "runs", "DiffCLIP-tiny")
    odd = {"learns": 3.5, "parameters": {"a": None}, "before": {"a": 1}, "after": {"a": 1}, "wall_seconds": 1e308}
    write_run(arm / "align", "align", model="DiffCLIP-tiny", steps=10**30, **odd)
    curve = [
        {"step": 1, "loss": 1e308, "lambda/vision": 2},
        {"step": 2, "loss": "x", "lambda/vision.x": 1},
        {"step": []},
    ]
    (arm / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    metrics = scores() | {f"pope/{split}/questions": -5 for split in SPLITS} | {"mmvp/Color": 10**400}
    (arm / "evaluate" / "metrics.json").write_text(json.dumps(metrics))
    (arm / "evaluate" / "attention.jsonl").write_text('{"heat": [[300]], "image": 5}\n[1]\n{"heat": [[1, 2], [3]]}\n')
    (arm / "evaluate" / "localisation.json").write_text('{"pictures": 3, "scores": [1]}')
    words = Page(build_report([tmp_path / "runs"], tmp_path / "report")).words
    assert (
        "Figure 2. Attention maps for queries Not drawn" in words
        and "Lambda by layer in pretraining Not drawn" in words
    )


def test_runs_named_by_inputs_are_found(tmp_path):
    arm = write_arm(tmp_path / "runs", "CLIP-tiny")
    arms = gather([arm])  # the language model lies beside the arm, not below it
    assert {run.stage for run in arms.runs} == {"language", "pretrain", "align", "instruct", "evaluate"}
    assert stand_in(arms)


def test_the_real_language_model_is_not_called_a_stand_in(tmp_path):
    write_run(tmp_path / "align", "align", config={"language_model": "Qwen/Qwen2.5-0.5B-Instruct"})
    arms = gather([tmp_path])
    assert not stand_in(arms)
    assert ["language model", "Qwen/Qwen2.5-0.5B-Instruct"] in setup(arms).rows


def test_unequal_arms_are_told(tmp_path):
    for model, rate, digest, hardware in (("CLIP-tiny", 1e-3, "aa", "cpu"), ("DiffCLIP-tiny", 2e-3, "bb", "gpu")):
        write_run(
            tmp_path / model,
            "pretrain",
            model=model,
            config={"learning_rate": rate, "train_data": [model], "epochs": 3},
            inputs={"train_data[0]": {"path": "x", "digest": digest}},
            hardware=hardware,
        )
    failed = [text for ok, text in checks(gather([tmp_path])) if ok is False]
    assert failed == [
        "Settings differ between runs: pretrain learning_rate (CLIP-tiny: 0.001, DiffCLIP-tiny: 0.002).",
        "At the same seed the arms read other data: pretrain train_data.",
        "The arms differ in hardware (pretrain): see the details of each run.",
    ]


@pytest.mark.parametrize(("learns", "after"), [(["projector"], "a"), ([], "b")])
def test_fingerprints_that_contradict_what_learnt_are_told(tmp_path, learns, after):
    write_run(tmp_path / "align", "align", learns=learns, before={"projector": "a"}, after={"projector": after})
    assert (False, "Fingerprints contradict what learnt: align of CLIP-tiny, seed 0: projector.") in checks(
        gather([tmp_path])
    )


@pytest.mark.parametrize(
    ("change", "uses", "words"),
    [
        ({}, True, "uses the image"),
        ({"pope_blind/{}/accuracy": 79.5}, False, "does not use the image"),
        ({"pope/{}/accuracy": 70.0}, False, "does not use the image"),  # equal to its control
        ({"pope_shuffled/{}/accuracy": 80.0}, False, "does not use the image"),
        ({"pope/{}/questions": 30}, None, "within sampling noise"),
        ({"pope_blind/{}/accuracy": None}, None, "no blind control"),
        ({"pope/{}/accuracy": None}, None, "no POPE numbers"),
    ],
)
def test_pope_verdict(tmp_path, change, uses, words):
    metrics = scores(pope=80.0, blind=70.0)
    for pattern, value in change.items():
        metrics |= {pattern.format(split): value for split in SPLITS}
    write_run(tmp_path / "evaluate", "evaluate", metrics=metrics)
    verdict, sentence = pope_verdict(gather([tmp_path]), "CLIP-tiny")
    assert verdict is uses and words in sentence


@pytest.mark.parametrize(
    ("values", "text"), [([78.14], "78.1"), ([-0.04], "0.0"), ([-1.26], "−1.3"), ([1.0, 2.0], "1.5 ± 0.7")]
)
def test_percent(values, text):
    assert percent(values) == text


def test_user_errors_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such run directory"):
        build_report([tmp_path / "nowhere"], tmp_path / "report")
    with pytest.raises(InputError, match=r"no run\.json below"):
        build_report([tmp_path], tmp_path / "report")
    write_run(tmp_path / "run", "pretrain")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file"):
        build_report([tmp_path], tmp_path / "file")


@pytest.mark.parametrize("models", [2, 4])
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_console_says_what_may_be_said_first_and_fits_80_columns(tmp_path, capsys, monkeypatch, models, seeds):
    names = ["CLIP-tiny", "DiffCLIP-tiny", "DiffCLIP-star-tiny", "DiffCLIP-dagger-tiny"][:models]
    for seed in range(seeds):
        for number, model in enumerate(names):
            metrics = scores(lift=-1.26 * number * (1 + seed)) | {"mmvp/Positional and Relational Context": 13.3}
            write_run(tmp_path / model / str(seed), "evaluate", model=model, seed=seed, metrics=metrics)
    monkeypatch.setenv("COLUMNS", "300")  # what it takes by itself
    print_scores(gather([tmp_path]))
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("┏"))
    assert all("uses the image" in line for line in lines[:models]) and "seed" in lines[models] and start > models
    table = [line for line in lines if line and line[0] in "┏┃│└├┡"]
    assert len(table) > 30 and max(map(len, table)) <= 80
    row = next(line for line in table if line.startswith("│ color")).replace("│", " ").split()
    if seeds == 1:
        assert row[:3] == ["color", "70.0", "68.7"] and (row[3] == "−1.3" if models == 2 else len(row) == 1 + models)
    else:
        assert row[1:7] == ["70.0", "±", "0.0", "68.1", "±", "0.9"]


@pytest.mark.slow
def test_command_prints_table_and_path_without_torch(quickstart, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    runs = [str(quickstart[0] / "seed0" / model / "evaluate") for model in ("CLIP-tiny", "DiffCLIP-tiny")]
    command = [sys.executable, "-m", "stages.report", *runs, "--output_dir", str(tmp_path / "report")]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "100"}
    done = subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True, text=True)
    assert "Linear probe" in done.stdout and "+1.3" in done.stdout and "uses the image" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Report: {tmp_path}/report/index.html"
