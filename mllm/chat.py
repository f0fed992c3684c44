"""Ask a multimodal run about images: one question, a conversation, or a file of questions.

diffclip chat RUN --image a.jpg "Is there a dog?"          # the answer appears word by word
diffclip chat RUN --image a.jpg                            # a conversation; an empty line ends it
diffclip chat RUN --batch questions.jsonl --out answers.jsonl   # rows {"image", "question"}
"""

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import append_jsonl, cut_to_whole_lines, json_line, parse_json, write_whole

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from mllm.data.images import ImagePlace

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # options without a meaning in greedy decoding


def generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of transformers' `generate` that do what they say.

    Args:
        options: of `generate`; None counts as not given. The temperature, where there is one, decides: 0 is greedy and
            more samples, whatever do_sample says; without one do_sample does, and without both it is greedy.
            max_gen_toks, as some tasks of lmms-eval say, is max_new_tokens.

    Raises:
        InputError: a temperature below 0, or no new tokens.
    """
    result = {name: value for name, value in options.items() if value is not None}
    if "max_gen_toks" in result:
        result.setdefault("max_new_tokens", result.pop("max_gen_toks"))
        result.pop("max_gen_toks", None)
    result.setdefault("max_new_tokens", 512)
    if result["max_new_tokens"] < 1:
        raise InputError(f"max_new_tokens is {result['max_new_tokens']}: an answer needs 1 or more")
    if "temperature" in result:
        temperature = float(result["temperature"])
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature is {temperature}: give 0 for the likeliest words, or more to sample")
        result |= {"temperature": temperature, "do_sample": temperature > 0}
    result["do_sample"] = bool(result.get("do_sample"))
    return {name: value for name, value in result.items() if result["do_sample"] or name not in SAMPLING}


def stream(
    model: Any, processor: Any, turns: Sequence[dict[str, str]], pictures: Sequence["Image"], **options: Any
) -> Iterator[str]:
    """Yield the answer to a conversation piece by piece as it is generated; closing the iterator ends the generation.

    Args:
        model, processor: from `mllm.model.load`.
        turns: {"from": "human" | "gpt", "value"}, ending with a question; `<image>` where an image stands.
        images: in the order in which the conversation shows them.
        options: see `generation`.
    """
    from threading import Event, Thread

    from transformers import TextIteratorStreamer

    inputs = prepare(model, processor, prompts(model, processor, [turns]), [pictures])
    options, stopped = generation(options), Event()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failed: list[BaseException] = []

    def stop(ids: "torch.Tensor", scores: object, **rest: object) -> "torch.Tensor":
        return ids.new_full((len(ids),), stopped.is_set(), dtype=bool)

    def generate() -> None:
        try:
            model.generate(**inputs, streamer=streamer, stopping_criteria=[stop], **options)
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
    pictures: Sequence["Image"] | Sequence[Sequence["Image"]],
    **options: Any,
) -> list[str]:
    """Answers to several conversations in one batch; `pictures` as in `prepare`, options as in `generation`."""
    texts = prompts(model, processor, conversations)
    return [text.strip() for text in write(model, processor, texts, pictures, **options)]


def prompts(model: Any, processor: Any, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """Conversations that end with a question, as text in the template that the model was trained with."""
    from mllm.conversation import control_tokens, prompt

    template, end = model.config.conversation_template, processor.tokenizer.eos_token
    control = control_tokens(processor.tokenizer)
    return [prompt(turns, template, end, control) for turns in conversations]


def write(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    pictures: Sequence["Image"] | Sequence[Sequence["Image"]],
    **options: Any,
) -> list[str]:
    """What the model writes behind each of `prompts`, unstripped; arguments otherwise as in `answer`."""
    inputs = prepare(model, processor, texts, pictures)
    tokens = model.generate(**inputs, **generation(options))
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def prepare(
    model: Any, processor: Any, texts: Sequence[str], pictures: Sequence["Image"] | Sequence[Sequence["Image"]]
) -> Any:
    """The model's inputs for `prompts`: input_ids, attention_mask (texts, tokens), padded on the left; pixel_values.

    Args:
        images: those of each text in a list of its own; or all in one list, in the order in which the texts show
            them, where only their number can be checked.

    Raises:
        InputError: more or fewer images than a text shows.
    """
    from mllm.conversation import IMAGE
    from mllm.image_modes import bounded

    template, shown = model.config.conversation_template, [text.count(IMAGE) for text in texts]
    if pictures and all(isinstance(some, (list, tuple)) for some in pictures):
        flat = [picture for some in pictures for picture in some]
        for number, (count, some) in enumerate(zip(shown, pictures, strict=True), 1):
            check_shown(count, len(some), template, f"conversation {number}: " if len(texts) > 1 else "")
    else:
        flat = list(pictures)
        check_shown(sum(shown), len(flat), template)
    images = bounded(flat, processor.image_processor)
    made = processor(text=list(texts), images=images or None, padding=True, padding_side="left", return_tensors="pt")
    return made.to(model.device, model.dtype)


def check_shown(shown: int, given: int, template: str, name: str = "") -> None:
    """Raise InputError, which begins with `name`, unless a conversation shows as many images as it is given."""
    if shown == given:
        return
    if shown > given:
        remedy = "this template has no questions without an image" if template == "plain" else "remove <image> from it"
        remedy = f"give every <image> its image, or {remedy}"
    elif template == "chatml":
        remedy = "write one <image> into the question for each image, or none for all of them in front"
    else:
        remedy = "vicuna and plain show one a question: ask about one image at a time"
    raise InputError(
        f"{name}in template `{template}` the conversation shows {shown} images, but {given} are given; {remedy}"
    )


def question_turn(question: str, pictures: int) -> dict[str, str]:
    """A human turn that shows its images in front, unless the question says where."""
    from mllm.conversation import IMAGE

    return {"from": "human", "value": question if IMAGE in question else f"{IMAGE}\n" * pictures + question}


def talk(model: Any, processor: Any, image: str, first: str, options: dict) -> None:
    """One question, or a conversation on the console until an empty line or end of input."""
    from diffclip.base.images import open_image

    pictures = [open_image(image, image)] if image else []
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

    Each line of `out` is the row with its `answer` and an `answer_id`: a hash of the model and the options, and one of
    the row and its images. Answers are found again by it, so rows may have been added or moved in the meantime.

    Raises:
        InputError: a row without a question, with an image that cannot be found or read, or with more or fewer
            images than its prompt shows, by its number; `out` holds something else than answers of this model, with
            these options, to these rows.
    """
    from tqdm import tqdm

    from mllm.model import identity

    if out.is_dir() or out.resolve() == source.resolve():
        raise InputError(
            f"--out {out} is {'a folder' if out.is_dir() else 'the file of the questions'}; name a new file"
        )
    rows, places = _asked(model, processor, source, root)
    model_id = _digest([identity(model, processor), generation(options)])
    ids = [f"{model_id}-{row_id}" for row_id in _row_ids(rows, places, source)]
    out.parent.mkdir(parents=True, exist_ok=True)
    known = _known(out, ids, source)
    todo = [i for i, one in enumerate(ids) if one not in known]
    with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="question", disable=None) as bar:
        for first in range(0, len(todo), size):
            some = todo[first : first + size]
            turns = [[question_turn(rows[i]["question"], len(places[i]))] for i in some]
            pictures = [[place.open(f"{source}: row {i}") for place in places[i]] for i in some]
            texts = answer(model, processor, turns, pictures, **options)
            known |= {ids[i]: text for i, text in zip(some, texts)}
            append_jsonl(out, [_line(rows[i], text, ids[i]) for i, text in zip(some, texts)])
            bar.update(len(some))
    write_whole(out, "".join(json_line(_line(row, known[one], one)) for row, one in zip(rows, ids)))
    print(f"wrote {out}: {len(rows):,} answers")


