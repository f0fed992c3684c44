"""Folders as people have them: which files of one hold its pairs, and images with captions in files beside them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from diffclip.base import parquet
from diffclip.base.archives import TAR_SUFFIXES
from diffclip.base.errors import InputError
from diffclip.base.files import file_content
from diffclip.base.paths import walk_once
from diffclip.data.captions import parse_captions
from diffclip.data.columns import chosen_columns
from diffclip.data.layout import FILE_IMAGES, Layout, chosen_split, split_named, split_of
from diffclip.data.tables import KINDS, holds_captions, is_saved, kind_of

LITTER = ("__MACOSX", "@eaDir", "_tmp")  # folders of file managers and of img2dataset, as are those with a dot in front


@dataclass
class Files:
    """The pairs of a folder: images with captions in a file of the same name beside each."""

    path: str
    pairs: list[tuple[str, str]]  # image and captions
    layout: Layout
    problems: list[tuple[str, str]]
    notices: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.pairs)

    def key(self, row: int) -> str:
        """The name of a pair: its image's path."""
        return self.pairs[row][0]

    def captions(self, row: int) -> list[str]:
        """The captions of a pair; ValueError or OSError where there is none."""
        file = self.pairs[row][1]
        member = os.path.splitext(file)[1][1:].lower()
        return parse_captions(file_content(file), member, self.layout.caption_column, self.layout.encoding)

    def read(self, row: int) -> tuple[Path, list[str]]:
        """The path of an image, and its captions."""
        return Path(self.pairs[row][0]), self.captions(row)


def sources_in(folder: str, layout: Layout) -> tuple[list[str], list[tuple[str, str]]]:
    """The files or folders that hold the pairs of a folder, sorted, and notices of what was left out.

    It is the folder itself where images lie in it.

    The first of these that is there: what `datasets` saved; shards, at any depth; metadata.csv, .jsonl or .parquet
    beside images; parquet with images inside; images with captions beside them; tables of captions, in the folder,
    in its data/ or annotations/, or in folders called like splits. Of several splits, by the names of files and
    folders, one is taken as `chosen_split` says.

    Raises:
        InputError: none of them, or several splits.
    """
    if is_saved(folder):
        return [folder], []
    files = [path for where, names in _walked(folder) for path in (os.path.join(where, name) for name in names)]
    shards = [path for path in files if path.lower().endswith(TAR_SUFFIXES)]
    stems = {os.path.splitext(path)[0] for path in shards}
    tables = [path for path in files if kind_of(path) and os.path.splitext(path)[0] not in stems]  # not img2dataset's
    metadata = [path for path in tables if os.path.basename(path).lower().startswith("metadata.")]
    parquet = [path for path in tables if kind_of(path) == ".parquet" and _holds_images(path, layout)]
    kinds = {"shards": shards, "metadata files": metadata, "parquet files with images": parquet}
    if several := {name: found for name, found in kinds.items() if found}:
        (name, found), *others = several.items()
        notices = [(folder, f"its {name} are read, its {other} are not") for other, _ in others]
        kept, left_out = _of_split(found, [split_of(os.path.relpath(path, folder)) for path in found], folder, layout)
        return kept, notices + left_out
    images, _, both = _images_and_captions(files, layout)
    if both:
        apart = [path for path in tables if kind_of(path) != ".txt" and os.path.splitext(path)[0] not in images]
        return [folder], [(path, "is not read: the captions beside the images are") for path in apart]
    if found := _beside_images(folder, tables, layout):
        kept, notices = _of_split(found, [split_of(os.path.relpath(path, folder)) for path in found], folder, layout)
        beside = {kind_of(path) for path in tables if os.path.dirname(path) == os.path.dirname(found[0])}
        unread = sorted(beside - {kind_of(found[0]), ".txt"})
        notices += [(folder, f"its {kind_of(found[0])} files are read, its {kind} are not") for kind in unread]
        return kept, notices
    wanted = ", ".join(f".{member}" for member in layout.caption_member)
    held = sorted({os.path.splitext(path)[1] or os.path.basename(path) for path in files})
    raise InputError(
        f"{folder}: holds neither shards, nor a saved dataset, nor a table, nor images with a {wanted} of the same "
        f"name beside them, but {', '.join(held[:8]) or 'nothing'}; set image_member and caption_member to their "
        "suffixes, or name the files in it"
    )


