"""Starting the project's commands as a user does, in processes of their own where a test needs that."""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import psutil
import pytest

from diffclip.base.ranks import free_port

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "stages" / "configs" / "quickstart"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node"]

# Starting a rank takes 8 s of a core, nearly all of it imports. So ranks whose launcher is not what is tested are
# forked by a server that has imported all of it and done nothing else: it has no CUDA and no process group.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])
HANGS = 240  # seconds after which a rank says where it is, and ends


def environment() -> dict[str, str]:
    """One thread each: threads that wait for a core that another test has are many times slower than one."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **settings, "PYTHONPATH": str(ROOT)}


def call(command: str, *arguments: str, code: int = 0) -> None:
    """`python -m COMMAND ARGUMENTS` in this process, for tests of messages and files; it must end with `code`."""
    module = importlib.import_module(command)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{command}.__main__")
    try:
        ended = module.main(list(arguments))
    except SystemExit as error:
        ended = error.code
    assert (ended or 0) == code


def start(*arguments: str) -> subprocess.Popen:
    """`python -m ARGUMENTS`, in a process group of its own, without waiting for it; stderr can be read at its end."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """`python -m ARGUMENTS` to its end; with `check`, the test fails if it ends with an error."""
    return run_program([sys.executable, "-m", *arguments], check)


def run_program(command: list[str], check: bool) -> subprocess.CompletedProcess:
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, start_new_session=True
    )
    if check and ended.returncode:
        pytest.fail(f"{command} ended with {ended.returncode}:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    return ended


def run_ranks(ranks: int, command: str | Callable, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """`start_ranks` to their end: when one fails, the others are killed, as a launcher does.

    The result has the exit code of the first that failed, and what all of them printed.
    """
    with tempfile.TemporaryDirectory() as folder, start_ranks(ranks, command, *arguments, folder=folder) as processes:
        left = {process.sentinel: process for process in processes}
        code = 0
        while left and not code:
            for sentinel in wait([*left]):
                process = left.pop(sentinel)
                process.join()
                code = code or process.exitcode or 0
        kill(*processes)
        told, errors = (Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr"))
    if check and code:
        pytest.fail(f"{ranks} ranks of {command} {arguments} ended with {code}:\n{told[-2000:]}\n{errors[-4000:]}")
    return subprocess.CompletedProcess([str(command), *arguments], code, told, errors)


@contextlib.contextmanager
def start_ranks(
    ranks: int, command: str | Callable, *arguments: str, folder: str | Path
) -> Iterator[list[BaseProcess]]:
    """The processes that `torchrun --nproc_per_node RANKS -m COMMAND ARGUMENTS` has, without the launcher.

    Args:
        ranks: 0 for one process that no launcher has started, as `python -m COMMAND`.
        command: what follows `-m`, or a function of a test module, called with the list of arguments.
        folder: is given the files `stdout` and `stderr`.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with mock.patch.dict(os.environ, environment() | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}):
        forkserver.ensure_running()
    settings = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    if ranks:
        settings |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in map(str, range(max(ranks, 1))):
        of_rank = settings | ({"RANK": rank, "LOCAL_RANK": rank} if ranks else {})
        given = (of_rank, os.getcwd(), str(folder), HANGS, command, arguments)
        processes.append(SERVER.Process(target=forked, args=given))
        processes[-1].start()
    try:
        yield processes
    finally:
        kill(*processes)


def kill(*processes: BaseProcess) -> None:
    """SIGKILL processes and what they started, as when a machine loses power."""
    for process in processes:
        if process.is_alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
        process.join()


def forked(
    settings: dict[str, str], cwd: str, folder: str, hangs: float, command: str | Callable, arguments: tuple[str, ...]
) -> None:
    """What one of the processes of `start_ranks` does."""
    import torch

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.dump_traceback_later(hangs, exit=True)
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers: a server's child would start a server
    os.environ.clear()
    os.environ.update(settings)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [str(command), *arguments]
    if callable(command):
        command(list(arguments))
    else:
        runpy.run_module(command, run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def forked_lmms_eval() -> Iterator[None]:
    """Where our commands start `python -m lmms_eval`, they get a process that has its imports."""

    def run(command: list[str], environment: dict[str, str], log: Path) -> int:
        with mock.patch.dict(os.environ, environment):
            ended = run_ranks(0, *command[command.index("-m") + 1 :], check=False)
        log.write_text(ended.stdout + ended.stderr)
        return ended.returncode

    with mock.patch("mllm.pope.lmms._run_with_progress", run):
        yield
