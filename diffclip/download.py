"""One file from the web, whole or not at all; a download that broke off goes on where it was."""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from diffclip.errors import InputError

TRIES = 5  # without a byte of progress in between
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20


def download(url: str, path: str | Path, *, sha256: str = "", wait: float = 1.0, quiet: bool = False) -> None:
    """Fetch `url` to `path` through `path.part`, which a later call continues; renamed when it is complete.

    Args:
        sha256: hex digest that the file must have; "" = not known, only the length is checked.
        wait: seconds before the second try, doubled for each further one.
        quiet: no progress bar.

    Raises:
        InputError: the server refuses (404 and the like), keeps failing, sends something else than `sha256`, or the
            disk is full. What has arrived stays in the .part file, unless its digest is wrong.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _continue(url, part, quiet)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise InputError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
            problem = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename:  # the file's fault, not the network's
                raise InputError(f"{part}: cannot be written ({error.strerror}); start again to go on") from None
            problem = str(error) or type(error).__name__
        failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
        if failures == TRIES:
            raise InputError(f"{url}: no progress in {TRIES} tries ({problem}); start again to go on") from None
        time.sleep(wait * 2**failures)
    if sha256 and (found := file_sha256(part)) != sha256:
        part.unlink()
        raise InputError(f"{url}: arrived with the digest {found[:12]}…, not {sha256[:12]}…: the file has changed")
    os.replace(part, path)
    _tag(part).unlink(missing_ok=True)


def _continue(url: str, part: Path, quiet: bool) -> None:
    """One connection: append to `part` what it lacks; OSError if the connection ends before the file does."""
    have = part.stat().st_size if part.exists() else 0
    tag = _tag(part).read_text() if have and _tag(part).exists() else ""
    headers = {"User-Agent": "diffclip", "Accept-Encoding": "identity"}
    if tag:  # the rest of the very same file, or all of the new one
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if answer.status != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        with (
            open(part, "ab" if have else "wb", buffering=0) as file,
            tqdm(
                desc=part.name.removesuffix(".part"),
                total=total,
                initial=have,
                unit="B",
                unit_scale=True,
                disable=quiet or not sys.stderr.isatty(),
            ) as bar,
        ):
            _tag(part).write_text(tag)
            while block := answer.read(BLOCK):
                try:
                    file.write(block)
                except OSError as error:
                    error.filename = str(part)
                    raise
                bar.update(len(block))
                have += len(block)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended at {have:,} of {total:,} bytes")


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
