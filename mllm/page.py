"""The page of `mllm.app`, in gradio: the conversation, and where in its images the last answer looks; of one model, or
of two beside each other.

Import it after GRADIO_TEMP_DIR and GRADIO_ANALYTICS_ENABLED are set: gradio reads them when it is imported.
"""

import hmac
import html
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware

from diffclip.base.errors import InputError
from diffclip.base.images import open_image
from diffclip.base.lines import print_line, printable
from diffclip.base.overlay import overlay
from diffclip.scenes.drawing import draw, make_scene
from mllm.answer_attention import overlays
from mllm.conversation import question_turn
from mllm.model import VisionLanguageModel
from mllm.page_guard import LARGEST_FILE, Guard, names_of

HINT = "Add an image with the button in the box below, ask about it, and go on asking."
EXAMPLES = ("What is in the image?", "Is there a red square in the image?", "Describe the image.")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CSS = """
.message-buttons {display: none}  /* one of them shares images on the web */
.maps .thumbnail-item {aspect-ratio: auto; height: 380px}  /* whole, with its caption */
.maps img {width: 100%; height: 100%; object-fit: contain}
.scale {display: flex; align-items: center; gap: 0.5em; font-size: 0.85em}
.scale i {flex: 1; height: 0.8em; min-width: 4em; border: 1px solid #8888}
"""


# What one visitor, and all of them, may ask for
LONGEST_QUESTION = 20_000  # characters; how many tokens it may have, the model's positions say
MOST_IMAGES = 16  # of a conversation
MOST_PIXELS = 50_000_000  # of an image, and twice as many of a conversation: 300 MB as they are decoded
MOST_WAITING = 4, 100  # questions of one visitor, and of all
KEPT = 3600  # seconds that an uploaded image and an abandoned conversation stay


class Turn(NamedTuple):
    """A question, the paths of the images that came with it, and its answer so far."""

    question: str
    files: list[str]
    answer: str


class Shown(NamedTuple):
    """A model on the page."""

    name: str
    trained_on: str
    vlm: VisionLanguageModel


def examples_of(folder: Path | None, drawn: Path) -> list[Path]:
    """The first images of a folder; without one three of the built-in scenes, drawn into another.

    Raises:
        InputError: the folder is none, or holds no image.
    """
    if folder is None:
        files = [drawn / f"scene-{i}.png" for i in range(3)]
        for i, file in enumerate(files):
            Image.fromarray(draw(make_scene(0, "app", i, min_shapes=2), 224)).save(file)
        return files
    if not folder.is_dir():
        raise InputError(f"--examples {folder}: no such folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)[:6]
    if not files:
        raise InputError(f"--examples {folder}: holds no image ({', '.join(IMAGES)})")
    return files


def build(models: Sequence[Shown], generation: dict[str, Any], examples: Sequence[Path] = ()) -> gr.Blocks:
    """The page; `generation` as in `mllm.model.generation_options`."""

    def answer(asked: dict, look: bool, *state: Any) -> Iterator[tuple]:
        """What each model answers, one after the other; `state` is the history of each."""
        box: Any = None  # the first update empties it; what is typed into it after that stays
        for place, (shown, history) in enumerate(zip(models, state)):
            try:
                for talk, maps in respond(shown.vlm, generation, asked, history, look):
                    yield updated(place, messages(talk), talk, maps, scale(maps), box)
                    box = gr.skip()
            except InputError as error:  # messages are shown as HTML, and this one may hold the name of a file
                who = f"{shown.name}: " if len(models) > 1 else ""
                gr.Warning(html.escape(printable(f"{who}{error}")))
                # to be mended and asked again
                yield updated(place, messages(history), history, gr.skip(), gr.skip(), asked)
                if place == 0:
                    return

    def updated(place: int, said: Any, history: Any, maps: Any, scale: Any, box: Any) -> tuple:
        values: list[Any] = [gr.skip()] * (4 * len(models))
        values[4 * place : 4 * place + 4] = said, history, maps, scale
        return (*values, box)

    title = "DiffCLIP chat"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as page:
        beside = len(models) > 1
        outputs: list[Any] = []
        chats = []
        with gr.Row():
            for shown in models:
                with gr.Column():
                    gr.Markdown(f"### {plain(shown.name)}\n{plain(shown.trained_on)}")
                    with gr.Column() if beside else gr.Row():  # the map under or beside the conversation
                        with gr.Column(scale=3, min_width=240):
                            chat = gr.Chatbot(
                                label="Conversation",
                                height=360 if beside else 440,
                                render_markdown=False,
                                buttons=[],
                                placeholder=HINT,
                            )
                        with gr.Column(scale=2, min_width=240):
                            gr.Markdown("Where the last answer looks")  # the gallery's own label covers the image
                            maps = gr.Gallery(
                                show_label=False,
                                columns=1,
                                height=410,
                                object_fit="contain",
                                format="png",
                                buttons=["fullscreen"],
                                interactive=False,
                                elem_classes="maps",
                            )
                            legend = gr.HTML("")
                chats.append(chat)
                outputs += [chat, gr.State([], time_to_live=KEPT), maps, legend]  # the state: the turns so far
        ask = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask about the image",
            file_types=["image"],
            file_count="multiple",
            stop_btn=True,
            autofocus=True,
        )
        with gr.Row():
            look = gr.Checkbox(True, label="Show where answers look")
            clear = gr.Button("Clear")
        if examples:
            rows = [{"text": EXAMPLES[i % len(EXAMPLES)], "files": [str(file)]} for i, file in enumerate(examples)]
            gr.Examples(rows, ask, label="Examples", cache_examples=False)
        state = outputs[1::4]
        outputs.append(ask)
        # one at a time: all who visit the page share the models
        answering = ask.submit(answer, [ask, look, *state], outputs, concurrency_limit=1, show_progress_on=chats)
        ask.stop(None, cancels=answering)
        for emptied in (clear.click, *(chat.clear for chat in chats)):
            emptied(lambda: (*([], [], None, "") * len(models), None), None, outputs, cancels=answering)
    bound_queue(page)
    return page


