"""One dataclass = one YAML file = one command line.

A stage's settings are a typed dataclass. A YAML file named by `--config` is read as if its keys were flags before the
user's own, so types, choices, ranges and unknown keys are checked in one place, without anything heavy.
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from diffclip.base import files
from diffclip.base.commands import Parser, closest
from diffclip.base.errors import InputError
from stages.settings import check, check_value
from stages.shipped import find

Config = TypeVar("Config")
GROUPS = ("data", "model", "optimisation", "LoRA", "run", "dry run")  # the order in `--help`
BOOLEANS = {"true": True, "t": True, "yes": True, "y": True, "1": True}
BOOLEANS |= {"false": False, "f": False, "no": False, "n": False, "0": False}


class SettingsParser(Parser):
    """The flags of a dataclass of settings.

    Fields have the metadata that `stages.settings` describes. Where "flag" gives a name, it is what is shown; the
    field's own and those of "aliases" are taken beside it.
    """

    def __init__(self, config_class: type, description: str) -> None:
        verb = config_class.__name__.removesuffix("Config").lower()
        usage = "%(prog)s [--config NAME] [--SETTING VALUE ...]"
        super().__init__(f"diffclip {verb}", description, usage=usage)
        self.add_argument("--config", metavar="NAME", help="YAML file of settings, or a shipped one's name")
        # The deepspeed and torchrun launchers add this flag; Trainer reads the rank from the environment.
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
        self.fields = {field.name: field for field in dataclasses.fields(config_class)}
        named = [field.metadata.get("group", "settings") for field in self.fields.values()]
        headings = {name: self.add_argument_group(name) for name in [*GROUPS, *named] if name in named}
        hints = typing.get_type_hints(config_class)
        self.kinds = {name: _without_none(hints[name]) for name in self.fields}
        for name, field in self.fields.items():
            shown, *others = map("--{}".format, _names(field))
            heading = headings[field.metadata.get("group", "settings")]
            options = _options(self.kinds[name])
            heading.add_argument(shown, dest=name, default=_default(field), help=_help(field), **options)
            self.also(shown, *others)
            if _default(field) is True:
                self.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)

    def read(self, argv: Sequence[str], before: argparse.Namespace | None = None, source: str = "") -> Any:
        """Parse flags; those that are not given keep their value of `before`.

        Args:
            source: the file that the flags come from. Their values are checked here, so that a message begins with it;
                those of the command line are, with the whole, by `stages.settings.check`.
        """
        try:
            namespace = self.parse_args(argv, before)
            for name, field in self.fields.items() if source else ():
                check_value(field, getattr(namespace, name))
        except InputError as error:
            raise InputError(f"{source}: {error}" if source else str(error)) from None
        return namespace

    def flags_of(self, values: dict[str, Any], source: str) -> list[str]:
        """The flags that mean what a YAML mapping says."""
        flags: list[str] = []
        for key, value in values.items():
            if value is None or value == []:
                continue
            kind = typing.get_origin(self.kinds[key]) or self.kinds[key]
            if isinstance(value, list | dict) and kind is not type(value):
                raise InputError(f"{source}: `{key}` is not a {type(value).__name__} but one value")
            if isinstance(value, dict):
                value = json.dumps(value, default=str)
            flags += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
        return flags


def parse(config_class: type[Config], description: str | None, argv: list[str] | None = None) -> Config:
    """Build `config_class` from `--config NAME` and further `--key value` flags (the last one wins).

    Args:
        config_class: a dataclass whose fields all have defaults; XConfig is the command `diffclip x`.
        description: of `--help`, as `diffclip.base.commands.Parser` takes it.
        argv: the command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        InputError: unknown key, wrong type, number out of its range, missing or malformed YAML file.
    """
    parser = SettingsParser(config_class, description or "")
    argv = list(sys.argv[1:] if argv is None else argv)
    from_yaml = None
    if name := _config_of(argv):
        file = find(name)
        from_yaml = parser.read(parser.flags_of(read_yaml(file, config_class), str(file)), source=str(file))
    values = vars(parser.read(argv, from_yaml))
    config = config_class(**{name: values[name] for name in parser.fields})
    check(config)
    find_deepspeed_file(config)
    return config


def read_yaml(path: str | Path, config_class: type) -> dict[str, Any]:
    """Read a YAML mapping whose keys are fields of `config_class`, or old names of them.

    Raises:
        InputError: no such file, not a mapping, or an unknown key.
    """
    path = find(path)
    values = files.read_yaml(path) or {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    fields = dataclasses.fields(config_class)
    known = [_names(field)[0] for field in fields]
    names = {name: field.name for field in fields for name in _names(field)}
    for key in values:
        if key not in names:
            close = closest(str(key), known)
            hint = f"did you mean `{close}`?" if close else f"known keys: {', '.join(known)}"
            raise InputError(f"{path}: unknown key `{key}`; {hint}")
    return {names[key]: value for key, value in values.items()}


def write_yaml(config: Any, path: str | Path) -> None:
    """Write the resolved settings; `read_yaml` gives them back."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    files.write_whole(path, text)


