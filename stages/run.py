"""The directory that every stage writes: what was asked, what was read, how it ended, and the result.

Its files are listed in diffclip.base.schema. The state is "running" until a run is "finished", also if it was killed;
"stopped" if it was told to stop early. One process writes in it at a time (diffclip.base.lock), a checkpoint counts
once it is sealed, and what a finished run has written is sealed in run.json (diffclip.base.sealed).
"""

import dataclasses
import os
import platform
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast

from diffclip.base import lock, schema
from diffclip.base.errors import InputError, where
from diffclip.base.files import append, append_jsonl, read_json, read_text, share, write_json
from diffclip.base.images import DECODING
from diffclip.base.lines import print_line, printable
from diffclip.base.orphans import end_with_parents
from diffclip.base.ranks import from_main, gather, join_slurm, keep_errors, rank, world
from diffclip.base.schema import RunRecord
from diffclip.base.sealed import damage, files_of, seal
from stages import ledger
from stages.config import write_yaml
from stages.manifest import Manifest, folder_manifest, write_manifest
from stages.provenance import digest, git_state, hardware, installed_versions

KEPT = ("id", "taken_over", "conversations", "rows")  # of run.json, over all starts
NOT_FINISHED = 3  # exit code of a stage that was told to stop before its end
SEEN_WITHIN = 20  # seconds, in which a file of rank 0 is to show on the other hosts
UNSEALED = {schema.RECORD, schema.LOG, schema.CURVE, schema.BAD_SAMPLES, schema.NON_FINITE, schema.MODEL_CARD}
LONGEST = 3600  # seconds for which rank 0 waits for the others' parts of a checkpoint
SEALER = ThreadPoolExecutor(1)  # its thread begins with the first checkpoint


