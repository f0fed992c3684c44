"""The process that `diffclip.base.objects` asks, `python -m diffclip.base.object_client`: requests as lines of JSON on
stdin, answers on stdout, {"number", "value"} or {"number", "error"}.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import Any

from diffclip.base.errors import InputError, in_one_line
from diffclip.base.objects import ADDRESS, AT_ONCE, Object, scheme_of

try:
    from obstore import store  # the extra `cloud`

    from_url: Any = store.from_url
except ImportError:
    from_url = None

OBSTORE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
HINTS = {  # what the client of a scheme finds in the environment
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SKIP_SIGNATURE=true where anybody may read), AWS_REGION, "
    "AWS_ENDPOINT_URL",
    "gs": "GOOGLE_SERVICE_ACCOUNT (GOOGLE_SKIP_SIGNATURE=true where anybody may read)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (AZURE_SKIP_SIGNATURE=true where anybody may read)",
    "hf": "HF_TOKEN, and HF_HUB_OFFLINE unset",
}
VERSIONS = ("ETag", "etag", "blob_id", "md5", "checksum", "mtime")  # what file systems of fsspec say of content


def answer(request: dict[str, Any]) -> Any:
    """Do what is asked; what clients raise becomes an InputError that names the address and the remedy."""
    try:
        folder, _, name = request["url"].rpartition("/")
        if request["do"] == "list":
            return [*_opened(folder).list(request["deep"])]
        if request["do"] == "read":
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return [*pool.map(_text, request["urls"])]
        if request["do"] == "put":
            return _opened(folder).put(name, request["text"].encode())
        return _opened(folder).get(name, request["path"])
    except InputError:
        raise
    except Exception as error:  # clients have their own kinds, some of them bare Exceptions
        raise InputError(_said(request["url"], error)) from None


@cache
def _opened(folder: str) -> Any:
    """The folder, through the client of its scheme; its connections are used again."""
    return (_ByObstore if scheme_of(folder) in OBSTORE else _ByFsspec)(folder)


def _text(url: str) -> str | None:
    folder, _, name = url.rpartition("/")
    try:
        return _opened(folder).read(name).decode()
    except FileNotFoundError:
        return None


def _said(url: str, error: Exception) -> str:
    """One sentence on an error of a client."""
    if isinstance(error, OSError) and error.filename and not ADDRESS.match(str(error.filename)):
        return f"{error.filename}: cannot be written ({error.strerror}); make room, or choose another place"
    scheme = scheme_of(url)
    hint = next((hint for name, hint in HINTS.items() if scheme.startswith(name)), "what its client needs")
    if isinstance(error, FileNotFoundError):
        return f"{url}: no such object; check the address"
    text = in_one_line(error).partition(" Debug source:")[0]
    return f"{url}: the store does not give it ({text}); check the address and, in the environment, {hint}"


class _ByObstore:
    """A folder of S3, Google or Azure."""

    def __init__(self, folder: str) -> None:
        if from_url is None:
            raise InputError(f"{folder}: reading object stores needs obstore: pip install 'diffclip-stack[cloud]'")
        self.folder = folder
        self.store: Any = from_url(
            self.folder,
            client_options={"allow_http": True, "connect_timeout": "10s", "read_timeout": "60s", "timeout": "3h"},
            retry_config={"max_retries": 5, "retry_timeout": timedelta(minutes=3)},
        )

    def list(self, deep: bool) -> Iterator[Object]:
        here = [self.store.list_with_delimiter()["objects"]] if not deep else self.store.list()
        found = (each for page in here for each in page)
        return (Object(f"{self.folder}/{each['path']}", each["size"], each["e_tag"] or "") for each in found)

    def read(self, name: str) -> bytes:
        return bytes(self.store.get(name).bytes())

    def put(self, name: str, content: bytes) -> None:
        self.store.put(name, content)

    def get(self, name: str, path: str) -> None:
        answer, written = self.store.get(name), 0
        with open(path, "wb") as f:
            for chunk in answer.stream(min_chunk_size=4 << 20):
                written += f.write(chunk)
        if written != answer.meta["size"]:
            raise OSError(f"{written:,} of {answer.meta['size']:,} bytes arrived")


class _ByFsspec:
    """A folder of anything that fsspec knows."""

    def __init__(self, folder: str) -> None:
        from fsspec.core import url_to_fs  # not at the top: it takes as long as all the rest

        try:
            self.files, self.path = url_to_fs(folder)
        except (ImportError, ValueError) as error:
            raise InputError(f"{folder}: is an address that cannot be read ({in_one_line(error)})") from None
        self.folder, self.path = folder, self.path.rstrip("/")

    def list(self, deep: bool) -> Iterator[Object]:
        found = self.files.find(self.path, detail=True).values() if deep else self.files.ls(self.path, detail=True)
        files = (each for each in found if each["type"] == "file")
        for each in files:
            version = next((str(each[key]) for key in VERSIONS if each.get(key)), "")
            yield Object(f"{self.folder}/{each['name'].removeprefix(self.path + '/')}", each["size"], version)

    def read(self, name: str) -> bytes:
        return self.files.cat_file(f"{self.path}/{name}")

    def put(self, name: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.path}/{name}", content)

    def get(self, name: str, path: str) -> None:
        self.files.get_file(f"{self.path}/{name}", path)
        if (size := self.files.size(f"{self.path}/{name}")) not in (None, os.path.getsize(path)):
            raise OSError(f"{os.path.getsize(path):,} of {size:,} bytes arrived")


def main() -> None:
    """Answer the requests on stdin, several at a time, until it ends, as it does with whoever asks."""
    out, lock = os.fdopen(os.dup(1), "w"), threading.Lock()
    os.dup2(2, 1)  # what libraries print is no answer

    def reply(request: dict[str, Any]) -> None:
        try:
            told = {"value": answer(request)}
        except InputError as error:
            told = {"error": str(error)}
        with lock:
            out.write(json.dumps({**told, "number": request["number"]}) + "\n")
            out.flush()

    pool = ThreadPoolExecutor(AT_ONCE)
    for line in sys.stdin:
        pool.submit(reply, json.loads(line))
    os._exit(0)  # nobody waits for what is under way


if __name__ == "__main__":
    main()
