"""The directory that every stage writes: what was asked, what was read, how it ended, and the result.

config.yaml   resolved settings             metrics.json   final numbers
run.json      versions, seed, inputs, state  metrics.jsonl  a line per logged step
log.txt       what the console showed        checkpoint-*/  resume state, then the model itself

The state is "running" until a run is "finished", also if it was killed; "stopped" if it was told to stop early.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from diffclip.base.errors import InputError
from diffclip.base.files import append_jsonl, read_json, write_json
from stages.config import read_yaml, write_yaml

PACKAGES = [
    "diffclip-stack",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "open_clip_torch",
    "timm",
    "datasets",
    "peft",
    "lmms-eval",
    "numpy",
]
LONG_FILE = 1 << 28  # bytes
# What a start writes before its first step, beside run.json and config.yaml.
START_FILES = {"run.json", "config.yaml", "log.txt", "bad_samples.jsonl", "non_finite.jsonl", "runs"}
NOT_FINISHED = 3  # exit code of a stage that was told to stop before its end
COMPLETE = "complete"  # marker inside checkpoint-*/, written when everything else in it is on disk


class Run:
    """One stage's run directory.

    `Run(...)` raises InputError if the directory holds a run of other settings or other inputs, unless that run came to
    no step. Inputs are compared by content, wherever they lie now, and settings of a dataclass field whose metadata say
    `decides: False` not at all. Otherwise `run.finished` says whether there is nothing left to do, and
    `run.resume_from` names the last whole checkpoint.
    """

    def __init__(self, stage: str, config: Any, inputs: Mapping[str, str | Path]) -> None:
        """
        Args:
            stage: name shown in reports, e.g. "pretrain".
            config: the stage's dataclass; must have `output_dir` and `seed`.
            inputs: files and directories the result depends on, by role.
        """
        self.stage, self.config = stage, config
        self.path = Path(config.output_dir)
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        self.start = time.time()
        for role, path in inputs.items():
            if not str(path).startswith("hf:") and not Path(path).exists():
                raise InputError(f"{path}: no such file or directory (setting `{role}`)")
        self.record = {
            "stage": stage,
            "state": "running",
            "seed": config.seed,
            "command": " ".join(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "wall_seconds": 0.0,
            "inputs": {role: {"path": str(p), "digest": digest(p)} for role, p in inputs.items()},
        }
        if getattr(config, "deepspeed", ""):  # settings, not data, but in a file
            self.record["deepspeed"] = {"path": config.deepspeed, "digest": digest(config.deepspeed)}
        previous, other = self._previous()
        self.finished = previous is not None and previous["state"] == "finished"
        if previous and not self.finished:
            self.record["wall_seconds"] = previous["wall_seconds"]
        self._seconds_before = self.record["wall_seconds"]
        if self.finished:
            self.say(f"{stage}: {self.path} is finished, nothing to do")
            return
        self.record |= {  # takes a second or two, which a finished run should not
            "versions": {"python": platform.python_version(), **installed_versions()},
            "git": git_state(),
            "hardware": hardware(),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            if previous is None:
                for left in ("bad_samples.jsonl", "non_finite.jsonl"):  # by a start that came to no step
                    (self.path / left).unlink(missing_ok=True)
            write_yaml(config, self.path / "config.yaml")
            self._write_record()
        if other:
            self.say(f"{stage}: goes on with {', '.join(other)}, which decides nothing about the result")

    @property
    def resume_from(self) -> str | None:
        """The newest checkpoint that was written to its end, or None. Half-written ones are removed."""
        if self.is_main:
            for path in self.half_written():
                shutil.rmtree(path, ignore_errors=True)
        whole = [path.parent for path in self.path.glob(f"checkpoint-*/{COMPLETE}")]
        newest = max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)
        return None if newest is None else str(newest)

    def half_written(self) -> list[Path]:
        """Checkpoints whose writing did not come to its end."""
        return [path for path in self.path.glob("checkpoint-*") if not (path / COMPLETE).exists()]

    def say(self, line: str) -> None:
        """Print a line and keep it in log.txt (rank 0 only); what an encoding lacks is written as its escape."""
        if self.is_main:
            for encoding in ("utf-8", sys.stdout.encoding or "utf-8"):
                line = line.encode(encoding, errors="backslashreplace").decode(encoding)
            print(line, flush=True)
            if self.path.is_dir():
                with open(self.path / "log.txt", "a", encoding="utf-8") as f:
                    f.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def note(self, **facts: object) -> None:
        """Add facts to run.json, e.g. parameter counts and fingerprints."""
        self.record.update(facts)
        self._write_record()

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl (rank 0 only)."""
        if self.is_main:
            append_jsonl(self.path / "metrics.jsonl", [record])

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the final numbers, mark the run as finished, drop the resume state and leave the process group."""
        if self.is_main:
            write_json(self.path / "metrics.json", dict(metrics))
            self.record["state"] = "finished"
            self._write_record()
            for path in self.path.glob("checkpoint-*"):
                shutil.rmtree(path, ignore_errors=True)
            self.say(f"{self.stage}: finished in {self.record['wall_seconds']:.0f} s, wrote {self.path}")
        leave_process_group()

    def stop(self, step: int, steps: int) -> NoReturn:
        """End the process of a training that was told to stop at `step` of `steps`; its checkpoints stay."""
        if self.is_main:
            self.record["state"] = "stopped"
            self._write_record()
            self.say(
                f"{self.stage}: stopped at step {step} of {steps}, not finished; the same command goes on from "
                f"{self.resume_from or 'the start'}"
            )
        leave_process_group()
        raise SystemExit(NOT_FINISHED)

    def _write_record(self) -> None:
        if self.is_main:
            self.record["wall_seconds"] = round(self._seconds_before + time.time() - self.start, 1)
            write_json(self.path / "run.json", self.record)

    def _previous(self) -> tuple[dict[str, Any] | None, list[str]]:
        """run.json of an earlier start that this one goes on from, and what differs without deciding anything.

        Raises:
            InputError: an earlier start came to a step and had other settings or inputs.
        """
        if not (self.path / "run.json").is_file() or not (self.path / "config.yaml").is_file():
            return None, []
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}  # those are being written
        if names <= START_FILES:
            return None, []
        before = read_json(self.path / "run.json")
        settings, now = read_yaml(self.path / "config.yaml", type(self.config)), dataclasses.asdict(self.config)
        inputs_now, inputs_before = by_setting(self.record), by_setting(before)
        deciding, other = [], []
        for setting in dataclasses.fields(self.config):
            name = setting.name
            value, old = now[name], settings.get(name, now[name])
            if name in inputs_now and name in inputs_before:
                if contents(inputs_now[name]) != contents(inputs_before[name]):
                    deciding.append(f"{name} ({other_files(inputs_before[name], inputs_now[name])})")
                elif value != old:
                    other.append(f"{name} at {shown(value)}")
            elif value != old:
                decides = setting.metadata.get("decides", True) and name != "output_dir"
                (deciding if decides else other).append(f"{name} {shown(old)} -> {shown(value)}")
        if deciding:
            raise InputError(
                f"{self.path} holds a {before.get('state')} run made with other settings or inputs: "
                f"{', '.join(deciding)}; give the old ones again, choose another --output_dir, or delete this one"
            )
        return before, other


def end_with_pipeline() -> None:
    """If a pipeline started this process (DIFFCLIP_PIPELINE_PID), exit within a second of its death.

    The deepspeed launcher does not pass signals on, so without this a killed quickstart would train on unseen.
    Stages call it before their slow imports.
    """
    pid = os.environ.get("DIFFCLIP_PIPELINE_PID")
    if pid is None:
        return

    def watch() -> None:
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def by_setting(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, str]]]:
    """Files of run.json by the setting that names them: `data[0]` and `data[1]` are those of `data`."""
    result = {"deepspeed": [record["deepspeed"]]} if "deepspeed" in record else {}
    for role, entry in record["inputs"].items():
        result.setdefault(role.partition("[")[0], []).append(entry)
    return result


def contents(entries: list[Mapping[str, str]]) -> list[str]:
    """What entries of `inputs` hold, wherever they lie; of what is no local file (`hf:...`) its address counts."""
    return [entry["path"] if entry["path"].startswith("hf:") else entry["digest"] for entry in entries]


def other_files(before: list[Mapping[str, str]], now: list[Mapping[str, str]]) -> str:
    """In a few words, the first file in which the inputs of a setting differ, with digests."""
    least = min(len(before), len(now))
    number = next((i for i in range(least) if contents(before[i : i + 1]) != contents(now[i : i + 1])), least)
    told = [f"{one[number]['path']} {one[number]['digest']}" if number < len(one) else "none" for one in (before, now)]
    place = f"file {number + 1} of {len(before)}: " if max(len(before), len(now)) > 1 else ""
    return place + " -> ".join(told)


def shown(value: object) -> str:
    """A setting's value as a message shows it."""
    return json.dumps(value, ensure_ascii=False) if value == "" or isinstance(value, (list, dict)) else str(value)


