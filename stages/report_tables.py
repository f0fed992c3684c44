"""The report's tables as plain rows of text, so that HTML, Markdown and the console show the same.

Scores are percentages with one decimal, mean ± sample standard deviation over seeds; a dash carries the number of
the note that says why the score is missing.
"""

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from stages.report_data import POPE_SPLITS, STAGES, Arms, RunDir, as_dict, is_number, mean_sd

MINUS, DASH = "\u2212", "\u2013"
# (heading, pattern of the metric's key, whether its absence is worth a line), in the order of the paper's tables.
# The pattern's groups make the row's name; a key without any is an average.
SECTIONS = (
    ("Linear probe, accuracy", r"linear_probe/(.+)/accuracy", True),
    ("Few-shot, accuracy", r"few_shot/(.+)/accuracy", True),
    ("Zero-shot classification, top-1", r"zero_shot/(.+)/top1", True),
    ("Retrieval, text to image", r"retrieval/(?:(.+)/)?text_to_image/(R@\d+)", True),
    ("Retrieval, image to text", r"retrieval/(?:(.+)/)?image_to_text/(R@\d+)", True),
    ("Distribution shifts, zero-shot top-1", r"shift/(?:average|(.+)/top1)", True),
    ("MMVP-VLM, pairs right", r"mmvp/(.+)", True),
    ("POPE, accuracy", r"pope/(random|popular|adversarial|mean)/accuracy", True),
    ("POPE, F1", r"pope/(random|popular|adversarial|mean)/f1", False),
)
SHIFTS = ("v2", "a", "r", "sketch")  # as in the paper's Table 4
POPE_ROWS = (
    ("accuracy", "pope/{}/accuracy"),
    ("blind rule (control)", "pope_blind/{}/accuracy"),
    ("images shuffled (control)", "pope_shuffled/{}/accuracy"),
    ("always yes (control)", "pope_always_yes/{}/accuracy"),
    ("precision", "pope/{}/precision"),
    ("recall", "pope/{}/recall"),
    ("F1", "pope/{}/f1"),
    ("yes rate", "pope/{}/yes_rate"),
    ("invalid rate", "pope/{}/invalid_rate"),
)
# Settings that name the arm itself or decide no number; all others must be equal for the arms to be comparable.
OWN_SETTINGS = {"model", "output_dir", "seed", "vision_tower", "language_model", "clip", "mllm"}
OWN_SETTINGS |= {"logging_steps", "save_steps", "num_workers", "examples"}
DATA_SETTINGS = {"train_data", "val_data", "data", "image_root", "text", "clip_data", "pope"}


@dataclass
class Table:
    """Rows of text under `columns`; a row with one cell is a heading. The first column is text, others numbers."""

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # "[1]" in a cell is notes[0]
    prose: bool = False  # the other columns are text as well

    def note(self, text: str) -> int:
        """The number of the note `text`, from 1."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1


def percent(values: Iterable[float], sign: bool = False) -> str:
    """Percentages as "78.1 ± 1.2" (mean and sd) or "78.1"; with `sign`, points as "+0.4"."""
    mean, sd = mean_sd(list(values))
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    text = {"-0.0": "0.0", "+0.0": "0.0"}.get(text, text).replace("-", MINUS)
    return text if sd is None else f"{text} ± {sd:.1f}"


def comparison_keys(arms: Arms) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(heading, [(key, row name)])] of what the paper's tables hold; headings without a number stay, empty."""
    sections = []
    for heading, pattern, expected in SECTIONS:
        matches = [(k, m) for k in arms.metric_names() if (m := re.fullmatch(pattern, k))]
        rows = [(k, ", ".join(g for g in m.groups() if g) or "average") for k, m in matches]
        if rows or expected:
            sections.append((heading, sorted(rows, key=lambda row: _place(row[1]))))
    return sections


def _place(name: str) -> tuple:
    """Published order of POPE's splits and of the shifts, R@10 after R@5, else by name; averages last."""
    known = (*POPE_SPLITS, *SHIFTS)
    fixed = known.index(name) if name in known else len(known)
    return name in ("average", "mean"), fixed, re.sub(r"\d+", lambda digits: digits[0].zfill(4), name)


