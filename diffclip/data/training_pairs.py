"""The whole training run as one sequence of samples, decided by the seed alone."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset

from diffclip.base.cache import cache_dir, keep, kept_array
from diffclip.base.errors import InputError
from diffclip.base.files import append_jsonl
from diffclip.base.jpegs import decode_for_crops, read_for_crops
from diffclip.data.pairs import BadSample, PairTable, decoded, of_row
from diffclip.data.stream import Stream, check_weights
from diffclip.data.streamed import StreamedTable
from diffclip.preprocessing import Box, RandomCrop

MOST_TRIES = 100
TOGETHER = 16  # items that are made in one go, whose files are in memory for as long
SHARED_FROM = 1_000_000  # pairs; their order is 4 MB, and a node may have a hundred processes


class Drawn(NamedTuple):
    """A pair that is read and not decoded, with what was drawn for its place."""

    place: int
    row: int  # of the table
    bad: int  # how many could not be read before it
    content: bytes
    captions: list[str]
    caption: str
    size: tuple[int, int] | None  # of a plain JPEG
    box: Box | None  # drawn where the size is known


class TrainingPairs(Dataset):
    """Item k is the k-th sample that the optimiser will see.

    Epoch e visits a fresh permutation of the table, drawn from (seed, e) and cut to whole global batches
    (drop_last). Crop and caption choice of item k are drawn from (seed, k). So the stream depends on nothing but
    the seed, and a resumed run, on any number of workers, sees the same pixels. Of a `StreamedTable` the permutation is
    that of `diffclip.data.stream`.

    Items are {"image": what `transform` gives, "text": (context,) int64, "item": k, "bad": n}: n pairs that could not
    be read stood in this place before a random other one took it.
    """

    def __init__(
        self,
        table: PairTable | StreamedTable,
        transform: Callable[..., torch.Tensor],
        tokenizer: Callable[[list[str]], torch.Tensor],
        *,
        global_batch_size: int,
        epochs: int,
        seed: int,
        weights: Sequence[float] = (),
        bad_samples: Path | None = None,
        lanes: int = 16,
        window: int = 4,
    ) -> None:
        """
        Args:
            transform: a `RandomCrop`, or any function of what `decode_for_crops` gives, a PIL image or (3, height,
                width) uint8.
            weights: how often an epoch sees each pair of each source (`table.ranges`): 2 is twice, 0.3 a random
                30 % of them, a new draw in each epoch. Empty: once.
            bad_samples: file that gets a line {"key", "reason"} for each unreadable pair; None: they raise.
            lanes, window: of `Stream`, for a table that streams.
        """
        check_weights(weights, len(table.ranges))
        self.table, self.transform, self.tokenizer, self.seed = table, transform, tokenizer, seed
        self.weights, self.bad_samples = list(weights), bad_samples
        self._named: set[str] = set()
        self._told = 0  # of a stream's problems, how many are named
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))
        self.stream: Stream | None = None
        if isinstance(table, StreamedTable):
            self.stream = Stream(
                table.sizes,
                global_batch_size=global_batch_size,
                epochs=epochs,
                seed=seed,
                lanes=lanes,
                window=window,
                ranges=table.shard_ranges,
                weights=weights,
            )
        in_epoch = self.stream.in_epoch if self.stream else self._in_epoch()
        self.per_epoch = in_epoch // global_batch_size * global_batch_size
        if in_epoch == 0:
            raise InputError("no pairs to train on: give data that holds some, and one of the weights more than 0")
        if self.per_epoch == 0:
            raise InputError(f"{in_epoch} pairs do not fill one batch of {global_batch_size}: lower global_batch_size")
        self.epochs = epochs

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def _in_epoch(self) -> int:
        """Rows that an epoch draws of the table, the same in each."""
        shares = zip(self.table.ranges, self.weights)
        return sum(_share_size(b - a, weight) for (a, b), weight in shares) if self.weights else len(self.table)

    def order(self, epoch: int) -> np.ndarray:
        """Rows of the table in the order in which an epoch visits them; int32, before the cut to whole batches."""
        if self._order[0] != epoch:
            large = len(self.table) >= SHARED_FROM
            self._order = (epoch, self._shared_order(epoch) if large else self._drawn_order(epoch))
        return self._order[1]

    def _drawn_order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        rows = np.arange(len(self.table), dtype=np.int32)
        if self.weights:
            shares = zip(self.table.ranges, self.weights)
            rows = np.concatenate([_share(rows[a:b], weight, rng) for (a, b), weight in shares])
        return rng.permutation(rows)

    def _shared_order(self, epoch: int) -> np.ndarray:
        """`_drawn_order` from a file that all processes of a node map into memory: the first one there writes it."""
        what = repr((self.seed, len(self.table), self.table.ranges, self.weights))
        name = hashlib.sha256(what.encode()).hexdigest()[:32]
        path, before = (cache_dir() / "order" / f"{name}-{e}.int32" for e in (epoch, epoch - 1))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if (order := self._kept_order(path)) is None:
                    keep(path, self._drawn_order(epoch).data)
                    order = self._kept_order(path)
            before.unlink(missing_ok=True)  # who has it open keeps it
            before.with_suffix(".lock").unlink(missing_ok=True)
        except (OSError, NotImplementedError):  # no room, not ours to write, or no locks there
            order = None
        return self._drawn_order(epoch) if order is None else order

    def _kept_order(self, path: Path) -> np.ndarray | None:
        """The order in a file, None if it is not there or damaged."""
        order = kept_array(path)
        return order if order is not None and len(order) == self._in_epoch() else None

    def row(self, k: int) -> int:
        """The table's row that stands at place k."""
        if self.stream:
            return self.stream.row(k)
        epoch, position = divmod(k, self.per_epoch)
        return int(self.order(epoch)[position])

    def __getitem__(self, k: int) -> dict[str, torch.Tensor | int]:
        return self.__getitems__([k])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, torch.Tensor | int]]:
        """Items at several places, as torch's loaders ask for them."""
        chunks = [places[start : start + TOGETHER] for start in range(0, len(places), TOGETHER)]
        return [item for chunk in chunks for item in self._items(chunk)]

    def _items(self, places: Sequence[int]) -> list[dict[str, torch.Tensor | int]]:
        """Items made step by step: decoding an image empties a core's caches, and all else takes three to five times
        as long after each as in a loop of its own.
        """
        drawn = [self._drawn(k) for k in places]
        cropped = [self._cropped(pair) for pair in drawn]
        texts = self.tokenizer([pair.caption for pair, _ in cropped])
        return [
            {"image": image, "text": text, "item": pair.place, "bad": pair.bad}
            for (pair, image), text in zip(cropped, texts, strict=True)
        ]

    def _drawn(self, k: int, bad: int = 0) -> Drawn:
        """The pair at place k, or if bad of them cannot be read what stands in for it, with its draws."""
        while True:
            if self.stream and isinstance(self.table, StreamedTable):
                self.table.prepare(*self.stream.soon(k))
            row = self._replacement(k, bad) if bad else self.row(k)
            try:
                (content, size), captions = decoded(self.table, row, read_for_crops)
                break
            except BadSample as error:
                bad = self._one_more(error, bad)
        if self.stream and self.bad_samples:
            self._name_new_problems(self.bad_samples)
        with self._seeded(k, captions) as caption:
            box = self.transform.draw(*size) if size and isinstance(self.transform, RandomCrop) else None
        return Drawn(k, row, bad, content, captions, caption, size, box)

    def _cropped(self, pair: Drawn) -> tuple[Drawn, torch.Tensor]:
        """A pair and its crop; another pair where the image turns out to be broken."""
        while True:
            try:
                image = of_row(self.table, pair.row, decode_for_crops, pair.content, pair.size)
                break
            except BadSample as error:
                pair = self._drawn(pair.place, self._one_more(error, pair.bad))
        if pair.box:
            return pair, self.transform(image, pair.box)
        with self._seeded(pair.place, pair.captions):
            return pair, self.transform(image)

    def _one_more(self, error: BadSample, bad: int) -> int:
        """How many pairs could not be read for a place, after one more, which is named."""
        if self.bad_samples is None or bad == MOST_TRIES:
            raise error
        if error.key not in self._named:
            self._named.add(error.key)
            name_bad_samples(self.bad_samples, [(error.key, error.reason)])
        return bad + 1

    @contextmanager
    def _seeded(self, k: int, captions: list[str]) -> Iterator[str]:
        """One of the captions, drawn for place k, and torch's generator as it goes on from there."""
        with seeded(self.seed * 1_000_003 + k):
            yield captions[int(torch.randint(len(captions), ()))]

    def _name_new_problems(self, path: Path) -> None:
        """Name the samples that lack a part in shards that have been opened since."""
        if new := self.table.problems[self._told :]:
            self._told += len(new)
            name_bad_samples(path, new)

    def _replacement(self, k: int, bad: int) -> int:
        """The row that stands in for the bad-th unreadable one at place k: any that the epoch sees, of a stream any of
        the same window, whose shards are there.
        """
        if self.stream:
            others = self.stream.others(k)
            return int(others[int(np.random.default_rng((self.seed, k, bad)).integers(len(others)))])
        seen = self.order(k // self.per_epoch) if self.weights else range(len(self.table))
        return int(seen[int(np.random.default_rng((self.seed, k, bad)).integers(len(seen)))])


def cut_texts(text: torch.Tensor) -> torch.Tensor:
    """Token ids (batch, context) without the columns behind the last end token (each row's largest id), of which a
    causal tower sees nothing; a multiple of 8 of them stays, so that there are few lengths.
    """
    longest = int(text.argmax(dim=-1).max()) + 1
    return text[:, : -(-longest // 8) * 8]


def _share(rows: np.ndarray, weight: float, rng: np.random.Generator) -> np.ndarray:
    whole = int(weight)
    some = rng.choice(rows, _share_size(len(rows), weight) - whole * len(rows), replace=False)
    return np.concatenate([*[rows] * whole, some])


def _share_size(rows: int, weight: float) -> int:
    """Of so many rows with that weight, how many an epoch sees."""
    whole, rest = divmod(weight, 1)
    return int(whole) * rows + round(rest * rows)


def name_bad_samples(path: Path, samples: Sequence[tuple[str, str]]) -> None:
    """Append (key, reason) lines to a bad_samples.jsonl, in one write, since several processes share the file."""
    append_jsonl(path, [{"key": key, "reason": reason} for key, reason in samples])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global CPU generator, from which torchvision draws its crops, start at `seed`; restore it after.

    `torch.manual_seed` would do, but records a stack trace for absent GPUs, a third of the cost of a small image.
    """
    state = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
