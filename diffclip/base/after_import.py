"""Something to do as soon as a module of another package is loaded, whenever that is, without importing it for that."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Action = Callable[[ModuleType], None]


class Finder(MetaPathFinder):
    """Finds the modules of `actions` as Python does, and lets each be followed by its action."""

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.actions = actions

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in self.actions else None
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.actions[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign] # of this module's loader alone
        return spec


def after_import(actions: Mapping[str, Action]) -> None:
    """Carry out each action, module name -> what to do with that module, now if it is loaded, otherwise when it is."""
    sys.meta_path.insert(0, Finder(actions))
    for name, action in actions.items():
        if name in sys.modules:
            action(sys.modules[name])
