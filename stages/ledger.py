"""What an earlier start of a run was made with, and whether this one may go on from it.

A setting decides the result of a run or it does not (metadata `decides` of `stages.settings`). What decides may change
only where the user says so: `--resume_with SETTING` for settings, `--data_changed accept` for inputs.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from diffclip.base import schema
from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_jsonl
from diffclip.base.schema import Input, RunRecord
from diffclip.base.sealed import damage
from stages.config import read_yaml
from stages.manifest import Manifest, differences, read_manifest
from stages.settings import MAY_CHANGE

# What a start writes before its first step, beside run.json and config.yaml.
START_FILES = {schema.RECORD, schema.CONFIG, schema.LOG, schema.BAD_SAMPLES, schema.NON_FINITE, schema.MANIFEST}
START_FILES |= {"runs", schema.LOGS, schema.CURVE, schema.BEST}  # tensorboard's; of a validation before the first step
ASKS = ("resume_with", "data_changed")  # settings that say what a start does with what has changed
RESULTS = ("checkpoint-*", "*.safetensors", schema.METRICS, schema.CURVE)  # by which a run is known


class Changes(NamedTuple):
    """What differs from the earlier start, each in a few words."""

    deciding: list[str]  # nobody has said that it may
    taken: list[str]  # deciding, and taken over since the user said so
    other: list[str]  # decides nothing about the result


def read_record(path: Path) -> dict[str, Any] | None:
    """run.json of a run directory, None if nothing has run there.

    InputError: it is damaged, or missing beside what only a run writes.
    """
    file = path / schema.RECORD
    remedy = "bring it back, choose another --output_dir, or delete this one"
    if not file.is_file():
        results = [found for pattern in RESULTS for found in path.glob(pattern)]
        if results:
            raise InputError(f"{path}: holds {results[0].name} but no {schema.RECORD}, which says what it is: {remedy}")
        return None
    try:
        record = read_json(file)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None
    if not isinstance(record, dict) or not isinstance(record.get("state"), str):
        raise InputError(f"{file}: is no record of a run; {remedy}")
    if wrong := schema.misfit(record, RunRecord):
        raise InputError(f"{file}: `{wrong}` is {repr(record[wrong])[:60]}, which no run writes there; {remedy}")
    return record


def came_to_a_step(path: Path) -> bool:
    """Whether an earlier start in this directory has left what is worth going on from."""
    names = {found.name for found in path.iterdir() if not found.name.startswith(".")}  # those are being written
    if not names <= START_FILES:
        return True
    curve = path / schema.CURVE
    lines = (line for _, line in read_jsonl(curve, damaged="skip")) if curve.is_file() else ()
    return any(isinstance(line, dict) and line.get("step") for line in lines)


def changes(path: Path, before: dict[str, Any], record: RunRecord, manifest: Manifest, config: Any) -> Changes:
    """How settings and inputs of now differ from those that the run in `path` has been made with."""
    now = dataclasses.asdict(config)
    settings = before.get("settings")
    if not isinstance(settings, dict):  # of an older version
        settings = read_yaml(path / schema.CONFIG, type(config)) if (path / schema.CONFIG).is_file() else now
    taken_over = getattr(config, "resume_with", [])
    accepted = getattr(config, "data_changed", "refuse") == "accept"
    inputs_now, inputs_before = by_setting(record), by_setting(before)
    manifest_before = read_manifest(path / schema.MANIFEST)
    found = Changes([], [], [])
    for field in dataclasses.fields(config):
        name = field.name
        if name in ASKS:
            continue
        value, old = now[name], settings.get(name, now[name])
        if isinstance(value, list) and isinstance(old, str):  # settings that took one value once
            old = [old]
        if name in inputs_now and name in inputs_before:
            harmful, harmless = differences(name, manifest_before, manifest)
            if not harmful and contents(inputs_now[name]) != contents(inputs_before[name]) and not harmless:
                harmful = other_files(inputs_before[name], inputs_now[name])
            if harmful:
                (found.taken if accepted or name in taken_over else found.deciding).append(f"{name} ({harmful})")
            if harmless:
                found.other.append(f"{name} ({harmless})")
            elif not harmful and value != old:
                found.other.append(f"{name} at {as_text(value)}")
        elif value != old:
            change = f"{name} {as_text(old)} -> {as_text(value)}"
            decides = field.metadata.get("decides", True) and name != "output_dir"
            (found.other if not decides else found.taken if name in taken_over else found.deciding).append(change)
    return found


def refuse(path: Path, before: dict[str, Any], deciding: list[str]) -> InputError:
    """What is said where something that decides the result has changed, and the ways out."""
    names = [change.partition(" ")[0] for change in deciding]
    ways = ["give the old ones again", "choose another --output_dir, or delete this one"]
    if before.get("state") == "finished":
        if "epochs" in names:
            flag = {"pretrain": "--init_from", "instruct": "--model"}.get(str(before.get("stage")), "")
            ways += [f"a finished run is trained further by {flag} {path} into another --output_dir"] if flag else []
    else:
        data = [name for name, change in zip(names, deciding) if change.startswith(f"{name} (")]
        settings = [name for name in names if name not in data and name in MAY_CHANGE]
        ways += [f"take the new ones over from here on by --resume_with {' '.join(settings)}"] if settings else []
        ways += ["go on with the data as they are now by --data_changed accept"] if data else []
    return InputError(
        f"{path} holds a {before.get('state')} run made with other settings or inputs: {', '.join(deciding)}; "
        f"{'; or '.join(ways)}"
    )


def check_run(path: str | Path) -> None:
    """InputError if `path` is a finished run of ours whose files are not what it has written."""
    path = Path(path)
    if not (path / schema.RECORD).is_file():
        return
    record = read_record(path) or {}
    if record.get("state") != "finished" or ("files" not in record and "id" not in record):  # of an older version
        return
    sealed = record.get("files")
    fault = damage(path, sealed) if isinstance(sealed, dict) else f"{schema.RECORD} no longer says what its files hold"
    if fault:
        raise InputError(
            f"{path}: {fault}: bring the file back, or train again in another --output_dir (`diffclip verify {path}` "
            "names all that is wrong; with --accept it takes the files as they are now)"
        )


def by_setting(record: Any) -> dict[str, list[Input]]:
    """Files of run.json by the setting that names them: `data[0]` and `data[1]` are those of `data`."""
    result: dict[str, list[Input]] = {"deepspeed": [record["deepspeed"]]} if "deepspeed" in record else {}
    for role, entry in record.get("inputs", {}).items():
        result.setdefault(role.partition("[")[0], []).append(entry)
    return result


def contents(entries: list[Input]) -> list[str]:
    """What entries of `inputs` hold, wherever they lie; of what is no local file (`hf:...`) its address counts."""
    return [entry["path"] if entry["path"].startswith("hf:") else entry["digest"] for entry in entries]


def other_files(before: list[Input], now: list[Input]) -> str:
    """In a few words, the first file in which the inputs of a setting differ, with digests."""
    least = min(len(before), len(now))
    number = next((i for i in range(least) if contents(before[i : i + 1]) != contents(now[i : i + 1])), least)
    files = [f"{e[number]['path']} {e[number]['digest']}" if number < len(e) else "none" for e in (before, now)]
    place = f"file {number + 1} of {len(before)}: " if max(len(before), len(now)) > 1 else ""
    return place + " -> ".join(files)


def as_text(value: object) -> str:
    """A setting's value as a message shows it."""
    return json.dumps(value, ensure_ascii=False) if value == "" or isinstance(value, (list, dict)) else str(value)
