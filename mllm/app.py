"""A page to chat with a multimodal run about images, which shows where in them each answer looks.

diffclip app RUN                          # http://127.0.0.1:7860, for this machine alone
diffclip app RUN --host 0.0.0.0           # for all who reach this machine; there is no password
"""

import argparse
import html
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffclip.base.errors import InputError, exit_on_input_error
from mllm.chat import add_model_options, load_for_chat, question_turn, stream

if TYPE_CHECKING:
    from gradio import Blocks

HINT = "Add an image with the button in the box below, ask about it, and go on asking."
CSS = ".message-buttons {display: none}"  # one of them shares images on the web


def build(model: Any, processor: Any, generation: dict) -> "Blocks":
    """The page: the conversation, a box for questions and images, and where the last answer looks.

    Args:
        model, processor: from `mllm.model.load`.
        generation: options of `generate`.
    """
    import gradio as gr

    def answer(asked: dict, shown: list, talk: tuple, look: bool) -> Iterator[tuple]:
        try:
            yield from respond(model, processor, generation, asked, shown, talk, look)
        except InputError as error:  # messages are shown as HTML, and this one may hold the name of a file
            gr.Warning(html.escape(str(error)))
            yield shown, talk, gr.skip(), asked  # as before

    with gr.Blocks(title="DiffCLIP chat", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        talk = gr.State(([], []))  # turns and images so far
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Conversation", height=520, render_markdown=False, buttons=[], placeholder=HINT)
                ask = gr.MultimodalTextbox(
                    show_label=False,
                    placeholder="Ask about the image",
                    file_types=["image"],
                    file_count="multiple",
                    stop_btn=True,
                    autofocus=True,
                )
                clear = gr.Button("Clear")
            with gr.Column(scale=2):
                gr.Markdown("Where the last answer looks")  # the gallery's own label would cover the image
                maps = gr.Gallery(
                    show_label=False,
                    columns=1,
                    height=480,
                    object_fit="contain",
                    format="png",
                    buttons=["fullscreen"],
                    interactive=False,
                )
                look = gr.Checkbox(True, label="Show where answers look")
        outputs = [chat, talk, maps, ask]
        # one at a time: all who visit the page share one model
        answering = ask.submit(answer, [ask, chat, talk, look], outputs, concurrency_limit=1, show_progress_on=chat)
        ask.stop(None, cancels=answering)
        for emptied in (clear.click, chat.clear):
            emptied(lambda: ([], ([], []), None, None), None, outputs, cancels=answering)
    return page


def respond(
    model: Any, processor: Any, generation: dict, asked: dict, shown: list[dict], talk: tuple[list, list], look: bool
) -> Iterator[tuple]:
    """Answer what was asked, word by word; then show where the answer looks.

    Args:
        model, processor, generation: as in `build`.
        asked: {"text": the question, "files": paths of new images}.
        shown: the conversation as the page shows it, messages {"role", "content"}.
        talk: the conversation as the model sees it, (turns, images).
        look: whether to compute where the answer looks.

    Yields:
        (shown, talk, overlays, asked) as they are from then on; the box of the question is emptied at once.

    Raises:
        InputError: a file that is no image, no question, or more images than the template shows.
    """
    from diffclip.base.images import open_image
    from mllm.answer_attention import overlays

    question = asked["text"].strip()
    new = [open_image(file, Path(file).name) for file in asked["files"]]
    if not question:
        raise InputError("write a question beside the image")
    turns, pictures = [*talk[0], question_turn(question, len(new))], [*talk[1], *new]
    shown = [*shown, *({"role": "user", "content": {"path": file}} for file in asked["files"])]
    shown.append(message("user", question))
    said, maps = "", None

    def now() -> tuple:
        return (
            [*shown, message("assistant", said)],
            ([*turns, {"from": "gpt", "value": said.strip()}], pictures),
            maps,
            None,
        )

    yield now()
    for piece in stream(model, processor, turns, pictures, **generation):
        said += piece
        yield now()
    if look and pictures:
        found = overlays(model, processor, now()[1][0], pictures)
        maps = [(picture, f"{share:.1%} of the attention") for picture, share in found]
        yield now()


def message(role: str, text: str) -> dict[str, str]:
    """What the page shows of a turn: the text as it is written, neither as Markdown nor as HTML."""
    return {"role": role, "content": html.escape(text.strip(), quote=False)}


def serve(options: argparse.Namespace) -> None:
    """Load the run and show the page until the process is told to end."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the app needs gradio: pip install 'diffclip-stack[app]'")
    loaded = load_for_chat(options)
    import gradio as gr

    page = build(*loaded)
    try:
        page.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size="50mb",
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot listen on {options.host}:{options.port} ({error}); try another --port") from None
    print(f"http://{options.host}:{options.port}", flush=True)
    page.block_thread()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m mllm.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run of instruct (or align), or a Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    add_model_options(parser)
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as Ctrl-C does, so that uploads are removed
    with tempfile.TemporaryDirectory(prefix="diffclip-app-") as folder:
        # read when gradio is imported: it calls nobody, and uploads lie in a folder of this process's own
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        serve(options)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
