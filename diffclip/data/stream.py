"""The order of a run that streams its shards: decided by (seed, k) for each item k, in memory of a few shards.

An epoch permutes the shards and lays them end to end. The row of samples is cut into `lanes` stretches of one length,
each a lane; every batch takes the next piece of each lane, so that a rank, which has a fixed part of each batch, reads
the shards of its own lanes and no others. A lane goes through its shards in windows of `window`, whose samples are
shuffled together; the first window of each lane is of another length, so that they do not all end at one time.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffclip.base.errors import InputError


class Epoch(NamedTuple):
    """The shards of an epoch in their order, whole or in part, and where each ends in the row of all samples."""

    shards: np.ndarray  # (entries,) int64
    ends: np.ndarray  # (entries,) int64


class Place(NamedTuple):
    """Where an item stands: epoch, lane, window of the lane, position in the window of `length`."""

    epoch: int
    lane: int
    window: int
    position: int
    length: int


class Window(NamedTuple):
    """A window of a lane: its number, where it starts and ends in the row of the epoch, its shards and those after."""

    epoch: int
    number: int
    start: int
    end: int
    shards: list[int]
    following: list[int]


class Stream:
    """Item k of a run over shards of known sizes: `row(k)` counts the samples of all shards from 0, in their order."""

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        global_batch_size: int,
        epochs: int,
        seed: int,
        lanes: int = 16,
        window: int = 4,
        ranges: Sequence[tuple[int, int]] = (),
        weights: Sequence[float] = (),
    ) -> None:
        """
        Args:
            sizes: samples of each shard.
            lanes: the greatest common divisor with `global_batch_size` is taken.
            ranges: (start, end) of each source's shards, for `weights`.
            weights: as in `diffclip.data.training_pairs`; 0.3 takes whole shards but for one of each source.
        """
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.firsts = np.concatenate([[0], np.cumsum(self.sizes)])  # of each shard's samples among all
        self.batch, self.epochs, self.seed = global_batch_size, epochs, seed
        self.lanes, self.window = math.gcd(lanes, global_batch_size), window
        self.ranges = list(ranges) or [(0, len(self.sizes))]
        self.weights = list(weights) or [1.0] * len(self.ranges)
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._held: dict[int, Window] = {}  # by lane: the window of its last item
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self.in_epoch = int(self._epoch(0).ends[-1]) if len(self._epoch(0).ends) else 0
        self.per_epoch = self.in_epoch // self.batch * self.batch
        self.stretch = self.per_epoch // self.lanes  # samples of a lane

    def row(self, k: int) -> int:
        """The sample at place k of the run."""
        place = self.place(k)
        return int(self._window(place)[place.position])

    def others(self, k: int) -> np.ndarray:
        """The samples of the window that k stands in, any of which may take its place."""
        return self._window(self.place(k))

    def soon(self, k: int) -> tuple[int, list[int]]:
        """The lane of item k, and the shards that it reads now and next: of the window that follows the share that has
        passed of this one, so that fetching is spread over time.
        """
        place = self.place(k)
        _, _, _, _, here, following = self._held[place.lane]
        passed = -(-(place.position + 1) * len(following) // place.length)
        return place.lane, list(dict.fromkeys([*here, *following[:passed]]))

    def place(self, k: int) -> Place:
        """Lane, window and position of item k."""
        epoch, inside = divmod(k, self.per_epoch)
        step, inside = divmod(inside, self.batch)
        share = self.batch // self.lanes
        lane, inside = divmod(inside, share)
        at = lane * self.stretch + step * share + inside  # in the row of the epoch
        held = self._held.get(lane)
        if held is None or held.epoch != epoch or not held.start <= at < held.end:
            held = self._held[lane] = self._found(epoch, lane, at)
        return Place(epoch, lane, held.number, at - held.start, held.end - held.start)

    def _found(self, epoch: int, lane: int, at: int) -> Window:
        """The window of a lane that a place in the row of the epoch lies in."""
        first, _ = self._entries(epoch, lane)
        entry = int(np.searchsorted(self._epoch(epoch).ends, at, side="right"))
        number = max(0, (entry - first - self._lead(lane)) // self.window + 1)
        following = self._shards(epoch, lane, number + 1)
        if not following and epoch + 1 < self.epochs:
            following = self._shards(epoch + 1, lane, 0)
        return Window(epoch, number, *self._span(epoch, lane, number), self._shards(epoch, lane, number), following)

    def _lead(self, lane: int) -> int:
        """Shards of a lane's first window."""
        return lane % self.window + 1

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._drawn(epoch)
            while len(self._epochs) > 2:  # this one, and the next
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _drawn(self, epoch: int) -> Epoch:
        rng = np.random.default_rng((self.seed, epoch))
        shards, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for (start, end), weight in zip(self.ranges, self.weights):
            own = np.arange(start, end)
            whole, rest = divmod(weight, 1)
            for _ in range(int(whole)):
                shards.append(own)
                lengths.append(self.sizes[own])
            drawn = rng.permutation(own)
            left = round(rest * int(self.sizes[own].sum())) - np.concatenate([[0], np.cumsum(self.sizes[drawn])[:-1]])
            shards.append(drawn)
            lengths.append(np.clip(left, 0, self.sizes[drawn]))
        every, length = np.concatenate(shards), np.concatenate(lengths)
        order = rng.permutation(np.flatnonzero(length))
        return Epoch(every[order], np.cumsum(length[order]))

    def _entries(self, epoch: int, lane: int) -> tuple[int, int]:
        """The first and last entry of the epoch, plus one, that a lane has samples of."""
        ends = self._epoch(epoch).ends
        first = np.searchsorted(ends, lane * self.stretch, side="right")
        return int(first), int(np.searchsorted(ends, (lane + 1) * self.stretch, side="left")) + 1

    def _window_entries(self, epoch: int, lane: int, window: int) -> tuple[int, int]:
        first, last = self._entries(epoch, lane)
        start = first + (self._lead(lane) + (window - 1) * self.window if window else 0)
        return start, min(last, start + (self.window if window else self._lead(lane)))

    def _span(self, epoch: int, lane: int, window: int) -> tuple[int, int]:
        """Where a window starts and ends in the row of the epoch."""
        first, last = self._window_entries(epoch, lane, window)
        ends = self._epoch(epoch).ends
        start = max(lane * self.stretch, int(ends[first - 1]) if first else 0)
        return start, min((lane + 1) * self.stretch, int(ends[last - 1]))

    def _shards(self, epoch: int, lane: int, window: int) -> list[int]:
        first, last = self._window_entries(epoch, lane, window)
        return self._epoch(epoch).shards[first:last].tolist()

    def _window(self, place: Place) -> np.ndarray:
        """The samples of a window in the order in which they are learnt; one window a lane is kept."""
        key = place[:3]
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        epoch = self._epoch(place.epoch)
        start, end = self._span(*key)
        rows = []
        for entry in range(*self._window_entries(*key)):
            begins = int(epoch.ends[entry - 1]) if entry else 0
            a, b = max(start, begins) - begins, min(end, int(epoch.ends[entry])) - begins
            shard = int(epoch.shards[entry])
            size = int(self.sizes[shard])
            # what is cut off a shard, for another lane or for none, is drawn at random
            own = np.arange(size) if b - a == size else self._shuffled(place.epoch, shard)[a:b]
            rows.append(self.firsts[shard] + own)
        made = np.random.default_rng((self.seed, *key, 1)).permutation(np.concatenate(rows))
        self._windows[key] = made
        while len(self._windows) > self.lanes:
            self._windows.popitem(last=False)
        return made

    def _shuffled(self, epoch: int, shard: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch, shard, 2)).permutation(int(self.sizes[shard]))


def check_weights(weights: Sequence[float], sources: int) -> None:
    """InputError unless each source has a weight of 0 or more, or none has one."""
    if len(weights) not in (0, sources) or not all(0 <= w < float("inf") for w in weights):
        raise InputError(f"{len(weights)} weights for {sources} data sources: give each source one, of 0 or more")
