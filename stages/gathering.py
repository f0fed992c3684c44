"""Weights that ZeRO-3 has in pieces on all ranks, gathered one at a time: no rank but the first ever holds them all.

Every rank makes the same calls in the same order, since it gives its pieces.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from diffclip.base.ranks import rank


class Gathered(Mapping[str, torch.Tensor]):
    """The parameters and persistent buffers of a module by name, like its state_dict; each is whole while it is looked
    at, on the CPU.
    """

    def __init__(self, module: nn.Module) -> None:
        self.state = module.state_dict(keep_vars=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        return _whole(self.state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def gather_on_main(model: nn.Module) -> None:
    """Give `model` whole parameters on the CPU on rank 0, which saves it; on other ranks it stays as it is.

    It is of no use to DeepSpeed after that.
    """
    whole: dict[int, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in whole:
                values = _whole(parameter, keep=rank() == 0)
                whole[id(parameter)] = parameter if rank() else nn.Parameter(values, parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]


def _whole(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor:
    """A copy on the CPU of a tensor, which may be in pieces; `keep`: whether this rank wants it, and not only helps."""
    import deepspeed  # not at the top: it takes seconds, and says so on the console

    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        return tensor.detach().to("cpu", copy=True) if keep else tensor
