"""A rank whose peer has ended says so in one sentence, whatever it was doing: its own traceback tells nothing."""

import os
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import start_ranks

from diffclip.base.devices import group
from diffclip.base.errors import exit_on_input_error

pytestmark = pytest.mark.slow


def add_up(last):
    dist.barrier()
    last()
    dist.all_reduce(torch.ones(3))


def take_a_step(last):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    loss = model(torch.ones(2, 4)).sum()
    last()
    loss.backward()


def form_a_group(last):
    last()
    dist.new_group(backend="gloo")
    dist.barrier()


def collect_objects(last):
    dist.barrier()
    last()
    dist.all_gather_object([None, None], {"a": 1})


def fail_itself(last):
    last()
    raise RuntimeError("of its own")


WORK = {work.__name__: work for work in (add_up, take_a_step, form_a_group, collect_objects, fail_itself)}


def works_with_another(arguments):
    name, victim = arguments

    def last():
        if os.environ["RANK"] == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    with exit_on_input_error(), group():
        WORK[name](last)


# who waits at rank 0's store for rank 1 hears nothing of its end: the launcher ends it
@pytest.mark.parametrize("name, victim", [case for case in product(WORK, "01") if case != ("form_a_group", "1")])
def test_it_is_told_in_one_sentence(name, victim, tmp_path):
    with start_ranks(2, works_with_another, name, victim, folder=tmp_path) as processes:
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
    told = Path(tmp_path, "stderr").read_text()
    left = 1 - int(victim)
    assert codes[int(victim)] == -signal.SIGKILL
    if name == "fail_itself":
        assert codes[left] == 1 and "RuntimeError: of its own" in told and "this rank has failed" in told
    else:
        assert codes[left] == 2 and "Traceback" not in told, told
        assert told.count("another rank has ended; see what it says") == 1 and f"error: rank {left} on " in told
