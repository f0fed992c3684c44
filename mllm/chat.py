"""Ask a multimodal run about images: one question, a conversation, or a file of questions.

diffclip chat RUN --image a.jpg "Is there a dog?"          # the answer appears word by word
diffclip chat RUN --image a.jpg                            # a conversation; an empty line ends it
diffclip chat RUN --batch questions.jsonl --out answers.jsonl   # rows {"image", "question"}
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffclip.base.commands import Parser, number
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.images import open_image
from diffclip.base.imports import importing
from diffclip.base.lines import print_line
from mllm import conversation

if TYPE_CHECKING:
    from PIL.Image import Image

    from mllm.model import VisionLanguageModel


def add_model_options(parser: Parser) -> None:
    """The run to ask, and how: of `chat` and `app`."""
    parser.add_argument("run", metavar="RUN", help="a run of instruct (or align), or a Hub id")
    parser.add_argument("--max_new_tokens", type=number(int, 1), default=512, help="longest answer (512)")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0 = always the likeliest word (0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as stored, unless given")
    parser.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")


def generation_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` among a command's."""
    return {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("diffclip chat", description=__doc__)
    add_model_options(parser)
    parser.add_argument("question", nargs="?", default="", help="ask this and end; else a conversation")
    parser.add_argument("--image", default="", help="the image that it is about")
    parser.add_argument("--batch", type=Path, help="JSONL file of rows {image, question}")
    parser.add_argument("--image_root", type=Path, default=Path(), help="folder that the rows' paths start from")
    parser.add_argument("--out", type=Path, help="where the answers go, with --batch")
    parser.add_argument("--batch_size", type=number(int, 1), default=8, help="questions at a time (8)")
    options = parser.parse_intermixed_args(argv)
    if bool(options.batch) != bool(options.out):
        raise InputError("--batch and --out go together: the questions' file, and where the answers go")
    if options.batch and (options.question or options.image):
        raise InputError("--batch takes its questions and images from the file; leave the others away")

    with importing():
        from mllm import answer_file, model

    vlm = model.load(options.run, options.dtype, options.device, quiet=True)
    generation = generation_of(options)
    if options.batch:
        answer_file.answer_file(vlm, options.batch, options.out, options.image_root, options.batch_size, **generation)
    else:
        converse(vlm, options.image, options.question, **generation)


def converse(vlm: "VisionLanguageModel", image: str, first: str, **options: Any) -> None:
    """One question, or a conversation on the console until an empty line or end of input."""
    images = [open_image(image, image)] if image else []
    turns: list[dict[str, str]] = []
    while question := first or _next_question():
        turns.append(conversation.question_turn(question, 0 if turns else len(images)))
        pieces = []
        for piece in vlm.stream(turns, images, **options):
            pieces.append(piece)
            print_line(piece, keep="\n\t", end="")
        print_line()
        if first:
            return
        turns.append({"from": "gpt", "value": "".join(pieces).strip()})


def _next_question() -> str:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print_line()
        return ""


def question_turn(question: str, pictures: int) -> dict[str, str]:
    """`mllm.conversation.question_turn`, as published model cards call it."""
    return conversation.question_turn(question, pictures)


def answer(model: Any, processor: Any, conversations: list, pictures: "list[Image]", **options: Any) -> list[str]:
    """`VisionLanguageModel.answer` to one conversation, as published model cards call it."""
    from mllm.model import VisionLanguageModel

    return VisionLanguageModel(model, processor).answer(conversations, [pictures], **options)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
