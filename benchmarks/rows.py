"""A row of `python -m benchmarks.all`: the same work by us and by a peer, measured in one run in turns."""

from typing import NamedTuple


class Row(NamedTuple):
    """Numbers of one unit: seconds or MB, of which less is better, or what ends in /s, of which more is."""

    work: str
    peer: str
    theirs: float | None  # None: there is no peer here, and `note` says why
    ours: float
    unit: str
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better ours is; None where one of them is not there, or too little to measure."""
        if not self.theirs or not self.ours:
            return None
        return self.ours / self.theirs if self.unit.endswith("/s") else self.theirs / self.ours
