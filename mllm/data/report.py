"""What `diffclip check` and `stats` print about rows of conversations."""

import argparse
import json
import math
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaProcessor

from diffclip.base.errors import InputError
from diffclip.base.files import write_json
from diffclip.base.lines import print_line
from diffclip.weights import from_pretrained
from mllm.conversation import AUTO, IGNORE, encode, render
from mllm.data.judge import image_problems, length_problems, token_lengths
from mllm.data.rows import Rows, load_rows
from mllm.literal import control_tokens
from mllm.own_template import own_template
from mllm.processing import image_tokens


def check(options: argparse.Namespace) -> int:
    """Print every fault of every row, images decoded once each; returns 0 without faults, else 2."""
    rows = load_rows(options.files, options.image_root, **row_settings(options), max_bad_share=math.inf, fresh=True)
    total = len(rows) + len(rows.problems)
    problems = image_problems(rows, fresh=True)
    result: dict[str, Any] = {"rows": total, "readable": 0, "images": images_of(rows)}
    if options.model:
        processor, positions = processor_of(options.model)
        settings: dict[str, Any] = {"template": template_of(options), "max_length": options.max_length}
        problems = length_problems(rows, processor, **settings, positions=positions) | problems
        lengths = token_lengths(rows, processor.tokenizer, image_tokens(processor), settings["template"])
        longer = int((lengths > options.max_length).sum())
        result |= {"tokens": spread(lengths), "max_length": options.max_length, "longer_than_max_length": longer}
    rows = rows.without(problems)
    result |= {"readable": len(rows), "faults": [{"key": key, "reason": reason} for key, reason in rows.problems]}
    if options.json:
        print_line(json.dumps(result, indent=1), keep="\n")
    else:
        print_check(result)
    return 2 if rows.problems else 0


def print_check(result: dict[str, Any]) -> None:
    """Every fault on a line of its own, what `max_length` cuts, and the counts."""
    for fault in result["faults"]:
        print_line(f"{fault['key']}: {fault['reason']}")
    if longer := result.get("longer_than_max_length"):
        print_line(f"{longer:,} rows are longer than max_length {result['max_length']}, which cuts their ends off")
    faults = len(result["faults"])
    counts = f"{result['rows']:,} rows, {result['images']:,} images"
    print_line(f"{counts}: {f'{faults:,} faults' if faults else 'no fault found'}")


def images_of(rows: Rows) -> int:
    """How many images rows show: files once each, and those that rows hold themselves."""
    columns = rows.table.select_columns(["images", "contents"])
    files, inside = set[str](), 0
    for batch in (columns[rows.positions[first : first + 256]] for first in range(0, len(rows), 256)):
        for names, contents in zip(batch["images"], batch["contents"]):
            inside += sum(content is not None for content in contents)
            files.update(name for name, content in zip(names, contents) if content is None)
    return len(files) + inside


def processor_of(model: str) -> tuple[LlavaProcessor, int | None]:
    """The processor of a run, and how many positions its language model has, None where there is no limit."""
    config = from_pretrained(AutoConfig, model)
    processor = from_pretrained(AutoProcessor, model)
    return processor, getattr(config.get_text_config(), "max_position_embeddings", None)


def spread(values: np.ndarray) -> dict[str, int]:
    """Smallest, median, 95 % and largest value."""
    if not len(values):
        return {}
    return dict(
        zip(("smallest", "median", "95 %", "largest"), np.quantile(values, (0, 0.5, 0.95, 1), method="lower").tolist())
    )


def row_settings(options: argparse.Namespace) -> dict[str, Any]:
    """How rows are judged: the control tokens are those of the model, where one is given."""
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("image_prefix", "split")}
    if options.model:
        settings["control"] = control_tokens(from_pretrained(AutoTokenizer, options.model))
    return {**settings, "template": template_of(options)}


def template_of(options: argparse.Namespace) -> str:
    """The template as `render` takes it; InputError for the one of a model's own without a model."""
    if options.template != AUTO:
        return options.template
    if not options.model:
        raise InputError("--template auto is a model's own: give the run as --model, or another --template")
    return own_template(from_pretrained(AutoTokenizer, options.model))


