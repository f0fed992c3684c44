"""Fixtures for all tests: no network, and the optional shared numbers and data that some tests compare with."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"
# rows of the tests' files stay out of the user's cache
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="diffclip-tests-")

import pytest

SHARED = Path(os.environ.get("DIFFCLIP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def _need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is missing: set DIFFCLIP_SHARED to the folder that holds golden/, data/ and cases/")
    return path


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Folder of one set of numbers from the official implementations, e.g. golden("01_diffattn_vision")."""
    return lambda name: _need(SHARED / "golden" / name)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Folder of one small set of real images and text, e.g. shared_data("fashion")."""
    return lambda name: _need(SHARED / "data" / name)


@pytest.fixture(scope="session")
def shared_cases() -> Callable[[str], Path]:
    """A file or folder of inputs that real users have, e.g. shared_cases("pairs/macos.tar")."""
    return lambda name: _need(SHARED / "cases" / name)


class Server(BaseHTTPRequestHandler):
    """Serves `files`, with Range and If-Range; breaks a connection off after `most` bytes, `failures` times 503."""

    files: ClassVar[dict[str, bytes]] = {}
    most = 0
    failures = 0
    address = ""
    sent: ClassVar[list[int]] = []

    def do_GET(self):
        kind = type(self)
        if kind.failures:
            kind.failures -= 1
            return self.send_error(503)
        content = kind.files.get(self.path)
        if content is None:
            return self.send_error(404)
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if "Range" in self.headers and self.headers.get("If-Range") == tag:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        rest = content[start : start + kind.most] if kind.most else content[start:]
        self.wfile.write(rest)
        kind.sent.append(len(rest))
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[type[Server]]:
    """A Server of its own for the test; `server.address` is its http://127.0.0.1:PORT."""
    kind = type("OneServer", (Server,), {"files": {}, "sent": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    kind.address = f"http://127.0.0.1:{running.server_port}"
    yield kind
    running.shutdown()
    running.server_close()
