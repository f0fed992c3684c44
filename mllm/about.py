"""A run in a few words, for people who look at what it answers: its name, and what it was trained on."""

import os
from pathlib import Path
from typing import Any

from diffclip.base.errors import InputError
from diffclip.base.files import read_json
from diffclip.base.schema import RECORD


def name_of(run: str) -> str:
    """The last parts of a run's path that tell it from others ("clip/instruct"), or a Hub id."""
    return "/".join(Path(os.path.realpath(run)).parts[-2:]).lstrip("/") if Path(run).exists() else run


def trained_on(run: str) -> str:
    """What a run and those before it learnt from, by their run.json; as far as it is known.

    One phrase a stage: "instruct: 1,200 conversations of instruct.json, 75 steps, seed 0".
    """
    phrases: list[str] = []
    models: list[str] = []
    seen: set[str] = set()
    place: Path | None = Path(run)
    while place and os.path.realpath(place) not in seen and "stage" in (record := _record(place)):
        seen.add(os.path.realpath(place))
        phrases.append(_phrase(record))
        inputs = _paths(record)
        place = next((Path(inputs[role]) for role in ("model", "vision_tower") if inputs.get(role)), None)
        models += [record["model"]] if isinstance(record.get("model"), str) else []
    if not phrases:
        return "no run.json says what it was trained on"
    return "; ".join([*models[:1], *phrases])


def _record(place: Path) -> dict[str, Any]:
    try:
        record = read_json(place / RECORD)
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


def _paths(record: dict[str, Any]) -> dict[str, str]:
    """Where each input lay, by setting."""
    inputs = record.get("inputs")
    given = inputs.items() if isinstance(inputs, dict) else ()
    return {role: str(value["path"]) for role, value in given if isinstance(value, dict) and "path" in value}


def _phrase(record: dict[str, Any]) -> str:
    """One stage: how much of which files."""
    counts = [f"{record[what]:,} {what}" for what in ("conversations", "pairs") if isinstance(record.get(what), int)]
    data = [Path(path).name for role, path in _paths(record).items() if role.split("[")[0] in ("data", "train_data")]
    learnt = " ".join([*counts[:1], *([f"of {', '.join(data[:3])}"] if data else [])])
    steps = [f"{record['steps']:,} steps"] if isinstance(record.get("steps"), int) else []
    seed = [f"seed {record['seed']}"] if isinstance(record.get("seed"), int) else []
    return f"{record.get('stage', 'run')}: {', '.join([*([learnt] if learnt else []), *steps, *seed])}"
