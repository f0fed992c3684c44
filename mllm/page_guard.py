"""Who may send what to the page of `mllm.app`: no page of another origin, by no foreign name, nothing without a bound.

A page that a visitor has open elsewhere can send requests here, and by rebinding its own name to this machine's address
(DNS rebinding) even read the answers. The headers Host and Origin tell such requests from the page's own.
"""

import contextlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

UPLOAD = "/gradio_api/upload"
LARGEST_FILE = 20 << 20  # bytes of an image
LARGEST_UPLOAD = 8 * LARGEST_FILE
LARGEST_QUESTION = 1 << 20  # bytes of any other request
MOST_KEPT = 2 << 30  # bytes of uploads and maps of all visitors


def is_loopback(host: str) -> bool:
    """Whether what listens there is reached from this machine alone."""
    address = _address(host)
    return address.is_loopback if address else host == "localhost"


def names_of(host: str) -> frozenset[str]:
    """The names by which a page that listens there is asked for, besides any address in numbers."""
    own = () if is_loopback(host) else (socket.gethostname(), socket.getfqdn())
    return frozenset(name.lower() for name in ("localhost", host, *own) if name)


class Guard:
    """ASGI middleware that refuses requests before gradio reads their bodies.

    Args:
        names: as `names_of` gives them. A Host in numbers is taken as well: no name can be rebound to that.
        folder: where uploads lie.
    """

    def __init__(self, app: Any, names: frozenset[str], folder: Path) -> None:
        self.app, self.names, self.folder = app, names, folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self.app
        if scope["type"] == "websocket":  # the page has none
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] == "http" and (refused := self.refusal(scope["path"], Headers(scope=scope))):
            app = PlainTextResponse(refused[1], refused[0])
        await app(scope, receive, send)

    def refusal(self, path: str, headers: Headers) -> tuple[int, str] | None:
        """The status and the reason for which a request is refused, or None."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or "" if _readable(host) else ""
        if not _address(name) and name not in self.names:
            return 421, "This page is not reached by that name: open it by its address in numbers, or as localhost."
        origin = headers.get("origin", f"http://{host}")
        if not _readable(origin) or urlsplit(origin).netloc.lower() != host.lower():
            return 403, "Another page may not send requests to this one: open it by its own address."
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
            return 411, "Send the length with the request."
        upload = path.rstrip("/").endswith(UPLOAD)
        if int(length) > (LARGEST_UPLOAD if upload else LARGEST_QUESTION):
            return 413, f"Too large: an image may have {LARGEST_FILE >> 20} MB, a question a few pages."
        if upload and int(length) + _bytes_below(self.folder) > MOST_KEPT:
            return 507, "No more images can be kept at the moment: try again in an hour."
        return None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _readable(netloc: str) -> bool:
    try:
        urlsplit(netloc if "//" in netloc else f"//{netloc}")
    except ValueError:  # brackets that hold no address
        return False
    return True


def _bytes_below(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total += os.lstat(os.path.join(where, name)).st_size
    return total