def bound_queue(page: gr.Blocks) -> None:
    """Have no more than `MOST_WAITING` wait for the model; whoever comes then is told to come again."""
    one, total = MOST_WAITING
    queue = page.queue(max_size=total)._queue
    push = queue.push

    async def bounded(body: Any, request: Any, username: str | None) -> Any:
        if len(queue.pending_event_ids_session.get(body.session_hash, ())) >= one:
            return False, f"{one} of your questions are waiting: wait for their answers", "queue_full"
        return await push(body=body, request=request, username=username)

    queue.push = bounded  # gradio bounds the whole queue alone


def scale(maps: Sequence[tuple[Image.Image, str]] | None) -> str:
    """HTML: which colour stands for how much attention, in the maps of one answer."""
    if not maps:
        return ""
    grey = np.full((1, 16, 3), 128, np.uint8)
    colours = overlay(grey, np.linspace(0, 1, 16)[None])[0]
    steps = ", ".join(f"rgb({r},{g},{b})" for r, g, b in colours.tolist())
    hottest = " / ".join(f"{image.info['hottest']:.2%}" for image, _ in maps)
    bar = f"<i style='background: linear-gradient(to right, {steps})'></i>"
    return f"<div class='scale'>0 % {bar} {hottest} of the attention in one patch</div>"


def plain(text: str) -> str:
    """Text that Markdown shows as it stands."""
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>()#+!|~&$" else c for c in printable(text))


def respond(
    vlm: VisionLanguageModel,
    generation: dict[str, Any],
    asked: dict,
    history: list[Turn],
    look: bool,
) -> Iterator[tuple[list[Turn], list | None]]:
    """Answer a question, word by word; then show where the answer looks.

    Args:
        asked: {"text": the question, "files": paths of new images}.
        history: the conversation before it.
        look: whether to compute where the answer looks.

    Yields:
        (history, overlays) as they are from then on.

    Raises:
        InputError: a file that is no image, no question, more images than the template shows, or more of anything than
            a visitor may ask for.
    """
    question, files = asked["text"].strip(), list(asked["files"])
    if len(question) > LONGEST_QUESTION:
        raise InputError(f"the question has {len(question):,} characters; ask one of at most {LONGEST_QUESTION:,}")
    images = open_all([*chain(*(turn.files for turn in history)), *files])
    if not question:
        raise InputError("write a question beside the image")
    answer = ""
    for piece in chain([""], vlm.stream(turns_of([*history, Turn(question, files, "")])[:-1], images, **generation)):
        answer += piece
        answered = [*history, Turn(question, files, answer.strip())]
        yield answered, None
    if look and images:
        found = overlays(vlm, turns_of(answered), images)
        yield answered, [(image, f"{share:.1%} of the attention") for image, share in found]


def open_all(files: Sequence[str]) -> list[Image.Image]:
    """The images of a conversation, decoded for one question and not kept; InputError as `respond`."""
    if len(files) > MOST_IMAGES:
        raise InputError(f"a conversation may show {MOST_IMAGES} images, not {len(files)}; clear it to go on")
    images: list[Image.Image] = []
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{Path(file).name} was removed after {KEPT // 60} minutes; clear the conversation")
        images.append(open_image(file, Path(file).name))
        if (pixels := sum(image.width * image.height for image in images)) > 2 * MOST_PIXELS:
            raise InputError(f"the images have {pixels:,} pixels; show at most {2 * MOST_PIXELS:,}, smaller or fewer")
    return images


def turns_of(history: Sequence[Turn]) -> list[dict[str, str]]:
    """The conversation as the model sees it."""
    both = ((question_turn(t.question, len(t.files)), {"from": "gpt", "value": t.answer}) for t in history)
    return list(chain(*both))


def messages(history: Sequence[Turn]) -> list[dict]:
    """The conversation as the page shows it."""
    shown: list[dict] = []
    for turn in history:
        shown += [{"role": "user", "content": {"path": file}} for file in turn.files]
        shown += [message("user", turn.question), message("assistant", turn.answer)]
    return shown


def message(role: str, text: str) -> dict[str, str]:
    """What the page shows of a turn: the text as it is written, neither as Markdown nor as HTML."""
    return {"role": role, "content": html.escape(text.strip(), quote=False)}


def serve(
    models: Sequence[Shown],
    host: str,
    port: int,
    generation: dict[str, Any],
    folder: Path,
    examples: Sequence[Path] = (),
    password: str = "",
) -> gr.Blocks:
    """Show the page, in threads of its own; InputError if it cannot listen there.

    Args:
        folder: where uploads lie (GRADIO_TEMP_DIR).
        password: asks each visitor for it, with any name; "" lets all in.
    """
    page = build(models, generation, examples)
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # beyond it `open_image` refuses

    def known(name: str, word: str) -> bool:
        return hmac.compare_digest(word.encode(), password.encode())

    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=LARGEST_FILE,
            state_session_capacity=1000,
            auth=known if password else None,
            auth_message="The password is the one that the page was started with; any user name will do.",
            app_kwargs={"middleware": [Middleware(Guard, names=names_of(host), folder=folder)]},
            allowed_paths=[str(file.resolve()) for file in examples],
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot listen on {host}:{port} ({error}); try another --port") from None
    print_line(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    return page