def comparison(arms: Arms) -> Table:
    """Benchmarks by models, and each model's difference from the first, paired by seed."""
    first, *others = arms.models
    table = Table(["Benchmark", *arms.models, *(f"{other} {MINUS} {first}" for other in others)])
    for heading, keys in comparison_keys(arms):
        table.rows.append([heading])
        group = {h: pattern for h, pattern, _ in SECTIONS}[heading].split("/")[0]
        for key, label in keys or [(f"{group}/", "(no numbers)")]:
            cells = [score(arms, table, model, key) for model in arms.models]
            for other in others:
                pairs = paired_differences(arms, first, other, key)
                cells.append(percent(pairs, sign=True) if pairs else DASH)
            table.rows.append([label, *cells])
    return table


def score(arms: Arms, table: Table, model: str, key: str) -> str:
    """The cell of `model` under `key`; missing seeds are explained in the table's notes."""
    values = arms.scores(model, key)
    missing = [s for s in arms.seeds(model) if s not in values]
    notes = sorted({table.note(arms.why_missing(model, seed, key)) for seed in missing})
    marks = "".join(f" [{n}]" for n in notes)
    return (percent(values.values()) if values else DASH) + marks


def paired_differences(arms: Arms, first: str, other: str, key: str) -> list[float]:
    """other - first, in points, for every seed that both have."""
    a, b = arms.scores(first, key), arms.scores(other, key)
    return [b[seed] - a[seed] for seed in b if seed in a]


def evidence(arms: Arms) -> str:
    """What the number of seeds allows to be said about differences."""
    if len(arms.models) < 2:
        return "There is one model, so nothing is compared."
    evaluated = [{r.seed for r in arms.of("evaluate", model) if r.metrics} for model in arms.models]
    common = min(len(evaluated[0] & other) for other in evaluated[1:])
    if common == 0:
        return "Not every model has been evaluated at a seed that the first model has, so the comparison has gaps."
    if common == 1:
        return (
            "With one seed, the differences between the arms are not significant evidence: another seed may turn "
            "their sign. Run at least three seeds before reading anything into them."
        )
    return (
        "Scores are mean ± sample standard deviation over seeds; a difference is taken seed by seed, then averaged. "
        "No test of significance is made: a difference that is not several times its ± is not evidence."
    )


# --- POPE -------------------------------------------------------------------------------------------------------


def pope(arms: Arms) -> Table:
    """Every POPE measure and control, split by split, below each model's name."""
    splits = (*POPE_SPLITS, "mean")
    table = Table(["", *splits])
    for model in arms.models:
        table.rows.append([model])
        for label, pattern in POPE_ROWS:
            table.rows.append([label, *(score(arms, table, model, pattern.format(split)) for split in splits)])
        counts = [arms.written(model, f"pope/{split}/questions").values() for split in splits]
        table.rows.append(["questions", *(distinct(map(number, c)) for c in counts)])
    return table


def pope_verdict(arms: Arms, model: str) -> tuple[bool | None, str]:
    """(whether the model uses the image, None if that cannot be told; the sentence that says so).

    The mean accuracy must exceed both controls, and the blind one by two standard errors of a proportion over
    one split's questions (the splits share their positive questions, so they do not add up to more).
    """
    accuracy = arms.scores(model, "pope/mean/accuracy")
    blind = arms.scores(model, "pope_blind/mean/accuracy")
    shuffled = arms.scores(model, "pope_shuffled/mean/accuracy")
    seeds = [s for s in accuracy if s in blind]
    if not accuracy:
        return None, f"{model}: no POPE numbers for all three splits, so nothing is said about its use of the image."
    if not seeds:
        return None, f"{model}: no blind control, so it cannot be told whether it uses the image."
    ours, rule = (mean_sd([values[s] for s in seeds])[0] for values in (accuracy, blind))
    numbers = f"accuracy {ours:.1f} against {rule:.1f} for the best rule without the image"
    mixed = [shuffled[s] for s in seeds if s in shuffled]
    if mixed:
        numbers += f" and {mean_sd(mixed)[0]:.1f} with the images shuffled"
    if ours <= rule or (mixed and ours <= mean_sd(mixed)[0]):
        return False, f"{model} does not use the image: {numbers} (mean of the splits)."
    counts = [arms.written(model, f"pope/{split}/questions") for split in POPE_SPLITS]
    questions = min(sum(c[s] for s in seeds if is_number(c.get(s))) for c in counts)
    if questions and ours - rule < 2 * math.sqrt(ours * (100 - ours) / questions):
        return None, (
            f"{model}: {numbers}; over {questions:,} questions a split that lead is within sampling noise, so it is "
            "not shown that the model uses the image."
        )
    return True, f"{model} uses the image: {numbers} (mean of the splits)."


