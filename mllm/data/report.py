"""What `diffclip check` and `stats` print about rows of conversations."""

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoProcessor, AutoTokenizer

from diffclip.base.errors import InputError
from diffclip.base.files import write_json
from mllm.conversation import IGNORE, control_tokens, encode, render
from mllm.data.examples import image_tokens
from mllm.data.images import ImagePlace
from mllm.data.rows import Rows, examine, load_rows
from mllm.weights import from_pretrained


def check(options: argparse.Namespace) -> int:
    """Print every fault of every row, images decoded once each; returns 0 without faults, else 2."""
    faults: list[str] = []
    seen: dict[ImagePlace, str] = {}  # image -> the first row that shows it
    rows, inside = 0, 0  # `inside`: images that rows hold themselves, decoded at once so as not to keep them
    examined = examine(options.files, options.image_root, **row_settings(options))
    for key, _, places, problem in tqdm(examined, unit="row", disable=None):
        rows += 1
        if problem:
            faults.append(f"{key}: {problem}")
        for _, place in places:
            if place and place.content is not None:
                inside += 1
                faults += filter(None, [broken(place, key)])
            elif place:
                seen.setdefault(place, key)
    with ThreadPoolExecutor(8) as pool:
        problems = pool.map(broken, seen, seen.values())
        faults += filter(None, tqdm(problems, total=len(seen), unit="image", disable=None))
    if options.model and not faults:
        checked = load_rows(options.files, options.image_root, **row_settings(options))
        lengths, supervised = tokens(options, checked)
        for number in np.flatnonzero((lengths > options.max_length) | (supervised == 0)):
            what = f"{lengths[number]} tokens, more than max_length {options.max_length}"
            faults.append(f"{checked[int(number)].key}: {what if supervised[number] else 'no supervised token'}")
    for fault in faults:
        print(fault)
    print(f"{rows:,} rows, {len(seen) + inside:,} images: {f'{len(faults):,} faults' if faults else 'no fault found'}")
    return 2 if faults else 0


def row_settings(options: argparse.Namespace) -> dict[str, Any]:
    """How rows are examined: the control tokens are those of the model, where one is given."""
    settings: dict[str, Any] = {"image_prefix": options.image_prefix, "template": options.template}
    if options.model:
        settings["control"] = control_tokens(from_pretrained(AutoTokenizer, options.model))
    return settings


def broken(place: ImagePlace, key: str) -> str:
    """Why the image that row `key` shows cannot be decoded, or ""."""
    try:
        place.open(key)
    except InputError as error:
        return str(error)
    return ""


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
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=False)
    image_length = image_tokens(processor)
    counts = []
    for conversation in chain.from_iterable(conversations for conversations, _ in rows.texts()):
        segments = render(conversation, options.template, end_token=processor.tokenizer.eos_token)
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
        print(f"{name}: {value}")
    if options.output_dir:
        out = Path(options.output_dir)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "stats.json", counts)
        if options.model:
            plot_lengths(lengths, supervised, out / "lengths.png")
        print(f"wrote {out}")
    return 0


def print_histogram(lengths: np.ndarray) -> None:
    """A histogram on the console."""
    counts, edges = np.histogram(lengths, bins=min(12, max(1, int(np.ptp(lengths)))))
    print("tokens a row")
    for count, low, high in zip(counts, edges, edges[1:]):
        print(f"{int(low):>6d} - {int(high):<6d} {'#' * round(50 * count / counts.max()):50s} {count:,}")


def plot_lengths(lengths: np.ndarray, supervised: np.ndarray, path: Path) -> None:
    """Histograms of all and of the supervised tokens a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    for axis, values, name in zip(axes, (lengths, supervised), ("all tokens", "supervised tokens")):
        axis.hist(values, bins=40, color="#0072b2")
        axis.set(xlabel=f"{name} a row", ylabel="rows")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
