"""What was run and whether it may be compared: data, budget, versions and hardware of every stage, and each run."""

import os
from collections.abc import Callable

from diffclip.base.schema import STAGES
from stages.report.cells import DASH, Table, distinct, duration, number
from stages.report.data import Arms, RunDir, as_dict, is_number, mean_sd

# Settings that name the arm itself or decide no number; all others must be equal for the arms to be comparable.
OWN_SETTINGS = {"model", "output_dir", "seed", "vision_tower", "language_model", "clip", "mllm"}
OWN_SETTINGS |= {"logging_steps", "save_steps", "num_workers", "examples"}
DATA_SETTINGS = {"train_data", "val_data", "data", "image_root", "text", "clip_data", "pope"}

Check = tuple[bool | None, str]  # whether it holds, None where that is unknown; the sentence that says so


def setup(arms: Arms) -> Table:
    """One column a model: data, budget, time and hardware of every stage."""
    table = Table(["", *arms.models], prose=True, name="setup", title="Data, budget, time and machine")

    def row(label: str, facts: list[str]) -> None:
        if any(fact != DASH for fact in facts):
            table.rows.append([label, *facts])

    def of(stage: str, fact: Callable[[RunDir], str]) -> list[str]:
        return [distinct(map(fact, arms.latest(stage, model))) for model in arms.models]

    table.rows.append(["seeds", *(distinct(arms.seeds(model)) for model in arms.models)])
    row("parameters", of("pretrain", lambda r: number(r.record["parameters"]) if "parameters" in r.record else ""))
    row("initialisation", of("pretrain", lambda r: str(r.config.get("init", ""))))
    row("language model", of("align", lambda r: language_model(arms, r)))
    for stage in STAGES[1:]:
        runs = {model: arms.latest(stage, model) for model in arms.models}
        table.rows.append([stage.capitalize()])
        row("state, time", [progress(runs[model], len(arms.seeds(model))) for model in arms.models])
        row("learns", of(stage, learns))
        row("data", of(stage, data_of))
        row("budget", of(stage, budget))
        row("benchmarks", of(stage, protocol))
        row("POPE", of(stage, lambda r: str(r.record.get("pope") or "")))
        row("final loss", [final_loss(runs[model]) for model in arms.models])
    if shared := [r for r in arms.runs if r.stage == "language"]:
        table.rows.append(["Language (shared by all models)"])
        seeds = {seed for model in arms.models for seed in arms.seeds(model)}
        for label, fact in (("state, time", progress(shared, len(seeds))), ("budget", distinct(map(budget, shared)))):
            table.rows.append([label, *[fact] * len(arms.models)])
    table.rows.append(["Machine"])
    every = [[r for r in arms.runs if r.model == model] for model in arms.models]
    row("hardware", [distinct(str(r.record.get("hardware", "")) for r in runs) for runs in every])
    row("source", [distinct(str(r.record.get("git", "")) for r in runs) for runs in every])
    row("software", [distinct(map(versions, runs)) for runs in every])
    return table


def checks(arms: Arms) -> list[Check]:
    """What must hold before the arms may be compared."""
    results: list[Check] = []
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
        if (r.get("after").get(part) == mark) == (part in r.learns)
    ]
    if wrong:
        results.append((False, f"Fingerprints contradict what learnt: {'; '.join(wrong)}."))
    elif frozen:
        results.append((True, "Parts that were frozen kept their fingerprints, parts that learnt changed theirs."))
    if unfinished := [r.name for r in arms.runs if r.state != "finished"]:
        return [*results, (False, f"Not finished: {'; '.join(unfinished)}.")]
    return [*results, (True, "Every run that was found is finished.")]


def equal_settings(arms: Arms) -> Check:
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


def equal_data(arms: Arms) -> Check:
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


def equal_machines(arms: Arms) -> Check:
    """Whether every stage ran on the same hardware, source and software in every arm; stages may differ."""
    facts = {"hardware": lambda r: r.record.get("hardware"), "source": lambda r: r.record.get("git")}
    facts["software"] = lambda r: sorted(r.get("versions").items())
    differ = []
    for name, fact in facts.items():
        stages = [s for s in STAGES[1:] if len({str(fact(r)) for r in arms.runs if r.model and r.stage == s}) > 1]
        differ += [f"{name} ({', '.join(stages)})"] if stages else []
    if differ:
        return False, f"The arms differ in {', '.join(differ)}: see the details of each run."
    return True, "Same hardware, source and software versions for every arm, stage by stage."


def details(run: RunDir) -> Table:
    """Everything run.json says about one run."""
    table = Table(["", ""], prose=True)
    add = table.rows.append
    add(["directory", str(run.path)])
    time = duration(run.record.get("wall_seconds"))
    add(["state", f"{run.state}, started {run.record.get('started', DASH)}, {time}"])
    add(["command", str(run.record.get("command", DASH))])
    parameters = run.record.get("parameters")
    if isinstance(parameters, dict):
        for part, n in parameters.items():
            before, after = run.get("before").get(part, DASH), run.get("after").get(part, DASH)
            role = "learnt" if part in run.learns else "frozen"
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


def progress(runs: list[RunDir], seeds: int) -> str:
    """ "finished, 2.1 min", or how many of the seeds got there."""
    if not runs:
        return "not run"
    done = [r for r in runs if r.state == "finished"]
    times = [seconds for r in done if is_number(seconds := r.record.get("wall_seconds"))]
    time = f", {duration(mean_sd(times)[0])}" if times else ""
    if len(done) >= seeds:
        return f"finished{time}"
    rest = distinct(r.state for r in runs if r.state != "finished")
    return f"{len(done)} of {seeds} finished{time}" + (f"; {rest}" if rest != DASH else "")


def learns(run: RunDir) -> str:
    return " + ".join(f"{part} ({number(run.get('parameters').get(part, DASH))})" for part in run.learns)


def budget(run: RunDir) -> str:
    """ "20,000 pairs × 3 epochs = 234 steps of 256", as far as the run says so."""
    units = [unit for unit in ("pairs", "conversations", "tokens") if unit in run.record]
    counts = [f"{number(run.record[unit])} {unit}" for unit in units]
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


def protocol(run: RunDir) -> str:
    """How the CLIP benchmarks of an evaluate run were made, as far as it says so."""
    few = as_dict(run.about.get("few_shot"))
    parts = [f"templates: {run.about['templates']}"] if "templates" in run.about else []
    if "linear_probe" in run.about:
        features = f"on features {run.about.get('probe_features')} the projection"
        parts.append(f"probe: {run.about['linear_probe']}, {features}")
    if few:
        parts.append(f"{few.get('way')}-way {few.get('shot')}-shot, {number(few.get('episodes'))} episodes")
    parts += [f"{name}: {note}" for name, note in as_dict(run.about.get("notes")).items()]
    return "; ".join([*parts, *([str(run.about["precision"])] if "precision" in run.about else [])])


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
