"""Retrieval sets: images with their captions, from shards, parquet, JSON or tables."""

import ast
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from diffclip.base.errors import InputError
from diffclip.base.files import read_json, read_jsonl, read_text
from diffclip.benchmarks.images import (
    Images,
    TarSlice,
    row_splits,
    shard_samples,
    split_named,
    split_within,
    table_rows,
    table_schema,
    two_columns,
    visible,
)
from diffclip.benchmarks.sheets import read_sheet
from diffclip.data.captions import caption_lines, texts

CAPTION_COLUMNS = ("caption", "captions", "text", "raw", "sentences", "comment", "title")
IMAGE_NAMES = ("image", "image_name", "filename", "file_name", "filepath", "file", "image_path")
ONE_OF_SEVERAL = re.compile(r"(?:caption|sentence|text|comment)[ _]?\d+")  # caption_0, caption_1, ...
TOKEN = re.compile(r"(\S.*)#\d+\t(.*)")  # Flickr's 1000092795.jpg#0<tab>Two young guys ...


class Captioned(NamedTuple):
    """A retrieval set: images, all captions, and for each caption the row of its image."""

    images: Images
    captions: list[str]
    owner: list[int]


# name for messages, image, captions, and the split that the file gives the row
Rows = Iterable[tuple[str, Path | TarSlice | bytes, list[str], str | None]]
Entry = tuple[str, Any, str | None]  # the name of an image file, captions, split


def read_captioned(path: Path) -> Captioned:
    """Read the test rows of a retrieval set in any of the usual forms.

    `path` is a folder of these files, or one of them: webdataset shards (KEY.png + KEY.txt with one caption a line, as
    clip-benchmark has them); parquet with image and caption columns (or caption_0, caption_1, ...); JSON beside its
    images, as Karpathy's ({"images": [{"filename", "sentences": [{"raw"}]}]}), COCO's ({"images", "annotations"}), a
    list of {"image", "caption"} as BLIP's, or {"file": ["caption", ...]}; JSON lines of {"file_name", "text"}; a table
    (Flickr30k's results.csv) of image and caption; or Flickr's lines of `image#0<tab>caption`. Rows about one image
    are put together. Splits are told by a column or key `split`, by words in files' names (train-..., captions_val2017,
    coco_karpathy_test), and by lists of images as Flickr_8k.testImages.txt.

    InputError: none of these, an image without a caption, or several splits and none of them test.
    """
    if path.is_dir():
        places = [folder for folder in (path, path / "test", path / "data", path / "annotations") if folder.is_dir()]
        found = (_caption_files(place, suffix) for suffix in READERS for place in places)
        files = next((files for files in found if files), [])
        if not files:
            raise InputError(f"{path} holds no .tar, .parquet or .json (or .csv, .tsv, .txt) file with captions")
    elif path.is_file():
        files = [path]
        if path.suffix.lower() not in READERS:
            raise InputError(f"{path} is not a .tar, .parquet or .json (or .csv, .tsv, .txt) file with captions")
    else:
        raise InputError(f"{path} does not exist: give shards, a parquet file or a captions file")
    of_file = {file: split_within(file) for file in files}
    wanted = _test_split(of_file.values(), path)
    rows = [row for file in files if of_file[file] == wanted for row in READERS[file.suffix.lower()](file)]
    wanted = _test_split([split for *_, split in rows], path)
    images: dict[Path | TarSlice | bytes, tuple[str, list[str]]] = {}
    for name, source, said, split in rows:
        if split == wanted:  # an empty caption is no query
            images.setdefault(source, (name, []))[1].extend(text.strip() for text in said if text.strip())
    if not images:
        raise InputError(f"{path} holds no images with captions")
    for name, said in images.values():
        if not said:
            raise InputError(f"{name} has no caption: each image of a retrieval set needs at least one")
    captions = [text for _, said in images.values() for text in said]
    owner = [row for row, (_, said) in enumerate(images.values()) for _ in said]
    return Captioned(Images([name for name, _ in images.values()], list(images)), captions, owner)


def _caption_files(folder: Path, suffix: str) -> list[Path]:
    """A folder's files of this kind that hold captions: not COCO's boxes beside them, nor any other text."""
    files = [path for path in visible(folder.iterdir()) if path.suffix.lower() == suffix and path.is_file()]
    if suffix == ".txt":
        return [path for path in files if _first_line_is_captions(path)]
    return [path for path in files if suffix == ".json" and path.name.lower().startswith("captions_")] or files


def _first_line(path: Path) -> str:
    with open(path, "rb") as file:
        return file.readline(10_000).decode("utf-8", "replace").strip("\ufeff\r\n")


def _first_line_is_captions(path: Path) -> bool:
    line = _first_line(path)
    names = {name.strip().lower() for name in re.split(r"[|\t;,]", line)}
    return bool(TOKEN.fullmatch(line) or (names & {*IMAGE_NAMES} and names & {*CAPTION_COLUMNS}))


def _test_split(splits: Iterable[str | None], path: Path) -> str | None:
    """Test where it is among them, or the only one that there is."""
    names = set(splits)
    if len(names) > 1 and "test" not in names:
        listed = ", ".join(sorted(map(str, names)))
        raise InputError(f"{path} has the splits {listed} and no test: keep the one to score, or name its file")
    return "test" if "test" in names else next(iter(names), None)


def _split(value: Any, where: str) -> str | None:
    """The split that a row names; InputError for a word that is none."""
    if value is None or not str(value).strip():
        return None
    if not (split := split_named(value)):
        raise InputError(f"{where}: its split {str(value)[:40]!r} is none: write train, val or test")
    return split


def _texts(value: Any, name: str) -> list[str]:
    """Captions as they are stored: one, or a list; null is none."""
    try:
        return texts(value)
    except UnicodeDecodeError:
        raise InputError(f"{name}: a caption is not UTF-8: write it again") from None


def _tar(path: Path) -> Rows:
    for key, image, text in shard_samples(path, ".txt"):
        if image is None:
            raise InputError(f"{path}: {key}.txt has no image beside it")
        try:
            yield f"{path}:{key}", image, caption_lines(str(text or b"", "utf-8-sig")), None
        except UnicodeDecodeError:
            raise InputError(f"{path}: {key}.txt is not UTF-8: write it again") from None


def _parquet(path: Path) -> Rows:
    splits = row_splits(path)
    wanted = [split == "test" or "test" not in splits for split in splits]
    names = table_schema(path).names
    several = [name for name in names if ONE_OF_SEVERAL.fullmatch(name)] if not {*CAPTION_COLUMNS} & {*names} else []
    for name, image, said, number in table_rows(path, CAPTION_COLUMNS, wanted, several):
        yield name, image, _texts(said, name), splits[number]


def _table(path: Path) -> Rows:
    """Rows of image and captions; those of results.csv of Flickr30k, parted by |, are not quoted."""
    if TOKEN.fullmatch(_first_line(path)):
        return _beside(path, list(_tokens(path)))
    (_, header), *rows = [*read_sheet(path)] or [(1, [])]
    columns = [column.lower() for column in header]
    several = [place for place, name in enumerate(columns) if ONE_OF_SEVERAL.fullmatch(name)]
    if several and not {*CAPTION_COLUMNS} & {*columns}:
        image, places = columns.index(two_columns(path, columns, [columns[several[0]]], IMAGE_NAMES)[0]), several
    else:
        image, text = map(columns.index, two_columns(path, columns, CAPTION_COLUMNS, IMAGE_NAMES))
        places = [text]
    split = columns.index("split") if "split" in columns else None
    entries: list[Entry] = []
    for line, row in rows:
        if len(columns) == 3 and len(row) == 2 and (both := re.fullmatch(r"(\d+)\s+(.+)", row[1])):
            row = [row[0], *both.groups()]  # the published results.csv lacks a separator in one row
        if len(row) < len(columns) or not row[image]:
            raise InputError(f"{path} line {line}: lacks its image or its caption: write it, or remove the line")
        captions = [caption for place in places for caption in _cell(row[place])]
        own = _split(row[split], f"{path} line {line}") if split is not None else None
        entries.append((row[image], captions, own))
    return _beside(path, entries)


def _cell(text: str) -> list[str]:
    """The captions of a cell: one, or a list of them as JSON or Python writes it."""
    if re.fullmatch(r"""\[\s*["'].*["']\s*\]""", text, re.DOTALL):
        with suppress(ValueError, SyntaxError):
            values = ast.literal_eval(text)
            if all(isinstance(value, str) for value in values):
                return values
    return [text]


