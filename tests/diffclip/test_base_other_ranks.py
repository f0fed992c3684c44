"""A rank whose peer is gone says so in one sentence, whatever it was doing: its own traceback tells nothing."""

import os
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch import start_ranks

from diffclip.base.devices import group
from diffclip.base.errors import exit_on_input_error, other_rank_gone


def add_up(last):
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
        dist.barrier()
        WORK[name](last)


@pytest.mark.slow
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
        assert codes[left] == 1 and "RuntimeError: of its own" in told
    else:
        assert codes[left] == 2 and "Traceback" not in told, told
        assert told.count("another rank has ended or cannot be reached (") == 1 and f"error: rank {left} on " in told


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561]"
NCCL = "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.28"
GONE = {
    "closed": RuntimeError(f"{PAIR} Connection closed by peer [127.0.0.1]:36225"),
    "reset": RuntimeError(f"{PAIR} Read error [127.0.0.1]:44204: Connection reset by peer"),
    "store": dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
    "nccl": dist.DistBackendError(NCCL),
}
OTHER = {
    "a pipe": BrokenPipeError(32, "Broken pipe"),
    "a pipe of another library": RuntimeError("Broken pipe"),
    "a store of objects": ConnectionResetError(104, "Connection reset by peer"),
    "late": RuntimeError(f"{PAIR} Timed out waiting 3000ms for recv operation to complete"),
    "a wrong address": RuntimeError(f"{PAIR} Connection refused, remote=[127.0.1.1]:1"),
}


@pytest.mark.parametrize("name", [*GONE, *OTHER])
def test_what_is_told_so(name, monkeypatch):
    error = (GONE | OTHER)[name]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not other_rank_gone(error)  # one process alone has no other rank
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert other_rank_gone(error) == (name in GONE)