# --- what was run -----------------------------------------------------------------------------------------------


def setup(arms: Arms) -> Table:
    """One column a model: data, budget, time and hardware of every stage."""
    table = Table(["", *arms.models], prose=True)

    def row(label: str, fact: Callable[[str], str]) -> None:
        cells = [fact(model) for model in arms.models]
        if any(cell != DASH for cell in cells):
            table.rows.append([label, *cells])

    def of(stage: str, fact: Callable[[RunDir], str]) -> Callable[[str], str]:
        return lambda model: distinct(fact(run) for run in arms.latest(stage, model))

    table.rows.append(["seeds", *(distinct(arms.seeds(model)) for model in arms.models)])
    row("parameters", of("pretrain", lambda r: number(r.record["parameters"]) if "parameters" in r.record else ""))
    row("initialisation", of("pretrain", lambda r: str(r.config.get("init", ""))))
    row("language model", of("align", lambda r: language_model(arms, r)))
    for stage in STAGES[1:]:
        table.rows.append([stage.capitalize()])
        row("state, time", lambda model, stage=stage: progress(arms.latest(stage, model), len(arms.seeds(model))))
        row("learns", of(stage, learns))
        row("data", of(stage, data_of))
        row("budget", of(stage, budget))
        row("final loss", lambda model, stage=stage: final_loss(arms.latest(stage, model)))
    shared = [r for r in arms.runs if r.stage == "language"]
    if shared:
        table.rows.append(["Language (shared by all models)"])
        seeds = {seed for model in arms.models for seed in arms.seeds(model)}
        for label, fact in (("state, time", progress(shared, len(seeds))), ("budget", distinct(map(budget, shared)))):
            table.rows.append([label, *[fact] * len(arms.models)])
    table.rows.append(["Machine"])
    every = {m: [r for r in arms.runs if r.model == m] for m in arms.models}
    row("hardware", lambda m: distinct(str(r.record.get("hardware", "")) for r in every[m]))
    row("source", lambda m: distinct(str(r.record.get("git", "")) for r in every[m]))
    row("software", lambda m: distinct(versions(r) for r in every[m]))
    return table


def checks(arms: Arms) -> list[tuple[bool | None, str]]:
    """(passed or None for unknown, sentence) for what must hold before the arms may be compared."""
    results: list[tuple[bool | None, str]] = []
    if len(arms.models) > 1:
        seeds = {model: arms.seeds(model) for model in arms.models}
        same = len({tuple(s) for s in seeds.values()}) == 1
        listed = "; ".join(f"{m}: {', '.join(s)}" for m, s in seeds.items())
        results.append((same, "Same seeds in every arm." if same else f"The arms have other seeds: {listed}."))
        results += [equal_settings(arms), equal_data(arms), equal_machines(arms)]
    frozen = [r for r in arms.runs if r.get("before") and r.get("after")]
    wrong = [
        f"{r.name}: {part}"
        for r in frozen
        for part, mark in r.get("before").items()
        if (r.get("after").get(part) == mark) == (part in (r.record.get("learns") or []))
    ]
    if frozen:
        good = "Parts that were frozen kept their fingerprints, parts that learnt changed theirs."
        results.append((not wrong, good if not wrong else f"Fingerprints contradict what learnt: {'; '.join(wrong)}."))
    unfinished = [r.name for r in arms.runs if r.state != "finished"]
    good = "Every run that was found is finished."
    results.append((not unfinished, good if not unfinished else f"Not finished: {'; '.join(unfinished)}."))
    return results


def equal_settings(arms: Arms) -> tuple[bool | None, str]:
    if unknown := [r.name for r in arms.runs if r.model and not r.config]:
        return None, f"No settings (config.yaml) to compare in: {'; '.join(unknown)}."
    differ = []
    for stage in STAGES[1:]:
        configs = [(r.model, r.config) for r in arms.runs if r.stage == stage and r.config]
        for key in dict.fromkeys(k for _, c in configs for k in c):
            values = {m: str(c.get(key)) for m, c in configs}
            if key not in OWN_SETTINGS | DATA_SETTINGS and len({str(c.get(key)) for _, c in configs}) > 1:
                differ.append(f"{stage} {key} ({', '.join(f'{m}: {v}' for m, v in values.items())})")
    if differ:
        return False, f"Settings differ between runs: {'; '.join(differ)}."
    return True, "Same settings for every arm in every stage (the model, paths and seed apart)."


