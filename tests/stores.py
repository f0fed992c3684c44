"""Object stores on the loopback: moto's S3, which says what it was asked for, and a server that is slow."""

import contextlib
import http.server
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


class Asked(logging.Handler):
    """The requests that a server of moto's has had, as (method, path)."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"\b(GET|PUT|HEAD) (\S+) HTTP", record.getMessage()):
            self.requests.append((found[1], found[2]))

    def objects(self) -> Counter:
        """How often each object was got."""
        return Counter(path for method, path in self.requests if method == "GET" and "?" not in path)


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of an S3 server in this process."""
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'diffclip-stack[dev]'")
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'diffclip-stack[cloud]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=True)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def s3(moto, monkeypatch) -> Iterator[Asked]:
    """An S3 with the empty bucket `bucket` that the environment names."""
    boto3 = pytest.importorskip("boto3")
    values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}
    for name, value in (values | {"AWS_ENDPOINT_URL": moto}).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=moto, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=found["Key"])
    asked, logger = Asked(), logging.getLogger("werkzeug")
    asked.client = client
    logger.addHandler(asked)
    yield asked
    logger.removeHandler(asked)


def upload(s3: Asked, folder: Path, key: str) -> None:
    """The files of a folder as `bucket/KEY/name`."""
    for path in sorted(folder.iterdir()):
        s3.client.upload_file(str(path), "bucket", f"{key}/{path.name}")


@contextlib.contextmanager
def slow_server(
    content: dict[str, bytes], latency: float = 0.0, stall_after: int = -1, port: int = 0
) -> Iterator[tuple[str, list]]:
    """A server of files, as the web's and as S3's, that waits before each answer, or in the middle of one.

    Yields its address and the paths that were asked for.
    """
    asked: list[tuple[str, str]] = []
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append((self.command, self.path))
            time.sleep(latency)
            body = content.get(self.path.partition("?")[0])
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            if self.command == "GET" and body:
                with contextlib.suppress(OSError):
                    self.wfile.write(body[:stall_after] if stall_after >= 0 else body)
                    if stall_after >= 0:
                        self.wfile.flush()
                        ended.wait(60)
                        self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    ended.set()
    server.shutdown()
    server.server_close()