def _tokens(path: Path) -> Iterator[Entry]:
    """Flickr's lines of image, number and caption."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            if not (found := TOKEN.fullmatch(line.rstrip("\r"))):
                raise InputError(f"{path} line {number}: is not image#number, a tab and a caption: {line[:80]!r}")
            yield found[1], [found[2]], None


def _json(path: Path) -> Rows:
    data = read_json(path, unique=True)
    entries: list[Entry] = []
    try:
        if isinstance(data, dict) and isinstance(data.get("annotations"), list):  # COCO
            said: dict[Any, list] = {image["id"]: [] for image in data["images"]}
            if len(said) < len(data["images"]):
                raise InputError(f"{path}: two images have one id: give each its own")
            for annotation in data["annotations"]:
                if annotation["image_id"] not in said:
                    raise InputError(f"{path}: has a caption of image {annotation['image_id']}, which it does not list")
                said[annotation["image_id"]].append(annotation["caption"])
            entries = [(image["file_name"], said[image["id"]], None) for image in data["images"]]
        elif isinstance(data, dict) and isinstance(data.get("images"), list):  # Karpathy: all splits together
            for row in data["images"]:
                file = os.path.join(row.get("filepath") or "", row["filename"])
                entries.append((file, row["sentences"], _split(row.get("split"), f"{path}: {file}")))
        elif isinstance(data, list):
            entries = [_entry(row, f"{path}: entry {number}") for number, row in enumerate(data)]
        elif isinstance(data, dict) and all(isinstance(said, list | str) for said in data.values()):
            entries = [(name, said, None) for name, said in data.items()]
        else:
            raise InputError(f"{path} needs the form {{images: [...]}}, [{{image, caption}}] or {{file: [captions]}}")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: an entry lacks its image or its captions ({error})") from None
    return _beside(path, entries)


def _json_lines(path: Path) -> Rows:
    return _beside(path, [_entry(row, f"{path}:{number}") for number, row in read_jsonl(path)])


def _entry(row: Any, where: str) -> Entry:
    """One row of JSON that names its image and has its captions."""
    names = row if isinstance(row, dict) else {}
    image = next((names[name] for name in IMAGE_NAMES if name in names), None)
    captions = next((names[name] for name in ("captions", *CAPTION_COLUMNS) if name in names), None)
    if not isinstance(image, str) or captions is None:
        raise InputError(f"{where}: lacks its image or its captions: write {{image, caption}}")
    return image, captions, _split(names.get("split"), where)


def _beside(path: Path, entries: Sequence[Entry]) -> Rows:
    """Find the images of a captions file: as they are named from its folder, or in one of the folders beside it.

    Images that the file gives no split get that of the lists beside it, if there are any.
    """
    if lists := _split_lists(path) if not any(split for *_, split in entries) else {}:
        entries = [(name, said, lists.get(os.path.basename(name))) for name, said, _ in entries]
    wanted = _test_split([split for *_, split in entries], path)
    home = path.parent
    usual = (home, home / "images", home / path.stem.rsplit("_", 1)[-1])
    around = (home, home.parent) if home.name in ("annotations", "data") else (home,)
    others = [folder for place in around for folder in (place, *visible(place.iterdir())) if folder.is_dir()]
    for name, said, split in entries:
        if split != wanted:
            continue  # the others' images need not be there
        parts = Path(str(name)).parts
        file = next((folder / str(name) for folder in usual if (folder / str(name)).is_file()), None)
        for start in range(len(parts) if file is None else 0):  # authors' lists begin with folders of their own
            named = Path(*parts[start:])
            if found := {folder / named for folder in others if (folder / named).is_file()}:
                if len(found) > 1:
                    both = " and ".join(map(str, sorted(found)[:2]))
                    raise InputError(f"{path}: image {name} could be {both}: remove one, or write its folder")
                file = found.pop()
                break
        if file is None:
            raise InputError(f"{path}: image {name} is neither beside the file nor in a folder beside it")
        yield str(file), file, _texts(said, f"{path}: {name}"), split


def _split_lists(path: Path) -> dict[str, str]:
    """The split of each image of lists like Flickr_8k.testImages.txt beside a captions file."""
    found: dict[str, str] = {}
    for file in visible(path.parent.glob("*.txt")):
        split = split_within(file)
        if file != path and split and not _first_line_is_captions(file):
            found |= dict.fromkeys(read_text(file).split(), split)
    return found


READERS: dict[str, Callable[[Path], Rows]] = {
    ".tar": _tar,
    ".parquet": _parquet,
    ".arrow": _parquet,
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".token": _table,
    ".txt": _table,
}