def kind(answer: str) -> str:
    """yes, no, number, one word, short (up to five words) or long."""
    words = answer.strip().rstrip(".").lower().split()
    if not words:
        return "empty"
    if words[0].strip(",.") in ("yes", "no"):
        return words[0].strip(",.")
    if len(words) == 1:
        return "number" if words[0].isdecimal() else "one word"
    return "short" if len(words) <= 5 else "long"


def describe(rows: Rows) -> dict:
    """Counts of rows, images, turns and kinds of answers; shares in percent."""
    kinds, common, images = Counter[str](), Counter[str](), list[int]()
    for conversations, counts in rows.texts():
        images += counts
        for conversation in conversations:
            answers = [turn["value"] for turn in conversation if turn["from"] == "gpt"]
            kinds.update(map(kind, answers))
            common.update(answer.strip() for answer in answers)
    total = sum(kinds.values())
    binary = kinds["yes"] + kinds["no"]
    return {
        "rows": len(rows),
        "rows with no image, one, more": [images.count(0), images.count(1), sum(n > 1 for n in images)],
        "answers": total,
        "answers a row": round(total / len(rows), 2),
        "kinds of answers, %": {name: round(100 * n / total, 1) for name, n in kinds.most_common()},
        "yes among yes and no, %": round(100 * kinds["yes"] / binary, 1) if binary else None,
        "most common answers": common.most_common(5),
    }


def tokens(options: argparse.Namespace, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row, and how many of them are supervised, (rows,) int64 each; nothing is cut."""
    processor, _ = processor_of(options.model)
    image_length, template = image_tokens(processor), template_of(options)
    counts = []
    for conversation in chain.from_iterable(conversations for conversations, _ in rows.texts()):
        segments = render(conversation, template, end_token=processor.tokenizer.eos_token)
        labels = encode(segments, processor.tokenizer, image_length)["labels"]
        counts.append((len(labels), sum(label != IGNORE for label in labels)))
    lengths, supervised = np.array(counts).T
    return lengths, supervised


def stats(options: argparse.Namespace) -> int:
    """Print `describe`, with --model also tokens; with --output_dir write them as JSON, and the lengths as an image."""
    rows = load_rows(options.files, options.image_root, **row_settings(options))
    counts = describe(rows)
    if options.model:
        lengths, supervised = tokens(options, rows)
        counts |= {
            "tokens a row: median, 95 %, longest": [int(np.quantile(lengths, q)) for q in (0.5, 0.95, 1)],
            "supervised tokens, %": round(100 * float(supervised.sum() / lengths.sum()), 1),
            "rows without a supervised token": int((supervised == 0).sum()),
            f"rows longer than {options.max_length}": int((lengths > options.max_length).sum()),
        }
        print_histogram(lengths)
    for name, value in counts.items():
        print_line(f"{name}: {value}")
    if options.output_dir:
        out = Path(options.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "stats.json", counts)
        if options.model:
            plot_lengths(lengths, supervised, out / "lengths.png")
        print_line(f"wrote {out}")
    return 0


def print_histogram(lengths: np.ndarray) -> None:
    """A histogram on the console."""
    counts, edges = np.histogram(lengths, bins=min(12, max(1, int(np.ptp(lengths)))))
    print_line("tokens a row")
    for count, low, high in zip(counts, edges, edges[1:]):
        print_line(f"{int(low):>6d} - {int(high):<6d} {'#' * round(50 * count / counts.max()):50s} {count:,}")


def plot_lengths(lengths: np.ndarray, supervised: np.ndarray, path: Path) -> None:
    """Histograms of all and of the supervised tokens a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, values, name in zip(axes, (lengths, supervised), ("all tokens", "supervised tokens")):
        axis.hist(values, bins=40, color="#0072b2")
        axis.set(xlabel=f"{name} a row", ylabel="rows")
    figure.savefig(path, dpi=150)
