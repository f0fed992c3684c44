"""What is tried: a case is a command over spoilt files, over arguments in each other's place, or over odd settings."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import kept
import spoil
import yaml

from stages import settings
from stages.cli import call
from stages.config import parse, write_yaml

CONFIGS = [
    value
    for value in vars(settings).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__name__.endswith("Config")
]


class Target(NamedTuple):
    """A command and what it reads: `needs`, copied beside each other, of which files that match `spoilt` change.

    In `argv` {x} is the copy of x, {out} a folder to write into. `weight`: how often it is drawn; slow ones less.
    `own`: it writes where it reads. `kept`, in place of `argv`: is called twice, and between the calls a file of the
    cache is spoilt.
    """

    argv: str
    needs: str
    spoilt: str = "**/*"
    weight: int = 10
    own: bool = False
    kept: Callable[[Path], Any] | None = None


ROWS, PAIRS = "--image_root {rows/images}", "--pairs"
ASK = "--max_new_tokens 3 --device cpu"
GO_ON = "pretrain --config {runs/stopped/config.yaml} --output_dir {runs/stopped}"
CACHE = os.environ.get("DIFFCLIP_CACHE", "")
TARGETS = {
    "pairs in a tar": Target("check {data/pretrain} --pairs --caption_member json", "data/pretrain", weight=30),
    **{
        f"pairs in {name}": Target(f"check {{pairs/{name}}} --pairs", "pairs", name, 16)
        for name in ("pairs.json", "pairs.jsonl", "pairs.csv", "pairs.tsv", "results.csv", "results.token")
    },
    "pairs in parquet": Target("check {pairs/pairs.parquet} --pairs", "pairs", "pairs.parquet", 24),
    "pairs that datasets saved": Target("check {pairs/saved} --pairs", "pairs", "saved/*", 16),
    "pairs in a folder": Target("check {pairs/images} --pairs", "pairs/images"),
    "images of pairs": Target("check {pairs/pairs.csv} --pairs", "pairs", "images/*.jpg"),
    **{
        f"rows in {name}": Target(f"check {{rows/{name}}} --image_root {{rows/images}}", "rows", name, 20)
        for name in ("llava.json", "llava.jsonl", "messages.jsonl", "llava.parquet")
    },
    "images of rows": Target("check {rows/llava.json} " + ROWS, "rows", "images/*"),
    "statistics of rows": Target("stats {rows/llava.jsonl} --image_root {rows/images} --output_dir {out}", "rows", "*"),
    "POPE": Target("pope check {data/pope} --image_root {data/pope/images}", "data/pope", weight=20),
    "POPE in parquet": Target("pope check {tables/pope.parquet}", "tables", "pope.parquet", 20),
    "answers to POPE": Target("pope score {data/pope} {answers.jsonl}", "data/pope answers.jsonl", "answers.jsonl", 20),
    "instances of CHAIR": Target(
        "pope chair --answers {captions.jsonl} --instances {data/segmentation/instances.json} --output_dir {out}",
        "data/segmentation captions.jsonl",
        "*.json*",
        20,
    ),
    "benchmarks": Target(
        "benchmark --model {models/clip} --data_root {data} --output_dir {out} --episodes 2 --probe fast",
        "models/clip data/retrieval data/classification/color data/mmvp",
        "data/**/*",
        6,
    ),
    "labelled tables": Target(
        "benchmark --model {models/clip} --data_root {tables} --output_dir {out} --protocols zero_shot",
        "models/clip tables/classification",
        "tables/**/*",
        6,
    ),
    "masks": Target(
        "localise --instances {data/segmentation/instances.json} --images {data/segmentation/images} "
        "--models {models/clip} --out {out}/masks.json",
        "data/segmentation models/clip",
        "data/**/*",
        6,
    ),
    "a dual encoder": Target("convert {models/clip} {out}/model", "models/clip", weight=24),
    "an official checkpoint": Target("convert {models/official.pt} {out}/model", "models/official.pt", weight=16),
    "a multimodal model": Target("chat {models/mllm} What? " + ASK, "models/mllm", weight=16),
    "questions in a file": Target(
        "chat {models/mllm} --batch {questions.jsonl} --out {out}/a.jsonl --image_root {rows/images} " + ASK,
        "models/mllm questions.jsonl rows/images",
        "questions.jsonl",
        6,
    ),
    "image of a question": Target(
        "chat {models/mllm} What? --image {rows/images/0.jpg} " + ASK, "models/mllm rows/images", "images/0.jpg", 3
    ),
    "runs to verify": Target("verify {runs/instruct} {runs/pretrain}", "runs/instruct runs/pretrain", weight=20),
    "a run to publish": Target("publish {runs/pretrain} --dry_run", "runs/pretrain", weight=10),
    "runs to report": Target("report {runs} --output_dir {out}/report", "runs/evaluate runs/pretrain", weight=3),
    "a finished run": Target(
        "pretrain --config {runs/pretrain/config.yaml} --output_dir {runs/pretrain}",
        "runs/pretrain",
        weight=6,
        own=True,
    ),
    "a run to go on with": Target(GO_ON, "runs/stopped", weight=5, own=True),
    "a checkpoint": Target(GO_ON, "runs/stopped", "checkpoint-1/**/*", 6, own=True),
    "a list of addresses": Target("data pairs {tables/urls.parquet} --dry_run", "tables", "urls.*", 6),
    "what is kept of rows": Target("", "rows models/mllm", weight=16, kept=kept.of_rows),
    "what is kept of files": Target("", "rows data/pretrain", weight=8, kept=kept.of_files),
}


class Case(NamedTuple):
    """What a seed decides: a name, what was done, and what to call."""

    name: str
    told: str
    work: Callable[[], Any]


def draw(rng: Random, valid: Path, folder: Path, only: str = "") -> Case:
    """One case of a kind, its files below `folder`; `valid`: what `samples.make` wrote."""
    kinds = {"files": 65, "settings": 25, "swapped": 10}
    os.environ["DIFFCLIP_CACHE"] = CACHE
    kind = only if only in kinds else "files" if only else rng.choices([*kinds], [*kinds.values()])[0]
    (folder / "out").mkdir(parents=True)
    if kind == "settings":
        return _settings(rng, folder)
    if kind == "swapped":
        return _swapped(rng, valid, folder)
    name = only if only in TARGETS else rng.choices([*TARGETS], [t.weight for t in TARGETS.values()])[0]
    target, argv = TARGETS[name], laid_out(name, valid, folder)
    where = folder / "in"
    before: Any = None
    if target.kept:
        where = folder / "out" / "cache"
        os.environ["DIFFCLIP_CACHE"] = str(where)
        before = target.kept(folder / "in")
    files = sorted(path for path in where.rglob("*") if path.is_file() and _fits(path, target, where))
    told = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        file = rng.choice(files)
        if file.is_file() and not file.is_symlink():
            told.append(spoil.spoil(file, rng, folder / "planted"))
    return Case(name, f"{'; '.join(told)} | {' '.join(argv)}", lambda: done(target, argv, folder, before))


def done(target: Target, argv: list[str], folder: Path, before: Any = None) -> Any:
    """Do what a target is about; where something is kept, its answers are to be those of `before`, if that is given."""
    if not target.kept:
        return call(argv)
    after = target.kept(folder / "in")
    if before is not None and repr(after) != repr(before):
        raise AssertionError(f"read with a spoilt cache, {before} is {after}")


def laid_out(name: str, valid: Path, folder: Path) -> list[str]:
    """What a target needs, put into `folder`, and what to call."""
    target = TARGETS[name]
    for need in target.needs.split():
        spoil.copy(valid / need, folder / "in" / need, target.own)
    return _filled(target.argv, folder)


def _fits(path: Path, target: Target, root: Path) -> bool:
    inner = path.relative_to(root)
    matches = any(inner.match(target.spoilt.replace("**/*", deeper)) for deeper in ("*", "*/*", "*/*/*", "*/*/*/*"))
    return path.suffix not in (".py", ".md", ".lock") and (target.spoilt == "**/*" or matches)


def _filled(argv: str, folder: Path) -> list[str]:
    words = argv.replace("{out}", str(folder / "out")).split()
    return [f"{folder / 'in'}/{word[1:-1]}" if word[0] == "{" else word for word in words]


def _swapped(rng: Random, valid: Path, folder: Path) -> Case:
    """A command whose paths are of other things: data where a run is expected, and so on."""
    others = [p for p in sorted(valid.glob("*/*")) + sorted(valid.glob("*/*/*")) if "checkpoint" not in p.name]
    name = rng.choice([name for name, target in TARGETS.items() if target.argv and not target.own])
    words = TARGETS[name].argv.split()
    slots = [at for at, word in enumerate(words) if word[0] == "{" and not word.startswith("{out}")]
    for need in TARGETS[name].needs.split():
        spoil.copy(valid / need, folder / "in" / need)
    for at in rng.sample(slots, rng.randint(1, len(slots))):
        other = rng.choice(others).relative_to(valid)
        if not (folder / "in" / other).exists():
            spoil.copy(valid / other, folder / "in" / other)
        words[at] = f"{{{other}}}"
    argv = _filled(" ".join(words), folder)
    return Case("swapped", " ".join(argv), lambda: call(argv))


# ---------------------------------------------------------------- settings


def _settings(rng: Random, folder: Path) -> Case:
    """Settings of a stage in YAML and as flags, some of which are wrong in type, range, size or encoding."""
    kind = rng.choice(CONFIGS)
    fields = dataclasses.fields(kind)
    values = {field.name: _odd(rng, field.name) for field in rng.sample(fields, rng.choice((1, 1, 2, 4)))}
    verb = kind.__name__.removesuffix("Config").lower()
    if rng.random() < 0.5:
        argv = [f"--{name}={_flag(value)}" for name, value in values.items()]
    else:
        file = folder / "in" / "settings.yaml"
        file.parent.mkdir()
        file.write_bytes(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))
        if rng.random() < 0.3:
            spoil.spoil(file, rng, folder / "planted")
        argv = ["--config", str(file)]

    def work() -> None:
        config = parse(kind, None, argv)
        write_yaml(config, folder / "out" / "config.yaml")
        again = parse(kind, None, ["--config", str(folder / "out" / "config.yaml")])
        if repr(again) != repr(config):
            raise AssertionError(f"written and read again, {config} is {again}")

    return Case("settings", f"{verb} {argv} {values}", work)


def _odd(rng: Random, name: str) -> Any:
    value = rng.choice(spoil.VALUES)
    return (
        rng.choice(([value], [value, value], {"a": value}, {name: value}, str(value))) if rng.random() < 0.3 else value
    )


def _flag(value: Any) -> str:
    if isinstance(value, int) and value > 10**300:
        return "9" * 5000
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
