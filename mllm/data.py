"""LLaVA JSON and JSONL rows -> examples and batches; what a user can get wrong is found before training.

Pictures are opened when they are needed; they may be plain files or members of webdataset tars.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from diffclip.errors import InputError
from mllm.conversation import IGNORE, IMAGE, NoSupervisionError, encode, pair_turns, render

if TYPE_CHECKING:
    from transformers import LlavaProcessor


class Picture(NamedTuple):
    """Where a picture's bytes lie: a whole file (size 0) or a stretch of a tar."""

    file: str
    offset: int = 0
    size: int = 0

    def read(self) -> bytes:
        """The encoded picture; OSError if it cannot be read."""
        handle = os.open(self.file, os.O_RDONLY)
        try:
            return os.pread(handle, self.size or os.fstat(handle).st_size, self.offset)
        finally:
            os.close(handle)

    def open(self) -> Image.Image:
        """Decode to RGB; OSError if that fails."""
        try:
            return Image.open(io.BytesIO(self.read())).convert("RGB")
        except UnidentifiedImageError:
            raise OSError("not a picture") from None


class Row(NamedTuple):
    """One conversation: where it came from, its turns, its pictures."""

    key: str  # "file.json: row 17 (id abc)"
    conversation: list[dict[str, str]]
    pictures: list[Picture]


def load_rows(files: Sequence[str | Path], image_root: str | Path, *, image_prefix: str = "") -> list[Row]:
    """Read rows `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}` and check them all.

    Args:
        files: JSON arrays or JSONL files; several make a mixture, in order.
        image_root: folder that the rows' `image` paths start from. A path that is no file there is looked for
            in the tars of its folder: `shots/train/7.jpg` as member `7.jpg` of a tar in `shots/train/`.
        image_prefix: keep only rows whose image path starts with this; "coco/" is LLaVA-665K's COCO subset.

    Raises:
        InputError: unreadable file, missing picture, turns out of order, empty answer; names the row.
    """
    raw = [
        (f"{path}: row {number} (id {row.get('id', '?')})", row, _image_names(row))
        for path in files
        for number, row in enumerate(read_json_rows(path))
    ]
    raw = [entry for entry in raw if not image_prefix or any(n.startswith(image_prefix) for n in entry[2])]
    if not raw:
        kept = f" with an image path that starts with `{image_prefix}`" if image_prefix else ""
        raise InputError(f"{', '.join(map(str, files))}: no rows{kept}; check the file and image_prefix")
    pictures = find_pictures(image_root, {name for _, _, names in raw for name in names})
    rows, problems = [], []
    for key, row, names in raw:
        missing = [name for name in names if pictures[name] is None]
        problem = _turn_problem(row.get("conversations"))
        if missing:
            problem = f"picture {missing[0]} is not under {image_root}, nor in a tar there; check image_root"
        if problem:
            problems.append(f"{key}: {problem}")
        else:
            rows.append(Row(key, row["conversations"], [pictures[name] for name in names]))
    _report(problems)
    return rows


def find_pictures(root: str | Path, names: Iterable[str]) -> dict[str, Picture | None]:
    """Each name's place under `root`, as a file or as a member of a tar in its folder, or None."""
    places: dict[str, Picture | None] = {}
    tars: dict[str, dict[str, Picture]] = {}  # by folder, read only where files are missing
    for name in names:
        path = os.path.join(root, name)
        if os.path.isfile(path):
            places[name] = Picture(path)
            continue
        folder, base = os.path.split(path)
        if folder not in tars:
            tars[folder] = _tar_members(Path(folder))
        places[name] = tars[folder].get(base)
    return places