def _beside_images(folder: str, tables: Iterable[str], layout: Layout) -> list[str]:
    """The tables of captions of a folder, all of one kind: of text files those that begin like one, of JSON COCO's
    captions without the boxes beside them.
    """
    folder, found_first = folder.rstrip("/") or folder, list[str]()
    for kind in KINDS:
        places: dict[str, list[str]] = {"": [], "data": [], "annotations": [], "splits": []}
        for path in tables:
            place = os.path.relpath(os.path.dirname(path), folder).lower()
            place = "" if place == "." else "splits" if split_named(place) else place
            if kind_of(path) == kind and place in places and (kind != ".txt" or holds_captions(path, layout)):
                places[place].append(path)
        for found in places.values():
            captions = [path for path in found if os.path.basename(path).lower().startswith("captions_")]
            if found:
                found = captions if captions and kind == ".json" else found
                if all(holds_captions(path, layout) for path in found):
                    return found
                found_first = found_first or found
    return found_first  # reading says what is wrong with them


def read_folder(folder: str, layout: Layout) -> Files:
    """All pairs at any depth; of several images of one name the first of the layout's kinds is taken."""
    files = [os.path.join(where, name) for where, names in _walked(folder) for name in names]
    images, captions, both = _images_and_captions(files, layout)
    pairs = [(images[stem][0], captions[stem]) for stem in both]
    splits = [split_of(os.path.relpath(os.path.dirname(image), folder) + "/_") for image, _ in pairs]
    kept, notices = _of_split([image for image, _ in pairs], splits, folder, layout) if pairs else ([], [])
    if several := [stem for stem in both if len(images[stem]) > 1]:
        names = ", ".join(map(os.path.basename, images[several[0]]))
        order = ", ".join(layout.image_member or FILE_IMAGES)
        notices.append((images[several[0]][0], f"{len(several)} names have several images (this one {names}): the "
                        f"first of {order} counts"))  # fmt: skip
    wanted = " or ".join(f".{member}" for member in layout.caption_member)
    problems = [(found[0], f"no {wanted} caption") for stem, found in images.items() if stem not in captions]
    problems += [(captions[stem], "no image") for stem in sorted(captions.keys() - images.keys())]
    of_split = {*kept}
    return Files(folder, [pair for pair in pairs if pair[0] in of_split], layout, problems, notices)


def _images_and_captions(
    files: Iterable[str], layout: Layout
) -> tuple[dict[str, list[str]], dict[str, str], list[str]]:
    """Images by stem, best first; the file of captions of each stem; and the stems that have both."""
    kinds = layout.image_member or FILE_IMAGES
    images: dict[str, list[str]] = {}
    captions: dict[str, str] = {}
    for path in files:
        stem, suffix = os.path.splitext(path)
        suffix = suffix[1:].lower()
        if suffix in layout.caption_member:
            best = layout.caption_member.index(suffix)
            if stem not in captions or best < layout.caption_member.index(captions[stem][len(stem) + 1 :].lower()):
                captions[stem] = path
        elif suffix in kinds:
            images.setdefault(stem, []).append(path)
    for found in images.values():
        found.sort(key=lambda path: kinds.index(os.path.splitext(path)[1][1:].lower()))
    return images, captions, [stem for stem in images if stem in captions]


def _of_split(
    paths: list[str], splits: list[str | None], folder: str, layout: Layout
) -> tuple[list[str], list[tuple[str, str]]]:
    """The paths of one split, and a notice if there are others."""
    example = next((path for path, split in zip(paths, splits) if split), "")
    example = os.path.dirname(example) if example.lower().endswith(tuple(FILE_IMAGES)) else example
    wanted = chosen_split(splits, layout, folder, f"set `split` to one of them, or name its files, e.g. {example}")
    kept = [path for path, split in zip(paths, splits) if split == wanted]
    reason = f"the {len(kept):,} files of its split {wanted} are read, of {len(paths):,}"
    return kept, [(folder, reason)] if len(kept) < len(paths) else []


def _holds_images(path: str, layout: Layout) -> bool:
    try:
        chosen_columns(path, parquet.schema(path).names, layout)
    except InputError:
        return False
    return True


def _walked(folder: str) -> Iterable[tuple[str, list[str]]]:
    """(folder, names of its files), sorted, without hidden ones; links are followed, each folder once."""
    for where, folders, names in walk_once(folder):
        folders[:] = [] if is_saved(where) else [name for name in folders if name not in LITTER]
        yield where, [name for name in names if not name.endswith("_stats.json")]
