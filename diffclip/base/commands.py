"""Command lines: flags in either spelling, near misses suggested, numbers in their range, without importing torch."""

import argparse
import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from diffclip.base.errors import InputError


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` for all commands of the project.

    Flags are declared and shown with underscores and may be typed with hyphens; they are not abbreviated; whatever is
    wrong with a command line is an `InputError`, which names the nearest flag or choice.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, description=description, allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return self._all_known(*self.parse_known_args(args, namespace))

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return self._all_known(*self.parse_known_intermixed_args(args, namespace))

    def _all_known(self, parsed: Any, unknown: list[str]) -> Any:
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            known = [name for name in self._all_flags() if name.startswith("--")]
            raise InputError(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}{near(flag, known)}")
        return parsed

    def _parse_optional(self, arg_string: str) -> Any:
        if arg_string.startswith("--"):
            flag, equals, value = arg_string.partition("=")
            spelt = "--" + flag[2:].replace("-", "_")
            if spelt in self._option_string_actions:
                arg_string = spelt + equals + value
        return super()._parse_optional(arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            raise InputError(f"{name} {value}{near(str(value), map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")

    def _all_flags(self) -> list[str]:
        flags = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._all_flags()]
        return flags


def near(word: str, known: Iterable[str]) -> str:
    """How a message goes on after a word that is not known: the nearest one that is, or all of them if few."""
    known = list(known)
    close = difflib.get_close_matches(word.replace("-", "_") if word.startswith("--") else word, known, n=1, cutoff=0.5)
    if word.startswith("--") and not close:
        close = difflib.get_close_matches("--" + word[2:].replace("-", "_"), known, n=1)
    if close:
        return f": did you mean {close[0]}? (see --help)"
    return f": must be one of {', '.join(known)}" if len(known) <= 12 else " (see --help)"


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have; neither end is needed. NaN and infinity are in no range."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # an end that is not reached itself, as 0 of a learning rate

    def __str__(self) -> str:
        words = [f"at least {self.least:g}"] if self.least > -math.inf else []
        words += [f"above {self.above:g}"] if self.above > -math.inf else []
        words += [f"at most {self.most:g}"] if self.most < math.inf else []
        return " and ".join(words) or "a finite number"

    def check(self, value: float, name: str) -> None:
        """Raise an `InputError` that names the setting, unless `value` is in the range."""
        if not (math.isfinite(value) and self.least <= value <= self.most and value > self.above):
            raise InputError(f"{name} {value:g}: must be {self}" if value == value else f"{name} nan: must be {self}")


def number(kind: type[int] | type[float], least: float = -math.inf, most: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of that kind within its range."""
    allowed = Range(least, most)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            allowed.check(value, "")
        except (ValueError, InputError):
            raise argparse.ArgumentTypeError(f"{text!r} must be {allowed}") from None
        return value

    parse.__name__ = kind.__name__
    return parse
