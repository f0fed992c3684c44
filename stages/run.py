"""The directory that every stage writes: what was asked, what was read, how it ended, and the result.

config.yaml   resolved settings             metrics.json   final numbers
run.json      versions, seed, inputs, state  metrics.jsonl  a line per logged step
log.txt       what the console showed        checkpoint-*/  resume state, then the model itself
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
from typing import Any

from diffclip.errors import InputError
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
COMPLETE = "complete"  # marker inside checkpoint-*/, written when everything else in it is on disk


class Run:
    """One stage's run directory.

    `Run(...)` raises InputError if the directory holds a run of other settings or other inputs. Otherwise
    `run.finished` says whether there is nothing left to do, and `run.resume_from` names the last whole checkpoint.
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
        previous = self._previous()
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
            write_yaml(config, self.path / "config.yaml")
            self._write_record()

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
        """Print a line and keep it in log.txt (rank 0 only)."""
        if self.is_main:
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
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the final numbers, mark the run as finished, drop the resume state and leave the process group."""
        if self.is_main:
            write_json(self.path / "metrics.json", dict(metrics))
            self.record["state"] = "finished"
            self._write_record()
            for path in self.path.glob("checkpoint-*"):
                shutil.rmtree(path)
            self.say(f"{self.stage}: finished in {self.record['wall_seconds']:.0f} s, wrote {self.path}")
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def _write_record(self) -> None:
        if self.is_main:
            self.record["wall_seconds"] = round(self._seconds_before + time.time() - self.start, 1)
            write_json(self.path / "run.json", self.record)

    def _previous(self) -> dict[str, Any] | None:
        """run.json of an earlier start with equal settings and inputs; InputError if they differ."""
        if not (self.path / "run.json").is_file() or not (self.path / "config.yaml").is_file():
            return None
        before = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        settings = read_yaml(self.path / "config.yaml", type(self.config))
        now = dataclasses.asdict(self.config)
        decides_nothing = {"output_dir", "dry_run", "hardware", "samples"}
        changed = sorted(k for k in now if k not in decides_nothing and settings.get(k, now[k]) != now[k])
        changed += sorted(
            role
            for role, entry in self.record["inputs"].items()
            if before["inputs"].get(role, entry)["digest"] != entry["digest"]
        )
        if changed:
            raise InputError(
                f"{self.path} holds a {before['state']} run made with another {', '.join(changed)}; "
                "choose another --output_dir or delete it"
            )
        return before


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


def upstream_model(path: str | Path) -> str:
    """The model name that the run in `path` was made with, e.g. "DiffCLIP-tiny"; the folder's name elsewhere."""
    record = Path(path) / "run.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8")).get("model", Path(path).name)
    return Path(path).name


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a crash leaves either the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


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
