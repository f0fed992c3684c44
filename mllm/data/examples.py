"""Rows of conversations -> examples, the order of a whole run, and batches."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from diffclip.base.errors import InputError
from diffclip.data.training_pairs import MOST_TRIES, name_bad_samples
from mllm.conversation import IGNORE, encode, render
from mllm.data.judge import cut, token_lengths
from mllm.data.rows import Rows
from mllm.processing import bounded, image_tokens


class ConversationDataset(Dataset):
    """Examples for training.

    `dataset[i]` holds input_ids and labels (tokens,) int64; with images, also pixel_values (n, 3, H, W).
    """

    def __init__(self, rows: Rows, processor: LlavaProcessor, *, template: str, max_length: int = 2048) -> None:
        """`rows` were checked with the same template; longer examples are cut at the end, image tokens counted."""
        self.rows, self.processor = rows, processor
        self.template, self.max_length = template, max_length
        self.image_tokens = image_tokens(processor)
        self.end_token = processor.tokenizer.eos_token

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        segments = render(row.conversation, self.template, end_token=self.end_token)
        encoded = encode(segments, self.processor.tokenizer, self.image_tokens)
        try:
            encoded = cut(encoded, self.processor.image_token_id, self.max_length)
        except InputError as error:
            raise type(error)(f"{row.key}: {error}") from None
        example = {name: torch.tensor(ids) for name, ids in encoded.items()}
        if row.images:
            images = bounded((image.open(row.key) for image in row.images), self.processor.image_processor)
            pixels = self.processor.image_processor(images, return_tensors="pt")
            example["pixel_values"] = pixels["pixel_values"]
        return example

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every example, image tokens counted, for batches of equal length."""
        lengths = token_lengths(self.rows, self.processor.tokenizer, self.image_tokens, self.template)
        return np.minimum(lengths, self.max_length).tolist()


