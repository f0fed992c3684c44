"""Pairs of shards that come and go: a table whose shards are opened when an item needs them, a few at a time, those of
object stores through the node's cache, fetched ahead of their turn.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.base.images import BROKEN, decode
from diffclip.base.objects import Object
from diffclip.data.layout import Layout
from diffclip.data.node_cache import NodeCache
from diffclip.data.pairs import BadSample, decoded
from diffclip.data.shard_sizes import AGAIN, SizedShard
from diffclip.data.shards import Shard, index_shard

FETCHERS = 4  # shards that a process fetches ahead side by side
TOUCHED = 30.0  # seconds after which shards in use are said to be
TRIES = 3  # of a shard that is removed while it is read, as from a cache that is too small


class StreamedTable:
    """As `diffclip.data.pairs.PairTable`, over shards whose sizes are known; row r counts through them in order.

    `problems` grows as shards are opened.
    """

    def __init__(
        self, sources: Sequence[Sequence[SizedShard]], layout: Layout, cache: NodeCache | None = None, keep: int = 64
    ) -> None:
        """
        Args:
            cache: of shards that are not local.
            keep: shards whose index a process holds at a time.
        """
        self.shards = [SizedShard(*shard) for source in sources for shard in source]
        self.layout, self.cache, self.keep = layout, cache, keep
        self.sizes = [shard.samples for shard in self.shards]
        self.ends = np.cumsum(self.sizes, dtype=np.int64)
        ends = np.cumsum([len(source) for source in sources]).tolist()
        self.shard_ranges = list(zip([0, *ends[:-1]], ends))
        starts = [0, *self.ends.tolist()]
        self.ranges = [(starts[a], starts[b]) for a, b in self.shard_ranges]
        self.problems: list[tuple[str, str]] = []
        self.notices: list[tuple[str, str]] = []
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._seen = set[int]()  # shards whose problems are in the list
        self._asked: dict[int, tuple[list[int], float]] = {}  # by lane: what was asked for, and when
        self._fetcher: Fetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetcher": None}  # threads go to no other process

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> tuple[Image.Image, list[str]]:
        return decoded(self, index, decode)

    def encoded(self, index: int) -> tuple[bytes, list[str]]:
        """The image of a pair as its file's bytes, and its captions; BadSample where it lacks one.

        InputError where its shard cannot be had, or holds more than its manifest says.
        """
        number, row = self.locate(index)
        for _ in range(TRIES):
            shard = self._opened(number)
            if row >= len(shard):
                reason = f"{shard.name} holds {len(shard):,} pairs, and {self.sizes[number]:,} by its manifest"
                raise BadSample(self.key(index), reason)
            try:
                return shard.read(row)
            except BROKEN as error:
                if os.path.exists(shard.path):
                    raise BadSample(shard.key(row), str(error) or type(error).__name__) from None
                del self._open[number]  # it has made room for others
        raise InputError(f"{self.shards[number].url}: is removed while it is read; raise `shard_cache_gb`")

    def key(self, index: int) -> str:
        """Where a pair comes from: `shard.tar/key`; `shard.tar/#row` while the shard is not open."""
        number, row = self.locate(index)
        shard = self._open.get(number)
        if shard is None or row >= len(shard):
            return f"{self.shards[number].url}/#{row}"
        return shard.key(row)

    def locate(self, index: int) -> tuple[int, int]:
        """The number of a pair's shard, and its row there."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, int(index - (self.ends[number - 1] if number else 0))

    def prepare(self, lane: int, shards: list[int]) -> None:
        """Fetch, beside everything else, what a lane is soon to read, and keep it from being removed."""
        before, when = self._asked.get(lane, ([], 0.0))
        if self.cache is None or (shards == before and time.monotonic() < when + TOUCHED):
            return
        self._asked[lane] = shards, time.monotonic()
        if self._fetcher is None or self._fetcher.process != os.getpid():  # threads do not outlive a fork
            self._fetcher = Fetcher(self.cache)
        for number in shards:
            shard = self.shards[number]
            if shard.remote and not self.cache.touch(as_object(shard)):
                self._fetcher.ask(as_object(shard))

    def _opened(self, number: int) -> Shard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        wanted = self.shards[number]
        if self.cache is not None and wanted.remote:
            path = self.cache.fetched(as_object(wanted))
            assert path is not None  # it waits
            try:
                shard = index_shard(str(path), self.layout, path.parent)
            except InputError as error:
                raise InputError(str(error).replace(str(path), wanted.url)) from None
        else:
            shard = index_shard(wanted.url, self.layout)
        shard.name = wanted.url
        if len(shard) > wanted.samples:
            raise InputError(
                f"{wanted.url}: holds {len(shard):,} pairs, and {wanted.samples:,} by its manifest, which is older: "
                f"{AGAIN}"
            )
        if number not in self._seen:
            self._seen.add(number)
            self.problems += [(key.replace(shard.path, wanted.url), reason) for key, reason in shard.problems]
        self._open[number] = shard
        while len(self._open) > self.keep:
            self._open.popitem(last=False)
        return shard


def as_object(shard: SizedShard) -> Object:
    """The address, bytes and version of a shard."""
    return Object(shard.url, shard.size, shard.version)


class Fetcher:
    """Threads that fetch shards into a node's cache; they end with the process, and keep no failure to themselves:
    whoever reads the shard tries again, and raises it.
    """

    def __init__(self, cache: NodeCache) -> None:
        self.cache, self.process = cache, os.getpid()
        self.queue: SimpleQueue[Object] = SimpleQueue()
        self.waiting = set[Object]()
        for _ in range(FETCHERS):
            threading.Thread(target=self._run, daemon=True).start()

    def ask(self, shard: Object) -> None:
        """Fetch a shard when its turn comes; asked for again while it waits is no matter."""
        if shard not in self.waiting:
            self.waiting.add(shard)
            self.queue.put(shard)

    def _run(self) -> None:
        while True:
            shard = self.queue.get()
            with suppress(Exception):  # the reader meets it, too
                self.cache.fetched(shard, wait=False)
            self.waiting.discard(shard)


def room_for(shards: Sequence[SizedShard], lanes: int, window: int) -> int:
    """Bytes that the windows of so many lanes take, each with the one that follows it."""
    sizes = sorted((shard.size or 0 for shard in shards if shard.remote), reverse=True)
    return sum(sizes[: 2 * window * lanes])


def check_room(cache: NodeCache, shards: Sequence[SizedShard], lanes: int, window: int) -> None:
    """InputError where the windows of a node's lanes do not fit into its cache."""
    if (need := room_for(shards, lanes, window)) > cache.limit:
        raise InputError(
            f"setting `shard_cache_gb` {cache.limit / 1e9:g}: {lanes} lanes with windows of {window} shards, and those "
            f"that follow, take up to {need / 1e9:.3g} GB of this node: raise it, or lower `lanes` or `window`"
        )


def cache_of(folder: str, gigabytes: float, default: Path) -> NodeCache:
    """The node's cache that the settings name."""
    return NodeCache(Path(folder).expanduser() if folder else default, int(gigabytes * 1e9))