def _asked(model: Any, processor: Any, source: Path, root: Path) -> tuple[list[dict], list[list["ImagePlace"]]]:
    """The rows of a file of questions and the places of their images; InputError names the row that is at fault."""
    from mllm.conversation import IMAGE
    from mllm.data.layouts import read_rows

    rows, places = list(read_rows(source)), []
    if not rows:
        raise InputError(f"{source}: holds no row; rows are {{image, question}}")
    for number, row in enumerate(rows):
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise InputError(f"{source}: row {number} has no question; rows are {{image, question}}")
        try:
            some = _pictures(row, root)
            (text,) = prompts(model, processor, [[question_turn(row["question"], len(some))]])
            check_shown(text.count(IMAGE), len(some), model.config.conversation_template)
        except InputError as error:
            raise InputError(f"{source}: row {number}: {error}") from None
        places.append(some)
    return rows, places


def _pictures(row: dict, root: Path) -> list["ImagePlace"]:
    """The places of a row's images; InputError if one cannot be found."""
    from mllm.data.checks import media_problem
    from mllm.data.images import row_places

    found = row_places(row, root)
    missing = [name for name, place in found if place is None]
    if missing:
        raise InputError(f"image {missing[0][:200]} is not under {root}, nor in a tar there; check --image_root")
    if problem := media_problem(row, bool(found)):
        raise InputError(problem)
    return [place for _, place in found if place is not None]


