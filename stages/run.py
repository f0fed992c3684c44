"""The directory that every stage writes: what was asked, what was read, how it ended, and the result.

Its files are listed in diffclip.base.schema. The state is "running" until a run is "finished", also if it was killed;
"stopped" if it was told to stop early.
"""

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from diffclip.base import schema
from diffclip.base.errors import InputError
from diffclip.base.files import append_jsonl, read_json, write_json
from diffclip.base.schema import Input, RunRecord
from stages.config import read_yaml, write_yaml
from stages.provenance import digest, git_state, hardware, installed_versions

# What a start writes before its first step, beside run.json and config.yaml.
START_FILES = {schema.RECORD, schema.CONFIG, schema.LOG, schema.BAD_SAMPLES, schema.NON_FINITE, "runs"}
KEPT = ("conversations", "rows")  # what run.json says about the data, to compare at a resume
NOT_FINISHED = 3  # exit code of a stage that was told to stop before its end


class Run:
    """One stage's run directory.

    `Run(...)` raises InputError if the directory holds a run of other settings or other inputs, unless that run came to
    no step. Inputs are compared by content, wherever they lie now, and settings of a dataclass field whose metadata say
    `decides: False` not at all. Otherwise `run.finished` says whether there is nothing left to do, and
    `run.resume_from` names the last whole checkpoint.
    """

    def __init__(self, stage: str, config: Any, inputs: Mapping[str, str | Path | list[str]]) -> None:
        """
        Args:
            stage: name shown in reports, e.g. "pretrain".
            config: the stage's dataclass; must have `output_dir` and `seed`.
            inputs: files and directories the result depends on, by setting; "" for none.
        """
        self.stage, self.config = stage, config
        self.path = Path(config.output_dir)
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        self.start = time.time()
        paths: dict[str, str] = {}
        for role, named in inputs.items():
            each = {f"{role}[{i}]": path for i, path in enumerate(named)} if isinstance(named, list) else {role: named}
            paths |= {key: str(path) for key, path in each.items() if path}
        for role, path in paths.items():
            if not path.startswith("hf:") and not Path(path).exists():
                raise InputError(f"{path}: no such file or directory (setting `{role}`)")
        self.record: RunRecord = {
            "stage": stage,
            "state": "running",
            "seed": config.seed,
            "command": " ".join(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "wall_seconds": 0.0,
            "inputs": {role: {"path": path, "digest": digest(path)} for role, path in paths.items()},
        }
        if getattr(config, "deepspeed", ""):  # settings, not data, but in a file
            self.record["deepspeed"] = {"path": config.deepspeed, "digest": digest(config.deepspeed)}
        previous, other = self._previous()
        self.finished = previous is not None and previous["state"] == "finished"
        if previous and not self.finished:
            self.record["wall_seconds"] = previous["wall_seconds"]
            kept = {name: previous[name] for name in KEPT if name in previous}  # until this start has found its own
            self.record |= cast(RunRecord, kept)
        self._seconds_before = self.record["wall_seconds"]
        if self.finished:
            self.log(f"{stage}: {self.path} is finished, nothing to do")
            return
        self.record |= {  # takes a second or two, which a finished run should not
            "versions": {"python": platform.python_version(), **installed_versions()},
            "git": git_state(),
            "hardware": hardware(),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            if previous is None:
                for left in (schema.BAD_SAMPLES, schema.NON_FINITE):  # by a start that came to no step
                    (self.path / left).unlink(missing_ok=True)
            write_yaml(config, self.path / schema.CONFIG)
            self._write_record()
        if other:
            self.log(f"{stage}: goes on with {', '.join(other)}, which decides nothing about the result")

    @property
    def resume_from(self) -> str | None:
        """The newest checkpoint that was written to its end, or None. Half-written ones are removed."""
        if self.is_main:
            for path in self.half_written():
                shutil.rmtree(path, ignore_errors=True)
        whole = [str(path.parent) for path in self.path.glob(f"{schema.CHECKPOINTS}/{schema.COMPLETE}")]
        return max(whole, key=lambda path: int(path.rpartition("-")[2]), default=None)

    def half_written(self) -> list[Path]:
        """Checkpoints whose writing did not come to its end."""
        return [path for path in self.path.glob(schema.CHECKPOINTS) if not (path / schema.COMPLETE).exists()]

    def log(self, line: str) -> None:
        """Print a line and keep it in log.txt (rank 0 only); what an encoding lacks is written as its escape."""
        if self.is_main:
            for encoding in ("utf-8", sys.stdout.encoding or "utf-8"):
                line = line.encode(encoding, errors="backslashreplace").decode(encoding)
            print(line, flush=True)
            if self.path.is_dir():
                with open(self.path / schema.LOG, "a", encoding="utf-8") as f:
                    f.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def note(self, **facts: object) -> None:
        """Add facts to run.json, e.g. parameter counts and fingerprints."""
        self.record.update(cast(RunRecord, facts))
        self._write_record()

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl (rank 0 only)."""
        if self.is_main:
            append_jsonl(self.path / schema.CURVE, [record])

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the final numbers, mark the run as finished, drop the resume state and leave the process group."""
        if self.is_main:
            write_json(self.path / schema.METRICS, dict(metrics))
            self.record["state"] = "finished"
            self._write_record()
            for path in self.path.glob(schema.CHECKPOINTS):
                shutil.rmtree(path, ignore_errors=True)
            self.log(f"{self.stage}: finished in {self.record['wall_seconds']:.0f} s, wrote {self.path}")
        leave_process_group()

    def stop(self, step: int, steps: int) -> NoReturn:
        """End the process of a training that was told to stop at `step` of `steps`; its checkpoints stay."""
        if self.is_main:
            self.record["state"] = "stopped"
            self._write_record()
            self.log(
                f"{self.stage}: stopped at step {step} of {steps}, not finished; the same command goes on from "
                f"{self.resume_from or 'the start'}"
            )
        leave_process_group()
        raise SystemExit(NOT_FINISHED)

    def _write_record(self) -> None:
        if self.is_main:
            self.record["wall_seconds"] = round(self._seconds_before + time.time() - self.start, 1)
            write_json(self.path / schema.RECORD, self.record)

    def _previous(self) -> tuple[dict[str, Any] | None, list[str]]:
        """run.json of an earlier start that this one goes on from, and what differs without deciding anything.

        Raises:
            InputError: an earlier start came to a step and had other settings or inputs.
        """
        if not (self.path / schema.RECORD).is_file() or not (self.path / schema.CONFIG).is_file():
            return None, []
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}  # those are being written
        if names <= START_FILES:
            return None, []
        before = read_json(self.path / schema.RECORD)
        settings, now = read_yaml(self.path / schema.CONFIG, type(self.config)), dataclasses.asdict(self.config)
        inputs_now, inputs_before = by_setting(self.record), by_setting(before)
        deciding, other = [], []
        for setting in dataclasses.fields(self.config):
            name = setting.name
            value, old = now[name], settings.get(name, now[name])
            if name in inputs_now and name in inputs_before:
                if contents(inputs_now[name]) != contents(inputs_before[name]):
                    deciding.append(f"{name} ({other_files(inputs_before[name], inputs_now[name])})")
                elif value != old:
                    other.append(f"{name} at {as_text(value)}")
            elif value != old:
                decides = setting.metadata.get("decides", True) and name != "output_dir"
                (deciding if decides else other).append(f"{name} {as_text(old)} -> {as_text(value)}")
        if deciding:
            raise InputError(
                f"{self.path} holds a {before.get('state')} run made with other settings or inputs: "
                f"{', '.join(deciding)}; give the old ones again, choose another --output_dir, or delete this one"
            )
        return before, other


def by_setting(record: RunRecord) -> dict[str, list[Input]]:
    """Files of run.json by the setting that names them: `data[0]` and `data[1]` are those of `data`."""
    result: dict[str, list[Input]] = {"deepspeed": [record["deepspeed"]]} if "deepspeed" in record else {}
    for role, entry in record["inputs"].items():
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


def leave_process_group() -> None:
    """Let the ranks end together, if there are several."""
    import torch.distributed as dist  # not at the top: a finished run answers without torch

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