def equal_data(arms: Arms) -> tuple[bool | None, str]:
    seen: dict[tuple[str, str, str], set[str]] = {}
    for run in arms.runs:
        for role, value in run.get("inputs").items():
            if role.split("[")[0] in DATA_SETTINGS and run.model:
                seen.setdefault((run.stage, run.seed, role), set()).add(str(as_dict(value).get("digest")))
    differ = sorted({f"{stage} {role.split('[')[0]}" for (stage, _, role), d in seen.items() if len(d) > 1})
    if not seen:
        return None, "No run recorded the data that it read."
    if differ:
        return False, f"At the same seed the arms read other data: {', '.join(differ)}."
    return True, "Same data for every arm at the same seed (by digest)."


def equal_machines(arms: Arms) -> tuple[bool, str]:
    facts = {"hardware": lambda r: r.record.get("hardware"), "source": lambda r: r.record.get("git")}
    facts["software"] = lambda r: sorted(r.get("versions").items())
    differ = [name for name, fact in facts.items() if len({str(fact(r)) for r in arms.runs if r.model}) > 1]
    if differ:
        return False, f"The runs differ in {', '.join(differ)}: see the details of each run."
    return True, "Same hardware, source and software versions for every run."


def others(arms: Arms) -> Table:
    """Numbers of the evaluate runs that no other table shows, as they were written."""
    known = {key for _, keys in comparison_keys(arms) for key, _ in keys}
    known |= {pattern.format(split) for _, pattern in POPE_ROWS for split in (*POPE_SPLITS, "mean")}
    known |= {f"pope/{split}/questions" for split in (*POPE_SPLITS, "mean")}
    table = Table(["Metric", *arms.models])
    for key in sorted(k for k in arms.metric_names() if k not in known):
        cells = []
        for model in arms.models:
            values = list(arms.written(model, key).values())
            numbers = [v for v in values if is_number(v)]
            mean, sd = mean_sd(numbers) if numbers and len(numbers) == len(values) else (None, None)
            text = distinct(map(str, values)) if mean is None else f"{mean:.4g}"
            cells.append(text if sd is None else f"{text} ± {sd:.2g}")
        table.rows.append([key, *cells])
    return table


def details(run: RunDir) -> Table:
    """Everything run.json says about one run."""
    table = Table(["", ""], prose=True)
    add = table.rows.append
    add(["directory", str(run.path)])
    add(
        ["state", f"{run.state}, started {run.record.get('started', DASH)}, {duration(run.record.get('wall_seconds'))}"]
    )
    add(["command", str(run.record.get("command", DASH))])
    parameters = run.record.get("parameters")
    if isinstance(parameters, dict):
        learnt = run.record.get("learns") or []
        for part, n in parameters.items():
            before, after = run.get("before").get(part, DASH), run.get("after").get(part, DASH)
            role = "learnt" if part in learnt else "frozen"
            add([part, f"{role}, {number(n)} parameters, fingerprint {before} \u2192 {after}"])
    elif parameters is not None:
        add(["parameters", f"{number(parameters)}, all learnt"])
    roles: dict[str, list[dict]] = {}
    for role, value in run.get("inputs").items():
        roles.setdefault(role.split("[")[0], []).append(as_dict(value))
    for role, files in roles.items():
        shown = [f"{f.get('path', DASH)} ({f.get('digest', DASH)})" for f in files]
        more = [f"\u2026 {len(shown) - 4} more \u2026"] if len(shown) > 5 else shown[2:-2] if len(shown) == 5 else []
        add([f"input {role}", ", ".join([*shown[:2], *more, *shown[-2:]] if len(shown) > 4 else shown)])
    if run.stage != "evaluate" and run.metrics:
        add(["metrics", ", ".join(f"{k} {v:.4g}" if is_number(v) else f"{k} {v}" for k, v in run.metrics.items())])
    add(["hardware", str(run.record.get("hardware", DASH))])
    add(["versions", ", ".join(f"{k} {v}" for k, v in run.get("versions").items()) or DASH])
    add(["source", str(run.record.get("git") or DASH)])
    return table


