"""Command lines: flags in either spelling, near misses suggested, numbers in their range, without importing torch."""

import argparse
import difflib
import functools
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from diffclip.base.errors import InputError

STARTERS = ("diffclip ", "python -m ", "torchrun ", "deepspeed ", "lmms-eval ", "./scripts/")  # of an example


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` for all commands of the project.

    Flags are declared and shown with underscores and may be typed with hyphens; they are not abbreviated; whatever is
    wrong with a command line is an `InputError`, which names the nearest flag or choice. A paragraph of the description
    that is a command becomes the example at the end of `--help`.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, **options: Any) -> None:
        paragraphs = (description or "").strip().split("\n\n")
        if examples := [text for text in paragraphs if text.lstrip().startswith(STARTERS)]:
            options.setdefault("epilog", "example:\n" + "\n".join(map(_indented, examples)))
        description = "\n\n".join(text for text in paragraphs if text not in examples)
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
        options.setdefault("formatter_class", layout)
        super().__init__(prog, description=description, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf$)")  # argparse takes -1e-3 for a flag

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return self._nothing_left(*self.parse_known_args(self._known_flags(args), namespace))

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return self._nothing_left(*self.parse_known_intermixed_args(self._known_flags(args), namespace))

    def _known_flags(self, args: Sequence[str] | None) -> list[str]:
        args = list(sys.argv[1:] if args is None else args)
        known = [name for name in self._all_flags() if name.startswith("--")]
        for word in args[: args.index("--")] if "--" in args else args:  # first of all, before what is missing
            flag = word.split("=", 1)[0]
            if flag.startswith("--") and " " not in flag and _spelt(flag) not in known:
                raise InputError(f"unknown flag {flag}{near(flag, known)}")
        return args

    def _nothing_left(self, parsed: Any, unknown: list[str]) -> Any:
        if unknown:
            kind = "flag" if unknown[0].startswith("-") else "argument"
            raise InputError(f"unknown {kind} {unknown[0]} (see --help)")
        return parsed

    def also(self, flag: str, *old_names: str) -> None:
        """Take further names of a flag, which `--help` does not show."""
        for name in old_names:
            self._option_string_actions[name] = self._option_string_actions[flag]

    def _parse_optional(self, arg_string: str) -> Any:
        if arg_string.startswith("--"):
            flag, equals, value = arg_string.partition("=")
            if _spelt(flag) in self._option_string_actions:
                arg_string = _spelt(flag) + equals + value
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


def _spelt(flag: str) -> str:
    """A flag as it is declared, with underscores."""
    return "--" + flag[2:].replace("-", "_")


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is nearly this one."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def near(word: str, known: Iterable[str]) -> str:
    """How a message goes on after a word that is not known: the nearest one that is, or all of them if few."""
    known = list(known)
    if close := closest(_spelt(word) if word.startswith("--") else word, known):
        return f": did you mean {close}? (see --help)"
    return f": must be one of {', '.join(known)}" if len(known) <= 12 else " (see --help)"


def _indented(example: str) -> str:
    """An example as it is typed: docstrings join the lines that end with a backslash."""
    return textwrap.indent(re.sub(r"(?<=\S) {4,}(?=\S)(?!.*#)", r" \\\n    ", textwrap.dedent(example)), "  ")


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have; neither end is needed. NaN and infinity are in no range."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # an end that is not reached itself, as 0 of a learning rate
    below: float = math.inf  # the same at the upper end, as 1 of a dropout

    def __str__(self) -> str:
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = [f"{word} {end:.10g}" for word, end in ends.items() if math.isfinite(end)]
        return " and ".join(words) or "a finite number"

    def check(self, value: float, name: str) -> None:
        """Raise an `InputError` that names the setting, unless `value` is in the range."""
        if isinstance(value, int) and abs(value) > sys.float_info.max:  # math knows no such number
            value = math.inf if value > 0 else -math.inf
        if not (math.isfinite(value) and self.least <= value <= self.most and self.above < value < self.below):
            finite = "" if math.isfinite(value) or self == Range() else "finite and "
            raise InputError(f"{name} {value:g}: must be {finite}{self}")


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
