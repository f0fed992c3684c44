"""One encoding pass per (weights, transform, precision, images), kept on disk and shared by every protocol.

The cache key is a hash of what the features depend on, so a changed checkpoint never meets old ones; two processes
may share a folder.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffclip.base.errors import InputError
from diffclip.base.files import whole
from diffclip.base.fingerprint import fingerprint
from diffclip.base.images import DECODING
from diffclip.base.lines import printable
from diffclip.base.threads import cores
from diffclip.benchmarks.images import Images
from diffclip.weights import read_safetensors

PRECISIONS = {  # "tf32": float32 whose products a GPU rounds to 10 bits
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FORMAT = 2  # raise it when the meaning of a stored file changes


class ImageFeatures(NamedTuple):
    """Features of N images, float32 on the CPU, un-normalised."""

    before: Tensor  # (N, vision width): pooled, before the projection
    after: Tensor  # (N, embed_dim): after the projection, the joint space
    labels: Tensor  # (N,) int64


@dataclass(eq=False)
class Encoder:
    """A dual encoder with its transform and tokenizer, and the folder where its features are kept.

    Args:
        model: an open_clip-style model: `encode_image`, `encode_text`, and a `visual` with trunk and head
            (timm towers, ours), with a `proj` matrix (open_clip's own ViT, CoCa), or CLIP's ResNet. Put into eval mode.
        preprocess: PIL image -> (3, H, W) float tensor. Its printed form is part of the cache key.
        tokenizer: list of strings -> int64 (n, context).
        cache_dir: where features are stored; None keeps nothing.
        precision: "float32", "tf32" (on a GPU), "bfloat16" or "float16" (autocast); the last two are stored as float16.
        workers: DataLoader processes; None takes up to 8 with an accelerator and none on a CPU.
    """

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    _: KW_ONLY
    cache_dir: str | Path | None = None
    precision: str = "float32"
    batch_size: int = 128
    workers: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
        self.model.eval()
        self.device = next(self.model.parameters()).device
        if self.precision == "tf32" and self.device.type != "cuda":
            raise InputError(f"precision tf32: the {self.device.type} has none; use float32 (fp32), or run on a GPU")
        self.fingerprint = fingerprint(self.model)

    def images(self, images: Images, name: str = "images") -> ImageFeatures:
        """Encode images in order, or read them back; InputError names one that cannot be decoded."""
        stored = self._cached(self._images_key(images), lambda: _joined(self._encode_batches(images, name)))
        return ImageFeatures(stored["before"].float(), stored["after"].float(), stored["labels"])

    def texts(self, texts: Sequence[str], name: str = "texts") -> Tensor:
        """Encode texts to (n, embed_dim) float32, un-normalised, on the CPU; cached by their token ids."""
        ids = torch.cat([self.tokenizer(list(texts[i : i + 4096])) for i in range(0, len(texts), 4096)])
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        key = {"ids": digest, "shape": list(ids.shape), "kind": "text"}
        return self._cached(key, lambda: {"after": self._encode_ids(ids, name)})["after"].float()

    def images_together(self, wanted: Mapping[str, Images]) -> None:
        """Encode images on all ranks of the process group; afterwards `images` of rank 0 finds them stored.

        Rank r encodes each batch r, r + ranks, ... of those that one process would make, so that the features are
        the same bits on machines that are alike. Only rank 0 needs to see the cache. For an image that cannot be
        decoded every rank raises InputError.
        """
        if self.cache_dir is None:
            raise ValueError("ranks share features through a cache_dir")
        for name, images in wanted.items():
            path, key = self._place(self.cache_dir, self._images_key(images))
            stored = [path.exists()]
            dist.broadcast_object_list(stored)
            if stored[0]:
                continue
            rows = shared(partial(self._encode_batches, images, name))
            if dist.get_rank() == 0:
                save_tensors(_joined(rows), path, {"key": key})

    def images_shared(self, images: Images) -> ImageFeatures:
        """`images`, encoded by all ranks of the process group, if there is one, for all of them; nothing is stored."""
        return ImageFeatures(**_joined(shared(partial(self._encode_batches, images, "images"))))

    def _images_key(self, images: Images) -> dict:
        transform = _printed(self.preprocess)
        return {"pictures": images.digest, "transform": transform, "decoding": DECODING, "kind": "image"}

    def _place(self, folder: str | Path, key: dict) -> tuple[Path, str]:
        """The file of an entry, and the whole key, of which its name is a hash."""
        # lambda_init, the norms' epsilons and the activation are not in the weights
        model = [self.fingerprint, getattr(self.model, "model_config", None) or _printed(self.model)]
        text = json.dumps({"format": FORMAT, "model": model, "precision": self.precision, **key}, sort_keys=True)
        return Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors", text

    def _cached(self, key: dict, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.cache_dir is None:
            return compute()
        path, text = self._place(self.cache_dir, key)
        if path.exists():
            with suppress(InputError):  # damaged: made anew
                # in memory of their own, as computed ones: products of what a file aligns otherwise differ in last bits
                return {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
        features = compute()
        save_tensors(features, path, {"key": text})
        return features

    @torch.no_grad()
    def _encode_batches(self, images: Images, name: str, first: int = 0, step: int = 1) -> list[dict[str, Tensor]]:
        rows = range(len(images))
        batches = [rows[i : i + self.batch_size] for i in rows[:: self.batch_size]][first::step]
        usual = 0 if self.device.type == "cpu" else min(8, cores())
        loader = DataLoader(
            _Transformed(images, self.preprocess),
            batch_size=None,  # an item is a batch
            sampler=batches,
            num_workers=usual if self.workers is None else self.workers,
            pin_memory=self.device.type == "cuda",
        )
        encoded = []
        with self._progress(sum(map(len, batches)), name, "image") as bar:
            for batch in loader:
                if isinstance(batch, InputError):
                    raise batch
                pixels, targets = batch  # (batch, 3, H, W), (batch,)
                with self.autocast():
                    low, high = encode_image(self.model, pixels.to(self.device, non_blocking=True))
                encoded.append({"before": self._stored(low), "after": self._stored(high), "labels": targets})
                bar.update(len(targets))
        return encoded

    @torch.no_grad()
    def _encode_ids(self, ids: Tensor, name: str) -> Tensor:
        features = []
        encode_text = cast(Callable[[Tensor], Tensor], self.model.encode_text)
        with self._progress(len(ids), name, "text") as bar:
            for batch in ids.split(self.batch_size):  # (batch, context)
                with self.autocast():
                    features.append(self._stored(encode_text(batch.to(self.device))))
                bar.update(len(batch))
        return torch.cat(features)

    def _stored(self, features: Tensor) -> Tensor:
        return features.to("cpu", torch.float16 if PRECISIONS[self.precision].itemsize == 2 else torch.float32)

    def autocast(self) -> AbstractContextManager:
        """What every pass of the model is to be in, so that it computes in `precision`."""
        if self.precision == "float32":
            return nullcontext()
        if self.precision == "tf32":
            return products_in_tf32()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def _progress(self, total: int, name: str, unit: str) -> tqdm:
        # disable=None: a bar on a terminal only, never in a log file
        return tqdm(total=total, desc=printable(name), unit=unit, leave=False, disable=True if self.quiet else None)


@contextmanager
def products_in_tf32() -> Iterator[None]:
    """Let matrix products of float32 on a GPU be TF32 within."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def shared(work: Callable[[int, int], list]) -> list:
    """The items of a list of which each rank makes every so-many-th, `work(first, step)`, on every rank.

    An InputError of one rank is raised on all. Without a process group this one makes them all.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return work(0, 1)
    try:
        share: object = work(dist.get_rank(), dist.get_world_size())
    except InputError as error:  # told to all, so that none waits for this rank
        share = error
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    if failed := next((other for other in shares if isinstance(other, InputError)), None):
        raise failed
    return [shares[n % len(shares)][n // len(shares)] for n in range(sum(map(len, shares)))]


def encode_image(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features before (N, vision width) and after (N, embed_dim) the projection, in one forward.

    CLIP's ResNets end in attention with the projection as its last matrix, which the identity then stands in for.
    """
    visual: Any = model.visual  # of open_clip, timm or ours, whose types say nothing of their parts
    if hasattr(visual, "trunk"):
        before = visual.trunk(images)
        return before, visual.head(before)
    if hasattr(visual, "proj"):  # open_clip's own transformers multiply by it last, and leave it out when it is None
        owner, name, projection, without = visual, "proj", visual.proj, None
    elif hasattr(getattr(visual, "attnpool", None), "c_proj"):
        owner, name, projection = visual.attnpool, "c_proj", visual.attnpool.c_proj
        without = _identity(projection)
    else:
        raise InputError(f"{type(visual).__name__}: its features before the projection are not known")
    setattr(owner, name, without)
    try:
        before = visual(images)
    finally:
        setattr(owner, name, projection)
    before = before[0] if isinstance(before, tuple) else before  # CoCa's tower gives its tokens too
    if isinstance(projection, nn.Module):
        return before, projection(before)
    return before, before if projection is None else before @ projection


def _identity(layer: nn.Linear) -> nn.Linear:
    """A layer that gives back what `layer` would take."""
    same = nn.Linear(layer.in_features, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    nn.init.eye_(same.weight)
    nn.init.zeros_(same.bias)
    return same


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)


@dataclass
class _Transformed(Dataset):
    """Batches of images after the transform; one with a broken image is the error, to pass whole through a worker."""

    images: Images
    preprocess: Callable[[Image.Image], Tensor]

    def __getitem__(self, rows: range) -> tuple[Tensor, Tensor] | InputError:
        try:
            pairs = [(self.preprocess(image), label) for image, label in map(self.images.__getitem__, rows)]
        except InputError as error:
            return error
        pixels, labels = zip(*pairs)
        return torch.stack(pixels), torch.tensor(labels)


def _joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def _printed(part: object) -> str:
    """Return the printed form of a transform or model without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(part))