# --- facts of runs ----------------------------------------------------------------------------------------------


def distinct(values: Iterable[str]) -> str:
    """The different values in order, or a dash."""
    return ", ".join(dict.fromkeys(v for v in values if v)) or DASH


def number(value: Any) -> str:
    return f"{value:,}" if is_number(value) else str(value)


def duration(seconds: Any) -> str:
    """Seconds as "48 s", "3.4 min" or "2.1 h"."""
    if not is_number(seconds):
        return DASH
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def progress(runs: list[RunDir], seeds: int) -> str:
    """ "finished, 2.1 min", or how many of the seeds got there."""
    if not runs:
        return "not run"
    done = [r for r in runs if r.state == "finished"]
    times = [r.record.get("wall_seconds") for r in done if is_number(r.record.get("wall_seconds"))]
    time = f", {duration(mean_sd(times)[0])}" if times else ""
    if len(done) >= seeds:
        return f"finished{time}"
    rest = distinct(r.state for r in runs if r.state != "finished")
    return f"{len(done)} of {seeds} finished{time}" + (f"; {rest}" if rest != DASH else "")


def learns(run: RunDir) -> str:
    names = run.record.get("learns") or []
    return " + ".join(f"{n} ({number(run.get('parameters').get(n, DASH))})" for n in names if isinstance(n, str))


def budget(run: RunDir) -> str:
    """ "20,000 pairs × 3 epochs = 234 steps of 256", as far as the run says so."""
    counts = [
        f"{number(run.record[what])} {what}" for what in ("pairs", "conversations", "tokens") if what in run.record
    ]
    if counts and "epochs" in run.config:
        epochs = run.config["epochs"]
        counts[0] += f" × {epochs:g} epoch{'s' * (epochs != 1)}" if is_number(epochs) else f" × {epochs} epochs"
    steps = f"{number(run.record['steps'])} steps" if "steps" in run.record else ""
    if steps and "global_batch_size" in run.config:
        steps += f" of {number(run.config['global_batch_size'])}"
    return " = ".join(filter(None, [*counts[:1], steps]))


def final_loss(runs: list[RunDir]) -> str:
    losses = [losses[-1] for r in runs if (losses := [x["loss"] for x in r.curve if is_number(x.get("loss"))])]
    if not losses:
        return DASH
    mean, sd = mean_sd(losses)
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} ± {sd:.3f}"


def data_of(run: RunDir) -> str:
    """The training files of a run in a few words."""
    inputs = run.get("inputs").items()
    paths = [str(as_dict(v).get("path")) for k, v in inputs if k.split("[")[0] in ("train_data", "data")]
    if len(paths) < 2:
        return "".join(paths)
    return f"{len(paths)} files, {os.path.dirname(paths[0])}/{os.path.basename(paths[0])} \u2026"


def versions(run: RunDir) -> str:
    shown = [n for n in ("python", "torch", "transformers", "deepspeed", "lmms-eval") if n in run.get("versions")]
    return ", ".join(f"{n} {run.get('versions')[n]}" for n in shown)


def language_model(arms: Arms, run: RunDir) -> str:
    """The language model behind an align run; a stand-in is called one."""
    given = run.config.get("language_model") or as_dict(run.get("inputs").get("language_model")).get("path")
    if not given:
        return ""
    taught = {str(r.path.resolve()): r for r in arms.runs if r.stage == "language"}
    same_seed = [r for r in taught.values() if r.seed == run.seed and r.path.name == os.path.basename(str(given))]
    source = taught.get(os.path.realpath(str(given))) or (same_seed[0] if same_seed else None)
    if source is None:
        return str(given)
    size = number(source.record.get("parameters", DASH))
    if source.record.get("stand_in"):
        return f"STAND-IN of {size} parameters taught on text by the language stage; not Qwen2.5-0.5B-Instruct"
    return f"{given}, {size} parameters"


def stand_in(arms: Arms) -> bool:
    """Whether any multimodal model here rests on a stand-in language model."""
    return any(language_model(arms, r).startswith("STAND-IN") for r in arms.runs if r.stage == "align")
