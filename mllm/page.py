"""The page of `mllm.app`, in gradio: the conversation, and where in its images the last answer looks; of one model, or
of two beside each other.

Import it after GRADIO_TEMP_DIR and GRADIO_ANALYTICS_ENABLED are set: gradio reads them when it is imported.
"""

import html
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image

from diffclip.base.errors import InputError
from diffclip.base.images import open_image
from diffclip.base.lines import print_line
from diffclip.base.overlay import overlay
from diffclip.scenes.drawing import draw, make_scene
from mllm.answer_attention import overlays
from mllm.conversation import question_turn
from mllm.model import VisionLanguageModel

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
        """What each model answers, one after the other; `state` is (messages, history) of each."""
        box: Any = None
        for place, (shown, messages, history) in enumerate(zip(models, state[::2], state[1::2])):
            try:
                for said, talk, maps, _ in respond(shown.vlm, generation, asked, messages, history, look):
                    yield updated(place, said, talk, maps, scale(maps), box)
            except InputError as error:  # messages are shown as HTML, and this one may hold the name of a file
                who = f"{shown.name}: " if len(models) > 1 else ""
                gr.Warning(html.escape(f"{who}{error}"))
                box = asked  # to be mended and asked again
                yield updated(place, messages, history, gr.skip(), gr.skip(), box)
                if place == 0:
                    return

    def updated(place: int, messages: Any, history: Any, maps: Any, scale: Any, box: Any) -> tuple:
        values: list[Any] = [gr.skip()] * (4 * len(models))
        values[4 * place : 4 * place + 4] = messages, history, maps, scale
        return (*values, box)

    title = "DiffCLIP chat"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
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
                outputs += [chat, gr.State(([], [])), maps, legend]  # the state: turns and images so far
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
        state = [part for i in range(len(models)) for part in outputs[4 * i : 4 * i + 2]]
        outputs.append(ask)
        # one at a time: all who visit the page share the models
        answering = ask.submit(answer, [ask, look, *state], outputs, concurrency_limit=1, show_progress_on=chats)
        ask.stop(None, cancels=answering)
        for emptied in (clear.click, *(chat.clear for chat in chats)):
            emptied(lambda: (*([], ([], []), None, "") * len(models), None), None, outputs, cancels=answering)
    return page


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
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>()#+!|~&$" else c for c in text)


def respond(
    vlm: VisionLanguageModel,
    generation: dict[str, Any],
    asked: dict,
    messages: list[dict],
    history: tuple[list, list],
    look: bool,
) -> Iterator[tuple]:
    """Answer a question, word by word; then show where the answer looks.

    Args:
        asked: {"text": the question, "files": paths of new images}.
        messages: the conversation as the page shows it, {"role", "content"}.
        history: the conversation as the model sees it, (turns, images).
        look: whether to compute where the answer looks.

    Yields:
        (messages, history, overlays, asked) as they are from then on; the box of the question is emptied at once.

    Raises:
        InputError: a file that is no image, no question, or more images than the template shows.
    """
    question = asked["text"].strip()
    new = [open_image(file, Path(file).name) for file in asked["files"]]
    if not question:
        raise InputError("write a question beside the image")
    turns, images = [*history[0], question_turn(question, len(new))], [*history[1], *new]
    messages = [*messages, *({"role": "user", "content": {"path": file}} for file in asked["files"])]
    messages.append(message("user", question))
    answer = ""
    for piece in chain([""], vlm.stream(turns, images, **generation)):
        answer += piece
        answered = [*turns, {"from": "gpt", "value": answer.strip()}]
        shown = [*messages, message("assistant", answer)], (answered, images)
        yield *shown, None, None
    if look and images:
        maps = [(image, f"{share:.1%} of the attention") for image, share in overlays(vlm, answered, images)]
        yield *shown, maps, None


def message(role: str, text: str) -> dict[str, str]:
    """What the page shows of a turn: the text as it is written, neither as Markdown nor as HTML."""
    return {"role": role, "content": html.escape(text.strip(), quote=False)}


def serve(
    models: Sequence[Shown], host: str, port: int, generation: dict[str, Any], examples: Sequence[Path] = ()
) -> None:
    """Show the page until the process is told to end; InputError if it cannot listen there."""
    page = build(models, generation, examples)
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
            max_file_size="50mb",
            allowed_paths=[str(file.resolve()) for file in examples],
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot listen on {host}:{port} ({error}); try another --port") from None
    print_line(f"http://{host}:{port}")
    page.block_thread()
