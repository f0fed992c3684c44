"""Where benchmark images come from: class folders, webdataset shards, caption files and parquet.

Every reader gives a `Pictures` data set of (PIL image, label); nothing is decoded before it is asked for.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from diffclip.base.errors import InputError
from diffclip.base.files import parse_json, read_json, read_text
from diffclip.base.images import open_image
from diffclip.data.captions import caption_lines
from diffclip.data.shards import walk

if TYPE_CHECKING:
    import pyarrow

# of two images under one key of a shard the first in this order counts: the photo, not its mask
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
SPLITS = {  # and what folders, files and the column `split` call them, in any case
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
NUMBERED = re.compile(r"([A-Za-z]+)(?:-.*|[_.]\d.*)?")  # a split's files: test, test-00000-of-00002, test_0, test.0
IMAGE_COLUMNS = ("image", "img", "jpg", "webp", "png")
LABEL_COLUMNS = ("label", "fine_label", "labels", "cls")
CAPTION_COLUMNS = ("caption", "captions", "text")


class TarSlice(NamedTuple):
    """One image inside an uncompressed tar file: read at its offset, never unpacked."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded image; OSError if it cannot be read."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Pictures(Dataset):
    """Images by name, each a file, a slice of a tar file, or encoded bytes; items are (RGB image, label).

    `digest` changes whenever an image, its label or the order may have changed: it covers names, labels, and
    size and modification time of the files (the content itself where it is held as bytes).
    """

    def __init__(
        self,
        names: Sequence[str],
        sources: Sequence[Path | TarSlice | bytes],
        labels: Sequence[int] | None = None,
    ) -> None:
        self.names = list(names)
        self.sources = list(sources)
        self.labels = list(labels) if labels is not None else [-1] * len(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        source = self.sources[index]
        encoded = source.read if isinstance(source, TarSlice) else source
        return open_image(encoded, self.names[index]), self.labels[index]

    @property
    def digest(self) -> str:
        state: dict[Path, tuple[int, int]] = {}
        digest = hashlib.sha256()
        for name, source, label in zip(self.names, self.sources, self.labels):
            if isinstance(source, bytes):
                content: object = hashlib.sha256(source).hexdigest()
            else:
                path, *place = source if isinstance(source, TarSlice) else (source,)
                if path not in state:
                    stat = path.stat()
                    state[path] = (stat.st_size, stat.st_mtime_ns)
                content = (str(path.resolve()), state[path], place)
            digest.update(repr((name, label, content)).encode())
        return digest.hexdigest()


def visible(entries: Iterable[Path]) -> list[Path]:
    """Sort, and leave out what file managers and notebooks drop beside data: `.DS_Store`, `._1.jpg`, `__MACOSX`."""
    return sorted(path for path in entries if not path.name.startswith((".", "__MACOSX", "@eaDir")))


def images_in(folder: Path) -> list[Path]:
    """Return all image files below a folder, sorted by path; hidden files and folders are left out."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [path.name for path in visible(Path(root) / name for name in folders)]
        found += visible(Path(root) / name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    return sorted(found)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders below `folder`, sorted; hidden ones are left out."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: give a folder that holds one folder of images per class")
    names = [entry.name for entry in visible(folder.iterdir()) if entry.is_dir()]
    if not names:
        raise InputError(
            f"{folder} has no class folders: expected {folder}/<class name>/*.png, or files called test-*.tar or "
            "test-*.parquet, or any .parquet with train, val or test in a column split"
        )
    return names


def read_class_folders(folder: Path, labels: Mapping[str, int]) -> Pictures:
    """Read `folder`/<class>/*.png with `labels[class]` as targets, sorted by class folder and file name.

    Raises:
        InputError: no such folder, a class folder without images, or one that `labels` does not know.
    """
    files, targets = [], []
    for name in class_folders(folder):
        if name not in labels:
            raise InputError(
                f"{folder / name} has no prompt name: add {name!r} to classnames.json or remove the folder"
            )
        found = images_in(folder / name)
        if not found:
            raise InputError(f"{folder / name} holds no images: add some or remove the empty class folder")
        files += found
        targets += [labels[name]] * len(found)
    return Pictures([str(path) for path in files], files, targets)


def split_named(name: object) -> str | None:
    """Return train, val or test for any of its names, None for another word."""
    return next((split for split, names in SPLITS.items() if str(name).strip().lower() in names), None)


def _split_of(file: Path) -> str | None:
    """The split that a file's name begins with: train-00000-of-00002.parquet."""
    return split_named(re.split(r"[-_.]", file.name)[0])


def labelled_files(folder: Path, split: str) -> list[Path]:
    """Return the shards or parquet files of train, val or test, in `folder` or in its data/, as the Hub has it.

    Their names: `SPLIT/*.tar`, `SPLIT/*.parquet`, `SPLIT.parquet`, `SPLIT-*.tar`, `SPLIT_0.parquet`, with the split by
    any of its names, in any case; or any name for parquet whose column `split` has rows of it.

    Raises:
        InputError: files by two of the split's names.
    """
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    for place in places:
        entries = visible(place.iterdir())
        for suffix in (".tar", ".parquet"):
            folders = [path for path in entries if split_named(path.name) == split and path.is_dir()]
            files = {file: path.name for path in folders for file in _with_suffix(path.iterdir(), suffix)}
            if not files:
                numbered = ((path, NUMBERED.fullmatch(path.stem)) for path in _with_suffix(entries, suffix))
                files = {path: found[1] for path, found in numbered if found and split_named(found[1]) == split}
            if len(words := sorted(set(files.values()))) > 1:
                raise InputError(f"{place} has {split} files as {' and as '.join(words)}: keep those of one name")
            if files:
                return list(files)
    for place in places:
        unnamed = [path for path in _with_suffix(place.iterdir(), ".parquet") if _split_of(path) is None]
        if files := [path for path in unnamed if split in _splits(path)]:
            return files
    return []


def _with_suffix(entries: Iterable[Path], suffix: str) -> list[Path]:
    return [path for path in visible(entries) if path.suffix.lower() == suffix and path.is_file()]


def read_labelled(files: Sequence[Path], split: str) -> Pictures:
    """Read images with numbers as labels: clip-benchmark's shards (KEY.webp + KEY.cls), or parquet (image, label).

    Rows that a column `split` gives to another split are left out. Labels that are withheld, as those of ImageNet's
    test set, are -1.

    Raises:
        InputError: a file that cannot be read, an image without a label, or a label that is no whole number.
    """
    names, sources, labels = [], [], []
    for file in files:
        rows = _labelled_tar(file) if file.suffix.lower() == ".tar" else _labelled_parquet(file, split)
        for name, source, label in rows:
            names.append(name)
            sources.append(source)
            labels.append(label)
    if not names:
        raise InputError(f"{files[0]} holds no images of the split {split}")
    negative = [row for row, label in enumerate(labels) if label < 0]
    if 0 < len(negative) < len(labels):
        raise InputError(
            f"{names[negative[0]]} has no label (-1), like {len(negative):,} of {len(labels):,} rows: remove them"
        )
    return Pictures(names, sources, labels)


def _label(value: Any, name: str) -> int:
    if value is None:
        return -1
    try:
        if int(value) == float(value):
            return int(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{name}: label {str(value)[:40]!r} is no whole number: number the classes from 0")


Members = dict[str, TarSlice | bytes]  # of one key of a shard, by suffix; images stay in the file


def _samples(path: Path, text: str) -> list[tuple[str, Members]]:
    """Return (key, members) of a shard, read as training reads it: the images, and what has the suffix `text`.

    Raises:
        InputError: it is no tar, or ends early.
    """
    walked, problems = walk(path)
    if problems:
        raise InputError(f"{path} cannot be read as a webdataset shard ({problems[0][1]}): download it again")
    samples = []
    for key, places in walked:
        members: Members = {}
        for name, place in places.items():
            suffix = f".{name.lower()}"
            if suffix in (*IMAGE_SUFFIXES, text):
                piece = TarSlice(path, *place)
                members.setdefault(suffix, piece.read() if suffix == text else piece)
        if members:
            samples.append((key, members))
    return samples


def _picture_of(members: Members) -> TarSlice | bytes | None:
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)


def _labelled_tar(path: Path) -> Iterator[tuple[str, TarSlice | bytes, int]]:
    for key, members in _samples(path, ".cls"):
        name, picture = f"{path}:{key}", _picture_of(members)
        if picture is None:
            continue
        if ".cls" not in members:
            raise InputError(f"{path}: image {key} has no .cls label beside it")
        yield name, picture, _label(str(members[".cls"], "utf-8", "replace").strip(), name)


def _labelled_parquet(path: Path, split: str) -> Iterator[tuple[str, bytes | Path, int]]:
    image, label = _columns(path, _schema(path).names, LABEL_COLUMNS, IMAGE_COLUMNS)
    splits = _splits(path)
    for number, row in _rows(path, [image, label], [one in (split, None) for one in splits]):
        name = f"{path} row {number}"
        yield name, _encoded(row[image], path, name), _label(row[label], name)


def schema_classnames(files: Sequence[Path]) -> list[str] | None:
    """Return the class names that the Hub's parquet files carry in their schema, None without any."""
    for path in files:
        if path.suffix.lower() == ".parquet" and b"huggingface" in (_schema(path).metadata or {}):
            told = parse_json(_schema(path).metadata[b"huggingface"], f"{path}: its schema")
            features = told.get("info", {}).get("features", {}) if isinstance(told, dict) else {}
            for column in LABEL_COLUMNS:
                if isinstance(features.get(column), dict) and isinstance(features[column].get("names"), list):
                    return [str(name) for name in features[column]["names"]]
    return None


def _schema(path: Path) -> "pyarrow.Schema":
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error})") from error


def _splits(path: Path) -> list[str | None]:
    """Return what the column `split` gives each row of a parquet file: all None where it names no split, or is not."""
    import pyarrow.parquet

    if "split" not in _schema(path).names:
        return [None] * pyarrow.parquet.read_metadata(path).num_rows
    values = pyarrow.parquet.read_table(path, columns=["split"])["split"].to_pylist()
    named = [split_named(value) for value in values]
    unknown = next((value for value, split in zip(values, named) if split is None), None)
    if None in named and any(named):
        raise InputError(f"{path}: the column split holds {unknown!r}; write train, val or test in every row")
    return named


def _rows(path: Path, columns: list[str], wanted: Sequence[bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return (number, row) of the rows that are wanted."""
    import pyarrow
    import pyarrow.parquet

    kept = [number for number, is_wanted in enumerate(wanted) if is_wanted]
    try:
        table = pyarrow.parquet.read_table(path, columns=columns).filter(pyarrow.array(wanted, pyarrow.bool_()))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error})") from error
    yield from zip(kept, (row for batch in table.to_batches() for row in batch.to_pylist()))


def _columns(path: Path, found: Sequence[str], second: Sequence[str], image: Sequence[str]) -> tuple[str, str]:
    """Return the column of images, and that of labels or captions: the first of these names that is there."""
    both = [next((name for name in wanted if name in found), None) for wanted in (image, second)]
    if None in both:
        others = ", ".join((*image[1:], *second[1:]))
        names = ", ".join(found)
        raise InputError(f"{path} needs the columns {image[0]} and {second[0]} (or {others}), has {names}: rename them")
    return both[0], both[1]


def _encoded(picture: Any, path: Path, name: str) -> bytes | Path:
    """The image of a parquet row: bytes, or the Hub's {bytes, path}, whose path is relative to the file."""
    if isinstance(picture, dict):
        file = picture.get("path")
        picture = picture.get("bytes") or (path.parent / file if file else None)
    if not isinstance(picture, bytes | Path):
        raise InputError(f"{name} holds no image: remove the row")
    return picture


class Captioned(NamedTuple):
    """A retrieval set: images, all captions, and for each caption the row of its image."""

    images: Pictures
    captions: list[str]
    owner: list[int]


# name for messages, image, captions, and the split that the file gives the row
Rows = Iterable[tuple[str, Path | TarSlice | bytes, list[str], str | None]]


def read_captioned(path: Path) -> Captioned:
    """Read the test rows of a retrieval set in any of the usual forms.

    `path` is a folder of these files, or one of them: webdataset shards (KEY.png + KEY.txt with one caption a line, as
    clip-benchmark has them); parquet with image and caption columns; JSON beside its images, as Karpathy's
    ({"images": [{"filename", "sentences": [{"raw"}]}]}), COCO's ({"images", "annotations"}), a list of
    {"image", "caption"}, or {"file": ["caption", ...]}; or a table (Flickr30k's results.csv) of image and caption.
    Splits are told by a column or key `split`, and by files called train-..., test-... .

    Raises:
        InputError: none of these, an image without a caption, or several splits and none of them test.
    """
    readers = {".tar": _captioned_tar, ".parquet": _captioned_parquet, ".json": _captioned_json}
    readers |= dict.fromkeys((".csv", ".tsv"), _captioned_table)
    if path.is_dir():
        places = [place for place in (path, path / "test", path / "data") if place.is_dir()]
        found = (visible(place.glob(f"*{suffix}")) for suffix in readers for place in places)
        files = next((files for files in found if files), [])
        if not files:
            raise InputError(f"{path} holds no .tar, .parquet or .json (or .csv, .tsv) file with captions")
        splits = [_split_of(file) for file in files]
        files = [file for file, split in zip(files, splits) if split == _test_split(splits, path)]
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path} does not exist: give shards, a parquet file or a captions file")
    if files[0].suffix.lower() not in readers:
        raise InputError(f"{path} is not a .tar, .parquet or .json (or .csv, .tsv) file with captions")

    rows = [row for file in files for row in readers[file.suffix.lower()](file)]
    wanted = _test_split([split for *_, split in rows], path)
    names, sources, captions, owner = [], [], [], []
    for name, source, texts, split in rows:
        if split != wanted:
            continue
        texts = [text.strip() for text in texts if text.strip()]  # an empty caption is no query
        if not texts:
            raise InputError(f"{name} has no caption: each image of a retrieval set needs at least one")
        captions += texts
        owner += [len(names)] * len(texts)
        names.append(name)
        sources.append(source)
    if not names:
        raise InputError(f"{path} holds no images with captions")
    return Captioned(Pictures(names, sources), captions, owner)


def _test_split(splits: Iterable[str | None], path: Path) -> str | None:
    """Test where it is among them, or the only one that there is."""
    found = set(splits)
    if len(found) > 1 and "test" not in found:
        raise InputError(
            f"{path} has the splits {', '.join(sorted(map(str, found)))} and no test: keep the one to score"
        )
    return "test" if "test" in found else next(iter(found), None)


def _texts(value: Any, name: str) -> list[str]:
    """Captions as they are stored: one, or a list; null is none."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, dict | list) for one in values):
        raise InputError(f"{name}: a caption must be text, not {str(values)[:60]}")
    return [str(one) for one in values if one is not None]


def _captioned_tar(path: Path) -> Rows:
    for key, members in _samples(path, ".txt"):
        picture = _picture_of(members)
        if picture is None:
            raise InputError(f"{path}: {key}.txt has no image beside it")
        try:
            yield f"{path}:{key}", picture, caption_lines(str(members.get(".txt", b""), "utf-8-sig")), None
        except UnicodeDecodeError:
            raise InputError(f"{path}: {key}.txt is not UTF-8: write it again") from None


def _captioned_parquet(path: Path) -> Rows:
    image, text = _columns(path, _schema(path).names, CAPTION_COLUMNS, IMAGE_COLUMNS)
    splits = _splits(path)
    for number, row in _rows(path, [image, text], [split == "test" or "test" not in splits for split in splits]):
        name = f"{path} row {number}"
        yield name, _encoded(row[image], path, name), _texts(row[text], name), splits[number]


def _captioned_table(path: Path) -> Rows:
    """Rows of image and caption, several rows an image; the separator is told from the header."""
    lines = read_text(path).split("\n")
    separator = max("|\t;,", key=lines[0].count)
    # results.csv of Flickr30k does not quote: a quotation mark is text there
    quoting = csv.QUOTE_MINIMAL if separator in ",;" else csv.QUOTE_NONE
    try:
        header, *rows = csv.reader((f"{line}\n" for line in lines), delimiter=separator, quoting=quoting, strict=True)
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table ({error})") from None
    columns = [column.strip().lower() for column in header]
    names = _columns(
        path,
        columns,
        (*CAPTION_COLUMNS, "comment", "title"),
        ("image", "image_name", "filename", "file_name", "filepath", "file"),
    )
    image, text = map(columns.index, names)
    split = columns.index("split") if "split" in columns else None
    pictures: dict[str, tuple[str | None, list[str]]] = {}
    for number, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(columns) == 3 and len(row) == 2 and (both := re.fullmatch(r"\s*(\d+)\s+(.+)", row[1])):
            row = [row[0], *both.groups()]  # the published results.csv lacks a separator in one row
        if len(row) != len(columns):
            raise InputError(f"{path}: row {number} has {len(row)} columns and not {len(columns)}: {str(row)[:80]}")
        pictures.setdefault(row[image].strip(), (split_named(row[split]) if split is not None else None, []))
        pictures[row[image].strip()][1].append(row[text])
    yield from _beside(path, [(name, texts, where) for name, (where, texts) in pictures.items()])


def _captioned_json(path: Path) -> Rows:
    data = read_json(path)
    entries: list[tuple[str, Any, str | None]]  # file, captions, split
    try:
        if isinstance(data, dict) and isinstance(data.get("annotations"), list):  # COCO
            texts: dict[Any, list] = {image["id"]: [] for image in data["images"]}
            for annotation in data["annotations"]:
                texts[annotation["image_id"]].append(annotation["caption"])
            entries = [(image["file_name"], texts[image["id"]], None) for image in data["images"]]
        elif isinstance(data, dict) and isinstance(data.get("images"), list):  # Karpathy: all splits together
            entries = [
                (
                    os.path.join(row.get("filepath", ""), row["filename"]),
                    [one["raw"] for one in row["sentences"]],
                    split_named(row.get("split")),
                )
                for row in data["images"]
            ]
        elif isinstance(data, list):
            entries = [
                (row["image"], row.get("captions", row.get("caption")), split_named(row.get("split"))) for row in data
            ]
        elif isinstance(data, dict) and all(isinstance(texts, list | str) for texts in data.values()):
            entries = [(name, texts, None) for name, texts in data.items()]
        else:
            raise InputError(f"{path} needs the form {{images: [...]}}, [{{image, caption}}] or {{file: [captions]}}")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: an entry lacks its image or its captions ({error})") from None
    return _beside(path, entries)


def _beside(path: Path, entries: Sequence[tuple[str, Any, str | None]]) -> Rows:
    """Find the images of a captions file beside it, in images/, or in the folder that its name ends in (val2017)."""
    folders = (path.parent, path.parent / "images", path.parent / path.stem.rsplit("_", 1)[-1])
    wanted = _test_split([split for *_, split in entries], path)
    for name, texts, split in entries:
        if split != wanted:
            continue  # the others' images need not be there
        file = next((folder / str(name) for folder in folders if (folder / str(name)).is_file()), None)
        if file is None:
            raise InputError(f"{path}: image {name} is neither beside the file nor in images/")
        yield str(file), file, _texts(texts, f"{path}: {name}"), split
