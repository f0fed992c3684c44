"""Cases in forked children, which may take so much time and memory and write into their output folder alone.

What commands import once they know what is asked is imported here, before the children part.
"""
# ruff: noqa: F401

import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import cases
import matplotlib.pyplot
import torchvision
import transformers.models.auto

import diffclip.benchmarks.evaluate
import diffclip.benchmarks.localisation
import diffclip.checkpoints
import diffclip.data.check
import diffclip.data.shards
import mllm.answer_file
import mllm.data.__main__
import mllm.data.report
import mllm.model
import mllm.pope.__main__
import mllm.pope.chair
import stages.pretraining
import stages.publish
import stages.report.__main__
import stages.report.build
import stages.report.figures
import stages.run
import stages.verify
from diffclip.base.errors import exit_on_input_error

BATCH = 250  # cases of a child
SECONDS, WAITING, MEMORY = 10, 60, 2 << 30  # of a CPU, of a clock (the machine may be busy), bytes beyond the start
CACHES = ("DIFFCLIP_CACHE", "HF_DATASETS_CACHE", "HF_HOME", "MPLCONFIGDIR")
CODES = (None, 0, 1, 2)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.symlink": 2, "os.link": 2}
CHANGES |= {"os.truncate": 1, "os.chmod": 1}
HARMLESS = ("fc-list", "git")  # of matplotlib, for fonts; of records of runs
IN_FOLDER = ("os.remove", "os.mkdir", "os.rmdir", "os.rename", "os.link")  # whose last arguments are open folders
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")


class Ended(NamedTuple):
    """A case that is as it should be: how it ended, after how many seconds of a CPU."""

    name: str
    how: str
    seconds: float


class Fault(NamedTuple):
    """A case that did what none may: `repeat` is the command that does it again."""

    number: int
    name: str
    told: str
    what: str
    repeat: str


def run(valid: Path, numbers: Sequence[int], seed: int, only: str = "", keep: bool = False) -> Iterator[Fault | Ended]:
    """The fault of each case that has one, and for each other how it ended; the files of kept cases stay.

    Args:
        valid: what `samples.make` wrote, which is left as it is.
    """
    left = list(numbers)
    place = Path(tempfile.mkdtemp(prefix="diffclip-fuzz-"))
    try:
        while left:
            batch, told = left[:BATCH], place / "told"
            told.touch()
            child = os.fork()
            if not child:
                _child(valid, batch, seed, only, place, told)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            entries = [json.loads(line) for line in told.read_text().splitlines()]
            told.unlink()
            ended = {entry["number"]: entry for entry in entries if "what" in entry}
            begun = {entry["number"]: entry for entry in entries if "what" not in entry}
            for number in batch:
                entry = ended.get(number) or begun.get(number)
                if entry is None:
                    break  # the child died before
                left.remove(number)
                died = f"the process ended ({_signal(status)})\n{_tail(place / f'{number}.log')}"
                what = entry.get("what", died)
                if what.startswith("ended"):
                    yield Ended(entry["name"], what, entry["seconds"])
                else:
                    repeat = f"python tests/fuzz --seed {seed} --case {number}{f' --only {only!r}' if only else ''}"
                    yield Fault(number, entry["name"], entry["told"], what, repeat)
                if not keep:
                    (place / f"{number}.log").unlink(missing_ok=True)
                    shutil.rmtree(place / str(number), ignore_errors=True)
            else:
                continue
            if number == batch[0]:
                log = _tail(place / f"{number}.log")
                raise RuntimeError(f"case {number} was not begun ({_signal(status)})\n{log}")
    finally:
        if keep:
            print(f"files: {place}")
        else:
            shutil.rmtree(place, ignore_errors=True)


def check_samples(valid: Path) -> None:
    """RuntimeError if a target fails on what is not spoilt. What a process makes once is then made before it forks."""
    for name in cases.TARGETS:
        with tempfile.TemporaryDirectory(prefix="diffclip-fuzz-") as place:
            (Path(place) / "out").mkdir()
            argv = cases.laid_out(name, valid, Path(place))
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                how = _tried(cases.Case(name, "", partial(cases.done, cases.TARGETS[name], argv, Path(place))))
            if how not in ("ended with 0", "ended with None"):
                raise RuntimeError(f"{name}, not spoilt, {how}: {said.getvalue()[-2000:]}")


def run_part(given: tuple[Path, Sequence[int], int, str]) -> list[Fault | Ended]:
    """`run` in a process of a pool."""
    return list(run(*given))


