"""OpenMP's threads stop spinning soon, in every process of ours, unless the user said otherwise."""

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
