"""Any task of lmms-eval for a trained model: its own scores with intervals over images and, where questions are to be
answered by yes or no, POPE's scores with POPE's controls.

Each task is a process of its own, so that one that fails takes no other with it.
"""

import inspect
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from diffclip.base.errors import InputError
from diffclip.base.files import json_line, read_jsonl, write_whole
from diffclip.base.statistics import bootstrap_mean
from mllm.pope.lmms import Outcome, run_lmms_eval
from mllm.pope.parsers import parse
from mllm.pope.questions import Question
from mllm.pope.scores import CONTROLS, blind, intervals, score

ASKED = "asked.jsonl"  # which question shows which images; with the rank behind its name
TASK, YES_NO = "tasks", "tasks_yes_no"  # the first parts of the names of scores
GROUPS = 20  # of images, each left out once, for the interval of a score that is no mean
RIGHT = ("score", "is_correct", "correct", "hit", "acc")  # keys of a record that says whether an answer is right


def evaluate_task(run_dir: str | Path, task: str, out_dir: Path, *, seed: int = 0, **how: Any) -> dict[str, float]:
    """Scores of a task, or of all tasks of a group, by name.

    Args:
        run_dir: a run of stages.instruct.
        task: as in `lmms-eval --tasks`.
        out_dir: gets what lmms-eval writes, the answers, and questions.jsonl of those that are yes/no.
        seed: of the resampling and of the blind rule's folds.
        how: as in `mllm.pope.lmms.run_lmms_eval`.

    Returns:
        tasks/TASK/METRIC as lmms-eval gives it, with METRIC_low and METRIC_high, its interval of 95 % over images,
        where there is one (see `task_scores`), tasks/TASK/questions and tasks/TASK/images; of yes/no questions
        tasks_yes_no/TASK/PASS/SCORE in percent, PASS being model, blind, always_yes or one of POPE's controls.

    Raises:
        InputError: lmms-eval ended without results, or a control did.
    """
    outcome, images = _passed(run_dir, task, out_dir / "model", how, "")
    metrics: dict[str, float] = {}
    asked: dict[str, list[Question]] = {}
    for name, samples in outcome.samples.items():
        own = task_scores(outcome, name, images[name], aggregations(name, how.get("include")))
        metrics |= {f"{TASK}/{name}/{key}": value for key, value in own.items()}
        if questions := yes_no_questions(name, samples, images[name]):
            asked[name] = questions
    if not asked:
        return metrics
    answers = {"model": outcome}
    for control in CONTROLS:
        answers[control], _ = _passed(run_dir, task, out_dir / control, how, control)
    lines = []
    for name, questions in asked.items():
        places = {q.question_id for q in questions}
        said = {who: [s for s in one.samples[name] if str(s["doc_id"]) in places] for who, one in answers.items()}
        words = {who: [answer_of(sample) for sample in samples] for who, samples in said.items()}
        for who, table in yes_no_scores(questions, words, seed).items():
            metrics |= {f"{YES_NO}/{name}/{who}/{key}": value for key, value in table.items()}
        for who, given in words.items():
            rows = ({"pass": who, **q._asdict(), "answer": answer} for q, answer in zip(questions, given))
            lines += [json_line(row) for row in rows]
    write_whole(out_dir / "questions.jsonl", "".join(lines))
    return metrics


