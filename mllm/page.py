"""The page of `mllm.app`, in gradio: the conversation, and where in its images the last answer looks.

Import it after GRADIO_TEMP_DIR and GRADIO_ANALYTICS_ENABLED are set: gradio reads them when it is imported.
"""

import html
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import gradio as gr

from diffclip.base.errors import InputError
from diffclip.base.images import open_image
from mllm.answer_attention import overlays
from mllm.conversation import question_turn
from mllm.model import VisionLanguageModel

HINT = "Add an image with the button in the box below, ask about it, and go on asking."
CSS = ".message-buttons {display: none}"  # one of them shares images on the web


def build(vlm: VisionLanguageModel, generation: dict[str, Any]) -> gr.Blocks:
    """The page; `generation` as in `mllm.model.generation_options`."""

    def answer(asked: dict, messages: list, history: tuple, look: bool) -> Iterator[tuple]:
        try:
            yield from respond(vlm, generation, asked, messages, history, look)
        except InputError as error:  # messages are shown as HTML, and this one may hold the name of a file
            gr.Warning(html.escape(str(error)))
            yield messages, history, gr.skip(), asked  # as before

    with gr.Blocks(title="DiffCLIP chat", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        history = gr.State(([], []))  # turns and images so far
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
        outputs = [chat, history, maps, ask]
        # one at a time: all who visit the page share one model
        answering = ask.submit(answer, [ask, chat, history, look], outputs, concurrency_limit=1, show_progress_on=chat)
        ask.stop(None, cancels=answering)
        for emptied in (clear.click, chat.clear):
            emptied(lambda: ([], ([], []), None, None), None, outputs, cancels=answering)
    return page


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


def serve(vlm: VisionLanguageModel, host: str, port: int, generation: dict[str, Any]) -> None:
    """Show the page until the process is told to end; InputError if it cannot listen there."""
    page = build(vlm, generation)
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
            css=CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot listen on {host}:{port} ({error}); try another --port") from None
    print(f"http://{host}:{port}", flush=True)
    page.block_thread()
