"""What run directories hold, read forgivingly and grouped by model and seed; all text is made printable.

Nothing here raises on a partial or damaged run: what cannot be read becomes a sentence that the report shows.
"""

import re
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from diffclip.base import files, schema
from diffclip.base.errors import InputError
from diffclip.base.paths import walk_once
from diffclip.base.schema import POPE_SPLITS, STAGES

# Groups whose average over their sets is a row of its own: key of the average, pattern with {} for the set.
AVERAGED = {
    "linear_probe/average/accuracy": "linear_probe/{}/accuracy",
    "few_shot/average/accuracy": "few_shot/{}/accuracy",
    "zero_shot/average/top1": "zero_shot/{}/top1",
    "shift/average": "shift/{}/top1",
    **{
        f"retrieval/average/{way}/R@{k}": f"retrieval/{{}}/{way}/R@{k}"
        for way in ("text_to_image", "image_to_text")
        for k in (1, 5, 10)
    },
}


@dataclass
class RunDir:
    """One directory with a run.json; strings are printable, numbers in `metrics` are under flat keys."""

    path: Path
    record: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl, by step
    skipped: dict[str, Any] = field(default_factory=dict)  # what the benchmarks left out, and why
    about: dict[str, Any] = field(default_factory=dict)  # what the benchmarks were made with

    @property
    def stage(self) -> str:
        return str(self.record.get("stage", "unknown"))

    @property
    def state(self) -> str:
        return str(self.record.get("state", "unknown"))

    @property
    def model(self) -> str:
        """The model's name; "" for the language model, which belongs to all."""
        return "" if self.stage == "language" else str(self.record.get("model") or self.path.parent.name)

    @property
    def seed(self) -> str:
        return str(self.record.get("seed", "unknown"))

    @property
    def name(self) -> str:
        return f"{self.stage} of {self.model or 'the language model'}, seed {self.seed}"

    @property
    def learns(self) -> list[str]:
        """Names of the parts that learnt."""
        names = self.record.get("learns")
        return [n for n in names if isinstance(n, str)] if isinstance(names, list) else []

    def get(self, key: str) -> dict[str, Any]:
        """A mapping in run.json, {} if absent or something else."""
        return as_dict(self.record.get(key))


@dataclass
class Arms:
    """All runs; `models` in the report's order, the reference (CLIP) first."""

    runs: list[RunDir]
    problems: list[str]
    models: list[str] = field(init=False)
    differences: dict[tuple[str, str, str], Any] = field(default_factory=dict, init=False)  # found by `significance`

    def __post_init__(self) -> None:
        names = {run.model for run in self.runs if run.model}
        # CLIP, DiffCLIP, DiffCLIP-star, DiffCLIP-dagger: the shorter name is the plainer variant
        self.models = sorted(names, key=lambda n: (not n.startswith("CLIP"), len(n), n)) or ["(no model yet)"]

    def seeds(self, model: str) -> list[str]:
        seeds = {run.seed for run in self.runs if run.model == model}
        return sorted(seeds, key=lambda s: (len(s), s))

    def of(self, stage: str, model: str, seed: str | None = None) -> list[RunDir]:
        """Runs of a stage, the newest last."""
        runs = [r for r in self.runs if (r.stage, r.model) == (stage, model) and seed in (None, r.seed)]
        return sorted(runs, key=lambda r: str(r.record.get("started", "")))

    def latest(self, stage: str, model: str) -> list[RunDir]:
        """One run a seed: the newest."""
        return list({run.seed: run for run in self.of(stage, model)}.values())

    def written(self, model: str, key: str) -> dict[str, Any]:
        """{seed: whatever stands} under `key` of the evaluate runs; the newest counts where two hold the key."""
        return {run.seed: run.metrics[key] for run in self.of("evaluate", model) if key in run.metrics}

    def scores(self, model: str, key: str) -> dict[str, float]:
        """{seed: percentage}; what cannot be one is left out."""
        written = self.written(model, key).items()
        return {seed: float(v) for seed, v in written if is_number(v) and -1e-6 <= v <= 100 + 1e-6}

    def metric_names(self) -> list[str]:
        """All keys of all evaluate runs in the order they were written."""
        return list(dict.fromkeys(k for r in self.runs if r.stage == "evaluate" for k in r.metrics))

    def why_missing(self, model: str, seed: str, key: str) -> str:
        """One sentence: why there is no number under `key`."""
        runs = self.of("evaluate", model, seed)
        group = key.split("/")[0]
        if not runs:
            done = [s for s in STAGES[1:] if any(r.state == "finished" for r in self.of(s, model, seed))]
            reached = f"finished there: {', '.join(done)}" if done else "no stage has finished there"
            return f"no evaluate run of {model}, seed {seed}, was found; {reached}"
        role, what = (
            ("mllm", "multimodal model") if group.startswith(("pope", schema.CHAIR)) else ("clip", "dual encoder")
        )
        run = next((r for r in reversed(runs) if role in r.get("inputs")), runs[-1])
        if run.state != "finished":
            return f"{run.name}, has not finished (state: {run.state})"
        if key in run.metrics:
            value = run.metrics[key]
            return f"{run.name}: {key} is {value!r}, which is no percentage"
        if not run.metrics:
            return f"{run.name}: {schema.METRICS} holds no numbers"
        for name, reason in run.skipped.items():
            if key.startswith(name) or name.startswith(key):
                return f"{run.name}: {name} was left out: {reason}"
        if run.get("inputs") and role not in run.get("inputs"):
            return f"{run.name}, was started without a {what} (setting `{role}`)"
        return f"{run.name}, finished without {group} numbers for this row"


