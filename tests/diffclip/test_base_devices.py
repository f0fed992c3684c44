"""Devices: the one that is named, the best one without a name, and a sentence for those that are not there."""

import pytest
import torch

from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError


def test_the_named_device_or_the_gpu_where_there_is_one(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device() == pick_device("") == torch.device("cuda" if there else "cpu")


@pytest.mark.parametrize("name", ["mars", "cuda:99", "CPU", "cpu:x", "cuda:-1", "vulkan"])
def test_devices_that_are_not_there_are_named(name):
    with pytest.raises(
        InputError, match=f"^device {name}: not on this machine .*; give cuda, cuda:1, … or cpu$"
    ) as end:
        pick_device(name)
    assert "\n" not in str(end.value)
