"""The page under many visitors, and under requests that are not its own: what comes from elsewhere or has no bound."""

import asyncio
import importlib.util
import io
import json
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from test_mllm_app import running

from diffclip.base.ranks import free_port
from mllm.assemble import assemble
from mllm.conversation import question_turn
from mllm.model import load

if not importlib.util.find_spec("gradio"):
    pytest.skip("gradio is not installed: pip install 'diffclip-stack[app]'", allow_module_level=True)
import httpx
from starlette.datastructures import Headers

from mllm.page_guard import Guard, is_loopback, names_of

VISITORS, IMAGES_EACH, TOKENS = 50, 4, 6
QUESTION = "Is there a red square in the image?"


class App(NamedTuple):
    """A running app."""

    address: str
    process: psutil.Process
    submit: int  # which of its functions answers
    uploads: str


class Visitor(NamedTuple):
    """A browser's page, by the requests that it sends."""

    client: httpx.AsyncClient
    app: App
    session: str

    async def upload(self, content: bytes) -> str:
        answer = await self.client.post("/gradio_api/upload", files={"files": ("a.bmp", content, "image/bmp")})
        return answer.raise_for_status().json()[0]

    async def join(self, text: str, *files: str) -> httpx.Response:
        asked = {"text": text, "files": [{"path": file, "meta": {"_type": "gradio.FileData"}} for file in files]}
        body = {"data": [asked, False, None], "fn_index": self.app.submit, "session_hash": self.session}
        return await self.client.post("/gradio_api/queue/join", json=body)

    async def ask(self, text: str, *files: str) -> str:
        """What the page shows as the last answer in the end; "" where it shows none."""
        (await self.join(text, *files)).raise_for_status()
        address = f"/gradio_api/queue/data?session_hash={self.session}"
        async with self.client.stream("GET", address) as stream:
            async for line in stream.aiter_lines():
                told = json.loads(line.removeprefix("data:")) if line else {}
                if told.get("msg") == "process_completed":
                    shown = told["output"].get("data", [[]])[0]
                    return shown[-1]["content"][0]["text"] if shown else ""
        raise AssertionError("the stream ended without an answer")


