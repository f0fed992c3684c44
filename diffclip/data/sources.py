"""Where pairs come from: the files and folders that the data settings name, those on the web downloaded."""

import glob
import hashlib
import os
import re
from collections.abc import Sequence

from filelock import FileLock

from diffclip.base.cache import cache_dir
from diffclip.base.download import download
from diffclip.base.errors import InputError
from diffclip.base.files import whole
from diffclip.base.objects import get, is_object, matching
from diffclip.base.paths import alternatives


def expand(patterns: Sequence[str]) -> list[str]:
    """Local paths of all sources that the patterns name, sorted per pattern.

    A pattern is a path with globs (`**` for any depth), `{00000..00012}` braces and ~, an http(s) address with braces
    or one of an object store with both (downloaded once into `diffclip.base.cache.cache_dir`), or `hf:owner/name`, a
    dataset of the Hub, which stays as it is; a folder stands for the shards in it, or for itself. InputError if a
    pattern matches nothing, or a download fails.
    """
    return [file for pattern in patterns for path in expand_one(pattern) for file in _shards_in(path) or [path]]


def _shards_in(path: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar"))) if os.path.isdir(path) else []


def expand_one(pattern: str) -> list[str]:
    """`expand` of a single pattern, folders as they are."""
    pattern = os.path.expanduser(str(pattern))
    if os.path.exists(pattern):  # its name may hold braces or brackets
        return [pattern]
    paths: list[str] = []
    if is_object(pattern):
        return [downloaded(each.url) for each in matching(pattern)]
    for part in alternatives(pattern):
        if part.startswith(("hf:", "http://", "https://")):
            paths.append(part if part.startswith("hf:") else downloaded(part))
            continue
        if "://" in part or part.startswith("pipe:"):
            raise InputError(f"{part}: only files, addresses and hf:owner/name are read; copy it to a disk")
        matches = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part]
        matches = _without_records([match for match in matches if os.path.exists(match)])
        if not matches:
            name = re.sub(r"\[([*?[])\]", r"\1", part)  # without glob.escape's brackets
            raise InputError(f"{name}: no such file (from the data setting `{pattern}`)")
        paths += matches
    return paths


def _without_records(matches: list[str]) -> list[str]:
    """What a glob matches, without what img2dataset writes about shards or folders beside them."""
    data = {match.removesuffix(".tar") for match in matches if match.endswith(".tar") or os.path.isdir(match)}
    records = {f"{stem}.parquet" for stem in data}
    records |= {f"{match.removesuffix('.parquet')}_stats.json" for match in (*data, *matches)}
    return [match for match in matches if match not in records and os.path.basename(match) != "_tmp"]


def downloaded(url: str) -> str:
    """The local copy of a file on the web; of several processes one downloads and the others wait."""
    name = url.split("?")[0].rsplit("/", 1)[-1]
    path = cache_dir() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if is_object(url) and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            if not path.exists():
                with whole(path) as temporary:
                    get(url, temporary)
    elif not path.exists():
        download(url, path)
    return str(path)
