"""Short hashes: of weights, to prove that a part was loaded, stayed frozen or changed, and of settings.

The same weights give the same fingerprint whatever their order, device or floating dtype on disk.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn


def fingerprint(weights: nn.Module | Mapping[str, torch.Tensor]) -> str:
    """Return 16 hex digits over names, shapes and float32 values of all parameters and persistent buffers."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def json_digest(value: object, digits: int = 16) -> str:
    """Hex digits over a value as JSON, whatever the order of its keys; what JSON cannot hold counts as its `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]
