"""How every process of ours waits and keeps memory, unless the user said otherwise."""

import os
import runpy
import subprocess
import sys

import pytest
from launch import ROOT

from diffclip.base import threads

OURS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}


@pytest.fixture
def clean(monkeypatch):
    """A process that has not loaded torch, and an environment that says nothing of spinning."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")  # leaves the memory of the tests' process alone
    return monkeypatch


@pytest.mark.parametrize("users", [{}, {"GOMP_SPINCOUNT": "infinity"}, {"OMP_WAIT_POLICY": "active"}])
def test_the_users_own_setting_wins(clean, users):
    for name, value in users.items():
        clean.setenv(name, value)
    runpy.run_path(threads.__file__)
    found = {name: os.environ[name] for name in OURS if name in os.environ}
    clean.delenv("GOMP_SPINCOUNT", raising=False)
    assert found == (users or {"GOMP_SPINCOUNT": "3000"})


def test_nothing_is_said_when_it_is_too_late(clean):
    clean.setitem(sys.modules, "torch", os)
    runpy.run_path(threads.__file__)
    assert not OURS & os.environ.keys()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["diffclip", "mllm"])
def test_the_libgomp_that_torch_loads_is_told(package):
    """libgomp itself prints what it read; `import torch` alone says 300000."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    ended = subprocess.run(
        [sys.executable, "-c", f"import {package}, torch"],
        cwd=ROOT,
        env={**environment, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line for line in ended.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not said:
        pytest.skip("this torch does not use GNU's OpenMP")
    assert all("'3000'" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("users", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept_for_the_next_tensor_unless_the_user_says_otherwise(users):
    """By the page faults of taking 64 MB twenty times: each of its 16,384 pages once, or every time."""
    code = (
        "import runpy, sys, ctypes, resource; runpy.run_path(sys.argv[1])\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20):\n"
        "    block = libc.malloc(1 << 26); ctypes.memset(block, 1, 1 << 26); libc.free(block)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in threads.USERS}
    command = [sys.executable, "-c", code, threads.__file__]
    faults = int(subprocess.run(command, env=environment | users, capture_output=True, check=True).stdout)
    pages = (1 << 26) // os.sysconf("SC_PAGE_SIZE")
    assert faults > 10 * pages if users else faults < 2 * pages