@pytest.fixture(scope="module")
def app(tower_dir, language_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("visitors")
    assemble(tower_dir, language_dir, seed=3).save(folder / "run")
    port = free_port()
    arguments = [str(folder / "run"), f"--port={port}", f"--max_new_tokens={TOKENS}"]
    with open(folder / "errors", "w+") as errors, running(*arguments, errors=errors) as server:
        address = server.stdout.readline().strip()
        assert address, (folder / "errors").read_text()
        config = httpx.get(f"{address}/config", timeout=60).json()
        submit = next(d["id"] for d in config["dependencies"] if d["targets"] and d["targets"][0][1] == "submit")
        made = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", b"no image", "image/png")})
        uploads = made.json()[0].rpartition("/")[0].rpartition("/")[0]
        yield folder, App(address, psutil.Process(server.pid), submit, uploads)
    assert not Path(uploads).exists()


def with_visitors(app: App, work):
    """Run `work(visitors)`, visitors made by their name; each page load is a session of its own."""

    async def run():
        limits = httpx.Limits(max_connections=2 * VISITORS, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=app.address, timeout=120, limits=limits) as client:
            return await work(lambda name: Visitor(client, app, name))

    return asyncio.run(run())


@pytest.mark.slow
def test_fifty_visitors_get_their_own_answers_and_the_memory_stays(app, picture):
    folder, app = app
    vlm = load(folder / "run")
    images = [picture(i) for i in range(VISITORS)]
    turns = [[question_turn(QUESTION, 1)]] * VISITORS
    expected = vlm.answer(turns, [[image] for image in images], max_new_tokens=TOKENS)
    assert len(set(expected)) > VISITORS // 2

    def content(visitor: int, number: int) -> bytes:
        """Another file each time, of the visitor's image."""
        buffer = io.BytesIO()
        images[visitor].save(buffer, "BMP")
        return buffer.getvalue() + bytes([number])

    async def rounds(visitors):
        async def one(number: int, visitor: int) -> str:
            here = visitors(f"{number} of {visitor}")
            first, second = [await here.upload(content(visitor, 2 * number + i)) for i in range(2)]
            assert first != second
            return await here.ask(QUESTION, second)

        sizes = []
        for number in range(IMAGES_EACH // 2):
            answers = await asyncio.gather(*(one(number, visitor) for visitor in range(VISITORS)))
            assert [answer.strip() for answer in answers] == [answer.strip() for answer in expected]
            sizes.append(app.process.memory_info().rss)
        return sizes

    sizes = with_visitors(app, rounds)
    assert sizes[1] - sizes[0] < 30e6, sizes  # a decoded image of each visitor's would be 200 kB, its session is 100


@pytest.mark.slow
def test_what_is_not_a_visitors_is_refused(app):
    folder, app = app

    async def tried(visitors):
        one = visitors("hostile")
        assert await one.ask("what?", "/etc/hostname\x1b[2J") == ""  # a file that was not uploaded
        assert await one.ask("a" * 30_000) == "" and await one.ask("a b " * 2_000) == ""  # characters, tokens
        assert (await one.client.get("/gradio_api/file=/etc/hostname")).status_code == 403
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            refused = await one.client.post("/gradio_api/queue/join", json={}, headers=headers)
            assert refused.status_code in (403, 421)
        many = [(await one.join(QUESTION)).status_code for _ in range(20)]
        assert many.count(503) > 0 and many[:4] == [200] * 4  # of one visitor; another is heard
        return await visitors("another").ask(QUESTION)

    assert with_visitors(app, tried)
    said = (folder / "errors").read_text()
    assert "\\x1b[2J" in said and "\x1b" not in said


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, None),
        ({"host": "LOCALHOST:7860", "origin": "http://localhost:7860"}, None),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, None),
        ({"host": "192.168.1.2"}, None),
        ({"host": "127.0.0.1", "content-length": "1000"}, None),
        ({}, 421),
        ({"host": "evil.example:7860"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": "localhost@evil.example"}, 421),
        ({"host": "[oops"}, 421),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://[oops"}, 403),
        ({"host": "127.0.0.1", "transfer-encoding": "chunked"}, 411),
        ({"host": "127.0.0.1", "content-length": "-1"}, 411),
        ({"host": "127.0.0.1", "content-length": "2000000"}, 413),
    ],
    ids=str,
)
def test_the_guard_tells_its_own_page_from_others(tmp_path, headers, status):
    guard = Guard(None, names_of("127.0.0.1"), tmp_path)
    refused = guard.refusal("/gradio_api/queue/join", Headers(headers))
    assert (refused and refused[0]) == status


def test_uploads_have_a_bound_each_and_together(tmp_path, monkeypatch):
    guard = Guard(None, names_of("127.0.0.1"), tmp_path)

    def status(length: int) -> int | None:
        headers = Headers({"host": "127.0.0.1", "content-length": str(length)})
        refused = guard.refusal("/gradio_api/upload", headers)
        return refused and refused[0]

    assert status(20_000_000) is None and status(1_000_000_000) == 413
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(bytes(900))
    monkeypatch.setattr("mllm.page_guard.MOST_KEPT", 1000)
    assert status(100) is None and status(101) == 507


def test_which_hosts_are_this_machine_alone():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "", "192.168.1.2", "box")] == [False] * 5
    assert "box" in names_of("box") and names_of("127.0.0.1") == {"localhost", "127.0.0.1"}


@pytest.mark.slow
def test_a_password_is_asked_for_by_every_door(monkeypatch, tmp_path):
    import gradio
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from mllm import page

    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.update(options))
    served = page.serve([], "0.0.0.0", 7860, {}, tmp_path, password="right word")
    check = launched["auth"]
    assert check("anyone", "right word") and not check("anyone", "wrong") and not check("right word", "")
    assert page.serve([], "127.0.0.1", 7860, {}, tmp_path) and launched["auth"] is None
    app = gradio.mount_gradio_app(FastAPI(), served, "", auth=check)
    client = TestClient(app)
    for address in ("/config", "/gradio_api/queue/data?session_hash=a", "/gradio_api/file=a"):
        assert client.get(address).status_code == 401
    assert client.post("/gradio_api/upload").status_code == 401
