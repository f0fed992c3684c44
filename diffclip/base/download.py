"""One file from the web, whole or not at all; a download that broke off goes on where it was."""

import http.client
import os
import re
import shutil
import string
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from diffclip.base.errors import InputError
from diffclip.base.files import file_digest
from diffclip.base.lines import printable

TRIES = 5  # without a byte of progress in between
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20
MOST = 1 << 42  # bytes; no file that we fetch is larger
ROOM = 1 << 28  # bytes that stay free on the disk


def download(
    url: str, path: str | Path, *, digest: str = "", most: int = MOST, wait: float = 1.0, quiet: bool = False
) -> None:
    """Fetch `url` to `path` through `path.part`, which a later call continues; renamed when it is complete.

    Of several calls for one file, in this or other processes, one fetches and the others wait and take its file.

    Args:
        url: http or https; so are the addresses that it may redirect to.
        digest: that the file must have, e.g. "sha256:9f86…" or "md5:…"; "" = not known, only the length is checked.
        most: bytes that it may have; a body that goes on for ever must not fill the disk.
        wait: seconds before the second try, doubled for each further one.
        quiet: no progress bar.

    Raises:
        InputError: another kind of address, the server refuses (404 and the like), keeps failing, sends something else
            than `digest` or more than `most` or than the disk has room for, or the file cannot be written. What has
            arrived stays in the .part file, unless it is wrong or too much.
    """
    path = Path(path)
    url = urllib.parse.quote(url, safe=string.punctuation)  # spaces and letters beyond ASCII; % stays as it is
    _refuse_others(url, url)
    before = _state(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")) as lock:
            try:
                if _state(path) == before:  # else another call has fetched it while this one waited
                    _fetch(url, path, digest, most, wait, quiet)
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)  # whoever waits for it sees that and makes a new one
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be written ({error.strerror}); start again") from None


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when another file takes its place."""
    try:
        return (stat := path.stat()).st_ino, stat.st_mtime_ns
    except OSError:
        return None


def _fetch(url: str, path: Path, digest: str, most: int, wait: float, quiet: bool) -> None:
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _continue(url, part, most, quiet)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise InputError(f"{url}: the server answers {error.code} {error.reason}; check the address") from None
            problem = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename:  # the file's fault, not the network's
                raise InputError(f"{part}: cannot be written ({error.strerror}); start again to go on") from None
            problem = str(error) or type(error).__name__
        failures = 0 if _size(part) > before else failures + 1
        if failures == TRIES:
            raise InputError(f"{url}: no progress in {TRIES} tries ({problem}); start again to go on") from None
        time.sleep(wait * 2**failures)
    if digest:
        kind, wanted = digest.lower().split(":")
        if (arrived := file_digest(part, kind)) != wanted:
            _drop(part)
            raise InputError(
                f"{url}: arrived with the {kind} {arrived[:12]}…, not {wanted[:12]}…: the file has changed, or was "
                "changed on its way"
            )
    os.replace(part, path)
    _tag(part).unlink(missing_ok=True)


def _continue(url: str, part: Path, most: int, quiet: bool) -> None:
    """One connection: append to `part` what it lacks; OSError if the connection ends before the file does.

    What is asked for is the rest of the very same file, or all of a new one (RFC 9110, sections 13.1.5 and 14.4); an
    answer that is neither is dropped together with the part, so that the next try begins anew.
    """
    tag = _sendable(_tag(part).read_text(encoding="latin-1")) if _size(part) and _tag(part).exists() else ""
    have = _size(part) if tag else 0
    headers = {"User-Agent": "diffclip", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={have}-", "If-Range": tag} if tag else {}
    try:
        answer = OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and tag:  # nothing lies behind what we have
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", "").strip())
            if whole and int(whole[1]) == have and error.headers.get("ETag", tag) == tag:
                return
            _drop(part)
        raise
    with answer:
        if answer.status == 206:
            total = _end_of_range(answer.headers, have, tag, part)
        elif answer.status == 200:
            have, total = 0, answer.length  # None: in chunks, whose end http.client checks, or until it closes
            if total is None and not answer.chunked and "Content-Length" in answer.headers:
                raise ConnectionError(f"the server gives the length {answer.headers['Content-Length']!r}")
        else:
            raise ConnectionError(f"the server answers {answer.status} {answer.reason}")
        if (coding := answer.headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise ConnectionError(f"the server sends it as {coding}, which was not asked for")
        room = have + shutil.disk_usage(part.parent).free - ROOM
        _refuse_more(url, part, total or 0, most, room)
        tag = tag if have else _validator(answer.headers)
        name, hidden = part.name.removesuffix(".part"), quiet or not sys.stderr.isatty()
        with (
            open(part, "ab" if have else "wb", buffering=0) as file,
            tqdm(desc=printable(name), total=total, initial=have, unit="B", unit_scale=True, disable=hidden) as bar,
        ):
            _tag(part).write_text(tag, encoding="latin-1")
            while block := answer.read1(BLOCK):  # what is there: `read` loses it when a chunk breaks off
                _refuse_more(url, part, have + len(block), most, room)
                try:
                    file.write(block)
                except OSError as error:
                    error.filename = str(part)
                    raise
                bar.update(len(block))
                have += len(block)
            os.fsync(file.fileno())
    if total is not None and have != total:
        raise ConnectionError(f"the connection ended at {have:,} of {total:,} bytes")


def _refuse_more(url: str, part: Path, size: int, most: int, room: int) -> None:
    if size > min(most, room):
        _drop(part)
        bound = f"{most:,} bytes, which it may have" if most <= room else f"the disk of {part.parent} has room for"
        remedy = "check the address" if most <= room else "make room and start again"
        raise InputError(f"{url}: sends more than {bound}; {remedy}")


def _end_of_range(headers: Any, start: int, tag: str, part: Path) -> int:
    """The file's length by an answer with its bytes from `start` on; ConnectionError if it holds others."""
    sent = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", "").strip())
    same = headers.get("Last-Modified" if tag.endswith("GMT") else "ETag", tag) == tag
    if not sent or int(sent[1]) != start or (tag and not same):
        _drop(part)
        answer = headers.get("Content-Range", "no Content-Range")
        raise ConnectionError(f"asked for bytes from {start:,} on, the server sent {answer}")
    return int(sent[3])


def _validator(headers: Any) -> str:
    """What tells this version of the file from others; weak ETags do not tell it byte by byte."""
    tag = headers.get("ETag") or ""
    return _sendable(headers.get("Last-Modified") or "" if not tag or tag.startswith("W/") else tag)


def _sendable(tag: str) -> str:
    """A validator, unless no header can hold it."""
    return tag if printable(tag) == tag else ""


def _refuse_others(url: str, first: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        web = parts.scheme in ("http", "https") and parts.port != 0  # asking for the port finds one that is no number
    except ValueError as error:
        raise InputError(f"{url}: not an address ({error}); mend it") from None
    if not web:
        led = "" if url == first else f"leads to {url}, which "
        raise InputError(f"{first}: {led}is no http or https address; give the address of the file on the web")


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Redirects to the web alone, not to ftp or to files of this machine."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _refuse_others(newurl, req.full_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


OPENER = urllib.request.build_opener(_WebOnly)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)
