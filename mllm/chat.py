"""Ask a multimodal run about pictures: one question, a conversation, or a file of questions.

python -m mllm.chat RUN --image a.jpg "Is there a dog?"          # the answer appears word by word
python -m mllm.chat RUN --image a.jpg                            # a conversation; an empty line ends it
python -m mllm.chat RUN --batch questions.jsonl --out answers.jsonl   # rows {"image", "question"}
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffclip.errors import InputError, exit_on_input_error

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def stream(
    model: Any, processor: Any, turns: Sequence[dict[str, str]], pictures: Sequence["Image"], **options: Any
) -> Iterator[str]:
    """Yield the answer to a conversation piece by piece as it is generated; closing the iterator ends the generation.

    Args:
        model, processor: from `mllm.model.load`.
        turns: {"from": "human" | "gpt", "value"}, ending with a question; `<image>` where a picture stands.
        pictures: in the order in which the conversation shows them.
        options: of `generate`, e.g. max_new_tokens, do_sample, temperature.
    """
    from threading import Event, Thread

    from transformers import TextIteratorStreamer

    inputs = prepare(model, processor, prompts(model, processor, [turns]), pictures)
    stopped = Event()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []

    def stop(ids: "torch.Tensor", scores: object, **rest: object) -> "torch.Tensor":
        return ids.new_full((len(ids),), stopped.is_set(), dtype=bool)

    def generate() -> None:
        try:
            model.generate(**inputs, streamer=streamer, stopping_criteria=[stop], **{"max_new_tokens": 512, **options})
        except BaseException as error:  # told to the thread that waits for words
            failed.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    lead = True
    try:
        for piece in streamer:
            piece = piece.lstrip() if lead else piece
            if piece:
                lead = False
                yield piece
    finally:  # also when whoever reads the pieces stops
        stopped.set()
        thread.join()
    if failed:
        raise failed[0]


def answer(
    model: Any,
    processor: Any,
    conversations: Sequence[Sequence[dict[str, str]]],
    pictures: Sequence["Image"],
    **options: Any,
) -> list[str]:
    """Answers to several conversations in one batch, padded on the left; `pictures` of all of them in order."""
    texts = prompts(model, processor, conversations)
    return [text.strip() for text in write(model, processor, texts, pictures, **options)]


def prompts(model: Any, processor: Any, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """Conversations that end with a question, as text in the template that the model was trained with."""
    from mllm.conversation import prompt

    template, end = model.config.conversation_template, processor.tokenizer.eos_token
    return [prompt(turns, template, end) for turns in conversations]


def write(model: Any, processor: Any, texts: Sequence[str], pictures: Sequence["Image"], **options: Any) -> list[str]:
    """What the model writes behind each of `prompts`, unstripped; arguments otherwise as in `answer`."""
    inputs = prepare(model, processor, texts, pictures)
    tokens = model.generate(**inputs, **{"max_new_tokens": 512, **options})
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def prepare(model: Any, processor: Any, texts: Sequence[str], pictures: Sequence["Image"]) -> Any:
    """The model's inputs for `prompts`: input_ids, attention_mask (texts, tokens), padded on the left; pixel_values.

    Raises:
        InputError: more or fewer pictures than the texts show.
    """
    from mllm.conversation import IMAGE
    from mllm.image_modes import bounded

    shown = sum(text.count(IMAGE) for text in texts)
    if shown != len(pictures):
        template = model.config.conversation_template
        raise InputError(
            f"in template `{template}` the conversation shows {shown} pictures, but {len(pictures)} are given "
            "(vicuna and plain show one a question)"
        )
    processor.tokenizer.padding_side = "left"
    images = bounded(pictures, processor.image_processor)
    made = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    return made.to(model.device, model.dtype)


def question_turn(question: str, pictures: int) -> dict[str, str]:
    """A human turn that shows its pictures in front, unless the question says where."""
    from mllm.conversation import IMAGE

    return {"from": "human", "value": question if IMAGE in question else f"{IMAGE}\n" * pictures + question}


def talk(model: Any, processor: Any, image: str, first: str, options: dict) -> None:
    """One question, or a conversation on the console until an empty line or end of input."""
    from diffclip.pictures import open_picture

    pictures = [open_picture(image, image)] if image else []
    turns: list[dict[str, str]] = []
    question = first
    while True:
        if not question:
            try:
                question = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not question:
                return
        turns.append(question_turn(question, 0 if turns else len(pictures)))
        said = ""
        for piece in stream(model, processor, turns, pictures, **options):
            said += piece
            print(piece, end="", flush=True)
        print()
        if first:
            return
        turns.append({"from": "gpt", "value": said.strip()})
        question = ""


def answer_file(model: Any, processor: Any, source: Path, out: Path, root: Path, size: int, options: dict) -> None:
    """Answer every row of a JSONL file; what `out` already holds is kept, so the same command goes on after a stop.

    Raises:
        InputError: a row without a question, or with a picture that cannot be read, by line.
    """
    from tqdm import tqdm

    from diffclip.pictures import open_picture
    from mllm.data import image_names, read_json_rows

    rows = list(read_json_rows(source))
    for number, row in enumerate(rows):
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise InputError(f"{source}: row {number} has no question; rows are {{image, question}}")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = _whole_lines(out)
    with (
        open(out, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=done, unit="question", disable=None) as bar,
    ):
        for first in range(done, len(rows), size):
            some = rows[first : first + size]
            paths = [root / name for row in some for name in image_names(row)]
            pictures = [open_picture(path, str(path)) for path in paths]
            turns = [[question_turn(row["question"], len(image_names(row)))] for row in some]
            for row, text in zip(some, answer(model, processor, turns, pictures, **options)):
                file.write(json.dumps({**row, "answer": text}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(some))
    print(f"wrote {out}: {len(rows):,} answers")


def _whole_lines(path: Path) -> int:
    """How many rows a file holds; half a line at its end, left by a kill, is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) != len(content):
        os.truncate(path, len(whole))
    return whole.count(b"\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What `load_for_chat` reads, beside the run itself."""
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest answer (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = always the likeliest word (0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as stored, unless given")
    parser.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")


def load_for_chat(options: argparse.Namespace) -> tuple[Any, Any, dict]:
    """Model and processor of `options.run` on their device, and options of `generate`."""
    import torch
    from transformers.utils import logging

    from mllm.model import load

    logging.disable_progress_bar()
    model, processor = load(options.run, dtype=getattr(torch, options.dtype) if options.dtype else None)
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generation = {"max_new_tokens": options.max_new_tokens}
    if options.temperature > 0:
        generation |= {"do_sample": True, "temperature": options.temperature}
    return model, processor, generation


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m mllm.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run of instruct (or align), or a Hub id")
    parser.add_argument("question", nargs="?", default="", help="ask this and end; else a conversation")
    parser.add_argument("--image", default="", help="the picture that it is about")
    parser.add_argument("--batch", type=Path, help="JSONL file of rows {image, question}")
    parser.add_argument("--image_root", type=Path, default=Path(), help="folder that the rows' paths start from")
    parser.add_argument("--out", type=Path, help="where the answers go, with --batch")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at a time (8)")
    add_model_options(parser)
    options = parser.parse_intermixed_args(argv)
    if bool(options.batch) != bool(options.out):
        raise InputError("--batch and --out go together: the questions' file, and where the answers go")

    model, processor, generation = load_for_chat(options)
    if options.batch:
        answer_file(model, processor, options.batch, options.out, options.image_root, options.batch_size, generation)
    else:
        talk(model, processor, options.image, options.question, generation)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
