"""The report from made-up run directories: numbers, gaps and their reasons, several seeds, hostile text."""

import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from diffclip.errors import InputError
from stages.report import build_report, main
from stages.report_data import gather
from stages.report_tables import comparison, percent, pope_verdict

SPLITS = ("random", "popular", "adversarial")


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
        }
        for split in SPLITS
        for i in range(12)
    ]
    (path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
            self.text += data

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


def test_page_shows_every_score_and_difference(quickstart):
    runs, out = quickstart
    rows = rows_of(comparison(gather([runs])))
    assert rows["Zero-shot classification, top-1 / shape"] == ["60.0", "61.3", "+1.3"]
    assert rows["Zero-shot classification, top-1 / average"] == ["65.0", "66.3", "+1.3"]
    assert rows["POPE, accuracy / mean"] == ["79.0", "79.0", "0.0"]
    page = Page(out / "index.html")
    for name, cells in rows.items():
        assert " ".join([name.split(" / ")[1], *cells]) in page.words
