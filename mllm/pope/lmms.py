"""POPE through the real lmms-eval, offline: questions and images become parquet and task files, lmms-eval runs as
a process of its own, and its answers are scored here once more, so that a silent failure cannot pass for a result.
"""

import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet

from diffclip.base.errors import InputError
from diffclip.base.files import json_line, read_json, read_jsonl, write_whole
from diffclip.base.lines import print_line, printable
from diffclip.base.orphans import as_parent
from diffclip.base.ranks import environment_of_none
from diffclip.base.schema import ANSWERS
from mllm.data.images import ImagePlace
from mllm.pope.parsers import parse
from mllm.pope.questions import POST_PROMPT, SPLITS, Question
from mllm.pope.scores import CONTROLS, GREY, SCORES, blind, grey_image, intervals, score, score_splits

ANSWERED = "answered.jsonl"  # what a killed evaluation had answered


def write_parquet(questions: Sequence[Question], images: Mapping[str, ImagePlace], path: str | Path) -> None:
    """Write questions and their images, from `mllm.pope.images.find_images`, in the columns of lmms-lab/POPE."""
    shown = {q.shown for q in questions} - {GREY, ""}
    encoded: dict[str, Any] = {name: {"bytes": images[name].read(), "path": name} for name in shown}
    grey_image().save(grey := io.BytesIO(), "PNG")
    encoded |= {GREY: {"bytes": grey.getvalue(), "path": GREY}, "": None}
    names = ("question_id", "question", "answer", "image_source", "image", "category")
    features = datasets.Features({name: datasets.Value("string") for name in names} | {"image": datasets.Image()})
    # Arrow writes it silently; the schema carries the features, so that `image` is read back as an image.
    with pyarrow.parquet.ParquetWriter(path, features.arrow_schema) as writer:
        for first in range(0, len(questions), 500):  # photos of thousands of questions are more than one table may hold
            part = questions[first : first + 500]
            rows = [(q.question_id, q.text, q.label, q.image, encoded[q.shown], q.split) for q in part]
            table = datasets.Dataset.from_dict(dict(zip(names, map(list, zip(*rows)))), features=features)
            writer.write_table(table.data.table.cast(features.arrow_schema))


def write_tasks(folder: str | Path, parquets: Mapping[str, str | Path], post_prompt: str = POST_PROMPT) -> list[str]:
    """Write a task file for each parquet file, for `lmms-eval --include_path FOLDER`; returns the task names.

    Args:
        folder: where to write; parquet files in it are named relative to it, so that it can be moved.
        parquets: task name -> parquet file; lmms-eval's own names (`pope`, ...) must not be used.
        post_prompt: follows each question.
    """
    folder = Path(folder).resolve()
    template = (files("mllm.tasks") / "pope.yaml").read_text(encoding="utf-8")
    for task, parquet in parquets.items():
        parquet = Path(parquet).resolve()
        inside = parquet.relative_to(folder) if parquet.is_relative_to(folder) else parquet
        text = template
        for name, value in (("task", task), ("parquet", str(inside)), ("post_prompt", post_prompt)):
            text = text.replace(f"{{{name}}}", json.dumps(value))
        write_whole(folder / f"{task}.yaml", text)
    return list(parquets)


