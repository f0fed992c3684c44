"""The kinds of differential attention, each a file with one class; whoever needs to know a kind looks it up here."""

from diffclip.attention.base import Differential
from diffclip.attention.v1 import DifferentialAttention, lambda_init_schedule
from diffclip.attention.v2 import DifferentialAttentionV2
from diffclip.base.errors import InputError

__all__ = ["KINDS", "Differential", "DifferentialAttention", "DifferentialAttentionV2", "kind", "lambda_init_schedule"]

# the version that model configs hold -> the class (docs/add_attention.md)
KINDS: dict[int, type[Differential]] = {1: DifferentialAttention, 2: DifferentialAttentionV2}


def kind(version: int) -> type[Differential]:
    """Return the class of a version, or raise InputError for one that is not in `KINDS`."""
    if version not in KINDS:
        known = " or ".join(map(str, KINDS))
        raise InputError(f"version of differential attention must be {known}: got {version!r}")
    return KINDS[version]