def require(config: Any, *keys: str) -> None:
    """Raise InputError if one of the named settings is empty."""
    shown = {field.name: _names(field)[0] for field in dataclasses.fields(config)}
    for key in keys:
        if not getattr(config, key):
            raise InputError(f"setting `{shown[key]}` is missing: give --{shown[key]} or write it in the --config file")


def find_deepspeed_file(config: Any) -> None:
    """Let `config.deepspeed`, if there is one, name a file that is there, a shipped one by its name.

    Raises:
        InputError: there is no such file, or it is no DeepSpeed configuration.
    """
    name = getattr(config, "deepspeed", "")
    if not name:
        return
    try:
        config.deepspeed = name if Path(name).is_file() else str(find(name))
    except (InputError, OSError):  # the latter of a name that is too long for one
        raise InputError(
            f"{name}: no such DeepSpeed file (setting `deepspeed`); shipped ones lie in stages/configs/deepspeed/, and "
            "--deepspeed= goes without"
        ) from None
    try:
        zero_stage(config.deepspeed)
    except InputError as error:
        raise InputError(f"{error} (setting `deepspeed`)") from None


def zero_stage(deepspeed: str) -> int:
    """The ZeRO stage of a DeepSpeed file, 0 for no file; InputError if it is no DeepSpeed configuration."""
    if not deepspeed:
        return 0
    settings = files.read_json(deepspeed)
    try:
        return int(settings.get("zero_optimization", {}).get("stage", 0))
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{deepspeed}: no DeepSpeed configuration, whose zero_optimization has a stage") from None


def _config_of(argv: list[str]) -> str | None:
    """The `--config` of a command line, of which nothing else is judged before the YAML is read."""
    if "-h" in argv or "--help" in argv:
        return None
    only = Parser(add_help=False)
    only.add_argument("--config")
    return only.parse_known_args(argv)[0].config


def _options(kind: Any) -> dict[str, Any]:
    """How argparse reads a value of that type."""
    if typing.get_origin(kind) is list:
        return {**_options(typing.get_args(kind)[0]), "nargs": "+"}
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return {"choices": choices, "type": lambda text: {str(choice): choice for choice in choices}.get(text, text)}
    if kind is bool:
        return {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    if kind is dict or typing.get_origin(kind) is dict:
        return {"type": _json, "metavar": "JSON"}
    return {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}


def _without_none(kind: Any) -> Any:
    """`int` of `int | None`."""
    present = [part for part in typing.get_args(kind) if part is not type(None)]
    return present[0] if type(None) in typing.get_args(kind) else kind


def _names(field: dataclasses.Field) -> list[str]:
    """All names of a setting, the one that is shown first."""
    shown = field.metadata.get("flag", field.name)
    return list(dict.fromkeys([shown, field.name, *field.metadata.get("aliases", ())]))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _help(field: dataclasses.Field) -> str:
    """A setting's line in `--help`, with the numbers that it may have and its default."""
    default = _default(field)
    notes = [str(field.metadata["range"])] if "range" in field.metadata else []
    if isinstance(default, bool):
        notes += [f"default: true; also --no_{field.name}" if default else "default: false"]
    elif default or default == 0:
        notes += [f"default: {' '.join(map(str, default)) if isinstance(default, list) else default}"]
    text = field.metadata.get("help", "") + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLEANS[text.lower()]


def _json(text: str) -> dict[str, Any]:
    try:
        value = files.parse_json(text, repr(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no mapping such as {{"key": 1}}')
    return value