class TrainingConversations(Dataset):
    """Item k is the k-th conversation that the optimiser will see: `dataset[order[k]]`.

    Should its row have become unreadable since it was judged (an image has gone), it is named in `bad_samples`, as in
    pretraining, and a random other row of the order takes the place, drawn from (seed, k), also in a resumed run.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        order: Sequence[int],
        *,
        seed: int,
        bad_samples: Path,
        max_bad_share: float = 0.01,
    ) -> None:
        """`max_bad_share`: InputError when more of the rows than this are unreadable, after 1,000 of this process."""
        self.dataset, self.order, self.seed = dataset, order, seed
        self.bad_samples, self.max_bad_share = bad_samples, max_bad_share
        self.seen = self.bad = 0
        self._named: set[str] = set()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        self.seen += 1
        rng, index = np.random.default_rng((self.seed, k)), self.order[k]
        for _ in range(MOST_TRIES):
            try:
                return self.dataset[index]
            except InputError as error:
                self._count(self.dataset.rows.key(index), error)
                index = self.order[int(rng.integers(len(self.order)))]
        return self.dataset[index]

    def _count(self, key: str, error: InputError) -> None:
        self.bad += 1
        if key not in self._named:
            self._named.add(key)
            name_bad_samples(self.bad_samples, [(key, str(error).removeprefix(f"{key}: "))])
        if self.seen >= 1000 and self.bad > self.max_bad_share * (self.seen + self.bad):
            raise InputError(
                f"{self.bad} of {self.seen + self.bad} rows could not be read, more than max_bad_share "
                f"{self.max_bad_share:g}: see {self.bad_samples}, mend the data or raise it"
            ) from None


def training_order(dataset: ConversationDataset, kind: str, batch: int, steps: int, seed: int) -> list[int]:
    """Return the rows of a whole run in the order in which the optimiser sees them, decided by the seed alone.

    Args:
        kind: "random"; "file" for the rows as they stand, epoch after epoch; "length" for batches of like length: each
            epoch is shuffled and sorted within stretches of 64 batches, and the batches are then shuffled. The longest
            batch comes first, so that memory runs out in the first step or never. Lengths within 5 tokens count as
            like: sorted to the token, a short answer would meet only answers of as many tokens, often only itself.
        batch: conversations per optimiser step, over all devices.
        steps: optimiser steps of the run.

    Returns:
        steps * batch indices; rows that fill no whole batch are left out of an epoch, unless the data is smaller.
    """
    rng = np.random.default_rng(seed)
    rows = np.arange(len(dataset))
    order: list[np.ndarray] = []
    while sum(map(len, order)) < steps * batch:
        epoch = rows if kind == "file" else rng.permutation(rows)
        if kind == "length" and len(rows) >= batch:
            lengths = np.asarray(dataset.lengths)
            blurred = lengths + rng.uniform(0, 5, len(lengths))
            stretches = np.array_split(epoch, range(64 * batch, len(epoch), 64 * batch))
            sorted_rows = np.concatenate([stretch[np.argsort(-blurred[stretch])] for stretch in stretches])
            # the rows left out are a random stretch of it, not always the shortest
            cut = rng.integers(0, len(rows) % batch + 1)
            batches = rng.permutation(sorted_rows[cut : cut + len(rows) // batch * batch].reshape(-1, batch))
            if not order:
                longest = lengths[batches].max(axis=1).argmax()
                batches[[0, longest]] = batches[[longest, 0]]
            epoch = batches.reshape(-1)
        order.append(epoch)
    return np.concatenate(order)[: steps * batch].tolist()


def padded_length(tokens: int) -> int:
    """The smallest multiple of 8 from `tokens` on that is not 64 more than a multiple of 128.

    At those lengths cuDNN 9.24's attention (torch 2.14) gives NaN gradients with a mask on H100 and H200 (pytorch
    issue 196678). Multiples of 8 are what tensor cores like.
    """
    length = -(-tokens // 8) * 8
    return length + 8 if length % 128 == 64 else length


def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Rows (tokens,) -> (rows, `padded_length` of the longest), filled up on the right with `value`."""
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    return torch.nn.functional.pad(padded, (0, padded_length(padded.shape[1]) - padded.shape[1]), value=value)


def pad_batch(ids: list[torch.Tensor], labels: list[torch.Tensor], pad_token: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, (batch, tokens) int64, padded on the right."""
    return {
        "input_ids": pad(ids, pad_token),
        "attention_mask": pad([torch.ones_like(row) for row in ids], 0),
        "labels": pad(labels, IGNORE),
    }


def pack(ids: list[torch.Tensor], labels: list[torch.Tensor], pad_token: int) -> dict[str, torch.Tensor]:
    """The examples behind each other in one row: input_ids, labels and position_ids, (1, tokens) int64.

    position_ids start anew at each example, from which transformers tells that no example sees another. What the row
    lacks to `padded_length` is one more example, of padding, that is not learnt.
    """
    firsts = [torch.cat([row.new_full((1,), IGNORE), row[1:]]) for row in labels]  # nothing stands before them
    tokens = sum(map(len, ids))
    lengths = [*map(len, ids), padded_length(tokens) - tokens]
    return {
        "input_ids": pad([torch.cat(ids)], pad_token),
        "labels": pad([torch.cat(firsts)], IGNORE),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }


def collate(
    processor: LlavaProcessor, packing: bool = False
) -> Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """A collator that pads as `pad_batch` does or, with `packing`, as `pack` does.

    Unless all rows are text alone it adds pixel_values (images of the batch in order, 3, height, width).
    """
    pad_token = processor.tokenizer.pad_token_id

    def batch(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids, labels = [e["input_ids"] for e in examples], [e["labels"] for e in examples]
        result = (pack if packing else pad_batch)(ids, labels, pad_token)
        pixels = [e["pixel_values"] for e in examples if "pixel_values" in e]
        return {**result, "pixel_values": torch.cat(pixels)} if pixels else result

    return batch
