"""The tests' own launcher: a rank that fails or hangs says where, and nothing is left running."""

import os
import sys
import time

import launch
import psutil
import pytest
from launch import run_ranks, start_ranks

pytestmark = pytest.mark.slow


def one_fails_the_other_waits(arguments):
    if os.environ["RANK"] == "1":
        raise ValueError(*arguments)
    time.sleep(600)


def tells_what_it_has(arguments):
    print("preloaded" in sys.modules, os.environ.get("RANK"), os.environ["WORLD_SIZE"], *arguments, flush=True)


def test_a_rank_that_fails_ends_the_others_and_shows_its_traceback():
    ended = run_ranks(2, one_fails_the_other_waits, "a reason", check=False)
    assert ended.returncode == 1 and "ValueError: a reason" in ended.stderr
    with pytest.raises(pytest.fail.Exception, match="ValueError: a reason"):
        run_ranks(2, one_fails_the_other_waits, "a reason")


def test_a_rank_that_hangs_shows_where(monkeypatch):
    monkeypatch.setattr(launch, "HANGS", 0.5)
    ended = run_ranks(1, one_fails_the_other_waits, check=False)
    assert ended.returncode == 1 and "in one_fails_the_other_waits" in ended.stderr


def test_ranks_have_the_imports_and_the_environment_of_a_launcher():
    assert sorted(run_ranks(2, tells_what_it_has, "x").stdout.splitlines()) == ["True 0 2 x", "True 1 2 x"]
    assert "No module named stages.nothing" in run_ranks(0, "stages.nothing", check=False).stderr


def test_ranks_do_not_outlive_the_test(tmp_path):
    with start_ranks(2, one_fails_the_other_waits, folder=tmp_path) as processes:
        pids = [process.pid for process in processes]
    assert not any(psutil.pid_exists(pid) for pid in pids)