def _child(valid: Path, batch: list[int], seed: int, only: str, place: Path, told: Path) -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            most = int(f.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        watch = Watch()
        sys.addaudithook(watch)
        stages.run.SEALER = ThreadPoolExecutor(1)  # its thread has stayed behind
        diffclip.data.shards.CACHE_FROM = 0
        with open(told, "a", buffering=1) as out:
            for number in batch:
                log = os.open(place / f"{number}.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.close(log)
                folder = place / str(number)
                (place / "tmp").mkdir(exist_ok=True)
                tempfile.tempdir = os.environ["TMPDIR"] = str(place / "tmp")
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    case = cases.draw(Random(f"{seed}:{number}"), valid, folder, only)
                except Exception:
                    entry = {"number": number, "name": "the fuzzer", "told": "", "what": traceback.format_exc()}
                    out.write(json.dumps(entry) + "\n")
                    continue
                entry = {"number": number, "name": case.name, "told": case.told}
                out.write(json.dumps(entry) + "\n")
                watch.begin(case, folder, place / "tmp")
                start = time.process_time()
                what = _tried(case)
                entry["seconds"] = time.process_time() - start
                faults = watch.end()
                text = _tail(place / f"{number}.log", 20_000)
                if what.startswith("ended") and "Traceback (most recent call last)" in text:
                    faults.append(f"a traceback was printed: {text[-2000:]}")
                if what.startswith("ended") and (folder / "planted").exists():
                    faults.append("planted code ran")
                out.write(json.dumps({**entry, "what": "\n".join(faults) if faults else what}) + "\n")
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def _tried(case: cases.Case) -> str:
    """How a case ended: "ended with …", or what is wrong with that."""
    faulthandler.register(signal.SIGPROF, 2, chain=True)
    faulthandler.register(signal.SIGALRM, 2, chain=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    try:
        with exit_on_input_error():
            code: Any = case.work()
    except SystemExit as error:
        code = error.code
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()
    return f"ended with {code}" if code in CODES else f"exit code {code!r}"


class Watch:
    """An audit hook: what is written outside of the output folder, which programs and connections are begun."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.found: list[str] = []

    def begin(self, case: cases.Case, folder: Path, temporary: Path) -> None:
        self.found = []
        own = ["runs"] if case.name in cases.TARGETS and cases.TARGETS[case.name].own else []
        caches = [os.environ[name] for name in CACHES if name in os.environ]
        self.allowed = tuple(map(str, (folder / "out", temporary, "/dev", "/proc", *caches)))
        self.allowed += tuple(str(folder / "in" / each) for each in own)

    def end(self) -> list[str]:
        self.allowed = None
        return self.found

    def __call__(self, event: str, given: tuple) -> None:
        if self.allowed is None:
            return
        if event == "open":
            path, _, flags = given
            if isinstance(path, int) or not (flags or 0) & WRITES:
                return
            paths = [path]
        elif event in CHANGES:
            count = CHANGES[event]
            paths, folders = given[:count], given[-count:] if event in IN_FOLDER else [-1, -1]
            paths = [
                os.path.join(_named(fd), os.fsdecode(path))
                for path, fd in zip(paths, folders)
                if not isinstance(path, int)
            ]
            if event in ("os.symlink", "os.link"):
                paths = paths[1:]
        elif event in PROGRAMS:
            if not str(given[0]).startswith(HARMLESS):
                self.found.append(f"{event} {str(given)[:300]}")
            return
        else:
            return
        for path in map(os.fsdecode, paths):
            if path and not os.path.abspath(path).startswith(self.allowed):
                where = "".join(traceback.format_stack(sys._getframe(1), 6))
                self.found.append(f"{event} outside of the output folder: {path}\n{where}")


def _named(folder: Any) -> str:
    """The path of an open folder; "" for -1, which is where we are."""
    return os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""


def _signal(status: int) -> str:
    names = {-signal.SIGPROF: f"over {SECONDS} s of a CPU", -signal.SIGALRM: f"over {WAITING} s of waiting"}
    return names.get(status, f"exit code {status}")


def _tail(path: Path, most: int = 3000) -> str:
    return path.read_text(errors="replace")[-most:] if path.is_file() else ""


def kind_of(fault: Fault) -> str:
    """What faults of one cause have in common: the last line of a traceback and where it was raised."""
    last = fault.what.strip().splitlines()[-1][:80] if "Traceback" in fault.what else fault.what.splitlines()[0][:80]
    ours = re.findall(r'File "[^"]*/((?:diffclip|mllm|stages)/[^"]+\.py)", line (\d+)', fault.what)
    return f"{ours[-1][0]}:{ours[-1][1]} {last}" if ours else last
