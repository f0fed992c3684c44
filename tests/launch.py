"""Starting the project's commands as a user does, in processes of their own where a test needs that."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.pipeline import free_port

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "stages" / "configs" / "quickstart"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node"]


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


def run_deepspeed(ranks: int, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """A stage under the deepspeed launcher; look at its result, since the launcher may hide that a rank failed."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    options = ["--num_gpus", str(ranks), "--master_port", str(free_port()), "--log_level", "warning", "--module"]
    return run_program([sys.executable, launcher, *options, *arguments], check)


def run_program(command: list[str], check: bool) -> subprocess.CompletedProcess:
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, start_new_session=True
    )
    if check and ended.returncode:
        pytest.fail(f"{command} ended with {ended.returncode}:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    return ended
