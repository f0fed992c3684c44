"""Objects of cloud stores: which ones a pattern names, small ones as bytes, and one whole as a file.

s3://, gs:// and az:// are read by obstore, everything else (hf://datasets/…) by fsspec. Credentials, regions and
endpoints are the clients' own business: they find them in the environment. They run in a process beside each that asks
(`diffclip.base.object_client`), since their threads do not outlive the fork of a loader's worker.
"""

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import braceexpand

from diffclip.base.download import OPENER, TIMEOUT, download
from diffclip.base.errors import InputError, in_one_line

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://")
WEB = ("http", "https")
WILD = re.compile(r"[*?]")
ENDED = "the process that reads stores has ended; start the same command again"
AT_ONCE = 32  # small objects that are read side by side
ROOT = str(Path(__file__).resolve().parents[2])


class Object(NamedTuple):
    """An object of a store: its address, its bytes, and what changes with its content, as far as it is known."""

    url: str
    size: int | None
    version: str = ""


def is_object(path: str) -> bool:
    """Whether a path is an address of an object store, and neither of the web nor a local one."""
    return (scheme := scheme_of(path)) != "" and scheme not in WEB


def scheme_of(path: str) -> str:
    """`s3` of `s3://bucket/name`, "" of what is no address."""
    return found[1] if (found := ADDRESS.match(path)) else ""


def matching(pattern: str) -> list[Object]:
    """The objects that an address names with braces, `*`, `?` and `**` (any depth), sorted by name within each brace.

    One listing per folder, never a request per object. InputError where a name is not there, or the store refuses.
    """
    names = [*braceexpand.braceexpand(pattern)]
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(_folder(name), []).append(name)
    found: dict[str, list[Object]] = {}
    for folder, inside in folders.items():
        deep = any("/" in name[len(folder) :] or "**" in name for name in inside)
        listed = {row[0]: Object(*row) for row in _elsewhere({"do": "list", "url": folder, "deep": deep})}
        for name in inside:
            if WILD.search(name):
                wanted = _pattern(name)
                found[name] = [listed[url] for url in sorted(listed) if wanted.fullmatch(url)]
            else:
                found[name] = [listed[name]] if name in listed else []
            if not found[name]:
                of = f" (from the data setting `{pattern}`)" if name != pattern else ""
                raise InputError(f"{name}: no such object{of}; compare it with what the store lists in {folder}")
    return [each for name in names for each in found[name]]


def get(url: str, path: str | Path) -> None:
    """Write an object, or a file of the web, to a local file, in one request; what a failure leaves there is the
    caller's to remove.

    InputError names the address where it is not there, the store refuses, or the connection fails for good.
    """
    if scheme_of(url) in WEB:
        download(url, path, quiet=True)
    else:
        _elsewhere({"do": "get", "url": url, "path": str(path)})


def read_all(urls: Sequence[str]) -> list[str | None]:
    """The text of small objects, or files of the web, of one kind, side by side; None of those that are not there."""
    if scheme_of(urls[0]) not in WEB:
        return _elsewhere({"do": "read", "url": urls[0], "urls": list(urls)})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [*pool.map(_from_web, urls)]


def _from_web(url: str) -> str | None:
    try:
        with OPENER.open(url, timeout=TIMEOUT) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):
            return None
        raise InputError(f"{url}: the server answers {error.code} {error.reason}; start again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{url}: cannot be read ({in_one_line(error)}); check the address") from None


@cache
def size_on_the_web(url: str) -> int:
    """What a server says the bytes of a file are; InputError if it does not."""
    try:
        with OPENER.open(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{url}: the server does not say how large it is ({error}); check the address, or write sizes into a "
            "manifest by `diffclip data index`"
        ) from None


def put(url: str, text: str) -> None:
    """Write a small object; InputError where the store refuses."""
    _elsewhere({"do": "put", "url": url, "text": text})


def _folder(name: str) -> str:
    """The address up to the last / before the first wildcard."""
    fixed = WILD.split(name, maxsplit=1)[0]
    return fixed[: fixed.rindex("/") + 1]


def _pattern(name: str) -> re.Pattern:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    split = re.split(r"(\*\*/|\*\*|\*|\?)", name)
    return re.compile("".join(parts.get(part, re.escape(part)) for part in split))


class _Client:
    """The process beside this one, which answers several requests at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        paths = os.pathsep.join(filter(None, [ROOT, environment.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "diffclip.base.object_client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": paths},
        )
        self.lock, self.numbers, self.waiting = threading.Lock(), count(), dict[int, Future]()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, request: dict[str, Any]) -> Any:
        """What it answers; InputError with what it says, or that it has ended."""
        future: Future = Future()
        with self.lock:
            number = next(self.numbers)
            self.waiting[number] = future
            try:
                stdin = cast(TextIO, self.process.stdin)
                stdin.write(json.dumps({**request, "number": number}) + "\n")
                stdin.flush()
            except OSError:  # it has ended
                future.set_result({"error": f"{request['url']}: {ENDED}"})
        answer = future.result()
        if "error" in answer:
            raise InputError(answer["error"] or f"{request['url']}: {ENDED}")
        return answer["value"]

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            answer = json.loads(line)
            self.waiting.pop(answer["number"]).set_result(answer)
        for future in list(self.waiting.values()):
            if not future.done():
                future.set_result({"error": ""})


_clients: list[_Client] = []  # one, or none
_starting = threading.Lock()


def _forget() -> None:
    """A forked process starts a client of its own."""
    global _starting
    _clients.clear()
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _elsewhere(request: dict[str, Any]) -> Any:
    """The answer of this process's client, begun anew where it has ended or the environment is another."""
    with _starting:
        if not _clients or _clients[0].environment != dict(os.environ) or _clients[0].process.poll() is not None:
            if _clients and (stdin := _clients.pop().process.stdin):
                with suppress(OSError):
                    stdin.close()  # it ends
            _clients.append(_Client(dict(os.environ)))
        client = _clients[0]
    return client.ask(request)
