"""The device that a command computes on."""

import torch

from diffclip.base.errors import InputError


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; without one, the GPU where there is one, else the CPU.

    Raises:
        InputError: torch knows no such device, or this machine has none.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"device {name}: not on this machine ({reason}); give cuda, cuda:1, … or cpu") from None
    return device
