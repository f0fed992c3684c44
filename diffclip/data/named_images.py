"""The images that the rows of a table name: as paths from its folder or from one beside it, or written in base64."""

import base64
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from diffclip.base.paths import LONGEST

ENCODED = re.compile(r"data:image/[\w.+-]+;base64,|(?=/9j/|iVBOR|UklGR|R0lGOD)")  # how base64 of images begins
WEB = re.compile(r"https?://", re.IGNORECASE)
BESIDE = ("annotations", "data")  # folders for tables, whose images lie beside such a folder


class NamedImages:
    """Finds the images of one table."""

    def __init__(self, table: str, root: str = "") -> None:
        """
        Args:
            table: its path.
            root: where its paths start, the only place then; empty: its folder, or what lies beside it.
        """
        self.root, self.home = root, Path(table).parent
        self.cuts: Sequence[int] = ()  # how many folders in front of a name may be left out
        inside = [Path(table)] if os.path.isdir(table) else []
        tops = [self.home, Path(os.path.abspath(self.home)).parent] if self.in_own_folder else [self.home]
        word = Path(table).name.split(".")[0].rsplit("_", 1)[-1]  # captions_val2017.json is about val2017/
        beside = [*inside, *(top / name for top in tops for name in ("", "images", word))]
        self.folders = [Path(root)] if root else beside

    @property
    def in_own_folder(self) -> bool:
        """Whether the table lies in a folder of tables."""
        return os.path.basename(os.path.abspath(self.home)).lower() in BESIDE

    @cached_property
    def top(self) -> Path:
        """The folder that no name may lead out of."""
        return Path(os.path.abspath(self.root or (self.home.parent if self.in_own_folder else self.home)))

    def _leads_outside(self, file: Path, name: str) -> bool:
        """Whether a name is written so that it leads out; links are followed, since people link their image folders."""
        if name[0] != "/" and ".." not in name:
            return False
        return not Path(os.path.abspath(file)).is_relative_to(self.top)

    @cached_property
    def others(self) -> list[Path]:
        """Folders beside the table, in which a name is looked for that is in none of `folders`."""
        if self.root:
            return []
        home = Path(os.path.abspath(self.home))
        tops = [home, home.parent] if self.in_own_folder else [home]
        inner = [path for top in tops for path in sorted(top.iterdir()) if path.is_dir() and path.name[0] != "."]
        return list(dict.fromkeys([*tops, *inner]))

    def find(self, name: str) -> bytes | Path:
        """The image that a name stands for; OSError if there is no such file, ValueError if there are two."""
        if (match := ENCODED.match(name)) and len(name) > 256:  # /9j/ could be a folder
            return base64.b64decode(name[match.end() :])
        if any(len(part.encode()) > LONGEST for part in name.split("/")):
            raise OSError(f"{name[:40]}... is neither a path nor the base64 of a JPEG, PNG, WebP or GIF")
        for folder in self.folders:
            for each in dict.fromkeys((name, name.replace("\\", "/"), name.strip())):
                if (file := folder / each).is_file():
                    if self._leads_outside(file, each):
                        remedy = "copy the file there, or set image_root to a folder that holds all (/ takes any)"
                        raise ValueError(f"image {name[:200]} leads outside {self.top}: {remedy}")
                    return file
        if WEB.match(name):
            raise OSError(f"{name} is a web address: `diffclip data pairs` fetches lists of them")
        parts = _parts(name)
        for cut in (0, *self.cuts):
            tail = "/".join(parts[cut:])
            tops = self.others if tail and ".." not in parts else []
            found = {os.path.realpath(file): file for top in tops if (file := top / tail).is_file()}
            if len(found) > 1:
                both = " and ".join(map(str, [*found.values()][:2]))
                raise ValueError(f"image {name[:200]} could be {both}: remove one, write its folder, or set image_root")
            if found:
                return next(iter(found.values()))
        places = ", ".join(map(str, self.folders)) + (", nor in a folder beside it" if self.others else "")
        raise OSError(f"there is no {name[:200]} in {places}; set image_root to the folder that paths start from")

    def cut_to_fit(self, names: Iterable[str], some: Sequence[str]) -> None:
        """Let `find` leave out the folders in front that only the table's author had, as /export/share/.

        That is done where no two names could come to mean one file: each file is called otherwise, or what is left
        out is the same in all names. Nothing is done if no image of `some` is found so.
        """
        parts = {_parts(name) for name in names}
        most = max((len(each) for each in parts), default=1) - 1
        if len({each[-1] for each in parts if each}) == len(parts):
            choices: list[Sequence[int]] = [range(1, most + 1)]
        else:
            first, last = min(parts)[:-1], max(parts)[:-1]
            common = next(
                (i for i, pair in enumerate(zip(first, last)) if len({*pair}) > 1), min(len(first), len(last))
            )
            choices = [(cut,) for cut in range(1, common + 1)]
        for self.cuts in choices:
            if any(self._finds(name) for name in some):
                return
        self.cuts = ()

    def _finds(self, name: str) -> bool:
        try:
            return bool(self.find(name))
        except (OSError, ValueError) as error:
            return "could be" in str(error)


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts
