"""The rows of a file as they stand in it, one at a time: JSON, JSON lines, parquet, and folders that `datasets` or the
Hub have made; captioned images as `diffclip.data.pairs` reads them. What the rows mean is told in `mllm.data.layouts`.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset

from diffclip.base import parquet
from diffclip.base.archives import TAR_SUFFIXES, UNPACKERS
from diffclip.base.errors import InputError
from diffclip.base.files import file_content, opened, read_array, read_json, read_jsonl
from diffclip.data.layout import split_named
from diffclip.data.pairs import BadSample, PairTable
from diffclip.data.shards import IMAGE_SUFFIXES
from diffclip.data.tables import saved
from mllm.literal import IMAGE

KINDS = "JSON, JSONL (also .gz), parquet, a folder that `datasets` saved, or captioned images: .tar, .csv, a folder"
OTHER_KINDS = (".zip", ".arrow", ".pkl", ".xlsx", ".txt")
PAIRS = (*TAR_SUFFIXES, ".csv", ".tsv")  # captioned images, as `diffclip.data.pairs` reads them
FAULT = "unreadable pair"  # under this a row says what is wrong with the pair that it is


def read_rows(path: str | Path, split: str = "") -> Iterator[dict]:
    """The rows of a file or folder, images in them still encoded; InputError for what holds none.

    A folder is one that `datasets.save_to_disk` wrote, or that holds parquet shards at any depth, as on the Hub.

    Args:
        split: which of several splits of a folder is read; "" is train of shards, while a saved DatasetDict of several
            has to be named, by this or as `PATH/train`. Splits that rows themselves name: see `of_split`.
    """
    path, split = Path(path), split_named(split) or split
    if path.is_dir():
        yield from _folder_rows(path, split)
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file; give {KINDS}")
    if path.name.lower().endswith(PAIRS):
        yield from _captioned(path, split)
        return
    with opened(path) as f:
        head = f.read(64)
    if head.startswith(b"PAR1") or path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if command := next((command for magic, command in UNPACKERS.items() if head.startswith(magic)), None):
        raise InputError(f"{path}: is compressed in a way that is not read: unpack it with {command}")
    if path.suffix.lower() in OTHER_KINDS:
        raise InputError(f"{path}: is no file of conversations; give {KINDS}")
    array = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    for number, row in enumerate(read_array(path) if array else _lines(path)):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is no JSON object; expected id, image and conversations")
        yield row


def of_split(row: dict, split: str = "") -> bool:
    """Whether a row is read where `split` is asked for, "" for train: it names that one in its `split`, or none."""
    named = split_named(row.get("split"))
    return named is None or named == (split_named(split or "train") or split)


def _lines(path: Path) -> Iterator[object]:
    """The values of JSON lines; a file that is one object of several lines is named as such."""
    with opened(path) as f:
        first = f.readline(1 << 16).removeprefix(b"\xef\xbb\xbf").strip()
    if first == b"{":
        value = read_json(path)
        raise InputError(
            f"{path}: is one JSON object ({', '.join(map(str, list(value)[:5]))}), no list of rows; write the rows as "
            "a JSON array, or one a line"
        )
    for _, row in read_jsonl(path):
        yield row


def _folder_rows(folder: Path, split: str) -> Iterator[dict]:
    if (folder / "dataset_dict.json").is_file():
        about = read_json(folder / "dataset_dict.json")
        names = [str(name) for name in about.get("splits", ())] if isinstance(about, dict) else []
        chosen = _chosen(folder, names, split, "") if split or len(names) == 1 else ""
        if not chosen:
            example = f"{folder / names[0]}, or set `split`" if names else f"a folder in {folder}"
            raise InputError(f"{folder}: holds the splits {', '.join(names) or 'none'}: name one, e.g. {example}")
        yield from _saved_rows(folder / chosen)
        return
    if (folder / "state.json").is_file() or (folder / "dataset_info.json").is_file():
        yield from _saved_rows(folder)
        return
    shards = sorted(p for p in folder.rglob("*.parquet") if not hidden(p.relative_to(folder)))
    if not shards and _holds_pairs(folder):
        yield from _captioned(folder, split)
        return
    if not shards:
        inside = sorted(p for p in folder.iterdir() if p.name.endswith((".json", ".jsonl", ".gz")))
        example = f"; name the files in it, e.g. {inside[0]}" if inside else f"; give {KINDS}"
        raise InputError(f"{folder}: is a folder without parquet files or a saved dataset{example}")
    splits = {shard: split_of(shard.relative_to(folder)) for shard in shards}
    chosen = _chosen(folder, sorted(set(splits.values())), split, "train")
    for shard in shards:
        if splits[shard] == chosen:
            yield from _parquet_rows(shard)


def _chosen(folder: Path, names: Sequence[str], split: str, preferred: str) -> str:
    """Which of a folder's splits is read: the named one, the preferred one, or the only one."""
    known = {split_named(name) or name: name for name in names}
    if len(known) == 1 and (not split or "" in known):
        return names[0]
    if (wanted := split or preferred) in known:
        return known[wanted]
    listed = ", ".join(name or "of no split" for name in names)
    raise InputError(
        f"{folder}: has no split {wanted}, but {listed}; set `split` to one that is there, or name its files"
    )


