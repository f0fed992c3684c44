"""Fixtures for all tests: no network, and the optional shared numbers and data that some tests compare with."""

import contextlib
import gc
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; Triton reads it when it is first imported
# rows of the tests' files stay out of the user's caches
os.environ["HF_DATASETS_CACHE"] = os.environ["DIFFCLIP_CACHE"] = tempfile.mkdtemp(prefix="diffclip-tests-")

import pytest

SHARED = Path(os.environ.get("DIFFCLIP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection() -> None:
    gc.disable()  # as diffclip.base.imports: all test modules and what they import stay


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def _need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is missing: set DIFFCLIP_SHARED to the folder that holds golden/, data/ and cases/")
    return path


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Folder of one set of numbers from the official implementations, e.g. golden("01_diffattn_vision")."""
    return lambda name: _need(SHARED / "golden" / name)


@pytest.fixture(scope="module")
def coarse_figures() -> Iterator[None]:
    """Figures of a hundredth of the pixels, which are most of a report's time; test_stages_report_page has all."""
    from stages.report import figures  # not at the top: pytest reads this file once more than it runs tests

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "DPI", 30)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Folder of one small set of real images and text, e.g. shared_data("fashion")."""
    return lambda name: _need(SHARED / "data" / name)


@pytest.fixture(scope="session")
def shared_cases() -> Callable[[str], Path]:
    """A file or folder of inputs that real users have, e.g. shared_cases("pairs/macos.tar")."""
    return lambda name: _need(SHARED / "cases" / name)


class Server(BaseHTTPRequestHandler):
    """Serves `files`, with Range and If-Range; breaks a connection off after `most` bytes, `failures` times 503.

    `ranges`: "ignored" (always all of it), "shifted" (from another byte than was asked for), "any file" (whatever
    If-Range says). `length`: "chunked" or "none" instead of Content-Length. `dated`: Last-Modified instead of an ETag.
    `slow`: seconds between two halves of the content. `moved`: where an address redirects to. `also`: further headers,
    which take the place of those of their name. `endless`: how often the content comes again.
    """

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    moved: ClassVar[dict[str, str]] = {}
    most = 0
    failures = 0
    slow = 0.0
    ranges = ""
    length = "known"
    dated = False
    endless = 0
    also: ClassVar[dict[str, str]] = {}
    address = ""
    sent: ClassVar[list[int]] = []

    def do_GET(self):
        kind = type(self)
        self.close_connection = True
        if kind.failures:
            kind.failures -= 1
            return self.send_error(503)
        if self.path in kind.moved:
            self.send_response(302)
            self.send_header("Location", kind.moved[self.path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = kind.files.get(self.path)
        if content is None:
            return self.send_error(404)
        digest = hashlib.md5(content).hexdigest()
        date = f"Thu, 01 Jan 1970 00:{int(digest[:2], 16) % 60:02d}:{int(digest[2:4], 16) % 60:02d} GMT"
        tag = date if kind.dated else f'"{digest}"'
        start = 0
        fits = self.headers.get("If-Range", tag) == tag or kind.ranges == "any file"
        if "Range" in self.headers and fits and kind.ranges != "ignored":
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            kind.sent.append(0)
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start and kind.ranges == "shifted":
            start -= 1000
        if start and kind.ranges == "of unknown length":
            content = content[: start + 1000]
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/*")
        elif start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if kind.endless and kind.length == "known":
            self.send_header("Content-Length", str(1 << 40))
        elif kind.length == "known":
            self.send_header("Content-Length", str(len(content) - start))
        elif kind.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        for name, value in ({"Last-Modified" if kind.dated else "ETag": tag} | kind.also).items():
            self.send_header(name, value)
        rest = content[start : start + kind.most] if kind.most else content[start:]
        kind.sent.append(len(rest))  # before the headers, which may be enough for the next request
        self.end_headers()
        with contextlib.suppress(OSError):  # whoever asked has heard enough
            for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :], *itertools.repeat(content, kind.endless)):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(half), half) if kind.length == "chunked" else half)
                self.wfile.flush()
                time.sleep(kind.slow)
            if kind.length == "chunked" and not kind.most:
                self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[type[Server]]:
    """A Server of its own for the test; `server.address` is its http://127.0.0.1:PORT."""
    kind = type("OneServer", (Server,), {"files": {}, "moved": {}, "sent": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()  # shutdown waits as long
    kind.address = f"http://127.0.0.1:{running.server_port}"
    yield kind
    running.shutdown()
    running.server_close()
