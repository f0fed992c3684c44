"""Which shards a run streams, and how many samples each holds, without reading them: from a manifest.

A manifest is `shards.json` beside the shards, as `diffclip data index` writes it, or what img2dataset (`_stats.json`
of each shard) or webdataset (`sizes.json`) left there. Local shards without one are counted by their headers.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import braceexpand
from tqdm import tqdm

from diffclip.base import objects
from diffclip.base.archives import TAR_SUFFIXES
from diffclip.base.errors import InputError, in_one_line
from diffclip.base.files import parse_json, read_text, write_whole
from diffclip.base.objects import Object
from diffclip.data.layout import Layout
from diffclip.data.shards import index_shard, index_shards
from diffclip.data.sources import expand

MANIFEST = "shards.json"
FORMAT = 1
INDEX = "count them once by `diffclip data index`"
AGAIN = "count them again by `diffclip data index`"


class SizedShard(NamedTuple):
    """A shard by address or path: how many samples it holds, and its bytes and version as `Object`'s."""

    url: str
    samples: int
    size: int | None
    version: str = ""

    @property
    def remote(self) -> bool:
        """Whether it is fetched before it is read."""
        return bool(objects.scheme_of(self.url))


def in_object_store(patterns: Sequence[str]) -> bool:
    """Whether one of the sources lies in an object store, which has no order but the streaming one."""
    return any(objects.is_object(pattern) for pattern in patterns)


def sized_shards(patterns: Sequence[str], layout: Layout, manifest: str = "") -> list[list[SizedShard]]:
    """The shards of each source with their sizes.

    Args:
        patterns: paths or addresses with braces and wildcards; of a folder its .tar files.
        manifest: path or address of a `shards.json` that lies elsewhere.

    Raises:
        InputError: a shard is not there or no .tar, a store refuses, or nothing says how many samples a shard holds.
    """
    given = _entries(_text_of(manifest, must=True) or "", manifest) if manifest else {}
    return [_sized(listed(pattern), layout, given, manifest) for pattern in patterns]


def listed(pattern: str) -> list[Object]:
    """The tars that a pattern names, locally, on the web or in a store."""
    if objects.is_object(pattern):
        found = objects.matching(f"{pattern}*.tar" if pattern.endswith("/") else pattern)
        found = [each for each in found if not objects.WILD.search(pattern) or each.url.endswith(".tar")]
    elif objects.scheme_of(pattern):
        found = [Object(url, None) for url in braceexpand.braceexpand(pattern)]
    else:
        found = [Object(path, os.path.getsize(path) if os.path.isfile(path) else None) for path in expand([pattern])]
    for each in found:
        path = each.url.partition("?")[0].lower()
        if not path.endswith(".tar"):
            remedy = "unpack it" if path.endswith(TAR_SUFFIXES) else "set `order` to shuffle, or leave it out"
            raise InputError(f"{each.url}: only .tar shards are streamed; {remedy}")
    if not found:
        raise InputError(f"{pattern}: there is no .tar in it; mend the data setting")
    return found


def _sized(shards: list[Object], layout: Layout, given: dict[str, Any], manifest: str) -> list[SizedShard]:
    known, where = given, manifest
    if not known:
        folders = list(dict.fromkeys(_folder(each.url) for each in shards))
        for folder in folders:
            own = [each.url for each in shards if _folder(each.url) == folder]
            known |= _beside(folder, own)
        where = f"{folders[0]}{MANIFEST}"
    if not known and not any(objects.scheme_of(each.url) for each in shards):
        counts = index_shards([each.url for each in shards], layout)
        return [SizedShard(each.url, len(count), each.size) for each, count in zip(shards, counts)]
    sized = []
    for each in shards:
        entry = known.get(each.url) or known.get(_name(each.url))
        if entry is None:
            what = "does not list it" if known else "is not there, nor img2dataset's _stats.json or a sizes.json"
            raise InputError(f"{each.url}: how many samples it holds is not known ({where} {what}): {INDEX}")
        samples, size = entry
        if size is not None and each.size not in (None, size):
            raise InputError(f"{each.url}: has {each.size:,} bytes, and {size:,} when {where} was made; {AGAIN}")
        sized.append(SizedShard(each.url, samples, each.size if each.size is not None else size, each.version))
    return sized


