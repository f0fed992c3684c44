"""The device that a command computes on."""

import torch

from diffclip.base.errors import InputError


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or InputError; without a name the GPU if there is one, else the CPU."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"device {name}: not on this machine ({reason}); give cuda, cuda:1, … or cpu") from None
    return device