class Run:
    """One stage's run directory; `with Run(...) as run:` gives its lock back at the end.

    `Run(...)` raises InputError if the directory holds a run of other settings or other inputs, unless that run came to
    no step. Inputs are compared by content, wherever they lie now, and settings of a dataclass field whose metadata say
    `decides: False` not at all. Otherwise `run.finished` says whether there is nothing left to do, and
    `run.checkpoint()` names what to go on from. Rank 0 decides all of it, for all ranks.
    """

    def __init__(
        self,
        stage: str,
        config: Any,
        inputs: Mapping[str, str | Path | list[str]],
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            stage: name shown in reports, e.g. "pretrain".
            config: the stage's dataclass; must have `output_dir` and `seed`.
            inputs: files and directories the result depends on, by setting; "" for none.
            digests: of inputs that are not read for it, by role, e.g. "train_data[0]": their paths are only recorded.
        """
        join_slurm()
        self.digests = dict(digests or {})
        end_with_parents()
        self.stage, self.config = stage, config
        self.path = Path(config.output_dir)
        self.is_main = rank() == 0
        self.start = time.time()
        self._sealing: Future | None = None
        self.seconds_before = 0.0
        self.fresh = False  # whether nothing of an earlier start is in the directory
        paths: dict[str, str] = {}
        for role, named in inputs.items():
            each = {f"{role}[{i}]": path for i, path in enumerate(named)} if isinstance(named, list) else {role: named}
            paths |= {key: str(path) for key, path in each.items() if path}
        for role, path in paths.items():
            if role not in self.digests and not path.startswith("hf:") and not Path(path).exists():
                raise InputError(f"{path}: no such file or directory (setting `{role}`)")
        self.record: RunRecord = {
            "stage": stage,
            "state": "running",
            "seed": config.seed,
            "decoding": DECODING,
            "command": " ".join(sys.argv),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "wall_seconds": 0.0,
            "settings": dataclasses.asdict(config),
        }
        told = from_main(lambda: self._claim(paths))
        self.finished, self.record["decoding"] = told["finished"], told["decoding"]
        if world() > 1 and not self.finished:
            self._see(told["id"])

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.is_main:
            with suppress(OSError):  # what it was about has a fault of its own
                self.sealed()
            if kind and self.fresh and not ledger.came_to_a_step(self.path):
                self._leave_nothing()
            lock.release(self.path)
            with suppress(OSError):  # it holds something, or has gone
                self.path.rmdir()

    def _leave_nothing(self) -> None:
        """Remove what a start that came to no step has written, but for the names of bad samples."""
        shutil.rmtree(self.path / "runs", ignore_errors=True)
        for name in (schema.RECORD, schema.CONFIG, schema.LOG, schema.MANIFEST):
            (self.path / name).unlink(missing_ok=True)

    def _claim(self, paths: Mapping[str, str]) -> dict[str, Any]:
        """Rank 0: compare with what is there, take the directory, and write down what this run is."""
        before = ledger.read_record(self.path)
        finished = before is not None and before["state"] == "finished"
        if not finished:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock.hold(self.path)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written into ({error.strerror}); choose another") from None
            before = ledger.read_record(self.path)  # now that nobody else writes it
        for path in paths.values():
            ledger.check_run(path)
        self.record["inputs"] = {
            role: {"path": path, "digest": self.digests.get(role) or digest(path)} for role, path in paths.items()
        }
        if getattr(self.config, "deepspeed", ""):  # settings, not data, but in a file
            self.record["deepspeed"] = {"path": self.config.deepspeed, "digest": digest(self.config.deepspeed)}
        manifest = self._manifest(paths)
        found = ledger.Changes([], [], [])
        if before and (finished or ledger.came_to_a_step(self.path)):
            found = ledger.changes(self.path, before, self.record, manifest, self.config)
            if found.deciding:
                raise ledger.refuse(self.path, before, found.deciding)
        else:
            before = None
        if finished and before:
            ledger.check_run(self.path)
            self.log(f"{self.stage}: {self.path} is finished, nothing to do")
            return {"finished": True, "id": before.get("id", ""), "decoding": before.get("decoding", 1)}
        if before:
            self.seconds_before = float(before.get("wall_seconds", 0))
            self.record |= cast(RunRecord, {name: before[name] for name in KEPT if name in before})
            self.record["decoding"] = before.get("decoding", 1)  # images stay as they were
        else:
            self.fresh = True
            for left in (schema.BAD_SAMPLES, schema.NON_FINITE, schema.CURVE):  # by a start that came to no step
                (self.path / left).unlink(missing_ok=True)
        if found.taken:
            self.record["taken_over"] = [*self.record.get("taken_over", []), *found.taken]
        self.record.setdefault("id", uuid.uuid4().hex)
        self.record |= {  # takes a second or two, which a finished run should not
            "versions": {"python": platform.python_version(), **installed_versions()},
            "git": git_state(),
            "hardware": hardware(),
            "ranks": world(),
        }
        if job := os.environ.get("SLURM_JOB_ID"):
            self.record["job"] = job
        write_yaml(self.config, self.path / schema.CONFIG)
        write_manifest(self.path / schema.MANIFEST, manifest)
        self._write_record()
        if found.taken:
            self.log(f"{self.stage}: goes on with {', '.join(found.taken)}, as it was told to")
        if found.other:
            self.log(f"{self.stage}: goes on with {', '.join(found.other)}, which decides nothing about the result")
        return {"finished": False, "id": self.record["id"], "decoding": self.record["decoding"]}

    def _manifest(self, paths: Mapping[str, str]) -> Manifest:
        """What the folders of data hold, file by file; models are compared by their weights."""
        if not hasattr(self.config, "resume_with"):  # of an evaluation's data, which may be a million images
            return {}
        folders = {r: path for r, path in paths.items() if r not in self.digests and Path(path).is_dir()}
        data = {role: path for role, path in folders.items() if not any(Path(path).glob("*.safetensors"))}
        return {role: folder_manifest(path) for role, path in data.items()}

    def _see(self, identity: str) -> None:
        """InputError on every rank if one of them sees another directory than rank 0, as on a disk of its own."""
        hosts = gather(socket.gethostname())
        patience = time.time() + (SEEN_WITHIN if len({*hosts}) > 1 else 0)  # network disks show new files late
        while not (seen := self._holds(identity)) and time.time() < patience:
            time.sleep(0.5)
        blind = [host for host in gather("" if seen else where()) if host]
        if blind:
            raise InputError(
                f"{self.path}: {blind[0]} does not see what rank 0 on {hosts[0]} writes there: every host must see the "
                "same --output_dir, so choose one on a shared file system"
            )
        devices = gather(hardware())
        if self.is_main:
            self.note(hosts=dict(zip(hosts, devices)))
        keep_errors(self.path / schema.LOGS / f"rank-{rank()}.txt")

    def _holds(self, identity: str) -> bool:
        file = self.path / schema.RECORD
        return file.is_file() and read_json(file).get("id") == identity

    @property
    def resume_from(self) -> str | None:
        """The newest checkpoint that was written to its end, or None."""
        self.sealed()
        whole = [str(path.parent) for path in self.path.glob(f"{schema.CHECKPOINTS}/{schema.COMPLETE}")]
        return max(whole, key=step_of, default=None)

    def checkpoint(self) -> str | None:
        """The newest whole checkpoint, for all ranks: each of its files is what was written.

        Half-written ones are removed; a damaged one is renamed to broken-checkpoint-N, and the one before it taken.
        """
        return from_main(self._whole_checkpoint)

    def _whole_checkpoint(self) -> str | None:
        for path in self.half_written():
            shutil.rmtree(path, ignore_errors=True)
        while newest := self.resume_from:
            if not (fault := self._fault(Path(newest))):
                return newest
            broken = self.path / f"broken-{Path(newest).name}"
            shutil.rmtree(broken, ignore_errors=True)
            Path(newest).rename(broken)
            self.log(
                f"{self.stage}: {newest} is not what was written ({fault}): it is {broken.name} now; "
                f"the one before it is taken: {self.resume_from or 'none, so training begins anew'}"
            )
        return None

    def _fault(self, checkpoint: Path) -> str:
        """Why a checkpoint cannot be gone on from, or ""."""
        marker = checkpoint / schema.COMPLETE
        if not marker.stat().st_size:  # of an older version, which sealed nothing
            return ""
        try:
            sealed = read_json(marker)
            files, owner = sealed["files"], sealed["run"]
        except (InputError, KeyError, TypeError):
            return f"{schema.COMPLETE} is damaged"
        if owner != self.record.get("id"):
            return "it is another run's"
        return damage(checkpoint, files)

    def seal_checkpoint(self, step: int) -> None:
        """Say that a checkpoint is written to its end, and what its files hold; in the background, since reading them
        takes a second for each gigabyte. `sealed` waits for it.
        """
        self.sealed()
        folder = self.path / f"checkpoint-{step}"
        self._sealing = SEALER.submit(self._seal, folder)

    def _seal(self, folder: Path) -> None:
        _wait_for_parts(folder)
        files = seal(folder, (file for file in files_of(folder) if file.name != schema.COMPLETE))
        write_json(folder / schema.COMPLETE, {"run": self.record.get("id"), "files": files})

    def sealed(self) -> None:
        """Wait until the newest checkpoint counts."""
        if self._sealing:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def half_written(self) -> list[Path]:
        """Checkpoints whose writing did not come to its end."""
        return [path for path in self.path.glob(schema.CHECKPOINTS) if not (path / schema.COMPLETE).exists()]

    def log(self, line: str) -> None:
        """Print a line and keep it in log.txt (rank 0 only), as `printable` has it."""
        if self.is_main:
            print_line(line)
            if self.path.is_dir() and os.access(self.path, os.W_OK):
                append(self.path / schema.LOG, f"{time.strftime('%H:%M:%S')} {printable(line)}\n")

    def note(self, **facts: object) -> None:
        """Add facts to run.json, e.g. parameter counts and fingerprints."""
        self.record.update(cast(RunRecord, facts))
        self._write_record()

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl (rank 0 only)."""
        if self.is_main:
            append_jsonl(self.path / schema.CURVE, [record])

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the final numbers, seal the result, mark the run as finished, drop the resume state and leave the
        process group.
        """
        if self.is_main:
            self.sealed()
            write_json(self.path / schema.METRICS, dict(metrics))
            for file in (files := results(self.path)):
                share(file)  # safetensors writes for its owner alone
            self.record["files"] = seal(self.path, files)
            self.record["state"] = "finished"
            self._write_record()
            for path in (*self.path.glob(schema.CHECKPOINTS), *self.path.glob(f"broken-{schema.CHECKPOINTS}")):
                shutil.rmtree(path, ignore_errors=True)
            self.log(f"{self.stage}: finished in {self.record['wall_seconds']:.0f} s, wrote {self.path}")
        leave_process_group()

    def stop(self, step: int, steps: int) -> NoReturn:
        """End the process of a training that was told to stop at `step` of `steps`; its checkpoints stay."""
        if self.is_main:
            self.sealed()
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
            self.record["wall_seconds"] = round(self.seconds_before + time.time() - self.start, 1)
            write_json(self.path / schema.RECORD, self.record)


def _wait_for_parts(checkpoint: Path) -> None:
    """Until all ranks have written what they write in the background; InputError for one that cannot."""
    deadline = time.monotonic() + LONGEST
    while marks := sorted(checkpoint.glob(f"{schema.WRITING}*")):
        for mark in marks:
            if mark.is_file() and (fault := read_text(mark)):
                raise InputError(f"{checkpoint}: {fault}: make room, and give the command again")
        if time.monotonic() > deadline:
            raise InputError(f"{checkpoint}: {marks[0].name} is there after {LONGEST} s: look at what its rank says")
        time.sleep(0.05)


def results(path: Path) -> list[Path]:
    """The files of a run directory that are its result: no logs, no resume state, nothing that a person may edit."""
    found = (file for file in files_of(path) if file.name not in UNSEALED or file.parent != path)
    passing = ("runs", schema.LOGS, "checkpoint-", "broken-checkpoint-")
    return [file for file in found if not file.relative_to(path).parts[0].startswith(passing)]


def step_of(checkpoint: str) -> int:
    """The step in the name of a checkpoint; -1 where there is none."""
    number = checkpoint.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def leave_process_group() -> None:
    """Let the ranks end together, if there are several."""
    if world() == 1 and "torch" not in sys.modules:
        return
    import torch.distributed as dist  # not at the top: a finished run answers without torch

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
