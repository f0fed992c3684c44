"""Rows of conversations -> examples, the order of a whole run, and batches."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from diffclip.base.errors import InputError
from mllm.conversation import IGNORE, IMAGE, NoSupervisionError, encode, render
from mllm.data.rows import Rows
from mllm.processing import bounded


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
        example = {name: torch.tensor(ids[: self.max_length]) for name, ids in encoded.items()}
        if (example["labels"] == IGNORE).all():
            raise NoSupervisionError(f"{row.key}: no supervised token in the first {self.max_length}; raise max_length")
        placeholders = int((example["input_ids"] == self.processor.image_token_id).sum())
        if placeholders != self.image_tokens * len(row.images):
            raise InputError(f"{row.key}: max_length {self.max_length} cuts an image off; raise it")
        if row.images:
            images = bounded((image.open(row.key) for image in row.images), self.processor.image_processor)
            pixels = self.processor.image_processor(images, return_tensors="pt")
            example["pixel_values"] = pixels["pixel_values"]
        return example

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every example, image tokens counted, for batches of equal length."""
        lengths: list[int] = []
        for conversations, images in self.rows.texts():
            rendered = (render(turns, self.template, end_token=self.end_token) for turns in conversations)
            ids = self.processor.tokenizer(["".join(s.text for s in segments) for segments in rendered])["input_ids"]
            extra = self.image_tokens - 1
            lengths += [min(len(row) + extra * shown, self.max_length) for row, shown in zip(ids, images)]
        return lengths


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


def image_tokens(processor: LlavaProcessor) -> int:
    """How many placeholders the processor writes for one image."""
    pixels = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
    return processor.replace_image_token(pixels, 0).count(IMAGE)
