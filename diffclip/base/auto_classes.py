"""transformers' Auto classes know our models, although nothing is imported before one of them is asked for.

To register a model takes its classes, and so torch, transformers and all of ours at every start. Instead, where the
Auto classes look among registered ones, they find a dictionary that imports the module first, which then registers its
own. It is put there as soon as transformers' module is loaded, without importing anything in the midst of that.
"""

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto."
# transformers' module -> its mapping of models by type, or of image processors, which are searched by class name
MAPPINGS = {AUTO + "configuration_auto": "CONFIG_MAPPING", AUTO + "image_processing_auto": "IMAGE_PROCESSOR_MAPPING"}


class Registered(dict):
    """The registered classes of a mapping; asking for one of `homes`, or searching all, first imports where it is."""

    def __init__(self, content: Mapping[Any, Any], homes: Mapping[str, str]) -> None:
        super().__init__(content)
        self.homes = homes

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key in self.homes and not super().__contains__(key):
            import_if_present(self.homes[key])
        return super().__contains__(key)

    def values(self):  # type: ignore[no-untyped-def] # noqa: ANN201 - typeshed's dict_values has no name
        for home in self.homes.values():
            import_if_present(home)
        return super().values()


class Finder(MetaPathFinder):
    """Finds transformers' modules as Python does, and lets each be followed by `replace`."""

    def __init__(self, homes: Mapping[str, Mapping[str, str]]) -> None:
        self.homes = homes

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in MAPPINGS else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.replace(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign] # of this module's loader alone
        return spec

    def replace(self, module: ModuleType) -> None:
        """Put a `Registered` in the place of the dictionary in which a loaded module keeps registered classes."""
        name = MAPPINGS[module.__name__]
        mapping = getattr(module, name)
        mapping._extra_content = Registered(mapping._extra_content, self.homes[name])


def import_if_present(name: str) -> None:
    """Import a module, unless its package is absent, as `mllm` is where somebody took the folder diffclip alone."""
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)


def register_lazily(homes: Mapping[str, Mapping[str, str]]) -> None:
    """Let the Auto classes find our classes, whether transformers is imported already or later.

    `homes`: for each value of `MAPPINGS`, what is asked for (a type of model, or a class) -> the module that
    registers it on import.
    """
    finder = Finder(homes)
    sys.meta_path.insert(0, finder)
    for name in MAPPINGS:
        if name in sys.modules:
            finder.replace(sys.modules[name])
