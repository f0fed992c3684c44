"""A tenth of the images of LLaVA files held out: the rest to train on, questions about them to ask and to score.

    python -m benchmarks.held_out split --captions data/llava/stage1_captions.json \
        --conversations data/llava/stage2_instruct.json --source fashion-attributes --some 800 --out llava
    diffclip chat RUN --batch llava/questions.jsonl --image_root data --out answers.jsonl
    python -m benchmarks.held_out score answers.jsonl

An image is held out by a digest of its path, so that it is in neither file, whatever their order. `split` writes

    captions.json        align: the captions of the other images
    some_captions.json   `--some` of them, to mix into instruct
    conversations.json   instruct: the conversations of the wanted source about the other images
    questions.jsonl      every turn about a held-out image, asked by itself: {image, question, truth}
    to_caption.jsonl     held-out captions: {image, question, truth}

`score` compares answers to the letter, by question, beside the share of the most frequent truth, which is what a model
that has only learnt the answers can reach.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from diffclip.base.commands import Parser
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.files import json_line, read_json, write_whole
from mllm.conversation import IMAGE
from mllm.data.files import read_rows

ONE_IN = 10


def held_out(image: str) -> bool:
    """Whether the image of this path is one of the tenth that no training sees."""
    return int(sha256(image.encode()).hexdigest(), 16) % ONE_IN == 0


def questions(rows: Iterable[dict]) -> list[dict[str, str]]:
    """Each question of LLaVA rows by itself, without its image mark."""
    asked = []
    for row in rows:
        turns = [turn["value"] for turn in row["conversations"]]
        for question, truth in zip(turns[::2], turns[1::2], strict=True):
            text = question.replace(IMAGE, "").strip()
            asked.append({"image": row["image"], "question": text, "truth": truth})
    return asked


def split(captions: Path, conversations: Path, source: str, some: int, out: Path, seed: int) -> None:
    """Write the five files; InputError for a file that is no list of LLaVA rows, or an unknown `source`."""
    captioned = _rows(captions)
    wanted = [row for row in _rows(conversations) if row.get("source") == source]
    if not wanted:
        raise InputError(f"{conversations}: no row of source `{source}`; --source names one")
    trained = [row for row in captioned if not held_out(row["image"])]
    if some > len(trained):
        raise InputError(f"{captions}: {len(trained):,} captions are not held out; --some {some:,} is more")
    written = {
        "captions.json": trained,
        "some_captions.json": random.Random(seed).sample(trained, some),
        "conversations.json": [row for row in wanted if not held_out(row["image"])],
        "questions.jsonl": questions(row for row in wanted if held_out(row["image"])),
        "to_caption.jsonl": questions(row for row in captioned if held_out(row["image"])),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in written.items():
        lines = "".join(map(json_line, rows))
        write_whole(out / name, lines if name.endswith("l") else json.dumps(rows, ensure_ascii=False))
        print(f"{out / name}: {len(rows):,} rows, {len({row['image'] for row in rows}):,} images")


def _rows(path: Path) -> list[dict]:
    rows = read_json(path)
    try:
        bad = [i for i, row in enumerate(rows) if not {"image", "conversations"} <= row.keys()]
    except (AttributeError, TypeError) as error:
        raise InputError(f"{path}: no JSON list of LLaVA rows ({type(error).__name__}: {error})") from None
    if bad:
        raise InputError(
            f"{path}: row {bad[0]} has no image or no conversations; an image can only be held out by name"
        )
    return rows


def kind(question: str) -> str:
    """A question's first line without what stands in quotation marks: the name it is counted under."""
    return re.sub(r'"[^"]*"', '"…"', question.splitlines()[0])


def score(rows: list[dict]) -> dict[str, tuple[int, float, float]]:
    """By kind of question: how many, the share answered to the letter, the share of the most frequent truth."""
    by_kind: dict[str, list[dict]] = {}
    for row in rows:
        by_kind.setdefault(kind(row["question"]), []).append(row)
    return {
        name: (
            len(some),
            sum(row["answer"].strip() == row["truth"].strip() for row in some) / len(some),
            Counter(row["truth"].strip() for row in some).most_common(1)[0][1] / len(some),
        )
        for name, some in by_kind.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.held_out", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_split = commands.add_parser("split")
    to_split.add_argument("--captions", type=Path, required=True, help="LLaVA file for align")
    to_split.add_argument("--conversations", type=Path, required=True, help="LLaVA rows for instruct, with a source")
    to_split.add_argument("--source", required=True, help="the conversations that are wanted")
    to_split.add_argument("--some", type=int, default=800, help="captions mixed into instruct (800)")
    to_split.add_argument("--seed", type=int, default=0)
    to_split.add_argument("--out", type=Path, required=True, help="folder to write")
    to_score = commands.add_parser("score")
    to_score.add_argument("answers", type=Path, help="what mllm.chat --batch wrote")
    options = parser.parse_args(argv)
    if options.command == "split":
        split(options.captions, options.conversations, options.source, options.some, options.out, options.seed)
        return
    for name, (asked, right, frequent) in score(list(read_rows(options.answers))).items():
        print(f"{name} ({asked:,}): {right:.1%} to the letter, the most frequent answer {frequent:.1%}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
