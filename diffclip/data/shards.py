"""webdataset tars as random-access tables: each is walked once for the places of its members, then read by offset.

So shuffling, splitting over ranks and resuming at a step are arithmetic on indices. The walk of a large tar is kept
in a cache folder, since CC12M has more than a thousand of them and every process needs the places.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffclip.base.archives import members, printable, read_at
from diffclip.base.errors import InputError
from diffclip.base.files import write_whole

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of several images under one key the first of these is taken
EMPTY = "the shard is empty"
LITTER = ("thumbs.db", "desktop.ini")  # of a file manager, as are names with a dot in front
CACHE_FROM = 16 << 20  # bytes; a smaller tar is walked in less time than its index is read

Places = dict[str, tuple[int, int]]  # a sample's members by suffix: (offset, bytes)


def cache_dir() -> Path:
    """Folder for indices and downloaded shards: $DIFFCLIP_CACHE, or ~/.cache/diffclip."""
    return Path(os.environ.get("DIFFCLIP_CACHE", "~/.cache/diffclip")).expanduser()


@dataclass
class Shard:
    """One tar: where each sample's image and caption lie in it, and what is wrong with the rest of it."""

    path: str
    keys: np.ndarray  # (samples,) bytes; names without suffix
    spans: np.ndarray  # (samples, 4) int64: image offset, image bytes, caption offset, caption bytes
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key, what it lacks)
    notices: list[tuple[str, str]] = field(default_factory=list)  # (key, what was read in one way of several)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        """The name of a sample, `shard.tar/key`."""
        return f"{self.path}/{printable(bytes(self.keys[index]))}"

    def read(self, index: int) -> tuple[bytes, bytes]:
        """Image bytes and caption bytes of one sample; OSError when the file is gone or shorter than it was."""
        image_at, image_size, text_at, text_size = self.spans[index].tolist()
        image, text = read_at(self.path, (image_at, image_size), (text_at, text_size))
        return image, text


def index_shards(paths: Sequence[str], caption: str = "txt") -> list[Shard]:
    """Index many tars, a few at a time, with a progress bar when it takes long; order kept.

    Ranks of one run start at different shards and find in the cache what the others have done. InputError as
    `index_shard`, or if none of the tars holds a pair.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = len(paths) * rank // world
    order = [*range(first, len(paths)), *range(first)]
    with ThreadPoolExecutor(4) as pool:  # threads: the walk mostly waits for the disk
        done = pool.map(lambda i: index_shard(paths[i], caption), order)
        bar = tqdm(done, "indexing shards", len(order), unit="shard", delay=2, leave=False, disable=rank > 0)
        shards = dict(zip(order, bar))
    if paths and not any(len(shard) for shard in shards.values()):
        key, reason = shards[0].problems[0]
        names = "name its images .jpg, .jpeg, .png or .webp, or set caption_member"
        remedy = "download or write it again" if reason == EMPTY else names
        raise InputError(f"{key}: {reason}; {remedy}")
    return [shards[i] for i in range(len(paths))]


def index_shard(path: str, caption: str = "txt") -> Shard:
    """List the pairs of an img2dataset/webdataset tar, in the order in which their keys first appear.

    A tar that ends early keeps what lies before its end, and one without pairs is a problem of the table that it
    belongs to. A second member of the same name starts a new sample, as where two shards were joined. `caption` is
    the member with the text: "txt", or "json" for its `captions` / `caption` entry. InputError if the file is not a
    tar, is compressed, or has a member with a path that leads outside.
    """
    stat = os.stat(path)
    if stat.st_size < CACHE_FROM:
        return _index(path, caption)
    identity = f"{os.path.abspath(path)}:{stat.st_size}:{stat.st_mtime_ns}:{caption}:2"  # 2: the meaning of an index
    cached = cache_dir() / "index" / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]}.npz"
    if cached.is_file():
        with np.load(cached, allow_pickle=False) as stored:
            problems, notices = ([*map(tuple, stored[name].tolist())] for name in ("problems", "notices"))
            return Shard(path, stored["keys"], stored["spans"], problems, notices)
    shard = _index(path, caption)
    buffer = io.BytesIO()
    left_out, noted = (np.array(pairs, dtype=str).reshape(-1, 2) for pairs in (shard.problems, shard.notices))
    np.savez(buffer, keys=shard.keys, spans=shard.spans, problems=left_out, notices=noted)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cached, buffer.getvalue())
    return shard


def _index(path: str, caption: str) -> Shard:
    samples, problems = walk(path)
    keys, spans, several = [], [], []
    for key, places in samples:
        images = sorted((s for s in places if f".{s.lower()}" in IMAGE_SUFFIXES), key=lambda s: image_rank(f".{s}"))
        text = next((s for s in places if s.lower() == caption), None)
        if not images or text is None:
            problems.append((f"{path}/{printable(key)}", f"no .{caption} caption" if images else "no image"))
            continue
        if len(images) > 1:
            several.append((f"{path}/{printable(key)}", ", ".join(images)))
        keys.append(os.fsencode(key))
        spans.append((*places[images[0]], *places[text]))
    if not samples:
        problems.insert(0, (path, EMPTY))
    elif not keys:
        suffixes = sorted({f".{printable(suffix)}" for _, places in samples for suffix in places})
        contents = f"{len(samples)} keys in it, with {', '.join(suffixes[:8])}"
        problems.insert(0, (path, f"no sample has both an image and a .{caption} caption ({contents})"))
    notices = []
    if several:
        (first, names), order = several[0], ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        reason = f"hold several images (this one {names}): the first of {order} counts"
        notices.append((first, f"{len(several)} keys of the shard {reason}"))
    if doubled := len(samples) - len({key for key, _ in samples}):
        notices.append((path, f"{doubled} keys of the shard occur again with members of the same names: own samples"))
    return Shard(
        path, np.array(keys, dtype=np.bytes_), np.array(spans, dtype=np.int64).reshape(-1, 4), problems, notices
    )


def walk(path: str | Path) -> tuple[list[tuple[str, Places]], list[tuple[str, str]]]:
    """(key, {suffix: (offset, bytes)}) of all samples of a tar, and where it ends early as (path, reason)."""
    path = str(path)
    samples: list[tuple[str, Places]] = []
    latest: dict[str, Places] = {}  # the sample of each key that members are put to
    before, together = "", list[str]()  # the last member's key, and the suffixes since then
    if os.path.getsize(path) == 0:
        return samples, []
    entries, ends_early = members(path)
    for member in entries:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise InputError(f"{path}: member {member.name!r} has a path that leads outside; do not use it")
        folder, name = os.path.split(member.name)
        stem, dot, suffix = name.partition(".")
        if not member.isfile() or not dot or not stem or name.lower() in LITTER or "__MACOSX" in folder:
            continue
        key = os.path.join(folder, stem)
        if key != before:
            before, together = key, []
        if key not in latest or suffix in latest[key]:
            # what came just before belongs to the new sample, too
            latest[key] = {s: latest[key].pop(s) for s in together if suffix not in together}
            samples.append((key, latest[key]))
            together = list(latest[key])
        latest[key][suffix] = (member.offset_data, member.size)
        together.append(suffix)
    return samples, [(path, f"the shard {ends_early}")] if ends_early else []


def image_rank(suffix: str) -> int:
    """The place of a suffix among `IMAGE_SUFFIXES`, which is their number for what is no image."""
    return IMAGE_SUFFIXES.index(suffix.lower()) if suffix.lower() in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES)
