"""The CLIP benchmarks (zero-shot, shifts, retrieval, linear probe, few-shot, MMVP) over one feature cache.

Percent everywhere: every score is in [0, 100], so that it compares with the published tables as it stands.
"""

from typing import Any

PROTOCOLS = ("zero_shot", "shift", "retrieval", "linear_probe", "few_shot", "mmvp")


def __getattr__(name: str) -> Any:
    """Give `diffclip.benchmarks.evaluate_clip` without importing torch before it is wanted."""
    if name == "evaluate_clip":
        from diffclip.benchmarks.evaluate import evaluate_clip

        return evaluate_clip
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