def leave_process_group() -> None:
    """Let the ranks end together, if there are several."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def upstream_model(path: str | Path) -> str:
    """The model name that the run in `path` was made with, e.g. "DiffCLIP-tiny"; the folder's name elsewhere."""
    record = Path(path) / "run.json"
    if record.is_file():
        return read_json(record).get("model", Path(path).name)
    return Path(path).name


def digest(path: str | Path) -> str:
    """12 hex digits that change when the input changes.

    A file counts with its content, a long one (shards) with its size and three of its megabytes; a model directory
    with its weights; any other directory with the names and sizes of its files, so that large data folders take
    milliseconds.
    """
    path = Path(path)
    result = hashlib.sha256()
    if path.is_file():
        with open(path, "rb") as f:
            size = os.path.getsize(path)
            if size > LONG_FILE:
                result.update(str(size).encode())
                for start in (0, size // 2, size - (1 << 20)):
                    f.seek(start)
                    result.update(f.read(1 << 20))
                return result.hexdigest()[:12]
            result.update(hashlib.file_digest(f, "sha256").digest() if sys.version_info >= (3, 11) else f.read())
        return result.hexdigest()[:12]
    weights = sorted(path.glob("*.safetensors"))
    if weights:  # a model directory is its weights; logs and metrics beside them may change
        for file in weights:
            result.update(f"{file.name}{digest(file)}".encode())
        return result.hexdigest()[:12]
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            size = os.path.getsize(os.path.join(folder, name))
            result.update(f"{os.path.relpath(folder, path)}/{name}:{size}".encode())
    return result.hexdigest()[:12]


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers; those not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ImportError:
            continue
    return found


def git_state() -> str:
    """Commit of the source tree, with `+changes` if files differ from it; "" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def hardware() -> str:
    """The device in words, e.g. "4 x NVIDIA A100-SXM4-80GB" or "2 CPU cores"."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"