def _passed(
    run_dir: str | Path, task: str, folder: Path, how: Mapping[str, Any], control: str
) -> tuple[Outcome, dict[str, dict[int, str]]]:
    """One pass over a task, and {task: {document: digest of its images}}."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{ASKED}.*"):
        old.unlink()
    options = {"asked": folder / ASKED, **({"shown": control} if control else {})}
    outcome = run_lmms_eval(run_dir, [task], folder, options=options, **how)
    if not outcome.samples:
        raise InputError(f"lmms-eval wrote no answers to the questions of {task}, see {folder}")
    images: dict[str, dict[int, str]] = {name: {} for name in outcome.samples}
    for file in sorted(folder.glob(f"{ASKED}.*")):
        for _, row in read_jsonl(file, damaged="skip"):
            images.setdefault(row["task"], {})[row["doc_id"]] = " ".join(row["images"])
    return outcome, images


def task_scores(
    outcome: Outcome, task: str, images: Mapping[int, str], aggregate: Mapping[str, Callable] | None = None
) -> dict[str, float]:
    """A task's own numbers, with intervals of 95 % over images.

    Of a mean over questions by the bootstrap, whole images being drawn; of what `aggregate` makes of the questions in
    another way by leaving out groups of images (the delete-group jackknife, with Student's t). Others have none.
    """
    samples = outcome.samples[task]
    clusters = [images.get(sample["doc_id"]) or str(sample["doc_id"]) for sample in samples]
    scores: dict[str, float] = {"questions": len(samples), "images": len(set(clusters))}
    for metric, value in outcome.scores(task).items():
        scores[metric] = value
        ends = _bootstrap(value, _values(samples, metric), clusters)
        if ends is None and aggregate and metric in aggregate:
            ends = _jackknife(value, [sample.get(metric) for sample in samples], clusters, aggregate[metric])
        if ends:
            scores |= {f"{metric}_low": ends[0], f"{metric}_high": ends[1]}
    return scores


def _bootstrap(value: float, values: np.ndarray | None, clusters: Sequence[str]) -> tuple[float, float] | None:
    """The interval of a mean of values, or of 100 times it, perhaps rounded; None if `value` is neither."""
    if values is None:
        return None
    mean, low, high = bootstrap_mean(values, clusters, resamples=1000)
    unit = next((unit for unit in (1, 100) if abs(unit * mean - value) < 1e-4 * unit), None)
    return (unit * low, unit * high) if unit else None


def _jackknife(
    value: float, records: Sequence[Any], clusters: Sequence[str], aggregate: Callable
) -> tuple[float, float] | None:
    """The interval of a score; None if it cannot be computed of fewer questions."""
    names = sorted(set(clusters))
    random.Random(0).shuffle(names)
    groups = min(GROUPS, len(names))
    group_of = {name: i % groups for i, name in enumerate(names)}

    def without(left_out: int) -> float:
        kept = (record for record, name in zip(records, clusters) if group_of[name] != left_out)
        return float(aggregate([record for record in kept if record is not None]))

    try:
        if groups < 2 or abs(without(-1) - value) > 1e-4 * max(1, abs(value)):  # something else is computed than before
            return None
        values = np.array([without(group) for group in range(groups)])
    except Exception:  # of a task's author: it may count on all of its questions
        return None
    half = t.ppf(0.975, groups - 1) * np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum())
    return value - float(half), value + float(half)


def aggregations(task: str, include: Path | None = None) -> dict[str, Callable]:
    """{metric: what makes a score of all questions' records} of a task file, as far as that takes nothing else.

    What takes more than the records writes files, or asks a judge over the network.
    """
    from lmms_eval import tasks
    from lmms_eval.utils import load_yaml_config

    line = re.compile(rf"^task:\s*[\"']?{re.escape(task)}[\"']?\s*$", re.MULTILINE)
    for folder in filter(None, (include, Path(tasks.__file__).parent)):
        for file in sorted(folder.rglob("*.yaml")):
            if line.search(file.read_text(encoding="utf-8", errors="replace")):
                rows = load_yaml_config(str(file)).get("metric_list") or []
                found = {row.get("metric"): row.get("aggregation") for row in rows}
                return {m: f for m, f in found.items() if callable(f) and len(inspect.signature(f).parameters) == 1}
    return {}


def _values(samples: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray | None:
    """What each question adds to a mean, (questions,); None where the task's metric is something else."""
    found = [sample.get(metric) for sample in samples]
    if all(isinstance(value, dict) for value in found):
        keys = [key for key in RIGHT if all(isinstance(value.get(key), int | float) for value in found)]  # type: ignore[union-attr]
        found = [value[keys[0]] for value in found] if keys else [None]  # type: ignore[index]
    if not found or not all(isinstance(value, int | float) for value in found):
        return None
    return np.array(found, dtype=np.float64)


def yes_no_questions(task: str, samples: Iterable[Mapping[str, Any]], images: Mapping[int, str]) -> list[Question]:
    """Those of a task's questions whose answer is yes or no, as POPE's; none unless both answers occur."""
    questions = []
    for sample in samples:
        if label := yes_no_label(sample):
            number = sample["doc_id"]
            image = images.get(number, str(number))
            questions.append(Question(task, image, str(sample.get("input", "")), label, str(number), image))
    return questions if {q.label for q in questions} == {"yes", "no"} else []


def yes_no_label(sample: Mapping[str, Any]) -> str:
    """ "yes" or "no" if that is the answer wanted, else ""; HallusionBench's are 1 and 0 beside a sentence."""
    kept = (value.get("gt_answer") for value in sample.values() if isinstance(value, dict))
    told = next(({"1": "yes", "0": "no"}[str(value)] for value in kept if str(value) in ("0", "1")), "")
    for target in (sample.get("target"), told):
        word = parse([str(target)], "strict")[0]
        if word != "invalid":
            return word
    return ""


def answer_of(sample: Mapping[str, Any]) -> str | None:
    """A model's words, as lmms-eval logs them."""
    said = sample["filtered_resps"]
    said = said[0] if isinstance(said, list) and len(said) == 1 else said
    return said if isinstance(said, str) else None


def yes_no_scores(
    questions: Sequence[Question], answers: Mapping[str, Sequence[str | None]], seed: int = 0
) -> dict[str, dict[str, float]]:
    """POPE's scores in percent, {pass: scores}, of a model and its controls; and of rules that see no image.

    Answers are read by their first word, since tasks of other authors let a model say more than yes or no.
    """
    labels = [q.label for q in questions]
    said = {who: [first_word(answer) for answer in given] for who, given in answers.items()}
    said |= {"blind": blind(questions, seed), "always_yes": ["yes"] * len(questions)}
    table = {who: score(words, labels) for who, words in said.items()}
    for name, (low, high) in intervals(questions, said["model"], seed=seed)["mean"].items():
        table["model"] |= {f"{name}_low": low, f"{name}_high": high}
    return {
        who: {
            "questions" if name == "n" else name: value if name == "n" else 100 * value for name, value in row.items()
        }
        for who, row in table.items()
    }


def first_word(answer: str | None) -> str:
    """yes or no where an answer begins so ("No, there is not."), else invalid."""
    words = (answer or "").replace(",", " ").replace(".", " ").split()
    return parse([words[0]], "strict")[0] if words else "invalid"