def _row_ids(rows: list[dict], places: list[list["ImagePlace"]], source: Path) -> list[str]:
    """A hash of each row and its images' bytes; rows that are repeated differ in how often they came before."""
    pictures: dict[ImagePlace, str] = {}
    before: Counter[str] = Counter()
    ids = []
    for number, (row, some) in enumerate(zip(rows, places)):
        for place in some:
            if place not in pictures:
                try:
                    pictures[place] = hashlib.sha256(place.read()).hexdigest()
                except OSError as error:
                    raise InputError(f"{source}: row {number}: {place.file} cannot be read ({error})") from None
        told = _digest([row, [pictures[place] for place in some]])
        ids.append(_digest([told, before[told]]))
        before[told] += 1
    return ids


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _line(row: dict, text: str, answer_id: str) -> dict:
    return {**row, "answer": text, "answer_id": answer_id}


def _known(out: Path, ids: list[str], source: Path) -> dict[str, str]:
    """The answers that a file holds by their ids, in its order; half a line at its end, left by a kill, is cut off."""
    content, known = out.read_bytes() if out.exists() else b"", {}
    wanted, model_id = set(ids), ids[0].split("-")[0]
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n"), 1):
        if not line.strip():
            continue
        name = f"{out}: line {number}"
        try:
            row = parse_json(line, name)
        except InputError as error:
            raise InputError(f"{error}; give another --out, or remove this line") from None
        one = row.get("answer_id") if isinstance(row, dict) else None
        if not isinstance(one, str) or not isinstance(row.get("answer"), str):
            raise InputError(f"{name} does not say which model answered; give another --out, or remove this file")
        if one.split("-")[0] != model_id:
            raise InputError(
                f"{name} is the answer of another model, or of this one with other options; give another --out, or "
                "remove this file"
            )
        if one not in wanted:
            raise InputError(
                f"{name} answers a row that {source} does not hold, or its image has changed; give another --out, or "
                "remove this line"
            )
        known[one] = row["answer"]
    cut_to_whole_lines(out)
    return known


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
    return model, processor, generation({name: getattr(options, name) for name in ("max_new_tokens", "temperature")})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m mllm.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run of instruct (or align), or a Hub id")
    parser.add_argument("question", nargs="?", default="", help="ask this and end; else a conversation")
    parser.add_argument("--image", default="", help="the image that it is about")
    parser.add_argument("--batch", type=Path, help="JSONL file of rows {image, question}")
    parser.add_argument("--image_root", type=Path, default=Path(), help="folder that the rows' paths start from")
    parser.add_argument("--out", type=Path, help="where the answers go, with --batch")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at a time (8)")
    add_model_options(parser)
    options = parser.parse_intermixed_args(argv)
    if bool(options.batch) != bool(options.out):
        raise InputError("--batch and --out go together: the questions' file, and where the answers go")

    if options.batch_size < 1:
        raise InputError(f"--batch_size is {options.batch_size}: give 1 or more questions at a time")
    if options.batch and (options.question or options.image):
        raise InputError("--batch takes its questions and images from the file; leave the others away")

    model, processor, asked = load_for_chat(options)
    if options.batch:
        answer_file(model, processor, options.batch, options.out, options.image_root, options.batch_size, asked)
    else:
        talk(model, processor, options.image, options.question, asked)


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
