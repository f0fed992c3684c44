"""webdataset tars as random-access tables: each is walked once for the places of its members, then read by offset.

So shuffling, splitting over ranks and resuming at a step are arithmetic on indices. The walk of a large tar is kept
in a cache folder, since CC12M has more than a thousand of them and every process needs the places.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffclip.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
CACHE_FROM = 16 << 20  # bytes; a smaller tar is walked in less time than its index is read


def cache_dir() -> Path:
    """Folder for indices and downloaded shards: $DIFFCLIP_CACHE, or ~/.cache/diffclip."""
    return Path(os.environ.get("DIFFCLIP_CACHE", "~/.cache/diffclip")).expanduser()


@dataclass
class Shard:
    """One tar: where each sample's picture and caption lie in it, and what is wrong with the rest of it."""

    path: str
    keys: np.ndarray  # (samples,) bytes; names without suffix
    spans: np.ndarray  # (samples, 4) int64: image offset, image bytes, caption offset, caption bytes
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key, what it lacks)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        """The name of a sample, `shard.tar/key`."""
        return f"{self.path}/{os.fsdecode(bytes(self.keys[index]))}"

    def read(self, index: int) -> tuple[bytes, bytes]:
        """Image bytes and caption bytes of one sample; OSError when the file is gone or shorter than it was."""
        image_at, image_size, text_at, text_size = (int(n) for n in self.spans[index])
        handle = os.open(self.path, os.O_RDONLY)  # not kept: a thousand shards are more than a process may hold open
        try:
            image, text = os.pread(handle, image_size, image_at), os.pread(handle, text_size, text_at)
        finally:
            os.close(handle)
        if len(image) != image_size or len(text) != text_size:
            raise OSError("the shard has become shorter since it was indexed")
        return image, text


def index_shards(paths: Sequence[str], caption: str = "txt") -> list[Shard]:
    """Index many tars, a few at a time, with a progress bar when it takes long; order kept.

    Ranks of one run start at different shards and find in the cache what the others have done.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = len(paths) * rank // world
    order = [*range(first, len(paths)), *range(first)]
    with ThreadPoolExecutor(4) as pool:  # threads: the walk mostly waits for the disk
        done = pool.map(lambda i: index_shard(paths[i], caption), order)
        bar = tqdm(done, "indexing shards", len(order), unit="shard", delay=2, leave=False, disable=rank > 0)
        shards = dict(zip(order, bar))
    return [shards[i] for i in range(len(paths))]


def index_shard(path: str, caption: str = "txt") -> Shard:
    """List the pairs of an img2dataset/webdataset tar. One that ends early keeps what lies before its end.

    Args:
        path: a local tar file.
        caption: which member holds the text: "txt", or "json" for its `captions` / `caption` entry.

    Raises:
        InputError: the file is not a tar, holds no pair of an image and a caption, or a member with a path
            that leads outside.
    """
    stat = os.stat(path)
    if stat.st_size < CACHE_FROM:
        return _walk(path, caption)
    identity = f"{os.path.abspath(path)}:{stat.st_size}:{stat.st_mtime_ns}:{caption}:1"
    cached = cache_dir() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    if cached.is_file():
        with np.load(cached, allow_pickle=False) as stored:
            problems = [tuple(pair) for pair in stored["problems"].tolist()]
            return Shard(path, stored["keys"], stored["spans"], problems)
    shard = _walk(path, caption)
    buffer = io.BytesIO()
    np.savez(buffer, keys=shard.keys, spans=shard.spans, problems=np.array(shard.problems, dtype=str).reshape(-1, 2))
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}.{os.urandom(4).hex()}.tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, cached)
    return shard


def _walk(path: str, caption: str) -> Shard:
    members: dict[str, dict[str, tuple[int, int]]] = {}
    size, problems = os.path.getsize(path), []
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError as error:
                    problems.append((path, f"the shard ends early ({error})"))
                    break
                if member is None:
                    if size < tar.offset + tarfile.BLOCKSIZE:  # tarfile takes a cut header for the end
                        problems.append((path, "the shard ends early (no end-of-archive block)"))
                    break
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise InputError(f"{path}: member {member.name!r} has a path that leads outside; do not use it")
                key, dot, suffix = os.path.basename(member.name).partition(".")
                if not member.isfile() or not dot:
                    continue
                if member.offset_data + member.size > size:
                    problems.append((path, f"the shard ends early, within {member.name}"))
                    break
                kind = "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else suffix.lower()
                name = os.path.join(os.path.dirname(member.name), key)
                members.setdefault(name, {})[kind] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: not a readable tar file ({error}); download or write it again") from None
    pairs = {}
    for key, kinds in members.items():
        if "image" in kinds and caption in kinds:
            pairs[key] = kinds
        else:
            problems.append((f"{path}/{key}", "no picture" if "image" not in kinds else f"no .{caption} caption"))
    if not pairs:
        raise InputError(
            f"{path}: no sample has both an image and a .{caption} caption "
            f"({len(members)} keys in it); check the shard, or set caption_member"
        )
    spans = np.array([(*m["image"], *m[caption]) for m in pairs.values()], dtype=np.int64)
    return Shard(path, np.array([os.fsencode(key) for key in pairs]), spans, problems)
