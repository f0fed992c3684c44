"""transformers' Auto classes know our models, although nothing is imported before one of them is asked for.

To register a model takes its classes, and so torch, transformers and all of ours at every start. Instead, where the
Auto classes look among registered ones, they find a dictionary that imports the module first, which then registers its
own. It is put there as soon as transformers' module is loaded, without importing anything in the midst of that.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

from diffclip.base.after_import import after_import

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


def replace(module: ModuleType, homes: Mapping[str, Mapping[str, str]]) -> None:
    """Put a `Registered` in the place of the dictionary in which a loaded module keeps registered classes."""
    name = MAPPINGS[module.__name__]
    mapping = getattr(module, name)
    mapping._extra_content = Registered(mapping._extra_content, homes[name])


def import_if_present(name: str) -> None:
    """Import a module, unless its package is absent, as `mllm` is where somebody took the folder diffclip alone."""
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)


def register_lazily(homes: Mapping[str, Mapping[str, str]]) -> None:
    """Let the Auto classes find our classes, whether transformers is imported already or later.

    `homes`: for each value of `MAPPINGS`, what is asked for (a type of model, or a class) -> the module that
    registers it on import.
    """
    after_import(dict.fromkeys(MAPPINGS, partial(replace, homes=homes)))
