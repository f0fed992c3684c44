"""The kinds of differential attention, each a file with one class; whoever needs to know a kind looks it up here."""

from diffclip.attention.base import Differential
from diffclip.attention.dex import Dex, select_heads, set_annealing
from diffclip.attention.v1 import DifferentialAttention, lambda_init_schedule
from diffclip.attention.v2 import DifferentialAttentionV2
from diffclip.base.errors import InputError

__all__ = [
    "KINDS",
    "Dex",
    "Differential",
    "DifferentialAttention",
    "DifferentialAttentionV2",
    "kind",
    "lambda_init_schedule",
    "select_heads",
    "set_annealing",
]

# the name that model configs hold -> the class (docs/add_attention.md)
KINDS: dict[str, type[Differential]] = {
    each.name: each for each in (DifferentialAttention, DifferentialAttentionV2, Dex)
}
NUMBERS = {1: "v1", 2: "v2"}  # what configs of earlier releases hold


def kind(name: str | int) -> type[Differential]:
    """Return the class of a name, or of an old number; InputError for one that is not in `KINDS`."""
    found = NUMBERS.get(name) if isinstance(name, int) else name
    if found not in KINDS:
        *others, last = KINDS
        raise InputError(f"the kind of differential attention must be {', '.join(others)} or {last}: got {name!r}")
    return KINDS[found]