def _beside(folder: str, shards: list[str]) -> dict[str, tuple[int, int | None]]:
    """(samples, bytes) of shards by address or name, from what lies beside them; {} where nothing does."""
    if text := _text_of(folder + MANIFEST):
        return _entries(text, folder + MANIFEST)
    stats = [f"{url.partition('?')[0].removesuffix('.tar')}_stats.json" for url in shards]
    if _text_of(stats[0]):
        found: dict[str, tuple[int, int | None]] = {}
        for url, name, text in zip(shards, stats, _texts_of(stats)):
            content = parse_json(text, name) if text else None
            count = content.get("successes") if isinstance(content, dict) else None
            if not _is_count(count):
                raise InputError(f"{name}: is missing or says no `successes`, which the other shards have: {INDEX}")
            found[url] = count, None
        return found
    if text := _text_of(folder + "sizes.json"):
        counts = parse_json(text, folder + "sizes.json")
        if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
            raise InputError(f"{folder}sizes.json: is no mapping from shards to their samples; remove it and {INDEX}")
        return {name: (count, None) for name, count in counts.items()}
    return {}


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entries(text: str, name: str) -> dict[str, tuple[int, int | None]]:
    """What a `shards.json` says; InputError if it is none."""
    content = parse_json(text, name)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format {content['format']} is not {FORMAT}")
        entries = {shard: (entry["samples"], entry["bytes"]) for shard, entry in content["shards"].items()}
        if not all(_is_count(samples) and (size is None or _is_count(size)) for samples, size in entries.values()):
            raise ValueError("its `samples` and `bytes` are not all numbers")
        return entries
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{name}: is no manifest ({in_one_line(error)}): write it by `diffclip data index`") from None


def write_manifest(pattern: str, output: str = "", layout: Layout | None = None) -> str:
    """Count the samples of a source's shards and write `shards.json` beside them, or to `output`; returns where.

    What lies beside all shards and gives counts is believed; else a shard of a store is fetched, counted and dropped.
    InputError as `sized_shards`, or where the manifest cannot be written.
    """
    layout, shards = layout or Layout(), listed(pattern)
    folders = {_folder(each.url) for each in shards}
    if len(folders) > 1 and not output:
        raise InputError(f"{pattern}: its shards lie in {len(folders)} folders: name one file by --output")
    stats: dict[str, tuple[int, int | None]] = {}
    for folder in folders:
        urls = [each.url for each in shards if _folder(each.url) == folder]
        if not _text_of(folder + MANIFEST):  # one that is there is made anew
            with suppress(InputError):  # of a store that refuses, its shards say so, too
                stats |= _beside(folder, urls)
    with ThreadPoolExecutor(4) as pool:
        counted = pool.map(lambda each: _counted(each, stats, layout), shards)
        bar = tqdm(counted, "counting", len(shards), unit="shard", delay=2, leave=False, disable=None)
        entries = {each.url if output else _name(each.url): entry for each, entry in zip(shards, bar)}
    content = {"format": FORMAT, "shards": {name: {"samples": n, "bytes": size} for name, (n, size) in entries.items()}}
    place = output or folders.pop() + MANIFEST
    text = json.dumps(content, indent=1) + "\n"
    if objects.is_object(place):
        objects.put(place, text)
    elif objects.scheme_of(place):
        raise InputError(f"{place}: nothing can be written there; name a local file by --output")
    else:
        write_whole(place, text)
    return place


def _counted(shard: Object, stats: dict[str, tuple[int, int | None]], layout: Layout) -> tuple[int, int | None]:
    entry = stats.get(shard.url) or stats.get(_name(shard.url))
    if entry:
        return entry[0], shard.size
    if not objects.scheme_of(shard.url):
        return len(index_shard(shard.url, layout)), shard.size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _name(shard.url)
        objects.get(shard.url, path)
        return len(index_shard(str(path), layout, Path(folder))), path.stat().st_size


def _folder(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[0] + "/" if "/" in url else ""


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


def _text_of(url: str, must: bool = False) -> str | None:
    text = _texts_of([url])[0]
    if must and text is None:
        raise InputError(f"{url}: no such file (setting `manifest`)")
    return text


def _texts_of(urls: list[str]) -> list[str | None]:
    """The text of small files of one kind of place; None of those that are not there."""
    if objects.scheme_of(urls[0]):
        return objects.read_all(urls)
    return [read_text(path) if os.path.isfile(path) else None for path in urls]
