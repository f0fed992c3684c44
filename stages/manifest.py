"""What the files of a run's input folders hold, file by file, so that a resumed run can say what has changed.

Files of up to 1 MB, which is nearly every picture, count with all of their content, longer ones with their size and
blocks of it. What was read is remembered by path, size and times, so that a large folder is read once a machine.
"""

import gzip
import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from diffclip.base.cache import cache_dir, keep, kept
from diffclip.base.errors import InputError
from diffclip.base.files import open_file, read_json, whole
from diffclip.base.paths import walk_once

WHOLE = 1 << 20  # bytes, to which a file is read in full
BLOCKS, BLOCK = 16, 1 << 16
AT_ONCE = 64  # of many files, those that a thread gets at a time: handing over takes longer than looking at one
ADDED_DECIDES_NOTHING = ("image_root",)  # the rows name its files: others beside them are not read

Manifest = dict[str, dict[str, str]]  # setting -> file, relative to its folder -> digest


def folder_manifest(folder: str | Path) -> dict[str, str]:
    """Digests of all files at any depth, hidden ones left out; a file that cannot be read is "unreadable"."""
    folder = os.path.abspath(folder)
    names = list[str]()
    for where, _, here in walk_once(folder):
        inside = os.path.relpath(where, folder)
        names += here if inside == os.curdir else [os.path.join(inside, name) for name in here]
    cache = cache_dir() / "manifests" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json.gz"
    known = _read_cache(cache)

    def entry(name: str) -> tuple[str, str]:
        path = os.path.join(folder, name)
        try:
            stat = os.stat(path)
            times = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}:{stat.st_dev}"
            before = known.get(name)
            return times, before[1] if before and before[0] == times else sampled_content(path, stat.st_size)
        except OSError:
            return "", "unreadable"

    def entries(part: list[str]) -> list[tuple[str, str]]:
        return [entry(name) for name in part]

    size = max(1, min(AT_ONCE, len(names) // 64))  # few files, which may be large, one at a time
    parts = [names[first : first + size] for first in range(0, len(names), size)]
    bar = tqdm(desc="reading input files", total=len(names), unit="file", delay=2, leave=False)
    found: dict[str, tuple[str, str]] = {}
    with bar, ThreadPoolExecutor(8) as pool:
        for part, read in zip(parts, pool.map(entries, parts)):
            found |= zip(part, read)
            bar.update(len(part))
    if found != known and found:
        keep(cache, gzip.compress(json.dumps(found).encode(), 1))
    return {name: digest for name, (_, digest) in found.items()}


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write digests by setting and file, or remove those of an earlier start where there are none."""
    if not manifest:
        path.unlink(missing_ok=True)
        return
    with whole(path) as temporary, gzip.open(temporary, "wt", compresslevel=1, encoding="utf-8") as f:
        json.dump(manifest, f, ensure_ascii=True)


def read_manifest(path: Path) -> Manifest:
    """What `write_manifest` wrote; {} if there is none, as in runs of older versions. InputError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
        return {name: dict(files) for name, files in content.items()}
    except (InputError, OSError, EOFError, zlib.error, ValueError, AttributeError, TypeError):
        raise InputError(f"{path}: damaged: delete it to go on without comparing the input files one by one") from None


def differences(setting: str, before: Manifest, now: Manifest) -> tuple[str, str]:
    """How the files of a setting's folders have changed: what decides the result, and what does not, "" for nothing."""
    roles = sorted({role for role in (*before, *now) if role.partition("[")[0] == setting})
    if not all(role in before and role in now for role in roles):
        return "", ""  # a manifest of one of both is missing: their digests are compared
    changed, gone, added = list[str](), list[str](), list[str]()
    for role in roles:
        old, new = before[role], now[role]
        changed += [name for name in old if name in new and new[name] != old[name]]
        gone += [name for name in old if name not in new]
        added += [name for name in new if name not in old]
    harmless = added if setting in ADDED_DECIDES_NOTHING else []
    parts = {"changed": changed, "gone": gone, "added": [] if harmless else added}
    return ", ".join(_said(what, names) for what, names in parts.items() if names), _said("added", harmless)


def _said(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{names[0]} {what}" if len(names) == 1 else f"{len(names):,} files {what}, e.g. {names[0]}"


def sampled_content(path: str | Path, size: int) -> str:
    """16 hex digits of a file of `size` bytes: of all of it up to 1 MB, else of its size and 1 MB in 16 blocks."""
    result = hashlib.sha256(str(size).encode())
    with open_file(path) as f:
        if size <= WHOLE:
            result.update(f.read())
        else:
            for i in range(BLOCKS):
                f.seek((size - BLOCK) * i // (BLOCKS - 1))
                result.update(f.read(BLOCK))
    return result.hexdigest()[:16]


def _read_cache(path: Path) -> dict[str, tuple[str, str]]:
    content = kept(path)
    known = {} if content is None else json.loads(gzip.decompress(content))
    return {name: (times, digest) for name, (times, digest) in known.items()}
