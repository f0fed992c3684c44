"""Find the faults of image-text pairs before any training: every pair is read as training reads it.

diffclip check 'pairs/*.tar' more_pairs.csv
diffclip check pairs.parquet --caption_column title --some 10000 --model DiffCLIP-B-16 --json
"""

import array
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import diffclip
from diffclip.base.commands import Parser, number
from diffclip.base.console import print_table
from diffclip.base.files import file_content
from diffclip.base.images import BROKEN, decode
from diffclip.base.lines import print_line
from diffclip.base.threads import cores
from diffclip.data.layout import Layout
from diffclip.data.pairs import BadSample, PairTable

AT_ONCE = 1024  # pairs that are being read; more would only wait in memory
EXAMPLES = 5  # of each kind of doubtful caption
NO_FAULT = {  # what is learnt as it stands, but seldom what somebody wanted to teach
    "replacement characters": re.compile("\ufffd"),
    "UTF-8 read as another encoding": re.compile("Ã[\u0080-\u00bf]|â[\u0080\u20ac]|Â[\u0080-\u00bf]|ï»¿"),
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "HTML": re.compile(r"</?[a-zA-Z][^<>]*>|&(?:amp|quot|lt|gt|nbsp|apos|#\d+|#x[0-9a-fA-F]+);"),
    "only a web address": re.compile(r"\s*(?:https?://|www\.)\S+\s*\Z", re.IGNORECASE),
    "only a file name": re.compile(r"\s*\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?)\s*\Z", re.IGNORECASE),
    "without a letter": re.compile(r"[\W\d_]*\Z"),
    "a list written as text": re.compile(r"\s*\[\s*['\"].*\]\s*\Z", re.DOTALL),
}
HELP = {
    "image_member": "suffixes of images in shards and folders",
    "caption_member": "suffixes of captions in them",
    "image_column": "of tables",
    "caption_column": "of tables, and key of a json",
    "separator": "of .csv and .tsv: , ; | or tab",
    "encoding": "of .csv, .tsv and .txt",
    "image_root": "folder that paths in tables start from",
    "split": "where a source holds several",
}


class Seen(NamedTuple):
    """What one pair turned out to be; `problem` is why training would leave it out, or ""."""

    key: str
    problem: str
    width: int = 0
    height: int = 0
    size: int = 0  # bytes of the encoded image
    digest: int = 0  # of these
    captions: Sequence[str] = ()


@dataclass
class Found:
    """What a check finds; numbers of a pair or a caption each, in arrays."""

    pairs: int
    examined: int
    faults: list[tuple[str, str]]
    notices: list[tuple[str, str]]
    widths: array.array = field(default_factory=lambda: array.array("L"))
    heights: array.array = field(default_factory=lambda: array.array("L"))
    sizes: array.array = field(default_factory=lambda: array.array("Q"))
    images: array.array = field(default_factory=lambda: array.array("Q"))  # digests
    characters: array.array = field(default_factory=lambda: array.array("L"))
    captions: array.array = field(default_factory=lambda: array.array("Q"))  # digests
    cut: int = 0  # captions that leave no room in the tokenizer's context
    doubtful: dict[str, tuple[int, list[str]]] = field(default_factory=dict)  # kind -> number, keys of the first

    def add(self, pair: Seen, full: Callable[[str], bool] | None) -> None:
        """Count a pair in."""
        if pair.problem:
            self.faults.append((pair.key, pair.problem))
            return
        self.widths.append(pair.width)
        self.heights.append(pair.height)
        self.sizes.append(pair.size)
        self.images.append(pair.digest)
        for caption in pair.captions:
            self.characters.append(len(caption))
            self.captions.append(digest_of(caption.encode()))
            self.cut += full is not None and full(caption)
            for kind in (kind for kind, pattern in NO_FAULT.items() if is_doubtful(pattern, caption)):
                count, keys = self.doubtful.get(kind, (0, []))
                self.doubtful[kind] = (count + 1, keys if len(keys) == EXAMPLES else [*keys, pair.key])


def is_doubtful(pattern: re.Pattern, caption: str) -> bool:
    """Whether a caption is, or holds, what the pattern describes."""
    whole = pattern.pattern.endswith(r"\Z")
    return bool(pattern.match(caption) if whole else pattern.search(caption))


