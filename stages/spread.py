"""Which rank of several holds the others up: what each does on its own in a step, before it has to wait for others."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class OwnTime:
    """Seconds that this rank needs for a step's data and forward passes.

    A whole step takes equally long on all ranks, since gradients wait for the slowest. On a GPU, passes are measured by
    events in its stream, which are read at logging and make nothing wait.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.hooks = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end)]
        self.device = device
        self.seconds, self.steps = 0.0, 0
        self.passes: list[tuple[Any, Any]] = []
        self.step_ended = 0.0  # before the first step the ranks have met

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: object) -> None:
        self.began = self._mark()

    def _end(self, *_: object) -> None:
        self.passes.append((self.began, self._mark()))

    def begin_step(self) -> None:
        """To be called when a step's data are there."""
        if self.step_ended:
            self.seconds += time.perf_counter() - self.step_ended

    def end_step(self) -> None:
        """To be called when a step has ended, and with it what the ranks do together."""
        self.step_ended = time.perf_counter()
        self.steps += 1

    def spread(self) -> dict[str, Any]:
        """Seconds a step since the last call: of the fastest and the slowest rank, and which that is, on every rank."""
        passes = (a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.passes)
        mine = torch.tensor([(self.seconds + sum(passes)) / max(1, self.steps)], device=self.device)
        self.seconds, self.steps, self.passes = 0.0, 0, []
        each = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(each, mine)
        seconds = [float(one) for one in each]
        self.step_ended = time.perf_counter()
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {"ranks/fastest": min(seconds), "ranks/slowest": max(seconds), "ranks/slowest_rank": slowest}

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
