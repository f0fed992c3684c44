"""The chat page in a real browser: answers equal mllm.chat's, where they look is shown, and nobody else is called."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise

import psutil
import pytest
from browser import open_page
from launch import ROOT, environment, run_program

from diffclip.base.errors import InputError
from diffclip.base.images import decode
from diffclip.base.ranks import free_port
from mllm import about, app
from mllm.answer_attention import overlays
from mllm.assemble import assemble
from mllm.conversation import question_turn
from mllm.model import load

if not importlib.util.find_spec("gradio"):
    pytest.skip("gradio is not installed: pip install 'diffclip-stack[app]'", allow_module_level=True)
QUESTIONS = ["Is there a red square in the image?", "a small blue circle left of the green star <b>?</b>"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tower_dir, language_dir, picture):
    folder = tmp_path_factory.mktemp("app")
    assemble(tower_dir, language_dir, seed=3).save(folder / "run")
    picture(0, (300, 200)).save(folder / "scene.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@contextmanager
def running(*arguments, errors):
    """The app in a process of its own, which tells its address when it is up; asked to end, and then made to."""
    server = subprocess.Popen(
        [sys.executable, "-m", "mllm.app", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        yield server
    finally:
        server.terminate()  # not Ctrl-C's signal, which whoever runs the tests in the background has them ignore
        try:
            server.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            raise


def listening(pid):
    """Where a process and its children can be reached."""
    own = psutil.Process(pid)
    ends = [one for process in (own, *own.children(recursive=True)) for one in process.net_connections("inet")]
    return [tuple(one.laddr) for one in ends if one.status == psutil.CONN_LISTEN]


def plain(text):
    return " ".join(text.replace("\0", "").split())  # pages drop zeros, and a tiny random model may write any byte


def wait_until(page, holds):
    for _ in range(600):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came to be; the page shows: {page.locator('body').inner_text()}")


@pytest.fixture(scope="module")
def wanted(saved):
    """[(answer, caption of its overlay)] by the model asked directly, and the answer without an image."""
    vlm = load(saved / "run")
    images, turns, found = [decode(saved / "scene.png")], [], []
    for question in QUESTIONS:
        turns.append(question_turn(question, 0 if turns else 1))
        (text,) = vlm.answer([turns], [images], max_new_tokens=12)
        turns.append({"from": "gpt", "value": text})
        ((_, share),) = overlays(vlm, turns, images)
        found.append((text, f"{share:.1%} of the attention"))
    return found, vlm.ask(QUESTIONS[0], max_new_tokens=12)


@pytest.mark.slow
def test_a_conversation_in_the_browser(saved, wanted, tmp_path):
    port = free_port()
    arguments = [str(saved / "run"), f"--port={port}", "--max_new_tokens=12"]
    with (
        open(tmp_path / "errors", "w+") as errors,
        running(*arguments, errors=errors) as server,
        open_page(viewport={"width": 1280, "height": 800}) as (page, complaints),
    ):
        address = server.stdout.readline().strip()
        assert address == f"http://127.0.0.1:{port}", (tmp_path / "errors").read_text()
        assert listening(server.pid) == [("127.0.0.1", port)]
        called = []
        page.on("request", lambda request: called.append(request.url))
        page.goto(address)
        box, said = page.get_by_placeholder("Ask about the image"), page.get_by_test_id("bot")
        files, maps = page.get_by_label("File thumbnail"), page.get_by_label("Thumbnail 1 of 1")

        def ask(question, *paths):
            if paths:
                page.locator("input[type=file]").set_input_files(paths)
                files.first.wait_for()
            box.fill(question)
            page.get_by_label("Submit").click()

        ask("Is it?", saved / "broken.png")
        page.get_by_text("broken.png cannot be read as an image (not an image)").wait_for()
        assert said.count() == 0 and box.input_value() == "Is it?"  # to be mended and asked again
        page.get_by_label("Remove file").click()
        files.wait_for(state="detached")
        for number, (text, caption) in enumerate(wanted[0]):
            ask(QUESTIONS[number], *[saved / "scene.png"][number:])
            said.nth(number).wait_for()
            box.fill("the next question")  # while this one is answered
            wait_until(page, lambda: maps.count() and maps.inner_text() == caption)  # noqa: B023
            assert plain(said.nth(number).inner_text()) == plain(text)
            wait_until(page, lambda: page.get_by_label("Submit").is_visible())  # the answer is at its end
            assert box.input_value() == "the next question"
        assert said.count() == 2 and page.get_by_test_id("user").last.inner_text() == QUESTIONS[1]
        overlay = maps.locator("img")  # which arrives after its caption
        wait_until(page, lambda: overlay.evaluate("image => image.complete && image.naturalWidth > 0"))
        assert overlay.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [352, 352]
        page.screenshot(path=tmp_path / "page.png")
        page.get_by_role("button", name="Clear", exact=True).last.click()
        wait_until(page, lambda: not said.count() and not maps.count())
        ask(QUESTIONS[0])
        wait_until(page, lambda: said.count() and plain(said.inner_text()) == plain(wanted[1]))
        assert not complaints
        assert [url for url in called if not url.startswith((address, "data:", "blob:"))] == []
    assert "Traceback" not in (tmp_path / "errors").read_text()


@pytest.mark.slow
def test_two_models_answer_beside_each_other(saved, wanted, tower_dir, language_dir, tmp_path):
    assemble(tower_dir, language_dir, seed=4).save(tmp_path / "other")
    data = {"data": {"path": "a/rows.json", "digest": "x"}}
    record = {"stage": "instruct", "model": "Diff*CLIP", "conversations": 1200, "steps": 75, "seed": 0, "inputs": data}
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    vlm, picture = load(tmp_path / "other"), decode(saved / "scene.png")
    turns = [question_turn(QUESTIONS[0], 1)]
    (text,) = vlm.answer([turns], [[picture]], max_new_tokens=12)
    ((shown, share),) = overlays(vlm, [*turns, {"from": "gpt", "value": text}], [picture])
    (tmp_path / "examples").mkdir()
    picture.save(tmp_path / "examples" / "an example.png")
    port = free_port()
    arguments = [str(saved / "run"), str(tmp_path / "other"), f"--port={port}", "--max_new_tokens=12"]
    arguments += ["--examples", str(tmp_path / "examples")]
    with (
        open(tmp_path / "errors", "w+") as errors,
        running(*arguments, errors=errors) as server,
        open_page(viewport={"width": 1400, "height": 1000}) as (page, complaints),
    ):
        address = server.stdout.readline().strip()
        assert address, (tmp_path / "errors").read_text()
        page.goto(address)
        page.get_by_text("Diff*CLIP; instruct: 1,200 conversations of rows.json, 75 steps, seed 0").wait_for()
        page.get_by_text("no run.json says what it was trained on").wait_for()
        page.get_by_text("What is in the image?").first.click()  # the example brings its image along
        page.get_by_label("File thumbnail").first.wait_for()
        box, said = page.get_by_placeholder("Ask about the image"), page.get_by_test_id("bot")
        wait_until(page, lambda: box.input_value() == "What is in the image?")
        box.fill(QUESTIONS[0])
        page.get_by_label("Submit").click()
        maps = page.get_by_label("Thumbnail 1 of 1")
        captions = [wanted[0][0][1], f"{share:.1%} of the attention"]
        wait_until(page, lambda: maps.count() == 2 and maps.all_inner_texts() == captions)
        assert [plain(text) for text in said.all_inner_texts()] == [plain(wanted[0][0][0]), plain(text)]
        scales = page.locator(".scale")
        assert scales.count() == 2 and f"{shown.info['hottest']:.2%} of" in scales.last.inner_text()
        picture_of_map = maps.last.locator("img")
        wait_until(page, lambda: picture_of_map.evaluate("image => image.complete && image.naturalWidth > 0"))
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert picture_of_map.evaluate("image => Math.min(image.clientWidth, image.clientHeight)") >= 336
        page.get_by_role("button", name="Clear", exact=True).last.click()
        wait_until(page, lambda: not said.count() and not maps.count() and not scales.count())
        assert not complaints
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_run_says_what_it_and_those_before_it_were_trained_on(tmp_path):
    records = {
        "pretrain": {"stage": "pretrain", "model": "CLIP-tiny", "pairs": 9000, "steps": 10, "seed": 1,
                     "inputs": {"train_data": {"path": "x/shards"}}},
        "align": {"stage": "align", "model": "CLIP-tiny", "conversations": 7, "inputs": {
            "data": {"path": "x/align.json"}, "vision_tower": {"path": str(tmp_path / "pretrain")}}},
        "instruct": {"stage": "instruct", "model": "CLIP-tiny", "conversations": 1234, "seed": 2, "inputs": {
            "data[0]": {"path": "a.json"}, "data[1]": {"path": "b.json"}, "model": {"path": str(tmp_path / "align")}}},
    }  # fmt: skip
    for name, record in records.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    run = str(tmp_path / "instruct")
    assert about.trained_on(run) == (
        "CLIP-tiny; instruct: 1,234 conversations of a.json, b.json, seed 2; align: 7 conversations of align.json; "
        "pretrain: 9,000 pairs of shards, 10 steps, seed 1"
    )
    assert about.name_of(run) == f"{tmp_path.name}/instruct" and about.name_of("org/model") == "org/model"
    records["align"]["inputs"]["vision_tower"]["path"] = str(tmp_path / "align")  # in a circle, as nobody writes it
    for broken in ("[]", '{"inputs": 3}', "{"):
        (tmp_path / "align" / "run.json").write_text(broken)
        assert about.trained_on(run).startswith("CLIP-tiny; instruct: 1,234")
    assert "no run.json" in about.trained_on(str(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_answers_grow_and_questions_that_cannot_be_asked_change_nothing(saved, wanted, monkeypatch):
    from mllm import page  # not at the top: gradio takes seconds in each process that collects the tests

    vlm = load(saved / "run")
    asked, options = {"text": QUESTIONS[0], "files": [str(saved / "scene.png")]}, {"max_new_tokens": 12}
    steps = list(page.respond(vlm, options, asked, [], True))
    texts = [page.messages(talk)[-1]["content"] for talk, _ in steps]
    assert len(set(texts)) > 3 and all(after.startswith(before) for before, after in pairwise(texts))
    talk, maps = steps[-1]
    assert talk[-1].answer == wanted[0][0][0] and maps[0][1] == wanted[0][0][1]
    assert all(maps is None for _, maps in steps[:-1])
    assert [list(entry) for entry in page.messages(talk)] == [["role", "content"]] * 3

    def refused(words, text="Is it?", files=(), history=()):
        with pytest.raises(InputError, match=words):
            list(page.respond(vlm, options, {"text": text, "files": list(files)}, list(history), True))

    scene = asked["files"]
    refused("write a question", " ")
    refused("shows 1 images, but 2", files=scene * 2)
    refused("20,001 characters; ask one of at most 20,000", "a" * 20_001)
    refused(r"a prompt has [\d,]+ tokens .* and the language model only", "a b " * 5_000)
    refused("may show 16 images, not 17", files=scene * 9, history=[page.Turn("a", scene * 8, "b")])
    refused(r"gone\.png was removed after 60 minutes", history=[page.Turn("a", ["/nowhere/gone.png"], "b")])
    monkeypatch.setattr(page, "MOST_PIXELS", 40_000)  # scene.png has 60,000
    refused("have 120,000 pixels; show at most 80,000", files=scene * 2)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40_000)
    refused("60,000 pixels, which could be a decompression bomb", files=scene)


def test_what_is_missing_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("os.environ", dict(os.environ))
    for arguments, words in [
        ([], "no model that"),
        (["--device=mars"], "device mars"),
        (["--port=0"], "--port.*at least 1"),
        (["--host=0.0.0.0"], "--host 0.0.0.0 shows the page to all .*give --password WORD, or --open"),
        (["--host=0.0.0.0", "--open"], "no model that"),
        (["--host=::", "--password=word"], "no model that"),
    ]:
        with pytest.raises(InputError, match=words):
            app.main([str(tmp_path), *arguments])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install 'diffclip-stack\[app\]'"):
        app.main([str(tmp_path)])


def test_help_answers_at_once():
    """Without importing what is slow to import."""
    told = run_program([sys.executable, "-X", "importtime", "-m", "mllm.app", "--help"], check=True)
    assert "--host" in told.stdout and not {"torch", "transformers", "gradio"} & {
        line.split("|")[-1].strip() for line in told.stderr.splitlines()
    }