class ConversationDataset(Dataset):
    """Examples for training.

    `dataset[i]` holds input_ids and labels (tokens,) int64; with pictures, also pixel_values (n, 3, H, W).
    """

    def __init__(
        self, rows: Sequence[Row], processor: "LlavaProcessor", *, template: str, max_length: int = 2048
    ) -> None:
        """
        Args:
            rows: from `load_rows`.
            processor: of the model to train.
            template: conversation format, see `mllm.conversation`.
            max_length: longer examples are cut at the end, picture tokens counted.

        Raises:
            InputError: a row whose conversation shows more or fewer pictures than it has.
        """
        self.rows, self.processor = rows, processor
        self.template, self.max_length = template, max_length
        self.image_tokens = image_tokens(processor)
        self.end_token = processor.tokenizer.eos_token
        problems = []
        for row in rows:
            shown = sum(segment.text.count(IMAGE) for segment in self._segments(row))
            if shown != len(row.pictures):
                problems.append(
                    f"{row.key}: has {len(row.pictures)} pictures, but its conversation shows {shown} in "
                    f"template `{template}`; put one {IMAGE} into a question for each picture"
                )
        _report(problems)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        encoded = encode(self._segments(row), self.processor.tokenizer, self.image_tokens)
        example = {name: torch.tensor(ids[: self.max_length]) for name, ids in encoded.items()}
        if (example["labels"] == IGNORE).all():
            raise NoSupervisionError(f"{row.key}: no supervised token in the first {self.max_length}; raise max_length")
        shown = int((example["input_ids"] == self.processor.image_token_id).sum())
        if shown != self.image_tokens * len(row.pictures):
            raise InputError(f"{row.key}: max_length {self.max_length} cuts a picture off; raise it")
        if row.pictures:
            pixels = self.processor.image_processor([_open(p, row.key) for p in row.pictures], return_tensors="pt")
            example["pixel_values"] = pixels["pixel_values"]
        return example

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every example, picture tokens counted, for batches of equal length."""
        texts = ["".join(s.text for s in self._segments(row)) for row in self.rows]
        counts = [len(ids) for ids in self.processor.tokenizer(texts)["input_ids"]]
        extra = self.image_tokens - 1
        return [min(n + extra * len(r.pictures), self.max_length) for n, r in zip(counts, self.rows)]

    def _segments(self, row: Row) -> list:
        return render(row.conversation, self.template, end_token=self.end_token)


def training_order(dataset: ConversationDataset, kind: str, batch: int, steps: int, seed: int) -> list[int]:
    """Return the rows of a whole run in the order in which the optimiser sees them, decided by the seed alone.

    Args:
        kind: "random"; "file" for the rows as they stand, epoch after epoch; "length" for batches of like length: each
            epoch is shuffled and sorted within stretches of 64 batches, and the batches are then shuffled. The longest
            batch comes first, so that memory runs out in the first step or never.
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
            stretches = np.array_split(epoch, range(64 * batch, len(epoch), 64 * batch))
            sorted_rows = np.concatenate([one[np.argsort(-lengths[one], kind="stable")] for one in stretches])
            # the rows left out are a random stretch of it, not always the shortest
            cut = rng.integers(0, len(rows) % batch + 1)
            batches = rng.permutation(sorted_rows[cut : cut + len(rows) // batch * batch].reshape(-1, batch))
            if not order:
                longest = lengths[batches].max(axis=1).argmax()
                batches[[0, longest]] = batches[[longest, 0]]
            epoch = batches.reshape(-1)
        order.append(epoch)
    return np.concatenate(order)[: steps * batch].tolist()


def collate(
    processor: "LlavaProcessor",
) -> Callable[[list[dict[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """A collator that pads on the right.

    It returns input_ids, attention_mask, labels (batch, tokens) int64 and, unless all rows are text alone,
    pixel_values (pictures of the batch in order, 3, height, width).
    """
    pad = processor.tokenizer.pad_token_id

    def batch(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = [e["input_ids"] for e in examples]
        result = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=IGNORE),
        }
        pixels = [e["pixel_values"] for e in examples if "pixel_values" in e]
        return {**result, "pixel_values": torch.cat(pixels)} if pixels else result

    return batch


def image_tokens(processor: "LlavaProcessor") -> int:
    """How many placeholders the processor writes for one picture."""
    pixels = processor.image_processor([Image.new("RGB", (64, 64))], return_tensors="pt")
    return processor.replace_image_token(pixels, 0).count(IMAGE)


def read_json_rows(path: str | Path) -> Iterator[dict]:
    """Rows of a JSON array or of a file with one JSON object a line; InputError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a LLaVA JSON or JSONL file")
    with open(path, encoding="utf-8") as f:
        head = f.read(64).lstrip()[:1]
        f.seek(0)
        try:
            rows = json.load(f) if head == "[" else [json.loads(line) for line in f if line.strip()]
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON: {error}; expected an array of rows, or one row a line") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is no JSON object; expected id, image and conversations")
        yield row


def _open(picture: Picture, key: str) -> Image.Image:
    try:
        return picture.open()
    except OSError as error:
        raise InputError(f"{key}: {picture.file}: {error}; mend the picture or drop the row") from None


def _image_names(row: dict) -> list[str]:
    image = row.get("image") or []
    return [image] if isinstance(image, str) else list(image)


def _turn_problem(conversation: object) -> str:
    """What is wrong with a conversation, or ""."""
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        return "`conversations` is no list of turns"
    try:
        _, answers = pair_turns(conversation)
    except ValueError as error:
        return str(error)
    if any(not answer.strip() for answer in answers):
        return "an answer is empty; drop the turn"
    if any(IMAGE in answer for answer in answers):
        return f"an answer contains {IMAGE}; only questions may show pictures"
    return ""


def _report(problems: list[str]) -> None:
    if problems:
        rest = f" ({len(problems) - 1} more rows have problems)" if len(problems) > 1 else ""
        raise InputError(problems[0] + rest)


def _tar_members(folder: Path) -> dict[str, Picture]:
    """Members of all tars in a folder by file name."""
    members = {}
    for path in sorted(folder.glob("*.tar")):
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.isfile():
                        place = Picture(str(path), member.offset_data, member.size)
                        members[os.path.basename(member.name)] = place
        except tarfile.TarError as error:
            raise InputError(f"{path}: not a readable tar file ({error}); download or write it again") from None
    return members