def digest_of(content: bytes) -> int:
    """64 bits by which equal contents are known."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def look_at(table: PairTable, row: int) -> Seen:
    """Read and decode one pair."""
    try:
        image, captions = table.encoded(row)
    except BadSample as error:
        return Seen(error.key, error.reason)
    key = table.key(row)
    try:
        content = image if isinstance(image, bytes) else file_content(image)
        width, height = decode(content).size
    except BROKEN as error:
        return Seen(key, str(error) or type(error).__name__)
    return Seen(key, "", width, height, len(content), digest_of(content), captions)


def examine(table: PairTable, rows: Sequence[int]) -> Iterator[Seen]:
    """`look_at` of these rows in their order, several at once, with a progress bar."""
    with (
        ThreadPoolExecutor(min(16, cores() + 1)) as pool,
        tqdm(total=len(rows), unit="pair", delay=2, disable=None) as bar,
    ):
        for start in range(0, len(rows), AT_ONCE):
            for pair in pool.map(lambda row: look_at(table, row), rows[start : start + AT_ONCE]):
                bar.update()
                yield pair


def unreadable(table: PairTable) -> Iterator[tuple[str, str]]:
    """(key, reason) of every pair that cannot be read, images decoded."""
    return ((pair.key, pair.problem) for pair in examine(table, range(len(table))) if pair.problem)


def check(table: PairTable, some: int = 0, tokenizer: Callable[[list[str]], Any] | None = None) -> Found:
    """Examine all pairs of a table, or `some` drawn at random.

    Args:
        tokenizer: of a model, as `diffclip.load` gives it: counts the captions that fill its context.
    """
    rows: Sequence[int] = range(len(table))
    if 0 < some < len(table):
        rows = sorted(np.random.default_rng(0).choice(len(table), some, replace=False).tolist())
    found = Found(len(table), len(rows), [*table.problems], [*table.notices])
    context = tokenizer(["a"]).shape[1] if tokenizer else 0

    def full(caption: str) -> bool:
        if tokenizer is None or len(caption) < context - 2:  # a token has a character or more
            return False
        one, longer = tokenizer([caption, f"{caption} and"])
        return bool((one == longer).all())

    for pair in examine(table, rows):
        found.add(pair, full if tokenizer else None)
    return found


def numbers(values: array.array) -> dict[str, int]:
    """Smallest, median, 95 % and largest value."""
    if not values:
        return {}
    low, middle, most, high = np.quantile(np.asarray(values), (0, 0.5, 0.95, 1), method="lower").tolist()
    return {"smallest": low, "median": middle, "95 %": most, "largest": high}


def doubles(digests: array.array) -> int:
    """How many of them are there a second time or more."""
    return len(digests) - len(np.unique(np.asarray(digests)))


def summary(found: Found, context: int) -> dict[str, Any]:
    """The whole result as plain values, for JSON."""
    images, captions = len(found.images), len(found.captions)
    return {
        "pairs": found.pairs,
        "examined": found.examined,
        "readable": images,
        "captions": captions,
        "width": numbers(found.widths),
        "height": numbers(found.heights),
        "bytes": numbers(found.sizes),
        "caption_characters": numbers(found.characters),
        "doubled_images": doubles(found.images) if images else 0,
        "doubled_captions": doubles(found.captions) if captions else 0,
        **({"context": context, "captions_that_fill_it": found.cut} if context else {}),
        "doubtful_captions": {k: {"count": n, "examples": keys} for k, (n, keys) in found.doubtful.items()},
        "notices": [{"key": key, "reason": reason} for key, reason in found.notices],
        "faults": [{"key": key, "reason": reason} for key, reason in found.faults],
    }


def print_found(result: dict[str, Any]) -> None:
    """A table, what was read in one way of several, doubtful captions, and every fault on a line of its own."""
    counted = result["examined"]
    share = f", {counted:,} of them drawn at random and examined" if counted < result["pairs"] else ""

    def part(count: int, of: int) -> str:
        return f"{count:,} ({100 * count / of:.1f} %)" if of else "0"

    spread = {
        "image width, pixels": result["width"],
        "image height, pixels": result["height"],
        "image size, bytes": result["bytes"],
        "caption length, characters": result["caption_characters"],
    }
    rows = [(name, *(f"{value:,}" for value in values.values())) for name, values in spread.items() if values]
    print_table(("", "smallest", "median", "95 %", "largest"), rows, f"{result['pairs']:,} pairs{share}")
    captions = result["captions"]
    print_line(f"{captions:,} captions; doubled: images {part(result['doubled_images'], result['readable'])}, captions "
          f"{part(result['doubled_captions'], captions)}")  # fmt: skip
    if "context" in result:
        print_line(f"captions that fill the {result['context']} tokens, of which longer ones are cut: "
              f"{part(result['captions_that_fill_it'], captions)}")  # fmt: skip
    for kind, entry in result["doubtful_captions"].items():
        print_line(f"captions, {kind}: {part(entry['count'], captions)}, e.g. {', '.join(entry['examples'][:2])}")
    for notice in result["notices"]:
        print_line(f"notice: {notice['key']}: {notice['reason']}")
    for fault in result["faults"]:
        print_line(f"{fault['key']}: {fault['reason']}")
    faults = len(result["faults"])
    print_line(f"{counted:,} pairs examined: {f'{faults:,} faults' if faults else 'no fault found'}")


def main(argv: list[str] | None = None) -> int:
    """Print what the pairs are and every fault; returns 2 if there is one, else 0."""
    parser = Parser("diffclip check", description=__doc__)
    parser.add_argument("sources", nargs="+", help="pairs in any form that train_data takes")
    parser.add_argument("--pairs", action="store_true", help="they are pairs, where a file could be conversations")
    parser.add_argument("--some", type=number(int, 1), default=0, metavar="N", help="examine N pairs drawn at random")
    parser.add_argument("--model", default="", help="a model's name, run or file: whose tokenizer cuts captions")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    for setting in fields(Layout):
        if setting.name in HELP:
            several = isinstance(setting.default, tuple)
            parser.add_argument(
                f"--{setting.name}", default=setting.default, help=HELP[setting.name], nargs="+" if several else None
            )
    options = parser.parse_args(argv)
    table = PairTable(options.sources, **{name: getattr(options, name) for name in HELP})
    tokenizer = None
    if options.model in diffclip.MODELS:
        tokenizer = diffclip.tokenizer(diffclip.MODELS[options.model])
    elif options.model:
        tokenizer = diffclip.load(options.model)[2]
    found = check(table, options.some, tokenizer)
    result = summary(found, tokenizer(["a"]).shape[1] if tokenizer else 0)
    if options.json:
        print_line(json.dumps(result, ensure_ascii=True, indent=1), keep="\n")
    else:
        print_found(result)
    return 2 if found.faults else 0
