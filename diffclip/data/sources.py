"""Where pairs come from: the files and folders that the data settings name, those on the web downloaded."""

import glob
import hashlib
import os
from collections.abc import Sequence

import braceexpand

from diffclip.base.download import download
from diffclip.base.errors import InputError
from diffclip.data.shards import cache_dir


def expand(patterns: Sequence[str]) -> list[str]:
    """Local paths of all sources that the patterns name, sorted per pattern.

    A pattern is a path with globs and `{00000..00012}` braces (a folder stands for the shards in it), an http(s)
    address with braces (downloaded once into `diffclip.data.shards.cache_dir`), or `hf:owner/name`, a dataset of the
    Hub, which stays as it is. InputError if a pattern matches nothing, or a download fails.
    """
    return [path for pattern in patterns for path in expand_one(pattern)]


def expand_one(pattern: str) -> list[str]:
    """`expand` of a single pattern."""
    paths: list[str] = []
    for part in braceexpand.braceexpand(str(pattern)):
        if part.startswith(("hf:", "http://", "https://")):
            paths.append(part if part.startswith("hf:") else downloaded(part))
            continue
        matches = sorted(glob.glob(part)) if glob.has_magic(part) else [part] if os.path.exists(part) else []
        if not matches:
            raise InputError(f"{part}: no such file (from the data setting `{pattern}`)")
        for path in matches:
            shards = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar"))) if os.path.isdir(path) else []
            paths += shards or [path]
    return paths


def downloaded(url: str) -> str:
    """The local copy of a file on the web; of several processes one downloads and the others wait."""
    name = url.split("?")[0].rsplit("/", 1)[-1]
    path = cache_dir() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if not path.exists():
        download(url, path)
    return str(path)
