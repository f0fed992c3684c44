"""webdataset tars as random-access tables: each is walked once for the places of its members, then read by offset.

So shuffling, splitting over ranks and resuming at a step are arithmetic on indices. The places in a large tar are kept
in a file of a cache folder and read from there, one pair at a time: CC12M has more than a thousand shards, and so no
process holds 12 million places in its memory.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from diffclip.base.archives import as_text, members, read_at
from diffclip.base.cache import CHECKSUM, cache_dir, checksum, keep
from diffclip.base.errors import InputError
from diffclip.base.files import open_file
from diffclip.base.ranks import rank, world
from diffclip.data.captions import parse_captions
from diffclip.data.layout import TAR_IMAGES, Layout

IMAGE_SUFFIXES = tuple(f".{suffix}" for suffix in TAR_IMAGES)
EMPTY = "the shard is empty"
LITTER = ("thumbs.db", "desktop.ini")  # of a file manager, as are names with a dot in front
CACHE_FROM = 16 << 20  # bytes; a smaller tar is walked in less time than its index is read
FORMAT = 4  # of the index files; raise it when their meaning changes
BLOCK = 512  # bytes; all members of a tar start at a multiple

Places = dict[str, tuple[int, int]]  # a sample's members by suffix: (offset, bytes)


class Place(NamedTuple):
    """Where a pair lies in its tar: image and caption as (offset, bytes), and the suffix of the latter."""

    image: tuple[int, int]
    caption: tuple[int, int]
    member: str


def record_type(width: int) -> np.dtype:
    """One pair of an index: starts in blocks of 512 bytes, sizes in bytes, the caption's member, the key, a sum."""
    numbers = [(name, "<u4") for name in ("image", "image_bytes", "caption", "caption_bytes")]
    return np.dtype([*numbers, ("member", "u1"), ("key", f"S{max(1, width)}"), ("sum", "u1", CHECKSUM)])


@dataclass
class Shard:
    """One tar: where each sample's image and caption lie in it, and what is wrong with the rest of it."""

    path: str
    layout: Layout
    count: int
    width: int  # bytes of the longest key
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key, what it lacks)
    notices: list[tuple[str, str]] = field(default_factory=list)  # (key, what was read in one way of several)
    records: np.ndarray | None = None  # (samples,) of `record_type`; None: they are read from the file
    file: Path | None = None
    start: int = 0  # of the records in the file
    name: str = ""  # what messages call it, if not by its path

    def __len__(self) -> int:
        return self.count

    def key(self, row: int) -> str:
        """The name of a sample, `shard.tar/key`."""
        return f"{self.name or self.path}/{as_text(bytes(self._record(row)['key']))}"

    def place(self, row: int) -> Place:
        """Where one sample lies in the tar."""
        record = self._record(row)
        image, image_bytes, caption, caption_bytes, member = (int(record[i]) for i in range(5))
        return Place((image * BLOCK, image_bytes), (caption * BLOCK, caption_bytes), self.layout.caption_member[member])

    def read(self, row: int) -> tuple[bytes, list[str]]:
        """Image bytes and captions of one sample; OSError or ValueError where it cannot be read."""
        place = self.place(row)
        image, caption = read_at(self.path, place.image, place.caption)
        return image, self._captions(caption, place)

    def captions(self, row: int) -> list[str]:
        """The captions alone."""
        place = self.place(row)
        return self._captions(read_at(self.path, place.caption)[0], place)

    def _captions(self, raw: bytes, place: Place) -> list[str]:
        return parse_captions(raw, place.member, self.layout.caption_column, self.layout.encoding)

    def _record(self, row: int) -> np.void:
        if self.records is None:
            kind = record_type(self.width)
            try:
                raw = read_at(self.file or "", (self.start + row * kind.itemsize, kind.itemsize))[0]
            except OSError:  # somebody has emptied the cache
                raw = b""
            if raw and raw[-CHECKSUM:] == _sum(raw, row):
                return np.frombuffer(raw, kind)[0]
            self.records = _index(self.path, self.layout).records
        assert self.records is not None
        return self.records[row]