def evaluate_with_lmms(
    run_dir: str | Path,
    questions: Sequence[Question],
    images: Mapping[str, ImagePlace],
    out_dir: str | Path,
    *,
    controls: Sequence[str] = tuple(CONTROLS),
    batch_size: int = 64,
    device: str | None = None,
    processes: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """POPE scores of a trained model, with controls beside them.

    Args:
        run_dir: a run of stages.instruct.
        questions: with labels, from `mllm.pope.questions.read`.
        images: their images, from `mllm.pope.images.find_images`.
        out_dir: gets task files, lmms-eval's results and log, and answers.jsonl.
        controls: further passes of the model, of `CONTROLS`.
        batch_size: questions at a time, in each process.
        device: of a single process, e.g. "cuda:0"; by default its own.
        processes: that share the questions, one a GPU.
        seed: of the shuffling and of the blind rule's folds.

    Returns:
        {"model" | a control | "blind" | "always_yes": {split or "mean": scores}}; rows of the model and its controls
        also hold accuracy_strict and accuracy_official, see `mllm.pope.parsers.PARSERS`, and the model's accuracy_low
        and accuracy_high, f1_low and f1_high, see `mllm.pope.scores.intervals`.

    Raises:
        InputError: questions without labels, unknown control, or lmms-eval ended without results.
    """
    if unknown := set(controls) - set(CONTROLS):
        raise InputError(f"unknown POPE controls {sorted(unknown)}: use {', '.join(CONTROLS)}")
    if not all(q.label for q in questions):
        raise InputError("POPE's questions have no labels; give the official files, too")
    out_dir = Path(out_dir).resolve()
    tasks = out_dir / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    # lmms-eval scores the model split by split; one task for each control is enough
    passes = {"model": {f"diffclip_pope_model_{split}": [q for q in questions if q.split == split] for split in SPLITS}}
    passes |= {name: {f"diffclip_pope_{name}": CONTROLS[name](questions, seed)} for name in controls}
    parts = {task: part for of_pass in passes.values() for task, part in of_pass.items()}
    for task, part in parts.items():
        write_parquet(part, images, tasks / f"{task}.parquet")
    write_tasks(tasks, {task: tasks / f"{task}.parquet" for task in parts})
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    settings["LMMS_EVAL_DATASETS_CACHE"] = str(out_dir / "datasets_cache")
    how: dict[str, Any] = {"batch_size": batch_size, "device": device, "processes": processes, "settings": settings}
    outcome = run_lmms_eval(run_dir, list(parts), out_dir, include=tasks, **how)
    shutil.rmtree(out_dir / "datasets_cache", ignore_errors=True)  # lmms-eval's copy of all images
    answers = {task: [line["filtered_resps"] for line in outcome.samples[task]] for task in parts}
    for task, part in parts.items():
        if len(answers[task]) != len(part):
            raise InputError(
                f"{task}: lmms-eval wrote {len(answers[task])} answers to {len(part)} questions, see {out_dir}; start "
                "again, what was answered is kept"
            )
    asked = {name: [q for part in of_pass.values() for q in part] for name, of_pass in passes.items()}
    given = {name: [answer for task in of_pass for answer in answers[task]] for name, of_pass in passes.items()}
    pairs = ((name, q, answer) for name in passes for q, answer in zip(asked[name], given[name]))
    lines = [json_line({"pass": name, **q._asdict(), "answer": answer}) for name, q, answer in pairs]
    write_whole(out_dir / ANSWERS, "".join(lines))
    for task, part in parts.items():
        _same(score(parse(answers[task]), [q.label for q in part]), outcome.scores(task), task)
    scores: dict[str, Any] = {name: score_answers(asked[name], given[name]) for name in passes}
    for split, ends in intervals(asked["model"], parse(given["model"]), seed=seed).items():
        for name, (low, high) in ends.items():
            scores["model"][split] |= {f"{name}_low": low, f"{name}_high": high}
    for file in out_dir.glob(f"{ANSWERED}.*"):
        file.unlink()
    scores["blind"] = score_splits(questions, blind(questions, seed=seed))
    scores["always_yes"] = score_splits(questions, ["yes"] * len(questions))
    return scores


def score_answers(questions: Sequence[Question], answers: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """`mllm.pope.scores.score_splits` by lmms-eval's rule, with the accuracies of the other parsers beside it."""
    table = score_splits(questions, parse(answers))
    for parser in ("strict", "official"):
        other = score_splits(questions, parse(answers, parser))
        for split, row in table.items():
            row[f"accuracy_{parser}"] = other[split]["accuracy"]
    return table


class Outcome(NamedTuple):
    """What lmms-eval wrote: its results file, and its samples by task, in the order of the questions."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]

    def scores(self, task: str) -> dict[str, float]:
        """The task's own numbers, by metric."""
        numbers = ((key.split(",")[0], value) for key, value in self.results["results"].get(task, {}).items())
        kept = {name: value for name, value in numbers if isinstance(value, int | float) and "_stderr" not in name}
        return {name: float(value) for name, value in kept.items()}


def run_lmms_eval(
    run_dir: str | Path,
    tasks: Sequence[str],
    out_dir: Path,
    *,
    batch_size: int,
    device: str | None = None,
    processes: int = 1,
    options: Mapping[str, object] | None = None,
    include: Path | None = None,
    settings: Mapping[str, str] | None = None,
    limit: int = 0,
) -> Outcome:
    """What `python -m lmms_eval` makes of a model on tasks, under torchrun if there are several processes.

    Args:
        options: further ones of our model, see `mllm.lmms_plugin`.
        include: a folder of task files beside lmms-eval's own.
        settings: variables of the environment.
        limit: questions of each task; 0 is all.

    Raises:
        InputError: lmms-eval is missing or does not know our model, or wrote no results (it exits 0 on errors);
            the message holds the end of its log.
    """
    run_dir = Path(run_dir).resolve() if Path(run_dir).exists() else Path(run_dir)
    if "diffclip_llava" not in entry_points(group="lmms_eval.models").names:
        raise InputError("lmms-eval cannot find diffclip_llava: pip install 'diffclip-stack[eval]'")
    for path in (run_dir, out_dir):
        if {",", "="} & set(str(path)):
            raise InputError(f"{path}: lmms-eval splits its arguments at , and =; use another folder")
    output, log = out_dir / "lmms_eval", out_dir / "lmms_eval.log"
    before = set(output.rglob("*_results.json"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "lmms_eval", "--model", "diffclip_llava"]
    given = {"pretrained": run_dir, "answers": out_dir / ANSWERED, **(options or {})}
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
    command += ["--tasks", ",".join(tasks), "--batch_size", str(batch_size)]
    command += ["--include_path", str(include)] if include else []
    command += ["--output_path", str(output), "--log_samples"]
    command += ["--device", device] if device else []
    command += ["--limit", str(limit)] if limit else []
    environment = {**environment_of_none(), **as_parent(), **(settings or {})}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    code = _run_with_progress(command, environment, log)
    written = sorted(set(output.rglob("*_results.json")) - before)
    if not written:
        raise InputError(f"lmms-eval ended with code {code} and no results; the end of {log}: {_end_of(log)}")
    stamp = written[-1].name.removesuffix("_results.json")
    samples = {}
    for file in sorted(written[-1].parent.glob(f"{glob.escape(stamp)}_samples_*.jsonl")):
        lines = (line for _, line in read_jsonl(file))
        samples[file.stem.removeprefix(f"{stamp}_samples_")] = sorted(lines, key=lambda line: line["doc_id"])
    return Outcome(read_json(written[-1]), samples)


def _end_of(log: Path) -> str:
    """What lmms-eval says of the error that ended it, or else the last lines of its log, without colours."""
    text = re.sub("\x1b\\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    if said := re.findall(r"Error during evaluation: (.+)", text):
        return said[0][:1500]
    return " | ".join(line for line in text.split("\n")[-12:] if line.strip())[:1500]


def _run_with_progress(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run a command, all of its output into `log`; on a terminal our own progress bar is shown as it goes."""
    terminal = sys.stderr.isatty()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None
    with open(log, "w", encoding="utf-8") as f:  # universal newlines: every redraw of a bar is a line
        for line in process.stdout:
            f.write(line)
            if terminal and line.startswith("diffclip_llava: "):
                print_line("\r" + printable(line.rstrip()), keep="\r", end="", error=True)
    if terminal:
        print_line(error=True)
    return process.wait()


def _same(ours: Mapping[str, float], theirs: Mapping[str, float], task: str) -> None:
    for name in SCORES:
        if abs(ours[name] - theirs[name]) > 1e-9:
            raise RuntimeError(f"{task}: {name} is {ours[name]} here and {theirs[name]} in lmms-eval")
