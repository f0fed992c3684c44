"""Where benchmark pictures come from: class folders, webdataset shards, caption files and parquet.

Every reader gives a `Pictures` data set of (PIL image, label); nothing is decoded before it is asked for.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from diffclip.data import caption_lines
from diffclip.errors import InputError
from diffclip.pictures import open_picture
from diffclip.shards import IMAGE_SUFFIXES as FIRST_SUFFIXES
from diffclip.shards import walk

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
TAR_IMAGES = (*FIRST_SUFFIXES, *sorted({*IMAGE_SUFFIXES} - {*FIRST_SUFFIXES}))  # of several under one key the first


class TarSlice(NamedTuple):
    """One picture inside an uncompressed tar file: read at its offset, never unpacked."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The encoded picture; OSError if it cannot be read."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Pictures(Dataset):
    """Pictures by name, each a file, a slice of a tar file, or encoded bytes; items are (RGB image, label).

    `digest` changes whenever a picture, its label or the order may have changed: it covers names, labels, and
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
        return open_picture(encoded, self.names[index]), self.labels[index]

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


def read_json(path: Path) -> object:
    """Parse a JSON file; `InputError` with the path (and line) when it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def images_in(folder: Path) -> list[Path]:
    """Return all image files below a folder, sorted by path."""
    found = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders below `folder`, sorted; hidden ones are left out."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: give a folder that holds one folder of images per class")
    entries = (entry for entry in folder.iterdir() if entry.is_dir())
    names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no class folders: expected {folder}/<class name>/*.png")
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


def labelled_files(folder: Path, split: str) -> list[Path]:
    """Return a split's files: `folder`/`split`/*.tar, `split`/*.parquet, `split`.parquet or `split`-*.parquet."""
    for pattern in (f"{split}/*.tar", f"{split}/*.parquet", f"{split}.parquet", f"{split}-*.parquet"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def read_labelled(files: Sequence[Path]) -> Pictures:
    """Read pictures with numbers as labels: clip-benchmark's shards (KEY.webp + KEY.cls), or parquet (image, label).

    Raises:
        InputError: a file that cannot be read, or a picture without a label.
    """
    names, sources, labels = [], [], []
    for file in files:
        rows = _labelled_tar(file) if file.suffix == ".tar" else _labelled_parquet(file)
        for name, source, label in rows:
            names.append(name)
            sources.append(source)
            labels.append(label)
    return Pictures(names, sources, labels)


def _labelled_tar(path: Path) -> list[tuple[str, TarSlice, int]]:
    rows = []
    for key, picture, label in _tar_samples(path, ".cls"):
        if label is None:
            raise InputError(f"{path}: picture {key} has no .cls label beside it")
        if picture is not None:
            try:
                rows.append((f"{path}:{key}", picture, int(label.read())))
            except ValueError as error:
                raise InputError(f"{path} cannot be read as a shard of pictures with .cls labels ({error})") from None
    return rows


def _tar_samples(path: Path, suffix: str) -> Iterator[tuple[str, TarSlice | None, TarSlice | None]]:
    """(key, picture, what lies beside it under `suffix`) of each sample that has either, read as training reads them.

    Raises:
        InputError: it is no tar, or ends early.
    """
    samples, problems = walk(path)
    if problems:
        raise InputError(f"{path} cannot be read as a webdataset shard ({problems[0][1]}): download it again")
    for key, members in samples:
        by_suffix = {f".{name.lower()}": TarSlice(path, *place) for name, place in reversed(members.items())}
        picture = next((by_suffix[one] for one in TAR_IMAGES if one in by_suffix), None)
        if picture or suffix in by_suffix:
            yield key, picture, by_suffix.get(suffix)


def _labelled_parquet(path: Path) -> list[tuple[str, bytes, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "label"])
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{path} cannot be read as parquet with the columns image and label ({error})") from error
    pictures = [image["bytes"] if isinstance(image, dict) else image for image in table["image"].to_pylist()]
    return [
        (f"{path} row {n}", image, int(label))
        for n, (image, label) in enumerate(zip(pictures, table["label"].to_pylist()))
    ]


class Captioned(NamedTuple):
    """A retrieval set: pictures, all captions, and for each caption the row of its picture."""

    images: Pictures
    captions: list[str]
    owner: list[int]


def read_captioned(path: Path) -> Captioned:
    """Read a retrieval set in any of the usual forms.

    `path` is a folder of webdataset shards (KEY.png + KEY.txt with one caption a line, as clip-benchmark has
    them), one such .tar, a captions .json beside its images (the Karpathy form {"images": [{"filename",
    "sentences": [{"raw"}]}]}, or {"file": ["caption", ...]}), or a .parquet with image and caption columns.
    """
    if path.is_dir():
        for suffix in (".tar", ".parquet", ".json"):
            files = sorted(path.glob(f"*{suffix}"))
            if files:
                break
        else:
            raise InputError(f"{path} holds no .tar, .parquet or .json file with captions")
    elif path.is_file():
        files, suffix = [path], path.suffix
    else:
        raise InputError(f"{path} does not exist: give shards, a parquet file or a captions file")
    readers = {".tar": _captioned_tar, ".parquet": _captioned_parquet, ".json": _captioned_json}
    if suffix not in readers:
        raise InputError(f"{path} is not a .tar, .parquet or .json file with captions")

    names, sources, captions, owner = [], [], [], []
    for file in files:
        for name, source, texts in readers[suffix](file):
            if not texts:
                raise InputError(f"{name} has no caption: each picture of a retrieval set needs at least one")
            captions += texts
            owner += [len(names)] * len(texts)
            names.append(name)
            sources.append(source)
    if not names:
        raise InputError(f"{path} holds no pictures with captions")
    return Captioned(Pictures(names, sources), captions, owner)


Rows = list[tuple[str, Path | TarSlice | bytes, list[str]]]  # name for messages, picture, captions


def _captioned_tar(path: Path) -> Rows:
    rows: Rows = []
    for key, picture, text in _tar_samples(path, ".txt"):
        if picture is None:
            raise InputError(f"{path}: {key}.txt has no picture beside it")
        try:
            rows.append((f"{path}:{key}", picture, caption_lines(text.read().decode("utf-8-sig")) if text else []))
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: {key}.txt is not UTF-8 ({error}): write the shard again") from None
    return rows


def _captioned_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        text = next((name for name in ("captions", "caption", "text") if name in columns), None)
        if "image" not in columns or text is None:
            raise InputError(f"{path} needs the columns image and caption (or captions, text), has {columns}")
        table = pyarrow.parquet.read_table(path, columns=["image", text])
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error})") from error
    rows: Rows = []
    for number, (image, caption) in enumerate(zip(table["image"].to_pylist(), table[text].to_pylist())):
        data = image["bytes"] if isinstance(image, dict) else image
        source = data if data is not None else path.parent / image["path"]
        captions = [caption] if isinstance(caption, str) else [str(one) for one in caption or []]
        rows.append((f"{path} row {number}", source, captions))
    return rows


def _captioned_json(path: Path) -> Rows:
    data = read_json(path)
    if isinstance(data, dict) and isinstance(data.get("images"), list):
        try:
            # Karpathy's files hold all splits together; a file without a test split is taken whole
            rest = [row for row in data["images"] if row.get("split") == "test"] or data["images"]
            entries = [
                (
                    os.path.join(row.get("filepath", ""), row["filename"]),
                    [one["raw"] for one in row["sentences"]],
                )
                for row in rest
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: an entry lacks filename or sentences[].raw ({error})") from None
    elif isinstance(data, dict) and all(isinstance(texts, list) for texts in data.values()):
        entries = list(data.items())
    else:
        raise InputError(f"{path} needs the form {{images: [...]}} or {{file: [captions]}}")
    folders = (path.parent, path.parent / "images")
    rows: Rows = []
    for name, texts in entries:
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is None:
            raise InputError(f"{path}: picture {name} is neither beside the file nor in images/")
        rows.append((str(file), file, [str(text) for text in texts]))
    return rows
