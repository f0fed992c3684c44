"""Copies of our modules beside a saved model, with which it loads where this package is not installed.

transformers runs them on `trust_remote_code=True`: `auto_map` in a configuration says which file holds which class. A
module `diffclip.hf.vision` becomes the file `diffclip_hf_vision.py`, and its imports of ours become relative ones. A
README.md names the package, since transformers' refusal to run the code cannot: it only sends to the directory.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

INSTALLED = __name__ == "diffclip.base.portable"  # False in a copy, beside which lie those that it was saved with
OURS = re.compile(r"^(\s*from )((?:diffclip|mllm)\.[\w.]+)(?= import )", re.MULTILINE)
BESIDE = re.compile(r"^\s*from \.(\w+) import ", re.MULTILINE)
# Whom transformers refuses, for want of `trust_remote_code`, it sends to this directory: what is seen there first
README = """# A model of DiffCLIP Stack

transformers alone does not have this model's code. Either `pip install diffclip-stack`, and `import diffclip` before
transformers' Auto classes load this directory; or load it with `trust_remote_code=True`, which runs the `.py` files
beside this one: copies of the package's own.
"""


class Portable:
    """Goes before a class of transformers: it is saved with `auto_map`, and with the code that this speaks of.

    `auto_classes` says which of our classes each Auto class is to take, like "diffclip.hf.vision.DiffCLIPVisionModel".
    """

    auto_classes: ClassVar[Mapping[str, str]]

    def portable_classes(self) -> Mapping[str, str]:
        return self.auto_classes

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' class does it, and then the code."""
        classes = {auto: name for auto, name in self.portable_classes().items() if INSTALLED or _copy(name).is_file()}
        holder: Any = getattr(self, "config", self)
        holder.auto_map = auto_map(classes)
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc] # of the class behind
        if kwargs.get("is_main_process", True):
            write_code(classes.values(), save_directory)
        return saved


def auto_map(classes: Mapping[str, str]) -> dict[str, str]:
    """What a configuration calls our classes: `diffclip.hf.vision.X` is X of the file `diffclip_hf_vision.py`."""
    return {auto: f"{_copy(name).stem}.{name.rpartition('.')[2]}" for auto, name in classes.items()}


def write_code(classes: Iterable[str], directory: str | Path) -> None:
    """Write the modules of our classes, and what these need, into a directory, and a README.md where it has none."""
    files: dict[str, str] = {} if (Path(directory) / "README.md").exists() else {"README.md": README}
    for module in sorted({name.rpartition(".")[0] for name in classes}):
        files |= copies(module)
    for name, text in files.items():
        path = Path(directory) / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)  # not `write_whole`, which waits for the disk: for twenty files, it shows


@lru_cache
def copies(module: str) -> dict[str, str]:
    """The files that a module needs to run without this package, itself among them: name -> content."""
    files: dict[str, str] = {}
    wanted = [module]
    while wanted:
        module = wanted.pop()
        stem = module.replace(".", "_")
        if f"{stem}.py" in files:
            continue
        if INSTALLED:
            spec = importlib.util.find_spec(module)
            assert spec and spec.origin, module
            source = Path(spec.origin).read_text(encoding="utf-8")
            wanted += [found[2] for found in OURS.finditer(source)]
            source = OURS.sub(lambda found: f"{found[1]}.{found[2].replace('.', '_')}", source)
            text = f"# A copy of {module} of DiffCLIP Stack (pip: diffclip-stack), saved with a model.\n{source}"
        else:
            text = Path(__file__).with_name(f"{stem}.py").read_text(encoding="utf-8")
            wanted += BESIDE.findall(text)
        files[f"{stem}.py"] = text
    return files


def _copy(name: str) -> Path:
    """Where a copy of a class's module lies beside this one."""
    module = name.rpartition(".")[0]
    return Path(__file__).with_name(f"{module.replace('.', '_')}.py")