def _sum(record: bytes, row: int) -> bytes:
    """The checksum that ends a record: of the rest of it and its place, since nobody reads a whole index for one."""
    return checksum(record[:-CHECKSUM], b"%d" % row)


def index_shards(paths: Sequence[str], layout: Layout | None = None) -> list[Shard]:
    """Index many tars, a few at a time, with a progress bar when it takes long; order kept.

    Ranks of one run start at different shards and find in the cache what the others have done. InputError as
    `index_shard`, or if none of the tars holds a pair.
    """
    layout = layout or Layout()
    first = len(paths) * rank() // world()
    order = [*range(first, len(paths)), *range(first)]
    with ThreadPoolExecutor(4) as pool:  # threads: the walk mostly waits for the disk
        done = pool.map(lambda i: index_shard(paths[i], layout), order)
        bar = tqdm(done, "indexing shards", len(order), unit="shard", delay=2, leave=False, disable=rank() > 0)
        shards = dict(zip(order, bar))
    if paths and not any(len(shard) for shard in shards.values()):
        key, reason = shards[0].problems[0]
        wanted = ", ".join(f".{suffix}" for suffix in layout.image_member or TAR_IMAGES)
        names = f"set image_member and caption_member to what its images (now {wanted}) and captions are called"
        remedy = "download or write it again" if reason == EMPTY else names
        raise InputError(f"{key}: {reason}; {remedy}")
    return [shards[i] for i in range(len(paths))]


def index_shard(path: str, layout: Layout, folder: Path | None = None) -> Shard:
    """List the pairs of an img2dataset/webdataset tar, in the order in which their keys first appear.

    A tar that ends early keeps what lies before its end, and one without pairs is a problem of the table that it
    belongs to. A second member of the same name starts a new sample, as where two shards were joined. InputError if
    the file is not a tar, is compressed, or has a member with a path that leads outside. The index of a large tar is
    kept in `folder`, or else in the cache.
    """
    try:
        small = os.path.getsize(path) < CACHE_FROM
        cached = index_file(path, layout)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); download it again, or leave it out") from None
    if small:
        return _index(path, layout)
    cached = folder / cached.name if folder else cached
    if (found := _kept(path, layout, cached)) is None:
        shard = _index(path, layout)
        assert shard.records is not None
        values = {name: getattr(shard, name) for name in ("count", "width", "problems", "notices")}
        head = json.dumps(values).encode() + b"\n"
        keep(cached, checksum(head) + head + shard.records.tobytes())
        found = _kept(path, layout, cached) or shard  # which then stays in memory
    return found


def _kept(path: str, layout: Layout, cached: Path) -> Shard | None:
    """What the cache holds of a tar; None if it is not there whole."""
    try:
        with open_file(cached) as f:
            known, head = f.read(CHECKSUM), f.readline()
            if known != checksum(head):
                return None
            values = json.loads(head)
            values |= {name: [*map(tuple, values[name])] for name in ("problems", "notices")}
            shard = Shard(path, layout, **values, file=cached, start=f.tell())
            size = f.seek(0, os.SEEK_END) - shard.start
    except (InputError, OSError):
        return None
    return shard if size == len(shard) * record_type(shard.width).itemsize + CHECKSUM else None


def index_file(path: str, layout: Layout) -> Path:
    """Where the index of a tar is kept: another file for each state of the tar and each way to read it."""
    stat = os.stat(path)
    what = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns, layout.image_member, layout.caption_member, FORMAT)
    return cache_dir() / "index" / f"{hashlib.sha256(os.fsencode(repr(what))).hexdigest()[:32]}.places"


def _index(path: str, layout: Layout) -> Shard:
    samples, problems = walk(path)
    found = _pairs(samples, layout)
    notices = []
    if samples and not found:  # names with dots in them: a.b.jpg and a.b.txt are the pair a.b
        by_last_dot, _ = walk(path, last_dot=True)
        if found := _pairs(by_last_dot, layout):
            samples = by_last_dot
            notices.append((path, "the names of its members hold dots: they are parted at the last one"))
    paired = {number for number, *_ in found}
    captions = " or ".join(f".{suffix}" for suffix in layout.caption_member)
    images = layout.image_member or TAR_IMAGES
    for number, (key, places) in enumerate(samples):
        if number not in paired:
            sized = all(size < 1 << 32 for _, size in places.values())
            lacks = f"no {captions} caption" if any(s.lower() in images for s in places) else "no image"
            problems.append((f"{path}/{as_text(key)}", lacks if sized else "a member of more than 4 GB"))
    if not samples:
        problems.insert(0, (path, EMPTY))
    elif not found:
        suffixes = sorted({f".{as_text(suffix)}" for _, places in samples for suffix in places})
        contents = f"{len(samples)} keys in it, with {', '.join(suffixes[:8])}"
        problems.insert(0, (path, f"no sample has both an image and a {captions} caption ({contents})"))
    if several := [(number, own) for number, _, own, _, _ in found if len(own) > 1]:
        (first, own), order = several[0], ", ".join(images)
        reason = f"hold several images (this one {', '.join(own)}): the first of {order} counts"
        notices.append((f"{path}/{as_text(samples[first][0])}", f"{len(several)} keys of the shard {reason}"))
    if doubled := len(samples) - len({key for key, _ in samples}):
        notices.append((path, f"{doubled} keys of the shard occur again with members of the same names: own samples"))
    names = [os.fsencode(samples[number][0]) for number, *_ in found]
    width = max(map(len, names), default=1)
    records = np.empty(len(found), dtype=record_type(width))
    for row, (name, (_, (at, size), _, (text_at, text_size), member)) in enumerate(zip(names, found)):
        records[row] = (at // BLOCK, size, text_at // BLOCK, text_size, member, name, 0)
        records["sum"][row] = [*_sum(records[row].tobytes(), row)]
    return Shard(path, layout, len(found), width, problems, notices, records)


def _pairs(
    samples: list[tuple[str, Places]], layout: Layout
) -> list[tuple[int, tuple[int, int], list[str], tuple[int, int], int]]:
    """(number of the sample, image's place, suffixes of all its images, caption's place, number of its member)."""
    wanted = layout.image_member or TAR_IMAGES
    found = []
    for number, (_, places) in enumerate(samples):
        names = sorted((s for s in places if s.lower() in wanted), key=lambda s: wanted.index(s.lower()))
        lower = {suffix.lower(): suffix for suffix in reversed(places)}
        member = next((i for i, name in enumerate(layout.caption_member) if name in lower), None)
        if names and member is not None:
            image, caption = places[names[0]], places[lower[layout.caption_member[member]]]
            if max(image[1], caption[1]) < 1 << 32:
                found.append((number, image, names, caption, member))
    return found


def walk(path: str | Path, last_dot: bool = False) -> tuple[list[tuple[str, Places]], list[tuple[str, str]]]:
    """(key, {suffix: (offset, bytes)}) of all samples of a tar, and where it ends early as (path, reason).

    A name is parted at its first dot, as webdataset does, or at the last one. Links to members stand for those.
    """
    path = str(path)
    samples: list[tuple[str, Places]] = []
    latest: dict[str, Places] = {}  # the sample of each key that members are put to
    before, together = "", list[str]()  # the last member's key, and the suffixes since then
    if os.path.getsize(path) == 0:
        return samples, []
    entries, ends_early = members(path)
    targets = {m.name: m for m in entries if m.isfile()} if any(m.islnk() or m.issym() for m in entries) else {}
    for member in entries:
        if member.name.startswith("/") or ".." in member.name.split("/"):
            raise InputError(f"{path}: member {member.name!r} has a path that leads outside; do not use it")
        folder, name = os.path.split(member.name)
        stem, dot, suffix = name.rpartition(".") if last_dot else name.partition(".")
        if not dot or not stem or name.startswith(".") or name.lower() in LITTER or "__MACOSX" in folder:
            continue
        if member.islnk() or member.issym():
            base = folder if member.issym() else ""
            member = targets.get(os.path.normpath(os.path.join(base, member.linkname)), member)
        if not member.isfile() or member.issparse():  # the bytes of a sparse one are not those of the file
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