def hidden(path: Path) -> bool:
    """Whether a path leads through names with a dot in front, which file managers and caches write."""
    return any(part.startswith(".") for part in path.parts)


def split_of(shard: Path) -> str:
    """The split that a shard's name or folder says it belongs to, as the Hub names them, or ""."""
    start = re.split(r"[-_.]", shard.name)[0]
    return next(filter(None, map(split_named, (start, *reversed(shard.parts[:-1])))), "")


def _holds_pairs(folder: Path) -> bool:
    """Whether a folder holds tars or tables of pairs, or an image with a .txt beside it at any depth."""
    names = {path for path in folder.rglob("*") if path.suffix.lower() in (".txt", *IMAGE_SUFFIXES, *PAIRS)}
    return any(
        path.suffix.lower() in PAIRS
        or (path.suffix == ".txt" and any(path.with_suffix(image) in names for image in IMAGE_SUFFIXES))
        for path in names
    )


def _captioned(path: Path, split: str) -> Iterator[dict]:
    """A row for each caption of each image, whose encoded bytes it holds; those of no use say why under FAULT."""
    table = PairTable([str(path)], split=split)
    for key, reason in table.problems:
        yield {"id": key, FAULT: reason}
    for index in range(len(table)):
        try:
            image, captions = table.encoded(index)
            content = file_content(image) if isinstance(image, Path) else image
        except (BadSample, OSError) as error:
            yield {"id": table.key(index), FAULT: error.reason if isinstance(error, BadSample) else str(error)}
            continue
        for caption in captions:
            turns = [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption}]
            yield {"id": table.key(index), "image": {"bytes": content, "path": None}, "conversations": turns}


def _saved_rows(folder: Path) -> Iterator[dict]:
    table = saved(str(folder))
    if not isinstance(table, Dataset):
        raise InputError(f"{folder}: holds no rows but the splits {', '.join(table)}: name one, e.g. {folder}/train")
    if doubled := next((name for name in table.column_names if table.column_names.count(name) > 1), None):
        raise InputError(f"{folder}: has two columns of the name {doubled}; rename one")
    found = table.with_format("arrow").iter(64)
    while True:
        with parquet.readable(folder, "a folder that `datasets` saved"):
            batch = next(found, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        yield from map(_by_turns, rows)


def _parquet_rows(path: Path) -> Iterator[dict]:
    yield from map(_by_turns, parquet.rows(path))


def _by_turns(row: dict) -> dict:
    """A row of a table as JSON would have it: `Sequence` columns of `datasets` hold a list for each key of the turns,
    and some tables hold the turns as JSON text.
    """
    for key, value in row.items():
        if isinstance(value, str) and value.startswith("[{") and key in ("conversations", "messages", "texts"):
            try:
                row[key] = json.loads(value)
            except (ValueError, RecursionError):
                continue  # named by whoever asks for the turns
        elif isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
            lengths = {len(each) for each in value.values()}
            if len(lengths) == 1 and key in ("conversations", "messages", "texts", "image", "images"):
                row[key] = [dict(zip(value, turn)) for turn in zip(*value.values())]
    return row