def gather(paths: list[Path]) -> Arms:
    """Read every run directory at or below `paths`, links followed, and those that their inputs name.

    Raises:
        InputError: a path does not exist, or no run.json lies below any of them.
    """
    runs: dict[Path, RunDir] = {}
    problems: list[str] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such run directory")
    queue = [Path(where) for path in paths for where, _, names in walk_once(str(path)) if schema.RECORD in names]
    for folder in queue:  # grows below
        if folder.resolve() in runs or not isinstance(record := read_whole(folder / schema.RECORD, problems), dict):
            continue
        run = runs[folder.resolve()] = RunDir(folder, record)
        if (folder / schema.CONFIG).is_file():
            run.config = as_dict(read_whole(folder / schema.CONFIG, problems))
        if (folder / schema.METRICS).is_file():
            run.metrics = dict(flat(read_whole(folder / schema.METRICS, problems)))
        if run.stage == "evaluate" and (folder / schema.CLIP_BENCHMARKS).is_file():
            benchmarks = as_dict(read_whole(folder / schema.CLIP_BENCHMARKS, problems))
            run.skipped, run.about = as_dict(benchmarks.get("skipped")), as_dict(benchmarks.get("about"))
        run.curve = read_curve(folder / schema.CURVE)
        # the language model or the vision tower may lie elsewhere: what was learnt from belongs to the report
        inputs = [Path(str(as_dict(i).get("path", "?"))) for i in run.get("inputs").values()]
        queue += [path for path in inputs if (path / schema.RECORD).is_file()]
    if not runs:
        below = ", ".join(map(str, paths))
        raise InputError(f"no {schema.RECORD} below {below}: give the output directories of stages")
    arms = Arms(list(runs.values()), problems)
    for model in arms.models:
        for stage in STAGES[1:-1]:
            twice = [r for r in arms.of(stage, model) if r not in arms.latest(stage, model)]
            problems += [f"{r.path}: an older run of {r.name}; only the newest is shown" for r in twice]
    add_averages(arms)
    return arms


def add_averages(arms: Arms) -> None:
    """Add the averages to each evaluate run that has every set of a group that has at least two."""
    keys = arms.metric_names()
    groups = {average: sets_of_average(keys, average) for average in AVERAGED}
    for key in keys:
        if match := re.fullmatch(rf"(pope\w*)/{POPE_SPLITS[0]}/(?!questions)([^/]+)", key):
            group, measure = match.groups()
            groups[f"{group}/mean/{measure}"] = [f"{group}/{split}/{measure}" for split in POPE_SPLITS]
    for run in (run for run in arms.runs if run.stage == "evaluate"):
        for average, sets in groups.items():
            values = [v for key in sets if is_number(v := run.metrics.get(key))]
            if average not in run.metrics and len(values) == len(sets) >= 2:
                run.metrics[average] = statistics.fmean(values)


def sets_of_average(keys: Iterable[str], average: str) -> list[str]:
    """Those of `keys` that `average`, a key of AVERAGED, is taken over."""
    before, after = AVERAGED[average].split("{}")
    return [key for key in keys if key.startswith(before) and key.endswith(after) and key != average]


def mean_sd(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


# --- single files ------------------------------------------------------------------------------------------------


def read_whole(path: Path, problems: list[str]) -> Any:
    """A JSON or YAML file's value, cleaned; None, and a sentence in `problems`, if it cannot be read."""
    read = files.read_yaml if path.suffix == ".yaml" else files.read_json
    try:
        return clean(read(path))
    except (InputError, RecursionError) as error:
        reason = clean(str(error).removeprefix(f"{path}: "))[:300]
        problems.append(f"{path}: cannot be read ({reason}); left out")
        return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every JSON object of a JSONL file; damaged lines, such as a crash leaves, are skipped."""
    if path.is_file():
        for _, value in files.read_jsonl(path, damaged="skip"):
            try:
                line = clean(value)
            except RecursionError:
                continue
            if isinstance(line, dict):
                yield line


def read_curve(path: Path) -> list[dict[str, float]]:
    """metrics.jsonl by step, losses and validation in one; after a resume the later value of a step counts."""
    by_step: dict[float, dict] = {}
    for line in read_lines(path):
        if is_number(line.get("step")):
            by_step.setdefault(line["step"], {}).update(line)
    return [by_step[step] for step in sorted(by_step)]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b", leaf) of nested mappings."""
    if not isinstance(value, dict):
        if prefix:
            yield prefix, value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}/{key}" if prefix else str(key))


def clean(value: Any) -> Any:
    """The same value with control characters, bidirectional overrides and lone surrogates made visible."""
    if isinstance(value, str):
        if value.isprintable() and len(value) <= 4000:  # nearly always, and a hundred times faster
            return value
        return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in value[:4000])
    if isinstance(value, dict):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, list):
        if all(type(v) is int for v in value):  # heat maps: ten thousand of them take no time then
            return value
        return [clean(v) for v in value]
    return value


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number of a size that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
