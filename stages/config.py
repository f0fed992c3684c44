"""One dataclass = one YAML file = one command line.

A stage's settings are a typed dataclass. A YAML file named by `--config` is read as if its keys stood on the
command line before the user's own flags, so types, choices and unknown keys are checked in one place.
"""

import argparse
import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from diffclip.base import files
from diffclip.base.errors import InputError
from stages.settings import check
from stages.zero import find_deepspeed_file

Config = TypeVar("Config")


def parse(config_class: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """Build `config_class` from `--config FILE.yaml` and further `--key value` flags (the last one wins).

    Args:
        config_class: a dataclass whose fields all have defaults.
        description: the first lines of `--help`.
        argv: the command line without the program's name; `sys.argv[1:]` by default.

    Raises:
        InputError: unknown key, wrong type, a value out of its range, missing or malformed YAML file.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def add_argument(self, *names: str, **options: Any) -> argparse.Action:
            for key in ("group", "range", "names", "decides", "flag"):  # of a field's metadata, see stages.settings
                options.pop(key, None)
            return super().add_argument(*names, **options)

        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message} (see --help)")

    parser = Parser(config_class, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of the settings below")
    # The deepspeed and torchrun launchers add this flag; Trainer reads the rank from the environment.
    parser.add_argument("--local_rank", type=int, default=-1, help="set by launchers")
    for action in parser._actions:
        if action.type is dict:
            action.type = json.loads
    argv = list(sys.argv[1:] if argv is None else argv)
    namespace, _ = parser.parse_known_args(_config_flags(argv))
    from_yaml = _as_flags(read_yaml(namespace.config, config_class)) if namespace.config else []
    values = vars(parser.parse_args(from_yaml + argv))
    config = config_class(**{f.name: values[f.name] for f in dataclasses.fields(config_class)})
    check(config)
    find_deepspeed_file(config)
    return config


def read_yaml(path: str | Path, config_class: type) -> dict[str, Any]:
    """Read a YAML mapping whose keys are fields of `config_class`; raises InputError otherwise."""
    path = Path(path)
    shipped = Path(__file__).parents[1] / path  # as docs name them, from whatever folder
    if not path.is_file() and path.parts[:2] == ("stages", "configs") and shipped.is_file():
        path = shipped
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file; shipped ones lie in stages/configs/")
    values = files.read_yaml(path) or {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    known = [f.name for f in dataclasses.fields(config_class)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
            raise InputError(f"{path}: unknown key `{key}`; {hint}")
    return values


def write_yaml(config: Any, path: str | Path) -> None:
    """Write the resolved settings; `read_yaml` gives them back."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    files.write_whole(path, text)


def require(config: Any, *keys: str) -> None:
    """Raise InputError if one of the named settings is empty."""
    for key in keys:
        if not getattr(config, key):
            raise InputError(f"setting `{key}` is missing: give --{key} or write it in the --config file")


def _config_flags(argv: list[str]) -> list[str]:
    """Only `--config FILE` of a command line, so that nothing else is judged before the YAML is read."""
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            return ["--help"]
        if word == "--config":
            return argv[i : i + 2]
        if word.startswith("--config="):
            return [word]
    return []


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for key, value in values.items():
        if value is None or value == []:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        flags += [f"--{key}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return flags
