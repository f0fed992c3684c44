"""What the paper does not measure: whether attention lies on the object, and what the runs cost."""

import itertools
import statistics
from typing import NamedTuple

from diffclip.base.schema import STAGES
from stages.report.cells import DASH, Table, duration, number, percent, score
from stages.report.data import Arms, RunDir, is_number
from stages.report.tables import difference_cells

LOCALISATION = {
    "pointing": "pointing game",
    "energy": "energy inside",
    "precision": "pixel average precision",
    "area": "area of the masks",  # the last: what a map of noise has
}


def localisation(arms: Arms) -> Table:
    """Do the patches that speak for a text lie on the object's mask?"""
    first, *others = arms.models
    table = Table(["", *arms.models], name="localisation", title="Localisation")
    for other in others:
        table.columns += [f"{other} − {first}", "95 % interval"]
    for name, label in LOCALISATION.items():
        key = f"localisation/{name}"
        cells = [score(arms, table, model, key) for model in arms.models]
        for other in others:  # the area is of the masks, not of a model
            cells += [DASH, DASH] if name == "area" else difference_cells(arms, table, first, other, key)[:2]
        table.rows.append([label, *cells])
    objects = {int(v) for m in arms.models for v in arms.written(m, "localisation/objects").values() if is_number(v)}
    counted = f" Over {' or '.join(f'{n:,}' for n in sorted(objects))} objects." if objects else ""
    table.caption = (
        "Percentages, higher is better: is the most relevant pixel inside the mask, how much of all relevance lies "
        "inside, and how well relevance ranks the pixels. A map of noise has the area of the masks in all three."
        + counted
    )
    return table


class Cost(NamedTuple):
    """What one stage of one model took, as means over its finished runs; None where the runs do not say."""

    model: str
    stage: str
    seconds: float | None
    runs: int
    seen: float | None  # images, conversations or texts in training
    rate: float | None  # of them a second
    energy: float | None  # kWh
    hardware: str


def costs(arms: Arms) -> list[Cost]:
    """Finished runs by model and stage; the shared language model stands first, under no model."""
    groups = [("", "language", [r for r in arms.runs if r.stage == "language"])]
    groups += [(model, stage, arms.latest(stage, model)) for model in arms.models for stage in STAGES[1:]]
    results = []
    for model, stage, runs in groups:
        done = [r for r in runs if r.state == "finished"]
        if done:
            seconds, seen, rate, energy = (_mean(values) for values in zip(*(_facts(r) for r in done)))
            hardware = ", ".join(dict.fromkeys(str(r.record.get("hardware", "")) for r in done))
            results.append(Cost(model, stage, seconds, len(done), seen, rate, energy, hardware))
    return results


def _facts(run: RunDir) -> tuple[float | None, ...]:
    """(seconds, samples seen, samples a second, kWh) of one run."""
    steps, batch = run.record.get("steps"), run.config.get("global_batch_size")
    seen = float(steps * batch) if is_number(steps) and is_number(batch) else None
    rates = [line["samples_per_second"] for line in run.curve if is_number(line.get("samples_per_second"))]
    seconds, energy = run.record.get("wall_seconds"), run.record.get("energy_kwh")
    rate = statistics.median(rates) if rates else None
    return (seconds if is_number(seconds) else None, seen, rate, energy if is_number(energy) else None)


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def cost(arms: Arms) -> Table:
    """Time, images and energy of every stage."""
    columns = ["", "runs", "time", "samples seen", "samples a second", "energy", "hardware"]
    table = Table(columns, name="cost", title="Cost")
    unknown = "no energy meter: run.json has no energy_kwh"
    for model, group in itertools.groupby(costs(arms), lambda stage: stage.model):
        stages = list(group)
        table.rows.append([model or "Shared by all models"])
        for c in stages:
            untrained = "evaluate trains nothing" if c.stage == "evaluate" else "metrics.jsonl or run.json do not say"
            seen, rate = (table.missing(untrained) if n is None else number(round(n)) for n in (c.seen, c.rate))
            energy = table.missing(unknown) if c.energy is None else f"{c.energy:.3g} kWh"
            table.rows.append([c.stage, str(c.runs), duration(c.seconds), seen, rate, energy, c.hardware or DASH])
        if len(stages) > 1:
            total = sum(c.seconds for c in stages if c.seconds is not None)
            table.rows.append(["all these stages", "", duration(total), "", "", "", ""])
    table.caption = (
        "Of finished runs, means over seeds. Samples are images in pretraining, conversations after it; their rate "
        "is the median of the log's, so without start-up and evaluation."
    )
    return table


def cost_verdict(arms: Arms) -> str:
    """How much longer the other models trained, in one sentence; "" if it cannot be said."""
    first, *others = arms.models
    seconds = {(c.model, c.stage): c.seconds for c in costs(arms) if c.stage != "evaluate" and c.seconds}
    sentences = []
    for other in others:
        stages = [s for s in STAGES[1:-1] if (first, s) in seconds and (other, s) in seconds]
        if stages:
            ratio = sum(seconds[other, s] for s in stages) / sum(seconds[first, s] for s in stages)
            word = "more" if ratio >= 1 else "less"
            more = percent([abs(100 * (ratio - 1))])
            sentences.append(f"{other} took {more} % {word} wall-clock time than {first} ({', '.join(stages)}).")
    return " ".join(sentences) + (" Other jobs on the machine are in these times." if sentences else "")
